//! The CUDA backend: from candle's storages to planned launches and back.
//!
//! Everything runs on the device's stream and nothing waits for it. Outputs and workspaces come from the stream's own
//! allocator, uninitialised, and every kernel writes all of its outputs.

mod launch;
mod ptx;

use crate::op::{BackwardArgs, Forward, Gradients};
use crate::plan::{self, DeviceFacts};
use crate::problem::{Problem, Wanted};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DeviceRepr, ValidAsZeroBits, sys};
use half::{bf16, f16};
use launch::Arguments;
use std::ops::Deref;

type Operand<'a> = (&'a CudaStorage, &'a Layout);

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

/// Runs `$body` with `$t` and `$p` bound to the Rust types of xs and of weight and bias.
macro_rules! dispatch {
    ($problem:expr, $t:ident, $p:ident => $body:expr) => {
        match ($problem.dtype, $problem.param_dtype) {
            (DType::F32, DType::F32) => dispatch!(@ $t = f32, $p = f32, $body),
            (DType::F64, DType::F64) => dispatch!(@ $t = f64, $p = f64, $body),
            (DType::F16, DType::F16) => dispatch!(@ $t = f16, $p = f16, $body),
            (DType::F16, DType::F32) => dispatch!(@ $t = f16, $p = f32, $body),
            (DType::BF16, DType::BF16) => dispatch!(@ $t = bf16, $p = bf16, $body),
            (DType::BF16, DType::F32) => dispatch!(@ $t = bf16, $p = f32, $body),
            (x, p) => bail!(
                "{}: xs: no CUDA kernel for dtype {} with weight of {}",
                $problem.op_name(), x.as_str(), p.as_str()
            ),
        }
    };
    (@ $t:ident = $tt:ty, $p:ident = $pt:ty, $body:expr) => {{
        type $t = $tt;
        type $p = $pt;
        $body
    }};
}

pub(crate) fn forward(
    problem: &Problem,
    x: Operand<'_>,
    weight: Option<Operand<'_>>,
    bias: Option<Operand<'_>>,
    keep: bool,
) -> Result<Forward<CudaStorage>> {
    dispatch!(problem, T, P => forward_typed::<T, P>(problem, x, weight, bias, keep))
}

pub(crate) fn backward(
    problem: &Problem,
    args: &BackwardArgs<'_>,
    wanted: Wanted,
) -> Result<Gradients<CudaStorage>> {
    dispatch!(problem, T, P => backward_typed::<T, P>(problem, args, wanted))
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

/// The storage of a tensor that is locked for reading.
fn operand<'a>(
    problem: &Problem,
    (storage, layout): &'a (impl Deref<Target = Storage>, &'a Layout),
) -> Result<Operand<'a>> {
    match &**storage {
        Storage::Cuda(storage) => Ok((storage, layout)),
        _ => bail!(
            "{}: backward: expected all tensors on the CUDA device of xs, got one elsewhere",
            problem.op_name()
        ),
    }
}

