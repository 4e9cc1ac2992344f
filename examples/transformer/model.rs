//! A decoder-only GPT of pre-norm blocks, after GPT-2: learned positions, GELU, token embedding and output tied.
//!
//! Everything in it has a gradient. That rules out candle-nn's fused `softmax_last_dim`, `rope` and its own layer norm.

use candle_core::{D, Device, Module, Result, Tensor, Var};
use candle_fused_layer_norm::{LayerNorm, layer_norm};
use candle_nn::{
    Embedding, Linear, VarBuilder, VarMap, embedding, linear, loss::cross_entropy, ops::softmax,
};
use rand::{
    Rng,
    distr::{Distribution, weighted::WeightedIndex},
};
use std::{collections::BTreeMap, f64::consts::TAU, sync::PoisonError};

const NORM_EPS: f64 = 1e-5;

#[derive(Clone, Debug)]
pub struct Config {
    pub vocab_size: usize,
    /// The most tokens that are attended to.
    pub context: usize,
    pub layers: usize,
    /// Divides `channels`.
    pub heads: usize,
    pub channels: usize,
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: usize,
}

impl Attention {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let c = config.channels;
        Ok(Self {
            query: linear(c, c, vb.pp("query"))?,
            key: linear(c, c, vb.pp("key"))?,
            value: linear(c, c, vb.pp("value"))?,
            output: linear(c, c, vb.pp("output"))?,
            heads: config.heads,
        })
    }

    /// `[batch, time, channels]` to `[batch, heads, time, channels / heads]`.
    fn split_heads(&self, xs: &Tensor) -> Result<Tensor> {
        let (batch, time, channels) = xs.dims3()?;
        xs.reshape((batch, time, self.heads, channels / self.heads))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn forward(&self, xs: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let q = self.split_heads(&self.query.forward(xs)?)?;
        let k = self.split_heads(&self.key.forward(xs)?)?;
        let v = self.split_heads(&self.value.forward(xs)?)?;
        let scale = 1. / (q.dim(D::Minus1)? as f64).sqrt();
        let scores = (q * scale)?.matmul(&k.t()?)?.broadcast_add(mask)?;
        let ys = softmax(&scores, D::Minus1)?.matmul(&v)?;
        let ys = ys.transpose(1, 2)?.flatten_from(2)?;
        self.output.forward(&ys)
    }
}

struct Mlp {
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let c = config.channels;
        Ok(Self {
            up: linear(c, 4 * c, vb.pp("up"))?,
            down: linear(4 * c, c, vb.pp("down"))?,
        })
    }
}

impl Module for Mlp {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.down.forward(&self.up.forward(xs)?.gelu()?)
    }
}

struct Block {
    attention_norm: LayerNorm,
    attention: Attention,
    mlp_norm: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            attention_norm: layer_norm(config.channels, NORM_EPS, vb.pp("attention_norm"))?,
            attention: Attention::new(config, vb.pp("attention"))?,
            mlp_norm: layer_norm(config.channels, NORM_EPS, vb.pp("mlp_norm"))?,
            mlp: Mlp::new(config, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, xs: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let ys = self.attention_norm.forward(xs)?;
        let xs = (xs + self.attention.forward(&ys, mask)?)?;
        let ys = self.mlp_norm.forward(&xs)?;
        xs + self.mlp.forward(&ys)?
    }
}

pub struct Gpt {
    token_embedding: Embedding,
    position_embedding: Embedding,
    blocks: Vec<Block>,
    final_norm: LayerNorm,
    output: Linear,
    /// `[context, context]`: 0 where a position may look, -inf at the later ones.
    mask: Tensor,
    config: Config,
}

