//! Trains a small GPT on text, character by character, and lets it write.
//!
//! `cargo run --release --example transformer -- --help`; README.md beside this file shows runs.

mod checkpoint;
mod compare;
mod data;
mod evaluate;
mod memory;
mod model;
mod ops;
mod optimizer;
mod parallel;
mod plot;
mod record;
mod settings;
mod train;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, DeviceLocation};
use checkpoint::Checkpoint;
use clap::{Args, Parser, Subcommand};
use data::Corpus;
use evaluate::Report;
use indicatif::HumanCount;
use model::Sampling;
use ops::{Purpose, rng};
use parallel::{Alone, Collective};
use record::{Files, Recorder, say};
use settings::{Overrides, Preset, Settings};
use std::{path::PathBuf, process::ExitCode, sync::atomic::Ordering, time::Duration};
use train::{Limits, Summary, Trainer};

/// Trains a small GPT on text, character by character, and lets it write.
#[derive(Clone, Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Trains a model; what happens without a subcommand
    Train(TrainArgs),
    /// Lets the model of a checkpoint write
    Sample(SampleArgs),
    /// Tells the loss of a checkpoint on the held-out text, in three ways
    Evaluate(EvaluateArgs),
    /// Trains with each of the three layer norms from the same seed, and shows the difference
    Compare(CompareArgs),
}

/// Where and on what to train.
#[derive(Clone, Debug, Default, Args)]
struct Source {
    /// The text to train on, instead of this crate's own sources
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Use the CPU even where CUDA could be used
    #[arg(long)]
    cpu: bool,

    /// Multiply f32 matrices in TF32 on CUDA: faster, with 10 bits of mantissa
    #[arg(long)]
    tf32: bool,

    /// Where to begin: sizes, schedule, batches; without it `quick`
    #[arg(long)]
    preset: Option<Preset>,

    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Clone, Debug, Args)]
struct TrainArgs {
    #[command(flatten)]
    source: Source,

    /// Where to put checkpoints, metrics and the loss curve; nothing is written without it
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Go on from the last checkpoint in --out, with its settings
    #[arg(long, requires = "out")]
    resume: bool,

    /// Stop after this time, as Ctrl-C does: with a checkpoint, after a whole step
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    max_seconds: Option<f64>,

    /// GPUs to share each batch out to; needs the feature nccl for more than one
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: usize,

    /// Characters to write after training
    #[arg(long, value_name = "CHARS", default_value_t = 400)]
    sample_length: usize,

    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Clone, Debug, Args)]
struct SamplingArgs {
    /// How freely to write: 0 takes the likeliest character each time
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    temperature: f64,

    /// Pick only among this many of the likeliest characters
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
}

#[derive(Clone, Debug, Args)]
struct SampleArgs {
    /// The checkpoint: a file, such as DIR/best.safetensors
    #[arg(value_name = "FILE")]
    checkpoint: PathBuf,

    /// What to continue
    #[arg(long, value_name = "TEXT", default_value = "\n")]
    prompt: String,

    /// Characters to write
    #[arg(long, value_name = "CHARS", default_value_t = 500)]
    length: usize,

    /// Decides the sample
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Use the CPU even where CUDA could be used
    #[arg(long)]
    cpu: bool,

    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Clone, Debug, Args)]
struct EvaluateArgs {
    /// The checkpoint: a file, such as DIR/best.safetensors
    #[arg(value_name = "FILE")]
    checkpoint: PathBuf,

    /// The text that it was trained on, if that was not this crate's own sources
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Decides the random batches
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Use the CPU even where CUDA could be used
    #[arg(long)]
    cpu: bool,
}

#[derive(Clone, Debug, Args)]
struct CompareArgs {
    #[command(flatten)]
    source: Source,

    /// Where to put the files of each run, and the picture
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl SamplingArgs {
    fn sampling(&self) -> Result<Sampling> {
        ensure!(
            self.temperature.is_finite() && self.temperature >= 0.,
            "--temperature is {}: give a finite number that is 0 or above",
            self.temperature
        );
        ensure!(self.top_k != Some(0), "--top-k is 0: give at least 1");
        Ok(Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
        })
    }
}

fn device(cpu: bool, index: usize) -> Device {
    if cpu {
        return Device::Cpu;
    }
    Device::cuda_if_available(index).unwrap_or_else(|error| {
        eprintln!("CUDA cannot be used, going on with the CPU: {error}");
        Device::Cpu
    })
}

fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cuda { gpu_id } => format!("CUDA {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal {gpu_id}"),
        DeviceLocation::Cpu => "CPU".to_owned(),
    }
}

