//! The CPU backend: who computes which rows, and in which order partial sums are added.
//!
//! Two ways to divide the work. *By rows*: a task takes consecutive rows. *By columns*, for few wide rows: each row's
//! segments are tasks. How a row's sums are associated depends on the segments alone, and how dweight and dbias are,
//! on the problem's shape alone, so that results are the same for any number of threads.

mod element;
mod row;

use crate::op::{self, BackwardArgs, Forward, Gradients};
use crate::problem::{Problem, Wanted, dispatch};
use candle_core::{CpuStorage, Result, bail};
use element::Element;
use rayon::prelude::*;
use row::{GradientScales, Params, RowStatistics, SEGMENT};
use std::ops::Range;

/// Below this many elements a call runs on the calling thread: waking the pool costs more.
const SERIAL_ELEMENTS: usize = 32 * 1024;
/// What a task of consecutive rows should hold at least.
const TASK_ELEMENTS: usize = 16 * 1024;
/// At most this many blocks of rows keep their own partial dweight and dbias.
const MAX_PARTIALS: usize = 64;
/// Rows a partial stands for at least: it is written and read once, like two rows.
const ROWS_PER_PARTIAL: usize = 16;

type Operand<'a> = op::Operand<'a, CpuStorage>;

pub(crate) fn forward(
    problem: &Problem,
    x: Operand<'_>,
    weight: Option<Operand<'_>>,
    bias: Option<Operand<'_>>,
    keep: bool,
) -> Result<Forward<CpuStorage>> {
    dispatch!("CPU", problem, T, P => {
        let x = slice::<T>(problem, x)?;
        let weight = weight.map(|w| slice::<P>(problem, w)).transpose()?;
        let bias = bias.map(|b| slice::<P>(problem, b)).transpose()?;
        let params = Params::new(weight, bias);
        Ok(forward_typed(problem, x, &params, keep))
    })
}

pub(crate) fn backward(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    wanted: Wanted,
) -> Result<Gradients<CpuStorage>> {
    dispatch!("CPU", problem, T, P => {
        type A = <T as Element>::Acc;
        let weight = args.weight.map(|w| slice::<P>(problem, w)).transpose()?;
        let mean = args.mean.map(|m| slice::<A>(problem, m)).transpose()?;
        let stats: Vec<_> = slice::<A>(problem, args.rstd)?
            .iter()
            .enumerate()
            .map(|(row, &rstd)| RowStatistics { mean: mean.map_or(0., |mean| mean[row]), rstd })
            .collect();
        Ok(backward_typed::<T, P>(Backward {
            problem,
            wanted,
            x: slice(problem, args.x)?,
            dy: slice(problem, args.dy)?,
            params: &Params::<A>::new::<P>(weight, None),
            stats: &stats,
        }))
    })
}

/// The elements of a dense operand.
fn slice<'a, T: Element>(problem: &Problem, (storage, layout): Operand<'a>) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!(
            "{}: expected a contiguous operand, got strides {:?} for shape {:?}",
            problem.op_name(),
            layout.stride(),
            layout.dims()
        ),
    }
}

fn forward_typed<T: Element>(
    problem: &Problem,
    x: &[T],
    params: &Params<'_, T::Acc>,
    keep: bool,
) -> Forward<CpuStorage> {
    let (rows, cols) = (problem.rows, problem.cols);
    let mut y = bytemuck::allocation::zeroed_vec::<T>(rows * cols);
    let mut stats = vec![RowStatistics::of_empty_row(problem); rows];
    if problem.is_empty() {
        // ys has no elements, and the statistics of an empty row are set.
    } else if rows * cols <= SERIAL_ELEMENTS {
        forward_rows(problem, x, params, &mut y, &mut stats);
    } else if by_columns(problem) {
        for ((x, y), stats) in x.chunks(cols).zip(y.chunks_mut(cols)).zip(&mut stats) {
            *stats = row::statistics_parallel(problem, x);
            y.par_chunks_mut(SEGMENT)
                .zip(x.par_chunks(SEGMENT))
                .enumerate()
                .for_each(|(segment, (y, x))| {
                    let params = params.from(segment * SEGMENT);
                    row::dispatch(
                        #[inline(always)]
                        || row::normalize(x, *stats, &params, y),
                    );
                });
        }
    } else {
        let task_rows = TASK_ELEMENTS.div_ceil(cols);
        (
            x.par_chunks(task_rows * cols),
            y.par_chunks_mut(task_rows * cols),
            stats.par_chunks_mut(task_rows),
        )
            .into_par_iter()
            .for_each(|(x, y, stats)| forward_rows(problem, x, params, y, stats));
    }
    let statistics = keep.then(|| {
        let means = stats.iter().map(|s| s.mean).filter(|_| problem.remove_mean);
        T::Acc::to_storage(means.chain(stats.iter().map(|s| s.rstd)).collect())
    });
    Forward {
        ys: T::to_storage(y),
        statistics,
    }
}

