//! Times forward and backward against the roofline measured in the same process, and against candle-nn.
//!
//! ```sh
//! cargo bench --bench layer_norm                                    # CPU
//! cargo bench --features cuda --bench layer_norm -- --json out.jsonl  # CUDA, if a device is present
//! ```
//!
//! A time is the median over `--reps` calls. On CUDA it lies between two events around the call, behind a 1 GiB memset that
//! evicts L2 and hides the host's latency: `ours` are the kernels, which write memory that is there, `ours_op` the whole op, of
//! which the stream also sees that memory is taken and given back (about 1 us), `ours_untracked` the op that keeps nothing for a
//! backward pass, and `op wall us` the time of a call among many, the host's where that is more; the roofline is the better of two
//! copies (forward) or adds (backward) of 16-byte vectors over tensors of the same size. On the CPU it is wall time, and the calls
//! that are compared take turns: `kernel` writes memory that is there, `ours` is the whole op, whose outputs are fresh, and the
//! roofline is the faster of two parallel copies or adds over memory that is there. benches/README.md has the comparison with PyTorch.
//! CUDA_CACHE_DISABLE=1 shows what a first call costs where the driver has not compiled the kernels before.
//! Before a time is reported, the result is compared with the composed ops in f64.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_layer_norm::{bench, composed, ops};
use clap::Parser;
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

#[path = "support/cpu.rs"]
mod cpu;
#[cfg(feature = "cuda")]
#[path = "support/cuda.rs"]
mod cuda;

/// A machine that can time calls and knows its own roofline.
trait Bench {
    /// Median microseconds of `call`.
    fn time(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
    /// Microseconds of a copy (`inputs` = 1) or an add (2) of tensors of `bytes` each.
    fn roof(&mut self, inputs: usize, bytes: usize) -> Result<f64>;
    /// Microseconds of wall time a call: the median of several rounds of many calls queued at once.
    fn wall(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
}

#[derive(Parser)]
#[command(about = "Times LayerNorm forward and backward against the machine's roofline")]
struct Args {
    /// Writes one JSON object a line.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Shapes, as rows x columns.
    #[arg(long, value_delimiter = ',', value_name = "RxC", value_parser = parse_shape)]
    shapes: Vec<(usize, usize)>,
    /// f32, bf16, f16, f64.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "f32,bf16",
        value_name = "DTYPE"
    )]
    dtypes: Vec<String>,
    /// Also times candle-nn's differentiable `layer_norm_slow`.
    #[arg(long)]
    slow: bool,
    /// Weight and bias in f32 beside half activations.
    #[arg(long)]
    mixed: bool,
    /// On CUDA, also times the norm of a sum, and a backward pass with frozen weight and bias.
    #[arg(long)]
    more: bool,
    /// Elements that come before x in its memory: x is a view that does not start on 16 bytes.
    #[arg(long, default_value_t = 0, value_name = "ELEMENTS")]
    offset: usize,
    /// Calls timed for each number.
    #[arg(long, default_value_t = 15)]
    reps: usize,
    /// Times the CPU even where a CUDA device is present.
    #[arg(long)]
    cpu: bool,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn parse_shape(text: &str) -> Result<(usize, usize), String> {
    let parsed = text
        .split_once('x')
        .and_then(|(r, c)| Some((r.parse().ok()?, c.parse().ok()?)));
    match parsed {
        Some((rows, cols)) if rows > 0 && cols > 0 => Ok((rows, cols)),
        _ => Err(format!(
            "expected rows x columns, such as 8192x768, got `{text}`"
        )),
    }
}

/// From one row of millions to thousands of narrow ones.
const CUDA_SHAPES: &[(usize, usize)] = &[
    (16, 4194304),
    (128, 1048576),
    (256, 262144),
    (512, 131072),
    (1024, 65536),
    (2048, 32768),
    (4096, 16384),
    (8192, 8192),
    (16384, 4096),
    (16384, 2048),
    (32768, 1024),
    (32768, 768),
    (65536, 256),
    (2048, 1024),
    (512, 768),
];
const CPU_SHAPES: &[(usize, usize)] = &[
    (1, 16777216),
    (16, 1048576),
    (256, 65536),
    (4096, 4096),
    (8192, 768),
    (64, 256),
];
const EPS: f64 = 1e-5;

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, mut machine) = open(&args)?;
    let shapes = match (args.shapes.as_slice(), device.is_cuda()) {
        ([], true) => CUDA_SHAPES,
        ([], false) => CPU_SHAPES,
        (given, _) => given,
    };
    let mut json = match &args.json {
        Some(path) => {
            Some(File::create(path).with_context(|| format!("cannot write {}", path.display()))?)
        }
        None => None,
    };
    if device.is_cuda() {
        print_first_calls(&device)?;
    }
    println!(
        "{:<4} {:<5} {:>7} x {:<8} {:<12} {:>11} {:>7} {:>11}",
        "dir", "dtype", "rows", "cols", "impl", "us", "roof", "op wall us"
    );
    for name in &args.dtypes {
        let dtype = match name.as_str() {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            "f16" => DType::F16,
            "f64" => DType::F64,
            _ => bail!("--dtypes: expected f32, bf16, f16 or f64, got `{name}`"),
        };
        for &(rows, cols) in shapes {
            for row in measure(&args, machine.as_mut(), &device, dtype, rows, cols)? {
                let share = match row.roof {
                    Some(roof) => format!("{:.1}%", 100. * roof / row.us),
                    None => String::new(),
                };
                let wall = row.wall_us.map_or(String::new(), |us| format!("{us:.1}"));
                println!(
                    "{:<4} {name:<5} {rows:>7} x {cols:<8} {:<12} {:>11.1} {share:>7} {wall:>11}",
                    row.dir, row.name, row.us
                );
                if let Some(json) = &mut json {
                    let mut line = json!({
                        "dir": row.dir, "dtype": name, "rows": rows, "cols": cols, "impl": row.name, "us": row.us,
                    });
                    if let Some(us) = row.wall_us {
                        line["wall_us"] = us.into();
                    }
                    if device.is_cpu() {
                        line["threads"] = rayon::current_num_threads().into();
                    }
                    writeln!(json, "{line}")?;
                }
            }
        }
    }
    Ok(())
}

