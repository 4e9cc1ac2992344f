//! Trains a small GPT on text, byte by byte, and lets it write.
//!
//! `cargo run --release --example transformer -- --help`

mod data;
mod model;
mod train;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, DeviceLocation};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use data::Corpus;
use indicatif::HumanCount;
use model::{Config, Gpt};
use rand::{SeedableRng, rngs::StdRng};
use std::{path::PathBuf, process::ExitCode};

/// Trains a small GPT on text, byte by byte, and lets it write.
// The defaults keep tensors below the 65,536 elements from which candle's CPU backend splits elementwise ops over
// threads that wait by spinning: on a busy machine that is several times slower.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The text to train on, instead of this crate's own sources
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Use the CPU even where CUDA could be used
    #[arg(long)]
    cpu: bool,

    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 2000)]
    steps: usize,

    /// Windows of text in a step
    #[arg(long, value_name = "N", default_value_t = 2)]
    batch_size: usize,

    /// Bytes in a window, the most that the model looks back on
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    context: usize,

    /// Transformer blocks
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,

    /// Attention heads, a divisor of the channels
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,

    /// Width of the model
    #[arg(long, value_name = "N", default_value_t = 96)]
    channels: usize,

    /// Highest learning rate, after the warm-up and before the decay
    #[arg(
        long,
        value_name = "RATE",
        default_value_t = 1.5e-3,
        allow_negative_numbers = true
    )]
    learning_rate: f64,

    /// Steps from one evaluation to the next
    #[arg(long, value_name = "STEPS", default_value_t = 250)]
    eval_every: usize,

    /// Decides the first weights, the batches and the sample; on the CPU, all results
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Bytes to write after training
    #[arg(long, value_name = "BYTES", default_value_t = 400)]
    sample_length: usize,

    /// How freely the sample is written: 0 takes the likeliest byte each time
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    temperature: f64,
}

impl Args {
    fn validate(&self) -> Result<()> {
        // The upper bound is beyond every use; it keeps products of sizes from overflowing.
        for (name, size, max) in [
            ("steps", self.steps, u32::MAX as usize),
            ("batch-size", self.batch_size, 1 << 16),
            ("context", self.context, 1 << 16),
            ("layers", self.layers, 1 << 16),
            ("heads", self.heads, 1 << 16),
            ("channels", self.channels, 1 << 16),
            ("eval-every", self.eval_every, usize::MAX),
        ] {
            ensure!(size > 0, "--{name} is 0: give at least 1");
            ensure!(size <= max, "--{name} is {size}: give at most {max}");
        }
        ensure!(
            self.channels.is_multiple_of(self.heads),
            "--channels {} is not divisible by --heads {}: give a multiple",
            self.channels,
            self.heads
        );
        ensure!(
            self.learning_rate.is_finite() && self.learning_rate > 0.,
            "--learning-rate is {}: give a finite number above 0",
            self.learning_rate
        );
        ensure!(
            self.temperature.is_finite() && self.temperature >= 0.,
            "--temperature is {}: give a finite number that is 0 or above",
            self.temperature
        );
        Ok(())
    }

    fn device(&self) -> Device {
        if self.cpu {
            return Device::Cpu;
        }
        Device::cuda_if_available(0).unwrap_or_else(|error| {
            eprintln!("CUDA cannot be used, going on with the CPU: {error}");
            Device::Cpu
        })
    }

    fn config(&self) -> Config {
        Config {
            vocab_size: data::VOCAB_SIZE,
            context: self.context,
            layers: self.layers,
            heads: self.heads,
            channels: self.channels,
        }
    }

    fn train_options(&self) -> train::Options {
        train::Options {
            steps: self.steps,
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            eval_every: self.eval_every,
        }
    }
}

