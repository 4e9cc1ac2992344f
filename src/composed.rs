//! The same function written in candle's own differentiable ops.
//!
//! Slower by an order of magnitude than the fused kernels, and used where they cannot be: on devices without a
//! kernel (Metal), and when gradients of gradients are wanted (`CANDLE_GRAD_DO_NOT_DETACH`), since candle can
//! differentiate these ops any number of times.

use crate::NormConfig;
use crate::problem::Problem;
use candle_core::{D, DType, Result, Shape, Tensor};

/// Normalises the trailing `normalized_shape` dims of `xs`, then multiplies by `weight` and adds `bias`.
///
/// Arguments, dtypes and errors are those of [`crate::ops::normalize`]. f16 and bf16 are computed in f32 and rounded
/// once, f64 in f64.
pub fn normalize<S: Into<Shape>>(
    xs: &Tensor,
    normalized_shape: S,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    config: &NormConfig,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let problem = Problem::new(xs, shape.dims(), weight, bias, config)?;
    run(&problem, xs, weight, bias)
}

pub(crate) fn run(
    problem: &Problem,
    xs: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let stats: DType = problem.stats_dtype();
    let cols = problem.cols;
    let x = xs.reshape((problem.rows, cols))?.to_dtype(stats)?;
    // 1/cols is only ever multiplied with empty sums when cols is 0.
    let inv_cols = 1. / cols.max(1) as f64;
    let x = if problem.remove_mean {
        let x = x.broadcast_sub(&reference(&x)?)?;
        x.broadcast_sub(&(x.sum_keepdim(D::Minus1)? * inv_cols)?)?
    } else {
        x
    };
    let var = (x.sqr()?.sum_keepdim(D::Minus1)? * inv_cols)?;
    let mut y = x.broadcast_div(&(var + problem.eps)?.sqrt()?)?;
    if let Some(weight) = weight {
        let weight = weight.reshape(cols)?.to_dtype(stats)?;
        y = y.broadcast_mul(&if problem.zero_centered_weight {
            (weight + 1.)?
        } else {
            weight
        })?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.reshape(cols)?.to_dtype(stats)?)?;
    }
    y.to_dtype(problem.dtype)?.reshape(xs.dims())
}

/// A value of each row near its others, which the result does not depend on: a sum of values far from 0 rounds to more than their
/// deviations. The median of the first three, for which it takes two outliers to be one.
fn reference(x: &Tensor) -> Result<Tensor> {
    // No difference from it overflows.
    const MOST: f64 = 1e18;
    let first = |column| x.detach().narrow(1, column, 1);
    match x.dim(1)? {
        0 => x.detach().sum_keepdim(1),
        1 | 2 => first(0),
        _ => {
            let (a, b, c) = (first(0)?, first(1)?, first(2)?);
            a.minimum(&b)?.maximum(&a.maximum(&b)?.minimum(&c)?)
        }
    }?
    .clamp(-MOST, MOST)
}
