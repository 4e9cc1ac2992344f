//! The CPU backend: who computes which rows, and in which order partial sums are added.
//!
//! Two ways to divide the work. *By rows*: a task takes consecutive rows. *By columns*, for few or wide rows: a task
//! takes some columns of a group of rows. How a row's sums are associated depends on its segments alone, and how dweight
//! and dbias are, on the problem's shape alone, so that results are the same for any number of threads.

mod add;
mod element;
#[allow(unsafe_code)]
mod memory;
mod row;
mod simd;

use crate::op::{self, BackwardArgs, Forward, Gradients};
use crate::problem::{Problem, Wanted, dispatch};
pub(crate) use add::{add_backward, add_forward, dropped};
use candle_core::{CpuStorage, Result, bail};
pub(crate) use element::Element;
use element::{Acc, CHUNK, Sums};
use memory::{Fresh, InLine, fence, streams, zeroed};
use rayon::prelude::*;
use row::{GradientRow, GradientScales, Moments, Normalize, Param, RowStatistics, SEGMENT};
use std::iter::zip;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Up to this many elements a call runs on the calling thread: waking the pool costs more.
const SERIAL_ELEMENTS: usize = 32 * 1024;
/// What a task should hold at least.
const TASK_ELEMENTS: usize = 16 * 1024;
/// Tasks for each thread, to even out what the machine does beside.
const TASKS_PER_THREAD: usize = 16;
/// Elements of a group of rows, for each thread: what is read twice is found in the last-level cache.
const GROUP_ELEMENTS: usize = 1024 * 1024;
/// Rows of a group at least. Sums over rows are written and read once a group: for fewer rows that costs more than to read
/// x and dy twice.
const ROWS_PER_GROUP: usize = 4;
/// At most this many blocks of rows keep their own partial dweight and dbias.
const MAX_PARTIALS: usize = 64;
/// Rows a partial stands for at least: it is written and read once, like two rows.
const ROWS_PER_PARTIAL: usize = 16;
/// Rows that a running sum for dweight and dbias adds up before its total goes on: each addition rounds to the sum so far.
const ROWS_PER_SUM: usize = 32;
/// Up to this many columns, a copy of weight and bias in f32 stays in the second-level cache.
const WIDENED_COLUMNS: usize = 32 * 1024;
/// Columns whose sums over rows stay in the first-level cache.
const STRIP: usize = 1024;

/// Of weight and of bias.
type Pair<'a, T> = (&'a mut [T], &'a mut [T]);

type Operand<'a> = op::Operand<'a, CpuStorage>;

#[allow(unsafe_code)]
pub(crate) fn forward(
    problem: &Problem,
    x: Operand<'_>,
    weight: Option<Operand<'_>>,
    bias: Option<Operand<'_>>,
    keep: bool,
) -> Result<Forward<CpuStorage, CpuStorage>> {
    dispatch!("CPU", problem, T, P => {
        let pass = ForwardPass::<T, P>::new(problem, x, weight, bias)?;
        let (means, rows) = if keep { (problem.means(), problem.rows) } else { (0, 0) };
        let mut ys = Fresh::new(pass.x.len());
        let mut statistics = Fresh::new(means + rows);
        let (mean, rstd) = statistics.slots().split_at_mut(means);
        pass.run(ys.slots(), mean, rstd);
        Ok(Forward {
            // SAFETY: `run` writes all of its outputs.
            ys: T::to_storage(unsafe { ys.assume_written() }),
            // SAFETY: the same.
            statistics: keep.then(|| <T as Element>::Acc::to_storage(unsafe { statistics.assume_written() })),
        })
    })
}

#[allow(unsafe_code)]
pub(crate) fn backward(
    problem: &Problem,
    args: &BackwardArgs<Operand<'_>>,
    statistics: &CpuStorage,
    wanted: Wanted,
) -> Result<Gradients<CpuStorage>> {
    dispatch!("CPU", problem, T, P => {
        let pass = BackwardPass::<T, P>::new(problem, args, statistics, wanted)?;
        let room = |wanted, len| if wanted { len } else { 0 };
        let mut dx = Fresh::new(room(wanted.dx, pass.x.len()));
        let mut dweight = Fresh::new(room(wanted.dweight, problem.cols));
        let mut dbias = Fresh::new(room(wanted.dbias, problem.cols));
        pass.run(dx.slots(), dweight.slots(), dbias.slots());
        Ok(Gradients {
            // SAFETY: `run` writes all of its outputs.
            dx: wanted.dx.then(|| T::to_storage(unsafe { dx.assume_written() })),
            // SAFETY: the same.
            dweight: wanted.dweight.then(|| P::to_storage(unsafe { dweight.assume_written() })),
            // SAFETY: the same.
            dbias: wanted.dbias.then(|| P::to_storage(unsafe { dbias.assume_written() })),
        })
    })
}

