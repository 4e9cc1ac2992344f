//! One row's maths.
//!
//! Sums: running sums of vectors within a chunk of columns, whose totals are added in f64 over a segment's chunks and then over
//! a row's segments, in order. Whoever computes the segments, the result is the same. Elements are rounded alike in vectors and
//! one at a time: where a row lies in memory does not matter.

use super::SERIAL_ELEMENTS;
use super::element::{Acc, CHUNK, Element, Sums, Vector, lanes_of};
use super::memory::{InLine, LINE, WIDE, prefetch};
use super::simd::{Isa, with_vectors};
use crate::problem::Problem;
use pulp::Simd;
use rayon::prelude::*;
use std::iter::zip;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The unit of sums over a row: what a second look finds in the second-level cache.
pub(crate) const SEGMENT: usize = 8 * CHUNK;
/// Elements that a segment's provisional mean is taken of.
const HEAD: usize = 64;

/// weight or bias: a value a column, or a constant where there is none.
#[derive(Clone, Copy)]
pub(crate) struct Param<'a, P: Element> {
    values: Option<&'a [P]>,
    constant: &'static [P; LINE],
}

impl<'a, P: Element> Param<'a, P> {
    pub fn weight(values: Option<&'a [P]>) -> Self {
        Self {
            values,
            constant: P::ONES,
        }
    }

    pub fn bias(values: Option<&'a [P]>) -> Self {
        Self {
            values,
            constant: P::ZEROS,
        }
    }

    /// The values in the accumulation type, with `offset` added there; behind `head` of them a line begins.
    pub fn widened(self, offset: P::Acc, head: usize) -> Option<InLine<P::Acc>> {
        let from = self.values?;
        let mut widened = InLine::zeros(from.len(), head);
        let widen = |(to, from): (&mut P::Acc, &P)| *to = from.widen() + offset;
        if from.len() <= SERIAL_ELEMENTS {
            widened.iter_mut().zip(from).for_each(widen);
        } else {
            widened.par_iter_mut().zip(from).for_each(widen);
        }
        Some(widened)
    }

    /// The same, with `column` as the first.
    #[inline(always)]
    pub fn from(self, column: usize) -> Self {
        Self {
            values: self.values.map(|values| &values[column..]),
            ..self
        }
    }

    /// Of `len` columns, which are a line's at most.
    #[inline(always)]
    fn at(self, column: usize, len: usize) -> &'a [P] {
        match self.values {
            Some(values) => &values[column..column + len],
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
    fn xhat<S: Simd>(self, simd: S, x: A::Vector<S>) -> A::Vector<S> {
        let d = A::sub_lanes(simd, x, A::splat(simd, self.mean));
        A::mul_lanes(simd, d, A::splat(simd, self.rstd))
    }

    #[inline(always)]
    pub fn new(problem: &Problem, moments: Moments) -> Self {
        let var = moments.square * (1. / moments.count.max(1.));
        Self {
            mean: A::of_f64(moments.mean()),
            rstd: A::of_f64(1. / (var + problem.eps).sqrt()),
        }
    }
}

/// Of the elements of a row or a part of it: how many, their mean, and the sum of squares about it. The mean of
/// RMSNorm is 0.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moments {
    count: f64,
    /// The mean is `center + rest`: rounded to one number, the means of f64 parts would be too coarse for the distance between them where
    /// mean >> std.
    center: f64,
    rest: f64,
    square: f64,
}

impl Moments {
    /// Of both parts, by the distance between their means: Chan, Golub and LeVeque.
    #[inline(always)]
    pub fn with(self, other: Self) -> Self {
        if self.count == 0. {
            return other;
        }
        let count = self.count + other.count;
        let share = other.count / count;
        let distance = (other.center - self.center) + (other.rest - self.rest);
        Self {
            count,
            rest: self.rest + distance * share,
            square: self.square + other.square + distance * distance * self.count * share,
            ..self
        }
    }

    fn mean(self) -> f64 {
        self.center + self.rest
    }
}

#[inline(always)]
pub(crate) fn moments<T: Element>(isa: Isa, problem: &Problem, x: &[T]) -> Moments {
    let mut segments = x.chunks(SEGMENT).map(
        #[inline(always)]
        |x| segment_moments(isa, problem, x),
    );
    let mut total = segments.next().unwrap_or_default();
    for segment in segments {
        total = total.with(segment);
    }
    total
}

