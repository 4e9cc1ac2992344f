//! What `benches/` and `examples/tune.rs` need and a model does not: the backward pass on its own, and choosing kernels. Not part of
//! the public API.

use crate::op::NormOp;
pub use crate::plan::{Access, Choice};
use crate::problem::Problem;
use crate::tuning::Direction;
use candle_core::{CustomOp3, Result, Tensor};
use std::cell::Cell;
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

/// What a call may choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidates {
    /// How the kernels read these tensors.
    pub access: Access,
    /// Of which the first is the built-in plan's.
    pub choices: Vec<Choice>,
}

/// The choices for a forward pass over contiguous CUDA tensors.
#[cfg(feature = "cuda")]
pub fn forward_candidates(xs: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Candidates> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), Some(bias), true, 0.)?;
    crate::cuda::candidates(&problem, Direction::Forward, &[xs], &[weight, bias])
}

/// The choices for a backward pass over contiguous CUDA tensors.
#[cfg(feature = "cuda")]
pub fn backward_candidates(xs: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Candidates> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), None, true, 0.)?;
    crate::cuda::candidates(&problem, Direction::Backward, &[xs, dy], &[weight])
}

/// The name of a CUDA device and its multiprocessors, as a tuning file has them.
#[cfg(feature = "cuda")]
pub fn gpu(device: &candle_core::Device) -> Result<(String, usize)> {
    crate::cuda::name_and_multiprocessors(device.as_cuda_device()?)
}

thread_local! {
    /// Forward, backward.
    static FORCED: Cell<[Option<Choice>; 2]> = const { Cell::new([None; 2]) };
}

/// Runs `f`, in which CUDA calls of this thread take these choices, or fail where they cannot.
pub fn forced<T>(forward: Option<Choice>, backward: Option<Choice>, f: impl FnOnce() -> T) -> T {
    /// Also where `f` panics.
    struct Restore([Option<Choice>; 2]);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace([forward, backward]));
    f()
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) fn forced_choice(dir: Direction) -> Option<Choice> {
    let [forward, backward] = FORCED.get();
    match dir {
        Direction::Forward => forward,
        Direction::Backward => backward,
    }
}
