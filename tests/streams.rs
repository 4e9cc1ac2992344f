//! Promise: calls on several streams and several GPUs, and calls replayed from a CUDA graph, give what they give alone.

#![cfg(feature = "cuda")]

mod common;

use anyhow::{Context, Result};
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_layer_norm::ops;
use common::data::bits;
use common::devices::{cuda_devices, devices};

/// A warp, a block, a cluster, groups of the grid that wait for each other, and two launches: of each pass, as a GPU with clusters plans
/// them.
const SHAPES: [(usize, usize); 5] = [
    (4096, 256),
    (512, 8192),
    (64, 40000),
    (8, 400_000),
    (2, 5_000_000),
];

struct Call {
    xs: Var,
    weight: Var,
    bias: Var,
    dy: Tensor,
}

impl Call {
    /// The same values on every device.
    fn new(device: &Device, (rows, cols): (usize, usize), dtype: DType) -> Result<Self> {
        let wave = |rows: usize, frequency: f64| -> Result<Tensor> {
            let at = Tensor::arange(0u32, (rows * cols) as u32, device)?.to_dtype(DType::F64)?;
            let values = ((at * frequency)?.sin()? + 0.5)?;
            Ok(values.to_dtype(dtype)?.reshape((rows, cols))?)
        };
        Ok(Self {
            xs: Var::from_tensor(&wave(rows, 0.37)?)?,
            weight: Var::from_tensor(&wave(1, 0.11)?.flatten_all()?)?,
            bias: Var::from_tensor(&wave(1, 0.23)?.flatten_all()?)?,
            dy: wave(rows, 0.71)?,
        })
    }

    /// y, dx, dweight and dbias. Nothing waits for the device.
    fn run(&self) -> Result<[Tensor; 4]> {
        let y = ops::layer_norm(&self.xs, &self.weight, &self.bias, 1e-5)?;
        let grads = (&y * &self.dy)?.sum_all()?.backward()?;
        let of = |var: &Var| grads.get(var).cloned().context("no gradient");
        Ok([
            y.detach(),
            of(&self.xs)?,
            of(&self.weight)?,
            of(&self.bias)?,
        ])
    }
}

fn all_bits(outputs: &[Tensor; 4]) -> Result<Vec<Vec<u64>>> {
    outputs.iter().map(|output| Ok(bits(output)?)).collect()
}