/// One pass about a provisional mean, that of the first elements. Where it is further from the mean than half a standard
/// deviation, the difference below would cancel, and a second pass goes about the mean.
///
/// Centers are coarse. Half types have bits to spare in f32, so that differences of their values from a center no finer than
/// they are, and sums of a chunk of these, are exact but for a few: rows repeat such values, and running sums would round
/// each repeat the same way.
#[inline(always)]
pub(crate) fn segment_moments<T: Element>(isa: Isa, problem: &Problem, x: &[T]) -> Moments {
    let count = x.len() as f64;
    let zero = T::Acc::of_f64(0.);
    if !problem.remove_mean {
        let Sums(_, square) = deviations(isa, x, zero);
        return Moments {
            count,
            square,
            ..Moments::default()
        };
    }
    let head = &x[..x.len().min(HEAD)];
    // Reciprocals do not wait for the sums.
    let (of_head, inv_count) = (1. / head.len() as f64, 1. / count);
    let of_values = deviations(isa, head, zero);
    let mut center = center_near::<T>(of_values.0 * of_head, of_values.1 * of_head);
    let mut passes = 0;
    loop {
        let sums = deviations(isa, x, center);
        let rest = sums.0 * inv_count;
        let between = sums.0 * rest;
        let far = between > 0.25 * (sums.1 - between);
        passes += 1;
        if !far || passes == 2 {
            // Where squares overflow, so may `between`, and there is no difference of infinities.
            let overflows = sums.1 == f64::INFINITY && rest.is_finite();
            let square = if overflows { sums.1 } else { sums.1 - between };
            // Not `max`, which makes 0 of what an infinity leaves.
            let square = if square < 0. { 0. } else { square };
            return Moments {
                count,
                center: center.in_f64(),
                rest,
                square,
            };
        }
        let mean = center.in_f64() + rest;
        let variance = (sums.1 - between) * inv_count;
        center = center_near::<T>(mean, mean * mean + variance);
    }
}

/// The mean; of half types, rounded to a multiple of what tells values of this mean square apart.
#[inline(always)]
fn center_near<T: Element>(mean: f64, mean_square: f64) -> T::Acc {
    const BIAS: u64 = 1023;
    if size_of::<T>() == size_of::<T::Acc>() {
        return T::Acc::of_f64(mean);
    }
    // Squares overflow before their deviations do.
    let mean_square = if mean_square.is_finite() {
        mean_square
    } else {
        mean * mean
    };
    // The root, as a power of two.
    let exponent = ((mean_square.to_bits() >> 52 & 0x7ff) + BIAS) / 2;
    let size = f64::from_bits(exponent << 52);
    // A sum with it has no bits left for less than a multiple.
    let shift = size * (T::EPSILON * 1.5 / f64::EPSILON);
    T::Acc::of_f64(mean + shift - shift)
}

/// The sums of (x - center) and (x - center)^2.
#[inline(always)]
fn deviations<T: Element>(isa: Isa, x: &[T], center: T::Acc) -> Sums {
    let mut total = Sums::default();
    with_vectors!(isa, simd => {
        for x in x.chunks(terms_of::<T::Acc, _>(simd)) {
            total += chunk_deviations(isa, simd, x, center);
        }
    });
    total
}

/// Running sums of vectors, which hide the latency of an addition.
const SUMS: usize = 4;
/// Terms of a running sum at most.
const TERMS: usize = 32;

/// Elements that running sums of vectors add up before their totals go on in f64.
#[inline(always)]
fn terms_of<A: Acc, S: Simd>(_: S) -> usize {
    CHUNK.min(TERMS * SUMS * A::lanes::<S>())
}

#[inline(always)]
fn chunk_deviations<T: Element, S: Simd>(isa: Isa, simd: S, x: &[T], center: T::Acc) -> Sums {
    let lanes = T::Acc::lanes::<S>();
    let centers = T::Acc::splat(simd, center);
    let zero = T::Acc::splat(simd, T::Acc::of_f64(0.));
    let (mut sum, mut square) = ([zero; SUMS], [zero; SUMS]);
    let mut fours = x.chunks_exact(SUMS * lanes);
    for x in &mut fours {
        for i in 0..SUMS {
            let d = T::Acc::sub_lanes(simd, T::load(isa, simd, &x[i * lanes..][..lanes]), centers);
            sum[i] = T::Acc::add_lanes(simd, sum[i], d);
            square[i] = T::Acc::mul_add_lanes(simd, d, d, square[i]);
        }
    }
    let mut ones = fours.remainder().chunks_exact(lanes);
    for x in &mut ones {
        let d = T::Acc::sub_lanes(simd, T::load(isa, simd, x), centers);
        sum[0] = T::Acc::add_lanes(simd, sum[0], d);
        square[0] = T::Acc::mul_add_lanes(simd, d, d, square[0]);
    }
    let mut total = Sums(T::Acc::total(simd, sum), T::Acc::total(simd, square));
    for &x in ones.remainder() {
        let d = x.widen() - center;
        total += Sums(d.in_f64(), (d * d).in_f64());
    }
    total
}

