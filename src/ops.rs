//! Functions over tensors, under the names and signatures of `candle_nn::ops`.
//!
//! All of them are differentiable in every tensor argument, on the CPU and on CUDA. Where nothing is tracked they
//! keep nothing for a backward pass.
//!
//! | argument | shape | dtype |
//! |---|---|---|
//! | `xs` | `[.., normalized_shape]`, any strides | f32, f16, bf16, f64 |
//! | `weight`, `bias` | `normalized_shape`: one or more trailing dims of `xs` | that of `xs`, or f32 beside f16 and bf16 |
//! | result | that of `xs` | that of `xs`, or the one asked of [`normalize_to_dtype`] |
//!
//! Statistics and sums are f32, f64 for f64. The variance is biased, and taken about the mean or a value near
//! it, never as the difference of two large sums. The mean is rounded to the type of the sums before it is taken away: in f32, results are off
//! by up to 6e-8 * |mean| / deviation.
//!
//! # Special values
//! Each row is on its own: what is in one shows in no other row of the result, nor of the gradient of `xs`. Gradients of
//! `weight` and `bias` are sums over rows, and take what is in any of them.
//!
//! | in a row of `xs` | that row of the result |
//! |---|---|
//! | a NaN | NaN |
//! | an infinity | NaN; of RMSNorm, NaN in its place and `bias` or 0 in the others |
//! | all elements the same | `bias`, exactly, if `eps` is not 0 in the type of the sums, nor below 1e-37; of RMSNorm, what the formula gives |
//! | subnormal elements | what the formula gives: they are not taken for 0 |
//! | deviations beyond 1e19 (f32, bf16), whose squares overflow f32 | `bias` or 0, and no gradient, as in PyTorch; f64 has them |
//! | elements whose sum f32 (f64 for f64) does not hold, as 5000 of 1e35 | as above, or NaN where the sum overflows on the way |
//! | `eps` of 0 and no deviation, or none whose square f32 holds (below 1e-22) | NaN or infinities, as in PyTorch |
//!
//! A result or a gradient that its dtype cannot hold is an infinity: beyond 65504 for f16.
//!
//! # Errors
//! A wrong shape, an unsupported dtype, tensors on several devices, or an `eps` that is negative or not finite: the
//! message names the op, the argument, what was expected and what was given. Nothing panics, but memory that cannot be had ends
//! the process, as everywhere in Rust.

pub use crate::dropout::Dropout;
use crate::{
    NormConfig,
    add::{self, AddArgs},
    op::NormOp,
    problem::Problem,
};
use candle_core::{DType, Result, Shape, Tensor};
use std::borrow::Cow;

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
    let config = NormConfig::from(f64::from(eps));
    fused_or_composed(xs, weight.dims(), Some(weight), Some(bias), &config)
}

/// [`layer_norm`] without a bias.
pub fn layer_norm_no_bias(xs: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let config = NormConfig::from(f64::from(eps));
    fused_or_composed(xs, weight.dims(), Some(weight), None, &config)
}

/// [`layer_norm`] with neither weight nor bias, over the trailing dims `normalized_shape`
/// (PyTorch's `elementwise_affine=False`).
pub fn layer_norm_no_affine<S: Into<Shape>>(
    xs: &Tensor,
    normalized_shape: S,
    eps: f32,
) -> Result<Tensor> {
    let config = NormConfig::from(f64::from(eps));
    normalize(xs, normalized_shape, None, None, &config)
}

/// `xs / sqrt(mean(xs^2) + eps) * weight`, over the dims that `weight` has.
///
/// The drop-in for `candle_nn::ops::rms_norm`, whose result has no gradient.
///
/// Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
pub fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let config = NormConfig::rms_norm(f64::from(eps));
    fused_or_composed(xs, weight.dims(), Some(weight), None, &config)
}

/// Normalises the trailing dims `normalized_shape` of `xs`, with every choice open: the function that the others call.
///
/// `weight` and `bias` are there or not, each on its own, whatever `config.bias` says; without a weight,
/// `config.zero_centered_weight` changes nothing.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_layer_norm::{NormConfig, ops};
/// # fn main() -> candle_core::Result<()> {
/// let xs = Tensor::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[0f32, 1.], &Device::Cpu)?;
/// // Gemma's norm: xs / sqrt(mean(xs^2) + eps) * (1 + weight).
/// let gemma = NormConfig {
///     zero_centered_weight: true,
///     ..NormConfig::rms_norm(0.)
/// };
/// let ys = ops::normalize(&xs, 2, Some(&weight), None, &gemma)?;
/// let root = 12.5f32.sqrt();
/// let want = Tensor::new(&[[3. / root, 2. * 4. / root]], &Device::Cpu)?;
/// assert!((ys - want)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
/// # Ok(()) }
/// ```
pub fn normalize<S: Into<Shape>>(
    xs: &Tensor,
    normalized_shape: S,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    config: &NormConfig,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    fused_or_composed(xs, shape.dims(), weight, bias, config)
}

/// [`normalize`] over dims that are at hand: a shape is memory.
fn fused_or_composed(
    xs: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    config: &NormConfig,
) -> Result<Tensor> {
    let problem = Problem::new(xs, normalized_shape, weight, bias, config)?;
    run(problem, xs, weight, bias)
}

