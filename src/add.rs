//! The norm of a sum, of which both are outputs: `sum = residual + dropout(xs)`, `ys = norm(sum)`.
//!
//! candle's ops have one output and three arguments at most, so that a call is several nodes of the graph:
//!
//! ```text
//! weight, bias -> Params -+
//! xs, residual -----------+-> Join -+-> Output: ys
//!                                   +-> Output: sum
//! ```
//!
//! Params and Join are tensors of one element. The outputs hold what the forward pass computed. Their backward keeps the
//! gradient that arrives, and tells Join no more than that one has. candle comes to Join after both, whichever were used, and
//! its backward is the fused one, of what they kept.

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dropout::Dropout;
use crate::op::{self, BackwardArgs, Statistics};
use crate::problem::{Problem, Wanted, dispatch};
use crate::{composed, cpu, ops};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Result, Shape,
    Storage, Tensor, WithDType, bail,
};
use num_traits::Zero;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// What a call takes: contiguous tensors, or their storages on one device.
pub(crate) struct AddArgs<T> {
    pub x: T,
    pub residual: T,
    pub weight: Option<T>,
    pub bias: Option<T>,
}

/// What a backend's forward returns. `statistics` as in [`op::Forward`].
pub(crate) struct AddForward<S, K> {
    pub ys: S,
    pub sum: S,
    pub statistics: Option<K>,
}

/// What a backend's backward returns. Without dropout, dx is the gradient of the residual as well, and dresidual is none.
pub(crate) struct AddGradients<S> {
    pub dx: Option<S>,
    pub dresidual: Option<S>,
    pub dweight: Option<S>,
    pub dbias: Option<S>,
}

impl<T> AddArgs<T> {
    fn all(&self) -> impl Iterator<Item = &T> {
        let params = [&self.weight, &self.bias].into_iter().flatten();
        [&self.x, &self.residual].into_iter().chain(params)
    }

    fn try_map<'a, R>(&'a self, f: impl Fn(&'a T) -> Result<R>) -> Result<AddArgs<R>> {
        Ok(AddArgs {
            x: f(&self.x)?,
            residual: f(&self.residual)?,
            weight: self.weight.as_ref().map(&f).transpose()?,
            bias: self.bias.as_ref().map(&f).transpose()?,
        })
    }
}

impl<S, K> AddForward<S, K> {
    fn map<R>(
        self,
        f: impl Fn(S) -> R,
        kept: impl Fn(K) -> Statistics,
    ) -> AddForward<R, Statistics> {
        AddForward {
            ys: f(self.ys),
            sum: f(self.sum),
            statistics: self.statistics.map(kept),
        }
    }
}

impl<S> AddGradients<S> {
    fn map<R>(self, f: impl Fn(S) -> R) -> AddGradients<R> {
        AddGradients {
            dx: self.dx.map(&f),
            dresidual: self.dresidual.map(&f),
            dweight: self.dweight.map(&f),
            dbias: self.dbias.map(&f),
        }
    }
}

/// ys and sum, in the graph if an argument is.
pub(crate) fn normalize(
    problem: Problem,
    args: &AddArgs<&Tensor>,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor)> {
    let op = problem.op_name();
    check_residual(op, args)?;
    if let Some(dropout) = dropout {
        dropout.check(op)?;
    }
    let dropout = dropout.filter(|dropout| dropout.threshold() > 0);
    let tracked = args.all().any(|tensor| tensor.track_op());
    if ops::is_composed(&problem, args.x, tracked) {
        return composed(&problem, args, dropout);
    }
    let args = args.try_map(|tensor| tensor.contiguous())?;
    let forward = forward(&problem, &args, dropout, tracked)?;
    if !tracked {
        let wrap = |storage| wrap(storage, args.x.shape());
        return Ok((wrap(forward.ys), wrap(forward.sum)));
    }
    let pass = Arc::new(Pass::new(problem, &args, dropout, forward.statistics)?);
    let AddArgs {
        x,
        residual,
        weight,
        bias,
    } = args;
    let (join, wanted) = (Join(pass.clone()), pass.wanted);
    let join = match (weight, bias) {
        (Some(weight), Some(bias)) if wanted.dweight && wanted.dbias => {
            let params = weight.apply_op2(&bias, Params(pass.clone()))?;
            x.apply_op3(&residual, &params, join)?
        }
        (Some(weight), _) if wanted.dweight => x.apply_op3(&residual, &weight, join)?,
        (_, Some(bias)) if wanted.dbias => x.apply_op3(&residual, &bias, join)?,
        _ => x.apply_op2(&residual, join)?,
    };
    let output = |which, storage| {
        join.apply_op1(Output {
            which,
            storage: Mutex::new(Some(storage)),
            pass: pass.clone(),
        })
    };
    let (ys, sum) = (
        output(Which::Ys, forward.ys)?,
        output(Which::Sum, forward.sum)?,
    );
    // Its graph holds the pass: without it, or neither would ever be freed.
    *lock(&pass.sum) = Some(sum.detach());
    Ok((ys, sum))
}