/// What is computed a column at a time.
pub(crate) trait Columns<T> {
    /// At `vectors` times as many columns as a vector has lanes, all of a line at most.
    fn at<S: Simd, const STREAM: bool>(&mut self, isa: Isa, simd: S, column: usize, vectors: usize);
    /// Asks for what is read at this column of the next row.
    fn prefetch(&self, _column: usize) {}
}

/// All of `len` columns, of which the output's first `head` lie before a cache line.
#[inline(always)]
fn for_columns<T: Element, S: Simd, W: Columns<T>, const STREAM: bool>(
    isa: Isa,
    simd: S,
    len: usize,
    head: usize,
    work: &mut W,
) {
    let line = LINE / size_of::<T>();
    let mut column = head.min(len);
    part_of(isa, simd, 0..column, work);
    while column + line <= len {
        work.prefetch(column);
        work.at::<S, STREAM>(isa, simd, column, line / T::Acc::lanes::<S>());
        column += line;
    }
    part_of(isa, simd, column..len, work);
}

/// Columns of which there are less than a line.
#[inline(always)]
fn part_of<T: Element, S: Simd>(
    isa: Isa,
    simd: S,
    columns: Range<usize>,
    work: &mut impl Columns<T>,
) {
    let lanes = T::Acc::lanes::<S>();
    let mut column = columns.start;
    while column + lanes <= columns.end {
        work.at::<S, false>(isa, simd, column, 1);
        column += lanes;
    }
    while column < columns.end {
        work.at::<_, false>(isa, pulp::Scalar, column, 1);
        column += 1;
    }
}

/// All of `len` columns.
#[inline(always)]
pub(crate) fn for_each_column<T: Element>(isa: Isa, len: usize, mut work: impl Columns<T>) {
    with_vectors!(isa, simd => for_columns::<T, _, _, false>(isa, simd, len, 0, &mut work));
}

/// The same, with whole lines of an output whose first `head` columns lie before one, past the caches if `streams`.
#[inline(always)]
fn for_each_line<T: Element>(
    isa: Isa,
    len: usize,
    head: usize,
    streams: bool,
    mut work: impl Columns<T>,
) {
    with_vectors!(isa, simd => if streams {
        for_columns::<T, _, _, true>(isa, simd, len, head, &mut work);
    } else {
        for_columns::<T, _, _, false>(isa, simd, len, head, &mut work);
    });
}

/// Elements before the first cache line that starts in a wide row. Writes past the caches are of whole lines; others that cross
/// lines take twice as long, and allocators put large tensors 16 bytes after the start of a page.
#[inline(always)]
fn head_of<T>(row: &[T]) -> usize {
    if size_of_val(row) < WIDE {
        return 0;
    }
    row.as_ptr().align_offset(LINE)
}

/// The same of the first of `rows`, which are `cols` wide; 0 if there are none.
pub(crate) fn head_of_first<T>(rows: &[T], cols: usize) -> usize {
    head_of(&rows[..rows.len().min(cols)])
}

/// The columns of a block of a row, of which there is one more than [`CHUNK`]s: all but the first start at a cache line.
#[inline(always)]
pub(crate) fn block<T>(row: &[T], index: usize) -> Range<usize> {
    let head = head_of(row);
    let end = |blocks| row.len().min(head + blocks * CHUNK);
    match index {
        0 => 0..end(1),
        index => end(index)..end(index + 1),
    }
}

/// y = (x - mean) * rstd * weight + bias.
pub(crate) struct Normalize<'a, T: Element, P: Element> {
    pub x: &'a [T],
    pub stats: RowStatistics<T::Acc>,
    pub weight: Param<'a, P>,
    pub bias: Param<'a, P>,
    pub y: &'a mut [MaybeUninit<T>],
    /// Where the next row is.
    pub next: &'a [T],
}

