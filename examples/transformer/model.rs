//! A decoder-only GPT of pre-norm blocks, after GPT-2: learned positions, GELU, token embedding and output tied.
//!
//! Everything in it has a gradient. That rules out candle-nn's fused `softmax_last_dim`, `rope` and its own layer norm.

use crate::{
    ops::{Dropout, OneHotEmbedding, masked_softmax},
    settings::{NormKind, Settings},
};
use candle_core::{D, DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap, linear_b, loss::cross_entropy, ops::layer_norm_slow};
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
    pub bias: bool,
    pub dropout: f64,
    pub norm: NormKind,
}

impl Config {
    pub fn new(settings: &Settings, vocab_size: usize) -> Self {
        Self {
            vocab_size,
            context: settings.context,
            layers: settings.layers,
            heads: settings.heads,
            channels: settings.channels,
            bias: settings.bias,
            dropout: settings.dropout,
            norm: settings.norm,
        }
    }
}

/// One of the three layer norms that `--norm` compares. They have the same variables.
enum Norm {
    Fused(candle_fused_layer_norm::LayerNorm),
    Candle(candle_nn::LayerNorm),
    Slow { weight: Tensor, bias: Tensor },
}

impl Norm {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let size = config.channels;
        let norm_config = candle_nn::LayerNormConfig {
            eps: NORM_EPS,
            affine: config.bias,
            ..Default::default()
        };
        Ok(match config.norm {
            NormKind::Fused => {
                Self::Fused(candle_fused_layer_norm::layer_norm(size, norm_config, vb)?)
            }
            NormKind::Candle => Self::Candle(candle_nn::layer_norm(size, norm_config, vb)?),
            NormKind::Slow => {
                let norm = candle_nn::layer_norm(size, norm_config, vb)?;
                Self::Slow {
                    weight: norm.weight().clone(),
                    bias: match norm.bias() {
                        Some(bias) => bias.clone(),
                        None => norm.weight().zeros_like()?.detach(),
                    },
                }
            }
        })
    }
}

impl Module for Norm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Fused(norm) => norm.forward(xs),
            Self::Candle(norm) => norm.forward(xs),
            Self::Slow { weight, bias } => layer_norm_slow(xs, weight, bias, NORM_EPS as f32),
        }
    }
}

impl Norm {
    /// The norm of `residual + xs`, and that sum.
    fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        if let Self::Fused(norm) = self {
            return norm.forward_add(xs, residual);
        }
        let sum = (residual + xs)?;
        Ok((self.forward(&sum)?, sum))
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: usize,
    dropout: Dropout,
}

impl Attention {
    fn new(config: &Config, dropout: &Dropout, vb: VarBuilder) -> Result<Self> {
        let c = config.channels;
        let linear = |name| linear_b(c, c, config.bias, vb.pp(name));
        Ok(Self {
            query: linear("query")?,
            key: linear("key")?,
            value: linear("value")?,
            output: linear("output")?,
            heads: config.heads,
            dropout: dropout.clone(),
        })
    }

    /// `[batch, time, channels]` to `[batch, heads, time, channels / heads]`.
    fn split_heads(&self, xs: &Tensor) -> Result<Tensor> {
        let (batch, time, channels) = xs.dims3()?;
        xs.reshape((batch, time, self.heads, channels / self.heads))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn forward(&self, xs: &Tensor, mask: &Tensor, train: bool) -> Result<Tensor> {
        let q = self.split_heads(&self.query.forward(xs)?)?;
        let k = self.split_heads(&self.key.forward(xs)?)?;
        let v = self.split_heads(&self.value.forward(xs)?)?;
        let scale = 1. / (q.dim(D::Minus1)? as f64).sqrt();
        let weights = masked_softmax(&(q * scale)?.matmul(&k.t()?)?, mask)?;
        let weights = self.dropout.forward_t(&weights, train)?;
        let ys = weights.matmul(&v)?.transpose(1, 2)?.flatten_from(2)?;
        self.dropout.forward_t(&self.output.forward(&ys)?, train)
    }
}

struct Mlp {
    up: Linear,
    down: Linear,
    dropout: Dropout,
}

impl Mlp {
    fn new(config: &Config, dropout: &Dropout, vb: VarBuilder) -> Result<Self> {
        let c = config.channels;
        Ok(Self {
            up: linear_b(c, 4 * c, config.bias, vb.pp("up"))?,
            down: linear_b(4 * c, c, config.bias, vb.pp("down"))?,
            dropout: dropout.clone(),
        })
    }
}

impl ModuleT for Mlp {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let xs = self.up.forward(xs)?.gelu_erf()?;
        self.dropout.forward_t(&self.down.forward(&xs)?, train)
    }
}

