//! What `benches/` needs and a model does not: the backward pass on its own. Not part of the public API.

use crate::op::NormOp;
use crate::problem::Problem;
use candle_core::{CustomOp3, Result, Tensor};
use std::sync::Arc;

/// The gradients of xs, weight and bias, as far as they are tracked.
pub type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// Runs the fused forward pass, and returns its result with a closure that runs the backward pass for an upstream
/// gradient. The arguments are contiguous.
pub fn layer_norm(
    xs: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, impl Fn(&Tensor) -> Result<Gradients>)> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), Some(bias), true, eps)?;
    let op: Arc<Box<dyn CustomOp3 + Send + Sync>> = Arc::new(Box::new(NormOp::new(problem, true)));
    let ys = xs.apply_op3_arc(weight, bias, op.clone())?;
    let (xs, weight, bias, result) = (xs.clone(), weight.clone(), bias.clone(), ys.clone());
    Ok((ys, move |dy: &Tensor| {
        op.bwd(&xs, &weight, &bias, &result, dy)
    }))
}