impl Source {
    /// The settings of a new run.
    fn settings(&self) -> Result<Settings> {
        let settings = self
            .overrides
            .apply(&self.preset.unwrap_or_default().settings());
        settings.validate()?;
        Ok(settings)
    }
}

/// A run, ready to begin on any rank.
#[derive(Clone)]
struct Plan {
    args: TrainArgs,
    settings: Settings,
    checkpoint: Option<std::sync::Arc<Checkpoint>>,
    corpus: std::sync::Arc<Corpus>,
    limits: Limits,
}

impl Plan {
    fn new(args: &TrainArgs, limits: Limits) -> Result<Self> {
        args.sampling.sampling()?;
        let mut limits = limits;
        if let Some(seconds) = args.max_seconds {
            let time = Duration::try_from_secs_f64(seconds);
            limits.time = Some(time.with_context(|| {
                format!("--max-seconds is {seconds}: give a finite number that is 0 or above")
            })?);
        }
        let (settings, checkpoint) = match (&args.out, args.resume) {
            (Some(out), true) => {
                let path = Files::new(out).last();
                ensure!(
                    path.exists(),
                    "{} does not exist: leave --resume out to begin a run there",
                    path.display()
                );
                let checkpoint = Checkpoint::load(&path)?;
                let settings = checkpoint.progress.settings.clone();
                let preset = args.source.preset.map(Preset::settings);
                let given = args
                    .source
                    .overrides
                    .apply(preset.as_ref().unwrap_or(&settings));
                let differences = settings.differences(&given);
                ensure!(
                    differences.is_empty(),
                    "{} has other settings: {}; leave {} out to go on",
                    path.display(),
                    differences.join("; "),
                    match preset {
                        Some(_) => "--preset and what changes it",
                        None => "them",
                    }
                );
                (settings, Some(checkpoint))
            }
            (Some(out), false) => {
                let path = Files::new(out).last();
                ensure!(
                    !path.exists(),
                    "{} belongs to a run: go on with it by --resume, or give --out another directory",
                    path.display()
                );
                (args.source.settings()?, None)
            }
            (None, _) => (args.source.settings()?, None),
        };
        let text = args.source.text.as_deref();
        let corpus = Corpus::load(text, settings.context, None)?;
        if let Some(checkpoint) = &checkpoint {
            ensure!(
                checkpoint.vocabulary() == corpus.vocabulary,
                "the checkpoint has a vocabulary of {} characters, the text has another of {}: give --text the file that \
                 the run began with",
                checkpoint.vocabulary().len(),
                corpus.vocabulary.len()
            );
        }
        #[cfg(feature = "cuda")]
        candle_core::cuda::set_gemm_reduced_precision_f32(args.source.tf32);
        Ok(Self {
            args: args.clone(),
            settings,
            checkpoint: checkpoint.map(Into::into),
            corpus: corpus.into(),
            limits,
        })
    }

    /// The part of one rank, from the first step to the sample.
    fn run(&self, collective: impl Collective, device: Device) -> Result<Summary> {
        let settings = &self.settings;
        let (rank, ranks) = (collective.rank(), collective.ranks());
        let checkpoint = self.checkpoint.as_deref();
        let mut trainer = Trainer::new(
            settings,
            &self.corpus,
            checkpoint,
            collective,
            device.clone(),
        )?;
        if rank > 0 {
            return trainer.run(&self.limits, None);
        }
        match ranks {
            1 => say(format_args!("device: {}", device_name(&device))),
            _ => say(format_args!("device: {ranks} GPUs")),
        }
        say(format_args!(
            "text: {} characters to train on, {} held out, {} different ones",
            HumanCount(self.corpus.train.len() as u64),
            HumanCount(self.corpus.held_out.len() as u64),
            self.corpus.vocabulary.len()
        ));
        say(format_args!(
            "parameters: {}",
            HumanCount(trainer.parameters() as u64)
        ));
        let done = checkpoint.map_or(0, |checkpoint| checkpoint.progress.step);
        if done > 0 {
            say(format_args!("going on after step {done}"));
        }
        let title = format!(
            "{} layers, {} channels, {} norm, {:?}, seed {}",
            settings.layers,
            settings.channels,
            settings.norm.name(),
            settings.dtype,
            settings.seed
        );
        let out = self.args.out.as_deref();
        let mut recorder = Recorder::new(out, title, done, settings.steps)?;
        let summary = trainer.run(&self.limits, Some(&mut recorder))?;
        recorder.finish();

        let (step, steps) = (summary.step, settings.steps);
        if summary.steps_done == 0 {
            say(format_args!("{step} of {steps} steps: nothing was left"));
        } else {
            let seconds = summary.time.as_secs_f64();
            let tokens = (summary.steps_done * settings.batch_size * settings.context) as f64;
            say(format_args!(
                "{step} of {steps} steps, {seconds:.1} s of training in this run, {} tokens/s",
                HumanCount((tokens / seconds.max(1e-9)) as u64),
            ));
        }
        if let Some(best) = &summary.best {
            say(format_args!(
                "best held-out loss: {:.4} after step {}",
                best.held_out, best.step
            ));
        }
        if !summary.finished {
            match out {
                Some(_) => say("stopped early: go on with --resume"),
                None => say("stopped early, nothing was saved: give --out to save"),
            }
            return Ok(summary);
        }
        let vocabulary = &self.corpus.vocabulary;
        let prompt = vocabulary.encode("\n").unwrap_or_else(|_| vec![0]);
        let sampling = self.args.sampling.sampling()?;
        let mut rng = rng(settings.seed, Purpose::Sample, 0, 0);
        let length = self.args.sample_length;
        let sample = trainer
            .gpt()
            .generate(&prompt, length, sampling, &mut rng)?;
        say(format_args!("sample:\n{}", vocabulary.decode(&sample)));
        Ok(summary)
    }
}