struct Block {
    attention_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    mlp: Mlp,
}

impl Block {
    fn new(config: &Config, dropout: &Dropout, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            attention_norm: Norm::new(config, vb.pp("attention_norm"))?,
            attention: Attention::new(config, dropout, vb.pp("attention"))?,
            mlp_norm: Norm::new(config, vb.pp("mlp_norm"))?,
            mlp: Mlp::new(config, dropout, vb.pp("mlp"))?,
        })
    }

    /// Takes `residual + branch`, `branch` being what the block before has left to add, and gives the same.
    fn forward(
        &self,
        branch: Option<Tensor>,
        residual: Tensor,
        mask: &Tensor,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (ys, residual) = match branch {
            Some(branch) => self.attention_norm.forward_add(&branch, &residual)?,
            None => (self.attention_norm.forward(&residual)?, residual),
        };
        let branch = self.attention.forward(&ys, mask, train)?;
        let (ys, residual) = self.mlp_norm.forward_add(&branch, &residual)?;
        Ok((self.mlp.forward_t(&ys, train)?, residual))
    }
}

pub struct Gpt {
    token_embedding: OneHotEmbedding,
    position_embedding: Tensor,
    dropout: Dropout,
    blocks: Vec<Block>,
    final_norm: Norm,
    output: Linear,
    /// `[context, context]`: 0 where a position may look, -inf at the later ones.
    mask: Tensor,
    config: Config,
}

impl Gpt {
    pub fn new(config: Config, vb: VarBuilder) -> Result<Self> {
        let c = config.channels;
        let table = |rows, name| vb.pp(name).get((rows, c), "weight");
        let tokens = table(config.vocab_size, "token_embedding")?;
        let positions = table(config.context, "position_embedding")?;
        let dropout = Dropout::new(config.dropout);
        let blocks = (0..config.layers)
            .map(|i| Block::new(&config, &dropout, vb.pp(format!("blocks.{i}"))))
            .collect::<Result<_>>()?;
        let final_norm = Norm::new(&config, vb.pp("final_norm"))?;
        let mask = causal_mask(config.context, vb.device())?.to_dtype(vb.dtype())?;
        Ok(Self {
            output: Linear::new(tokens.clone(), None),
            token_embedding: OneHotEmbedding::new(tokens)?,
            position_embedding: positions,
            dropout,
            blocks,
            final_norm,
            mask,
            config,
        })
    }

    pub fn device(&self) -> &Device {
        self.mask.device()
    }

    /// What draws the masks of all dropouts in the model.
    pub fn dropout(&self) -> &Dropout {
        &self.dropout
    }

    /// The mean cross entropy of the `targets`, which have the shape of `ids`, in nats a token.
    pub fn loss(&self, ids: &Tensor, targets: &Tensor, train: bool) -> Result<Tensor> {
        let logits = self.forward_t(ids, train)?.to_dtype(DType::F32)?;
        cross_entropy(&logits.flatten_to(1)?, &targets.flatten_all()?)
    }

    /// The same without dropout and without a graph, of the last `counted` targets of each row.
    pub fn loss_of_last(&self, counted: usize, ids: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let skipped = ids.dim(1)? - counted;
        let last = |xs: &Tensor| xs.narrow(1, skipped, counted)?.contiguous();
        let logits = last(&self.forward_t(ids, false)?.detach())?.to_dtype(DType::F32)?;
        cross_entropy(&logits.flatten_to(1)?, &last(targets)?.flatten_all()?)
    }

    /// Continues `prompt`, which must not be empty, by `length` tokens.
    pub fn generate(
        &self,
        prompt: &[u32],
        length: usize,
        sampling: Sampling,
        rng: &mut impl Rng,
    ) -> anyhow::Result<Vec<u32>> {
        let mut ids = prompt.to_vec();
        for _ in 0..length {
            let recent = &ids[ids.len().saturating_sub(self.config.context)..];
            let input = Tensor::new(recent, self.device())?.unsqueeze(0)?;
            let logits = self.forward_t(&input, false)?;
            let logits = logits.get_on_dim(1, recent.len() - 1)?.flatten_all()?;
            ids.push(sampling.pick(&logits, rng)?);
        }
        Ok(ids.split_off(prompt.len()))
    }
}

