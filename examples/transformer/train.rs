//! The training loop.

use crate::{
    checkpoint::{Best, Checkpoint},
    data::{self, Corpus},
    evaluate, memory,
    model::{self, Config, Gpt},
    ops::{Purpose, rng},
    optimizer::{AdamW, LossScale},
    parallel::{Collective, check_equal, shard},
    record::{Event, Recorder},
    settings::{Precision, Settings},
};
use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor, backprop::GradStore};
use candle_fused_layer_norm::{GradAudit, grad_audit};
use candle_nn::{VarBuilder, VarMap};
use indicatif::HumanCount;
use std::{
    f64::consts::PI,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// The loss is read from the device once in this many steps: each reading waits for it.
const READ_LOSS_EVERY: usize = 10;

/// What can end a run before its last step.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Set by Ctrl-C.
    pub stop: Arc<AtomicBool>,
    pub time: Option<Duration>,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Summary {
    pub step: usize,
    pub finished: bool,
    pub first_held_out: Option<f64>,
    pub last_held_out: Option<f64>,
    pub best: Option<Best>,
    pub steps_done: usize,
    /// Of the steps, without the evaluations.
    pub time: Duration,
}

/// A model in training: what changes from step to step, and what it learns from.
pub struct Trainer<'a, C> {
    settings: &'a Settings,
    corpus: &'a Corpus,
    fingerprint: String,
    collective: C,
    device: Device,
    varmap: VarMap,
    gpt: Gpt,
    optimizer: AdamW,
    loss_scale: LossScale,
    step: usize,
    best: Option<Best>,
    /// Whether the generator of dropout on the device is yet to be seeded.
    seeded: bool,
}

/// What a step leaves on the device, to be read when it is needed.
struct Step {
    loss: Tensor,
    norm: Tensor,
    audit: Option<GradAudit>,
}

