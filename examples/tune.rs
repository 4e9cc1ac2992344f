//! Measures the kernels and grids that could run each shape on the GPU at hand, and writes those that beat the built-in plan to a
//! tuning file, for `tuning::load` or the environment variable CANDLE_FUSED_LAYER_NORM_TUNING.
//!
//! ```sh
//! cargo run --release --features cuda --example tune -- --shapes 512x768,8192x4096 --dtypes bf16 --output tuning.json
//! ```
//!
//! A time is the median over `--reps` calls, taken as in `benches/layer_norm.rs`. Every result is first compared with the composed
//! ops in f64. The best candidate is measured again in turns with the built-in plan, and kept if it wins again: the least of many
//! times is also the luckiest.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_layer_norm::bench::{self, Access, Candidates, Choice};
use candle_fused_layer_norm::composed;
use candle_fused_layer_norm::tuning::{self, Direction, Entry, File};
use clap::Parser;
use std::path::PathBuf;

// Only its times are of use here.
#[allow(dead_code)]
#[path = "../benches/support/cuda.rs"]
mod cuda;

/// What `benches/support/cuda.rs` implements.
#[allow(dead_code)]
trait Bench {
    fn time(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
    fn roof(&mut self, inputs: usize, bytes: usize) -> Result<f64>;
    fn wall(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
}

#[derive(Parser)]
#[command(about = "Measures LayerNorm's kernels on this GPU and writes a tuning file")]
struct Args {
    /// Shapes, as rows x columns.
    #[arg(long, value_delimiter = ',', value_name = "RxC", value_parser = parse_shape)]
    shapes: Vec<(usize, usize)>,
    /// f32, bf16, f16, f64.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "f32,bf16",
        value_name = "DTYPE",
        value_parser = parse_dtype
    )]
    dtypes: Vec<DType>,
    /// Weight and bias in f32 beside half activations.
    #[arg(long)]
    mixed: bool,
    /// Elements that come before x in its memory: x is a view that does not start on 16 bytes.
    #[arg(long, default_value_t = 0, value_name = "ELEMENTS")]
    offset: usize,
    /// The tuning file to write, in place of one that is there.
    #[arg(long, default_value = "tuning.json", value_name = "FILE")]
    output: PathBuf,
    /// Calls timed for each number.
    #[arg(long, default_value_t = 15, value_parser = parse_reps)]
    reps: usize,
    /// Percent of the built-in plan's time that a choice must save to be written.
    #[arg(long, default_value_t = 2., value_name = "PERCENT", value_parser = parse_percent)]
    least_gain: f64,
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

fn parse_dtype(text: &str) -> Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        "f64" => Ok(DType::F64),
        _ => Err(format!("expected f32, bf16, f16 or f64, got `{text}`")),
    }
}

fn parse_reps(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(reps) if reps > 0 => Ok(reps),
        _ => Err(format!("expected 1 or more, got `{text}`")),
    }
}

fn parse_percent(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(percent) if (0. ..100.).contains(&percent) => Ok(percent),
        _ => Err(format!("expected 0 or more, less than 100, got `{text}`")),
    }
}

const SHAPES: &[(usize, usize)] = &[
    (512, 768),
    (2048, 1024),
    (65536, 256),
    (32768, 768),
    (32768, 1024),
    (16384, 2048),
    (16384, 4096),
    (8192, 8192),
    (2048, 32768),
    (512, 131072),
    (128, 1048576),
    (16, 4194304),
];
const EPS: f64 = 1e-5;
/// Elements of which the reference is computed at once: its copies in f64 are many.
const REFERENCE_ELEMENTS: usize = 1 << 24;
/// Measurements in turns that confirm a gain. Odd, for a median.
const ROUNDS: usize = 3;

fn main() -> Result<()> {
    let args = Args::parse();
    // The built-in plan is what is compared with, whatever the environment names.
    tuning::clear();
    let device = Device::new_cuda(0)?;
    let (gpu, multiprocessors) = bench::gpu(&device)?;
    println!("{gpu}, {multiprocessors} multiprocessors");
    let mut tuner = Tuner {
        machine: cuda::Cuda::new(&device, args.reps)?,
        most_share: 1. - args.least_gain / 100.,
    };
    println!(
        "{:<4} {:<5} {:>7} x {:<8} {:<28} {:>5} {:>6} {:>10} {:>14}",
        "dir", "dtype", "rows", "cols", "kernel", "warps", "blocks", "us", "us / built-in"
    );
    let shapes = match args.shapes.as_slice() {
        [] => SHAPES,
        given => given,
    };
    let mut file = File::new(gpu, multiprocessors, Vec::new());
    for &dtype in &args.dtypes {
        for &(rows, cols) in shapes {
            let case = Case::random(&args, &device, dtype, rows, cols)?;
            file.choices.extend(tuner.tune(&case)?);
            // After each case: an error later does not lose what was measured.
            file.write(&args.output)?;
        }
    }
    report(&args, &file);
    Ok(())
}

