//! What a norm computes, apart from its tensors.

use candle_nn::LayerNormConfig;

/// What a norm computes, apart from its tensors: candle-nn's [`LayerNormConfig`] and the forms that it has no field for.
///
/// Made of an `eps` or of candle-nn's config by [`From`], so that [`layer_norm`](crate::layer_norm) takes all three.
///
/// ```
/// use candle_fused_layer_norm::{LayerNormConfig, NormConfig};
///
/// let gemma = NormConfig {
///     zero_centered_weight: true,
///     ..NormConfig::rms_norm(1e-6)
/// };
/// assert!(!gemma.remove_mean && !gemma.bias);
/// assert_eq!(NormConfig::from(1e-5), NormConfig::default());
/// assert_eq!(NormConfig::from(LayerNormConfig::default()), NormConfig::default());
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormConfig {
    /// Added to the variance (to the mean square where the mean stays): finite and not negative. 1e-5 by default.
    pub eps: f64,
    /// Whether the mean is removed, as by default; `false` is RMSNorm.
    pub remove_mean: bool,
    /// Whether [`layer_norm`](crate::layer_norm) reads or creates a bias, as by default: candle-nn's `affine`. Where tensors are
    /// given, they decide.
    pub bias: bool,
    /// Whether the row is multiplied by `1 + weight` instead of `weight`, so that a weight of zeros changes nothing and weight
    /// decay pulls towards that: TransformerEngine's `zero_centered_gamma`, the norms of Gemma. `false` by default.
    ///
    /// The sum is taken in the accumulation type, f32 for f16 and bf16, and not rounded to the weight's.
    pub zero_centered_weight: bool,
}

impl NormConfig {
    /// RMSNorm: no mean, no bias.
    pub const fn rms_norm(eps: f64) -> Self {
        Self {
            eps,
            remove_mean: false,
            bias: false,
            zero_centered_weight: false,
        }
    }
}

impl Default for NormConfig {
    fn default() -> Self {
        LayerNormConfig::default().into()
    }
}

impl From<f64> for NormConfig {
    fn from(eps: f64) -> Self {
        LayerNormConfig::from(eps).into()
    }
}

impl From<LayerNormConfig> for NormConfig {
    fn from(config: LayerNormConfig) -> Self {
        Self {
            eps: config.eps,
            remove_mean: config.remove_mean,
            bias: config.affine,
            zero_centered_weight: false,
        }
    }
}