fn open(args: &Args) -> Result<(Device, Option<Box<dyn Bench>>)> {
    #[cfg(not(feature = "cuda"))]
    let _ = args;
    #[cfg(feature = "cuda")]
    if !args.cpu {
        match Device::new_cuda(0) {
            Ok(device) => {
                let machine = cuda::Cuda::new(&device, args.reps)?;
                println!("{}", machine.name());
                return Ok((device, Some(Box::new(machine))));
            }
            Err(error) => println!("no CUDA device, timing the CPU: {error}"),
        }
    }
    println!("CPU, {} threads", rayon::current_num_threads());
    Ok((Device::Cpu, None))
}

/// What the first forward and the first backward of a process wait for: the driver compiles their PTX, or finds it in its cache.
fn print_first_calls(device: &Device) -> Result<()> {
    let [x, weight, bias, dy] = [(512, 768), (1, 768), (1, 768), (512, 768)]
        .map(|shape| Tensor::randn(0f32, 1., shape, device));
    let x = Var::from_tensor(&x?)?;
    let [weight, bias] = [weight, bias].map(|t| Var::from_tensor(&t?.flatten_all()?));
    let (weight, bias, dy) = (weight?, bias?, dy?);
    device.synchronize()?;
    let start = Instant::now();
    let (_, backward) = bench::layer_norm(&x, &weight, &bias, EPS)?;
    device.synchronize()?;
    let forward = start.elapsed();
    backward(&dy)?;
    device.synchronize()?;
    let cache = match std::env::var_os("CUDA_CACHE_DISABLE") {
        Some(value) if value == "1" => "off",
        _ => "on",
    };
    println!(
        "first calls, 512 x 768 in f32, compute cache {cache}: forward {:.0} ms, backward {:.0} ms",
        forward.as_secs_f64() * 1e3,
        (start.elapsed() - forward).as_secs_f64() * 1e3
    );
    Ok(())
}

struct Row {
    dir: &'static str,
    name: &'static str,
    us: f64,
    /// The roofline, for all but itself.
    roof: Option<f64>,
    wall_us: Option<f64>,
}