fn check_residual(op: &str, args: &AddArgs<&Tensor>) -> Result<()> {
    let (xs, residual) = (args.x, args.residual);
    if residual.dims() != xs.dims() {
        bail!(
            "{op}: residual: expected shape {:?} (as xs), got {:?}",
            xs.dims(),
            residual.dims()
        )
    }
    if residual.dtype() != xs.dtype() {
        bail!(
            "{op}: residual: expected dtype {} (as xs), got {}",
            xs.dtype().as_str(),
            residual.dtype().as_str()
        )
    }
    if !residual.device().same_device(xs.device()) {
        bail!(
            "{op}: residual: expected device {:?} (as xs), got {:?}",
            xs.device().location(),
            residual.device().location()
        )
    }
    Ok(())
}

/// In candle's own ops, of which the mask is an argument.
fn composed(
    problem: &Problem,
    args: &AddArgs<&Tensor>,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor)> {
    let x = args.x;
    let sum = match dropout {
        Some(dropout) => {
            let mut kept = vec![0u8; x.elem_count()];
            dropout.for_each_word(0, x.elem_count(), |element, word| {
                kept[element] = u8::from(word >= dropout.threshold());
            });
            let kept = Tensor::from_vec(kept, x.shape(), x.device())?;
            let stats = problem.stats_dtype();
            let scaled = (x.to_dtype(stats)? * dropout.scale())?;
            let dropped = kept.where_cond(&scaled, &scaled.zeros_like()?)?;
            (dropped + args.residual.to_dtype(stats)?)?.to_dtype(problem.dtype)?
        }
        None => (args.residual + x)?,
    };
    let ys = composed::run(problem, &sum, args.weight, args.bias)?;
    Ok((ys, sum))
}

fn forward(
    problem: &Problem,
    args: &AddArgs<Tensor>,
    dropout: Option<Dropout>,
    keep: bool,
) -> Result<AddForward<Storage, Statistics>> {
    let locked = args.try_map(|tensor| Ok(tensor.storage_and_layout()))?;
    match args.x.device() {
        Device::Cpu => {
            let args = locked.try_map(|locked| op::on_cpu(problem, locked))?;
            let forward = cpu::add_forward(problem, &args, dropout, keep)?;
            Ok(forward.map(Storage::Cpu, Statistics::Cpu))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let args = locked.try_map(|locked| op::on_cuda(problem, locked))?;
            let forward = cuda::add_forward(problem, &args, dropout, keep)?;
            Ok(forward.map(Storage::Cuda, Statistics::Cuda))
        }
        device => op::no_kernel(problem, device),
    }
}

fn wrap(storage: Storage, shape: &Shape) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// No panic leaves half written what is locked here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// ys, sum, and a pass for [`Pass::backward_of`], without a graph: for benches.
pub(crate) fn run(
    problem: Problem,
    args: &AddArgs<Tensor>,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor, Pass)> {
    let forward = forward(&problem, args, dropout, true)?;
    let pass = Pass::new(problem, args, dropout, forward.statistics)?;
    let (ys, sum) = (
        wrap(forward.ys, &pass.shape),
        wrap(forward.sum, &pass.shape),
    );
    *lock(&pass.sum) = Some(sum.clone());
    Ok((ys, sum, pass))
}

/// A call that may be differentiated, shared by its nodes.
pub(crate) struct Pass {
    problem: Problem,
    dropout: Option<Dropout>,
    shape: Shape,
    /// dx: of x, of the residual, or of both.
    wanted: Wanted,
    /// The shape of weight and bias, and the weight, outside the graph.
    params: Shape,
    weight: Option<Tensor>,
    statistics: Statistics,
    /// Outside the graph.
    sum: Mutex<Option<Tensor>>,
    /// By thread: a backward pass is on one, and several may walk the graph at once.
    arrived: Mutex<HashMap<ThreadId, Arrived>>,
}

/// What the nodes of a backward pass leave for those after them.
#[derive(Default)]
struct Arrived {
    dy: Option<Tensor>,
    dsum: Option<Tensor>,
    dweight: Option<Tensor>,
    dbias: Option<Tensor>,
}

