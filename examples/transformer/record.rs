//! What a run leaves behind: lines on the terminal, a metrics file of JSON lines, a curve and checkpoints.

use crate::{checkpoint::Checkpoint, plot};
use anyhow::{Context, Result};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Display,
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// Prints a line. That nobody reads it any more, as after `| head`, is no reason to stop a run.
pub fn say(line: impl Display) {
    if cfg!(test) {
        // Tests are quiet: the output of this macro alone is captured.
        return println!("{line}");
    }
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line of the metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Gradients {
        step: usize,
        variables: usize,
        with_gradient: usize,
        missing: Vec<String>,
    },
    Evaluation {
        step: usize,
        /// Mean over the batches since the last evaluation, with dropout.
        train_loss: Option<f64>,
        held_out_loss: f64,
        learning_rate: f64,
        gradient_norm: Option<f64>,
        /// Of training alone, since the last evaluation.
        tokens_per_second: Option<f64>,
        step_seconds: Option<f64>,
        /// The same in the quickest stretch of a few steps.
        quickest_step_seconds: Option<f64>,
        /// Of the process or the GPU, to this moment.
        peak_memory: Option<u64>,
    },
}

impl Event {
    fn step(&self) -> usize {
        match self {
            Self::Gradients { step, .. } | Self::Evaluation { step, .. } => *step,
        }
    }
}

/// The files of a run in its directory.
#[derive(Clone, Debug)]
pub struct Files(PathBuf);

impl Files {
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    pub fn last(&self) -> PathBuf {
        self.0.join("last.safetensors")
    }

    pub fn best(&self) -> PathBuf {
        self.0.join("best.safetensors")
    }

    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    pub fn curve(&self) -> PathBuf {
        self.0.join("loss.svg")
    }
}

/// The events in a metrics file. A last line that was cut off by a kill is left out.
pub fn read_metrics(path: &Path) -> Result<Vec<Event>> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
    whole
        .lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line).with_context(|| {
                let line = i + 1;
                format!("{name}:{line} is no line of metrics: remove the line, or the file")
            })
        })
        .collect()
}

/// A file in `dir` that is removed unless it is renamed, with the permissions that a file has there by default.
pub fn temporary_file(dir: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir)
}

/// Takes down the events of a run. Without a directory it only prints them.
pub struct Recorder {
    files: Option<Files>,
    metrics: Option<File>,
    events: Vec<Event>,
    bar: ProgressBar,
    title: String,
}

impl Recorder {
    /// For a run of `steps` steps that has done `done` of them. What the metrics file has of later steps, from a run that
    /// was cut off after its last checkpoint, is dropped.
    pub fn new(dir: Option<&Path>, title: String, done: usize, steps: usize) -> Result<Self> {
        let files = dir.map(Files::new);
        let (mut events, mut metrics) = (Vec::new(), None);
        if let (Some(dir), Some(files)) = (dir, &files) {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot make the directory {}", dir.display()))?;
            let path = files.metrics();
            if done > 0 && path.exists() {
                events = read_metrics(&path)?;
                events.retain(|event| event.step() <= done);
            }
            let name = path.display();
            let open = || -> Result<File> {
                let mut file = temporary_file(dir)?;
                for event in &events {
                    writeln!(file, "{}", serde_json::to_string(event)?)?;
                }
                file.persist(&path)?;
                Ok(OpenOptions::new().append(true).open(&path)?)
            };
            metrics = Some(open().with_context(|| format!("cannot write {name}"))?);
        }
        // Drawn on stderr if that is a terminal. The lines on stdout are printed in any case.
        let bar = ProgressBar::new(steps as u64)
            .with_position(done as u64)
            .with_style(ProgressStyle::with_template(
                "{bar:30} {human_pos}/{human_len} steps, {msg}, {eta} left",
            )?)
            .with_message("starting");
        Ok(Self {
            files,
            metrics,
            events,
            bar,
            title,
        })
    }

    pub fn files(&self) -> Option<&Files> {
        self.files.as_ref()
    }

    pub fn step(&self) {
        self.bar.inc(1);
    }

    pub fn progress(&self, loss: f64, tokens_per_second: f64) {
        let speed = HumanCount(tokens_per_second as u64);
        self.bar
            .set_message(format!("loss {loss:.3}, {speed} tokens/s"));
    }

    pub fn say(&self, line: &str) {
        self.bar.suspend(|| say(line));
    }

    pub fn event(&mut self, event: Event) -> Result<()> {
        if let (Some(file), Some(files)) = (&mut self.metrics, &self.files) {
            let name = files.metrics();
            writeln!(file, "{}", serde_json::to_string(&event)?)
                .with_context(|| format!("cannot write {}", name.display()))?;
        }
        self.events.push(event);
        if let (Some(Event::Evaluation { .. }), Some(files)) = (self.events.last(), &self.files) {
            plot::run(&files.curve(), &self.title, &self.events)?;
        }
        Ok(())
    }

    pub fn checkpoint(&self, checkpoint: &Checkpoint, is_best: bool) -> Result<()> {
        if let Some(files) = &self.files {
            // The best comes first: `last` must not tell of one that was never written.
            if is_best {
                checkpoint.save(&files.best())?;
            }
            checkpoint.save(&files.last())?;
        }
        Ok(())
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(step: usize) -> Event {
        Event::Gradients {
            step,
            variables: 2,
            with_gradient: 1,
            missing: vec!["a".to_owned()],
        }
    }

    #[test]
    fn a_resumed_run_drops_what_came_after_its_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = Files::new(dir.path()).metrics();
        let mut recorder = Recorder::new(Some(dir.path()), String::new(), 0, 9).unwrap();
        for step in 1..=4 {
            recorder.event(event(step)).unwrap();
        }
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"event\":\"grad").unwrap();
        let mut recorder = Recorder::new(Some(dir.path()), String::new(), 3, 9).unwrap();
        recorder.event(event(7)).unwrap();
        assert_eq!(
            read_metrics(&path).unwrap(),
            [event(1), event(2), event(3), event(7)]
        );
        // A new run in the same place begins anew.
        Recorder::new(Some(dir.path()), String::new(), 0, 9).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), []);
    }
}