impl<'a, C: Collective> Trainer<'a, C> {
    /// A new model, or the one of a checkpoint with these settings.
    pub fn new(
        settings: &'a Settings,
        corpus: &'a Corpus,
        checkpoint: Option<&Checkpoint>,
        collective: C,
        device: Device,
    ) -> Result<Self> {
        ensure!(
            settings.batch_size.is_multiple_of(collective.ranks()),
            "--batch-size {} cannot be shared out evenly to {} GPUs: give a multiple",
            settings.batch_size,
            collective.ranks()
        );
        memory::keep(&device);
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, settings.dtype.dtype(), &device);
        let gpt = Gpt::new(Config::new(settings, corpus.vocabulary.len()), vb)?;
        let mut rng = rng(settings.seed, Purpose::Weights, 0, 0);
        model::init(&varmap, settings.layers, settings.init_std, &mut rng)?;
        let mut this = Self {
            settings,
            corpus,
            fingerprint: corpus.fingerprint(),
            collective,
            optimizer: AdamW::new(&varmap, settings, &device)?,
            device,
            varmap,
            gpt,
            loss_scale: LossScale::default(),
            step: 0,
            best: None,
            seeded: false,
        };
        if let Some(checkpoint) = checkpoint {
            let progress = &checkpoint.progress;
            corpus.ensure_is(&progress.fingerprint)?;
            this.optimizer.restore(&checkpoint.optimizer)?;
            this.loss_scale = progress.loss_scale;
            this.step = progress.step;
            this.best = progress.best.clone();
        }
        Ok(this)
    }

    pub fn gpt(&self) -> &Gpt {
        &self.gpt
    }

    pub fn parameters(&self) -> usize {
        let vars = self.varmap.all_vars();
        vars.iter().map(|var| var.elem_count()).sum()
    }

    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::new(
            self.settings.clone(),
            &self.corpus.vocabulary,
            self.fingerprint.clone(),
            self.step,
            self.best.clone(),
            self.loss_scale,
            self.optimizer.state()?,
        ))
    }

    /// One optimizer step on this rank's share of a batch. With f16 it waits for the device, else it does not.
    fn train_step(&mut self) -> Result<Step> {
        let settings = self.settings;
        let (rank, ranks) = (self.collective.rank(), self.collective.ranks());
        self.step += 1;
        // Seeding waits for the GPU, so there it is done only where a run may begin.
        let fresh = !self.seeded || (self.step - 1).is_multiple_of(settings.eval_every);
        self.seeded = true;
        let masks = rng(settings.seed, Purpose::Dropout, self.step, rank);
        self.gpt.dropout().reseed(masks, &self.device, fresh)?;

        let train = &self.corpus.train;
        let mut batch = rng(settings.seed, Purpose::Batch, self.step, 0);
        let starts = data::random_starts(train, settings.batch_size, settings.context, &mut batch);
        let starts = shard(&starts, rank, ranks);
        let (ids, targets) = data::windows(train, starts, settings.context, &self.device)?;
        let loss = self.gpt.loss(&ids, &targets, true)?;

        let scaled = settings.dtype == Precision::F16;
        let scale = if scaled { self.loss_scale.scale } else { 1. };
        let grads = if scaled {
            (&loss * scale)?.backward()?
        } else {
            loss.backward()?
        };
        let audit = self.audit(&grads)?;
        let grads = self.optimizer.flatten_gradients(&grads)?;
        let mut grads = self.collective.sum(&grads)?;
        if scaled || ranks > 1 {
            grads = (grads / (scale * ranks as f64))?;
        }
        let norm = self.optimizer.norm(&grads)?;
        let usable = !scaled || {
            let norm: f32 = norm.to_scalar()?;
            self.loss_scale.update(norm.into())
        };
        if usable {
            let rate = learning_rate(self.step, settings);
            self.optimizer.step(&grads, &norm, rate)?;
        }
        Ok(Step {
            loss: loss.detach(),
            norm,
            audit,
        })
    }

    /// Which variables learn: the first thing to know of a new model.
    fn audit(&self, grads: &GradStore) -> Result<Option<GradAudit>> {
        let first = self.step == 1 && self.collective.rank() == 0;
        Ok(first.then(|| grad_audit(&self.varmap, grads)).transpose()?)
    }

    /// The mean loss over all of the held-out text in windows side by side, in nats a token, the work shared out to the
    /// ranks.
    pub fn evaluate(&self) -> Result<f64> {
        let held_out = &self.corpus.held_out;
        let batches = evaluate::side_by_side(held_out.len(), self.settings.context);
        let (rank, ranks) = (self.collective.rank(), self.collective.ranks());
        let batches = shard(&batches, rank, ranks);
        let sum = evaluate::loss_sum(&self.gpt, held_out, batches)?;
        let sum: f32 = self.collective.sum(&sum)?.to_scalar()?;
        let loss = f64::from(sum) / (held_out.len() - 1) as f64;
        if !loss.is_finite() {
            bail!(
                "the loss is not finite after step {}: lower --learning-rate",
                self.step
            );
        }
        Ok(loss)
    }

    /// Fails if the ranks have drifted apart.
    fn check_ranks(&self) -> Result<()> {
        if self.collective.ranks() == 1 {
            return Ok(());
        }
        let weights: Vec<f32> = self.optimizer.weights().to_vec1()?;
        let hash = weights.iter().fold(0u64, |hash, weight| {
            (hash ^ u64::from(weight.to_bits())).wrapping_mul(0x0100_0000_01b3)
        });
        check_equal(&self.collective, hash, &self.device)
    }

    /// Whether a limit was reached. Ranks must agree on it, so with several it is asked only now and then.
    fn should_stop(&self, limits: &Limits, since: Instant) -> Result<bool> {
        let stop = limits.stop.load(Ordering::Relaxed)
            || limits.time.is_some_and(|time| since.elapsed() >= time);
        if self.collective.ranks() == 1 {
            return Ok(stop);
        }
        if !self.step.is_multiple_of(READ_LOSS_EVERY) {
            return Ok(false);
        }
        let votes = Tensor::new(f32::from(stop), &self.device)?;
        Ok(self.collective.sum(&votes)?.to_scalar::<f32>()? > 0.)
    }

    /// Trains to the last step or to a limit. `recorder` is that of rank 0; the others have none.
    pub fn run(&mut self, limits: &Limits, mut recorder: Option<&mut Recorder>) -> Result<Summary> {
        let settings = self.settings;
        let begin = Instant::now();
        let tokens_per_step = (settings.batch_size * settings.context) as f64;
        let mut summary = Summary {
            step: self.step,
            finished: self.step == settings.steps,
            first_held_out: None,
            last_held_out: None,
            best: self.best.clone(),
            steps_done: 0,
            time: Duration::ZERO,
        };
        if self.step == 0 {
            let held_out = self.evaluate()?;
            summary.first_held_out = Some(held_out);
            if let Some(recorder) = &mut recorder {
                recorder.say(&format!("step 0: held-out loss {held_out:.3}"));
                recorder.event(Event::Evaluation {
                    step: 0,
                    train_loss: None,
                    held_out_loss: held_out,
                    learning_rate: 0.,
                    gradient_norm: None,
                    tokens_per_second: None,
                    step_seconds: None,
                    quickest_step_seconds: None,
                    peak_memory: memory::peak(&self.device),
                })?;
                if recorder.files().is_some() {
                    recorder.checkpoint(&self.checkpoint()?, false)?;
                }
            }
        }
        let mut window = Window::new();
        while self.step < settings.steps {
            let Step { loss, norm, audit } = self.train_step()?;
            window.add(&loss)?;
            if let (Some(recorder), Some(audit)) = (&mut recorder, audit) {
                recorder.say(&format!("gradients: {audit}"));
                recorder.event(Event::Gradients {
                    step: self.step,
                    variables: audit.variables(),
                    with_gradient: audit.with_gradient(),
                    missing: audit.missing().to_vec(),
                })?;
            }
            if let Some(recorder) = &recorder {
                recorder.step();
                if self.step.is_multiple_of(READ_LOSS_EVERY) {
                    let loss: f32 = loss.to_scalar()?;
                    window.end_stretch();
                    recorder.progress(loss.into(), tokens_per_step / window.step_seconds());
                }
            }
            let evaluates =
                self.step.is_multiple_of(settings.eval_every) || self.step == settings.steps;
            let stops = self.should_stop(limits, begin)?;
            if evaluates {
                let train_loss = window.mean(&self.collective)?;
                let step_seconds = window.step_seconds();
                summary.steps_done += window.steps;
                summary.time += window.begin.elapsed();
                let held_out_loss = self.evaluate()?;
                self.check_ranks()?;
                summary.last_held_out = Some(held_out_loss);
                let is_best = self
                    .best
                    .as_ref()
                    .is_none_or(|best| held_out_loss < best.held_out);
                if is_best {
                    self.best = Some(Best {
                        step: self.step,
                        held_out: held_out_loss,
                    });
                }
                if let Some(recorder) = &mut recorder {
                    let tokens_per_second = tokens_per_step / step_seconds;
                    recorder.say(&format!(
                        "step {}: train loss {train_loss:.3}, held-out loss {held_out_loss:.4}, {} tokens/s",
                        self.step,
                        HumanCount(tokens_per_second as u64)
                    ));
                    recorder.event(Event::Evaluation {
                        step: self.step,
                        train_loss: Some(train_loss),
                        held_out_loss,
                        learning_rate: learning_rate(self.step, settings),
                        gradient_norm: Some(norm.to_scalar::<f32>()?.into()),
                        tokens_per_second: Some(tokens_per_second),
                        step_seconds: Some(step_seconds),
                        quickest_step_seconds: window.quickest,
                        peak_memory: memory::peak(&self.device),
                    })?;
                    if recorder.files().is_some() {
                        recorder.checkpoint(&self.checkpoint()?, is_best)?;
                    }
                }
                window = Window::new();
            }
            if stops && self.step < settings.steps {
                if let (Some(recorder), false) = (&recorder, evaluates)
                    && recorder.files().is_some()
                {
                    recorder.checkpoint(&self.checkpoint()?, false)?;
                }
                summary.steps_done += window.steps;
                summary.time += window.begin.elapsed();
                break;
            }
        }
        summary.step = self.step;
        summary.finished = self.step == settings.steps;
        summary.best = self.best.clone();
        Ok(summary)
    }
}

