//! Functions over tensors, under the names and signatures of `candle_nn::ops`.
//!
//! All of them are differentiable in every tensor argument, on the CPU and on CUDA. Where nothing is tracked they
//! keep nothing for a backward pass.
//!
//! | argument | shape | dtype |
//! |---|---|---|
//! | `xs` | `[.., normalized_shape]`, any strides | f32, f16, bf16, f64 |
//! | `weight`, `bias` | `normalized_shape`: one or more trailing dims of `xs` | that of `xs`, or f32 beside f16 and bf16 |
//! | result | that of `xs` | that of `xs` |
//!
//! Statistics and sums are f32, f64 for f64. The variance is biased and computed in two passes about the mean.
//!
//! # Errors
//! A wrong shape, an unsupported dtype, tensors on several devices, or an `eps` that is negative or not finite: the
//! message names the op, the argument, what was expected and what was given.

pub use crate::dropout::Dropout;
use crate::{
    add::{self, AddArgs},
    op::NormOp,
    problem::Problem,
};
use candle_core::{Result, Shape, Tensor};

/// `(xs - mean) / sqrt(var + eps) * weight + bias`, the statistics taken over the dims that `weight` has.
///
/// The drop-in for `candle_nn::ops::layer_norm`, whose result has no gradient. See [the module](self) for shapes,
/// dtypes and errors.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// # fn main() -> candle_core::Result<()> {
/// let xs = Var::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
/// let weight = Var::ones(8, candle_core::DType::F32, &Device::Cpu)?;
/// let bias = Var::zeros(8, candle_core::DType::F32, &Device::Cpu)?;
/// let ys = candle_fused_layer_norm::ops::layer_norm(&xs, &weight, &bias, 1e-5)?;
/// let grads = ys.sqr()?.sum_all()?.backward()?;
/// assert_eq!(grads.get(&xs).unwrap().dims(), [2, 3, 8]);
/// assert_eq!(grads.get(&weight).unwrap().dims(), [8]);
/// # Ok(()) }
/// ```
///
/// Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
pub fn layer_norm(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    normalize(
        xs,
        weight.dims(),
        Some(weight),
        Some(bias),
        true,
        f64::from(eps),
    )
}

/// [`layer_norm`] without a bias.
pub fn layer_norm_no_bias(xs: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    normalize(xs, weight.dims(), Some(weight), None, true, f64::from(eps))
}

/// [`layer_norm`] with neither weight nor bias, over the trailing dims `normalized_shape`
/// (PyTorch's `elementwise_affine=False`).
pub fn layer_norm_no_affine<S: Into<Shape>>(
    xs: &Tensor,
    normalized_shape: S,
    eps: f32,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    normalize(xs, shape.dims(), None, None, true, f64::from(eps))
}

/// `xs / sqrt(mean(xs^2) + eps) * weight`, over the dims that `weight` has.
///
/// The drop-in for `candle_nn::ops::rms_norm`, whose result has no gradient.
///
/// Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
pub fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    normalize(xs, weight.dims(), Some(weight), None, false, f64::from(eps))
}

/// The norm of a sum, and the sum: `sum = residual + xs`, `ys = layer_norm(sum)`. Returns `(ys, sum)`.
///
/// What a transformer's block begins with: `sum` is the residual stream that goes on, `ys` what the next layer takes. One
/// kernel reads `xs` and `residual` and writes both. Backward, one kernel takes the gradients that arrive at both and
/// writes the one of `xs` and `residual`, which is the same.
///
/// `residual` has the shape, dtype and device of `xs`. The sum is rounded to that dtype before it is normalised: the result
/// is that of [`layer_norm`] of it, bit for bit on the CPU. Rows that a block's registers do not hold (f32: 16384
/// columns), and rows that do not start on 16 bytes, are added in a launch of their own, as they are on the CPU.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_fused_layer_norm::ops;
/// # fn main() -> candle_core::Result<()> {
/// let xs = Var::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
/// let residual = Var::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
/// let weight = Var::ones(8, candle_core::DType::F32, &Device::Cpu)?;
/// let bias = Var::zeros(8, candle_core::DType::F32, &Device::Cpu)?;
/// let (ys, sum) = ops::add_layer_norm(&xs, &residual, &weight, &bias, 1e-5)?;
/// let grads = (ys.sqr()? + sum)?.sum_all()?.backward()?;
/// for var in [&xs, &residual, &weight, &bias] {
///     assert!(grads.get(var).is_some());
/// }
/// # Ok(()) }
/// ```
///
/// # Errors
/// Those of [the module](self), and for a `residual` that is not like `xs`.
///
/// Source: the `prenorm` of flash-attention's and the fused add of Liger's norms.
pub fn add_layer_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let args = AddArgs {
        x: xs,
        residual,
        weight: Some(weight),
        bias: Some(bias),
    };
    add_normalize(&args, weight.dims(), true, f64::from(eps), None)
}

