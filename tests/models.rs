//! Promise: real models on these layers compute what they do on candle-nn's, and every parameter of theirs learns.
//!
//! One of each kind in candle-transformers: an encoder (BERT), decoders (Llama, and Gemma for its zero-centred weights), a
//! vision model (ViT), a speech model (Whisper). Each stands here in a few lines on this crate's layers and candle's
//! differentiable ops, reads the same variables, and runs beside the original on the same inputs.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Module, Tensor};
use candle_fused_layer_norm::{
    GradAudit, LayerNorm, RmsNorm, grad_audit, layer_norm, rms_norm, rms_norm_zero_centered,
};
use candle_nn::{
    Activation, Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, VarBuilder, VarMap,
    embedding, linear, linear_no_bias, rotary_emb,
};
use candle_transformers::models::{bert, gemma, llama, vit, whisper};
use common::case::loss;
use common::data::{named_vars, normals, rng, tensor, values};
use common::devices::devices;

type Candle<T> = candle_core::Result<T>;

const BATCH: usize = 2;
const TOKENS: usize = 5;
const WIDTH: usize = 16;
const HEADS: usize = 4;
const HIDDEN: usize = 24;
const LAYERS: usize = 2;
const VOCABULARY: usize = 11;

fn random(shape: &[usize], seed: u64, device: &Device) -> Candle<Tensor> {
    let values = normals(&mut rng(seed), shape.iter().product());
    tensor(&values, shape, DType::F32, device)
}

/// Token ids, each of the vocabulary at least once in a long batch.
fn tokens(device: &Device) -> Candle<Tensor> {
    let ids = (0..BATCH * TOKENS).map(|index| (index * 7 % VOCABULARY) as u32);
    Tensor::from_vec(ids.collect(), (BATCH, TOKENS), device)
}

/// Seeded values for every variable: what a checkpoint would hold.
fn fill(varmap: &VarMap) -> Result<()> {
    let mut rng = rng(1);
    for (name, var) in named_vars(varmap) {
        let values = normals(&mut rng, var.elem_count());
        let values = tensor(&values, var.shape(), var.dtype(), var.device())?;
        let inputs: usize = var.dims().iter().skip(1).product();
        let values = match var.rank() {
            1 if name.ends_with("weight") => ((values * 0.2)? + 1.)?,
            1 => (values * 0.2)?,
            _ => (values / (inputs as f64).sqrt())?,
        };
        var.set(&values)?;
    }
    Ok(())
}

/// Which variables learn through a model of this crate's layers, and through the original.
struct Audits {
    ours: GradAudit,
    theirs: GradAudit,
}

/// Fills the variables that `theirs` made, and runs both models on them.
#[track_caller]
fn compare<O, T>(
    varmap: &VarMap,
    theirs: T,
    ours: impl FnOnce(VarBuilder) -> Candle<O>,
    device: &Device,
    run_theirs: impl FnOnce(T) -> Candle<Tensor>,
    run_ours: impl FnOnce(O) -> Candle<Tensor>,
) -> Result<Audits> {
    let names = |varmap| named_vars(varmap).into_keys().collect::<Vec<_>>();
    let before = names(varmap);
    let ours = ours(VarBuilder::from_varmap(varmap, DType::F32, device))?;
    assert_eq!(names(varmap), before, "other variables than the original's");
    fill(varmap)?;

    let (theirs, ours) = (run_theirs(theirs)?, run_ours(ours)?);
    assert_eq!(ours.dims(), theirs.dims());
    let (of_ours, of_theirs) = (values(&ours)?, values(&theirs)?);
    let largest = of_theirs.iter().fold(0f64, |max, y| max.max(y.abs()));
    for (index, (ours, theirs)) in of_ours.into_iter().zip(of_theirs).enumerate() {
        assert!(
            (ours - theirs).abs() <= 1e-5 * largest,
            "y[{index}]: expected {theirs}, got {ours}"
        );
    }
    let dy = random(ours.dims(), 2, device)?;
    let audit = |y: &Tensor| grad_audit(varmap, &loss(y, &dy)?.backward()?);
    let audits = Audits {
        ours: audit(&ours)?,
        theirs: audit(&theirs)?,
    };
    println!("ours: {}\ntheirs: {}", audits.ours, audits.theirs);
    Ok(audits)
}