/// The elements of a dense operand.
fn slice<'a, T: Element>(problem: &Problem, (storage, layout): Operand<'a>) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        // An empty view may start behind its storage's end.
        Some((start, end)) if start == end => Ok(&storage.as_slice::<T>()?[..0]),
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!(
            "{}: expected a contiguous operand, got strides {:?} for shape {:?}",
            problem.op_name(),
            layout.stride(),
            layout.dims()
        ),
    }
}

/// How many threads a call of so many elements uses. Its results do not depend on it.
fn threads_for(elements: usize) -> usize {
    if elements <= SERIAL_ELEMENTS {
        1
    } else {
        rayon::current_num_threads()
    }
}

/// Runs `f` in the pool, if there is work for it: phases that follow each other wake its threads once.
fn in_pool<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    if threads == 1 {
        f()
    } else {
        rayon::scope(|_| f())
    }
}

fn for_each<T: Send>(threads: usize, tasks: Vec<T>, f: impl Fn(T) + Sync + Send) {
    if threads == 1 {
        tasks.into_iter().for_each(f);
    } else {
        tasks.into_par_iter().for_each(f);
    }
}

/// `f` of 0 to `len`, in order, of which a task takes at least `at_least`.
fn collect<R: Send>(
    threads: usize,
    len: usize,
    at_least: usize,
    f: impl Fn(usize) -> R + Sync + Send,
) -> Vec<R> {
    if threads == 1 {
        (0..len).map(f).collect()
    } else {
        let indices = (0..len).into_par_iter();
        indices.with_min_len(at_least).map(f).collect()
    }
}

/// `values` in chunks, or as many empty slices if it is empty.
fn chunks_of<A>(values: &mut [A], len: usize, count: usize) -> impl Iterator<Item = &mut [A]> {
    let mut chunks = values.chunks_mut(len);
    (0..count).map(move |_| chunks.next().unwrap_or_default())
}

/// Tasks of whole rows.
fn rows_per_task(problem: &Problem, threads: usize) -> usize {
    let Problem { rows, cols, .. } = *problem;
    rows.div_ceil(threads * TASKS_PER_THREAD)
        .max(TASK_ELEMENTS.div_ceil(cols))
}

/// Rows whose elements the last-level cache holds, of `operands` tensors: none if it does not hold one.
fn rows_per_group(problem: &Problem, threads: usize, operands: usize) -> usize {
    threads * GROUP_ELEMENTS / (operands * problem.cols)
}

/// What one forward pass reads, in Rust types.
pub(crate) struct ForwardPass<'a, T, P: Element> {
    problem: &'a Problem,
    x: &'a [T],
    weight: Param<'a, P>,
    bias: Param<'a, P>,
}

impl<'a, T: Element, P: Element<Acc = T::Acc>> ForwardPass<'a, T, P> {
    pub fn new(
        problem: &'a Problem,
        x: Operand<'a>,
        weight: Option<Operand<'a>>,
        bias: Option<Operand<'a>>,
    ) -> Result<Self> {
        let param = |operand: Option<Operand<'a>>| operand.map(|p| slice(problem, p)).transpose();
        Ok(Self {
            problem,
            x: slice(problem, x)?,
            weight: Param::weight(param(weight)?),
            bias: Param::bias(param(bias)?),
        })
    }