impl<T: Element, P: Element<Acc = T::Acc>> Normalize<'_, T, P> {
    #[inline(always)]
    pub fn run(self, isa: Isa, streams: bool) {
        for_each_line(isa, self.x.len(), head_of(self.y), streams, self);
    }
}

impl<T: Element, P: Element<Acc = T::Acc>> Columns<T> for Normalize<'_, T, P> {
    #[inline(always)]
    fn at<S: Simd, const STREAM: bool>(
        &mut self,
        isa: Isa,
        simd: S,
        column: usize,
        vectors: usize,
    ) {
        let lanes = T::Acc::lanes::<S>();
        let len = vectors * lanes;
        let x = &self.x[column..column + len];
        let y = &mut self.y[column..column + len];
        let (weight, bias) = (self.weight.at(column, len), self.bias.at(column, len));
        for vector in 0..vectors {
            let first = vector * lanes;
            let x = T::load(isa, simd, &x[first..first + lanes]);
            let weight = P::load(isa, simd, &weight[first..first + lanes]);
            let bias = P::load(isa, simd, &bias[first..first + lanes]);
            let value = T::Acc::fused(isa, simd, self.stats.xhat(simd, x), weight, bias);
            T::store::<S, STREAM>(isa, simd, value, &mut y[first..first + lanes]);
        }
    }

    #[inline(always)]
    fn prefetch(&self, column: usize) {
        prefetch(self.next, column);
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
) -> Sums {
    let mut total = Sums::default();
    for (segment, (x, dy)) in zip(x.chunks(SEGMENT), dy.chunks(SEGMENT)).enumerate() {
        let weight = weight.from(segment * SEGMENT);
        total += gradient_segment_sums(isa, x, dy, stats, weight);
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
) -> Sums {
    let mut total = Sums::default();
    for (chunk, (x, dy)) in zip(x.chunks(CHUNK), dy.chunks(CHUNK)).enumerate() {
        let weight = weight.from(chunk * CHUNK);
        total += with_vectors!(isa, simd => chunk_gradient_sums(isa, simd, x, dy, stats, weight));
    }
    total
}

#[inline(always)]
fn chunk_gradient_sums<T: Element, P: Element<Acc = T::Acc>, S: Simd>(
    isa: Isa,
    simd: S,
    x: &[T],
    dy: &[T],
    stats: RowStatistics<T::Acc>,
    weight: Param<'_, P>,
) -> Sums {
    let lanes = T::Acc::lanes::<S>();
    let zero = T::Acc::splat(simd, T::Acc::of_f64(0.));
    let (mut sum, mut product) = ([zero; SUMS], [zero; SUMS]);
    let mut column = 0;
    while column + SUMS * lanes <= x.len() {
        let of = Products::new(x, dy, weight, column, SUMS * lanes);
        for i in 0..SUMS {
            let (g, xhat) = of.at(isa, simd, stats, i * lanes);
            sum[i] = T::Acc::add_lanes(simd, sum[i], g);
            product[i] = T::Acc::mul_add_lanes(simd, g, xhat, product[i]);
        }
        column += SUMS * lanes;
    }
    while column + lanes <= x.len() {
        let (g, xhat) = Products::new(x, dy, weight, column, lanes).at(isa, simd, stats, 0);
        sum[0] = T::Acc::add_lanes(simd, sum[0], g);
        product[0] = T::Acc::mul_add_lanes(simd, g, xhat, product[0]);
        column += lanes;
    }
    let mut total = Sums(T::Acc::total(simd, sum), T::Acc::total(simd, product));
    for column in column..x.len() {
        let (g, xhat) = Products::new(x, dy, weight, column, 1).at(isa, pulp::Scalar, stats, 0);
        let [g, xhat] = [g, xhat].map(|one| lanes_of::<T::Acc, pulp::Scalar>(&one)[0]);
        total += Sums(g.in_f64(), (g * xhat).in_f64());
    }
    total
}

/// Some columns of a row, and what is summed over them.
struct Products<'a, T, P> {
    x: &'a [T],
    dy: &'a [T],
    weight: &'a [P],
}

impl<'a, T: Element, P: Element<Acc = T::Acc>> Products<'a, T, P> {
    #[inline(always)]
    fn new(x: &'a [T], dy: &'a [T], weight: Param<'a, P>, column: usize, len: usize) -> Self {
        Self {
            x: &x[column..column + len],
            dy: &dy[column..column + len],
            weight: weight.at(column, len),
        }
    }

