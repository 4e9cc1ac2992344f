//! The fused op as candle sees it: forward, what is kept for backward, and backward.

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::problem::{Problem, Wanted};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Result, Shape,
    Storage, Tensor, bail,
};
use std::ops::Deref;
use std::sync::OnceLock;

/// One call of the op. candle takes it by value, so that it lives for one forward and keeps that forward's statistics.
///
/// It is a [`CustomOp3`] over (xs, weight, bias), a [`CustomOp2`] where one of the two is missing and a
/// [`CustomOp1`] where both are: no stand-in tensor enters the graph.
pub(crate) struct NormOp {
    problem: Problem,
    keep: bool,
    statistics: OnceLock<Statistics>,
}

/// mean, which RMSNorm does not have, and then rstd of all rows, in the problem's statistics dtype: in one piece, since allocations show
/// where rows are few.
pub(crate) enum Statistics {
    Cpu(CpuStorage),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Memory),
}

/// What a backend's forward returns. `statistics`: as [`Statistics`] has them, if they were to be kept.
pub(crate) struct Forward<S, K> {
    pub ys: S,
    pub statistics: Option<K>,
}

/// What a backend's backward returns: dx `[rows, cols]`, dweight and dbias `[cols]`, as far as they were wanted.
pub(crate) struct Gradients<S> {
    pub dx: Option<S>,
    pub dweight: Option<S>,
    pub dbias: Option<S>,
}

/// What a backend's backward reads beside the statistics: contiguous tensors, or their storages on one device.
pub(crate) struct BackwardArgs<T> {
    pub x: T,
    pub weight: Option<T>,
    pub dy: T,
}

pub(crate) type Operand<'a, S> = (&'a S, &'a Layout);

impl NormOp {
    /// `keep`: whether mean and rstd are kept for a backward pass.
    pub fn new(problem: Problem, keep: bool) -> Self {
        Self {
            problem,
            keep,
            statistics: OnceLock::new(),
        }
    }

    /// Which of weight and bias `params` are, in that order.
    fn split<'a, T: ?Sized>(&self, params: &[&'a T]) -> (Option<&'a T>, Option<&'a T>) {
        match *params {
            [weight, bias] => (Some(weight), Some(bias)),
            [weight] if self.problem.weight => (Some(weight), None),
            [bias] => (None, Some(bias)),
            _ => (None, None),
        }
    }

    fn keep<S, K>(
        &self,
        forward: Forward<S, K>,
        layout: &Layout,
        wrap: impl Fn(K) -> Statistics,
    ) -> Result<(S, Shape)> {
        if let Some(kept) = forward.statistics {
            // A second forward of the same op value would compute the same statistics.
            let _ = self.statistics.set(wrap(kept));
        }
        Ok((forward.ys, layout.shape().clone()))
    }

    fn forward_cpu(
        &self,
        x: Operand<'_, CpuStorage>,
        params: &[&Operand<'_, CpuStorage>],
    ) -> Result<(CpuStorage, Shape)> {
        let (weight, bias) = self.split(params);
        let forward = cpu::forward(&self.problem, x, weight.copied(), bias.copied(), self.keep)?;
        self.keep(forward, x.1, Statistics::Cpu)
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(
        &self,
        x: Operand<'_, CudaStorage>,
        params: &[&Operand<'_, CudaStorage>],
    ) -> Result<(CudaStorage, Shape)> {
        let (weight, bias) = self.split(params);
        let forward = cuda::forward(&self.problem, x, weight.copied(), bias.copied(), self.keep)?;
        self.keep(forward, x.1, Statistics::Cuda)
    }

    #[cfg(not(feature = "cuda"))]
    fn forward_cuda(
        &self,
        _: Operand<'_, CudaStorage>,
        _: &[&Operand<'_, CudaStorage>],
    ) -> Result<(CudaStorage, Shape)> {
        without_cuda(&self.problem)
    }

    /// The gradients of the tracked arguments, each with its argument's shape and dtype.
    fn backward(&self, x: &Tensor, params: &[&Tensor], dy: &Tensor) -> Result<Gradients<Tensor>> {
        let (weight, bias) = self.split(params);
        let statistics = kept(&self.problem, self.statistics.get())?;
        let wanted = Wanted {
            dx: x.track_op(),
            dweight: weight.is_some_and(Tensor::track_op),
            dbias: bias.is_some_and(Tensor::track_op),
        };
        let args = BackwardArgs {
            x,
            weight,
            dy: &dy.contiguous()?,
        };
        let wrap = |storage, like: Option<&Tensor>| -> Option<Tensor> {
            Some(Tensor::from_storage(
                storage,
                like?.shape(),
                BackpropOp::none(),
                false,
            ))
        };
        let Gradients { dx, dweight, dbias } = self.backward_on(&args, statistics, wanted)?;
        Ok(Gradients {
            dx: dx.and_then(|s| wrap(s, Some(x))),
            dweight: dweight.and_then(|s| wrap(s, weight)),
            dbias: dbias.and_then(|s| wrap(s, bias)),
        })
    }

    /// Runs the backend that has the statistics on the tensors' storages, locked for reading.
    fn backward_on(
        &self,
        args: &BackwardArgs<&Tensor>,
        statistics: &Statistics,
        wanted: Wanted,
    ) -> Result<Gradients<Storage>> {
        let problem = &self.problem;
        let locked = args.try_map(|tensor| Ok(tensor.storage_and_layout()))?;
        match statistics {
            Statistics::Cpu(statistics) => {
                let args = locked.try_map(|locked| on_cpu(problem, locked))?;
                Ok(cpu::backward(problem, &args, statistics, wanted)?.map(Storage::Cpu))
            }
            #[cfg(feature = "cuda")]
            Statistics::Cuda(statistics) => {
                let args = locked.try_map(|locked| on_cuda(problem, locked))?;
                Ok(cuda::backward(problem, &args, statistics, wanted)?.map(Storage::Cuda))
            }
        }
    }
}

/// The statistics without which there is no backward pass.
pub(crate) fn kept<K>(problem: &Problem, statistics: Option<K>) -> Result<K> {
    match statistics {
        Some(statistics) => Ok(statistics),
        None => bail!(
            "{}: backward: expected the statistics of a forward pass, got none",
            problem.op_name()
        ),
    }
}

/// A tensor's storage, locked for reading, where it has to be.
pub(crate) fn on_cpu<'a, S: Deref<Target = Storage>>(
    problem: &Problem,
    (storage, layout): &'a (S, &Layout),
) -> Result<Operand<'a, CpuStorage>> {
    match &**storage {
        Storage::Cpu(storage) => Ok((storage, layout)),
        storage => elsewhere(problem, "the CPU", storage),
    }
}

/// As [`on_cpu`].
#[cfg(feature = "cuda")]
pub(crate) fn on_cuda<'a, S: Deref<Target = Storage>>(
    problem: &Problem,
    (storage, layout): &'a (S, &Layout),
) -> Result<Operand<'a, CudaStorage>> {
    match &**storage {
        Storage::Cuda(storage) => Ok((storage, layout)),
        storage => elsewhere(problem, "CUDA", storage),
    }
}