fn report(args: &Args, file: &File) {
    let (path, count) = (args.output.display(), file.choices.len());
    println!(
        "\n{path}: {count} choices that save {}% or more",
        args.least_gain
    );
    for entry in &file.choices {
        println!(
            "{:<4} {:<5} {:>7} x {:<8} {:<28} {:>5} {:>6} {:>10.1} {:>14.3}",
            name(entry.dir),
            entry.dtype,
            entry.rows,
            entry.cols,
            entry.kernel,
            entry.warps,
            entry.blocks,
            entry.us,
            entry.us / entry.builtin_us
        );
    }
    if count > 0 {
        println!("to use them: {}={path} your-program", tuning::VARIABLE);
        println!("or, in the program: candle_fused_layer_norm::tuning::load(\"{path}\")?");
    }
}

fn name(dir: Direction) -> &'static str {
    match dir {
        Direction::Forward => "fwd",
        Direction::Backward => "bwd",
    }
}

/// One shape and dtype.
struct Case {
    x: Tensor,
    weight: Var,
    bias: Var,
    dy: Tensor,
    rows: usize,
    cols: usize,
}

impl Case {
    fn random(
        args: &Args,
        device: &Device,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let param_dtype = match dtype {
            DType::BF16 | DType::F16 if args.mixed => DType::F32,
            dtype => dtype,
        };
        let random = |shape: &[usize], mean: f32, std: f32, dtype| -> Result<Tensor> {
            Ok(Tensor::randn(mean, std, shape, device)?.to_dtype(dtype)?)
        };
        let memory = Var::from_tensor(&random(&[args.offset + rows * cols], 0.7, 1.5, dtype)?)?;
        Ok(Self {
            x: memory
                .narrow(0, args.offset, rows * cols)?
                .reshape((rows, cols))?,
            weight: Var::from_tensor(&random(&[cols], 1., 0.2, param_dtype)?)?,
            bias: Var::from_tensor(&random(&[cols], 0., 0.2, param_dtype)?)?,
            dy: random(&[rows, cols], 0., 1., dtype)?,
            rows,
            cols,
        })
    }

    fn describe(&self, dir: Direction) -> String {
        let dtype = self.x.dtype().as_str();
        format!("{} of {} x {} {dtype}", name(dir), self.rows, self.cols)
    }

    fn entry(&self, dir: Direction, access: Access, choice: Choice, us: [f64; 2]) -> Entry {
        Entry {
            dir,
            dtype: self.x.dtype().as_str().into(),
            param_dtype: self.weight.dtype().as_str().into(),
            access,
            rows: self.rows,
            cols: self.cols,
            kernel: choice.entry.into(),
            warps: choice.warps,
            blocks: choice.blocks,
            us: us[1],
            builtin_us: us[0],
        }
    }

    /// The results of a forward pass and of a backward pass, from the composed ops in f64.
    fn reference(&self) -> Result<[Expected; 2]> {
        let f64_var =
            |t: &Tensor| -> Result<Var> { Ok(Var::from_tensor(&t.to_dtype(DType::F64)?)?) };
        let (weight, bias) = (f64_var(&self.weight)?, f64_var(&self.bias)?);
        let step = (REFERENCE_ELEMENTS / self.cols).max(1);
        let (mut y, mut dx) = (Vec::new(), Vec::new());
        let (mut dweight, mut dbias) = (weight.zeros_like()?, bias.zeros_like()?);
        for first in (0..self.rows).step_by(step) {
            let rows = step.min(self.rows - first);
            let x = f64_var(&self.x.narrow(0, first, rows)?)?;
            let dy = self.dy.narrow(0, first, rows)?.to_dtype(DType::F64)?;
            let part =
                composed::normalize(&x, &[self.cols], Some(&weight), Some(&bias), &EPS.into())?;
            let grads = (&part * dy)?.sum_all()?.backward()?;
            let gradient = |var: &Var| grads.get(var).context("the composed op gave no gradient");
            y.push(part.detach());
            dx.push(gradient(&x)?.detach());
            dweight = (dweight + gradient(&weight)?)?.detach();
            dbias = (dbias + gradient(&bias)?)?.detach();
        }
        Ok([
            vec![("y", y)],
            vec![
                ("dx", dx),
                ("dweight", vec![dweight]),
                ("dbias", vec![dbias]),
            ],
        ])
    }

    /// Compares results with the reference, by the norm of the difference.
    fn check(&self, got: &[Tensor], expected: &Expected) -> Result<()> {
        let tolerance = match self.x.dtype() {
            DType::F64 => 1e-12,
            DType::F32 => 1e-5,
            _ => 1e-2,
        };
        ensure!(got.len() == expected.len(), "a result is missing");
        for (got, (what, parts)) in got.iter().zip(expected) {
            let error = distance(got, parts)?;
            ensure!(error < tolerance, "{what} is off by {error:e}");
        }
        Ok(())
    }
}

/// Names and values, in parts along the first dim.
type Expected = Vec<(&'static str, Vec<Tensor>)>;

/// The norm of the difference, relative to that of the reference.
fn distance(got: &Tensor, parts: &[Tensor]) -> Result<f64> {
    let square = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?) };
    let (mut first, mut difference, mut norm) = (0, 0., 0.);
    for want in parts {
        let rows = want.dim(0)?;
        let got = got.narrow(0, first, rows)?.to_dtype(DType::F64)?;
        difference += square(&(got - want)?)?;
        norm += square(want)?;
        first += rows;
    }
    Ok((difference / norm).sqrt())
}