    /// dy*weight and xhat.
    #[inline(always)]
    fn at<S: Simd>(
        &self,
        isa: Isa,
        simd: S,
        stats: RowStatistics<T::Acc>,
        column: usize,
    ) -> (Vector<T, S>, Vector<T, S>) {
        let columns = column..column + T::Acc::lanes::<S>();
        let x = T::load(isa, simd, &self.x[columns.clone()]);
        let dy = T::load(isa, simd, &self.dy[columns.clone()]);
        let weight = P::load(isa, simd, &self.weight[columns]);
        (T::Acc::mul_lanes(simd, dy, weight), stats.xhat(simd, x))
    }
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

    /// Of g = dy*weight, rounded as in its mean: of one column their difference is 0.
    #[inline(always)]
    fn dx<S: Simd>(
        self,
        isa: Isa,
        simd: S,
        rstd: A,
        g: A::Vector<S>,
        xhat: A::Vector<S>,
    ) -> A::Vector<S> {
        let rest = A::sub_lanes(simd, g, A::splat(simd, self.mean_g));
        let rest = A::fused(isa, simd, xhat, A::splat(simd, -self.mean_g_xhat), rest);
        A::mul_lanes(simd, rest, A::splat(simd, rstd))
    }
}

/// dx = (dy*weight - mean_g - xhat * mean_g_xhat) * rstd, dweight += dy * xhat and dbias += dy, each where it is not
/// empty, of a row's columns or some of them.
pub(crate) struct GradientRow<'a, T: Element, P: Element> {
    pub x: &'a [T],
    pub dy: &'a [T],
    pub stats: RowStatistics<T::Acc>,
    pub scales: GradientScales<T::Acc>,
    pub weight: Param<'a, P>,
    pub dx: &'a mut [MaybeUninit<T>],
    pub dweight: &'a mut [T::Acc],
    pub dbias: &'a mut [T::Acc],
    /// Where the next row's x and dy are.
    pub next: (&'a [T], &'a [T]),
}

impl<T: Element, P: Element<Acc = T::Acc>> GradientRow<'_, T, P> {
    #[inline(always)]
    pub fn run(self, isa: Isa, streams: bool) {
        for_each_line(isa, self.x.len(), head_of(self.dx), streams, self);
    }
}

impl<T: Element, P: Element<Acc = T::Acc>> Columns<T> for GradientRow<'_, T, P> {
    #[inline(always)]
    fn at<S: Simd, const STREAM: bool>(
        &mut self,
        isa: Isa,
        simd: S,
        column: usize,
        vectors: usize,
    ) {
        let (stats, scales) = (self.stats, self.scales);
        let lanes = T::Acc::lanes::<S>();
        let len = vectors * lanes;
        let columns = column..column + len;
        let (x, dy) = (&self.x[columns.clone()], &self.dy[columns.clone()]);
        let weight = self.weight.at(column, len);
        let mut dweight = self.dweight.get_mut(columns.clone());
        let mut dbias = self.dbias.get_mut(columns.clone());
        let mut dx = self.dx.get_mut(columns);
        for vector in 0..vectors {
            let first = vector * lanes;
            let here = first..first + lanes;
            let dy = T::load(isa, simd, &dy[here.clone()]);
            let xhat = stats.xhat(simd, T::load(isa, simd, &x[here.clone()]));
            if let Some(dweight) = &mut dweight {
                let dweight = &mut dweight[here.clone()];
                let sum = T::Acc::fused(isa, simd, dy, xhat, T::Acc::load(isa, simd, dweight));
                dweight.copy_from_slice(lanes_of::<T::Acc, S>(&sum));
            }
            if let Some(dbias) = &mut dbias {
                let dbias = &mut dbias[here.clone()];
                let sum = T::Acc::add_lanes(simd, T::Acc::load(isa, simd, dbias), dy);
                dbias.copy_from_slice(lanes_of::<T::Acc, S>(&sum));
            }
            if let Some(dx) = &mut dx {
                let weight = P::load(isa, simd, &weight[here.clone()]);
                let g = T::Acc::mul_lanes(simd, dy, weight);
                let value = scales.dx(isa, simd, stats.rstd, g, xhat);
                T::store::<S, STREAM>(isa, simd, value, &mut dx[here]);
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, column: usize) {
        prefetch(self.next.0, column);
        prefetch(self.next.1, column);
    }
}

/// to += from.
#[inline(always)]
pub(crate) fn add<A: Acc>(to: &mut [A], from: &[A]) {
    for (to, &from) in zip(to, from) {
        *to += from;
    }
}

/// Rounds to nearest, ties to even.
#[inline(always)]
pub(crate) fn round<T: Element>(isa: Isa, from: &[T::Acc], to: &mut [MaybeUninit<T>]) {
    for_each_column(isa, from.len(), Round { from, to });
}

struct Round<'a, T: Element> {
    from: &'a [T::Acc],
    to: &'a mut [MaybeUninit<T>],
}

