//! Whole runs, small.

use super::*;
use clap::CommandFactory;
use parallel::tests::Threads;
use record::{Event, read_metrics};
use settings::NormKind;
use std::{fs::File, path::Path, sync::Arc};
use tempfile::TempDir;

const SMALL: &str = "--cpu --batch-size 4 --context 16 --layers 2 --heads 2 --channels 16 --steps 12 --eval-every 5 \
                     --sample-length 5 --learning-rate 0.01 --seed 3";

const ANOTHER_TEXT: &str = "the checkpoint was trained on another text: give --text the same one (without --text it is this \
                            crate's own sources, which may have changed)";

fn parse(line: &str) -> Cli {
    Cli::try_parse_from(["transformer"].into_iter().chain(line.split_whitespace())).unwrap()
}

fn args(line: &str) -> TrainArgs {
    parse(line).train
}

/// Arguments of a small run on a text of 2,400 characters in `dir`, with its files there too.
fn small(dir: &TempDir, line: &str) -> TrainArgs {
    let text = dir.path().join("text");
    if !text.exists() {
        std::fs::write(
            &text,
            "the quick brown fox jumps over it\nand a lazy dog. ".repeat(48),
        )
        .unwrap();
    }
    let mut args = args(&format!("{SMALL} {line}"));
    args.source.text = Some(text);
    args.out = Some(dir.path().to_owned());
    args
}

fn train_small(args: &TrainArgs) -> Result<Summary> {
    train(args, Limits::default())
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    let message = format!("{:#}", result.unwrap_err());
    assert!(!message.contains('\n'), "{message}");
    message
}

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn last(dir: &TempDir) -> Checkpoint {
    Checkpoint::load(&Files::new(dir.path()).last()).unwrap()
}

fn events(dir: &Path) -> Vec<Event> {
    read_metrics(&Files::new(dir).metrics()).unwrap()
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
    assert!(parse("").command.is_none());
    assert!(matches!(
        parse("train --layers 3").command,
        Some(Command::Train(_))
    ));
    assert!(matches!(
        parse("sample x.safetensors").command,
        Some(Command::Sample(_))
    ));
    assert!(matches!(
        parse("evaluate x.safetensors --text y").command,
        Some(Command::Evaluate(_))
    ));
    assert!(matches!(
        parse("compare --out x").command,
        Some(Command::Compare(_))
    ));
}

#[test]
fn the_loss_falls_in_every_precision() {
    for dtype in ["f32", "bf16", "f16"] {
        let dir = dir();
        let steps = "--init-std 0.02 --steps 40 --eval-every 40 --dtype";
        let summary = train_small(&small_with(&dir, &format!("{steps} {dtype}"))).unwrap();
        let (first, last) = (
            summary.first_held_out.unwrap(),
            summary.last_held_out.unwrap(),
        );
        // An untrained model that begins small spreads its guesses evenly over the characters.
        let even = (last_vocabulary(&dir) as f64).ln();
        assert!(
            (first - even).abs() < 0.1,
            "{dtype}: {first}, expected {even}"
        );
        assert!(last < first - 0.7, "{dtype}: {first} to {last}");
    }
}

/// `small`, in which arguments of `line` replace its own.
fn small_with(dir: &TempDir, line: &str) -> TrainArgs {
    let mut args = small(dir, "");
    let TrainArgs { source, .. } = self::args(line);
    let given = source.overrides;
    macro_rules! replace {
        ($($field:ident),*) => {
            $(if given.$field.is_some() {
                args.source.overrides.$field = given.$field;
            })*
        };
    }
    replace!(
        layers,
        init_std,
        dropout,
        norm,
        dtype,
        batch_size,
        steps,
        learning_rate,
        eval_every,
        seed,
        bias
    );
    args
}

fn last_vocabulary(dir: &TempDir) -> usize {
    last(dir).vocabulary().len()
}