pub(crate) fn elsewhere<T>(problem: &Problem, expected: &str, storage: &Storage) -> Result<T> {
    bail!(
        "{}: expected all tensors on {expected} (as xs), got one on {:?}",
        problem.op_name(),
        storage.device().location()
    )
}

pub(crate) fn no_kernel<T>(problem: &Problem, device: &Device) -> Result<T> {
    #[cfg(not(feature = "cuda"))]
    if device.is_cuda() {
        return without_cuda(problem);
    }
    bail!(
        "{}: expected a device with a kernel, got {:?}",
        problem.op_name(),
        device.location()
    )
}

#[cfg(not(feature = "cuda"))]
fn without_cuda<T>(problem: &Problem) -> Result<T> {
    bail!(
        "{}: xs: is on a CUDA device, but candle-fused-layer-norm was built without its feature `cuda`",
        problem.op_name()
    )
}

impl<T> BackwardArgs<T> {
    pub fn try_map<'a, R>(&'a self, f: impl Fn(&'a T) -> Result<R>) -> Result<BackwardArgs<R>> {
        Ok(BackwardArgs {
            x: f(&self.x)?,
            weight: self.weight.as_ref().map(&f).transpose()?,
            dy: f(&self.dy)?,
        })
    }
}

impl<S> Gradients<S> {
    fn map<R>(self, f: impl Fn(S) -> R) -> Gradients<R> {
        Gradients {
            dx: self.dx.map(&f),
            dweight: self.dweight.map(&f),
            dbias: self.dbias.map(&f),
        }
    }
}

impl CustomOp1 for NormOp {
    fn name(&self) -> &'static str {
        self.problem.op_name()
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward_cpu((s, l), &[])
    }

    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward_cuda((s, l), &[])
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(x, &[], dy)?.dx)
    }
}

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        self.problem.op_name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward_cpu((s1, l1), &[&(s2, l2)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward_cuda((s1, l1), &[&(s2, l2)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        param: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grads = self.backward(x, &[param], dy)?;
        Ok((grads.dx, grads.dweight.or(grads.dbias)))
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        self.problem.op_name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward_cpu((s1, l1), &[&(s2, l2), &(s3, l3)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward_cuda((s1, l1), &[&(s2, l2), &(s3, l3)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grads = self.backward(x, &[weight, bias], dy)?;
        Ok((grads.dx, grads.dweight, grads.dbias))
    }
}