fn run(args: &Args) -> Result<train::Summary> {
    args.validate()?;
    let corpus = Corpus::load(args.text.as_deref(), args.context)?;
    let device = args.device();
    let mut rng = StdRng::seed_from_u64(args.seed);

    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
    let gpt = Gpt::new(args.config(), vb)?;
    model::init(&varmap, args.layers, &mut rng)?;

    let parameters: usize = varmap.all_vars().iter().map(|var| var.elem_count()).sum();
    match device.location() {
        DeviceLocation::Cuda { gpu_id } => println!("device: CUDA {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => println!("device: Metal {gpu_id}"),
        DeviceLocation::Cpu => println!("device: CPU"),
    }
    println!(
        "text: {} bytes to train on, {} held out",
        HumanCount(corpus.train.len() as u64),
        HumanCount(corpus.held_out.len() as u64)
    );
    println!("parameters: {}", HumanCount(parameters as u64));

    let options = args.train_options();
    let summary = train::train(&gpt, &varmap, &corpus, &options, &device, &mut rng)?;
    println!(
        "held-out loss {:.3} before, {:.3} after {} steps; {:.1} s of training, {} tokens/s",
        summary.before.held_out,
        summary.after.held_out,
        args.steps,
        summary.time.as_secs_f64(),
        HumanCount(summary.tokens_per_second()),
    );

    let prompt = [u32::from(b'\n')];
    let sample = gpt.generate(&prompt, args.sample_length, args.temperature, &mut rng)?;
    println!("sample:\n{}", data::decode(&sample));
    Ok(summary)
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn args(line: &str) -> Args {
        Args::try_parse_from(
            ["transformer", "--cpu"]
                .into_iter()
                .chain(line.split_whitespace()),
        )
        .unwrap()
    }

    const SMALL: &str = "--steps 30 --batch-size 4 --context 16 --layers 1 --heads 2 --channels 16 \
                         --eval-every 10 --sample-length 5 --learning-rate 0.01 --seed 3";

    fn small() -> Args {
        args(SMALL)
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_loss_falls() {
        let train::Summary { before, after, .. } = run(&small()).unwrap();
        // An untrained model spreads its guesses evenly over the bytes.
        assert!((before.held_out - 256f64.ln()).abs() < 0.1, "{before}");
        assert!(after.train < before.train - 1., "{before}; {after}");
        assert!(after.held_out < before.held_out - 1., "{before}; {after}");
    }

    #[test]
    fn the_seed_decides_the_losses() {
        let losses = |args: &Args| run(args).unwrap().after.held_out.to_bits();
        assert_eq!(losses(&small()), losses(&small()));
        let other_seed = Args { seed: 4, ..small() };
        assert_ne!(losses(&small()), losses(&other_seed));
    }

    #[test]
    fn bad_arguments_are_one_line_that_says_what_to_do() {
        for (line, expected) in [
            ("--steps 0", "--steps is 0: give at least 1"),
            ("--batch-size 0", "--batch-size is 0: give at least 1"),
            ("--context 0", "--context is 0: give at least 1"),
            ("--layers 0", "--layers is 0: give at least 1"),
            ("--heads 0", "--heads is 0: give at least 1"),
            ("--channels 0", "--channels is 0: give at least 1"),
            ("--eval-every 0", "--eval-every is 0: give at least 1"),
            (
                "--channels 100000",
                "--channels is 100000: give at most 65536",
            ),
            (
                "--channels 100 --heads 3",
                "--channels 100 is not divisible by --heads 3: give a multiple",
            ),
            (
                "--learning-rate inf",
                "--learning-rate is inf: give a finite number above 0",
            ),
            (
                "--learning-rate 0",
                "--learning-rate is 0: give a finite number above 0",
            ),
            (
                "--temperature NaN",
                "--temperature is NaN: give a finite number that is 0 or above",
            ),
            (
                "--temperature -1",
                "--temperature is -1: give a finite number that is 0 or above",
            ),
            (
                "--text no/such/file",
                "cannot read no/such/file: give --text a readable file: ",
            ),
            (
                "--context 60000",
                "the built-in text is too short: the tenth that is held out has ",
            ),
        ] {
            let error = format!("{:#}", run(&args(line)).unwrap_err());
            assert!(error.starts_with(expected), "{line}: {error}");
            assert!(!error.contains('\n'), "{line}: {error}");
        }
    }

    #[test]
    fn a_text_must_be_long_enough() {
        let path = std::env::temp_dir().join(format!("transformer-text-{}", std::process::id()));
        let train_on = |len: usize| {
            std::fs::write(&path, vec![b'a'; len]).unwrap();
            let args = Args {
                text: Some(path.clone()),
                ..small()
            };
            run(&args).map_err(|error| format!("{error:#}"))
        };
        let name = path.display();
        assert_eq!(
            train_on(0).unwrap_err(),
            format!("{name} is empty: give --text a file with text in it")
        );
        assert_eq!(
            train_on(160).unwrap_err(),
            format!(
                "{name} is too short: the tenth that is held out has 16 bytes, --context 16 needs 17: \
                 give --text a file of at least 161 bytes or lower --context"
            )
        );
        let enough = train_on(161);
        std::fs::remove_file(&path).unwrap();
        enough.unwrap();
    }

    #[test]
    fn a_diverging_run_says_so() {
        let args = Args {
            learning_rate: 1e30,
            ..small()
        };
        let error = run(&args).unwrap_err().to_string();
        assert!(error.ends_with("lower --learning-rate"), "{error}");
    }
}