#[test]
fn a_run_that_is_stopped_and_resumed_is_the_run_without_a_stop() {
    for dtype in ["f32", "f16"] {
        let line = format!("--dropout 0.2 --dtype {dtype}");
        let (whole, parts) = (dir(), dir());
        assert!(train_small(&small_with(&whole, &line)).unwrap().finished);
        let mut args = small_with(&parts, &line);
        args.max_seconds = Some(0.);
        for step in 1..=7 {
            let summary = train_small(&args).unwrap();
            assert_eq!((summary.step, summary.finished), (step, false));
            args.resume = true;
        }
        args.max_seconds = None;
        assert!(train_small(&args).unwrap().finished);
        assert!(last(&whole) == last(&parts), "{dtype}");
        let held_out = |dir: &TempDir| plot::points(&events(dir.path()), plot::held_out);
        assert_eq!(held_out(&whole), held_out(&parts));
        assert_eq!(held_out(&whole).len(), 4);
        // Once more there is nothing left to do.
        assert_eq!(train_small(&args).unwrap().steps_done, 0);
    }
}

#[test]
fn the_seed_decides_a_run() {
    let run = |seed: &str| {
        let dir = dir();
        train_small(&small_with(&dir, &format!("--dropout 0.1 --seed {seed}"))).unwrap();
        last(&dir).optimizer
    };
    assert!(run("1") == run("1"));
    assert!(run("1") != run("2"));
}

#[test]
fn ctrl_c_finishes_the_step_and_saves() {
    let dir = dir();
    let limits = Limits::default();
    limits.stop.store(true, Ordering::Relaxed);
    let summary = train(&small(&dir, ""), limits).unwrap();
    assert_eq!((summary.step, summary.finished), (1, false));
    assert_eq!(last(&dir).progress.step, 1);
}

#[test]
fn a_run_leaves_its_files() {
    let dir = dir();
    let summary = train_small(&small(&dir, "")).unwrap();
    let files = Files::new(dir.path());
    assert!(
        std::fs::read_to_string(files.curve())
            .unwrap()
            .contains("<svg")
    );
    let best = summary.best.unwrap();
    assert_eq!(
        Checkpoint::load(&files.best()).unwrap().progress.step,
        best.step
    );
    let steps: Vec<f64> = plot::points(&events(dir.path()), plot::held_out)
        .into_iter()
        .map(|(step, _)| step)
        .collect();
    assert_eq!(steps, [0., 5., 10., 12.]);
    // No temporary file is left.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    assert_eq!(
        message(train_small(&small(&dir, ""))),
        format!(
            "{} belongs to a run: go on with it by --resume, or give --out another directory",
            files.last().display()
        )
    );
}

#[test]
fn compare_counts_what_candle_nns_norm_cuts_off() {
    for (norm, expected) in [
        // The output is the token embedding, after the norm that cuts: it alone learns.
        (NormKind::Candle, 1),
        (NormKind::Fused, 36),
        (NormKind::Slow, 36),
    ] {
        let dir = dir();
        let mut args = small(&dir, "");
        args.source.overrides = {
            let settings = compare::settings(&args.source, norm).unwrap();
            assert!(settings.bias);
            Overrides {
                norm: Some(norm),
                bias: Some(settings.bias),
                ..args.source.overrides
            }
        };
        train_small(&args).unwrap();
        let row = compare::Row::new(norm, &events(dir.path())).unwrap();
        assert_eq!(
            (row.with_gradient, row.variables),
            (expected, 36),
            "{norm:?}"
        );
        assert!(row.peak_memory.is_none_or(|bytes| bytes > 1 << 20));
        assert!(compare::table(&[row]).contains(&format!("| {expected} of 36 |")));
    }
}

#[test]
fn compare_leaves_earlier_runs_alone() {
    let (dir, line) = (dir(), "--cpu");
    let slow = dir.path().join("slow");
    std::fs::create_dir(&slow).unwrap();
    let last = Files::new(&slow).last();
    std::fs::write(&last, "").unwrap();
    assert_eq!(
        message(compare::run(&args(line).source, dir.path())),
        format!(
            "{} belongs to a run: give --out another directory",
            last.display()
        )
    );
}

#[test]
fn compare_begins_its_runs_with_its_own_settings() {
    let line =
        "--preset shakespeare-cpu --layers 3 --learning-rate 0.002 --dtype bf16 --cpu --text t";
    let source = args(line).source;
    let settings = compare::settings(&source, NormKind::Slow).unwrap();
    let arguments = compare::arguments(&source, &settings, Path::new("o"));
    let cli = Cli::try_parse_from(["transformer".into()].into_iter().chain(arguments)).unwrap();
    let Some(Command::Train(args)) = cli.command else {
        panic!("not train")
    };
    assert_eq!(args.source.settings().unwrap(), settings);
    assert!(args.source.cpu && args.source.text.is_some() && args.out.is_some());
}

