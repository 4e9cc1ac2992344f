//! What decides a run: the presets, and what the command line changes in them.

use anyhow::{Result, ensure};
use candle_core::DType;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Learns on the CPU in about a minute
    #[default]
    Quick,
    /// nanoGPT's character-level run for a CPU
    ShakespeareCpu,
    /// nanoGPT's character-level run for a GPU
    ShakespeareGpu,
}

/// The layer norm in the model
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// This crate's: fused, and differentiable
    Fused,
    /// candle_nn::LayerNorm: fused, and with a bias without a gradient
    Candle,
    /// candle_nn::ops::layer_norm_slow: differentiable, op by op
    Slow,
}

impl NormKind {
    pub const ALL: [Self; 3] = [Self::Fused, Self::Candle, Self::Slow];

    pub fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Candle => "candle",
            Self::Slow => "slow",
        }
    }
}

/// The precision of weights, activations and gradients; the optimizer keeps f32 weights in any case
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    F32,
    Bf16,
    /// With dynamic loss scaling
    F16,
}

impl Precision {
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// All that decides the course of a run beside the text. A checkpoint holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub layers: usize,
    pub heads: usize,
    pub channels: usize,
    /// Characters in a window, the most that the model looks back on.
    pub context: usize,
    pub bias: bool,
    /// Of the first matrices; without it, one over the root of their rows' length.
    pub init_std: Option<f64>,
    pub dropout: f64,
    pub norm: NormKind,
    pub dtype: Precision,
    /// Windows in a step, over all GPUs.
    pub batch_size: usize,
    pub steps: usize,
    /// The highest, reached after the warm-up.
    pub learning_rate: f64,
    pub min_learning_rate: f64,
    pub warm_up: usize,
    pub beta1: f64,
    pub beta2: f64,
    /// On matrices only.
    pub weight_decay: f64,
    /// The largest norm of all gradients together.
    pub clip: f64,
    pub eval_every: usize,
    pub seed: u64,
}

impl Preset {
    pub fn settings(self) -> Settings {
        let shakespeare_gpu = Settings {
            layers: 6,
            heads: 6,
            channels: 384,
            context: 256,
            bias: false,
            init_std: Some(0.02),
            dropout: 0.2,
            norm: NormKind::Fused,
            dtype: Precision::F32,
            batch_size: 64,
            steps: 5000,
            learning_rate: 1e-3,
            min_learning_rate: 1e-4,
            warm_up: 100,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.1,
            clip: 1.,
            eval_every: 250,
            seed: 0,
        };
        match self {
            Self::ShakespeareGpu => shakespeare_gpu,
            Self::ShakespeareCpu => Settings {
                layers: 4,
                heads: 4,
                channels: 128,
                context: 64,
                init_std: None,
                dropout: 0.,
                batch_size: 12,
                steps: 2000,
                ..shakespeare_gpu
            },
            // With a bias, as PyTorch's and candle-nn's layers have unless told otherwise. Activations stay below the 65,536
            // elements from which candle's CPU backend splits elementwise ops over threads that wait by spinning: on a busy
            // machine that is several times slower.
            Self::Quick => Settings {
                layers: 2,
                heads: 4,
                channels: 96,
                context: 64,
                bias: true,
                init_std: None,
                dropout: 0.,
                batch_size: 2,
                steps: 2000,
                learning_rate: 1.5e-3,
                min_learning_rate: 1.5e-4,
                ..shakespeare_gpu
            },
        }
    }
}

/// Each of these replaces a value of the preset.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Overrides {
    /// Transformer blocks
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,

    /// Attention heads, a divisor of the channels
    #[arg(long, value_name = "N")]
    pub heads: Option<usize>,

    /// Width of the model
    #[arg(long, value_name = "N")]
    pub channels: Option<usize>,

    /// Characters in a window, the most that the model looks back on
    #[arg(long, value_name = "CHARS")]
    pub context: Option<usize>,

    /// Whether linear layers and norms have a bias
    #[arg(long, value_name = "BOOL")]
    pub bias: Option<bool>,

    /// Standard deviation of the first matrices, instead of one over the root of their rows' length; nanoGPT has 0.02
    #[arg(long, value_name = "STD", allow_negative_numbers = true)]
    pub init_std: Option<f64>,

    /// Share of activations set to 0 while training
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub dropout: Option<f64>,

    /// The layer norm in the model
    #[arg(long)]
    pub norm: Option<NormKind>,

    /// The precision of weights, activations and gradients; the optimizer keeps f32 weights
    #[arg(long)]
    pub dtype: Option<Precision>,

    /// Windows of text in a step, over all GPUs
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,

    /// Optimizer steps
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,

    /// Highest learning rate, after the warm-up and before the decay to a tenth
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub learning_rate: Option<f64>,

    /// Steps from one evaluation, and checkpoint, to the next
    #[arg(long, value_name = "STEPS")]
    pub eval_every: Option<usize>,

    /// Decides the first weights, the batches and the dropout; on the CPU, all results
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl Overrides {
    /// `settings` with what is given here.
    pub fn apply(&self, settings: &Settings) -> Settings {
        let mut settings = settings.clone();
        macro_rules! replace {
            ($($field:ident),*) => {
                $(if let Some(value) = self.$field {
                    settings.$field = value;
                })*
            };
        }
        replace!(
            layers,
            heads,
            channels,
            context,
            bias,
            dropout,
            norm,
            dtype,
            batch_size,
            steps,
            learning_rate,
            eval_every,
            seed
        );
        settings.init_std = self.init_std.or(settings.init_std);
        if let Some(rate) = self.learning_rate {
            settings.min_learning_rate = rate / 10.;
        }
        settings
    }
}