impl Pass {
    fn new(
        problem: Problem,
        args: &AddArgs<Tensor>,
        dropout: Option<Dropout>,
        statistics: Option<Statistics>,
    ) -> Result<Self> {
        let statistics = op::kept(&problem, statistics)?;
        let tracked = |param: &Option<Tensor>| param.as_ref().is_some_and(|param| param.track_op());
        let param = args.weight.as_ref().or(args.bias.as_ref());
        Ok(Self {
            dropout,
            shape: args.x.shape().clone(),
            wanted: Wanted {
                dx: args.x.track_op() || args.residual.track_op(),
                dweight: tracked(&args.weight),
                dbias: tracked(&args.bias),
            },
            params: param.map_or_else(|| problem.cols.into(), |param| param.shape().clone()),
            weight: args.weight.as_ref().map(Tensor::detach),
            statistics,
            sum: Mutex::default(),
            arrived: Mutex::default(),
            problem,
        })
    }

    fn arrive(&self, f: impl FnOnce(&mut Arrived)) {
        let mut arrived = lock(&self.arrived);
        f(arrived.entry(thread::current().id()).or_default());
    }

    fn take(&self) -> Arrived {
        let arrived = lock(&self.arrived).remove(&thread::current().id());
        arrived.unwrap_or_default()
    }

    /// As if both gradients had arrived.
    pub fn backward_of(&self, dy: &Tensor, dsum: &Tensor) -> Result<AddGradients<Tensor>> {
        self.arrive(|arrived| {
            (arrived.dy, arrived.dsum) = (Some(dy.clone()), Some(dsum.clone()));
        });
        self.backward()
    }

    /// Of those arguments that are tracked, by what arrived.
    fn backward(&self) -> Result<AddGradients<Tensor>> {
        let op = self.problem.op_name();
        let Some(sum) = lock(&self.sum).clone() else {
            bail!("{op}: backward: expected the sum of a forward pass, got none")
        };
        let arrived = self.take();
        let contiguous = |tensor: Option<Tensor>| tensor.map(|t| t.contiguous()).transpose();
        match (contiguous(arrived.dy)?, contiguous(arrived.dsum)?) {
            (Some(dy), dsum) => {
                let gradients = self.fused(&sum, &dy, dsum.as_ref())?;
                let dx = gradients.dx.map(|s| wrap(s, &self.shape));
                let dresidual = gradients.dresidual.map(|s| wrap(s, &self.shape));
                Ok(AddGradients {
                    dresidual: dresidual.or_else(|| dx.clone()),
                    dx,
                    dweight: gradients.dweight.map(|s| wrap(s, &self.params)),
                    dbias: gradients.dbias.map(|s| wrap(s, &self.params)),
                })
            }
            // ys had no part in it.
            (None, Some(dsum)) => {
                let zeros = |wanted: bool| {
                    let (shape, dtype) = (&self.params, self.problem.param_dtype);
                    wanted
                        .then(|| Tensor::zeros(shape, dtype, dsum.device()))
                        .transpose()
                };
                Ok(AddGradients {
                    dx: match self.dropout {
                        Some(dropout) => Some(wrap(self.dropped(&dsum, dropout)?, &self.shape)),
                        None => Some(dsum.clone()),
                    },
                    dweight: zeros(self.wanted.dweight)?,
                    dbias: zeros(self.wanted.dbias)?,
                    dresidual: Some(dsum),
                })
            }
            (None, None) => bail!("{op}: backward: expected a gradient, got none"),
        }
    }

    fn fused(
        &self,
        sum: &Tensor,
        dy: &Tensor,
        dsum: Option<&Tensor>,
    ) -> Result<AddGradients<Storage>> {
        let Self {
            problem,
            dropout,
            wanted,
            ..
        } = self;
        let args = BackwardArgs {
            x: sum,
            weight: self.weight.as_ref(),
            dy,
        };
        let args = args.try_map(|tensor| Ok(tensor.storage_and_layout()))?;
        let dsum = dsum.map(Tensor::storage_and_layout);
        match &self.statistics {
            Statistics::Cpu(statistics) => {
                let args = args.try_map(|locked| op::on_cpu(problem, locked))?;
                let dsum = dsum.as_ref().map(|d| op::on_cpu(problem, d)).transpose()?;
                let gradients =
                    cpu::add_backward(problem, &args, statistics, dsum, *dropout, *wanted)?;
                Ok(gradients.map(Storage::Cpu))
            }
            #[cfg(feature = "cuda")]
            Statistics::Cuda(statistics) => {
                let args = args.try_map(|locked| op::on_cuda(problem, locked))?;
                let dsum = dsum.as_ref().map(|d| op::on_cuda(problem, d)).transpose()?;
                let gradients =
                    cuda::add_backward(problem, &args, statistics, dsum, *dropout, *wanted)?;
                Ok(gradients.map(Storage::Cuda))
            }
        }
    }