fn forward_rows<T: Element>(
    problem: &Problem,
    x: &[T],
    params: &Params<'_, T::Acc>,
    y: &mut [T],
    stats: &mut [RowStatistics<T::Acc>],
) {
    let cols = problem.cols;
    row::dispatch(
        #[inline(always)]
        || {
            for ((x, y), stats) in x.chunks(cols).zip(y.chunks_mut(cols)).zip(stats) {
                *stats = row::statistics(problem, x);
                row::normalize(x, *stats, params, y);
            }
        },
    );
}

/// Whether the rows are too few and too wide to be the axis of parallelism. Depends on the shape alone.
fn by_columns(problem: &Problem) -> bool {
    problem.cols >= 4 * SEGMENT && problem.rows < 4 * MAX_PARTIALS
}

/// What one backward pass reads, in Rust types.
#[derive(Clone, Copy)]
struct Backward<'a, T: Element> {
    problem: &'a Problem,
    wanted: Wanted,
    x: &'a [T],
    dy: &'a [T],
    params: &'a Params<'a, T::Acc>,
    stats: &'a [RowStatistics<T::Acc>],
}

/// Sums over rows, of one block of rows or of all; empty where not wanted.
struct ParamGradients<A> {
    dweight: Vec<A>,
    dbias: Vec<A>,
}

impl<A: element::Acc> ParamGradients<A> {
    fn zeros(wanted: Wanted, cols: usize) -> Self {
        let zeros = |wanted| vec![A::zero(); if wanted { cols } else { 0 }];
        Self {
            dweight: zeros(wanted.dweight),
            dbias: zeros(wanted.dbias),
        }
    }
}

fn backward_typed<T: Element, P: Element<Acc = T::Acc>>(
    pass: Backward<'_, T>,
) -> Gradients<CpuStorage> {
    let Backward {
        problem, wanted, ..
    } = pass;
    let mut dx = bytemuck::allocation::zeroed_vec::<T>(if wanted.dx { pass.x.len() } else { 0 });
    let grads = if problem.is_empty() {
        ParamGradients::zeros(wanted, problem.cols)
    } else if by_columns(problem) {
        pass.by_columns(&mut dx)
    } else {
        pass.by_rows(&mut dx)
    };
    Gradients {
        dx: wanted.dx.then(|| T::to_storage(dx)),
        dweight: wanted
            .dweight
            .then(|| P::to_storage(P::round(grads.dweight))),
        dbias: wanted.dbias.then(|| P::to_storage(P::round(grads.dbias))),
    }
}

