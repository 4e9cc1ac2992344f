//! The CUDA backend: from candle's storages to planned launches and back.
//!
//! Everything runs on the device's stream and nothing waits for it. Outputs come from the stream's own allocator, statistics
//! and workspaces from `memory`, uninitialised, and every kernel writes all of its outputs; where blocks meet, see `meetings`.

mod launch;
mod meetings;
mod memory;
mod ptx;

use crate::add::{AddArgs, AddForward, AddGradients};
use crate::bench::{self, Candidates};
use crate::dropout::Dropout;
use crate::op::{self, BackwardArgs, Forward, Gradients};
use crate::plan::{self, Access, DeviceFacts, Regime};
use crate::problem::{Problem, Wanted, dispatch};
use crate::tuning::{self, Direction, Gpu};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor, bail};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits, sys};
use half::{bf16, f16};
use launch::{Arguments, Input};
use meetings::Meetings;
pub(crate) use memory::Memory;
use std::collections::btree_map::{BTreeMap, Entry};
use std::sync::{Arc, Mutex, PoisonError};

type Operand<'a> = op::Operand<'a, CudaStorage>;

/// A type that tensors hold on the device.
trait Element: CudaDType + DeviceRepr + ValidAsZeroBits + 'static {
    type Acc: Acc;
}

/// A type that sums and statistics have.
trait Acc: Element {
    fn with_bytes(value: f64, f: impl FnOnce(&[u8]));
}

impl Acc for f32 {
    fn with_bytes(value: f64, f: impl FnOnce(&[u8])) {
        f(&(value as f32).to_ne_bytes());
    }
}

impl Acc for f64 {
    fn with_bytes(value: f64, f: impl FnOnce(&[u8])) {
        f(&value.to_ne_bytes());
    }
}

impl Element for f32 {
    type Acc = f32;
}

impl Element for f64 {
    type Acc = f64;
}

impl Element for f16 {
    type Acc = f32;
}

impl Element for bf16 {
    type Acc = f32;
}

pub(crate) fn forward(
    problem: &Problem,
    x: Operand<'_>,
    weight: Option<Operand<'_>>,
    bias: Option<Operand<'_>>,
    keep: bool,
) -> Result<Forward<CudaStorage, Memory>> {
    dispatch!("CUDA", problem, T, P => forward_typed::<T, P>(problem, x, weight, bias, keep))
}

pub(crate) fn backward(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    statistics: &Memory,
    wanted: Wanted,
) -> Result<Gradients<CudaStorage>> {
    dispatch!("CUDA", problem, T, P => backward_typed::<T, P>(problem, args, statistics, wanted))
}

/// A call, and where it runs.
struct Call<'a> {
    problem: &'a Problem,
    device: &'a CudaDevice,
    stream: Arc<CudaStream>,
    gpu: &'static Gpu,
}

impl<'a> Call<'a> {
    fn new(problem: &'a Problem, device: &'a CudaDevice) -> Result<Self> {
        Ok(Self {
            problem,
            device,
            stream: device.cuda_stream(),
            gpu: gpu(problem.op_name(), device)?,
        })
    }