    /// dropout(d).
    fn dropped(&self, d: &Tensor, dropout: Dropout) -> Result<Storage> {
        let (problem, locked) = (&self.problem, d.storage_and_layout());
        match d.device() {
            Device::Cpu => {
                let d = op::on_cpu(problem, &locked)?;
                Ok(Storage::Cpu(cpu::dropped(problem, d, dropout)?))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let d = op::on_cuda(problem, &locked)?;
                Ok(Storage::Cuda(cuda::dropped(problem, d, dropout)?))
            }
            device => op::no_kernel(problem, device),
        }
    }
}

/// What Params and Join hold, and get as gradients: a zero.
fn zero_on_cpu(problem: &Problem) -> Result<(CpuStorage, Shape)> {
    let zero = dispatch!("CPU", problem, T => T::to_cpu_storage_owned(vec![T::zero()]));
    Ok((zero, 1.into()))
}

fn zero_on_cuda(problem: &Problem, like: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let zero = like.device().zeros_impl(&1.into(), problem.dtype)?;
    Ok((zero, 1.into()))
}

/// weight and bias.
struct Params(Arc<Pass>);

impl CustomOp2 for Params {
    fn name(&self) -> &'static str {
        self.0.problem.op_name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        zero_on_cpu(&self.0.problem)
    }

    fn cuda_fwd(
        &self,
        weight: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        zero_on_cuda(&self.0.problem, weight)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let arrived = self.0.take();
        Ok((arrived.dweight, arrived.dbias))
    }
}

/// x, residual, and weight, bias, or both as [`Params`].
struct Join(Arc<Pass>);

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        self.0.problem.op_name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        zero_on_cpu(&self.0.problem)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        zero_on_cuda(&self.0.problem, x)
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients = self.0.backward()?;
        Ok((
            gradients.dx.filter(|_| x.track_op()),
            gradients.dresidual.filter(|_| residual.track_op()),
        ))
    }
}

impl CustomOp3 for Join {
    fn name(&self) -> &'static str {
        self.0.problem.op_name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        zero_on_cpu(&self.0.problem)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        zero_on_cuda(&self.0.problem, x)
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        params: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradients = self.0.backward()?;
        let dparams = match (gradients.dweight, gradients.dbias) {
            (Some(dweight), Some(dbias)) => {
                self.0.arrive(|arrived| {
                    (arrived.dweight, arrived.dbias) = (Some(dweight), Some(dbias));
                });
                Some(params.detach())
            }
            (dweight, dbias) => dweight.or(dbias),
        };
        Ok((
            gradients.dx.filter(|_| x.track_op()),
            gradients.dresidual.filter(|_| residual.track_op()),
            dparams,
        ))
    }
}

#[derive(Clone, Copy)]
enum Which {
    Ys,
    Sum,
}

/// One of the outputs.
struct Output {
    which: Which,
    /// Until it is the node's own.
    storage: Mutex<Option<Storage>>,
    pass: Arc<Pass>,
}

impl Output {
    fn storage(&self) -> Result<Storage> {
        match lock(&self.storage).take() {
            Some(storage) => Ok(storage),
            None => bail!(
                "{}: expected an output that is taken once, got a second forward pass",
                self.pass.problem.op_name()
            ),
        }
    }
}

impl CustomOp1 for Output {
    fn name(&self) -> &'static str {
        self.pass.problem.op_name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.storage()? {
            Storage::Cpu(storage) => Ok((storage, self.pass.shape.clone())),
            storage => op::elsewhere(&self.pass.problem, "the CPU", &storage),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.storage()? {
            Storage::Cuda(storage) => Ok((storage, self.pass.shape.clone())),
            storage => op::elsewhere(&self.pass.problem, "CUDA", &storage),
        }
    }

    fn bwd(&self, join: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.pass.arrive(|arrived| {
            let place = match self.which {
                Which::Ys => &mut arrived.dy,
                Which::Sum => &mut arrived.dsum,
            };
            *place = Some(gradient.clone());
        });
        Ok(Some(join.detach()))
    }
}
