//! The same training with each of the three layer norms.

use crate::{
    Source, plot,
    record::{Event, Files, read_metrics, say},
    settings::{NormKind, Settings},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    ffi::OsString,
    path::Path,
    process::{Command, Stdio},
};

/// What is told of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub norm: NormKind,
    pub variables: usize,
    pub with_gradient: usize,
    pub held_out: f64,
    pub step_seconds: f64,
    pub peak_memory: Option<u64>,
}

impl Row {
    pub fn new(norm: NormKind, events: &[Event]) -> Result<Self> {
        let gradients = events.iter().find_map(|event| match event {
            Event::Gradients {
                variables,
                with_gradient,
                ..
            } => Some((*variables, *with_gradient)),
            _ => None,
        });
        let last = events.iter().rev().find_map(|event| match event {
            Event::Evaluation {
                held_out_loss,
                peak_memory,
                ..
            } => Some((*held_out_loss, *peak_memory)),
            _ => None,
        });
        // The first steps are no measure: memory is asked for, kernels are loaded. The quickest is the least disturbed.
        let step_seconds = events
            .iter()
            .filter_map(|event| match event {
                Event::Evaluation {
                    step_seconds,
                    quickest_step_seconds,
                    ..
                } => quickest_step_seconds.or(*step_seconds),
                _ => None,
            })
            .reduce(f64::min);
        let (Some((variables, with_gradient)), Some((held_out, peak_memory)), Some(step_seconds)) =
            (gradients, last, step_seconds)
        else {
            bail!("the run with --norm {} ended early", norm.name());
        };
        Ok(Self {
            norm,
            variables,
            with_gradient,
            held_out,
            step_seconds,
            peak_memory,
        })
    }
}

/// A table in Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut table = String::from(
        "| norm | variables with a gradient | held-out loss | ms a step | peak memory |\n|---|---|---|---|---|\n",
    );
    for row in rows {
        let memory = row
            .peak_memory
            .map_or("unknown".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        table += &format!(
            "| {} | {} of {} | {:.3} | {:.1} | {memory} |\n",
            row.norm.name(),
            row.with_gradient,
            row.variables,
            row.held_out,
            1e3 * row.step_seconds
        );
    }
    table
}

/// The arguments that make this program train as `source` says, with `settings`.
pub fn arguments(source: &Source, settings: &Settings, out: &Path) -> Vec<OsString> {
    let Settings {
        layers,
        heads,
        channels,
        context,
        bias,
        dropout,
        batch_size,
        steps,
        learning_rate,
        eval_every,
        seed,
        ..
    } = settings;
    let preset = clap::ValueEnum::to_possible_value(&source.preset.unwrap_or_default());
    let dtype = clap::ValueEnum::to_possible_value(&settings.dtype);
    let name = |value: Option<clap::builder::PossibleValue>| {
        value.map_or(String::new(), |value| value.get_name().to_owned())
    };
    let mut arguments: Vec<OsString> = ["train".into(), "--out".into(), out.into()].into();
    for (argument, value) in [
        ("preset", name(preset)),
        ("norm", settings.norm.name().to_owned()),
        ("dtype", name(dtype)),
        ("layers", layers.to_string()),
        ("heads", heads.to_string()),
        ("channels", channels.to_string()),
        ("context", context.to_string()),
        ("bias", bias.to_string()),
        ("dropout", dropout.to_string()),
        ("batch-size", batch_size.to_string()),
        ("steps", steps.to_string()),
        ("learning-rate", learning_rate.to_string()),
        ("eval-every", eval_every.to_string()),
        ("seed", seed.to_string()),
        ("sample-length", "0".to_owned()),
    ] {
        arguments.push(format!("--{argument}={value}").into());
    }
    if let Some(text) = &source.text {
        arguments.extend(["--text".into(), text.into()]);
    }
    for (argument, given) in [("--cpu", source.cpu), ("--tf32", source.tf32)] {
        if given {
            arguments.push(argument.into());
        }
    }
    arguments
}

/// What `compare` trains with: a bias unless it was chosen otherwise, because only then does candle-nn's layer norm take
/// its fused path.
pub fn settings(source: &Source, norm: NormKind) -> Result<Settings> {
    let mut settings = source.settings()?;
    settings.bias = source.overrides.bias.unwrap_or(true);
    settings.norm = norm;
    Ok(settings)
}

/// Runs all three, each in a process of its own so that its peak of memory is its own, then shows them side by side.
pub fn run(source: &Source, out: &Path) -> Result<()> {
    ensure!(
        source.overrides.norm.is_none(),
        "--norm cannot be chosen here: compare runs all three"
    );
    for norm in NormKind::ALL {
        let last = Files::new(&out.join(norm.name())).last();
        ensure!(
            !last.exists(),
            "{} belongs to a run: give --out another directory",
            last.display()
        );
    }
    let program = std::env::current_exe().context("cannot find this program to run it")?;
    let (mut rows, mut curves) = (Vec::new(), Vec::new());
    for norm in NormKind::ALL {
        let dir = out.join(norm.name());
        say(format_args!("--norm {}", norm.name()));
        let status = Command::new(&program)
            .args(arguments(source, &settings(source, norm)?, &dir))
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot run {}", program.display()))?;
        ensure!(
            status.success(),
            "the run with --norm {}: {status}",
            norm.name()
        );
        let events = read_metrics(&Files::new(&dir).metrics())?;
        let row = Row::new(norm, &events)?;
        curves.push(plot::Curve {
            name: format!(
                "{}: {} of {} variables learn",
                norm.name(),
                row.with_gradient,
                row.variables
            ),
            points: plot::points(&events, plot::held_out),
        });
        rows.push(row);
    }
    say(table(&rows).trim_end());
    let picture = out.join("compare.svg");
    plot::draw(&picture, "held-out loss by layer norm", &curves)?;
    say(format_args!("the curves are in {}", picture.display()));
    Ok(())
}