impl Audits {
    /// Holds our model to a gradient for every variable, and the original to `theirs` of them.
    #[track_caller]
    fn check(&self, theirs: usize) {
        assert!(self.ours.is_ok(), "ours: {}", self.ours);
        assert_eq!(self.theirs.with_gradient(), theirs, "{}", self.theirs);
        assert!(theirs < self.theirs.variables());
    }
}

/// `[batch, tokens, heads * width]` as `[batch, heads, tokens, width]`.
fn split(xs: &Tensor, heads: usize) -> Candle<Tensor> {
    let (batch, tokens, width) = xs.dims3()?;
    let xs = xs.reshape((batch, tokens, heads, width / heads))?;
    xs.transpose(1, 2)?.contiguous()
}

/// Attention over heads that are split, merged again.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Candle<Tensor> {
    let scores = (q.matmul(&k.t()?)? / (q.dim(3)? as f64).sqrt())?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    let mixed = candle_nn::ops::softmax(&scores, 3)?.matmul(v)?;
    mixed.transpose(1, 2)?.flatten_from(2)
}

/// Minus infinity where a token would see a later one.
fn causal(device: &Device) -> Candle<Tensor> {
    let later = |index| index % TOKENS > index / TOKENS;
    let mask = (0..TOKENS * TOKENS).map(|i| if later(i) { f32::NEG_INFINITY } else { 0. });
    Tensor::from_vec(mask.collect(), (TOKENS, TOKENS), device)
}

/// From `xs` to themselves or to a context.
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

impl Attention {
    fn new(q: Linear, k: Linear, v: Linear, out: Linear) -> Self {
        Self { q, k, v, out }
    }

    fn forward(&self, xs: &Tensor, context: &Tensor, mask: Option<&Tensor>) -> Candle<Tensor> {
        let q = split(&xs.apply(&self.q)?, HEADS)?;
        let k = split(&context.apply(&self.k)?, HEADS)?;
        let v = split(&context.apply(&self.v)?, HEADS)?;
        attend(&q, &k, &v, mask)?.apply(&self.out)
    }
}

struct Mlp {
    up: Linear,
    activation: Activation,
    down: Linear,
}

impl Module for Mlp {
    fn forward(&self, xs: &Tensor) -> Candle<Tensor> {
        xs.apply(&self.up)?
            .apply(&self.activation)?
            .apply(&self.down)
    }
}

/// The query, key and value of BERT and ViT, whose outer names differ.
fn bert_attention(inner: VarBuilder, outer: VarBuilder) -> Candle<Attention> {
    let part = |name| linear(WIDTH, WIDTH, inner.pp(name));
    let out = linear(WIDTH, WIDTH, outer.pp("output.dense"))?;
    Ok(Attention::new(
        part("query")?,
        part("key")?,
        part("value")?,
        out,
    ))
}

fn bert_mlp(vb: &VarBuilder) -> Candle<Mlp> {
    Ok(Mlp {
        up: linear(WIDTH, HIDDEN, vb.pp("intermediate.dense"))?,
        activation: Activation::Gelu,
        down: linear(HIDDEN, WIDTH, vb.pp("output.dense"))?,
    })
}

/// Norms after the residual sums.
struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<(Attention, LayerNorm, Mlp, LayerNorm)>,
}