impl<T: Element> Columns<T> for Round<'_, T> {
    #[inline(always)]
    fn at<S: Simd, const STREAM: bool>(
        &mut self,
        isa: Isa,
        simd: S,
        column: usize,
        vectors: usize,
    ) {
        let lanes = T::Acc::lanes::<S>();
        for vector in 0..vectors {
            let first = column + vector * lanes;
            let value = T::Acc::load(isa, simd, &self.from[first..first + lanes]);
            T::store::<S, STREAM>(isa, simd, value, &mut self.to[first..first + lanes]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NormConfig;
    use crate::cpu::simd::for_each_isa;
    use candle_core::{DType, Device, Result, Tensor};
    use half::{bf16, f16};

    /// A sorted row repeats each value that its type can hold.
    fn the_mean_of_a_ramp<T: Element<Acc = f32>>(cols: usize) -> Result<()> {
        let x = Tensor::zeros(cols, DType::F32, &Device::Cpu)?;
        let problem = Problem::new(&x, &[cols], None, None, &NormConfig::from(1e-5))?;
        let x: Vec<T> = (0..cols)
            .map(|column| T::narrow((3.4 * (column as f64 / cols as f64 - 0.5)) as f32))
            .collect();
        let want = x.iter().map(|x| x.widen().in_f64()).sum::<f64>() / cols as f64;
        for_each_isa(|isa| {
            let got = moments(isa, &problem, &x).mean();
            let units = (got - want) * 2f64.powi(24);
            assert!(
                units.abs() < 0.1,
                "{cols} columns: mean off by {units} units"
            );
        });
        Ok(())
    }

    /// Squares of the values overflow f32, those of their deviations do not.
    #[test]
    fn neighbours_far_from_zero() -> Result<()> {
        let x = Tensor::zeros(1000, DType::F32, &Device::Cpu)?;
        let problem = Problem::new(&x, &[1000], None, None, &NormConfig::from(1e-5))?;
        let low = bf16::from_f32(1e20);
        let high = bf16::from_bits(low.to_bits() + 1);
        let x = [low, high].repeat(500);
        let [low, high] = [low, high].map(f64::from);
        for_each_isa(|isa| {
            let got = moments(isa, &problem, &x);
            assert_eq!(got.mean(), (low + high) / 2.);
            let want = 1000. * ((high - low) / 2.).powi(2);
            assert!((got.square / want - 1.).abs() < 1e-5, "{got:?}");
        });
        Ok(())
    }

    /// Deviations from the head's mean would cancel: a second pass goes about the row's.
    #[test]
    fn a_head_far_from_the_row() -> Result<()> {
        let x = Tensor::zeros(SEGMENT, DType::F32, &Device::Cpu)?;
        let problem = Problem::new(&x, &[SEGMENT], None, None, &NormConfig::from(1e-5))?;
        let x: Vec<f32> = (0..SEGMENT)
            .map(|column| {
                if column < HEAD {
                    1000.
                } else {
                    (column * 7919 % 1009) as f32 / 1009. - 0.5
                }
            })
            .collect();
        let mean = x.iter().map(|x| x.in_f64()).sum::<f64>() / SEGMENT as f64;
        let want = x.iter().map(|x| (x.in_f64() - mean).powi(2)).sum::<f64>();
        for_each_isa(|isa| {
            let got = moments(isa, &problem, &x);
            let deviation = (want / SEGMENT as f64).sqrt();
            let off = [(got.mean() - mean) / deviation, got.square / want - 1.];
            assert!(off.iter().all(|off| off.abs() < 2e-7), "off by {off:?}");
        });
        Ok(())
    }

    #[test]
    fn repeated_halves_do_not_move_the_mean() -> Result<()> {
        for cols in (1000..1400).chain([5000, 40_000]) {
            the_mean_of_a_ramp::<bf16>(cols)?;
            the_mean_of_a_ramp::<f16>(cols)?;
        }
        Ok(())
    }
}
