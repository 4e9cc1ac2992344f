//! One row's maths, a chunk of columns at a time.
//!
//! Sums: running sums of vectors within a chunk, whose totals are added in f64 over a segment's chunks and then over a
//! row's segments, in order. Whoever computes the segments, the result is the same.

use super::SERIAL_ELEMENTS;
use super::element::{Acc, CHUNK, Element, Sums};
use super::simd::Isa;
use crate::problem::Problem;
use rayon::prelude::*;
use std::iter::zip;
use std::mem::MaybeUninit;

/// The unit of sums over a row: what a second look finds in the second-level cache.
pub(crate) const SEGMENT: usize = 8 * CHUNK;
/// Elements that a segment's provisional mean is taken of.
const HEAD: usize = 64;

/// weight or bias: a value a column, or a constant where there is none.
#[derive(Clone, Copy)]
pub(crate) struct Param<'a, P: Element> {
    values: Option<&'a [P]>,
    constant: &'static [P::Acc; CHUNK],
}

impl<'a, P: Element> Param<'a, P> {
    pub fn weight(values: Option<&'a [P]>) -> Self {
        Self {
            values,
            constant: P::Acc::ONES,
        }
    }

    pub fn bias(values: Option<&'a [P]>) -> Self {
        Self {
            values,
            constant: P::Acc::ZEROS,
        }
    }

    /// The values in the accumulation type, with `offset` added there.
    pub fn widened(self, offset: P::Acc) -> Option<Vec<P::Acc>> {
        let widened = |value: &P| value.widen() + offset;
        let values = self.values?;
        Some(if values.len() <= SERIAL_ELEMENTS {
            values.iter().map(widened).collect()
        } else {
            values.par_iter().map(widened).collect()
        })
    }

    /// The same, with `column` as the first.
    #[inline(always)]
    pub fn from(self, column: usize) -> Self {
        Self {
            values: self.values.map(|values| &values[column..]),
            ..self
        }
    }

    /// A chunk of `len` columns.
    #[inline(always)]
    fn read<'b>(
        &'b self,
        isa: Isa,
        column: usize,
        len: usize,
        buffer: &'b mut P::Buffer,
    ) -> &'b [P::Acc] {
        match self.values {
            Some(values) => P::read(isa, &values[column..column + len], buffer),
            None => &self.constant[..len],
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct RowStatistics<A> {
    pub mean: A,
    pub rstd: A,
}

impl<A: Acc> RowStatistics<A> {
    #[inline(always)]
    pub fn new(problem: &Problem, moments: Moments) -> Self {
        let var = moments.square / moments.count.max(1.);
        Self {
            mean: A::of_f64(moments.mean),
            rstd: A::of_f64(1. / (var + problem.eps).sqrt()),
        }
    }
}

/// Of the elements of a row or a part of it: how many, their mean, and the sum of squares about it. The mean of
/// RMSNorm is 0.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moments {
    count: f64,
    mean: f64,
    square: f64,
}

impl Moments {
    /// Of both parts, by the distance between their means: Chan, Golub and LeVeque.
    #[inline(always)]
    pub fn with(self, other: Self) -> Self {
        let count = self.count + other.count;
        let share = other.count / count;
        let distance = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + distance * share,
            square: self.square + other.square + distance * distance * self.count * share,
        }
    }
}

#[inline(always)]
pub(crate) fn moments<T: Element>(
    isa: Isa,
    problem: &Problem,
    x: &[T],
    buffer: &mut T::Buffer,
) -> Moments {
    let mut total = Moments::default();
    for x in x.chunks(SEGMENT) {
        total = total.with(segment_moments(isa, problem, x, buffer));
    }
    total
}

/// One pass about a provisional mean, that of the first elements. Where it is further from the mean than half a standard
/// deviation, the difference below would cancel, and a second pass goes about the mean.
#[inline(always)]
pub(crate) fn segment_moments<T: Element>(
    isa: Isa,
    problem: &Problem,
    x: &[T],
    buffer: &mut T::Buffer,
) -> Moments {
    let count = x.len() as f64;
    let zero = T::Acc::of_f64(0.);
    if !problem.remove_mean {
        let Sums(_, square) = deviations(isa, x, zero, buffer);
        return Moments {
            count,
            mean: 0.,
            square,
        };
    }
    let head = T::read(isa, &x[..x.len().min(HEAD)], buffer);
    let mut center = T::Acc::of_f64(T::Acc::deviations(isa, head, zero).0 / head.len() as f64);
    let mut passes = 0;
    loop {
        let sums = deviations(isa, x, center, buffer);
        let rest = sums.0 / count;
        let between = sums.0 * rest;
        let mean = center.in_f64() + rest;
        let far = between > 0.25 * (sums.1 - between);
        passes += 1;
        if !far || passes == 2 {
            let square = (sums.1 - between).max(0.);
            return Moments {
                count,
                mean,
                square,
            };
        }
        center = T::Acc::of_f64(mean);
    }
}