impl Bert {
    fn new(config: &bert::Config, vb: VarBuilder) -> Candle<Self> {
        let norm = |vb: VarBuilder| layer_norm(WIDTH, config.layer_norm_eps, vb.pp("LayerNorm"));
        let layer = |index| -> Candle<_> {
            let vb = vb.pp(format!("encoder.layer.{index}"));
            let attention = bert_attention(vb.pp("attention.self"), vb.pp("attention"))?;
            let norms = (norm(vb.pp("attention.output"))?, norm(vb.pp("output"))?);
            Ok((attention, norms.0, bert_mlp(&vb)?, norms.1))
        };
        let vb = vb.pp("embeddings");
        Ok(Self {
            words: embedding(VOCABULARY, WIDTH, vb.pp("word_embeddings"))?,
            positions: embedding(TOKENS, WIDTH, vb.pp("position_embeddings"))?,
            types: embedding(
                config.type_vocab_size,
                WIDTH,
                vb.pp("token_type_embeddings"),
            )?,
            norm: norm(vb)?,
            layers: (0..LAYERS).map(layer).collect::<Candle<_>>()?,
        })
    }

    fn forward(&self, tokens: &Tensor, types: &Tensor) -> Candle<Tensor> {
        let xs = (tokens.apply(&self.words)? + types.apply(&self.types)?)?;
        let mut xs = xs
            .broadcast_add(self.positions.embeddings())?
            .apply(&self.norm)?;
        for (attention, norm_1, mlp, norm_2) in &self.layers {
            xs = (&xs + attention.forward(&xs, &xs, None)?)?.apply(norm_1)?;
            xs = (&xs + xs.apply(mlp)?)?.apply(norm_2)?;
        }
        Ok(xs)
    }
}

#[test]
fn bert_an_encoder() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let config = bert::Config {
            vocab_size: VOCABULARY,
            hidden_size: WIDTH,
            num_hidden_layers: LAYERS,
            num_attention_heads: HEADS,
            intermediate_size: HIDDEN,
            max_position_embeddings: TOKENS,
            ..Default::default()
        };
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = bert::BertModel::load(vb, &config)?;
        let tokens = tokens(device)?;
        let types = tokens.ge(VOCABULARY as u32 / 2)?.to_dtype(DType::U32)?;
        let audits = compare(
            &varmap,
            theirs,
            |vb| Bert::new(&config, vb),
            device,
            |theirs| theirs.forward(&tokens, &types, None),
            |ours| ours.forward(&tokens, &types),
        )?;
        // Its last op is a norm.
        audits.check(0);
    }
    Ok(())
}

/// Norms before attention and MLP, rotary positions, keys and values shared by heads, a gated MLP.
struct Decoder {
    tokens: Embedding,
    scale: f64,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: Linear,
}

struct DecoderLayer {
    norm_1: RmsNorm,
    attention: Attention,
    norm_2: RmsNorm,
    gate: Linear,
    activation: Activation,
    mlp: (Linear, Linear),
}

const KV_HEADS: usize = 2;
const ROPE_BASE: f64 = 10000.;

/// What Llama and Gemma differ in.
struct Family {
    norm: fn(usize, f64, VarBuilder) -> Candle<RmsNorm>,
    activation: Activation,
    /// Of the embedding.
    scale: f64,
    /// Whether the head is the embedding.
    tied: bool,
}

impl Decoder {
    fn new(family: &Family, eps: f64, vb: VarBuilder) -> Candle<Self> {
        let norm = |vb: VarBuilder| (family.norm)(WIDTH, eps, vb);
        let kv_width = KV_HEADS * WIDTH / HEADS;
        let layer = |index| {
            let vb = vb.pp(format!("model.layers.{index}"));
            let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
            Ok(DecoderLayer {
                norm_1: norm(vb.pp("input_layernorm"))?,
                attention: Attention::new(
                    linear_no_bias(WIDTH, WIDTH, attention.pp("q_proj"))?,
                    linear_no_bias(WIDTH, kv_width, attention.pp("k_proj"))?,
                    linear_no_bias(WIDTH, kv_width, attention.pp("v_proj"))?,
                    linear_no_bias(WIDTH, WIDTH, attention.pp("o_proj"))?,
                ),
                norm_2: norm(vb.pp("post_attention_layernorm"))?,
                gate: linear_no_bias(WIDTH, HIDDEN, mlp.pp("gate_proj"))?,
                activation: family.activation,
                mlp: (
                    linear_no_bias(WIDTH, HIDDEN, mlp.pp("up_proj"))?,
                    linear_no_bias(HIDDEN, WIDTH, mlp.pp("down_proj"))?,
                ),
            })
        };
        let tokens = embedding(VOCABULARY, WIDTH, vb.pp("model.embed_tokens"))?;
        let head = if family.tied {
            Linear::new(tokens.embeddings().clone(), None)
        } else {
            linear_no_bias(WIDTH, VOCABULARY, vb.pp("lm_head"))?
        };
        Ok(Self {
            tokens,
            scale: family.scale,
            layers: (0..LAYERS).map(layer).collect::<Candle<_>>()?,
            norm: norm(vb.pp("model.norm"))?,
            head,
        })
    }

