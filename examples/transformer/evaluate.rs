//! Losses on held-out text: over all of it, and nanoGPT's estimate from a sample of it.

use crate::{
    checkpoint::Checkpoint,
    data::{self, Corpus, EvalBatch},
    model::Gpt,
    ops::{Purpose, rng},
};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use indicatif::HumanCount;
use std::fmt;

/// Windows in a batch, which keeps no activations.
const BATCH: usize = 64;

/// nanoGPT's estimate: the mean of this many random batches.
const ESTIMATE_BATCHES: usize = 20;

/// How often the estimate is drawn, to tell how much it varies.
const ESTIMATES: usize = 20;

/// The batches of the loss that a run reports.
pub fn side_by_side(len: usize, context: usize) -> Vec<EvalBatch> {
    data::eval_batches(len, context, context, BATCH)
}

/// The losses of the tokens that `batches` predict, added up, a scalar on the device.
pub fn loss_sum(gpt: &Gpt, ids: &[u32], batches: &[EvalBatch]) -> Result<Tensor> {
    let device = gpt.device();
    let mut sum = Tensor::zeros((), DType::F32, device)?;
    for batch in batches {
        let (ids, targets) = data::windows(ids, &batch.starts, batch.length, device)?;
        let loss = gpt.loss_of_last(batch.counted, &ids, &targets)?;
        sum = (sum + (loss * (batch.starts.len() * batch.counted) as f64)?)?;
    }
    Ok(sum)
}

fn mean_loss(gpt: &Gpt, ids: &[u32], batches: &[EvalBatch]) -> Result<f64> {
    let count: usize = batches.iter().map(|b| b.starts.len() * b.counted).sum();
    let sum: f32 = loss_sum(gpt, ids, batches)?.to_scalar()?;
    Ok(f64::from(sum) / count as f64)
}

/// What a checkpoint is worth, in nats a character.
#[derive(Clone, Debug)]
pub struct Report {
    step: usize,
    held_out: usize,
    context: usize,
    batch_size: usize,
    pub side_by_side: f64,
    pub overlapping: f64,
    pub estimates: Vec<f64>,
}

impl Report {
    pub fn new(
        checkpoint: &Checkpoint,
        corpus: &Corpus,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let settings = &checkpoint.progress.settings;
        // The held-out part of another text may be what this one was trained on.
        corpus.ensure_is(&checkpoint.progress.fingerprint)?;
        let (context, batch_size) = (settings.context, settings.batch_size);
        let gpt = checkpoint.model(device)?;
        let ids = &corpus.held_out;
        let loss = |stride| {
            let batches = data::eval_batches(ids.len(), context, stride, BATCH);
            mean_loss(&gpt, ids, &batches)
        };
        let estimate = |number| {
            let mut rng = rng(seed, Purpose::Estimate, number, 0);
            let count = ESTIMATE_BATCHES * batch_size;
            let batches: Vec<EvalBatch> = data::random_starts(ids, count, context, &mut rng)
                .chunks(BATCH)
                .map(|starts| EvalBatch {
                    starts: starts.to_vec(),
                    length: context,
                    counted: context,
                })
                .collect();
            mean_loss(&gpt, ids, &batches)
        };
        Ok(Self {
            step: checkpoint.progress.step,
            held_out: ids.len(),
            context,
            batch_size,
            side_by_side: loss(context)?,
            overlapping: loss(context.div_ceil(2))?,
            estimates: (0..ESTIMATES).map(estimate).collect::<Result<_>>()?,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { context, .. } = self;
        let count = self.estimates.len() as f64;
        let mean = self.estimates.iter().sum::<f64>() / count;
        let squares = self.estimates.iter().map(|x| (x - mean).powi(2));
        let deviation = (squares.sum::<f64>() / (count - 1.)).sqrt();
        let min = self.estimates.iter().copied().fold(f64::INFINITY, f64::min);
        let max = self.estimates.iter().copied().fold(0., f64::max);
        writeln!(
            f,
            "step {}, {} characters held out, nats a character:",
            self.step,
            HumanCount(self.held_out as u64)
        )?;
        writeln!(
            f,
            "{:.4}  all of them, in windows of {context} side by side: the held-out loss of a run",
            self.side_by_side
        )?;
        writeln!(
            f,
            "{:.4}  all of them, in windows that overlap by half: each predicted from more than {} characters",
            self.overlapping,
            context / 2
        )?;
        write!(
            f,
            "{mean:.4}  nanoGPT's estimate from {ESTIMATE_BATCHES} random batches of {} windows, drawn {} times: standard \
             deviation {deviation:.4}, from {min:.4} to {max:.4}",
            self.batch_size,
            self.estimates.len(),
        )
    }
}