/// A forward or a backward pass over a case.
struct Pass<'a> {
    dir: Direction,
    case: &'a Case,
    candidates: Candidates,
    expected: &'a Expected,
    call: &'a dyn Fn() -> Result<Vec<Tensor>>,
}

impl Pass<'_> {
    /// Runs `f`, in which this pass takes this choice.
    fn with<T>(&self, choice: Choice, f: impl FnOnce() -> T) -> T {
        match self.dir {
            Direction::Forward => bench::forced(Some(choice), None, f),
            Direction::Backward => bench::forced(None, Some(choice), f),
        }
    }

    fn print(&self, choice: Choice, rest: &str) {
        println!(
            "{:<4} {:<5} {:>7} x {:<8} {:<28} {:>5} {:>6} {rest}",
            name(self.dir),
            self.case.x.dtype().as_str(),
            self.case.rows,
            self.case.cols,
            choice.entry,
            choice.warps,
            choice.blocks,
        );
    }
}

struct Tuner {
    machine: cuda::Cuda,
    /// Of the built-in plan's time, for a choice that is kept.
    most_share: f64,
}

impl Tuner {
    fn tune(&mut self, case: &Case) -> Result<Vec<Entry>> {
        let [forward_expected, backward_expected] = case.reference()?;
        let Case {
            x,
            weight,
            bias,
            dy,
            ..
        } = case;
        let forward = || Ok(vec![bench::layer_norm(x, weight, bias, EPS)?.0]);
        let mut kept = Vec::new();
        kept.extend(self.measure(&Pass {
            dir: Direction::Forward,
            case,
            candidates: bench::forward_candidates(x, weight, bias)?,
            expected: &forward_expected,
            call: &forward,
        })?);
        drop(forward_expected);
        let (_, gradients) = bench::layer_norm(x, weight, bias, EPS)?;
        let backward = || {
            let (dx, dweight, dbias) = gradients(dy)?;
            Ok([dx, dweight, dbias].into_iter().flatten().collect())
        };
        kept.extend(self.measure(&Pass {
            dir: Direction::Backward,
            case,
            candidates: bench::backward_candidates(x, weight, dy)?,
            expected: &backward_expected,
            call: &backward,
        })?);
        Ok(kept)
    }

    /// The best choice, if it beats the built-in plan.
    fn measure(&mut self, pass: &Pass<'_>) -> Result<Option<Entry>> {
        let (&builtin, others) = pass
            .candidates
            .choices
            .split_first()
            .context("there is no candidate")?;
        let describe = || pass.case.describe(pass.dir);
        let outputs = pass
            .with(builtin, pass.call)
            .with_context(|| format!("{}: the built-in plan fails", describe()))?;
        let builtin_us = self.check_and_time(pass, builtin, outputs)?;
        pass.print(builtin, &format!("{builtin_us:>10.1} {:>14.3}", 1.));
        let mut best = (builtin, builtin_us);
        for &choice in others {
            match pass.with(choice, pass.call) {
                Ok(outputs) => {
                    let us = self.check_and_time(pass, choice, outputs)?;
                    pass.print(choice, &format!("{us:>10.1} {:>14.3}", us / builtin_us));
                    if us < best.1 {
                        best = (choice, us);
                    }
                }
                Err(error) => pass.print(choice, &format!("skipped: {}", first_line(&error))),
            }
        }
        if best.0 == builtin || best.1 > builtin_us * self.most_share {
            return Ok(None);
        }
        let us = self.in_turns(pass, [builtin, best.0])?;
        if us[1] > us[0] * self.most_share {
            pass.print(
                best.0,
                &format!("{:>10.1} {:>14.3} again: not kept", us[1], us[1] / us[0]),
            );
            return Ok(None);
        }
        let access = pass.candidates.access;
        Ok(Some(pass.case.entry(pass.dir, access, best.0, us)))
    }

    fn check_and_time(
        &mut self,
        pass: &Pass<'_>,
        choice: Choice,
        outputs: Vec<Tensor>,
    ) -> Result<f64> {
        pass.case
            .check(&outputs, pass.expected)
            .with_context(|| format!("{}: {choice:?}", pass.case.describe(pass.dir)))?;
        drop(outputs);
        self.time(pass, choice)
    }

    fn time(&mut self, pass: &Pass<'_>, choice: Choice) -> Result<f64> {
        let mut call = || {
            (pass.call)()?;
            Ok(())
        };
        pass.with(choice, || self.machine.time(&mut call))
    }

    /// Each choice's median of several measurements.
    fn in_turns(&mut self, pass: &Pass<'_>, choices: [Choice; 2]) -> Result<[f64; 2]> {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (choice, times) in choices.into_iter().zip(&mut times) {
                times.push(self.time(pass, choice)?);
            }
        }
        Ok(times.map(cuda::median))
    }
}

/// Without candle's backtrace.
fn first_line(error: &anyhow::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}
