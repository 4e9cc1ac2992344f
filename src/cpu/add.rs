//! The residual add, and the dropout before it, as passes of their own beside the norm's.

use super::element::{Acc, CHUNK, Element};
use super::memory::Fresh;
use super::row::{self, Columns};
use super::simd::{self, Isa};
use super::{Operand, TASK_ELEMENTS, for_each, slice, threads_for};
use crate::add::{AddArgs, AddForward, AddGradients};
use crate::dropout::Dropout;
use crate::op::{BackwardArgs, Gradients};
use crate::problem::{Problem, Wanted, dispatch};
use candle_core::{CpuStorage, Layout, Result};
use pulp::Simd;
use std::iter::zip;
use std::mem::MaybeUninit;

pub(crate) fn add_forward(
    problem: &Problem,
    args: &AddArgs<Operand<'_>>,
    dropout: Option<Dropout>,
    keep: bool,
) -> Result<AddForward<CpuStorage, CpuStorage>> {
    let sum = added(problem, args.x, args.residual, dropout)?;
    let layout = Layout::contiguous(args.x.1.shape());
    let forward = super::forward(problem, (&sum, &layout), args.weight, args.bias, keep)?;
    Ok(AddForward {
        ys: forward.ys,
        statistics: forward.statistics,
        sum,
    })
}

/// `args.x` is the sum.
pub(crate) fn add_backward(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    statistics: &CpuStorage,
    dsum: Option<Operand<'_>>,
    dropout: Option<Dropout>,
    wanted: Wanted,
) -> Result<AddGradients<CpuStorage>> {
    let Gradients { dx, dweight, dbias } = super::backward(problem, args, statistics, wanted)?;
    let layout = Layout::contiguous(args.x.1.shape());
    let whole = match (dx, dsum) {
        (Some(dx), Some(dsum)) => Some(added(problem, (&dx, &layout), dsum, None)?),
        (dx, _) => dx,
    };
    let (dx, dresidual) = match (whole, dropout) {
        (Some(whole), Some(dropout)) => {
            let dx = dropped(problem, (&whole, &layout), dropout)?;
            (Some(dx), Some(whole))
        }
        (whole, _) => (whole, None),
    };
    Ok(AddGradients {
        dx,
        dresidual,
        dweight,
        dbias,
    })
}

/// residual + dropout(x).
fn added(
    problem: &Problem,
    x: Operand<'_>,
    residual: Operand<'_>,
    dropout: Option<Dropout>,
) -> Result<CpuStorage> {
    dispatch!("CPU", problem, T => {
        let (x, residual) = (slice::<T>(problem, x)?, slice::<T>(problem, residual)?);
        Ok(T::to_storage(map(dropout, x, Some(residual))))
    })
}

/// dropout(d).
pub(crate) fn dropped(problem: &Problem, d: Operand<'_>, dropout: Dropout) -> Result<CpuStorage> {
    dispatch!("CPU", problem, T => {
        Ok(T::to_storage(map(Some(dropout), slice::<T>(problem, d)?, None)))
    })
}

/// dropout(x), and the residual if there is one.
#[allow(unsafe_code)]
fn map<T: Element>(dropout: Option<Dropout>, x: &[T], residual: Option<&[T]>) -> Vec<T> {
    let mut sum = Fresh::new(x.len());
    let threads = threads_for(x.len());
    let tasks = zip(
        x.chunks(TASK_ELEMENTS),
        sum.slots().chunks_mut(TASK_ELEMENTS),
    );
    let tasks = tasks.enumerate().collect();
    for_each(
        threads,
        tasks,
        |(task, (x, sum)): (usize, (&[T], &mut [_]))| {
            let first = task * TASK_ELEMENTS;
            let residual = residual.map(|residual| &residual[first..first + x.len()]);
            simd::dispatch(
                #[inline(always)]
                |isa| task_of(isa, dropout, first, x, residual, sum),
            );
        },
    );
    // SAFETY: the tasks are all of it, and `task_of` writes all that it is given.
    unsafe { sum.assume_written() }
}

#[inline(always)]
fn task_of<T: Element>(
    isa: Isa,
    dropout: Option<Dropout>,
    first: usize,
    x: &[T],
    residual: Option<&[T]>,
    sum: &mut [MaybeUninit<T>],
) {
    // No bits where an element is dropped: it is 0, whatever its value.
    let mut kept = [T::Acc::all_bits(); CHUNK];
    let scale = T::Acc::of_f64(dropout.map_or(1., |dropout| dropout.scale()));
    for (chunk, (x, sum)) in zip(x.chunks(CHUNK), sum.chunks_mut(CHUNK)).enumerate() {
        let at = chunk * CHUNK;
        if let Some(dropout) = dropout {
            let (threshold, zero) = (dropout.threshold(), T::Acc::of_f64(0.));
            dropout.for_each_word(first + at, x.len(), |place, word| {
                kept[place] = if word < threshold {
                    zero
                } else {
                    T::Acc::all_bits()
                };
            });
        }
        let chunk = Chunk {
            x,
            kept: &kept[..x.len()],
            scale,
            residual: residual.map(|residual| &residual[at..at + x.len()]),
            sum,
        };
        row::for_each_column(isa, x.len(), chunk);
    }
}

struct Chunk<'a, T: Element> {
    x: &'a [T],
    kept: &'a [T::Acc],
    scale: T::Acc,
    residual: Option<&'a [T]>,
    sum: &'a mut [MaybeUninit<T>],
}

impl<T: Element> Columns<T> for Chunk<'_, T> {
    #[inline(always)]
    fn at<S: Simd, const STREAM: bool>(
        &mut self,
        isa: Isa,
        simd: S,
        column: usize,
        vectors: usize,
    ) {
        let lanes = T::Acc::lanes::<S>();
        let scale = T::Acc::splat(simd, self.scale);
        for vector in 0..vectors {
            let first = column + vector * lanes;
            let here = first..first + lanes;
            let x = T::load(isa, simd, &self.x[here.clone()]);
            let kept = T::Acc::load(isa, simd, &self.kept[here.clone()]);
            let mut sum = T::Acc::and_lanes(simd, T::Acc::mul_lanes(simd, x, scale), kept);
            if let Some(residual) = self.residual {
                let residual = T::load(isa, simd, &residual[here.clone()]);
                sum = T::Acc::add_lanes(simd, sum, residual);
            }
            T::store::<S, STREAM>(isa, simd, sum, &mut self.sum[here]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Several tasks, whose elements count from the tensor's first.
    #[test]
    fn each_element_has_its_own_word() {
        const ELEMENTS: usize = 3 * TASK_ELEMENTS + 1001;
        let dropout = Dropout {
            probability: 0.25,
            seed: 9,
        };
        let mut want = vec![0.; ELEMENTS];
        dropout.for_each_word(0, ELEMENTS, |element, word| {
            if word >= dropout.threshold() {
                want[element] = dropout.scale();
            }
        });
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let got = pool
                .unwrap()
                .install(|| map(Some(dropout), &vec![1f64; ELEMENTS], None));
            assert_eq!(got, want, "{threads} threads");
        }
    }
}
