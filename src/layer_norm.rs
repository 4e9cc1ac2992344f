//! The layers, under candle-nn's names and signatures.

use crate::add::AddArgs;
use crate::ops::{self, Dropout};
use candle_core::{Module, Result, Shape, Tensor};
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
    remove_mean: bool,
    eps: f64,
}

impl LayerNorm {
    /// A layer from its tensors, both of shape `normalized_shape`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self {
            weight,
            bias: Some(bias),
            remove_mean: true,
            eps,
        }
    }

    /// A layer without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self {
            weight,
            bias: None,
            remove_mean: true,
            eps,
        }
    }

    /// RMSNorm: no mean, no bias.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self {
            weight,
            bias: None,
            remove_mean: false,
            eps,
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

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// Whether the mean is removed; `false` is RMSNorm.
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }
}

impl Module for LayerNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        ops::normalize(
            xs,
            self.weight.dims(),
            Some(&self.weight),
            self.bias.as_ref(),
            self.remove_mean,
            self.eps,
        )
    }
}

/// The same tensors, so that a variable stays the variable it was.
impl From<candle_nn::LayerNorm> for LayerNorm {
    fn from(layer: candle_nn::LayerNorm) -> Self {
        Self {
            weight: layer.weight().clone(),
            bias: layer.bias().cloned(),
            remove_mean: layer.remove_mean(),
            eps: layer.eps(),
        }
    }
}

/// A layer over the trailing dims `size` (a `usize` or a shape), its tensors read from or created in `vb`.
///
/// The weight is named `weight` or `gamma` and starts at 1, the bias is named `bias` or `beta` and starts at 0.
/// As in candle-nn, `config.affine = false` leaves out the bias only, and a bias that is left out is not looked up.
///
/// # Errors
/// Those of the VarBuilder: a tensor that is missing or has another shape.
pub fn layer_norm<S: Into<Shape>, C: Into<LayerNormConfig>>(
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
    let weight = get("weight", "gamma", 1.)?;
    let bias = config.affine.then(|| get("bias", "beta", 0.)).transpose()?;
    Ok(LayerNorm {
        weight,
        bias,
        remove_mean: config.remove_mean,
        eps: config.eps,
    })
}

/// [`layer_norm`] without a bias.
pub fn layer_norm_no_bias<S: Into<Shape>>(size: S, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    let config = LayerNormConfig {
        eps,
        remove_mean: true,
        affine: false,
    };
    layer_norm(size, config, vb)
}

/// Root mean square normalisation, differentiable and fused: the drop-in for [`candle_nn::RmsNorm`].
#[derive(Clone, Debug)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// A layer from its weight, of shape `normalized_shape`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
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

    /// As [`Module::forward`], which is differentiable here; kept so that callers of candle-nn's need no change.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
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
    let config = LayerNormConfig {
        eps,
        remove_mean: false,
        affine: false,
    };
    Ok(RmsNorm(layer_norm(size, config, vb)?))
}

impl LayerNorm {
    /// The norm of `residual + xs`, and that sum: see [`ops::add_layer_norm`].
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.add(xs, residual, None)
    }

    /// The norm of `residual + dropout(xs)`, and that sum: see [`ops::dropout_add_layer_norm`].
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
        let args = AddArgs {
            x: xs,
            residual,
            weight: Some(&self.weight),
            bias: self.bias.as_ref(),
        };
        let shape = self.weight.dims();
        ops::add_normalize(&args, shape, self.remove_mean, self.eps, dropout)
    }
}

impl RmsNorm {
    /// The norm of `residual + xs`, and that sum: see [`ops::add_rms_norm`].
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.0.forward_add(xs, residual)
    }

    /// The norm of `residual + dropout(xs)`, and that sum: see [`ops::dropout_add_rms_norm`].
    pub fn forward_dropout_add(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        dropout: Dropout,
    ) -> Result<(Tensor, Tensor)> {
        self.0.forward_dropout_add(xs, residual, dropout)
    }
}