/// [`normalize`] with a result of `dtype`, rounded once: f32 of f16 or bf16 `xs`, for a head whose logits are f32, or the
/// other way round.
///
/// Where `dtype` is not that of `xs`, what is narrower than the type of the sums (or than `dtype`) is widened, which is
/// exact, and the result is converted: a pass over `xs`, over ys, or over both (f16 to bf16), and as many backward. Gradients
/// come back in the dtypes of their arguments. Weight and bias have the dtypes that [`normalize`] takes beside `xs`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_fused_layer_norm::{NormConfig, ops};
/// # fn main() -> candle_core::Result<()> {
/// let xs = Tensor::new(&[[1f32, 2., 4.]], &Device::Cpu)?.to_dtype(DType::BF16)?;
/// let weight = Tensor::new(&[1f32, 1., 1.], &Device::Cpu)?;
/// let config = NormConfig::default();
/// let ys = ops::normalize_to_dtype(&xs, 3, Some(&weight), None, &config, DType::F32)?;
/// assert_eq!(ys.dtype(), DType::F32);
/// # Ok(()) }
/// ```
///
/// # Errors
/// Those of [the module](self), and a `dtype` other than f32, f16, bf16 or f64.
pub fn normalize_to_dtype<S: Into<Shape>>(
    xs: &Tensor,
    normalized_shape: S,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    config: &NormConfig,
    dtype: DType,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let problem = Problem::new(xs, shape.dims(), weight, bias, config)?;
    let through = problem.dtype_towards(dtype)?;
    if through == xs.dtype() {
        return run(problem, xs, weight, bias)?.to_dtype(dtype);
    }
    let wide = |tensor: &Tensor| tensor.to_dtype(through);
    let (weight, bias) = (weight.map(wide).transpose()?, bias.map(wide).transpose()?);
    normalize(&wide(xs)?, shape, weight.as_ref(), bias.as_ref(), config)?.to_dtype(dtype)
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
/// Those of [the module](self), and for a `residual` that is not like `xs`. After a backward pass that failed on its way through this
/// graph, such as for want of memory, repeat that pass or take a new forward pass: what arrived at `ys` or `sum` is kept for it.
///
/// Source: the `prenorm` of flash-attention's and the fused add of Liger's norms.
pub fn add_layer_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let params = (Some(weight), Some(bias));
    let config = NormConfig::from(f64::from(eps));
    add_normalize(xs, residual, weight.dims(), params, &config, None)
}

/// [`add_layer_norm`] for RMSNorm, without a bias.
pub fn add_rms_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let params = (Some(weight), None);
    let config = NormConfig::rms_norm(f64::from(eps));
    add_normalize(xs, residual, weight.dims(), params, &config, None)
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
    let params = (Some(weight), Some(bias));
    let config = NormConfig::from(f64::from(eps));
    add_normalize(xs, residual, weight.dims(), params, &config, Some(dropout))
}

/// [`add_rms_norm`] of `sum = residual + dropout(xs)`.
pub fn dropout_add_rms_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
    dropout: Dropout,
) -> Result<(Tensor, Tensor)> {
    let params = (Some(weight), None);
    let config = NormConfig::rms_norm(f64::from(eps));
    add_normalize(xs, residual, weight.dims(), params, &config, Some(dropout))
}

/// [`normalize`] of `sum = residual + dropout(xs)`, and the sum, with every choice open: the function that the others call.
///
/// `params` are weight and bias, each of which may be missing.
pub fn add_normalize<S: Into<Shape>>(
    xs: &Tensor,
    residual: &Tensor,
    normalized_shape: S,
    (weight, bias): (Option<&Tensor>, Option<&Tensor>),
    config: &NormConfig,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor)> {
    let shape = normalized_shape.into();
    let problem = Problem::new(xs, shape.dims(), weight, bias, config)?;
    let args = AddArgs {
        x: xs,
        residual,
        weight,
        bias,
    };
    add::normalize(problem, &args, dropout)
}

fn run(
    problem: Problem,
    xs: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let tracked = [Some(xs), weight, bias]
        .into_iter()
        .flatten()
        .any(Tensor::track_op);
    if is_composed(&problem, xs, tracked) {
        return crate::composed::run(&problem, xs, weight, bias);
    }
    // The kernels read dense rows. A view that is dense but starts somewhere inside its storage is not copied.
    let xs = dense(xs)?;
    let weight = weight.map(dense).transpose()?;
    let bias = bias.map(dense).transpose()?;
    let op = NormOp::new(problem, tracked);
    match (weight.as_deref(), bias.as_deref(), tracked) {
        (None, None, true) => xs.apply_op1(op),
        (None, None, false) => xs.apply_op1_no_bwd(&op),
        (Some(w), None, true) | (None, Some(w), true) => xs.apply_op2(w, op),
        (Some(w), None, false) | (None, Some(w), false) => xs.apply_op2_no_bwd(w, &op),
        (Some(w), Some(b), true) => xs.apply_op3(w, b, op),
        (Some(w), Some(b), false) => xs.apply_op3_no_bwd(w, b, &op),
    }
}

fn dense(tensor: &Tensor) -> Result<Cow<'_, Tensor>> {
    Ok(match tensor.is_contiguous() {
        true => Cow::Borrowed(tensor),
        false => Cow::Owned(tensor.contiguous()?),
    })
}

/// Whether a call is candle's own ops: where there is no kernel, and for gradients of gradients, but of empty tensors, of which those ops keep no graph.
pub(crate) fn is_composed(problem: &Problem, xs: &Tensor, tracked: bool) -> bool {
    xs.device().is_metal() || (tracked && second_order() && !problem.is_empty())
}

/// Whether candle keeps the graph of the backward pass itself. Read once a thread, as candle does.
fn second_order() -> bool {
    thread_local! {
        static DO_NOT_DETACH: bool =
            std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|s| !s.is_empty() && s != "0");
    }
    DO_NOT_DETACH.with(|b| *b)
}