/// The sums of (x - center) and (x - center)^2.
#[inline(always)]
fn deviations<T: Element>(isa: Isa, x: &[T], center: T::Acc, buffer: &mut T::Buffer) -> Sums {
    let mut total = Sums::default();
    for x in x.chunks(CHUNK) {
        total += T::Acc::deviations(isa, T::read(isa, x, buffer), center);
    }
    total
}

/// Room for what a kernel converts.
pub(crate) struct Buffers<T: Element, P: Element> {
    pub x: T::Buffer,
    dy: T::Buffer,
    out: T::Buffer,
    weight: P::Buffer,
    bias: P::Buffer,
}

impl<T: Element, P: Element> Buffers<T, P> {
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            x: Default::default(),
            dy: Default::default(),
            out: Default::default(),
            weight: Default::default(),
            bias: Default::default(),
        }
    }
}

/// y = (x - mean) * rstd * weight + bias.
#[inline(always)]
pub(crate) fn normalize<T: Element, P: Element<Acc = T::Acc>>(
    isa: Isa,
    x: &[T],
    stats: RowStatistics<T::Acc>,
    weight: Param<'_, P>,
    bias: Param<'_, P>,
    y: &mut [MaybeUninit<T>],
    buffers: &mut Buffers<T, P>,
) {
    let mut column = 0;
    while column < x.len() {
        let end = chunk_end(column, y);
        let (len, x, y) = (end - column, &x[column..end], &mut y[column..end]);
        let weight = weight.read(isa, column, len, &mut buffers.weight);
        let bias = bias.read(isa, column, len, &mut buffers.bias);
        if T::converts_in_loops(isa) {
            normalize_chunk(x, stats, weight, bias, y);
        } else {
            let x = T::read(isa, x, &mut buffers.x);
            normalize_chunk(x, stats, weight, bias, T::slots(y, &mut buffers.out));
            T::finish(isa, &buffers.out, y);
        }
        column = end;
    }
}

#[inline(always)]
fn normalize_chunk<T: Element>(
    x: &[T],
    stats: RowStatistics<T::Acc>,
    weight: &[T::Acc],
    bias: &[T::Acc],
    y: &mut [MaybeUninit<T>],
) {
    for (y, (&x, (&weight, &bias))) in zip(y, zip(x, zip(weight, bias))) {
        y.write(T::narrow(
            (x.widen() - stats.mean) * stats.rstd * weight + bias,
        ));
    }
}

/// The sums of dy*weight and dy*weight*xhat.
#[inline(always)]
pub(crate) fn gradient_sums<T: Element, P: Element<Acc = T::Acc>>(
    isa: Isa,
    x: &[T],
    dy: &[T],
    stats: RowStatistics<T::Acc>,
    weight: Param<'_, P>,
    buffers: &mut Buffers<T, P>,
) -> Sums {
    let mut total = Sums::default();
    for (segment, (x, dy)) in zip(x.chunks(SEGMENT), dy.chunks(SEGMENT)).enumerate() {
        let weight = weight.from(segment * SEGMENT);
        total += gradient_segment_sums(isa, x, dy, stats, weight, buffers);
    }
    total
}

#[inline(always)]
pub(crate) fn gradient_segment_sums<T: Element, P: Element<Acc = T::Acc>>(
    isa: Isa,
    x: &[T],
    dy: &[T],
    stats: RowStatistics<T::Acc>,
    weight: Param<'_, P>,
    buffers: &mut Buffers<T, P>,
) -> Sums {
    let mut total = Sums::default();
    for (chunk, (x, dy)) in zip(x.chunks(CHUNK), dy.chunks(CHUNK)).enumerate() {
        total += T::Acc::products(
            isa,
            T::read(isa, x, &mut buffers.x),
            T::read(isa, dy, &mut buffers.dy),
            weight.read(isa, chunk * CHUNK, x.len(), &mut buffers.weight),
            stats.mean,
            stats.rstd,
        );
    }
    total
}

/// The means over a row's columns of dy*weight (0 for RMSNorm) and of dy*weight*xhat.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GradientScales<A> {
    mean_g: A,
    mean_g_xhat: A,
}