    /// Writes all of `y`, and of `mean` and `rstd`, which are empty where they are not kept.
    pub fn run(
        &self,
        y: &mut [MaybeUninit<T>],
        mean: &mut [MaybeUninit<T::Acc>],
        rstd: &mut [MaybeUninit<T::Acc>],
    ) {
        // Weights are copied once where that is little beside the rows: half ones are converted, and all begin a line where y does. Weights about
        // 0 are made ordinary ones.
        let Problem { rows, cols, .. } = *self.problem;
        let offset = Acc::of_f64(self.problem.weight_offset());
        let converts = size_of::<P>() < size_of::<T::Acc>();
        let copy = rows >= if converts { 4 } else { 16 } && cols <= WIDENED_COLUMNS;
        if copy || self.problem.zero_centered_weight {
            let head = row::head_of_first(y, cols);
            let weight = self.weight.widened(offset, head);
            let bias = self.bias.widened(Acc::of_f64(0.), head);
            let pass = ForwardPass::<T, T::Acc> {
                problem: self.problem,
                x: self.x,
                weight: Param::weight(weight.as_deref()),
                bias: Param::bias(bias.as_deref()),
            };
            pass.divide(y, mean, rstd);
        } else {
            self.divide(y, mean, rstd);
        }
    }

    /// On one thread, by rows or by columns.
    fn divide(
        &self,
        y: &mut [MaybeUninit<T>],
        mean: &mut [MaybeUninit<T::Acc>],
        rstd: &mut [MaybeUninit<T::Acc>],
    ) {
        let Problem { rows, cols, .. } = *self.problem;
        if self.problem.is_empty() {
            let stats = RowStatistics::new(self.problem, Moments::default());
            mean.fill(MaybeUninit::new(stats.mean));
            rstd.fill(MaybeUninit::new(stats.rstd));
            return;
        }
        let threads = threads_for(rows * cols);
        let streams = streams(y, cols);
        if threads == 1 {
            self.rows(self.x, y, mean, rstd, streams);
        } else if rows < 4 * threads && cols >= 2 * SEGMENT {
            in_pool(threads, || self.by_columns(threads, y, mean, rstd, streams));
        } else {
            let task_rows = rows_per_task(self.problem, threads);
            let count = rows.div_ceil(task_rows);
            let x = self.x.chunks(task_rows * cols);
            let y = y.chunks_mut(task_rows * cols);
            let mean = chunks_of(mean, task_rows, count);
            let rstd = chunks_of(rstd, task_rows, count);
            let tasks = zip(zip(x, y), zip(mean, rstd)).collect();
            for_each(threads, tasks, |((x, y), (mean, rstd))| {
                self.rows(x, y, mean, rstd, streams);
            });
        }
    }

    fn rows(
        &self,
        x: &[T],
        y: &mut [MaybeUninit<T>],
        mean: &mut [MaybeUninit<T::Acc>],
        rstd: &mut [MaybeUninit<T::Acc>],
        streams: bool,
    ) {
        let cols = self.problem.cols;
        simd::dispatch(
            #[inline(always)]
            |isa| {
                let pairs = zip(x.chunks(2 * cols), y.chunks_mut(2 * cols));
                for (first, (of_pair, y)) in zip((0..).step_by(2), pairs) {
                    let next = x.get((first + 2) * cols..).unwrap_or_default();
                    let mut pair = [const { None }; 2];
                    let rows = zip(of_pair.chunks(cols), y.chunks_mut(cols));
                    for ((row, (x, y)), slot) in zip(rows.enumerate(), &mut pair) {
                        let moments = row::moments(isa, self.problem, x);
                        let stats = RowStatistics::new(self.problem, moments);
                        keep(stats, first + row, mean, rstd);
                        *slot = Some((x, y, stats));
                    }
                    for block in 0..=cols.div_ceil(CHUNK) {
                        for (row, slot) in pair.iter_mut().enumerate() {
                            let Some((x, y, stats)) = slot else { break };
                            let columns = row::block(y, block);
                            if columns.is_empty() {
                                continue;
                            }
                            let normalize = Normalize {
                                x: &x[columns.clone()],
                                stats: *stats,
                                weight: self.weight.from(columns.start),
                                bias: self.bias.from(columns.start),
                                next: next.get(row * cols + columns.start..).unwrap_or_default(),
                                y: &mut y[columns],
                            };
                            normalize.run(isa, streams);
                        }
                    }
                }
                finish(streams);
            },
        );
    }