fn measure(
    args: &Args,
    machine: Option<&mut Box<dyn Bench>>,
    device: &Device,
    dtype: DType,
    rows: usize,
    cols: usize,
) -> Result<Vec<Row>> {
    let param_dtype = match dtype {
        DType::BF16 | DType::F16 if args.mixed => DType::F32,
        dtype => dtype,
    };
    let random = |shape: &[usize], mean: f32, std: f32, dtype| -> Result<Tensor> {
        Ok(Tensor::randn(mean, std, shape, device)?.to_dtype(dtype)?)
    };
    let memory = Var::from_tensor(&random(&[args.offset + rows * cols], 0.7, 1.5, dtype)?)?;
    let x = memory
        .narrow(0, args.offset, rows * cols)?
        .reshape((rows, cols))?;
    let weight = Var::from_tensor(&random(&[cols], 1., 0.2, param_dtype)?)?;
    let bias = Var::from_tensor(&random(&[cols], 0., 0.2, param_dtype)?)?;
    let dy = random(&[rows, cols], 0., 1., dtype)?;
    let (y, backward) = bench::layer_norm(&x, &weight, &bias, EPS)?;
    check(&x, &weight, &bias, &dy, &y, &backward)?;
    drop(y);

    let bytes = rows * cols * dtype.size_in_bytes();
    let Some(machine) = machine else {
        return measure_cpu(args, &x, &weight, &bias, &dy, &backward, bytes);
    };
    let mut out = Vec::new();
    let roof = machine.roof(1, bytes)?;
    let row = |dir, name, us, roof| Row {
        dir,
        name,
        us,
        roof,
        wall_us: None,
    };
    out.push(row("fwd", "roof", roof, None));
    let [mut forward_kernel, mut backward_kernel] = cuda_kernels(&x, &weight, &bias, &dy)?;
    let mut kernel = || Ok(forward_kernel()?);
    out.push(row("fwd", "ours", machine.time(&mut kernel)?, Some(roof)));
    let mut op = || -> Result<()> {
        let _ = bench::layer_norm(&x, &weight, &bias, EPS)?;
        Ok(())
    };
    out.push(whole_op(machine.as_mut(), "fwd", "ours_op", roof, &mut op)?);
    // As in inference, and as candle-nn's fused op always is: nothing is kept for a backward pass.
    let untracked = [&x, &weight, &bias].map(|var| var.detach());
    let mut op = || -> Result<()> {
        let [x, weight, bias] = &untracked;
        ops::layer_norm(x, weight, bias, EPS as f32)?;
        Ok(())
    };
    let name = "ours_untracked";
    out.push(whole_op(machine.as_mut(), "fwd", name, roof, &mut op)?);
    if param_dtype == dtype && dtype != DType::F64 {
        let mut fused = || -> Result<()> {
            candle_nn::ops::layer_norm(&x, &weight, &bias, EPS as f32)?;
            Ok(())
        };
        let name = "candle_fused";
        out.push(whole_op(machine.as_mut(), "fwd", name, roof, &mut fused)?);
    }
    if args.slow {
        let us = machine.time(&mut || {
            candle_nn::ops::layer_norm_slow(&x, &weight, &bias, EPS as f32)?;
            Ok(())
        })?;
        out.push(row("fwd", "candle_slow", us, Some(roof)));
    }

    let roof = machine.roof(2, bytes)?;
    out.push(row("bwd", "roof", roof, None));
    let mut kernel = || Ok(backward_kernel()?);
    out.push(row("bwd", "ours", machine.time(&mut kernel)?, Some(roof)));
    drop(backward_kernel);
    let mut op = || -> Result<()> {
        backward(&dy)?;
        Ok(())
    };
    out.push(whole_op(machine.as_mut(), "bwd", "ours_op", roof, &mut op)?);
    if args.slow {
        // The graph's own part: what candle's backward does for sum(y * dy) before it reaches the norm is in it too.
        let y = candle_nn::ops::layer_norm_slow(&x, &weight, &bias, EPS as f32)?;
        let loss = (y * &dy)?.sum_all()?;
        let us = machine.time(&mut || {
            loss.backward()?;
            Ok(())
        })?;
        out.push(row("bwd", "candle_slow", us, Some(roof)));
    }
    if args.more {
        let (weight, bias) = (weight.detach(), bias.detach());
        let (_, frozen) = bench::layer_norm(&x, &weight, &bias, EPS)?;
        let us = machine.time(&mut || {
            frozen(&dy)?;
            Ok(())
        })?;
        out.push(row("bwd", "frozen", us, Some(roof)));
        let residual = Var::from_tensor(&random(&[rows, cols], 0., 1., dtype)?)?;
        out.extend(measure_add(
            machine.as_mut(),
            &x,
            &residual,
            &weight,
            &bias,
            &dy,
        )?);
    }
    Ok(out)
}