    /// The logits after the last token, `[batch, vocabulary]`.
    fn forward(&self, tokens: &Tensor) -> Candle<Tensor> {
        let mask = causal(tokens.device())?;
        let (cos, sin) = rotary(tokens.device())?;
        let mut xs = (tokens.apply(&self.tokens)? * self.scale)?;
        for layer in &self.layers {
            let rotate = |xs: Tensor, heads| rotary_emb::rope_slow(&split(&xs, heads)?, &cos, &sin);
            let h = xs.apply(&layer.norm_1)?;
            let q = rotate(h.apply(&layer.attention.q)?, HEADS)?;
            let k = share(&rotate(h.apply(&layer.attention.k)?, KV_HEADS)?)?;
            let v = share(&split(&h.apply(&layer.attention.v)?, KV_HEADS)?)?;
            let mixed = attend(&q, &k, &v, Some(&mask))?;
            xs = (xs + mixed.apply(&layer.attention.out)?)?;

            let h = xs.apply(&layer.norm_2)?;
            let gate = h.apply(&layer.gate)?.apply(&layer.activation)?;
            let (up, down) = &layer.mlp;
            xs = (xs + (gate * h.apply(up)?)?.apply(down)?)?;
        }
        xs.i((.., TOKENS - 1))?.apply(&self.norm)?.apply(&self.head)
    }
}

/// Each head of keys or values for as many heads of queries.
fn share(xs: &Tensor) -> Candle<Tensor> {
    let (batch, heads, tokens, width) = xs.dims4()?;
    let shared = (batch, heads, HEADS / heads, tokens, width);
    let xs = xs.unsqueeze(2)?.broadcast_as(shared)?;
    xs.reshape((batch, HEADS, tokens, width))
}

/// cos and sin of position * base^(-2 i / width), `[tokens, width / 2]`.
fn rotary(device: &Device) -> Candle<(Tensor, Tensor)> {
    let width = WIDTH / HEADS;
    let angle = |position: usize, pair: usize| {
        (position as f64 / ROPE_BASE.powf(2. * pair as f64 / width as f64)) as f32
    };
    let angles = (0..TOKENS).flat_map(|position| (0..width / 2).map(move |i| angle(position, i)));
    let angles = Tensor::from_vec(angles.collect(), (TOKENS, width / 2), device)?;
    Ok((angles.cos()?, angles.sin()?))
}

#[test]
fn llama_a_decoder() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let config = llama::Config {
            hidden_size: WIDTH,
            intermediate_size: HIDDEN,
            vocab_size: VOCABULARY,
            num_hidden_layers: LAYERS,
            num_attention_heads: HEADS,
            num_key_value_heads: KV_HEADS,
            rope_theta: ROPE_BASE as f32,
            max_position_embeddings: TOKENS,
            ..llama::Config::config_7b_v2(false)
        };
        let family = Family {
            norm: rms_norm,
            activation: Activation::Silu,
            scale: 1.,
            tied: false,
        };
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = llama::Llama::load(vb, &config)?;
        let tokens = tokens(device)?;
        let mut cache = llama::Cache::new(false, DType::F32, &config, device)?;
        let audits = compare(
            &varmap,
            theirs,
            |vb| Decoder::new(&family, config.rms_norm_eps, vb),
            device,
            |theirs| theirs.forward(&tokens, 0, &mut cache),
            |ours| ours.forward(&tokens),
        )?;
        // The head, behind the last norm.
        audits.check(1);
    }
    Ok(())
}