/// The steps since the last evaluation.
struct Window {
    begin: Instant,
    steps: usize,
    loss: Option<Tensor>,
    /// When the device was last waited for, and after how many of the steps.
    stretch: (Instant, usize),
    /// Seconds a step in the quickest stretch: what else the machine does slows down the others.
    quickest: Option<f64>,
}

impl Window {
    fn new() -> Self {
        Self {
            begin: Instant::now(),
            steps: 0,
            loss: None,
            stretch: (Instant::now(), 0),
            quickest: None,
        }
    }

    fn end_stretch(&mut self) {
        let (begin, steps) = self.stretch;
        let seconds = begin.elapsed().as_secs_f64() / (self.steps - steps) as f64;
        self.quickest = Some(
            self.quickest
                .map_or(seconds, |quickest| quickest.min(seconds)),
        );
        self.stretch = (Instant::now(), self.steps);
    }

    fn add(&mut self, loss: &Tensor) -> Result<()> {
        self.steps += 1;
        self.loss = Some(match &self.loss {
            Some(sum) => (sum + loss)?,
            None => loss.clone(),
        });
        Ok(())
    }

    fn step_seconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64() / self.steps as f64
    }

    /// Over the steps and the ranks. Waits for the device.
    fn mean(&self, collective: &impl Collective) -> Result<f64> {
        let Some(loss) = &self.loss else {
            bail!("no step was taken")
        };
        let sum: f32 = collective.sum(loss)?.to_scalar()?;
        Ok(f64::from(sum) / (self.steps * collective.ranks()) as f64)
    }
}

/// Linear warm-up, over a tenth of the steps at most, then half a cosine down to the minimum.
fn learning_rate(step: usize, settings: &Settings) -> f64 {
    let (max, min) = (settings.learning_rate, settings.min_learning_rate);
    let warm_up = settings.warm_up.min(settings.steps / 10);
    if step <= warm_up {
        return max * step as f64 / warm_up as f64;
    }
    let progress = (step - warm_up) as f64 / (settings.steps - warm_up) as f64;
    min + (max - min) * 0.5 * (1. + (PI * progress).cos())
}