#[test]
fn several_ranks_train_as_one() {
    let dir = dir();
    let args = small(&dir, "");
    let settings = args.source.settings().unwrap();
    let corpus = Corpus::load(args.source.text.as_deref(), 16, None).unwrap();
    let corpus = Arc::new(corpus);
    let weights = |ranks: usize| {
        let (threads, settings, corpus) = (Threads::new(ranks), settings.clone(), corpus.clone());
        parallel::run(ranks, move |rank| {
            let threads = threads.on(rank);
            let mut trainer = Trainer::new(&settings, &corpus, None, threads, Device::Cpu)?;
            let summary = trainer.run(&Limits::default(), None)?;
            let state = trainer.checkpoint()?.optimizer;
            let weights: Vec<f32> = state.weights.into_values().flatten().collect();
            Ok((weights, summary.last_held_out))
        })
        .unwrap()
    };
    let (one, loss) = weights(1);
    for ranks in [2, 4] {
        let (several, several_loss) = weights(ranks);
        let diff = several.iter().zip(&one).map(|(a, b)| (a - b).abs());
        // Adam divides by the gradient's magnitude: where that is all rounding, one step differs by the learning rate.
        let far = diff.clone().filter(|&diff| diff > 2e-3).count();
        assert!(far * 100 < one.len(), "{ranks}: {far} of {}", one.len());
        let diff = several_loss.unwrap() - loss.unwrap();
        assert!(diff.abs() < 2e-3, "{ranks}: {diff}");
    }
}

#[test]
fn a_batch_must_be_shared_out_evenly() {
    let dir = dir();
    let args = small(&dir, "");
    let settings = args.source.settings().unwrap();
    let corpus = Corpus::load(args.source.text.as_deref(), 16, None).unwrap();
    let threads = Threads::new(3);
    let trainer = Trainer::new(&settings, &corpus, None, threads, Device::Cpu).map(drop);
    assert_eq!(
        message(trainer),
        "--batch-size 4 cannot be shared out evenly to 3 GPUs: give a multiple"
    );
}

#[test]
fn a_sample_is_decided_by_its_seed() {
    let dir = dir();
    train_small(&small(&dir, "")).unwrap();
    let file = Files::new(dir.path()).best();
    let sample = |line: &str| {
        let line = format!("sample {} --cpu --length 30 {line}", file.display());
        let Some(Command::Sample(args)) = parse(&line).command else {
            panic!("not sample")
        };
        sample(&args)
    };
    let text = sample("--seed 1").unwrap();
    assert_eq!(text.chars().count(), 30);
    assert_eq!(sample("--seed 1").unwrap(), text);
    assert_ne!(sample("--seed 2").unwrap(), text);
    assert_eq!(
        sample("--seed 1 --top-k 1").unwrap(),
        sample("--seed 2 --temperature 0").unwrap()
    );
    for (line, expected) in [
        ("--top-k 0", "--top-k is 0: give at least 1"),
        (
            "--temperature -1",
            "--temperature is -1: give a finite number that is 0 or above",
        ),
        (
            "--prompt Z",
            "--prompt cannot be used with this checkpoint: 'Z' is not among the 29 characters of the vocabulary",
        ),
    ] {
        assert_eq!(message(sample(line)), expected);
    }
}