/// Times an op with its outputs' allocation, on the stream and by the host's clock.
fn whole_op(
    machine: &mut dyn Bench,
    dir: &'static str,
    name: &'static str,
    roof: f64,
    call: &mut dyn FnMut() -> Result<()>,
) -> Result<Row> {
    Ok(Row {
        dir,
        name,
        us: machine.time(call)?,
        roof: Some(roof),
        wall_us: Some(machine.wall(call)?),
    })
}

/// The kernels of both passes, over memory that is there.
#[cfg(feature = "cuda")]
fn cuda_kernels(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    dy: &Tensor,
) -> Result<[bench::Kernel; 2]> {
    Ok([
        bench::cuda_forward(x, weight, bias, EPS)?,
        bench::cuda_backward(x, weight, dy, EPS)?,
    ])
}
#[cfg(not(feature = "cuda"))]
fn cuda_kernels(_: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<[bench::Kernel; 2]> {
    bail!("built without the feature cuda")
}

/// The norm of a sum, in one op, and as candle's add and this crate's norm. Backward, `dsum` arrives at the sum. The roofline moves
/// as many bytes: two tensors read and two written, three read and one written.
fn measure_add(
    machine: &mut dyn Bench,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    dy: &Tensor,
) -> Result<Vec<Row>> {
    let bytes = x.elem_count() * x.dtype().size_in_bytes();
    let [weight, bias] = [weight, bias].map(Var::from_tensor);
    let (weight, bias) = (weight?, bias?);
    let ((_, sum), backward) = bench::add_layer_norm(x, residual, &weight, &bias, EPS)?;
    // Not dy again, which a cache would still hold.
    let dsum = dy.affine(-1., 0.)?;
    let plain = (x + residual)?.detach();
    let difference = (sum.to_dtype(DType::F32)? - plain.to_dtype(DType::F32)?)?;
    ensure!(
        difference.abs()?.max_all()?.to_scalar::<f32>()? == 0.,
        "the sum is not that of candle's add"
    );
    let plain = Var::from_tensor(&plain)?;
    let (_, plain_backward) = bench::layer_norm(&plain, &weight, &bias, EPS)?;
    let forward_roof = machine.roof(1, 2 * bytes)?;
    let backward_roof = machine.roof(2, bytes)? * 4. / 3.;
    let mut out = Vec::new();
    let mut time = |dir, name, roof, call: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        out.push(whole_op(machine, dir, name, roof, call)?);
        Ok(())
    };
    time("fwd", "add_fused", forward_roof, &mut || {
        let _ = bench::add_layer_norm(x, residual, &weight, &bias, EPS)?;
        Ok(())
    })?;
    time("fwd", "add_then_norm", forward_roof, &mut || {
        let sum = (x.detach() + residual.detach())?;
        let _ = bench::layer_norm(&sum, &weight, &bias, EPS)?;
        Ok(())
    })?;
    time("bwd", "add_fused", backward_roof, &mut || {
        backward(dy, &dsum)?;
        Ok(())
    })?;
    time("bwd", "add_then_norm", backward_roof, &mut || {
        let (dx, _, _) = plain_backward(dy)?;
        let _ = (dx.context("no gradient")? + &dsum)?;
        Ok(())
    })?;
    Ok(out)
}