/// [`add_layer_norm`] for RMSNorm, without a bias.
pub fn add_rms_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let args = AddArgs {
        x: xs,
        residual,
        weight: Some(weight),
        bias: None,
    };
    add_normalize(&args, weight.dims(), false, f64::from(eps), None)
}

/// [`add_layer_norm`] of `sum = residual + dropout(xs)`, where dropout takes no memory: see [`Dropout`].
///
/// Source: `dropout_add_layer_norm` of flash-attention.
pub fn dropout_add_layer_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
    dropout: Dropout,
) -> Result<(Tensor, Tensor)> {
    let args = AddArgs {
        x: xs,
        residual,
        weight: Some(weight),
        bias: Some(bias),
    };
    add_normalize(&args, weight.dims(), true, f64::from(eps), Some(dropout))
}

/// [`add_rms_norm`] of `sum = residual + dropout(xs)`.
pub fn dropout_add_rms_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
    dropout: Dropout,
) -> Result<(Tensor, Tensor)> {
    let args = AddArgs {
        x: xs,
        residual,
        weight: Some(weight),
        bias: None,
    };
    add_normalize(&args, weight.dims(), false, f64::from(eps), Some(dropout))
}

/// The one way into the fused op of a sum.
pub(crate) fn add_normalize(
    args: &AddArgs<&Tensor>,
    normalized_shape: &[usize],
    remove_mean: bool,
    eps: f64,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor)> {
    let AddArgs {
        x, weight, bias, ..
    } = *args;
    let problem = Problem::new(x, normalized_shape, weight, bias, remove_mean, eps)?;
    add::normalize(problem, args, dropout)
}

/// The one way into the fused op, with every choice open.
pub(crate) fn normalize(
    xs: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    remove_mean: bool,
    eps: f64,
) -> Result<Tensor> {
    let problem = Problem::new(xs, normalized_shape, weight, bias, remove_mean, eps)?;
    let tracked = [Some(xs), weight, bias]
        .into_iter()
        .flatten()
        .any(Tensor::track_op);
    if xs.device().is_metal() || (tracked && second_order()) {
        return crate::composed::run(&problem, xs, weight, bias);
    }
    // The kernels read dense rows. A view that is dense but starts somewhere inside its storage is not copied.
    let xs = xs.contiguous()?;
    let weight = weight.map(Tensor::contiguous).transpose()?;
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let op = NormOp::new(problem, tracked);
    match (weight, bias, tracked) {
        (None, None, true) => xs.apply_op1(op),
        (None, None, false) => xs.apply_op1_no_bwd(&op),
        (Some(w), None, true) | (None, Some(w), true) => xs.apply_op2(&w, op),
        (Some(w), None, false) | (None, Some(w), false) => xs.apply_op2_no_bwd(&w, &op),
        (Some(w), Some(b), true) => xs.apply_op3(&w, &b, op),
        (Some(w), Some(b), false) => xs.apply_op3_no_bwd(&w, &b, &op),
    }
}

/// Whether candle keeps the graph of the backward pass itself. Read once a thread, as candle does.
pub(crate) fn second_order() -> bool {
    thread_local! {
        static DO_NOT_DETACH: bool =
            std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|s| !s.is_empty() && s != "0");
    }
    DO_NOT_DETACH.with(|b| *b)
}
