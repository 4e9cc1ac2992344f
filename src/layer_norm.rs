//! The layers, under candle-nn's names and signatures.

use crate::NormConfig;
use crate::ops::{self, Dropout};
use crate::problem::op_name;
use candle_core::{DType, Error, Module, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder};

pub use candle_nn::LayerNormConfig;

/// Layer normalisation over the trailing dims that `weight` has, differentiable and fused.
///
/// The drop-in for [`candle_nn::LayerNorm`]; see [`crate::ops`] for dtypes, accumulation and errors.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_fused_layer_norm::{LayerNorm, layer_norm};
/// use candle_nn::{VarBuilder, VarMap};
/// # fn main() -> candle_core::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let norm: LayerNorm = layer_norm(4, 1e-5, vb.pp("norm"))?;
///
/// let xs = Tensor::new(&[[1f32, 2., 3., 6.]], &Device::Cpu)?;
/// let loss = norm.forward(&xs)?.powf(3.)?.sum_all()?;
/// let grads = loss.backward()?;
/// assert!(varmap.all_vars().iter().all(|var| grads.get(var).is_some()));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    /// Its `bias` says whether there is one.
    config: NormConfig,
    /// That of xs if `None`.
    output_dtype: Option<DType>,
}

impl LayerNorm {
    /// A layer from its tensors, both of shape `normalized_shape`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self::from_config(weight, Some(bias), eps)
    }

    /// A layer without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self::from_config(weight, None, eps)
    }

    /// RMSNorm: no mean, no bias.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self::from_config(weight, None, NormConfig::rms_norm(eps))
    }

    /// A layer from its tensors, of shape `normalized_shape`. Whether there is a bias is up to `bias`, not to `config`.
    pub fn from_config<C: Into<NormConfig>>(
        weight: Tensor,
        bias: Option<Tensor>,
        config: C,
    ) -> Self {
        let config = NormConfig {
            bias: bias.is_some(),
            ..config.into()
        };
        Self {
            weight,
            bias,
            config,
            output_dtype: None,
        }
    }

    /// The same layer with results of `dtype`, whatever that of xs is: [`ops::normalize_to_dtype`].
    pub fn with_output_dtype(self, dtype: DType) -> Self {
        Self {
            output_dtype: Some(dtype),
            ..self
        }
    }

    /// The weight, of shape `normalized_shape`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, of shape `normalized_shape`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What the layer computes, apart from its tensors.
    pub fn config(&self) -> NormConfig {
        self.config
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.config.eps
    }

    /// Whether the mean is removed; `false` is RMSNorm.
    pub fn remove_mean(&self) -> bool {
        self.config.remove_mean
    }

    /// Whether the row is multiplied by `1 + weight`.
    pub fn zero_centered_weight(&self) -> bool {
        self.config.zero_centered_weight
    }

    /// The dtype of results, if it is another than that of xs.
    pub fn output_dtype(&self) -> Option<DType> {
        self.output_dtype
    }

    /// The norm of `residual + xs`, and that sum: see [`ops::add_layer_norm`].
    /// Of another output dtype, the sum is normalised once more for it.
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.add(xs, residual, None)
    }

    /// The norm of `residual + dropout(xs)`, and that sum: see [`ops::dropout_add_layer_norm`].
    /// Of another output dtype, the sum is normalised once more for it.
    pub fn forward_dropout_add(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        dropout: Dropout,
    ) -> Result<(Tensor, Tensor)> {
        self.add(xs, residual, Some(dropout))
    }

    fn add(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<(Tensor, Tensor)> {
        let (shape, params) = (
            self.weight.shape(),
            (Some(&self.weight), self.bias.as_ref()),
        );
        add(
            xs,
            residual,
            shape,
            params,
            &self.config,
            self.output_dtype,
            dropout,
        )
    }
}

impl Module for LayerNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (Some(&self.weight), self.bias.as_ref());
        let dtype = self.output_dtype.unwrap_or(xs.dtype());
        ops::normalize_to_dtype(xs, self.weight.shape(), weight, bias, &self.config, dtype)
    }
}

/// What `forward_add` and `forward_dropout_add` of the layers do.
fn add(
    xs: &Tensor,
    residual: &Tensor,
    shape: &Shape,
    params: (Option<&Tensor>, Option<&Tensor>),
    config: &NormConfig,
    output_dtype: Option<DType>,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor)> {
    let (ys, sum) = ops::add_normalize(xs, residual, shape, params, config, dropout)?;
    match output_dtype {
        // ys as it is would be rounded to the dtype of xs before.
        Some(dtype) if dtype != xs.dtype() => {
            let (weight, bias) = params;
            let ys = ops::normalize_to_dtype(&sum, shape, weight, bias, config, dtype)?;
            Ok((ys, sum))
        }
        _ => Ok((ys, sum)),
    }
}

/// The same tensors, so that a variable stays the variable it was.
impl From<candle_nn::LayerNorm> for LayerNorm {
    fn from(layer: candle_nn::LayerNorm) -> Self {
        let config = NormConfig {
            remove_mean: layer.remove_mean(),
            ..layer.eps().into()
        };
        Self::from_config(layer.weight().clone(), layer.bias().cloned(), config)
    }
}

