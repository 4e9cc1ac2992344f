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
//! # Special values
//! Each row is on its own: what is in one shows in no other row of the result, nor of the gradient of `xs`. Gradients of
//! `weight` and `bias` are sums over rows, and take what is in any of them.
//!
//! | in a row of `xs` | that row of the result |
//! |---|---|
//! | a NaN | NaN |
//! | an infinity | NaN; of RMSNorm, NaN in its place and `bias` or 0 in the others |
//! | all elements the same | `bias`, exactly, if `eps` is not 0; of RMSNorm, what the formula gives |
//! | subnormal elements | what the formula gives: they are not taken for 0 |
//! | deviations beyond 1e19 (f32, bf16), whose squares overflow f32 | `bias` or 0, and no gradient, as in PyTorch; f64 has them |
//! | `eps` of 0 and no deviation, or none whose square f32 holds (below 1e-22) | NaN or infinities, as in PyTorch |
//!
//! A result or a gradient that its dtype cannot hold is an infinity: beyond 65504 for f16.
//!
//! # Errors
//! A wrong shape, an unsupported dtype, tensors on several devices, or an `eps` that is negative or not finite: the
//! message names the op, the argument, what was expected and what was given. Nothing panics, but memory that cannot be had ends
//! the process, as everywhere in Rust.

use crate::{op::NormOp, problem::Problem};
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
fn second_order() -> bool {
    thread_local! {
        static DO_NOT_DETACH: bool =
            std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|s| !s.is_empty() && s != "0");
    }
    DO_NOT_DETACH.with(|b| *b)
}