#[test]
fn an_evaluation_is_that_of_the_run_and_of_the_definition() {
    let dir = dir();
    let args = small(&dir, "");
    let best = train_small(&args).unwrap().best.unwrap();
    let text = args.source.text.unwrap();
    let report = |text: &Path| {
        let file = Files::new(dir.path()).best();
        let line = format!(
            "evaluate {} --cpu --text {}",
            file.display(),
            text.display()
        );
        let Some(Command::Evaluate(args)) = parse(&line).command else {
            panic!("not evaluate")
        };
        evaluate(&args)
    };
    let of_best = report(&text).unwrap();
    assert_eq!(of_best.side_by_side, best.held_out);

    let checkpoint = Checkpoint::load(&Files::new(dir.path()).best()).unwrap();
    let gpt = checkpoint.model(&Device::Cpu).unwrap();
    let ids = Corpus::load(Some(&text), 16, None).unwrap().held_out;
    // One target at a time, from the characters before it.
    let mean = |stride: usize| {
        let losses = (1..ids.len()).map(|target| {
            let begin = (target - 1) / stride * stride;
            let start = begin.saturating_sub(16 - stride);
            let (input, next) =
                data::windows(&ids, &[start], target - start, &Device::Cpu).unwrap();
            let loss = gpt.loss_of_last(1, &input, &next).unwrap();
            f64::from(loss.to_scalar::<f32>().unwrap())
        });
        losses.sum::<f64>() / (ids.len() - 1) as f64
    };
    for (ours, expected) in [
        (of_best.side_by_side, mean(16)),
        (of_best.overlapping, mean(8)),
    ] {
        assert!((ours - expected).abs() < 1e-5, "{ours} {expected}");
    }
    let estimates = &of_best.estimates;
    let estimate = estimates.iter().sum::<f64>() / estimates.len() as f64;
    assert!((estimate - of_best.side_by_side).abs() < 0.05, "{estimate}");
    assert_ne!(estimates[0], estimates[1]);
    assert_eq!(report(&text).unwrap().estimates, *estimates);
    let shown = of_best.to_string();
    assert!(
        shown.contains(&format!("{:.4}  all of them", of_best.side_by_side)),
        "{shown}"
    );

    let other = dir.path().join("other");
    let same_characters: String = std::fs::read_to_string(&text)
        .unwrap()
        .replace("fox", "xof");
    std::fs::write(&other, same_characters).unwrap();
    assert_eq!(message(report(&other)), ANOTHER_TEXT);
}

#[test]
fn a_checkpoint_that_cannot_be_used_is_an_error_that_says_why() {
    let dir = dir();
    let mut args = small(&dir, "");
    train_small(&args).unwrap();
    args.resume = true;
    let path = Files::new(dir.path()).last();
    let good = std::fs::read(&path).unwrap();
    let name = path.display();
    let resume = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        message(train_small(&args))
    };
    let prefix = format!("cannot use {name} as a checkpoint: ");

    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert_eq!(
        resume(&flipped),
        format!("{prefix}it is damaged: its checksum does not match")
    );
    for broken in [&good[..good.len() / 2], b"no checkpoint", b""] {
        let expected = format!("{prefix}it is damaged, or no safetensors file: ");
        let error = resume(broken);
        assert!(error.starts_with(&expected), "{error}");
    }
    let foreign: [(&str, safetensors::tensor::TensorView); 0] = [];
    assert_eq!(
        resume(&safetensors::serialize(foreign, None).unwrap()),
        format!(
            "{prefix}it was not written by this trainer: its metadata has no `candle-fused-layer-norm.transformer`"
        )
    );

    std::fs::write(&path, &good).unwrap();
    let text = args.source.text.clone().unwrap();
    let old = std::fs::read_to_string(&text).unwrap();
    std::fs::write(&text, old.replace('q', "Q!")).unwrap();
    assert_eq!(
        message(train_small(&args)),
        "the checkpoint has a vocabulary of 29 characters, the text has another of 30: give --text the file that the run \
         began with"
    );
    std::fs::write(&text, old.replace("fox", "xof")).unwrap();
    assert_eq!(message(train_small(&args)), ANOTHER_TEXT);
    std::fs::write(&text, old).unwrap();
    let mut other = small_with(&dir, "--layers 3");
    other.resume = true;
    assert_eq!(
        message(train_small(&other)),
        format!("{name} has other settings: layers 2, given 3; leave them out to go on")
    );
    // A preset counts, if it is given, with what the command line changes in it.
    let mut preset = args.clone();
    preset.source.preset = Some(Preset::Quick);
    assert!(train_small(&preset).unwrap().finished);
    preset.source.preset = Some(Preset::ShakespeareCpu);
    assert_eq!(
        message(train_small(&preset)),
        format!(
            "{name} has other settings: bias true, given false; leave --preset and what changes it out to go on"
        )
    );
    std::fs::write(Files::new(dir.path()).metrics(), "{}\n").unwrap();
    let error = message(train_small(&args));
    let expected = format!(
        "{}:1 is no line of metrics: remove the line, or the file: ",
        Files::new(dir.path()).metrics().display()
    );
    assert!(error.starts_with(&expected), "{error}");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        message(train_small(&args)),
        format!("{name} does not exist: leave --resume out to begin a run there")
    );
}