impl ModuleT for Gpt {
    /// The logits of the next token: `[batch, time]` of token ids to `[batch, time, vocab_size]`.
    fn forward_t(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        let (_, time) = ids.dims2()?;
        let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
        let positions = self.position_embedding.narrow(0, 0, time)?;
        let xs = self
            .token_embedding
            .forward(ids)?
            .broadcast_add(&positions)?;
        let mut residual = self.dropout.forward_t(&xs, train)?;
        let mut branch = None;
        for block in &self.blocks {
            let (next, sum) = block.forward(branch, residual, &mask, train)?;
            (branch, residual) = (Some(next), sum);
        }
        let ys = match branch {
            Some(branch) => self.final_norm.forward_add(&branch, &residual)?.0,
            None => self.final_norm.forward(&residual)?,
        };
        self.output.forward(&ys)
    }
}

fn causal_mask(context: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..context)
        .flat_map(|i| (0..context).map(move |j| if j > i { f32::NEG_INFINITY } else { 0. }))
        .collect();
    Tensor::from_vec(mask, (context, context), device)
}

/// How the next token is picked.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest.
    pub temperature: f64,
    /// Only among this many of the likeliest.
    pub top_k: Option<usize>,
}

impl Sampling {
    fn pick(self, logits: &Tensor, rng: &mut impl Rng) -> anyhow::Result<u32> {
        let logits: Vec<f64> = logits.to_dtype(DType::F64)?.to_vec1()?;
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        if self.temperature == 0. {
            return Ok(order[0] as u32);
        }
        order.truncate(self.top_k.unwrap_or(usize::MAX));
        // Relative to the largest, no weight overflows and one of them is 1, however small the temperature.
        let max = logits[order[0]];
        let weights = order
            .iter()
            .map(|&i| ((logits[i] - max) / self.temperature).exp());
        Ok(order[WeightedIndex::new(weights)?.sample(rng)] as u32)
    }
}

/// The variables by name, in the order of their names: a `VarMap` has none of its own.
pub fn named_vars(varmap: &VarMap) -> BTreeMap<String, Var> {
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    vars.iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect()
}

/// Sets the variables to begin with: matrices normal with standard deviation `std`, or else one over the root of their rows'
/// length, and less where a block adds to the residual stream; biases 0, norm weights 1.
///
/// candle draws the values of a new variable from a generator that cannot be seeded on the CPU; these come from `rng`.
pub fn init(varmap: &VarMap, layers: usize, std: Option<f64>, rng: &mut impl Rng) -> Result<()> {
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
        let std = std.unwrap_or((var.dim(D::Minus1)? as f64).powf(-0.5));
        let std = if adds_to_residual {
            std / (2. * layers as f64).sqrt()
        } else {
            std
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
    use rand::{SeedableRng, rngs::StdRng};

    fn small(seed: u64) -> (VarMap, Gpt) {
        let config = Config {
            vocab_size: 11,
            context: 6,
            layers: 2,
            heads: 2,
            channels: 8,
            bias: true,
            dropout: 0.,
            norm: NormKind::Fused,
        };
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let gpt = Gpt::new(config, vb).unwrap();
        init(&varmap, 2, None, &mut StdRng::seed_from_u64(seed)).unwrap();
        (varmap, gpt)
    }

    fn logits(gpt: &Gpt, ids: &[u32]) -> Vec<Vec<f32>> {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        let logits = gpt.forward_t(&ids.unsqueeze(0).unwrap(), false).unwrap();
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
        let sample = |temperature, top_k, seed| {
            let sampling = Sampling { temperature, top_k };
            gpt.generate(&[0], 40, sampling, &mut StdRng::seed_from_u64(seed))
                .unwrap()
        };
        assert_eq!(sample(1., None, 5).len(), 40);
        assert_eq!(sample(1., None, 5), sample(1., None, 5));
        assert_ne!(sample(1., None, 5), sample(1., None, 6));
        // The likeliest token needs no randomness, and a tiny temperature or one candidate all but take it.
        assert_eq!(sample(0., None, 5), sample(0., None, 6));
        assert_eq!(sample(0., None, 5), sample(1e-300, None, 5));
        assert_eq!(sample(0., None, 5), sample(1., Some(1), 5));
    }
}