    /// The elements of a dense operand, of which the kernels read `len`.
    fn input<'b, T: Element>(
        &'b self,
        (storage, layout): Operand<'b>,
        len: usize,
    ) -> Result<Input<'b, T>> {
        let slice = storage.as_cuda_slice::<T>()?;
        let view = match layout.contiguous_offsets() {
            // An empty view may start behind its storage's end.
            Some((start, end)) if start == end && len == 0 => slice.slice(..0),
            Some((start, end)) if end - start == len => slice.slice(start..end),
            _ => bail!(
                "{}: expected a contiguous operand of {len} elements, got shape {:?} and strides {:?}",
                self.problem.op_name(),
                layout.dims(),
                layout.stride()
            ),
        };
        Ok(Input::new(view, &self.stream))
    }

    /// x, or another of its shape.
    fn tensor<'b, T: Element>(&'b self, operand: Operand<'b>) -> Result<Input<'b, T>> {
        self.input(operand, self.problem.rows * self.problem.cols)
    }

    /// weight or bias, if there is one.
    fn param<'b, P: Element>(
        &'b self,
        operand: Option<Operand<'b>>,
    ) -> Result<Option<Input<'b, P>>> {
        operand
            .map(|param| self.input(param, self.problem.cols))
            .transpose()
    }

    /// What a kernel of this call has written.
    fn read<'b, T>(&'b self, slice: &'b CudaSlice<T>) -> Input<'b, T> {
        Input::new(slice.slice(..), &self.stream)
    }

    /// As [`read`](Self::read), from element `first` on.
    fn read_memory<'b, A: Acc>(&'b self, memory: &'b Memory, first: usize) -> Input<'b, A> {
        Input::of_memory(memory, first, &self.stream)
    }

    /// Uninitialised memory.
    fn alloc<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: the caller launches a kernel that writes whatever of it is read later on the same stream.
        unsafe { self.device.alloc(len) }
    }

    /// The same, of the call's own.
    fn memory<A: Acc>(&self, len: usize) -> Result<Memory> {
        Memory::take(self.device, len * size_of::<A>())
    }

    /// mean and rstd, in one piece.
    fn statistics<A: Acc>(&self) -> Result<Memory> {
        self.memory::<A>(self.problem.means() + self.problem.rows)
    }

    /// Where the blocks of each row meet, if they are in groups of the grid.
    fn meetings<A: Acc>(&self, len: usize) -> Result<Option<Meetings>> {
        (len > 0)
            .then(|| Meetings::take(self.device, len * size_of::<A>()))
            .transpose()
    }

    /// How the kernels read these tensors. Outputs start on 16 bytes: the allocator aligns to 256.
    fn access<'b, T: 'b, P: 'b>(
        &self,
        xs: impl IntoIterator<Item = &'b Input<'b, T>>,
        params: impl IntoIterator<Item = &'b Input<'b, P>>,
    ) -> Access {
        Access::of(
            self.problem,
            xs.into_iter().all(Input::starts_on_16),
            params.into_iter().all(Input::starts_on_16),
        )
    }

    fn forward_plan(&self, access: Access) -> Result<plan::Forward> {
        let dir = Direction::Forward;
        tuning::plan(dir, plan::forward, self.problem, access, self.gpu)
    }

    fn backward_plan(&self, access: Access) -> Result<plan::Backward> {
        let dir = Direction::Backward;
        tuning::plan(dir, plan::backward, self.problem, access, self.gpu)
    }

    fn arguments(&self) -> Arguments<'_> {
        Arguments::new(&self.stream)
    }

    /// # Safety
    /// As of [`Arguments::launch`].
    unsafe fn launch(&self, args: Arguments<'_>, launch: &plan::Launch) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { args.launch(self.problem, self.device, &self.gpu.facts, launch) }
    }

    fn wrap<E: Element>(&self, slice: CudaSlice<E>) -> CudaStorage {
        CudaStorage::wrap_cuda_slice(slice, self.device.clone())
    }
}