/// What the calls give one by one, then all at once: `streams` are devices to candle.
fn check(streams: &[Device]) -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        for shape in SHAPES {
            let calls = streams.iter().map(|device| Call::new(device, shape, dtype));
            let calls = calls.collect::<Result<Vec<_>>>()?;
            let alone = all_bits(&calls[0].run()?)?;
            // One thread, whose calls overlap on the device.
            let mut overlapping = Vec::new();
            for _ in 0..2 {
                for call in &calls {
                    overlapping.push(call.run()?);
                }
            }
            for outputs in &overlapping {
                assert!(all_bits(outputs)? == alone, "{shape:?} {dtype:?}");
            }
            // A thread each.
            std::thread::scope(|scope| -> Result<()> {
                let threads: Vec<_> = calls
                    .iter()
                    .map(|call| {
                        scope.spawn(|| -> Result<Vec<Vec<Vec<u64>>>> {
                            let outputs = (0..2).map(|_| call.run());
                            let outputs = outputs.collect::<Result<Vec<_>>>()?;
                            outputs.iter().map(all_bits).collect()
                        })
                    })
                    .collect();
                for thread in threads {
                    for outputs in thread.join().expect("no panic")? {
                        assert!(outputs == alone, "{shape:?} {dtype:?}");
                    }
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn streams_of_one_gpu() -> Result<()> {
    if cuda_devices().next().is_none() {
        return Ok(());
    }
    let streams = (0..3).map(|_| Device::new_cuda_with_stream(0));
    check(&streams.collect::<Result<Vec<_>, _>>()?)
}

/// On one stream, from which each takes memory of its own for the blocks of a row to meet in.
#[test]
fn threads_of_one_device() -> Result<()> {
    match cuda_devices().next() {
        Some(device) => check(&[(); 3].map(|()| device.clone())),
        None => Ok(()),
    }
}

/// A graph of one thread is walked and dropped by another, also after a second stream came, from when on cudarc orders them.
#[test]
fn a_graph_outlives_its_thread_and_a_single_stream() -> Result<()> {
    if cuda_devices().next().is_none() {
        return Ok(());
    }
    for shape in SHAPES {
        let device = Device::new_cuda(0)?;
        let call = Call::new(&device, shape, DType::F32)?;
        let alone = all_bits(&call.run()?)?;
        let forward = || -> Result<Tensor> {
            let y = ops::layer_norm(&call.xs, &call.weight, &call.bias, 1e-5)?;
            // Each thread has a stream of its own.
            device.synchronize()?;
            Ok(y)
        };
        let backward = |y: Tensor| -> Result<Vec<Vec<u64>>> {
            let grads = (&y * &call.dy)?.sum_all()?.backward()?;
            let of = |var: &Var| grads.get(var).cloned().context("no gradient");
            let outputs = [
                y.detach(),
                of(&call.xs)?,
                of(&call.weight)?,
                of(&call.bias)?,
            ];
            all_bits(&outputs)
        };
        let elsewhere = |y: Tensor| -> Result<Vec<Vec<u64>>> {
            std::thread::scope(|scope| scope.spawn(|| backward(y)).join()).expect("no panic")
        };
        assert!(elsewhere(forward()?)? == alone, "{shape:?}");
        let before = [forward()?, forward()?];
        let _stream = device.as_cuda_device()?.cuda_stream().fork()?;
        let [here, there] = before;
        assert!(backward(here)? == alone, "{shape:?}, of one stream");
        assert!(elsewhere(there)? == alone, "{shape:?}, of one stream");
        assert!(elsewhere(forward()?)? == alone, "{shape:?}, of two streams");
        assert!(
            all_bits(&call.run()?)? == alone,
            "{shape:?}, of two streams"
        );
    }
    Ok(())
}

/// Skipped, with a message, where there is one.
#[test]
fn two_gpus() -> Result<()> {
    let Some(first) = devices().iter().find(|device| device.is_cuda()) else {
        return Ok(());
    };
    match Device::new_cuda(1) {
        Ok(second) => check(&[first.clone(), second]),
        Err(_) => {
            eprintln!("one GPU: not run on two");
            Ok(())
        }
    }
}

/// Forward, loss, backward and an optimizer's step, captured once and replayed, train as the same steps do uncaptured.
#[test]
fn a_training_step_is_captured_in_a_cuda_graph() -> Result<()> {
    const STEPS: usize = 6;
    for (rows, cols) in SHAPES.into_iter().filter(|shape| shape.1 < 1_000_000) {
        if cuda_devices().next().is_none() {
            return Ok(());
        }
        let device = Device::new_cuda(0)?;
        let cuda = device.as_cuda_device()?;
        let call = Call::new(&device, (rows, cols), DType::F32)?;
        let vars = [&call.weight, &call.bias];
        let start = vars.map(|var| var.as_tensor().copy());
        let [start_weight, start_bias] = start;
        let start = [start_weight?, start_bias?];
        let losses = Tensor::zeros(1, DType::F32, &device)?;
        let step = || -> Result<()> {
            let y = ops::layer_norm(call.xs.as_tensor(), &call.weight, &call.bias, 1e-5)?;
            let loss = (y - &call.dy)?.sqr()?.mean_all()?;
            let grads = loss.backward()?;
            for var in vars {
                let gradient = grads.get(var).context("no gradient")?;
                var.set(&(var.as_tensor() - (gradient * 0.1)?)?)?;
            }
            losses.slice_set(&loss.reshape(1)?.detach(), 0, 0)?;
            Ok(())
        };
        let state = || -> Result<Vec<Vec<u64>>> {
            let tensors = [vars[0].as_tensor(), vars[1].as_tensor(), &losses];
            tensors
                .into_iter()
                .map(|tensor| Ok(bits(tensor)?))
                .collect()
        };

        for _ in 0..STEPS {
            step()?;
        }
        let want = state()?;
        for (var, start) in vars.into_iter().zip(&start) {
            var.set(start)?;
        }

        // candle keeps small arrays that its own kernels take, such as strides, for the capture.
        let kept = cuda.enable_cuda_graph_htod_cache();
        step()?;
        let stream = cuda.cuda_stream();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let captured = step();
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags_enum(0))?;
        captured?;
        let graph = graph.context("nothing was captured")?;
        drop(kept);
        for _ in 1..STEPS {
            graph.launch()?;
        }
        device.synchronize()?;
        assert!(state()? == want, "{rows} x {cols}");
    }
    Ok(())
}