fn facts(problem: &Problem, device: &CudaDevice) -> Result<DeviceFacts> {
    use sys::CUdevice_attribute as A;
    let stream = device.cuda_stream();
    let context = stream.context();
    let get = |attribute| context.attribute(attribute).w();
    let capability = (
        get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    Ok(DeviceFacts {
        multiprocessors: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_per_block: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        shared_per_multiprocessor: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
            as usize,
        base: ptx::base(problem.op_name(), capability)?,
    })
}

/// Whether every row of these tensors starts on 16 bytes. Outputs do: the allocator aligns to 256.
fn aligned<T: Element, P: Element>(
    problem: &Problem,
    device: &CudaDevice,
    xs: &[&CudaView<'_, T>],
    params: &[Option<&CudaView<'_, P>>],
) -> bool {
    let stream = device.cuda_stream();
    plan::rows_align(problem)
        && xs.iter().all(|x| x.device_ptr(&stream).0 % 16 == 0)
        && params
            .iter()
            .flatten()
            .all(|p| p.device_ptr(&stream).0 % 16 == 0)
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
    let wrap =
        |y: CudaSlice<T>, mean: Option<CudaSlice<T::Acc>>, rstd: Option<CudaSlice<T::Acc>>| {
            let acc = |s| CudaStorage::wrap_cuda_slice(s, device.clone());
            Forward {
                ys: CudaStorage::wrap_cuda_slice(y, device.clone()),
                statistics: rstd.map(|rstd| (mean.map(acc), acc(rstd))),
            }
        };
    let kept = |wanted: bool| -> Result<Option<CudaSlice<T::Acc>>> {
        let make = |_| -> Result<_> {
            if problem.is_empty() {
                device.alloc_zeros(rows)
            } else {
                alloc(device, rows)
            }
        };
        wanted.then_some(()).map(make).transpose()
    };
    let mut mean = kept(keep && problem.remove_mean)?;
    let mut rstd = kept(keep)?;
    if problem.is_empty() {
        return Ok(wrap(device.alloc_zeros(0)?, mean, rstd));
    }

    let facts = facts(problem, device)?;
    let aligned = aligned(problem, device, &[&x], &[weight.as_ref(), bias.as_ref()]);
    let plan = plan::forward(problem, aligned, &facts)?;
    let mut y = alloc::<T>(device, rows * cols)?;
    let [first, second @ ..] = plan.launches.as_slice() else {
        bail!("{}: the plan has no launch: {plan:?}", problem.op_name())
    };
    let mut part = None;
    if !second.is_empty() {
        let part = part.insert(alloc::<T::Acc>(device, rows * plan.tiles * 2)?);
        let mut args = Arguments::new(&stream);
        args.output(Some(part));
        args.input(Some(&x));
        args.i64(rows);
        args.i32(cols);
        args.i32(plan.tiles);
        args.bool(problem.remove_mean);
        // SAFETY: split_moments(part [rows, tiles] of pairs, x [rows, cols], rows, cols, tiles, remove_mean).
        unsafe { args.launch(problem, device, facts.base, first)? };
    }
    let part = part.as_ref().map(|p| p.slice(..));
    let mut args = Arguments::new(&stream);
    args.output(Some(&mut y));
    args.output(mean.as_mut());
    args.output(rstd.as_mut());
    if part.is_some() {
        args.input(part.as_ref());
    }
    args.input(Some(&x));
    args.input(weight.as_ref());
    args.input(bias.as_ref());
    args.i64(rows);
    args.i32(cols);
    if part.is_some() {
        args.i32(plan.tiles);
    }
    args.acc::<T::Acc>(problem.eps);
    if part.is_none() {
        args.bool(problem.remove_mean);
    }
    args.i32(plan.lanes as usize);
    // SAFETY: FORWARD_ARGUMENTS of forward.cu, then `lanes`, which all but the warp kernels leave unread; or
    // split_normalize(y, mean, rstd, part, x, weight, bias, rows, cols, tiles, eps). y is [rows, cols], mean and rstd are [rows],
    // weight and bias [cols], as Problem checked.
    unsafe { args.launch(problem, device, facts.base, second.first().unwrap_or(first))? };
    Ok(wrap(y, mean, rstd))
}

fn backward_typed<T: Element, P: Element>(
    problem: &Problem,
    args: &BackwardArgs<'_>,
    wanted: Wanted,
) -> Result<Gradients<CudaStorage>> {
    let locked = [args.x, args.dy, &args.statistics.rstd].map(Tensor::storage_and_layout);
    let [x, dy, rstd] = &locked;
    let (x, dy, rstd) = (
        operand(problem, x)?,
        operand(problem, dy)?,
        operand(problem, rstd)?,
    );
    let weight = args.weight.map(Tensor::storage_and_layout);
    let weight = weight.as_ref().map(|w| operand(problem, w)).transpose()?;
    let mean = args
        .statistics
        .mean
        .as_ref()
        .map(Tensor::storage_and_layout);
    let mean = mean.as_ref().map(|m| operand(problem, m)).transpose()?;
    let device = &x.0.device;
    let x = view::<T>(problem, x)?;
    let dy = view::<T>(problem, dy)?;
    let rstd = view::<T::Acc>(problem, rstd)?;
    let weight = weight.map(|w| view::<P>(problem, w)).transpose()?;
    let mean = mean.map(|m| view::<T::Acc>(problem, m)).transpose()?;

    let stream = device.cuda_stream();
    let (rows, cols) = (problem.rows, problem.cols);
    let wrap =
        |dx: Option<CudaSlice<T>>, dweight: Option<CudaSlice<P>>, dbias: Option<CudaSlice<P>>| {
            let param = |s| CudaStorage::wrap_cuda_slice(s, device.clone());
            Gradients {
                dx: dx.map(|s| CudaStorage::wrap_cuda_slice(s, device.clone())),
                dweight: dweight.map(param),
                dbias: dbias.map(param),
            }
        };
    if problem.is_empty() {
        let zeros = |wanted: bool| wanted.then(|| device.alloc_zeros::<P>(cols)).transpose();
        let dx = wanted.dx.then(|| device.alloc_zeros::<T>(0)).transpose()?;
        return Ok(wrap(dx, zeros(wanted.dweight)?, zeros(wanted.dbias)?));
    }

    let facts = facts(problem, device)?;
    let aligned = aligned(problem, device, &[&x, &dy], &[weight.as_ref()]);
    let plan = plan::backward(problem, aligned, &facts)?;
    let mut dx = wanted
        .dx
        .then(|| alloc::<T>(device, rows * cols))
        .transpose()?;
    let partial = |wanted: bool| {
        wanted
            .then(|| alloc::<T::Acc>(device, plan.parts * cols))
            .transpose()
    };
    let mut dweight_part = partial(wanted.dweight)?;
    let mut dbias_part = partial(wanted.dbias)?;
    let [first, second @ ..] = plan.launches.as_slice() else {
        bail!("{}: the plan has no launch: {plan:?}", problem.op_name())
    };
    let mut part = None;
    if !second.is_empty() {
        let part = part.insert(alloc::<T::Acc>(device, rows * plan.tiles * 2)?);
        let mut args = Arguments::new(&stream);
        args.output(Some(part));
        args.input(Some(&x));
        args.input(Some(&dy));
        args.input(weight.as_ref());
        args.input(mean.as_ref());
        args.input(Some(&rstd));
        args.i64(rows);
        args.i32(cols);
        args.i32(plan.tiles);
        // SAFETY: split_sums(part [rows, tiles] of pairs, x, dy [rows, cols], weight [cols], mean, rstd [rows], rows, cols,
        // tiles).
        unsafe { args.launch(problem, device, facts.base, first)? };
    }
    let part = part.as_ref().map(|p| p.slice(..));
    let mut args = Arguments::new(&stream);
    args.output(dx.as_mut());
    args.output(dweight_part.as_mut());
    args.output(dbias_part.as_mut());
    if part.is_some() {
        args.input(part.as_ref());
    }
    args.input(Some(&x));
    args.input(Some(&dy));
    args.input(weight.as_ref());
    args.input(mean.as_ref());
    args.input(Some(&rstd));
    args.i64(rows);
    args.i32(cols);
    if part.is_some() {
        args.i32(plan.tiles);
    }
    args.bool(problem.remove_mean);
    args.i32(plan.lanes as usize);
    // SAFETY: BACKWARD_ARGUMENTS of backward.cu, then `lanes`, which all but the warp kernels leave unread; or
    // split_gradients(dx, dweight_part, dbias_part, part, x, dy, weight, mean, rstd, rows, cols, tiles, remove_mean). dx is
    // [rows, cols], the parts are [plan.parts, cols]. x, dy, weight, mean and rstd have the shapes of the forward pass.
    unsafe { args.launch(problem, device, facts.base, second.first().unwrap_or(first))? };

    let param = |wanted: bool| wanted.then(|| alloc::<P>(device, cols)).transpose();
    let (mut dweight, mut dbias) = (param(wanted.dweight)?, param(wanted.dbias)?);
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
        unsafe { args.launch(problem, device, facts.base, &plan.finalize)? };
    }
    Ok(wrap(dx, dweight, dbias))
}