#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_one_before() {
    let dir = dir();
    train_small(&small(&dir, "")).unwrap();
    let checkpoint = last(&dir);
    // Where a file should be a directory.
    let path = dir.path().join("text").join("last.safetensors");
    let error = message(checkpoint.save(&path));
    let expected = format!(
        "cannot write the checkpoint {}; the one before it is as it was: ",
        path.display()
    );
    assert!(error.starts_with(&expected), "{error}");
    if Path::new("/dev/full").exists() {
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        let error = message(checkpoint.write(&mut full));
        assert!(error.contains("No space left on device"), "{error}");
    }
    assert!(last(&dir) == checkpoint);
}

#[test]
fn a_best_checkpoint_that_cannot_be_written_is_written_after_a_resume() {
    let dir = dir();
    let mut args = small(&dir, "");
    let best = Files::new(dir.path()).best();
    std::fs::create_dir_all(best.join("in the way")).unwrap();
    message(train_small(&args));
    assert_eq!(last(&dir).progress.step, 0);
    std::fs::remove_dir_all(&best).unwrap();
    args.resume = true;
    let summary = train_small(&args).unwrap();
    let written = Checkpoint::load(&best).unwrap().progress;
    assert_eq!(written.best, summary.best);
    assert_eq!(written.step, summary.best.unwrap().step);
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
        ("--gpus 0", "--gpus is 0: give at least 1"),
        ("--gpus 2", "--gpus 2 and --cpu: give one of them"),
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
            "--init-std 0",
            "--init-std is 0: give a finite number above 0",
        ),
        (
            "--dropout 1",
            "--dropout is 1: give a number from 0 to below 1",
        ),
        (
            "--dropout NaN",
            "--dropout is NaN: give a number from 0 to below 1",
        ),
        (
            "--max-seconds -1",
            "--max-seconds is -1: give a finite number that is 0 or above: ",
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
            "the built-in text cannot be used: the tenth that is held out has ",
        ),
    ] {
        let error = message(train_small(&args(&format!("--cpu {line}"))));
        assert!(error.starts_with(expected), "{line}: {error}");
    }
}

#[test]
fn a_text_must_be_text_and_long_enough() {
    let dir = dir();
    let args = small(&dir, "");
    let path = args.source.text.clone().unwrap();
    let train_on = |text: &[u8]| {
        std::fs::write(&path, text).unwrap();
        train_small(&args)
    };
    let name = path.display();
    assert_eq!(
        message(train_on(b"")),
        format!("{name} is empty: give --text a file with text in it")
    );
    let error = message(train_on(b"\xff\xfe"));
    let expected = format!("{name} is not text in UTF-8: give --text such a file: ");
    assert!(error.starts_with(&expected), "{error}");
    assert_eq!(
        message(train_on(&[b'a'; 160])),
        format!(
            "{name} cannot be used: the tenth that is held out has 16 characters, --context 16 needs 17: give --text a \
             file of at least 161 characters or lower --context"
        )
    );
    train_on(&[b'a'; 161]).unwrap();
}

#[test]
fn a_diverging_run_says_so() {
    let dir = dir();
    let error = message(train_small(&small_with(&dir, "--learning-rate 1e30")));
    assert!(error.ends_with("lower --learning-rate"), "{error}");
}

#[test]
fn the_sampled_model_is_the_trained_one() {
    let dir = dir();
    train_small(&small(&dir, "")).unwrap();
    let checkpoint = last(&dir);
    let gpt = checkpoint.model(&Device::Cpu).unwrap();
    let corpus = Corpus::load(small(&dir, "").source.text.as_deref(), 16, None).unwrap();
    let progress = &checkpoint.progress;
    let trainer = Trainer::new(
        &progress.settings,
        &corpus,
        Some(&checkpoint),
        Alone,
        Device::Cpu,
    )
    .unwrap();
    let (ids, targets) = data::windows(&corpus.held_out, &[0, 9], 16, &Device::Cpu).unwrap();
    let loss = |gpt: &model::Gpt| {
        let loss = gpt.loss(&ids, &targets, false).unwrap();
        loss.to_scalar::<f32>().unwrap()
    };
    assert_eq!(loss(&gpt), loss(trainer.gpt()));
}