/// The same tensors, so that a variable stays the variable it was.
///
/// # Errors
/// candle-nn's layer has no zero-centred weight, no normalised shape of several dims, no output dtype, and no constructor for a
/// bias without the removal of the mean.
impl TryFrom<LayerNorm> for candle_nn::LayerNorm {
    type Error = Error;

    fn try_from(layer: LayerNorm) -> Result<Self> {
        let LayerNorm {
            weight,
            bias,
            config,
            output_dtype,
        } = layer;
        let op = op_name(config.remove_mean);
        if config.zero_centered_weight {
            bail!(
                "{op}: weight: expected one that multiplies as it is for candle_nn::LayerNorm, got a zero-centred one"
            )
        }
        if weight.rank() != 1 {
            bail!(
                "{op}: weight: expected one dim for candle_nn::LayerNorm, got {:?}",
                weight.dims()
            )
        }
        if let Some(dtype) = output_dtype {
            bail!(
                "{op}: output dtype: expected that of xs for candle_nn::LayerNorm, got {}",
                dtype.as_str()
            )
        }
        Ok(match (config.remove_mean, bias) {
            (true, Some(bias)) => Self::new(weight, bias, config.eps),
            (true, None) => Self::new_no_bias(weight, config.eps),
            (false, None) => Self::rms_norm(weight, config.eps),
            (false, Some(_)) => bail!(
                "{op}: bias: expected none for candle_nn::LayerNorm where the mean stays, got one"
            ),
        })
    }
}

/// The same tensor, so that a variable stays the variable it was.
///
/// # Errors
/// Those of the conversion to [`candle_nn::LayerNorm`].
impl TryFrom<RmsNorm> for candle_nn::RmsNorm {
    type Error = Error;

    fn try_from(layer: RmsNorm) -> Result<Self> {
        let layer = candle_nn::LayerNorm::try_from(layer.0)?;
        Ok(Self::new(layer.weight().clone(), layer.eps()))
    }
}

/// The same config.
///
/// # Errors
/// candle-nn's has no zero-centred weight.
impl TryFrom<NormConfig> for LayerNormConfig {
    type Error = Error;

    fn try_from(config: NormConfig) -> Result<Self> {
        if config.zero_centered_weight {
            bail!(
                "{}: zero_centered_weight: expected false for candle_nn::LayerNormConfig, got true",
                op_name(config.remove_mean)
            )
        }
        Ok(Self {
            eps: config.eps,
            remove_mean: config.remove_mean,
            affine: config.bias,
        })
    }
}

/// A layer over the trailing dims `size` (a `usize` or a shape), its tensors read from or created in `vb`. `config` is an
/// `eps`, candle-nn's [`LayerNormConfig`] or a [`NormConfig`].
///
/// The weight is named `weight` or `gamma` and starts at 1, a zero-centred one at 0; the bias is named `bias` or `beta` and
/// starts at 0. As in candle-nn, `config.affine = false` leaves out the bias only, and a bias that is left out is not looked
/// up.
///
/// # Errors
/// Those of the VarBuilder: a tensor that is missing or has another shape.
pub fn layer_norm<S: Into<Shape>, C: Into<NormConfig>>(
    size: S,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    let config = config.into();
    let size = size.into();
    let get = |name, alias, init| {
        let name = if !vb.contains_tensor(name) && vb.contains_tensor(alias) {
            alias
        } else {
            name
        };
        vb.get_with_hints(size.clone(), name, Init::Const(init))
    };
    let ones = if config.zero_centered_weight { 0. } else { 1. };
    let weight = get("weight", "gamma", ones)?;
    let bias = config.bias.then(|| get("bias", "beta", 0.)).transpose()?;
    Ok(LayerNorm::from_config(weight, bias, config))
}

/// [`layer_norm`] without a bias.
pub fn layer_norm_no_bias<S: Into<Shape>>(size: S, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    let config = NormConfig {
        bias: false,
        ..eps.into()
    };
    layer_norm(size, config, vb)
}

/// Layer normalisation without weight and bias over the trailing dims `normalized_shape`, differentiable and fused: PyTorch's
/// `elementwise_affine=False`. It has no variables, and nothing of it is in a checkpoint.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_fused_layer_norm::layer_norm_no_affine;
/// # fn main() -> candle_core::Result<()> {
/// // The norm of an adaptive one (DiT): scale and shift come from elsewhere.
/// let norm = layer_norm_no_affine(4, 1e-6);
/// let xs = Tensor::new(&[[1f32, 2., 3., 6.]], &Device::Cpu)?;
/// let (scale, shift) = (Tensor::new(&[[0.5f32]], &Device::Cpu)?, Tensor::new(&[[0f32]], &Device::Cpu)?);
/// let ys = norm.forward(&xs)?.broadcast_mul(&(scale + 1.)?)?.broadcast_add(&shift)?;
/// assert_eq!(ys.dims(), [1, 4]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct LayerNormNoAffine {
    normalized_shape: Shape,
    /// Without a bias.
    config: NormConfig,
    output_dtype: Option<DType>,
}