/// A device's name and facts, for which the driver is asked once.
fn gpu(op: &'static str, device: &CudaDevice) -> Result<&'static Gpu> {
    /// By ordinal. Kept as long as the process.
    static GPUS: Mutex<BTreeMap<usize, &Gpu>> = Mutex::new(BTreeMap::new());
    let stream = device.cuda_stream();
    let context = stream.context();
    // No panic leaves an entry half written.
    let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
    match gpus.entry(context.ordinal()) {
        Entry::Occupied(entry) => Ok(entry.get()),
        Entry::Vacant(entry) => {
            let gpu = Gpu {
                name: context.name().w()?,
                facts: ask_for_facts(op, context)?,
            };
            Ok(entry.insert(Box::leak(Box::new(gpu))))
        }
    }
}

fn ask_for_facts(op: &'static str, context: &CudaContext) -> Result<DeviceFacts> {
    use sys::CUdevice_attribute as A;
    let get = |attribute| context.attribute(attribute).w();
    let capability = (
        get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let base = ptx::base(op, capability)?;
    Ok(DeviceFacts {
        multiprocessors: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_per_block: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        shared_per_multiprocessor: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
            as usize,
        l2: get(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        max_cluster: match (base, capability.0) {
            (..90, _) => 1,
            // Of 16 blocks: data-center parts only.
            (_, 9 | 10) => 16,
            _ => 8,
        },
        cooperative: get(A::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
        base,
    })
}

/// What a call over these tensors may choose from: x, or x and dy; weight and bias.
pub(crate) fn candidates(
    problem: &Problem,
    dir: Direction,
    xs: &[&Tensor],
    params: &[&Tensor],
) -> Result<Candidates> {
    let call = Call::new(problem, xs[0].device().as_cuda_device()?)?;
    let access = dispatch!("CUDA", problem, T, P => access_of::<T, P>(&call, xs, params))?;
    let candidates = match dir {
        Direction::Forward => plan::forward_candidates,
        Direction::Backward => plan::backward_candidates,
    };
    Ok(Candidates {
        access,
        choices: candidates(problem, access, &call.gpu.facts)?,
    })
}

/// As [`Call::access`].
fn access_of<T: Element, P: Element>(
    call: &Call<'_>,
    xs: &[&Tensor],
    params: &[&Tensor],
) -> Result<Access> {
    let Problem { rows, cols, .. } = *call.problem;
    let xs_start = start_on_16::<T>(call, xs, rows * cols)?;
    let params_start = start_on_16::<P>(call, params, cols)?;
    Ok(Access::of(call.problem, xs_start, params_start))
}

fn start_on_16<T: Element>(call: &Call<'_>, tensors: &[&Tensor], len: usize) -> Result<bool> {
    for tensor in tensors {
        let locked = tensor.storage_and_layout();
        let input = call.input::<T>(op::on_cuda(call.problem, &locked)?, len)?;
        if !input.starts_on_16() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// As a tuning file has them.
pub(crate) fn name_and_multiprocessors(device: &CudaDevice) -> Result<(String, usize)> {
    let gpu = gpu("tuning", device)?;
    Ok((gpu.name.clone(), gpu.facts.multiprocessors))
}

/// As [`ptx::kernels`].
pub(crate) fn kernels(device: &CudaDevice, dtypes: (DType, DType)) -> Result<Vec<(String, bool)>> {
    let base = gpu("kernels", device)?.facts.base;
    Ok(ptx::kernels(device, base, dtypes))
}

/// A residual, and where its sum with x goes.
struct Addend<'a, T> {
    residual: &'a Input<'a, T>,
    sum: &'a mut CudaSlice<T>,
    dropout: Option<Dropout>,
}

/// DROPOUT_ARGUMENTS of add.cuh.
fn dropout_arguments<A: Acc>(args: &mut Arguments<'_>, dropout: Option<Dropout>) {
    args.u64(dropout.map_or(0, |d| d.seed));
    args.u32(dropout.map_or(0, |d| d.threshold()));
    args.acc::<A>(dropout.map_or(1., |d| d.scale()));
}

fn forward_typed<T: Element, P: Element>(
    problem: &Problem,
    x: Operand<'_>,
    weight: Option<Operand<'_>>,
    bias: Option<Operand<'_>>,
    keep: bool,
) -> Result<Forward<CudaStorage, Memory>> {
    let call = Call::new(problem, &x.0.device)?;
    let x = call.tensor::<T>(x)?;
    let weight = call.param::<P>(weight)?;
    let bias = call.param::<P>(bias)?;
    let params = [weight.as_ref(), bias.as_ref()];
    let out = planned_forward(&call, &x, params, keep)?;
    Ok(Forward {
        ys: call.wrap(out.y),
        statistics: out.statistics,
    })
}

pub(crate) fn add_forward(
    problem: &Problem,
    args: &AddArgs<Operand<'_>>,
    dropout: Option<Dropout>,
    keep: bool,
) -> Result<AddForward<CudaStorage, Memory>> {
    dispatch!("CUDA", problem, T, P => add_forward_typed::<T, P>(problem, args, dropout, keep))
}

fn add_forward_typed<T: Element, P: Element>(
    problem: &Problem,
    args: &AddArgs<Operand<'_>>,
    dropout: Option<Dropout>,
    keep: bool,
) -> Result<AddForward<CudaStorage, Memory>> {
    let call = Call::new(problem, &args.x.0.device)?;
    let x = call.tensor::<T>(args.x)?;
    let residual = call.tensor::<T>(args.residual)?;
    let weight = call.param::<P>(args.weight)?;
    let bias = call.param::<P>(args.bias)?;
    let params = [weight.as_ref(), bias.as_ref()];
    let mut sum = call.alloc::<T>(problem.rows * problem.cols)?;
    let access = call.access([&x, &residual], params.into_iter().flatten());
    let plan = match problem.is_empty() {
        true => None,
        false => plan::forward_add(problem, access, &call.gpu.facts)?,
    };
    let out = match plan {
        Some(plan) => {
            let mut out = Normalized::alloc(&call, keep)?;
            let addend = Addend {
                residual: &residual,
                sum: &mut sum,
                dropout,
            };
            normalize(&call, &plan, &mut out, &x, params, Some(addend))?;
            out
        }
        None => {
            add(&call, &mut sum, &x, &residual, dropout)?;
            planned_forward(&call, &call.read(&sum), params, keep)?
        }
    };
    Ok(AddForward {
        ys: call.wrap(out.y),
        sum: call.wrap(sum),
        statistics: out.statistics,
    })
}

/// y, and mean and rstd if they are to be kept.
struct Normalized<T: Element> {
    y: CudaSlice<T>,
    statistics: Option<Memory>,
}

impl<T: Element> Normalized<T> {
    /// Uninitialised.
    fn alloc(call: &Call<'_>, keep: bool) -> Result<Self> {
        let Problem { rows, cols, .. } = *call.problem;
        Ok(Self {
            statistics: keep.then(|| call.statistics::<T::Acc>()).transpose()?,
            y: call.alloc(rows * cols)?,
        })
    }
}

fn planned_forward<T: Element, P: Element>(
    call: &Call<'_>,
    x: &Input<'_, T>,
    params: [Option<&Input<'_, P>>; 2],
    keep: bool,
) -> Result<Normalized<T>> {
    if call.problem.is_empty() {
        // Of which a backward pass reads nothing either.
        return Normalized::alloc(call, keep);
    }
    let access = call.access([x], params.into_iter().flatten());
    let plan = call.forward_plan(access)?;
    let mut out = Normalized::alloc(call, keep)?;
    normalize(call, &plan, &mut out, x, params, None)?;
    Ok(out)
}

/// Runs a plan: of x, or of its sum with the `addend`, for which the plan is.
fn normalize<T: Element, P: Element>(
    call: &Call<'_>,
    plan: &plan::Forward,
    Normalized { y, statistics }: &mut Normalized<T>,
    x: &Input<'_, T>,
    [weight, bias]: [Option<&Input<'_, P>>; 2],
    addend: Option<Addend<'_, T>>,
) -> Result<()> {
    let problem = call.problem;
    let (rows, cols) = (problem.rows, problem.cols);
    match plan.launches.as_slice() {
        [launch] => {
            let len = plan::meetings(problem, plan.regime, plan.blocks, plan::FORWARD_MESSAGE);
            let mut meetings = call.meetings::<T::Acc>(len)?;
            let mut args = call.arguments();
            args.output(Some(&mut *y));
            args.statistics::<T::Acc>(statistics.as_mut(), problem.means());
            args.input(Some(x));
            args.input(weight);
            args.input(bias);
            args.i64(rows);
            args.i32(cols);
            args.acc::<T::Acc>(problem.eps);
            args.bool(problem.remove_mean);
            args.acc::<T::Acc>(problem.weight_offset());
            if let Some(addend) = addend {
                args.output(Some(addend.sum));
                args.input(Some(addend.residual));
                dropout_arguments::<T::Acc>(&mut args, addend.dropout);
            }
            args.output(meetings.as_mut().and_then(Meetings::zeros));
            args.i32(plan.blocks);
            // SAFETY: FORWARD_ARGUMENTS of row.cuh, those with LN_ADD if there is something to be added, then `meetings` and
            // `group_blocks`, which only the kernels of forward_ring.cu read. x, y, sum and residual are [rows, cols], mean and rstd
            // are [rows], weight and bias [cols], as Problem checked.
            unsafe { call.launch(args, launch)? };
        }
        [moments, normalize] => {
            let mut part = call.memory::<T::Acc>(rows * plan.blocks * 2)?;
            let mut args = call.arguments();
            args.memory(Some(&mut part));
            args.input(Some(x));
            args.i64(rows);
            args.i32(cols);
            args.bool(problem.remove_mean);
            // SAFETY: split_moments(part [rows, blocks] of pairs, x [rows, cols], rows, cols, remove_mean).
            unsafe { call.launch(args, moments)? };
            let part = call.read_memory::<T::Acc>(&part, 0);
            let mut args = call.arguments();
            args.output(Some(&mut *y));
            args.statistics::<T::Acc>(statistics.as_mut(), problem.means());
            args.input(Some(&part));
            args.input(Some(x));
            args.input(weight);
            args.input(bias);
            args.i64(rows);
            args.i32(cols);
            args.acc::<T::Acc>(problem.eps);
            args.bool(problem.remove_mean);
            args.acc::<T::Acc>(problem.weight_offset());
            // SAFETY: split_normalize(y, mean, rstd, part, x, weight, bias, rows, cols, eps, remove_mean, weight_offset), of the shapes above.
            unsafe { call.launch(args, normalize)? };
        }
        _ => bail!(
            "{}: expected a plan of one or two launches, got {plan:?}",
            problem.op_name()
        ),
    }
    Ok(())
}

/// sum = residual + dropout(x), in a launch of its own.
fn add<T: Element>(
    call: &Call<'_>,
    sum: &mut CudaSlice<T>,
    x: &Input<'_, T>,
    residual: &Input<'_, T>,
    dropout: Option<Dropout>,
) -> Result<()> {
    let problem = call.problem;
    if problem.is_empty() {
        return Ok(());
    }
    let launch = plan::add(problem, &call.gpu.facts, "add_forward")?;
    let starts = x.starts_on_16() && residual.starts_on_16();
    let mut args = call.arguments();
    args.output(Some(sum));
    args.input(Some(x));
    args.input(Some(residual));
    elements(&mut args, problem, starts);
    dropout_arguments::<T::Acc>(&mut args, dropout);
    // SAFETY: add_forward(sum, x, residual, n, vectors, seed, threshold, scale); all are of n elements.
    unsafe { call.launch(args, &launch) }
}

/// n and vectors, as the kernels of add.cu take them.
fn elements(args: &mut Arguments<'_>, problem: &Problem, starts_on_16: bool) {
    let n = problem.rows * problem.cols;
    args.i64(n);
    args.i64(match starts_on_16 {
        true => n / (16 / problem.dtype.size_in_bytes()),
        false => 0,
    });
}

fn backward_typed<T: Element, P: Element>(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    statistics: &Memory,
    wanted: Wanted,
) -> Result<Gradients<CudaStorage>> {
    let call = Call::new(problem, &args.x.0.device)?;
    let inputs = BackwardInputs::<T, P>::new(&call, args, statistics)?;
    let slices = planned_backward(&call, &inputs, wanted)?;
    Ok(Gradients {
        dx: slices.dx.map(|s| call.wrap(s)),
        dweight: slices.dweight.map(|s| call.wrap(s)),
        dbias: slices.dbias.map(|s| call.wrap(s)),
    })
}

/// `args.x` is the sum.
pub(crate) fn add_backward(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    statistics: &Memory,
    dsum: Option<Operand<'_>>,
    dropout: Option<Dropout>,
    wanted: Wanted,
) -> Result<AddGradients<CudaStorage>> {
    dispatch!("CUDA", problem, T, P => {
        add_backward_typed::<T, P>(problem, args, statistics, dsum, dropout, wanted)
    })
}

fn add_backward_typed<T: Element, P: Element>(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    statistics: &Memory,
    dsum: Option<Operand<'_>>,
    dropout: Option<Dropout>,
    wanted: Wanted,
) -> Result<AddGradients<CudaStorage>> {
    let call = Call::new(problem, &args.x.0.device)?;
    let inputs = BackwardInputs::<T, P>::new(&call, args, statistics)?;
    let dsum = dsum.map(|d| call.tensor::<T>(d)).transpose()?;
    let mut dresidual = (wanted.dx && dropout.is_some())
        .then(|| call.alloc::<T>(problem.rows * problem.cols))
        .transpose()?;
    let arriving = Arriving {
        dsum: dsum.as_ref(),
        dresidual: dresidual.as_mut(),
        dropout,
    };
    let xs = [&inputs.x, &inputs.dy].into_iter().chain(&dsum);
    let access = call.access(xs, &inputs.weight);
    let plan = match problem.is_empty() || !wanted.dx {
        true => None,
        false => plan::backward_add(problem, access, &call.gpu.facts)?,
    };
    let slices = match plan {
        Some(plan) => {
            let mut out = GradientSlices::alloc(&call, &plan, wanted)?;
            gradients(&call, &plan, &mut out, &inputs, Some(arriving))?;
            out
        }
        None => {
            let mut slices = planned_backward(&call, &inputs, wanted)?;
            if let Some(dx) = &mut slices.dx
                && (dsum.is_some() || dropout.is_some())
            {
                add_gradient(&call, dx, true, arriving)?;
            }
            slices
        }
    };
    Ok(AddGradients {
        dx: slices.dx.map(|s| call.wrap(s)),
        dresidual: dresidual.map(|s| call.wrap(s)),
        dweight: slices.dweight.map(|s| call.wrap(s)),
        dbias: slices.dbias.map(|s| call.wrap(s)),
    })
}

/// dropout(d).
pub(crate) fn dropped(problem: &Problem, d: Operand<'_>, dropout: Dropout) -> Result<CudaStorage> {
    dispatch!("CUDA", problem, T => dropped_typed::<T>(problem, d, dropout))
}

fn dropped_typed<T: Element>(
    problem: &Problem,
    d: Operand<'_>,
    dropout: Dropout,
) -> Result<CudaStorage> {
    let call = Call::new(problem, &d.0.device)?;
    let d = call.tensor::<T>(d)?;
    let mut dx = call.alloc::<T>(problem.rows * problem.cols)?;
    let arriving = Arriving {
        dsum: Some(&d),
        dresidual: None,
        dropout: Some(dropout),
    };
    add_gradient(&call, &mut dx, false, arriving)?;
    Ok(call.wrap(dx))
}

/// The gradient that arrives at the sum, and where that of the residual goes if it is not the one of x.
struct Arriving<'a, T> {
    dsum: Option<&'a Input<'a, T>>,
    dresidual: Option<&'a mut CudaSlice<T>>,
    dropout: Option<Dropout>,
}

/// With `norm`, what dx holds is the norm's share of the sum's gradient. Writes dx and dresidual.
fn add_gradient<T: Element>(
    call: &Call<'_>,
    dx: &mut CudaSlice<T>,
    norm: bool,
    arriving: Arriving<'_, T>,
) -> Result<()> {
    let problem = call.problem;
    if problem.is_empty() {
        return Ok(());
    }
    let launch = plan::add(problem, &call.gpu.facts, "add_backward")?;
    let starts = arriving.dsum.is_none_or(Input::starts_on_16);
    let mut args = call.arguments();
    args.output(Some(dx));
    args.output(arriving.dresidual);
    args.input(arriving.dsum);
    args.bool(norm);
    elements(&mut args, problem, starts);
    dropout_arguments::<T::Acc>(&mut args, arriving.dropout);
    // SAFETY: add_backward(dx, dresidual, dsum, norm, n, vectors, seed, threshold, scale); all are of n elements.
    unsafe { call.launch(args, &launch) }
}

/// What a backward pass reads.
struct BackwardInputs<'a, T: Element, P: Element> {
    x: Input<'a, T>,
    dy: Input<'a, T>,
    weight: Option<Input<'a, P>>,
    mean: Option<Input<'a, T::Acc>>,
    rstd: Input<'a, T::Acc>,
}

impl<'a, T: Element, P: Element> BackwardInputs<'a, T, P> {
    fn new(
        call: &'a Call<'_>,
        args: &BackwardArgs<Operand<'a>>,
        statistics: &'a Memory,
    ) -> Result<Self> {
        let Problem { remove_mean, .. } = *call.problem;
        Ok(Self {
            x: call.tensor(args.x)?,
            dy: call.tensor(args.dy)?,
            weight: call.param(args.weight)?,
            mean: remove_mean.then(|| call.read_memory(statistics, 0)),
            rstd: call.read_memory(statistics, call.problem.means()),
        })
    }
}

/// What it writes, as far as it is wanted, and the sums that partial rows of dweight and dbias leave for `finalize`.
struct GradientSlices<T: Element, P: Element> {
    dx: Option<CudaSlice<T>>,
    dweight: Option<CudaSlice<P>>,
    dbias: Option<CudaSlice<P>>,
    dweight_part: Option<Memory>,
    dbias_part: Option<Memory>,
}

impl<T: Element, P: Element> GradientSlices<T, P> {
    /// Uninitialised.
    fn alloc(call: &Call<'_>, plan: &plan::Backward, wanted: Wanted) -> Result<Self> {
        let problem = call.problem;
        let Problem { rows, cols, .. } = *problem;
        let param = |wanted: bool| wanted.then(|| call.alloc(cols)).transpose();
        let partial = |wanted: bool| {
            (wanted && in_parts(problem, plan))
                .then(|| {
                    call.memory::<T::Acc>(plan.parts * (plan::part_step(problem) + plan.edges))
                })
                .transpose()
        };
        Ok(Self {
            dx: wanted.dx.then(|| call.alloc(rows * cols)).transpose()?,
            dweight: param(wanted.dweight)?,
            dbias: param(wanted.dbias)?,
            dweight_part: partial(wanted.dweight)?,
            dbias_part: partial(wanted.dbias)?,
        })
    }

    /// Of an empty tensor.
    fn zeros(call: &Call<'_>, wanted: Wanted) -> Result<Self> {
        let Call {
            problem, device, ..
        } = *call;
        let param = |wanted: bool| wanted.then(|| device.alloc_zeros(problem.cols)).transpose();
        Ok(Self {
            dx: wanted.dx.then(|| device.alloc_zeros(0)).transpose()?,
            dweight: param(wanted.dweight)?,
            dbias: param(wanted.dbias)?,
            dweight_part: None,
            dbias_part: None,
        })
    }
}

/// Whether dweight and dbias are left in parts: not where the kernel has all rows in one, and writes them in their own dtype.
fn in_parts(problem: &Problem, plan: &plan::Backward) -> bool {
    let rounds = matches!(plan.regime, Regime::Split | Regime::Strips);
    plan.parts > 1 || plan.edges > 0 || !(rounds || problem.param_dtype == problem.stats_dtype())
}

fn planned_backward<T: Element, P: Element>(
    call: &Call<'_>,
    inputs: &BackwardInputs<'_, T, P>,
    wanted: Wanted,
) -> Result<GradientSlices<T, P>> {
    let problem = call.problem;
    if problem.is_empty() {
        return GradientSlices::zeros(call, wanted);
    }
    let access = call.access([&inputs.x, &inputs.dy], &inputs.weight);
    let plan = call.backward_plan(access)?;
    let mut out = GradientSlices::alloc(call, &plan, wanted)?;
    gradients(call, &plan, &mut out, inputs, None)?;
    Ok(out)
}

/// Runs a plan. If it is one for a gradient that is `arriving` at the sum that x is, dx is the gradient of the sum's argument.
fn gradients<T: Element, P: Element>(
    call: &Call<'_>,
    plan: &plan::Backward,
    out: &mut GradientSlices<T, P>,
    inputs: &BackwardInputs<'_, T, P>,
    arriving: Option<Arriving<'_, T>>,
) -> Result<()> {
    let BackwardInputs {
        x,
        dy,
        weight,
        mean,
        rstd,
    } = inputs;
    let GradientSlices {
        dx,
        dweight,
        dbias,
        dweight_part,
        dbias_part,
    } = out;
    let problem = call.problem;
    let in_parts = in_parts(problem, plan);
    let (rows, cols) = (problem.rows, problem.cols);
    match plan.launches.as_slice() {
        [launch] => {
            let len = plan::meetings(problem, plan.regime, plan.blocks, plan::BACKWARD_MESSAGE);
            let mut meetings = call.meetings::<T::Acc>(len)?;
            let mut args = call.arguments();
            args.output(dx.as_mut());
            if in_parts {
                args.memory(dweight_part.as_mut());
                args.memory(dbias_part.as_mut());
            } else {
                args.output(dweight.as_mut());
                args.output(dbias.as_mut());
            }
            args.input(Some(x));
            args.input(Some(dy));
            args.input(weight.as_ref());
            args.input(mean.as_ref());
            args.input(Some(rstd));
            args.i64(rows);
            args.i32(cols);
            args.bool(problem.remove_mean);
            args.acc::<T::Acc>(problem.weight_offset());
            if let Some(arriving) = arriving {
                args.output(arriving.dresidual);
                args.input(arriving.dsum);
                dropout_arguments::<T::Acc>(&mut args, arriving.dropout);
            }
            args.output(meetings.as_mut().and_then(Meetings::zeros));
            args.i32(plan.blocks);
            args.i32(plan.teams);
            // SAFETY: BACKWARD_ARGUMENTS of row.cuh, those with LN_ADD if there is something arriving, then `meetings`, `group_blocks`
            // and `teams`, which only the kernels of backward_ring.cu read. dx, dresidual and dsum are [rows, cols], the parts are
            // [plan.parts, part_step(cols) + plan.edges], of Acc; where they are not in_parts, dweight and dbias are [cols] of P, which backward_strips.cu takes and is
            // Acc elsewhere; x, dy, weight, mean and rstd have the shapes of the forward pass.
            unsafe { call.launch(args, launch)? };
        }
        [sums, write_dx] => {
            let mut part = call.memory::<T::Acc>(rows * plan.blocks * 2)?;
            let mut args = call.arguments();
            args.output(dweight.as_mut().filter(|_| !in_parts));
            args.output(dbias.as_mut().filter(|_| !in_parts));
            args.memory(dweight_part.as_mut());
            args.memory(dbias_part.as_mut());
            args.memory(Some(&mut part));
            args.input(Some(x));
            args.input(Some(dy));
            args.input(weight.as_ref());
            args.input(mean.as_ref());
            args.input(Some(rstd));
            args.i64(rows);
            args.i32(cols);
            args.acc::<T::Acc>(problem.weight_offset());
            // SAFETY: split_sums(dweight, dbias [cols], dweight_part, dbias_part [row groups, part_step(cols)], part [rows, blocks] of
            // pairs, x, dy, weight, mean, rstd, rows, cols, weight_offset); plan.parts is the number of row groups.
            unsafe { call.launch(args, sums)? };
            if dx.is_some() {
                let part = call.read_memory::<T::Acc>(&part, 0);
                let mut args = call.arguments();
                args.output(dx.as_mut());
                args.input(Some(&part));
                args.input(Some(x));
                args.input(Some(dy));
                args.input(weight.as_ref());
                args.input(mean.as_ref());
                args.input(Some(rstd));
                args.i64(rows);
                args.i32(cols);
                args.bool(problem.remove_mean);
                args.acc::<T::Acc>(problem.weight_offset());
                // SAFETY: split_gradients(dx, part, x, dy, weight, mean, rstd, rows, cols, remove_mean, weight_offset), of the shapes
                // above.
                unsafe { call.launch(args, write_dx)? };
            }
        }
        _ => bail!(
            "{}: expected a plan of one or two launches, got {plan:?}",
            problem.op_name()
        ),
    }

    if !in_parts || (dweight.is_none() && dbias.is_none()) {
        return Ok(());
    }
    let [dweight_part, dbias_part] = [&*dweight_part, &*dbias_part]
        .map(|part| part.as_ref().map(|p| call.read_memory::<T::Acc>(p, 0)));
    let mut args = call.arguments();
    args.output(dweight.as_mut());
    args.output(dbias.as_mut());
    args.input(dweight_part.as_ref());
    args.input(dbias_part.as_ref());
    args.i32(plan.parts);
    args.i32(cols);
    args.bool(plan.edges > 0);
    // SAFETY: finalize(dweight [cols], dbias [cols], dweight_part, dbias_part [parts, part_step(cols) + edges], parts, cols, has_edges).
    unsafe { call.launch(args, &plan.finalize) }
}

/// A forward pass over contiguous tensors that runs again and again into the same memory.
pub(crate) fn forward_kernel(
    problem: Problem,
    xs: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<bench::Kernel> {
    dispatch!("CUDA", problem, T, P => forward_kernel_typed::<T, P>(problem, [xs, weight, bias]))
}

fn forward_kernel_typed<T: Element, P: Element>(
    problem: Problem,
    tensors: [&Tensor; 3],
) -> Result<bench::Kernel> {
    let tensors = tensors.map(Tensor::clone);
    let mut out = None;
    Ok(Box::new(move || {
        let locked = tensors.each_ref().map(Tensor::storage_and_layout);
        let call = Call::new(&problem, tensors[0].device().as_cuda_device()?)?;
        let x = call.tensor::<T>(op::on_cuda(&problem, &locked[0])?)?;
        let weight = call.param::<P>(Some(op::on_cuda(&problem, &locked[1])?))?;
        let bias = call.param::<P>(Some(op::on_cuda(&problem, &locked[2])?))?;
        let params = [weight.as_ref(), bias.as_ref()];
        let access = call.access([&x], params.into_iter().flatten());
        let plan = call.forward_plan(access)?;
        let out = match &mut out {
            Some(out) => out,
            none => none.insert(Normalized::alloc(&call, true)?),
        };
        normalize(&call, &plan, out, &x, params, None)
    }))
}

/// A backward pass, for all three gradients, in the same way.
pub(crate) fn backward_kernel(
    problem: Problem,
    xs: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
) -> Result<bench::Kernel> {
    dispatch!("CUDA", problem, T, P => backward_kernel_typed::<T, P>(problem, [xs, weight, dy]))
}

fn backward_kernel_typed<T: Element, P: Element>(
    problem: Problem,
    tensors: [&Tensor; 3],
) -> Result<bench::Kernel> {
    let wanted = Wanted {
        dx: true,
        dweight: true,
        dbias: true,
    };
    let tensors = tensors.map(Tensor::clone);
    let (mut statistics, mut out) = (None, None);
    Ok(Box::new(move || {
        let locked = tensors.each_ref().map(Tensor::storage_and_layout);
        let operand = |index: usize| op::on_cuda(&problem, &locked[index]);
        let args = BackwardArgs {
            x: operand(0)?,
            weight: Some(operand(1)?),
            dy: operand(2)?,
        };
        let call = Call::new(&problem, tensors[0].device().as_cuda_device()?)?;
        let statistics = match &mut statistics {
            Some(statistics) => statistics,
            none => {
                let forward = forward_typed::<T, P>(&problem, args.x, args.weight, None, true)?;
                none.insert(op::kept(&problem, forward.statistics)?)
            }
        };
        let inputs = BackwardInputs::<T, P>::new(&call, &args, statistics)?;
        let access = call.access([&inputs.x, &inputs.dy], &inputs.weight);
        let plan = call.backward_plan(access)?;
        let out = match &mut out {
            Some(out) => out,
            none => none.insert(GradientSlices::alloc(&call, &plan, wanted)?),
        };
        gradients(&call, &plan, out, &inputs, None)
    }))
}