impl Gpt {
    pub fn new(config: Config, vb: VarBuilder) -> Result<Self> {
        let token_embedding =
            embedding(config.vocab_size, config.channels, vb.pp("token_embedding"))?;
        let position_embedding =
            embedding(config.context, config.channels, vb.pp("position_embedding"))?;
        let blocks = (0..config.layers)
            .map(|i| Block::new(&config, vb.pp(format!("blocks.{i}"))))
            .collect::<Result<_>>()?;
        let final_norm = layer_norm(config.channels, NORM_EPS, vb.pp("final_norm"))?;
        let output = Linear::new(token_embedding.embeddings().clone(), None);
        let mask = causal_mask(config.context, vb.device())?.to_dtype(vb.dtype())?;
        Ok(Self {
            token_embedding,
            position_embedding,
            blocks,
            final_norm,
            output,
            mask,
            config,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The logits of the next token: `[batch, time]` of token ids to `[batch, time, vocab_size]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, time) = ids.dims2()?;
        let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
        let positions = self.position_embedding.embeddings().narrow(0, 0, time)?;
        let mut xs = self
            .token_embedding
            .forward(ids)?
            .broadcast_add(&positions)?;
        for block in &self.blocks {
            xs = block.forward(&xs, &mask)?;
        }
        self.output.forward(&self.final_norm.forward(&xs)?)
    }

    /// The mean cross entropy of the `targets`, which have the shape of `ids`, in nats a token.
    pub fn loss(&self, ids: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let logits = self.forward(ids)?;
        cross_entropy(&logits.flatten_to(1)?, &targets.flatten_all()?)
    }

    /// Continues `prompt`, which must not be empty, by `length` tokens. A `temperature` of 0 takes the likeliest.
    pub fn generate(
        &self,
        prompt: &[u32],
        length: usize,
        temperature: f64,
        rng: &mut impl Rng,
    ) -> anyhow::Result<Vec<u32>> {
        let mut ids = prompt.to_vec();
        for _ in 0..length {
            let recent = &ids[ids.len().saturating_sub(self.config.context)..];
            let input = Tensor::new(recent, self.mask.device())?.unsqueeze(0)?;
            let logits = self.forward(&input)?.get_on_dim(1, recent.len() - 1)?;
            ids.push(sample(&logits.flatten_all()?, temperature, rng)?);
        }
        Ok(ids.split_off(prompt.len()))
    }
}

fn causal_mask(context: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..context)
        .flat_map(|i| (0..context).map(move |j| if j > i { f32::NEG_INFINITY } else { 0. }))
        .collect();
    Tensor::from_vec(mask, (context, context), device)
}

fn sample(logits: &Tensor, temperature: f64, rng: &mut impl Rng) -> anyhow::Result<u32> {
    if temperature == 0. {
        return Ok(logits.argmax(0)?.to_scalar()?);
    }
    let logits: Vec<f64> = logits.to_dtype(candle_core::DType::F64)?.to_vec1()?;
    // Relative to the largest, no weight overflows and one of them is 1, however small the temperature.
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = logits.iter().map(|x| ((x - max) / temperature).exp());
    Ok(WeightedIndex::new(weights)?.sample(rng) as u32)
}

/// The variables by name, in the order of their names: a `VarMap` has none of its own.
pub fn named_vars(varmap: &VarMap) -> BTreeMap<String, Var> {
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    vars.iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect()
}

/// Sets the variables as GPT-2 starts: matrices normal with standard deviation 0.02, smaller where a block adds to the
/// residual stream, biases 0, norm weights 1.
///
/// candle draws the values of a new variable from a generator that cannot be seeded on the CPU; these come from `rng`.
pub fn init(varmap: &VarMap, layers: usize, rng: &mut impl Rng) -> Result<()> {
    for (name, var) in named_vars(varmap) {
        if var.rank() < 2 {
            let value = if name.ends_with("norm.weight") {
                var.ones_like()?
            } else {
                var.zeros_like()?
            };
            var.set(&value)?;
            continue;
        }
        let adds_to_residual =
            name.ends_with("attention.output.weight") || name.ends_with("mlp.down.weight");
        let std = if adds_to_residual {
            0.02 / (2. * layers as f64).sqrt()
        } else {
            0.02
        };
        let values: Vec<f32> = (0..var.elem_count())
            .map(|_| (std * standard_normal(rng)) as f32)
            .collect();
        let values = Tensor::from_vec(values, var.shape(), var.device())?;
        var.set(&values.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// Box and Muller's transform.
fn standard_normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2. * (1. - rng.random::<f64>()).ln()).sqrt();
    radius * (TAU * rng.random::<f64>()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use rand::{SeedableRng, rngs::StdRng};

    fn small(seed: u64) -> (VarMap, Gpt) {
        let config = Config {
            vocab_size: 11,
            context: 6,
            layers: 2,
            heads: 2,
            channels: 8,
        };
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let gpt = Gpt::new(config, vb).unwrap();
        init(&varmap, 2, &mut StdRng::seed_from_u64(seed)).unwrap();
        (varmap, gpt)
    }

    fn logits(gpt: &Gpt, ids: &[u32]) -> Vec<Vec<f32>> {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        let logits = gpt.forward(&ids.unsqueeze(0).unwrap()).unwrap();
        logits.squeeze(0).unwrap().to_vec2().unwrap()
    }

    fn max_diff(a: &[f32], b: &[f32]) -> f32 {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0., f32::max)
    }

    #[test]
    fn later_tokens_do_not_change_earlier_logits() {
        let (_, gpt) = small(1);
        let ids = [3, 1, 4, 1, 5, 9];
        let before = logits(&gpt, &ids);
        for changed in 1..ids.len() {
            let mut ids = ids;
            ids[changed] = 7;
            let after = logits(&gpt, &ids);
            for t in 0..ids.len() {
                let diff = max_diff(&before[t], &after[t]);
                assert_eq!(
                    diff > 1e-6,
                    t >= changed,
                    "token {changed}, logits {t}: {diff}"
                );
            }
        }
    }

    #[test]
    fn a_shorter_input_gives_the_same_logits() {
        let (_, gpt) = small(1);
        let long = logits(&gpt, &[3, 1, 4, 1, 5, 9]);
        let short = logits(&gpt, &[3, 1, 4]);
        for (a, b) in short.iter().zip(&long) {
            assert!(max_diff(a, b) < 1e-6);
        }
    }

    #[test]
    fn every_variable_gets_a_gradient() {
        let (varmap, gpt) = small(1);
        let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, 9]], &Device::Cpu).unwrap();
        let targets = Tensor::new(&[[1u32, 4, 1, 5, 9, 2]], &Device::Cpu).unwrap();
        let grads = gpt.loss(&ids, &targets).unwrap().backward().unwrap();
        for (name, var) in named_vars(&varmap) {
            let grad = grads
                .get(&var)
                .unwrap_or_else(|| panic!("{name} has no gradient"));
            let sum: f32 = grad.abs().unwrap().sum_all().unwrap().to_scalar().unwrap();
            // Softmax does not see what is added to all keys alike: that gradient is zero but for rounding.
            assert!(
                sum > 0. || name.ends_with("key.bias"),
                "{name}: the gradient is zero"
            );
        }
    }

    #[test]
    fn the_seed_decides_the_variables() {
        let values = |seed| -> Vec<Vec<f32>> {
            named_vars(&small(seed).0)
                .values()
                .map(|var| var.flatten_all().unwrap().to_vec1().unwrap())
                .collect()
        };
        assert_eq!(values(1), values(1));
        assert_ne!(values(1), values(2));
    }

    #[test]
    fn the_seed_decides_the_sample() {
        let (_, gpt) = small(1);
        let sample = |temperature, seed| {
            gpt.generate(&[0], 40, temperature, &mut StdRng::seed_from_u64(seed))
                .unwrap()
        };
        assert_eq!(sample(1., 5).len(), 40);
        assert_eq!(sample(1., 5), sample(1., 5));
        assert_ne!(sample(1., 5), sample(1., 6));
        // The likeliest token needs no randomness, and a tiny temperature all but takes it.
        assert_eq!(sample(0., 5), sample(0., 6));
        assert_eq!(sample(0., 5), sample(1e-300, 5));
    }
}
