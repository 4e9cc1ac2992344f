//! Time between CUDA events, against the device's own copy and add of 16-byte vectors.

use super::Bench;
use anyhow::{Context, Result};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg, sys::CUevent_flags,
};
use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
use std::sync::Arc;
use std::time::Instant;

const FLUSH_BYTES: usize = 1 << 30;
/// Microseconds of a round of calls whose wall time is taken, and how many rounds there are.
const WALL_US: f64 = 5_000.;
const WALL_ROUNDS: usize = 5;
const THREADS: u32 = 256;
/// Bytes between the tensors of a roofline, multiples of 256.
const DISTANCES: [usize; 3] = [0, 0x1_2300, 0x53_4500];
const SOURCE: &str = r#"
#define ENTRY extern "C" __global__ void __launch_bounds__(256)
template <int kPer> __device__ void copy(uint4* __restrict__ c, const uint4* __restrict__ a, long long n) {
  const long long first = blockIdx.x * 256ll * kPer + threadIdx.x;
  uint4 v[kPer];
#pragma unroll
  for (int k = 0; k < kPer; k++) if (first + k * 256 < n) v[k] = a[first + k * 256];
#pragma unroll
  for (int k = 0; k < kPer; k++) if (first + k * 256 < n) c[first + k * 256] = v[k];
}
__device__ unsigned sum(unsigned a, unsigned b) { return __float_as_uint(__uint_as_float(a) + __uint_as_float(b)); }
template <int kPer>
__device__ void add(uint4* __restrict__ c, const uint4* __restrict__ a, const uint4* __restrict__ b, long long n) {
  const long long first = blockIdx.x * 256ll * kPer + threadIdx.x;
  uint4 v[kPer], w[kPer];
#pragma unroll
  for (int k = 0; k < kPer; k++) if (first + k * 256 < n) { v[k] = a[first + k * 256]; w[k] = b[first + k * 256]; }
#pragma unroll
  for (int k = 0; k < kPer; k++) if (first + k * 256 < n)
    c[first + k * 256] = make_uint4(sum(v[k].x, w[k].x), sum(v[k].y, w[k].y), sum(v[k].z, w[k].z), sum(v[k].w, w[k].w));
}
ENTRY copy1(uint4* c, const uint4* a, const uint4*, long long n) { copy<1>(c, a, n); }
ENTRY copy4(uint4* c, const uint4* a, const uint4*, long long n) { copy<4>(c, a, n); }
ENTRY add1(uint4* c, const uint4* a, const uint4* b, long long n) { add<1>(c, a, b, n); }
ENTRY add2(uint4* c, const uint4* a, const uint4* b, long long n) { add<2>(c, a, b, n); }
"#;

pub struct Cuda {
    stream: Arc<CudaStream>,
    flush: CudaSlice<u8>,
    /// For one input and for two: kernels and the vectors a thread takes.
    roofs: [Vec<(CudaFunction, u32)>; 2],
    reps: usize,
}

impl Cuda {
    pub fn new(device: &Device, reps: usize) -> Result<Self> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let module = stream.context().load_module(compile_ptx(SOURCE)?)?;
        let load = |entries: &[(&str, u32)]| -> Result<Vec<_>> {
            entries
                .iter()
                .map(|&(entry, per)| Ok((module.load_function(entry)?, per)))
                .collect()
        };
        Ok(Self {
            flush: stream.alloc_zeros(FLUSH_BYTES)?,
            roofs: [
                load(&[("copy1", 1), ("copy4", 4)])?,
                load(&[("add1", 1), ("add2", 2)])?,
            ],
            stream,
            reps,
        })
    }

    pub fn name(&self) -> String {
        self.stream.context().name().unwrap_or_default()
    }
}

impl Bench for Cuda {
    fn time(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        for _ in 0..3 {
            call()?;
        }
        let timing = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let mut events = Vec::with_capacity(self.reps);
        // A call ends before the next is queued: behind others short ones take to a microsecond more, every second one most of all. Its end is asked for,
        // not waited for: at a synchronisation the driver takes back freed memory, and the next call's allocation would pay for mapping it again.
        for _ in 0..self.reps {
            self.stream.memset_zeros(&mut self.flush)?;
            let start = self.stream.record_event(timing)?;
            call()?;
            let end = self.stream.record_event(timing)?;
            while !end.try_is_complete()? {
                std::hint::spin_loop();
            }
            events.push((start, end));
        }
        let times = events
            .iter()
            .map(|(start, end)| Ok(f64::from(start.elapsed_ms(end)?) * 1e3));
        Ok(median(times.collect::<Result<_>>()?))
    }

    fn roof(&mut self, inputs: usize, bytes: usize) -> Result<f64> {
        let bytes = bytes.next_multiple_of(256);
        // At some distances two tensors meet in the same banks of memory, which costs a tenth: the best of several.
        let mut arena = self
            .stream
            .alloc_zeros::<u8>(3 * bytes + 2 * DISTANCES[DISTANCES.len() - 1])?;
        let vectors = (bytes / 16) as i64;
        let stream = self.stream.clone();
        let mut best = f64::INFINITY;
        for distance in DISTANCES {
            for (function, per) in self.roofs[inputs - 1].clone() {
                let blocks = (vectors as u64).div_ceil(u64::from(THREADS * per));
                let config = LaunchConfig {
                    grid_dim: (blocks as u32, 1, 1),
                    block_dim: (THREADS, 1, 1),
                    shared_mem_bytes: 0,
                };
                best = best.min(self.time(&mut || {
                    let (mut c, rest) = arena.split_at_mut(bytes + distance);
                    let (a, b) = (rest.slice(..bytes), rest.slice(bytes + distance..));
                    let mut launch = stream.launch_builder(&function);
                    launch.arg(&mut c).arg(&a).arg(&b).arg(&vectors);
                    // SAFETY: (c, a, b, n): n vectors of 16 bytes in each view, which are `bytes` long or longer.
                    unsafe { launch.launch(config) }.context("roofline kernel")?;
                    Ok(())
                })?);
            }
        }
        Ok(best)
    }

    fn wall(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let mut round = |calls: u32| -> Result<f64> {
            let start = Instant::now();
            for _ in 0..calls {
                call()?;
            }
            self.stream.synchronize()?;
            Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(calls))
        };
        round(3)?;
        // Many: behind a synchronisation the driver takes back freed memory, and the next calls' allocations map it again.
        let calls = (WALL_US / round(20)?).clamp(20., 2000.) as u32;
        let times = (0..WALL_ROUNDS).map(|_| round(calls));
        Ok(median(times.collect::<Result<_>>()?))
    }
}

/// Of an odd number of times.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
