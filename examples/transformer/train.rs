//! candle's usual training loop, with a learning rate that warms up and decays.

use crate::{
    data::{self, Corpus},
    model::{Gpt, named_vars},
};
use anyhow::{Result, bail};
use candle_core::{Device, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, VarMap};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use rand::Rng;
use std::{
    f64::consts::PI,
    fmt,
    time::{Duration, Instant},
};

/// Both losses are those of this many windows, the same ones each time.
const EVAL_WINDOWS: usize = 128;

#[derive(Clone, Debug)]
pub struct Options {
    pub steps: usize,
    pub batch_size: usize,
    /// The highest, reached after the warm-up.
    pub learning_rate: f64,
    pub eval_every: usize,
}

/// In nats a token.
#[derive(Clone, Copy, Debug)]
pub struct Losses {
    pub train: f64,
    pub held_out: f64,
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { train, held_out } = self;
        write!(f, "train loss {train:.3}, held-out loss {held_out:.3}")
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Summary {
    pub before: Losses,
    pub after: Losses,
    pub tokens: usize,
    /// Without the evaluations.
    pub time: Duration,
}

impl Summary {
    pub fn tokens_per_second(&self) -> u64 {
        tokens_per_second(self.tokens, self.time)
    }
}

pub fn train(
    gpt: &Gpt,
    varmap: &VarMap,
    corpus: &Corpus,
    options: &Options,
    device: &Device,
    rng: &mut impl Rng,
) -> Result<Summary> {
    let context = gpt.config().context;
    let tokens_per_step = options.batch_size * context;
    let tokens = options.steps * tokens_per_step;
    let mut opt = AdamW::new_lr(varmap.all_vars(), options.learning_rate)?;
    // Drawn on stderr if that is a terminal. The lines on stdout are printed in any case.
    let bar = ProgressBar::new(tokens as u64).with_style(ProgressStyle::with_template(
        "{bar:30} {human_pos}/{human_len} tokens, {per_sec}, {eta} left",
    )?);

    let before = evaluate(gpt, corpus, options, device, 0)?;
    bar.suspend(|| println!("step 0: {before}"));
    let mut after = before;
    let mut time = Duration::ZERO;
    let (mut since, mut steps_since) = (Instant::now(), 0);
    for step in 1..=options.steps {
        opt.set_learning_rate(learning_rate(step, options));
        let starts = data::random_starts(&corpus.train, options.batch_size, context, rng);
        let (ids, targets) = data::windows(&corpus.train, &starts, context, device)?;
        let loss = gpt.loss(&ids, &targets)?;
        let grads = loss.backward()?;
        if step == 1 {
            bar.suspend(|| print_gradients(varmap, &grads));
        }
        opt.step(&grads)?;

        bar.inc(tokens_per_step as u64);
        steps_since += 1;
        if step.is_multiple_of(options.eval_every) || step == options.steps {
            device.synchronize()?;
            let elapsed = since.elapsed();
            time += elapsed;
            let speed = tokens_per_second(steps_since * tokens_per_step, elapsed);
            after = evaluate(gpt, corpus, options, device, step)?;
            bar.suspend(|| println!("step {step}: {after}, {} tokens/s", HumanCount(speed)));
            (since, steps_since) = (Instant::now(), 0);
        }
    }
    bar.finish_and_clear();
    Ok(Summary {
        before,
        after,
        tokens,
        time,
    })
}

/// Linear warm-up over a tenth of the steps, 100 at most, then half a cosine down to a tenth.
fn learning_rate(step: usize, options: &Options) -> f64 {
    let warm_up = (options.steps / 10).min(100);
    if step <= warm_up {
        return options.learning_rate * step as f64 / warm_up as f64;
    }
    let progress = (step - warm_up) as f64 / (options.steps - warm_up) as f64;
    options.learning_rate * (0.1 + 0.9 * 0.5 * (1. + (PI * progress).cos()))
}

fn evaluate(
    gpt: &Gpt,
    corpus: &Corpus,
    options: &Options,
    device: &Device,
    step: usize,
) -> Result<Losses> {
    let losses = Losses {
        train: mean_loss(gpt, &corpus.train, options.batch_size, device)?,
        held_out: mean_loss(gpt, &corpus.held_out, options.batch_size, device)?,
    };
    if !(losses.train.is_finite() && losses.held_out.is_finite()) {
        bail!("the loss is not finite after step {step}: lower --learning-rate");
    }
    Ok(losses)
}

fn mean_loss(
    gpt: &Gpt,
    text: &[u8],
    batch_size: usize,
    device: &Device,
) -> candle_core::Result<f64> {
    let context = gpt.config().context;
    let starts = data::even_starts(text, EVAL_WINDOWS, context);
    let mut sum = 0.;
    for starts in starts.chunks(batch_size) {
        let (ids, targets) = data::windows(text, starts, context, device)?;
        let loss: f32 = gpt.loss(&ids, &targets)?.to_scalar()?;
        sum += f64::from(loss) * starts.len() as f64;
    }
    Ok(sum / starts.len() as f64)
}

/// The names of the variables that `grads` has nothing for: they would never learn.
fn without_gradient(varmap: &VarMap, grads: &GradStore) -> Vec<String> {
    named_vars(varmap)
        .into_iter()
        .filter(|(_, var)| grads.get(var).is_none())
        .map(|(name, _)| name)
        .collect()
}

fn print_gradients(varmap: &VarMap, grads: &GradStore) {
    let total = varmap.all_vars().len();
    let missing = without_gradient(varmap, grads);
    println!("gradients: {} of {total} variables", total - missing.len());
    if !missing.is_empty() {
        println!("without a gradient: {}", missing.join(", "));
    }
}

fn tokens_per_second(tokens: usize, time: Duration) -> u64 {
    (tokens as f64 / time.as_secs_f64()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_warms_up_and_decays() {
        for steps in [1, 5, 10, 400, 5000] {
            let options = Options {
                steps,
                batch_size: 1,
                learning_rate: 1.,
                eval_every: 1,
            };
            let rates: Vec<f64> = (1..=steps)
                .map(|step| learning_rate(step, &options))
                .collect();
            let warm_up = (steps / 10).min(100);
            assert!(rates[..warm_up].is_sorted(), "{steps}");
            assert!(rates[warm_up..].is_sorted_by(|a, b| a > b), "{steps}");
            assert!(rates.iter().all(|&rate| rate > 0. && rate <= 1.), "{steps}");
            assert!((rates[steps - 1] - 0.1).abs() < 1e-12, "{steps}");
        }
    }
}
