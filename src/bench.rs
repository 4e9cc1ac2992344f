//! What `benches/` and `examples/tune.rs` need and a model does not: the backward pass on its own, and choosing kernels. Not part of
//! the public API.

use crate::NormConfig;
use crate::add::{self, AddArgs};
use crate::cpu::{self, BackwardPass, Element, ForwardPass};
use crate::op::{self, BackwardArgs, NormOp};
pub use crate::plan::{Access, Choice};
use crate::problem::{Problem, Wanted, dispatch};
use crate::tuning::Direction;
use candle_core::{CustomOp3, Result, Tensor};
use std::cell::Cell;
use std::mem::MaybeUninit;
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
    let problem = Problem::new(
        xs,
        weight.dims(),
        Some(weight),
        Some(bias),
        &NormConfig::from(eps),
    )?;
    let op: Arc<Box<dyn CustomOp3 + Send + Sync>> = Arc::new(Box::new(NormOp::new(problem, true)));
    let ys = xs.apply_op3_arc(weight, bias, op.clone())?;
    let (xs, weight, bias, result) = (xs.clone(), weight.clone(), bias.clone(), ys.clone());
    Ok((ys, move |dy: &Tensor| {
        op.bwd(&xs, &weight, &bias, &result, dy)
    }))
}

/// The gradients of xs, residual, weight and bias of a norm of a sum.
pub type AddGradients = [Option<Tensor>; 4];

/// As [`layer_norm`], of the sum of `xs` and `residual`. The backward pass takes the gradients of ys and sum.
#[expect(clippy::type_complexity)]
pub fn add_layer_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(
    (Tensor, Tensor),
    impl Fn(&Tensor, &Tensor) -> Result<AddGradients>,
)> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), Some(bias), &eps.into())?;
    let args = AddArgs {
        x: xs.clone(),
        residual: residual.clone(),
        weight: Some(weight.clone()),
        bias: Some(bias.clone()),
    };
    let (ys, sum, pass) = add::run(problem, &args, None)?;
    Ok(((ys, sum), move |dy: &Tensor, dsum: &Tensor| {
        let gradients = pass.backward_of(dy, dsum)?;
        Ok([
            gradients.dx,
            gradients.dresidual,
            gradients.dweight,
            gradients.dbias,
        ])
    }))
}

/// A pass that runs again and again over the same memory.
pub type Kernel = Box<dyn FnMut() -> Result<()>>;

/// The CPU's forward pass over contiguous tensors, without what a call of the op adds to it: its outputs are there and touched.
pub fn cpu_forward(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Kernel> {
    let problem = Problem::new(
        xs,
        weight.dims(),
        Some(weight),
        Some(bias),
        &NormConfig::from(eps),
    )?;
    let [xs, weight, bias] = [xs, weight, bias].map(Tensor::clone);
    dispatch!("CPU", problem, T, P => {
        let mut ys = touched::<T>(xs.elem_count());
        let mut mean = touched::<<T as Element>::Acc>(problem.rows);
        let mut rstd = touched::<<T as Element>::Acc>(problem.rows);
        Ok(Box::new(move || {
            let [xs, weight, bias] = [&xs, &weight, &bias].map(Tensor::storage_and_layout);
            let pass = ForwardPass::<T, P>::new(
                &problem,
                op::on_cpu(&problem, &xs)?,
                Some(op::on_cpu(&problem, &weight)?),
                Some(op::on_cpu(&problem, &bias)?),
            )?;
            pass.run(&mut ys, &mut mean, &mut rstd);
            Ok(())
        }))
    })
}

/// The kernels of a forward pass over contiguous CUDA tensors, in the same way.
#[cfg(feature = "cuda")]
pub fn cuda_forward(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Kernel> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), Some(bias), &eps.into())?;
    crate::cuda::forward_kernel(problem, xs, weight, bias)
}

/// The kernels of a backward pass over contiguous CUDA tensors, for all three gradients, in the same way.
#[cfg(feature = "cuda")]
pub fn cuda_backward(xs: &Tensor, weight: &Tensor, dy: &Tensor, eps: f64) -> Result<Kernel> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), None, &eps.into())?;
    crate::cuda::backward_kernel(problem, xs, weight, dy)
}

/// The CPU's backward pass, in the same way.
pub fn cpu_backward(xs: &Tensor, weight: &Tensor, dy: &Tensor, eps: f64) -> Result<Kernel> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), None, &eps.into())?;
    let operands = [xs, weight, dy].map(Tensor::clone);
    let wanted = Wanted {
        dx: true,
        dweight: true,
        dbias: true,
    };
    dispatch!("CPU", problem, T, P => {
        let mut dx = touched::<T>(xs.elem_count());
        let mut dweight = touched::<P>(problem.cols);
        let mut dbias = touched::<P>(problem.cols);
        let mut statistics = None;
        Ok(Box::new(move || {
            let locked = operands.each_ref().map(Tensor::storage_and_layout);
            let operand = |index: usize| op::on_cpu(&problem, &locked[index]);
            let args = BackwardArgs {
                x: operand(0)?,
                weight: Some(operand(1)?),
                dy: operand(2)?,
            };
            let statistics = match &mut statistics {
                Some(statistics) => statistics,
                none => {
                    let forward = cpu::forward(&problem, args.x, args.weight, None, true)?;
                    none.insert(op::kept(&problem, forward.statistics)?)
                }
            };
            let pass = BackwardPass::<T, P>::new(&problem, &args, statistics, wanted)?;
            pass.run(&mut dx, &mut dweight, &mut dbias);
            Ok(())
        }))
    })
}

fn touched<T: Copy + num_traits::One>(len: usize) -> Vec<MaybeUninit<T>> {
    vec![MaybeUninit::new(T::one()); len]
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
    let problem = Problem::new(
        xs,
        weight.dims(),
        Some(weight),
        Some(bias),
        &NormConfig::from(0.),
    )?;
    crate::cuda::candidates(&problem, Direction::Forward, &[xs], &[weight, bias])
}

/// The choices for a backward pass over contiguous CUDA tensors.
#[cfg(feature = "cuda")]
pub fn backward_candidates(xs: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Candidates> {
    let problem = Problem::new(xs, weight.dims(), Some(weight), None, &NormConfig::from(0.))?;
    crate::cuda::candidates(&problem, Direction::Backward, &[xs, dy], &[weight])
}

/// The name of a CUDA device and its multiprocessors, as a tuning file has them.
#[cfg(feature = "cuda")]
pub fn gpu(device: &candle_core::Device) -> Result<(String, usize)> {
    crate::cuda::name_and_multiprocessors(device.as_cuda_device()?)
}

/// The kernels that the build has for a CUDA device and these dtypes of xs and of weight, `file/entry`, and whether a call of the process
/// has loaded each.
#[cfg(feature = "cuda")]
pub fn kernels(
    device: &candle_core::Device,
    dtypes: (candle_core::DType, candle_core::DType),
) -> Result<Vec<(String, bool)>> {
    crate::cuda::kernels(device.as_cuda_device()?, dtypes)
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