impl<T: Element> Backward<'_, T> {
    /// Blocks of consecutive rows, each with partial dweight and dbias, added in the order of the blocks.
    fn by_rows(self, dx: &mut [T]) -> ParamGradients<T::Acc> {
        let (rows, cols) = (self.problem.rows, self.problem.cols);
        let blocks = (rows / ROWS_PER_PARTIAL)
            .min(rows * cols / TASK_ELEMENTS)
            .clamp(1, MAX_PARTIALS);
        let block_rows = rows.div_ceil(blocks);
        if blocks == 1 {
            return self.block(0..rows, dx);
        }
        let ranges = (0..rows)
            .step_by(block_rows)
            .map(|start| start..rows.min(start + block_rows));
        let partials: Vec<_> = if self.wanted.dx {
            ranges
                .zip(dx.chunks_mut(block_rows * cols))
                .collect::<Vec<_>>()
                .into_par_iter()
                .map(|(range, dx)| self.block(range, dx))
                .collect()
        } else {
            ranges
                .collect::<Vec<_>>()
                .into_par_iter()
                .map(|range| self.block(range, &mut []))
                .collect()
        };
        let mut total = ParamGradients::zeros(self.wanted, cols);
        add_in_order(&mut total.dweight, &partials, |p| &p.dweight);
        add_in_order(&mut total.dbias, &partials, |p| &p.dbias);
        total
    }

    /// The gradients of consecutive rows; `dx` is theirs, or empty if it is not wanted.
    fn block(self, rows: Range<usize>, dx: &mut [T]) -> ParamGradients<T::Acc> {
        let cols = self.problem.cols;
        let mut grads = ParamGradients::zeros(self.wanted, cols);
        row::dispatch(
            #[inline(always)]
            || {
                let mut dx = dx.chunks_mut(cols);
                for row in rows {
                    let (x, dy, stats) = self.row(row);
                    if let Some(dx) = dx.next() {
                        let sums = row::gradient_sums(x, dy, self.params, stats);
                        let scales = GradientScales::new(self.problem, sums);
                        row::dx(x, dy, self.params, stats, scales, dx);
                    }
                    row::add_param_gradients(x, dy, stats, &mut grads.dweight, &mut grads.dbias);
                }
            },
        );
        grads
    }

    /// First the sums of all rows, then tasks that own a segment's columns over all rows: there are no partials.
    fn by_columns(self, dx: &mut [T]) -> ParamGradients<T::Acc> {
        let (rows, cols) = (self.problem.rows, self.problem.cols);
        let scales: Vec<_> = (0..rows)
            .map(|row| {
                let (x, dy, stats) = self.row(row);
                let sums = row::gradient_sums_parallel(x, dy, self.params, stats);
                GradientScales::new(self.problem, sums)
            })
            .collect();
        let segments = cols.div_ceil(SEGMENT);
        let mut total = ParamGradients::zeros(self.wanted, cols);
        let mut dx_of: Vec<Vec<&mut [T]>> = (0..segments).map(|_| Vec::new()).collect();
        for dx in dx.chunks_mut(cols) {
            for (of, dx) in dx_of.iter_mut().zip(dx.chunks_mut(SEGMENT)) {
                of.push(dx);
            }
        }
        let dweight = segments_of(&mut total.dweight, segments);
        let dbias = segments_of(&mut total.dbias, segments);
        dx_of
            .into_par_iter()
            .zip(dweight)
            .zip(dbias)
            .enumerate()
            .for_each(|(segment, ((dx, dweight), dbias))| {
                let start = segment * SEGMENT;
                let columns = start..cols.min(start + SEGMENT);
                let params = self.params.from(start);
                row::dispatch(
                    #[inline(always)]
                    || {
                        let mut dx = dx.into_iter();
                        for (row, &scales) in scales.iter().enumerate() {
                            let (x, dy, stats) = self.row(row);
                            let (x, dy) = (&x[columns.clone()], &dy[columns.clone()]);
                            if let Some(dx) = dx.next() {
                                row::dx(x, dy, &params, stats, scales, dx);
                            }
                            row::add_param_gradients(x, dy, stats, dweight, dbias);
                        }
                    },
                );
            });
        total
    }

    fn row(&self, row: usize) -> (&[T], &[T], RowStatistics<T::Acc>) {
        let range = row * self.problem.cols..(row + 1) * self.problem.cols;
        (&self.x[range.clone()], &self.dy[range], self.stats[row])
    }
}

/// `values` in segments, or as many empty slices if it is empty.
fn segments_of<A>(values: &mut [A], segments: usize) -> Vec<&mut [A]> {
    let mut of: Vec<_> = values.chunks_mut(SEGMENT).collect();
    of.resize_with(segments, Default::default);
    of
}

fn add_in_order<A: element::Acc>(
    total: &mut [A],
    partials: &[ParamGradients<A>],
    field: impl Fn(&ParamGradients<A>) -> &Vec<A> + Sync,
) {
    total
        .par_chunks_mut(row::CHUNK)
        .enumerate()
        .for_each(|(chunk, total)| {
            let columns = chunk * row::CHUNK..chunk * row::CHUNK + total.len();
            for partial in partials {
                for (total, &part) in total.iter_mut().zip(&field(partial)[columns.clone()]) {
                    *total += part;
                }
            }
        });
}