    /// Groups of rows: first the moments of all segments, then y.
    fn by_columns(
        &self,
        threads: usize,
        y: &mut [MaybeUninit<T>],
        mean: &mut [MaybeUninit<T::Acc>],
        rstd: &mut [MaybeUninit<T::Acc>],
        streams: bool,
    ) {
        let cols = self.problem.cols;
        let segments = cols.div_ceil(SEGMENT);
        let group_len = rows_per_group(self.problem, threads, 1).max(1) * cols;
        let mut first_row = 0;
        for (x, y) in zip(self.x.chunks(group_len), y.chunks_mut(group_len)) {
            let rows = x.len() / cols;
            let segment_of = |index: usize| {
                let (row, segment) = (index / segments, index % segments);
                row * cols + segment * SEGMENT..row * cols + cols.min((segment + 1) * SEGMENT)
            };
            let moments = collect(threads, rows * segments, 1, |index| {
                let x = &x[segment_of(index)];
                simd::dispatch(
                    #[inline(always)]
                    |isa| row::segment_moments(isa, self.problem, x),
                )
            });
            let stats: Vec<_> = moments
                .chunks(segments)
                .map(|of_row| {
                    let moments = of_row
                        .iter()
                        .copied()
                        .fold(Moments::default(), Moments::with);
                    RowStatistics::new(self.problem, moments)
                })
                .collect();
            for (row, &stats) in stats.iter().enumerate() {
                keep(stats, first_row + row, mean, rstd);
            }
            let y = y.chunks_mut(cols).flat_map(|y| y.chunks_mut(SEGMENT));
            // Last to first: of a row that no cache holds, the end is what is left in it.
            let tasks = y
                .enumerate()
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect();
            for_each(threads, tasks, |(index, y): (usize, &mut [_])| {
                let x = &x[segment_of(index)];
                let column = index % segments * SEGMENT;
                let (weight, bias) = (self.weight.from(column), self.bias.from(column));
                simd::dispatch(
                    #[inline(always)]
                    |isa| {
                        let stats = stats[index / segments];
                        let normalize = Normalize {
                            x,
                            stats,
                            weight,
                            bias,
                            y,
                            next: &[],
                        };
                        normalize.run(isa, streams);
                        finish(streams);
                    },
                );
            });
            first_row += rows;
        }
    }
}

/// The end of a task's writes.
fn finish(streams: bool) {
    if streams {
        fence();
    }
}

fn keep<A>(
    stats: RowStatistics<A>,
    row: usize,
    mean: &mut [MaybeUninit<A>],
    rstd: &mut [MaybeUninit<A>],
) {
    if let Some(mean) = mean.get_mut(row) {
        mean.write(stats.mean);
    }
    if let Some(rstd) = rstd.get_mut(row) {
        rstd.write(stats.rstd);
    }
}

/// What one backward pass reads, in Rust types. `P` is the type of weight, dweight and dbias, `W` that of the weight as it is
/// multiplied with.
pub(crate) struct BackwardPass<'a, T: Element, P: Element, W: Element = P> {
    problem: &'a Problem,
    wanted: Wanted,
    x: &'a [T],
    dy: &'a [T],
    weight: Param<'a, W>,
    dparams: PhantomData<P>,
    mean: Option<&'a [T::Acc]>,
    rstd: &'a [T::Acc],
}

impl<'a, T: Element, P: Element<Acc = T::Acc>> BackwardPass<'a, T, P> {
    pub fn new(
        problem: &'a Problem,
        args: &BackwardArgs<Operand<'a>>,
        statistics: &'a CpuStorage,
        wanted: Wanted,
    ) -> Result<Self> {
        let weight = args.weight.map(|w| slice(problem, w)).transpose()?;
        let (mean, rstd) = statistics.as_slice()?.split_at(problem.means());
        Ok(Self {
            problem,
            wanted,
            x: slice(problem, args.x)?,
            dy: slice(problem, args.dy)?,
            weight: Param::weight(weight),
            dparams: PhantomData,
            mean: problem.remove_mean.then_some(mean),
            rstd,
        })
    }

    /// Writes all of what is wanted; the others are empty.
    pub fn run(
        &self,
        dx: &mut [MaybeUninit<T>],
        dweight: &mut [MaybeUninit<P>],
        dbias: &mut [MaybeUninit<P>],
    ) {
        // Weights about 0 are made ordinary ones. Only dx depends on them.
        if self.problem.zero_centered_weight && self.wanted.dx {
            let weight = self
                .weight
                .widened(Acc::of_f64(self.problem.weight_offset()), 0);
            let pass = BackwardPass::<T, P, T::Acc> {
                problem: self.problem,
                wanted: self.wanted,
                x: self.x,
                dy: self.dy,
                weight: Param::weight(weight.as_deref()),
                dparams: PhantomData,
                mean: self.mean,
                rstd: self.rstd,
            };
            pass.divide(dx, dweight, dbias);
        } else {
            self.divide(dx, dweight, dbias);
        }
    }
}

