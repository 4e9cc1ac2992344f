//! The CUDA backend: from candle's storages to planned launches and back.
//!
//! Everything runs on the device's stream and nothing waits for it. Outputs and workspaces come from the stream's own
//! allocator, uninitialised, and every kernel writes all of its outputs.

mod launch;
mod ptx;

use crate::bench::Candidates;
use crate::op::{self, BackwardArgs, Forward, Gradients};
use crate::plan::{self, Access, DeviceFacts, Regime};
use crate::problem::{Problem, Wanted, dispatch};
use crate::tuning::{self, Direction, Gpu};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Storage, Tensor, bail};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaView, DevicePtr, DeviceRepr, ValidAsZeroBits, sys,
};
use half::{bf16, f16};
use launch::Arguments;
use std::collections::btree_map::{BTreeMap, Entry};
use std::sync::{Arc, Mutex, PoisonError};

type Operand<'a> = op::Operand<'a, CudaStorage>;

/// A type that tensors hold on the device.
trait Element: CudaDType + DeviceRepr + ValidAsZeroBits {
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
) -> Result<Forward<CudaStorage>> {
    dispatch!("CUDA", problem, T, P => forward_typed::<T, P>(problem, x, weight, bias, keep))
}

pub(crate) fn backward(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    wanted: Wanted,
) -> Result<Gradients<CudaStorage>> {
    dispatch!("CUDA", problem, T, P => backward_typed::<T, P>(problem, args, wanted))
}

/// The elements of a dense operand.
fn view<'a, T: Element>(
    problem: &Problem,
    (storage, layout): Operand<'a>,
) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!(
            "{}: expected a contiguous operand, got strides {:?} for shape {:?}",
            problem.op_name(),
            layout.stride(),
            layout.dims()
        ),
    }
}