#[test]
fn gemma_a_decoder_with_zero_centered_weights() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let config = gemma::Config {
            attention_bias: false,
            head_dim: WIDTH / HEADS,
            hidden_act: Some(Activation::NewGelu),
            hidden_activation: None,
            hidden_size: WIDTH,
            intermediate_size: HIDDEN,
            num_attention_heads: HEADS,
            num_hidden_layers: LAYERS,
            num_key_value_heads: KV_HEADS,
            rms_norm_eps: 1e-6,
            rope_theta: ROPE_BASE,
            vocab_size: VOCABULARY,
            max_position_embeddings: TOKENS,
        };
        let family = Family {
            norm: rms_norm_zero_centered,
            activation: Activation::NewGelu,
            scale: (WIDTH as f64).sqrt(),
            tied: true,
        };
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = gemma::Model::new(false, &config, vb)?;
        let tokens = tokens(device)?;
        let audits = compare(
            &varmap,
            theirs,
            |vb| Decoder::new(&family, config.rms_norm_eps, vb),
            device,
            |mut theirs| theirs.forward(&tokens, 0)?.squeeze(1),
            |ours| ours.forward(&tokens),
        )?;
        // Its norm is written in differentiable ops. What is cut is cut by `rope` and `softmax_last_dim`.
        audits.check(audits.theirs.variables() - 2 * LAYERS);
        let cut = |name: &String| name.contains("q_proj") || name.contains("k_proj");
        assert!(audits.theirs.missing().iter().all(cut), "{}", audits.theirs);
    }
    Ok(())
}

/// Patches, a class token, norms before attention and MLP.
struct Vit {
    patches: Conv2d,
    class: Tensor,
    positions: Tensor,
    layers: Vec<(LayerNorm, Attention, LayerNorm, Mlp)>,
    norm: LayerNorm,
    classifier: Linear,
}

const CHANNELS: usize = 3;
const PATCH: usize = 4;
const IMAGE: usize = 2 * PATCH;
const LABELS: usize = 5;

impl Vit {
    fn new(config: &vit::Config, vb: VarBuilder) -> Candle<Self> {
        let norm = |vb| layer_norm(WIDTH, config.layer_norm_eps, vb);
        let classifier = linear(WIDTH, LABELS, vb.pp("classifier"))?;
        let vb = vb.pp("vit");
        let layer = |index| -> Candle<_> {
            let vb = vb.pp(format!("encoder.layer.{index}"));
            let attention = bert_attention(vb.pp("attention.attention"), vb.pp("attention"))?;
            let norms = (
                norm(vb.pp("layernorm_before"))?,
                norm(vb.pp("layernorm_after"))?,
            );
            Ok((norms.0, attention, norms.1, bert_mlp(&vb)?))
        };
        let stride = Conv2dConfig {
            stride: PATCH,
            ..Default::default()
        };
        let embeddings = vb.pp("embeddings");
        let projection = embeddings.pp("patch_embeddings.projection");
        let patches = (IMAGE / PATCH) * (IMAGE / PATCH);
        Ok(Self {
            patches: candle_nn::conv2d(CHANNELS, WIDTH, PATCH, stride, projection)?,
            class: embeddings.get((1, 1, WIDTH), "cls_token")?,
            positions: embeddings.get((1, patches + 1, WIDTH), "position_embeddings")?,
            layers: (0..LAYERS).map(layer).collect::<Candle<_>>()?,
            norm: norm(vb.pp("layernorm"))?,
            classifier,
        })
    }
}

impl Module for Vit {
    fn forward(&self, image: &Tensor) -> Candle<Tensor> {
        let patches = image
            .apply(&self.patches)?
            .flatten_from(2)?
            .transpose(1, 2)?;
        let class = self.class.broadcast_as((image.dim(0)?, 1, WIDTH))?;
        let mut xs = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        for (norm_1, attention, norm_2, mlp) in &self.layers {
            let h = xs.apply(norm_1)?;
            xs = (xs + attention.forward(&h, &h, None)?)?;
            xs = (&xs + xs.apply(norm_2)?.apply(mlp)?)?;
        }
        xs.i((.., 0))?.apply(&self.norm)?.apply(&self.classifier)
    }
}

