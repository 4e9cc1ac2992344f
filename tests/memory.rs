//! Promise: beyond its tensors, a tracked call keeps mean and rstd of each row, an untracked one nothing; what is dropped is
//! freed, but for 4 MiB that a thread keeps on a GPU, over ten thousand steps of training too.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_fused_layer_norm::{layer_norm, ops, rms_norm};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear};
use common::devices::devices;
use peak_alloc::PeakAlloc;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// The heap is the process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that are in use, on the host and in candle's pool on the device.
fn used(device: &Device) -> Result<usize> {
    device.synchronize()?;
    Ok(HEAP.current_usage() + on_device(device))
}

#[cfg(feature = "cuda")]
fn on_device(device: &Device) -> usize {
    use cudarc::driver::{result, sys};
    let Device::Cuda(device) = device else {
        return 0;
    };
    let device = device.cuda_stream().context().cu_device();
    let mut bytes = 0u64;
    // SAFETY: the device is that of a context that lives, and the attribute a cuuint64_t, which `bytes` is.
    unsafe {
        let pool = result::device::get_default_mem_pool(device).expect("a pool");
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()).expect("its use");
    }
    bytes as usize
}

#[cfg(not(feature = "cuda"))]
fn on_device(_: &Device) -> usize {
    0
}

/// In bytes: what threads, pools and the bookkeeping of tensors may take beside.
const ROOM: usize = 64 * 1024;

#[track_caller]
fn assert_used(what: &str, before: usize, after: usize, expected: usize) {
    let grown = after as i64 - before as i64;
    let (least, most) = (expected as i64 - ROOM as i64, (expected + ROOM) as i64);
    assert!(
        (least..=most).contains(&grown),
        "{what}: expected {expected} bytes more in use, got {grown}"
    );
}

/// 8 bytes a row for LayerNorm, 4 for RMSNorm, twice that for f64; and all of it goes with the graph.
#[test]
fn a_call_keeps_its_statistics_and_only_while_its_graph_lives() -> Result<()> {
    let _alone = alone();
    const ROWS: usize = 1 << 18;
    for device in devices() {
        for (dtype, statistic) in [(DType::F32, 4), (DType::BF16, 4), (DType::F64, 8)] {
            let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, device)?.to_dtype(dtype);
            let (xs, weight) = (ones(&[ROWS, 4])?, ones(&[4])?);
            let tracked = Var::from_tensor(&weight)?;
            let y_bytes = ROWS * 4 * dtype.size_in_bytes();
            // Threads start, modules load.
            drop(ops::layer_norm(&xs, &tracked, &weight, 1e-5)?);
            drop(ops::rms_norm(&xs, &tracked, 1e-5)?);

            let before = used(device)?;
            let y = ops::layer_norm(&xs, &weight, &weight, 1e-5)?;
            assert_used("untracked", before, used(device)?, y_bytes);
            drop(y);
            let y = ops::layer_norm(&xs, &tracked, &weight, 1e-5)?;
            assert_used(
                "tracked",
                before,
                used(device)?,
                y_bytes + 2 * statistic * ROWS,
            );
            drop(y);
            assert_used("dropped", before, used(device)?, 0);
            let y = ops::rms_norm(&xs, &tracked, 1e-5)?;
            assert_used("RMSNorm", before, used(device)?, y_bytes + statistic * ROWS);
            let grads = y.sum_all()?.backward()?;
            drop((y, grads));
            assert_used("after backward", before, used(device)?, 0);
        }
    }
    Ok(())
}

/// On the device a thread keeps to 4 MiB of small statistics and partial sums for its next calls, and nothing when it ends.
#[test]
fn what_a_thread_keeps_for_its_next_calls_is_bounded() -> Result<()> {
    let _alone = alone();
    const KEPT: usize = 4 << 20;
    for device in devices() {
        let calls = || -> Result<usize> {
            let weight = Var::ones(512, DType::F32, device)?;
            let first = used(device)?;
            let mut most = 0;
            // Of as many sizes of statistics, and partial sums of to 512 KiB.
            for rows in (1..2000).step_by(7) {
                let xs = Var::ones((rows, 512), DType::F32, device)?;
                let ys = ops::layer_norm(&xs, &weight, &weight, 1e-5)?;
                drop(ys.sum_all()?.backward()?);
                drop((ys, xs));
                most = most.max(used(device)?.saturating_sub(first));
            }
            Ok(most)
        };
        // Threads start, modules load.
        calls()?;
        let before = used(device)?;
        let most = std::thread::scope(|scope| scope.spawn(calls).join()).expect("no panic")?;
        assert!(most <= KEPT + ROOM, "{most} bytes more in use");
        assert_used("when it ended", before, used(device)?, 0);
    }
    Ok(())
}

/// A statistic of one step that stayed would be 8 KiB: 72 MiB in the end.
#[test]
#[ignore = "ten thousand steps: half a minute on two idle cores"]
fn ten_thousand_steps_of_training_use_no_more_memory_than_a_thousand() -> Result<()> {
    let _alone = alone();
    const ROWS: usize = 1024;
    for device in devices() {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let (norm, rms) = (
            layer_norm(16, 1e-5, vb.pp("norm"))?,
            rms_norm(16, 1e-5, vb.pp("rms"))?,
        );
        let (up, down) = (linear(8, 16, vb.pp("up"))?, linear(16, 1, vb.pp("down"))?);
        let mut optimizer = AdamW::new(vars.all_vars(), ParamsAdamW::default())?;
        let xs = Tensor::randn(0f32, 1., (ROWS, 8), device)?;
        let want = xs.sqr()?.mean_keepdim(1)?;
        let mut losses = Vec::new();
        let mut uses = Vec::new();
        for step in 1..=10_000 {
            let ys = rms.forward(&(norm.forward(&up.forward(&xs)?)?.gelu()?))?;
            let loss = (down.forward(&ys)? - &want)?.sqr()?.mean_all()?;
            optimizer.backward_step(&loss)?;
            if step % 1000 == 0 {
                losses.push(loss.to_scalar::<f32>()?);
                drop((ys, loss));
                uses.push((used(device)?, resident()));
            }
        }
        assert!(losses[9] < losses[0], "it learns: {losses:?}");
        let ((first, first_resident), (last, last_resident)) = (uses[0], uses[9]);
        assert_used("after 10000 steps", first, last, 0);
        // Pages of freed memory may stay with the process.
        const PAGES: usize = 8 << 20;
        assert!(
            last_resident <= first_resident + PAGES,
            "resident: {uses:?}"
        );
    }
    Ok(())
}

/// Bytes of main memory that the process has, or 0 where the system does not tell.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok());
    kibibytes.unwrap_or_default() * 1024
}