impl<A: Acc> GradientScales<A> {
    #[inline(always)]
    pub fn new(problem: &Problem, sums: Sums) -> Self {
        let inv_cols = 1. / problem.cols as f64;
        let removed = if problem.remove_mean { sums.0 } else { 0. };
        Self {
            mean_g: A::of_f64(removed * inv_cols),
            mean_g_xhat: A::of_f64(sums.1 * inv_cols),
        }
    }
}

/// A row's columns, or some of them, and what is known of the row.
pub(crate) struct GradientRow<'a, T: Element> {
    pub x: &'a [T],
    pub dy: &'a [T],
    pub stats: RowStatistics<T::Acc>,
    pub scales: GradientScales<T::Acc>,
}

/// dx = (dy*weight - mean_g - xhat * mean_g_xhat) * rstd, dweight += dy * xhat and dbias += dy, each where it is not
/// empty.
#[inline(always)]
pub(crate) fn gradients<T: Element, P: Element<Acc = T::Acc>>(
    isa: Isa,
    row: &GradientRow<'_, T>,
    weight: Param<'_, P>,
    dx: &mut [MaybeUninit<T>],
    dweight: &mut [T::Acc],
    dbias: &mut [T::Acc],
    buffers: &mut Buffers<T, P>,
) {
    let (stats, scales) = (row.stats, row.scales);
    let mut column = 0;
    while column < row.x.len() {
        let end = chunk_end(column, row.x);
        let (columns, len) = (column..end, end - column);
        let (x, dy) = (&row.x[columns.clone()], &row.dy[columns.clone()]);
        let weight = weight.read(isa, column, len, &mut buffers.weight);
        let dweight = dweight.get_mut(columns.clone()).unwrap_or_default();
        let dbias = dbias.get_mut(columns.clone()).unwrap_or_default();
        let dx = dx.get_mut(columns).unwrap_or_default();
        if T::converts_in_loops(isa) {
            gradients_of_chunk(x, dy, weight, stats, scales, dx, dweight, dbias);
        } else {
            let x = T::read(isa, x, &mut buffers.x);
            let dy = T::read(isa, dy, &mut buffers.dy);
            let slots = T::slots(dx, &mut buffers.out);
            gradients_of_chunk(x, dy, weight, stats, scales, slots, dweight, dbias);
            T::finish(isa, &buffers.out, dx);
        }
        column = end;
    }
}

/// Where a chunk ends that starts at `column`. The first one of a wide row is short, so that the vectors of the others do
/// not cross cache lines: allocators put large tensors 16 bytes after the start of a page.
#[inline(always)]
fn chunk_end<T>(column: usize, row: &[T]) -> usize {
    let len = if column == 0 && row.len() >= CHUNK / 2 {
        match row.as_ptr().align_offset(64) {
            0 => CHUNK,
            short => short.min(CHUNK),
        }
    } else {
        CHUNK
    };
    row.len().min(column + len)
}

#[inline(always)]
#[expect(clippy::too_many_arguments)]
fn gradients_of_chunk<T: Element>(
    x: &[T],
    dy: &[T],
    weight: &[T::Acc],
    stats: RowStatistics<T::Acc>,
    scales: GradientScales<T::Acc>,
    dx: &mut [MaybeUninit<T>],
    dweight: &mut [T::Acc],
    dbias: &mut [T::Acc],
) {
    let RowStatistics { mean, rstd } = stats;
    let GradientScales {
        mean_g,
        mean_g_xhat,
    } = scales;
    let len = x.len();
    if dx.len() == len && dweight.len() == len && dbias.len() == len {
        let sums = zip(dweight, dbias);
        let inputs = zip(zip(x, dy), weight);
        for ((dx, (dweight, dbias)), ((x, dy), &weight)) in zip(zip(dx, sums), inputs) {
            let (xhat, dy) = ((x.widen() - mean) * rstd, dy.widen());
            *dweight += dy * xhat;
            *dbias += dy;
            dx.write(T::narrow(
                (dy * weight - mean_g - xhat * mean_g_xhat) * rstd,
            ));
        }
        return;
    }
    for (dx, ((x, dy), &weight)) in zip(dx, zip(zip(x, dy), weight)) {
        let (xhat, dy) = ((x.widen() - mean) * rstd, dy.widen());
        dx.write(T::narrow(
            (dy * weight - mean_g - xhat * mean_g_xhat) * rstd,
        ));
    }
    for (dweight, (x, dy)) in zip(dweight, zip(x, dy)) {
        *dweight += dy.widen() * ((x.widen() - mean) * rstd);
    }
    for (dbias, dy) in zip(dbias, dy) {
        *dbias += dy.widen();
    }
}

/// to += from.
#[inline(always)]
pub(crate) fn add<A: Acc>(to: &mut [A], from: &[A]) {
    for (to, &from) in zip(to, from) {
        *to += from;
    }
}