/// Kernels over memory that is there, and whole ops, whose outputs are fresh, in turns.
fn measure_cpu(
    args: &Args,
    x: &Tensor,
    weight: &Var,
    bias: &Var,
    dy: &Tensor,
    backward: &dyn Fn(&Tensor) -> Result<bench::Gradients, candle_core::Error>,
    bytes: usize,
) -> Result<Vec<Row>> {
    let (mut forward_kernel, mut backward_kernel) = (
        bench::cpu_forward(x, weight, bias, EPS)?,
        bench::cpu_backward(x, weight, dy, EPS)?,
    );
    let mut turns = cpu::Turns::new(args.reps);
    turns.add_roofs("fwd", bytes);
    turns.add("fwd", "kernel", || Ok(forward_kernel()?));
    turns.add("fwd", "ours", || {
        let _ = bench::layer_norm(x, weight, bias, EPS)?;
        Ok(())
    });
    if weight.dtype() == x.dtype() && x.dtype() != DType::F64 {
        turns.add("fwd", "candle_fused", || {
            candle_nn::ops::layer_norm(x, weight, bias, EPS as f32)?;
            Ok(())
        });
    }
    turns.add_roofs("bwd", bytes);
    turns.add("bwd", "kernel", || Ok(backward_kernel()?));
    turns.add("bwd", "ours", || {
        backward(dy)?;
        Ok(())
    });
    if args.slow {
        turns.add_for(3, "fwd", "candle_slow", || {
            candle_nn::ops::layer_norm_slow(x, weight, bias, EPS as f32)?;
            Ok(())
        });
        // The graph's own part: what candle's backward does for sum(y * dy) before it reaches the norm is in it too.
        let y = candle_nn::ops::layer_norm_slow(x, weight, bias, EPS as f32)?;
        let loss = (y * dy)?.sum_all()?;
        turns.add_for(3, "bwd", "candle_slow", move || {
            loss.backward()?;
            Ok(())
        });
    }
    turns.run()
}

/// Compares results with the composed ops in f64, by the norm of the difference.
fn check(
    x: &Tensor,
    weight: &Var,
    bias: &Var,
    dy: &Tensor,
    y: &Tensor,
    backward: &dyn Fn(&Tensor) -> Result<bench::Gradients, candle_core::Error>,
) -> Result<()> {
    let (rows, cols) = x.dims2()?;
    // f64 copies of everything: bounded, and the first rows show as much as all of them.
    let sample = rows.min((1usize << 25).div_ceil(cols));
    let wide = |t: &Tensor| -> Result<Var> { Ok(Var::from_tensor(&t.to_dtype(DType::F64)?)?) };
    let (x64, w64, b64) = (wide(&x.narrow(0, 0, sample)?)?, wide(weight)?, wide(bias)?);
    let y64 = composed::normalize(&x64, &[cols], Some(&w64), Some(&b64), &EPS.into())?;
    let tolerance = match x.dtype() {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        _ => 1e-2,
    };
    let close = |what: &str, got: &Tensor, want: &Tensor| -> Result<()> {
        let got = got.to_dtype(DType::F64)?;
        let norm =
            |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
        let error = norm(&(got - want)?)? / norm(want)?;
        ensure!(
            error < tolerance,
            "{what} of {rows} x {cols} {:?} is off by {error:e}",
            x.dtype()
        );
        Ok(())
    };
    close("y", &y.narrow(0, 0, sample)?, &y64)?;
    let dy64 = dy.narrow(0, 0, sample)?.to_dtype(DType::F64)?;
    let grads = (y64 * dy64)?.sum_all()?.backward()?;
    let want = |var: &Var| grads.get(var).context("the composed op gave no gradient");
    let (Some(dx), Some(dweight), Some(dbias)) = backward(dy)? else {
        bail!("a gradient is missing")
    };
    close("dx", &dx.narrow(0, 0, sample)?, want(&x64)?)?;
    // Sums over all rows, of which a sample says nothing.
    if sample == rows {
        close("dweight", &dweight, want(&w64)?)?;
        close("dbias", &dbias, want(&b64)?)?;
    }
    // Not the timed shape's only use of the op: the untracked path gives the same values.
    let free = ops::layer_norm(
        &x.detach(),
        &weight.as_detached_tensor(),
        &bias.as_detached_tensor(),
        EPS as f32,
    )?;
    close(
        "y, untracked,",
        &free.narrow(0, 0, sample)?,
        &y.narrow(0, 0, sample)?.to_dtype(DType::F64)?,
    )
}