fn train(args: &TrainArgs, limits: Limits) -> Result<Summary> {
    ensure!(args.gpus > 0, "--gpus is 0: give at least 1");
    let plan = Plan::new(args, limits)?;
    if args.gpus == 1 {
        return plan.run(Alone, device(args.source.cpu, 0));
    }
    ensure!(
        !args.source.cpu,
        "--gpus {} and --cpu: give one of them",
        args.gpus
    );
    train_on_gpus(plan, args.gpus)
}

#[cfg(feature = "nccl")]
fn train_on_gpus(plan: Plan, gpus: usize) -> Result<Summary> {
    let id = cudarc::nccl::Id::new().map_err(parallel::nccl_error)?;
    parallel::run(gpus, move |rank| {
        let device = Device::new_cuda_with_stream(rank).with_context(|| format!("GPU {rank}"))?;
        let nccl = parallel::Nccl::new(device.as_cuda_device()?, rank, gpus, id)?;
        plan.run(nccl, device)
    })
    .inspect_err(|_| parallel::exit_for_sure())
}

#[cfg(not(feature = "nccl"))]
fn train_on_gpus(_: Plan, gpus: usize) -> Result<Summary> {
    anyhow::bail!("--gpus {gpus}: build with --features nccl for more than one GPU")
}

fn sample(args: &SampleArgs) -> Result<String> {
    let sampling = args.sampling.sampling()?;
    let checkpoint = Checkpoint::load(&args.checkpoint)?;
    let vocabulary = checkpoint.vocabulary();
    let prompt = vocabulary
        .encode(&args.prompt)
        .context("--prompt cannot be used with this checkpoint")?;
    ensure!(
        !prompt.is_empty(),
        "--prompt is empty: give at least one character"
    );
    let gpt = checkpoint.model(&device(args.cpu, 0))?;
    let mut rng = rng(args.seed, Purpose::Sample, 0, 0);
    let ids = gpt.generate(&prompt, args.length, sampling, &mut rng)?;
    Ok(vocabulary.decode(&ids))
}

fn evaluate(args: &EvaluateArgs) -> Result<Report> {
    let checkpoint = Checkpoint::load(&args.checkpoint)?;
    let context = checkpoint.progress.settings.context;
    let corpus = Corpus::load(args.text.as_deref(), context, None)?;
    Report::new(&checkpoint, &corpus, args.seed, &device(args.cpu, 0))
}

/// Limits that Ctrl-C sets. A second one ends the process at once.
fn limits() -> Result<Limits> {
    let limits = Limits::default();
    let stop = limits.stop.clone();
    ctrlc::set_handler(move || {
        if stop.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing the step");
    })
    .context("cannot listen to Ctrl-C")?;
    Ok(limits)
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        None => train(&cli.train, limits()?).map(drop),
        Some(Command::Train(args)) => train(args, limits()?).map(drop),
        Some(Command::Sample(args)) => {
            say(sample(args)?);
            Ok(())
        }
        Some(Command::Evaluate(args)) => {
            say(evaluate(args)?);
            Ok(())
        }
        Some(Command::Compare(args)) => compare::run(&args.source, &args.out),
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests;