/// A device's name and facts, for which the driver is asked once.
fn gpu(op: &'static str, device: &CudaDevice) -> Result<Arc<Gpu>> {
    /// By ordinal.
    static GPUS: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());
    let stream = device.cuda_stream();
    let context = stream.context();
    // No panic leaves an entry half written.
    let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
    match gpus.entry(context.ordinal()) {
        Entry::Occupied(entry) => Ok(entry.get().clone()),
        Entry::Vacant(entry) => {
            let gpu = Gpu {
                name: context.name().w()?,
                facts: ask_for_facts(op, context)?,
            };
            Ok(entry.insert(Arc::new(gpu)).clone())
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

/// How the kernels read these tensors. Outputs start on 16 bytes: the allocator aligns to 256.
fn access<T: Element, P: Element>(
    problem: &Problem,
    device: &CudaDevice,
    xs: &[&CudaView<'_, T>],
    params: &[Option<&CudaView<'_, P>>],
) -> Access {
    let stream = device.cuda_stream();
    let starts = xs.iter().all(|x| x.device_ptr(&stream).0 % 16 == 0);
    let mut params = params.iter().flatten();
    let params_start = params.all(|p| p.device_ptr(&stream).0 % 16 == 0);
    Access::of(problem, starts, params_start)
}

/// What a call over these tensors may choose from: x, or x and dy; weight and bias.
pub(crate) fn candidates(
    problem: &Problem,
    dir: Direction,
    xs: &[&Tensor],
    params: &[&Tensor],
) -> Result<Candidates> {
    let gpu = gpu(problem.op_name(), xs[0].device().as_cuda_device()?)?;
    let access = dispatch!("CUDA", problem, T, P => access_of::<T, P>(problem, xs, params))?;
    let candidates = match dir {
        Direction::Forward => plan::forward_candidates,
        Direction::Backward => plan::backward_candidates,
    };
    Ok(Candidates {
        access,
        choices: candidates(problem, access, &gpu.facts)?,
    })
}

/// As [`access`].
fn access_of<T: Element, P: Element>(
    problem: &Problem,
    xs: &[&Tensor],
    params: &[&Tensor],
) -> Result<Access> {
    fn starts<E: Element>(problem: &Problem, tensor: &Tensor) -> Result<bool> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!(
                "{}: candidates: expected tensors on CUDA, got one on {:?}",
                problem.op_name(),
                tensor.device().location()
            )
        };
        let view = view::<E>(problem, (storage, layout))?;
        Ok(view.device_ptr(&storage.device.cuda_stream()).0 % 16 == 0)
    }
    let (mut xs_start, mut params_start) = (true, true);
    for x in xs {
        xs_start &= starts::<T>(problem, x)?;
    }
    for param in params {
        params_start &= starts::<P>(problem, param)?;
    }
    Ok(Access::of(problem, xs_start, params_start))
}

/// As a tuning file has them.
pub(crate) fn name_and_multiprocessors(device: &CudaDevice) -> Result<(String, usize)> {
    let gpu = gpu("tuning", device)?;
    Ok((gpu.name.clone(), gpu.facts.multiprocessors))
}

/// Where the blocks of each row meet, if they are in groups of the grid: zeros, pairs.
fn meetings<A: Acc>(
    problem: &Problem,
    device: &CudaDevice,
    regime: Regime,
    blocks: usize,
) -> Result<Option<CudaSlice<A>>> {
    match plan::meetings(problem, regime, blocks) {
        0 => Ok(None),
        pairs => Ok(Some(device.alloc_zeros(2 * pairs)?)),
    }
}

/// Uninitialised memory.
fn alloc<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: the caller launches a kernel that writes all of it before anything reads it on the same stream.
    unsafe { device.alloc(len) }
}

fn forward_typed<T: Element, P: Element>(
    problem: &Problem,
    x: Operand<'_>,
    weight: Option<Operand<'_>>,
    bias: Option<Operand<'_>>,
    keep: bool,
) -> Result<Forward<CudaStorage>> {
    let device = &x.0.device;
    let stream = device.cuda_stream();
    let (rows, cols) = (problem.rows, problem.cols);
    let x = view::<T>(problem, x)?;
    let weight = weight.map(|w| view::<P>(problem, w)).transpose()?;
    let bias = bias.map(|b| view::<P>(problem, b)).transpose()?;
    let wrap = |y: CudaSlice<T>, statistics: Option<CudaSlice<T::Acc>>| Forward {
        ys: CudaStorage::wrap_cuda_slice(y, device.clone()),
        statistics: statistics.map(|s| CudaStorage::wrap_cuda_slice(s, device.clone())),
    };
    let means = if problem.remove_mean { rows } else { 0 };
    if problem.is_empty() {
        let statistics = keep
            .then(|| device.alloc_zeros::<T::Acc>(means + rows))
            .transpose()?;
        return Ok(wrap(device.alloc_zeros(0)?, statistics));
    }
    let mut statistics = keep
        .then(|| alloc::<T::Acc>(device, means + rows))
        .transpose()?;
    let (mut mean, mut rstd) = match &mut statistics {
        Some(both) => {
            let (mean, rstd) = both.split_at_mut(means);
            (Some(mean), Some(rstd))
        }
        None => (None, None),
    };

    let gpu = gpu(problem.op_name(), device)?;
    let access = access(problem, device, &[&x], &[weight.as_ref(), bias.as_ref()]);
    let plan = tuning::plan(Direction::Forward, plan::forward, problem, access, &gpu)?;
    let mut y = alloc::<T>(device, rows * cols)?;
    match plan.launches.as_slice() {
        [launch] => {
            let mut meetings = meetings::<T::Acc>(problem, device, plan.regime, plan.blocks)?;
            let mut args = Arguments::new(&stream);
            args.output(Some(&mut y));
            args.output(mean.as_mut());
            args.output(rstd.as_mut());
            args.input(Some(&x));
            args.input(weight.as_ref());
            args.input(bias.as_ref());
            args.i64(rows);
            args.i32(cols);
            args.acc::<T::Acc>(problem.eps);
            args.bool(problem.remove_mean);
            args.output(meetings.as_mut());
            args.i32(plan.blocks);
            // SAFETY: FORWARD_ARGUMENTS of forward.cu, then `meetings` and `group_blocks`, which only the kernels of
            // forward_ring.cu read. y is [rows, cols], mean and rstd are [rows], weight and bias [cols], as Problem checked.
            unsafe { args.launch(problem, device, gpu.facts.base, launch)? };
        }
        [moments, normalize] => {
            let mut part = alloc::<T::Acc>(device, rows * plan.blocks * 2)?;
            let mut args = Arguments::new(&stream);
            args.output(Some(&mut part));
            args.input(Some(&x));
            args.i64(rows);
            args.i32(cols);
            args.bool(problem.remove_mean);
            // SAFETY: split_moments(part [rows, blocks] of pairs, x [rows, cols], rows, cols, remove_mean).
            unsafe { args.launch(problem, device, gpu.facts.base, moments)? };
            let part = part.slice(..);
            let mut args = Arguments::new(&stream);
            args.output(Some(&mut y));
            args.output(mean.as_mut());
            args.output(rstd.as_mut());
            args.input(Some(&part));
            args.input(Some(&x));
            args.input(weight.as_ref());
            args.input(bias.as_ref());
            args.i64(rows);
            args.i32(cols);
            args.acc::<T::Acc>(problem.eps);
            // SAFETY: split_normalize(y, mean, rstd, part, x, weight, bias, rows, cols, eps), of the shapes above.
            unsafe { args.launch(problem, device, gpu.facts.base, normalize)? };
        }
        _ => bail!(
            "{}: expected a plan of one or two launches, got {plan:?}",
            problem.op_name()
        ),
    }
    Ok(wrap(y, statistics))
}

fn gradients<T: Element, P: Element>(
    device: &CudaDevice,
    dx: Option<CudaSlice<T>>,
    dweight: Option<CudaSlice<P>>,
    dbias: Option<CudaSlice<P>>,
) -> Gradients<CudaStorage> {
    let param = |s| CudaStorage::wrap_cuda_slice(s, device.clone());
    Gradients {
        dx: dx.map(|s| CudaStorage::wrap_cuda_slice(s, device.clone())),
        dweight: dweight.map(param),
        dbias: dbias.map(param),
    }
}

fn backward_typed<T: Element, P: Element>(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    wanted: Wanted,
) -> Result<Gradients<CudaStorage>> {
    let device = &args.x.0.device;
    let x = view::<T>(problem, args.x)?;
    let dy = view::<T>(problem, args.dy)?;
    let rstd = view::<T::Acc>(problem, args.rstd)?;
    let weight = args.weight.map(|w| view::<P>(problem, w)).transpose()?;
    let mean = args.mean.map(|m| view::<T::Acc>(problem, m)).transpose()?;

    let stream = device.cuda_stream();
    let (rows, cols) = (problem.rows, problem.cols);
    if problem.is_empty() {
        let zeros = |wanted: bool| wanted.then(|| device.alloc_zeros::<P>(cols)).transpose();
        let dx = wanted.dx.then(|| device.alloc_zeros::<T>(0)).transpose()?;
        return Ok(gradients(
            device,
            dx,
            zeros(wanted.dweight)?,
            zeros(wanted.dbias)?,
        ));
    }

    let gpu = gpu(problem.op_name(), device)?;
    let access = access(problem, device, &[&x, &dy], &[weight.as_ref()]);
    let plan = tuning::plan(Direction::Backward, plan::backward, problem, access, &gpu)?;
    let mut dx = wanted
        .dx
        .then(|| alloc::<T>(device, rows * cols))
        .transpose()?;
    // All rows are one group: its sums are what is wanted.
    let direct = plan.regime == Regime::Split && plan.parts == 1;
    let partial = |wanted: bool| {
        (wanted && !direct)
            .then(|| alloc::<T::Acc>(device, plan.parts * cols))
            .transpose()
    };
    let param = |wanted: bool| wanted.then(|| alloc::<P>(device, cols)).transpose();
    let mut dweight_part = partial(wanted.dweight)?;
    let mut dbias_part = partial(wanted.dbias)?;
    let mut dweight = param(wanted.dweight && direct)?;
    let mut dbias = param(wanted.dbias && direct)?;
    match plan.launches.as_slice() {
        [launch] => {
            let mut meetings = meetings::<T::Acc>(problem, device, plan.regime, plan.blocks)?;
            let mut args = Arguments::new(&stream);
            args.output(dx.as_mut());
            args.output(dweight_part.as_mut());
            args.output(dbias_part.as_mut());
            args.input(Some(&x));
            args.input(Some(&dy));
            args.input(weight.as_ref());
            args.input(mean.as_ref());
            args.input(Some(&rstd));
            args.i64(rows);
            args.i32(cols);
            args.bool(problem.remove_mean);
            args.output(meetings.as_mut());
            args.i32(plan.blocks);
            args.i32(plan.teams);
            // SAFETY: BACKWARD_ARGUMENTS of backward.cu, then `meetings`, `group_blocks` and `teams`, which only the kernels of
            // backward_ring.cu read. dx is [rows, cols], the parts are [plan.parts, cols]; x, dy, weight, mean and rstd have the
            // shapes of the forward pass.
            unsafe { args.launch(problem, device, gpu.facts.base, launch)? };
        }
        [sums, write_dx] => {
            let mut part = alloc::<T::Acc>(device, rows * plan.blocks * 2)?;
            let mut args = Arguments::new(&stream);
            args.output(dweight.as_mut());
            args.output(dbias.as_mut());
            args.output(dweight_part.as_mut());
            args.output(dbias_part.as_mut());
            args.output(Some(&mut part));
            args.input(Some(&x));
            args.input(Some(&dy));
            args.input(weight.as_ref());
            args.input(mean.as_ref());
            args.input(Some(&rstd));
            args.i64(rows);
            args.i32(cols);
            // SAFETY: split_sums(dweight, dbias [cols], dweight_part, dbias_part [row groups, cols], part [rows, blocks] of
            // pairs, x, dy, weight, mean, rstd, rows, cols); plan.parts is the number of row groups.
            unsafe { args.launch(problem, device, gpu.facts.base, sums)? };
            if dx.is_some() {
                let part = part.slice(..);
                let mut args = Arguments::new(&stream);
                args.output(dx.as_mut());
                args.input(Some(&part));
                args.input(Some(&x));
                args.input(Some(&dy));
                args.input(weight.as_ref());
                args.input(mean.as_ref());
                args.input(Some(&rstd));
                args.i64(rows);
                args.i32(cols);
                args.bool(problem.remove_mean);
                // SAFETY: split_gradients(dx, part, x, dy, weight, mean, rstd, rows, cols, remove_mean), of the shapes above.
                unsafe { args.launch(problem, device, gpu.facts.base, write_dx)? };
            }
        }
        _ => bail!(
            "{}: expected a plan of one or two launches, got {plan:?}",
            problem.op_name()
        ),
    }

    if direct {
        return Ok(gradients(device, dx, dweight, dbias));
    }
    // One part in the parameters' own dtype is what is wanted.
    if plan.parts == 1 && problem.param_dtype == problem.stats_dtype() {
        return Ok(gradients(device, dx, dweight_part, dbias_part));
    }
    (dweight, dbias) = (param(wanted.dweight)?, param(wanted.dbias)?);
    if wanted.dweight || wanted.dbias {
        let dweight_part = dweight_part.as_ref().map(|p| p.slice(..));
        let dbias_part = dbias_part.as_ref().map(|p| p.slice(..));
        let mut args = Arguments::new(&stream);
        args.output(dweight.as_mut());
        args.output(dbias.as_mut());
        args.input(dweight_part.as_ref());
        args.input(dbias_part.as_ref());
        args.i32(plan.parts);
        args.i32(cols);
        // SAFETY: finalize(dweight [cols], dbias [cols], dweight_part, dbias_part [parts, cols], parts, cols).
        unsafe { args.launch(problem, device, gpu.facts.base, &plan.finalize)? };
    }
    Ok(gradients(device, dx, dweight, dbias))
}