impl Settings {
    pub fn validate(&self) -> Result<()> {
        // The upper bound is beyond every use; it keeps products of sizes from overflowing.
        for (name, size, max) in [
            ("steps", self.steps, u32::MAX as usize),
            ("batch-size", self.batch_size, 1 << 16),
            ("context", self.context, 1 << 16),
            ("layers", self.layers, 1 << 16),
            ("heads", self.heads, 1 << 16),
            ("channels", self.channels, 1 << 16),
            ("eval-every", self.eval_every, usize::MAX),
        ] {
            ensure!(size > 0, "--{name} is 0: give at least 1");
            ensure!(size <= max, "--{name} is {size}: give at most {max}");
        }
        ensure!(
            self.channels.is_multiple_of(self.heads),
            "--channels {} is not divisible by --heads {}: give a multiple",
            self.channels,
            self.heads
        );
        ensure!(
            self.learning_rate.is_finite() && self.learning_rate > 0.,
            "--learning-rate is {}: give a finite number above 0",
            self.learning_rate
        );
        if let Some(std) = self.init_std {
            ensure!(
                std.is_finite() && std > 0.,
                "--init-std is {std}: give a finite number above 0"
            );
        }
        ensure!(
            (0. ..1.).contains(&self.dropout),
            "--dropout is {}: give a number from 0 to below 1",
            self.dropout
        );
        Ok(())
    }

    /// The names of the settings in which `other` differs, each with both values.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let fields = |settings: &Self| match serde_json::to_value(settings) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => Default::default(),
        };
        let others = fields(other);
        fields(self)
            .into_iter()
            .filter_map(|(name, value)| {
                let other = others.get(&name)?;
                (*other != value).then(|| format!("{name} {value}, given {other}"))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_survive_a_checkpoint() {
        for preset in Preset::value_variants() {
            let settings = preset.settings();
            settings.validate().unwrap();
            let json = serde_json::to_string(&settings).unwrap();
            assert_eq!(serde_json::from_str::<Settings>(&json).unwrap(), settings);
        }
    }

    #[test]
    fn the_shakespeare_presets_are_those_that_nanogpt_publishes() {
        let gpu = Preset::ShakespeareGpu.settings();
        let size = |s: &Settings| {
            (
                s.layers,
                s.heads,
                s.channels,
                s.context,
                s.batch_size,
                s.steps,
            )
        };
        assert_eq!(size(&gpu), (6, 6, 384, 256, 64, 5000));
        assert_eq!((gpu.init_std, gpu.dropout), (Some(0.02), 0.2));
        let cpu = Preset::ShakespeareCpu.settings();
        assert_eq!(size(&cpu), (4, 4, 128, 64, 12, 2000));
        // Not nanoGPT's first weights: examples/transformer/README.md has both.
        assert_eq!((cpu.init_std, cpu.dropout), (None, 0.));
        for s in [gpu, cpu] {
            assert_eq!((s.learning_rate, s.min_learning_rate), (1e-3, 1e-4));
            assert_eq!((s.warm_up, s.beta2, s.weight_decay), (100, 0.99, 0.1));
            assert_eq!((s.clip, s.bias), (1., false));
        }
    }

    #[test]
    fn differences_name_the_setting_and_both_values() {
        let settings = Preset::Quick.settings();
        let overrides = Overrides {
            layers: Some(3),
            norm: Some(NormKind::Slow),
            ..Overrides::default()
        };
        assert_eq!(
            settings.differences(&overrides.apply(&settings)),
            ["layers 2, given 3", "norm \"fused\", given \"slow\""]
        );
        assert_eq!(Overrides::default().apply(&settings), settings);
    }
}