impl<'a, T, P, W> BackwardPass<'a, T, P, W>
where
    T: Element,
    P: Element<Acc = T::Acc>,
    W: Element<Acc = T::Acc>,
{
    /// On one thread, by rows or by columns.
    fn divide(
        &self,
        dx: &mut [MaybeUninit<T>],
        dweight: &mut [MaybeUninit<P>],
        dbias: &mut [MaybeUninit<P>],
    ) {
        let Problem { rows, cols, .. } = *self.problem;
        if self.problem.is_empty() {
            zeroed(dweight);
            zeroed(dbias);
            return;
        }
        let threads = threads_for(rows * cols);
        let streams = streams(dx, cols);
        in_pool(threads, || {
            if by_columns(self.problem) {
                self.by_columns(threads, dx, dweight, dbias, streams);
            } else {
                self.by_rows(threads, dx, dweight, dbias, streams);
            }
        });
    }

    fn stats(&self, row: usize) -> RowStatistics<T::Acc> {
        RowStatistics {
            mean: self.mean.map_or(Acc::of_f64(0.), |mean| mean[row]),
            rstd: self.rstd[row],
        }
    }

    /// Columns of a row of x and dy.
    fn row(&self, row: usize, columns: Range<usize>) -> (&'a [T], &'a [T]) {
        let first = row * self.problem.cols;
        let range = first + columns.start..first + columns.end;
        (&self.x[range.clone()], &self.dy[range])
    }

    /// Blocks of consecutive rows, each with partial dweight and dbias, added in the order of the blocks.
    #[allow(unsafe_code)]
    fn by_rows(
        &self,
        threads: usize,
        dx: &mut [MaybeUninit<T>],
        dweight: &mut [MaybeUninit<P>],
        dbias: &mut [MaybeUninit<P>],
        streams: bool,
    ) {
        let Problem { rows, cols, .. } = *self.problem;
        let blocks = (rows / ROWS_PER_PARTIAL)
            .min(rows * cols / TASK_ELEMENTS)
            .clamp(1, MAX_PARTIALS);
        let block_rows = rows.div_ceil(blocks);
        let blocks = rows.div_ceil(block_rows);
        // Of a block: dweight and then dbias.
        let width = dweight.len() + dbias.len();
        let mut partials = Fresh::<T::Acc>::new(blocks * width);
        let dx = chunks_of(dx, block_rows * cols, blocks);
        let parts = chunks_of(partials.slots(), width.max(1), blocks);
        let tasks = zip(dx, parts).enumerate().collect();
        for_each(threads, tasks, |(block, (dx, part))| {
            let block = block * block_rows..rows.min((block + 1) * block_rows);
            let runs = block.len().div_ceil(ROWS_PER_SUM);
            let part = zeroed(part);
            let (of_dweight, of_dbias) = part.split_at_mut(dweight.len());
            let head = row::head_of_first(dx, cols);
            let [mut dweight, mut dbias] =
                [dweight.len(), dbias.len()].map(|len| InLine::zeros(len, head));
            let dx = chunks_of(dx, ROWS_PER_SUM * cols, runs);
            for (run, dx) in dx.enumerate() {
                let first = block.start + run * ROWS_PER_SUM;
                let run_rows = first..block.end.min(first + ROWS_PER_SUM);
                self.block(run_rows, dx, &mut dweight, &mut dbias, streams);
                for (sums, run) in [(&mut *of_dweight, &mut dweight), (of_dbias, &mut dbias)] {
                    row::add(sums, run);
                    run.fill(Acc::of_f64(0.));
                }
            }
        });
        // SAFETY: each task wrote its part.
        let partials = unsafe { partials.assume_written() };
        let offset = dweight.len();
        let out = zip(dweight.chunks_mut(STRIP), (0..).step_by(STRIP))
            .chain(zip(dbias.chunks_mut(STRIP), (offset..).step_by(STRIP)));
        let threads = if partials.len() <= SERIAL_ELEMENTS {
            1
        } else {
            threads
        };
        for_each(threads, out.collect(), |(out, offset)| {
            simd::dispatch(
                #[inline(always)]
                |isa| {
                    let mut total = [Acc::of_f64(0.); STRIP];
                    let total = &mut total[..out.len()];
                    for part in partials.chunks_exact(width) {
                        row::add(total, &part[offset..][..out.len()]);
                    }
                    row::round(isa, total, out);
                },
            );
        });
    }

    /// The gradients of consecutive rows; `dx` is theirs, or empty if it is not wanted.
    fn block(
        &self,
        rows: Range<usize>,
        dx: &mut [MaybeUninit<T>],
        dweight: &mut [T::Acc],
        dbias: &mut [T::Acc],
        streams: bool,
    ) {
        let cols = self.problem.cols;
        simd::dispatch(
            #[inline(always)]
            |isa| {
                let end = rows.end;
                let mut dx = chunks_of(dx, cols, rows.len());
                for row in rows {
                    let (x, dy) = self.row(row, 0..cols);
                    let stats = self.stats(row);
                    let sums = if self.wanted.dx {
                        row::gradient_sums(isa, x, dy, stats, self.weight)
                    } else {
                        Sums::default()
                    };
                    let gradients = GradientRow {
                        x,
                        dy,
                        stats,
                        scales: GradientScales::new(self.problem, sums),
                        weight: self.weight,
                        dx: dx.next().unwrap_or_default(),
                        dweight,
                        dbias,
                        next: self.row((row + 1).min(end - 1), 0..cols),
                    };
                    gradients.run(isa, streams);
                }
                finish(streams);
            },
        );
    }

    /// Groups of rows: first the sums of all segments, then tasks that own columns over the group's rows. There are no
    /// partials.
    fn by_columns(
        &self,
        threads: usize,
        dx: &mut [MaybeUninit<T>],
        dweight: &mut [MaybeUninit<P>],
        dbias: &mut [MaybeUninit<P>],
        streams: bool,
    ) {
        let Problem { rows, cols, .. } = *self.problem;
        let group = match rows_per_group(self.problem, threads, 2) {
            0..ROWS_PER_GROUP => rows,
            group => group.min(rows),
        };
        let strip = cols
            .div_ceil(threads * TASKS_PER_THREAD)
            .next_multiple_of(STRIP);
        let strips = cols.div_ceil(strip);
        // Sums over the groups before; none if there is but one.
        let room = |len| if group < rows { len } else { 0 };
        let mut so_far = Fresh::<T::Acc>::new(room(dweight.len()) + room(dbias.len()));
        let so_far = zeroed(so_far.slots());
        let (dweight_so_far, dbias_so_far) = so_far.split_at_mut(room(dweight.len()));
        let mut dx_rows = chunks_of(dx, cols, rows);
        for first in (0..rows).step_by(group) {
            let rows_here = first..rows.min(first + group);
            let last = rows_here.end == rows;
            let scales = self.scales(threads, rows_here.clone());
            let mut dx_of: Vec<Vec<_>> = (0..strips)
                .map(|_| Vec::with_capacity(scales.len()))
                .collect();
            for (scales, dx) in zip(scales, &mut dx_rows) {
                for (of, dx) in zip(&mut dx_of, chunks_of(dx, strip, strips)) {
                    of.push((scales, dx));
                }
            }
            let params = zip(
                zip(
                    chunks_of(dweight_so_far, strip, strips),
                    chunks_of(dbias_so_far, strip, strips),
                ),
                zip(
                    chunks_of(dweight, strip, strips),
                    chunks_of(dbias, strip, strips),
                ),
            );
            let tasks = zip(dx_of, params).enumerate().collect::<Vec<_>>();
            // Last to first: of rows that no cache holds, the end is what is left in it.
            let tasks = tasks.into_iter().rev().collect();
            for_each(threads, tasks, |(index, (dx, (so_far, out)))| {
                let start = index * strip;
                let columns = start..cols.min(start + strip);
                self.strip(
                    columns,
                    rows_here.clone(),
                    dx,
                    so_far,
                    last.then_some(out),
                    streams,
                );
            });
        }
    }

    /// The scales of consecutive rows, or none where dx is not wanted.
    fn scales(&self, threads: usize, rows: Range<usize>) -> Vec<GradientScales<T::Acc>> {
        let cols = self.problem.cols;
        let segments = cols.div_ceil(SEGMENT);
        if !self.wanted.dx {
            return vec![GradientScales::new(self.problem, Sums::default()); rows.len()];
        }
        let at_least = SEGMENT.div_ceil(cols);
        let sums = collect(threads, rows.len() * segments, at_least, |index| {
            let (row, start) = (rows.start + index / segments, index % segments * SEGMENT);
            let (x, dy) = self.row(row, start..cols.min(start + SEGMENT));
            simd::dispatch(
                #[inline(always)]
                |isa| {
                    row::gradient_segment_sums(isa, x, dy, self.stats(row), self.weight.from(start))
                },
            )
        });
        sums.chunks(segments)
            .map(|of_row| {
                let sums = of_row.iter().copied().fold(Sums::default(), |a, b| a + b);
                GradientScales::new(self.problem, sums)
            })
            .collect()
    }

    /// Some columns of a group of rows. `so_far` are the sums of dweight and dbias over the groups before, and `out` is
    /// where they go after the last one.
    fn strip(
        &self,
        columns: Range<usize>,
        rows: Range<usize>,
        mut dx: Vec<ScaledRow<'_, T>>,
        (dweight_so_far, dbias_so_far): Pair<'_, T::Acc>,
        mut out: Option<Pair<'_, MaybeUninit<P>>>,
        streams: bool,
    ) {
        simd::dispatch(
            #[inline(always)]
            |isa| {
                let width = columns.len().min(STRIP);
                // Strips are whole lines, so that all of a row's start alike.
                let head = dx
                    .first()
                    .map_or(0, |(_, dx)| row::head_of_first(dx, width));
                let [mut dweight_here, mut dbias_here] =
                    [(); 2].map(|()| InLine::zeros(width, head));
                let starts = (0..columns.len()).step_by(STRIP);
                for start in starts.rev() {
                    let end = columns.len().min(start + STRIP);
                    let weight = self.weight.from(columns.start + start);
                    // Empty where not wanted.
                    let wanted = |wanted| if wanted { end - start } else { 0 };
                    let dweight = &mut dweight_here[..wanted(self.wanted.dweight)];
                    let dbias = &mut dbias_here[..wanted(self.wanted.dbias)];
                    for (sums, so_far) in [
                        (&mut *dweight, &*dweight_so_far),
                        (&mut *dbias, &*dbias_so_far),
                    ] {
                        if so_far.is_empty() {
                            sums.fill(Acc::of_f64(0.));
                        } else {
                            sums.copy_from_slice(&so_far[start..end]);
                        }
                    }
                    for (row, (scales, dx)) in zip(rows.clone(), &mut dx) {
                        let here = columns.start + start..columns.start + end;
                        let (x, dy) = self.row(row, here.clone());
                        let gradients = GradientRow {
                            x,
                            dy,
                            stats: self.stats(row),
                            scales: *scales,
                            weight,
                            dx: dx.get_mut(start..end).unwrap_or_default(),
                            dweight,
                            dbias,
                            next: self.row((row + 1).min(rows.end - 1), here),
                        };
                        gradients.run(isa, streams);
                    }
                    match &mut out {
                        Some((dweight_out, dbias_out)) => {
                            if self.wanted.dweight {
                                row::round(isa, dweight, &mut dweight_out[start..end]);
                            }
                            if self.wanted.dbias {
                                row::round(isa, dbias, &mut dbias_out[start..end]);
                            }
                        }
                        None => {
                            if self.wanted.dweight {
                                dweight_so_far[start..end].copy_from_slice(dweight);
                            }
                            if self.wanted.dbias {
                                dbias_so_far[start..end].copy_from_slice(dbias);
                            }
                        }
                    }
                }
                finish(streams);
            },
        );
    }
}