impl LayerNormNoAffine {
    /// A layer over the trailing dims `normalized_shape` (a `usize` or a shape). `config` is an `eps`, or what else a
    /// [`NormConfig`] says of a norm without weight and bias: [`NormConfig::rms_norm`].
    pub fn new<S: Into<Shape>, C: Into<NormConfig>>(normalized_shape: S, config: C) -> Self {
        Self {
            normalized_shape: normalized_shape.into(),
            config: NormConfig {
                bias: false,
                zero_centered_weight: false,
                ..config.into()
            },
            output_dtype: None,
        }
    }

    /// The same layer with results of `dtype`, whatever that of xs is: [`ops::normalize_to_dtype`].
    pub fn with_output_dtype(self, dtype: DType) -> Self {
        Self {
            output_dtype: Some(dtype),
            ..self
        }
    }

    /// The trailing dims that are normalised.
    pub fn normalized_shape(&self) -> &Shape {
        &self.normalized_shape
    }

    /// What the layer computes.
    pub fn config(&self) -> NormConfig {
        self.config
    }

    /// The norm of `residual + xs`, and that sum: see [`ops::add_layer_norm`].
    /// Of another output dtype, the sum is normalised once more for it.
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.add(xs, residual, None)
    }

    /// The norm of `residual + dropout(xs)`, and that sum: see [`ops::dropout_add_layer_norm`].
    /// Of another output dtype, the sum is normalised once more for it.
    pub fn forward_dropout_add(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        dropout: Dropout,
    ) -> Result<(Tensor, Tensor)> {
        self.add(xs, residual, Some(dropout))
    }

    fn add(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<(Tensor, Tensor)> {
        let (shape, params) = (&self.normalized_shape, (None, None));
        add(
            xs,
            residual,
            shape,
            params,
            &self.config,
            self.output_dtype,
            dropout,
        )
    }
}

impl Module for LayerNormNoAffine {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let dtype = self.output_dtype.unwrap_or(xs.dtype());
        ops::normalize_to_dtype(xs, &self.normalized_shape, None, None, &self.config, dtype)
    }
}

/// [`LayerNormNoAffine::new`]: a layer without variables, which needs no [`VarBuilder`].
pub fn layer_norm_no_affine<S: Into<Shape>, C: Into<NormConfig>>(
    size: S,
    config: C,
) -> LayerNormNoAffine {
    LayerNormNoAffine::new(size, config)
}

/// Root mean square normalisation, differentiable and fused: the drop-in for [`candle_nn::RmsNorm`].
#[derive(Clone, Debug)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// A layer from its weight, of shape `normalized_shape`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// A layer whose weight is zero-centred, as those of Gemma are: `xs / sqrt(mean(xs^2) + eps) * (1 + weight)`.
    pub fn new_zero_centered(weight: Tensor, eps: f64) -> Self {
        let config = NormConfig {
            zero_centered_weight: true,
            ..NormConfig::rms_norm(eps)
        };
        Self(LayerNorm::from_config(weight, None, config))
    }

    /// The same layer with results of `dtype`, whatever that of xs is: [`ops::normalize_to_dtype`].
    pub fn with_output_dtype(self, dtype: DType) -> Self {
        Self(self.0.with_output_dtype(dtype))
    }

    /// The [`LayerNorm`] with `remove_mean = false` that this is.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The weight, of shape `normalized_shape`.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// Whether the row is multiplied by `1 + weight`.
    pub fn zero_centered_weight(&self) -> bool {
        self.0.zero_centered_weight()
    }

    /// As [`Module::forward`], which is differentiable here; kept so that callers of candle-nn's need no change.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }

    /// The norm of `residual + xs`, and that sum: see [`ops::add_rms_norm`].
    /// Of another output dtype, the sum is normalised once more for it.
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.0.forward_add(xs, residual)
    }

    /// The norm of `residual + dropout(xs)`, and that sum: see [`ops::dropout_add_rms_norm`].
    /// Of another output dtype, the sum is normalised once more for it.
    pub fn forward_dropout_add(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        dropout: Dropout,
    ) -> Result<(Tensor, Tensor)> {
        self.0.forward_dropout_add(xs, residual, dropout)
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

/// The same tensor, so that a variable stays the variable it was.
impl From<candle_nn::RmsNorm> for RmsNorm {
    fn from(layer: candle_nn::RmsNorm) -> Self {
        Self(layer.into_inner().into())
    }
}

/// An [`RmsNorm`] over the trailing dims `size`, its weight read from or created in `vb`.
pub fn rms_norm<S: Into<Shape>>(size: S, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    Ok(RmsNorm(layer_norm(size, NormConfig::rms_norm(eps), vb)?))
}

/// [`rms_norm`] with a weight that is zero-centred, as those of Gemma are, and starts at 0.
pub fn rms_norm_zero_centered<S: Into<Shape>>(
    size: S,
    eps: f64,
    vb: VarBuilder,
) -> Result<RmsNorm> {
    let config = NormConfig {
        zero_centered_weight: true,
        ..NormConfig::rms_norm(eps)
    };
    Ok(RmsNorm(layer_norm(size, config, vb)?))
}