#[test]
fn vit_a_vision_model() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let config = vit::Config {
            hidden_size: WIDTH,
            num_hidden_layers: LAYERS,
            num_attention_heads: HEADS,
            intermediate_size: HIDDEN,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            image_size: IMAGE,
            patch_size: PATCH,
            num_channels: CHANNELS,
            qkv_bias: true,
        };
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = vit::Model::new(&config, LABELS, vb)?;
        let image = random(&[BATCH, CHANNELS, IMAGE, IMAGE], 3, device)?;
        let audits = compare(
            &varmap,
            theirs,
            |vb| Vit::new(&config, vb),
            device,
            |theirs| theirs.forward(&image),
            |ours| ours.forward(&image),
        )?;
        // The last norm is given a view, for which candle-nn's has a gradient, and the residual sums carry it on. Missing are
        // the norms within the layers, and queries and keys behind `softmax_last_dim`. No gradient passes between patches and
        // the class token: what is left of the projection's is zero.
        audits.check(audits.theirs.variables() - LAYERS * 8);
        let cut = |name: &String| {
            ["layernorm_", "query", "key"]
                .iter()
                .any(|cut| name.contains(cut))
        };
        assert!(audits.theirs.missing().iter().all(cut), "{}", audits.theirs);
        assert_eq!(audits.theirs.zero().len(), 2, "{}", audits.theirs);
    }
    Ok(())
}

/// An encoder of spectrograms and a decoder of tokens that attends to it.
struct Whisper {
    convolutions: [Conv1d; 2],
    encoder: Vec<WhisperLayer>,
    encoder_norm: LayerNorm,
    tokens: Embedding,
    positions: Tensor,
    decoder: Vec<WhisperLayer>,
    decoder_norm: LayerNorm,
}

struct WhisperLayer {
    attention: (LayerNorm, Attention),
    cross: Option<(LayerNorm, Attention)>,
    mlp: (LayerNorm, Mlp),
}

const MELS: usize = 6;
const FRAMES: usize = 8;

impl WhisperLayer {
    fn new(cross: bool, vb: VarBuilder) -> Candle<Self> {
        let norm = |name| layer_norm(WIDTH, 1e-5, vb.pp(name));
        let attention = |vb: VarBuilder| -> Candle<_> {
            let part = |name| linear(WIDTH, WIDTH, vb.pp(name));
            let k = linear_no_bias(WIDTH, WIDTH, vb.pp("k_proj"))?;
            Ok(Attention::new(
                part("q_proj")?,
                k,
                part("v_proj")?,
                part("out_proj")?,
            ))
        };
        let to_context = || -> Candle<_> {
            let norm = norm("encoder_attn_layer_norm")?;
            Ok((norm, attention(vb.pp("encoder_attn"))?))
        };
        let mlp = Mlp {
            up: linear(WIDTH, 4 * WIDTH, vb.pp("fc1"))?,
            activation: Activation::NewGelu,
            down: linear(4 * WIDTH, WIDTH, vb.pp("fc2"))?,
        };
        Ok(Self {
            attention: (
                norm("self_attn_layer_norm")?,
                attention(vb.pp("self_attn"))?,
            ),
            cross: cross.then(to_context).transpose()?,
            mlp: (norm("final_layer_norm")?, mlp),
        })
    }

    fn forward(
        &self,
        xs: &Tensor,
        context: Option<&Tensor>,
        mask: Option<&Tensor>,
    ) -> Candle<Tensor> {
        let (norm, attention) = &self.attention;
        let h = xs.apply(norm)?;
        let mut xs = (xs + attention.forward(&h, &h, mask)?)?;
        if let (Some((norm, attention)), Some(context)) = (&self.cross, context) {
            xs = (&xs + attention.forward(&xs.apply(norm)?, context, None)?)?;
        }
        let (norm, mlp) = &self.mlp;
        &xs + xs.apply(norm)?.apply(mlp)?
    }
}