/// A row of dx, or a part of it, and what it takes.
type ScaledRow<'a, T> = (
    GradientScales<<T as Element>::Acc>,
    &'a mut [MaybeUninit<T>],
);

/// Whether rows are too few or too wide to be the axis of parallelism. Depends on the shape alone, as the order of the
/// sums over rows does.
fn by_columns(problem: &Problem) -> bool {
    problem.cols >= 64 * SEGMENT || (problem.rows < 256 && problem.cols >= STRIP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NormConfig;
    use candle_core::{Device, Tensor};

    /// What `pass` writes over memory of which the pages are there, and over memory of which, if it comes from the system, they are not.
    #[allow(unsafe_code)]
    fn there_and_not<T: Element>(
        problem: &Problem,
        mut pass: impl FnMut(&mut [MaybeUninit<T>]),
    ) -> [Vec<T>; 2] {
        let mut written = |there| {
            let mut out = Fresh::new(problem.rows * problem.cols);
            if there {
                zeroed(out.slots());
                let can_stream = cfg!(all(target_os = "linux", target_arch = "x86_64"));
                assert_eq!(streams(out.slots(), problem.cols), can_stream);
            }
            pass(out.slots());
            // SAFETY: a pass writes all of its outputs.
            unsafe { out.assume_written() }
        };
        [written(true), written(false)]
    }

    fn assert_same<T: Element>(what: &str, [there, not]: [Vec<T>; 2]) {
        let differs = zip(&there, &not).position(|(there, not)| there != not);
        if let Some(index) = differs {
            let [got, want] = [&there, &not].map(|out| out[index].widen().in_f64());
            panic!("{what}[{index}]: {got} past the caches, {want} through them");
        }
    }

    /// Of outputs just above the size from which they are written past the caches, whose rows start at any place of a line.
    fn same_past_the_caches<T: Element>(rows: usize, cols: usize) -> Result<()> {
        let of_index = |index: usize| {
            let bits = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            T::narrow(Acc::of_f64(bits as f64 / f64::from(1 << 23) - 1.))
        };
        let tensor = |first: usize, rows: usize| {
            let values = (first..).take(rows * cols).map(of_index).collect();
            Tensor::from_vec::<_, T>(values, (rows, cols), &Device::Cpu)
        };
        let (x, dy) = (tensor(0, rows)?, tensor(1 << 30, rows)?);
        let [weight, bias] = [tensor(7, 1)?.squeeze(0)?, tensor(8, 1)?.squeeze(0)?];
        let eps = NormConfig::from(1e-5);
        let problem = Problem::new(&x, &[cols], Some(&weight), Some(&bias), &eps)?;
        let [x, dy, weight, bias] = [&x, &dy, &weight, &bias].map(Tensor::storage_and_layout);
        let storage = |storage: &candle_core::Storage| match storage {
            candle_core::Storage::Cpu(storage) => storage.clone(),
            _ => unreachable!("the tensors are on the CPU"),
        };
        let stored = [&x, &dy, &weight, &bias].map(|operand| (storage(&operand.0), operand.1));
        let [x, dy, weight, bias] = stored
            .each_ref()
            .map(|(storage, layout)| (storage, *layout));

        let pass = ForwardPass::<T, T>::new(&problem, x, Some(weight), Some(bias))?;
        let mut stats = Vec::new();
        let ys = there_and_not(&problem, |ys| {
            let mut both = Fresh::new(2 * rows);
            let (mean, rstd) = both.slots().split_at_mut(rows);
            pass.run(ys, mean, rstd);
            stats.push(both);
        });
        assert_same("y", ys);

        // SAFETY: a pass writes all of its outputs.
        #[allow(unsafe_code)]
        let stats = unsafe { stats.swap_remove(0).assume_written() };
        let stats = <T::Acc as Element>::to_storage(stats);
        let args = BackwardArgs {
            x,
            weight: Some(weight),
            dy,
        };
        let wanted = Wanted {
            dx: true,
            dweight: true,
            dbias: true,
        };
        let pass = BackwardPass::<T, T>::new(&problem, &args, &stats, wanted)?;
        let mut sums = Vec::new();
        let dx = there_and_not(&problem, |dx| {
            let [mut dweight, mut dbias] = [Fresh::new(cols), Fresh::new(cols)];
            pass.run(dx, dweight.slots(), dbias.slots());
            // SAFETY: as above.
            #[allow(unsafe_code)]
            sums.push(unsafe { [dweight.assume_written(), dbias.assume_written()] });
        });
        assert_same("dx", dx);
        let [not, there] = [sums.pop(), sums.pop()].map(Option::unwrap_or_default);
        for (what, both) in zip(["dweight", "dbias"], zip(there, not)) {
            assert_same::<T>(what, both.into());
        }
        Ok(())
    }

    #[test]
    fn by_rows_past_the_caches() -> Result<()> {
        same_past_the_caches::<f32>(1027, 4099)?;
        same_past_the_caches::<half::bf16>(2053, 4099)
    }

    #[test]
    fn by_columns_past_the_caches() -> Result<()> {
        same_past_the_caches::<f32>(3, 1_400_003)
    }
}