impl Whisper {
    fn new(vb: VarBuilder) -> Candle<Self> {
        let (encoder, decoder) = (vb.pp("model.encoder"), vb.pp("model.decoder"));
        let conv = |index: usize, inputs| {
            let config = Conv1dConfig {
                padding: 1,
                stride: index,
                ..Default::default()
            };
            candle_nn::conv1d(inputs, WIDTH, 3, config, encoder.pp(format!("conv{index}")))
        };
        let layers = |vb: &VarBuilder, cross| {
            let layer = |index| WhisperLayer::new(cross, vb.pp(format!("layers.{index}")));
            (0..LAYERS).map(layer).collect::<Candle<_>>()
        };
        Ok(Self {
            convolutions: [conv(1, MELS)?, conv(2, WIDTH)?],
            encoder: layers(&encoder, false)?,
            encoder_norm: layer_norm(WIDTH, 1e-5, encoder.pp("layer_norm"))?,
            tokens: embedding(VOCABULARY, WIDTH, decoder.pp("embed_tokens"))?,
            positions: decoder.get((TOKENS, WIDTH), "embed_positions.weight")?,
            decoder: layers(&decoder, true)?,
            decoder_norm: layer_norm(WIDTH, 1e-5, decoder.pp("layer_norm"))?,
        })
    }

    fn forward(&self, mels: &Tensor, tokens: &Tensor) -> Candle<Tensor> {
        let [first, second] = &self.convolutions;
        let frames = mels.apply(first)?.gelu()?.apply(second)?.gelu()?;
        let mut context = frames
            .transpose(1, 2)?
            .broadcast_add(&waves(mels.device())?)?;
        for layer in &self.encoder {
            context = layer.forward(&context, None, None)?;
        }
        let context = context.apply(&self.encoder_norm)?;

        let mask = causal(mels.device())?;
        let mut xs = tokens.apply(&self.tokens)?.broadcast_add(&self.positions)?;
        for layer in &self.decoder {
            xs = layer.forward(&xs, Some(&context), Some(&mask))?;
        }
        let head = Linear::new(self.tokens.embeddings().clone(), None);
        xs.apply(&self.decoder_norm)?.apply(&head)
    }
}

/// The encoder's positions: sines of every frequency and then cosines, `[frames, width]`.
fn waves(device: &Device) -> Candle<Tensor> {
    let half = WIDTH / 2;
    let angle = |frame: usize, wave: usize| {
        (frame as f64 * 1e4f64.powf(-(wave as f64) / (half - 1) as f64)) as f32
    };
    let angles = (0..FRAMES).flat_map(|frame| (0..half).map(move |wave| angle(frame, wave)));
    let angles = Tensor::from_vec(angles.collect(), (FRAMES, half), device)?;
    Tensor::cat(&[angles.sin()?, angles.cos()?], 1)
}

#[test]
fn whisper_a_speech_model() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let config = whisper::Config {
            num_mel_bins: MELS,
            max_source_positions: FRAMES,
            d_model: WIDTH,
            encoder_attention_heads: HEADS,
            encoder_layers: LAYERS,
            vocab_size: VOCABULARY,
            max_target_positions: TOKENS,
            decoder_attention_heads: HEADS,
            decoder_layers: LAYERS,
            suppress_tokens: Vec::new(),
        };
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = whisper::model::Whisper::load(&vb, config)?;
        let mels = random(&[BATCH, MELS, 2 * FRAMES], 4, device)?;
        let tokens = tokens(device)?;
        let audits = compare(
            &varmap,
            theirs,
            Whisper::new,
            device,
            |mut theirs| {
                let context = theirs.encoder.forward(&mels, true)?;
                let ys = theirs.decoder.forward(&tokens, &context, true)?;
                theirs.decoder.final_linear(&ys)
            },
            |ours| ours.forward(&mels, &tokens),
        )?;
        // The embedding of tokens as the head, behind the last norm.
        audits.check(1);
    }
    Ok(())
}
