//! One row's maths, in chunks that stay in the first-level cache.
//!
//! Sums: [`LANES`] running sums within a chunk, whose totals are added in f64 over a segment's chunks and then over a
//! row's segments, in order. Whoever computes the segments, the result is the same.

use super::element::{Acc, Element};
use crate::problem::Problem;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::{Add, AddAssign};

/// Elements converted and processed at a time: three f32 buffers of it fill half of a 32 KiB cache.
pub(crate) const CHUNK: usize = 1024;
/// The unit of work on a row that is shared between threads.
pub(crate) const SEGMENT: usize = 16 * CHUNK;
/// Independent running sums: one 512-bit register of f32.
const LANES: usize = 16;

/// Runs `f` compiled for the best instruction set of this machine.
#[inline(always)]
pub(crate) fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// weight and bias in the accumulation type; constants where they are missing.
pub(crate) struct Params<'a, A: Acc> {
    weight: Option<Cow<'a, [A]>>,
    bias: Option<Cow<'a, [A]>>,
    ones: Cow<'a, [A]>,
    zeros: Cow<'a, [A]>,
}

impl<'a, A: Acc> Params<'a, A> {
    pub fn new<P: Element<Acc = A>>(weight: Option<&'a [P]>, bias: Option<&'a [P]>) -> Self {
        Self {
            weight: weight.map(P::widen),
            bias: bias.map(P::widen),
            ones: Cow::Owned(vec![A::one(); CHUNK]),
            zeros: Cow::Owned(vec![A::zero(); CHUNK]),
        }
    }

    /// The same, with `column` as the first.
    pub fn from(&self, column: usize) -> Params<'_, A> {
        Params {
            weight: self.weight.as_ref().map(|w| Cow::Borrowed(&w[column..])),
            bias: self.bias.as_ref().map(|b| Cow::Borrowed(&b[column..])),
            ones: Cow::Borrowed(&self.ones),
            zeros: Cow::Borrowed(&self.zeros),
        }
    }

    #[inline(always)]
    fn weight(&self, start: usize, len: usize) -> &[A] {
        match &self.weight {
            Some(weight) => &weight[start..start + len],
            None => &self.ones[..len],
        }
    }

    #[inline(always)]
    fn bias(&self, start: usize, len: usize) -> &[A] {
        match &self.bias {
            Some(bias) => &bias[start..start + len],
            None => &self.zeros[..len],
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct RowStatistics<A> {
    pub mean: A,
    pub rstd: A,
}

/// Two sums over a row's columns.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums(f64, f64);

impl Add for Sums {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0, self.1 + other.1)
    }
}

impl AddAssign for Sums {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl<A: Acc> RowStatistics<A> {
    pub fn of_empty_row(problem: &Problem) -> Self {
        Self::about(problem, 0., Sums::default())
    }

    /// From the sums of (x - center) and (x - center)^2. What is left of the mean after `center` corrects both.
    fn about(problem: &Problem, center: f64, sums: Sums) -> Self {
        let inv_cols = 1. / problem.cols.max(1) as f64;
        let (rest, square) = (sums.0 * inv_cols, sums.1 * inv_cols);
        let (mean, var) = if problem.remove_mean {
            (center + rest, (square - rest * rest).max(0.))
        } else {
            (0., square)
        };
        Self {
            mean: A::narrow(mean),
            rstd: A::narrow(1. / (var + problem.eps).sqrt()),
        }
    }
}

/// Two passes: the mean, then the variance about it.
#[inline(always)]
pub(crate) fn statistics<T: Element>(problem: &Problem, x: &[T]) -> RowStatistics<T::Acc> {
    two_pass(problem, |center| {
        x.chunks(SEGMENT)
            .map(|x| segment_sums(x, center))
            .fold(Sums::default(), Sums::add)
    })
}

/// [`statistics`] with the segments on all threads.
pub(crate) fn statistics_parallel<T: Element>(problem: &Problem, x: &[T]) -> RowStatistics<T::Acc> {
    two_pass(problem, |center| {
        let segments: Vec<_> = x
            .par_chunks(SEGMENT)
            .map(|x| {
                dispatch(
                    #[inline(always)]
                    || segment_sums(x, center),
                )
            })
            .collect();
        segments.into_iter().fold(Sums::default(), Sums::add)
    })
}

#[inline(always)]
fn two_pass<A: Acc>(problem: &Problem, sums: impl Fn(A) -> Sums) -> RowStatistics<A> {
    if !problem.remove_mean {
        return RowStatistics::about(problem, 0., sums(A::zero()));
    }
    let center = A::narrow(sums(A::zero()).0 / problem.cols as f64);
    RowStatistics::about(problem, center.widen_to_f64(), sums(center))
}

/// The sums of (x - center) and (x - center)^2.
#[inline(always)]
fn segment_sums<T: Element>(x: &[T], center: T::Acc) -> Sums {
    let mut buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut total = Sums::default();
    for x in x.chunks(CHUNK) {
        let x = T::read(x, &mut buffer);
        total += lanes(x, x, |x, _| {
            let d = x - center;
            (d, d * d)
        });
    }
    total
}

/// The sums of dy*weight and dy*weight*xhat.
#[inline(always)]
pub(crate) fn gradient_sums<T: Element>(
    x: &[T],
    dy: &[T],
    params: &Params<'_, T::Acc>,
    stats: RowStatistics<T::Acc>,
) -> Sums {
    let segments = x.chunks(SEGMENT).zip(dy.chunks(SEGMENT)).enumerate();
    segments
        .map(|(segment, (x, dy))| gradient_segment_sums(x, dy, params, segment * SEGMENT, stats))
        .fold(Sums::default(), Sums::add)
}

/// [`gradient_sums`] with the segments on all threads.
pub(crate) fn gradient_sums_parallel<T: Element>(
    x: &[T],
    dy: &[T],
    params: &Params<'_, T::Acc>,
    stats: RowStatistics<T::Acc>,
) -> Sums {
    let segments: Vec<_> = x
        .par_chunks(SEGMENT)
        .zip(dy.par_chunks(SEGMENT))
        .enumerate()
        .map(|(segment, (x, dy))| {
            dispatch(
                #[inline(always)]
                || gradient_segment_sums(x, dy, params, segment * SEGMENT, stats),
            )
        })
        .collect();
    segments.into_iter().fold(Sums::default(), Sums::add)
}

#[inline(always)]
fn gradient_segment_sums<T: Element>(
    x: &[T],
    dy: &[T],
    params: &Params<'_, T::Acc>,
    start: usize,
    stats: RowStatistics<T::Acc>,
) -> Sums {
    let mut x_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut dy_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut g_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut total = Sums::default();
    for (chunk, (x, dy)) in x.chunks(CHUNK).zip(dy.chunks(CHUNK)).enumerate() {
        let x = T::read(x, &mut x_buffer);
        let dy = T::read(dy, &mut dy_buffer);
        let weight = params.weight(start + chunk * CHUNK, x.len());
        let g = &mut g_buffer[..x.len()];
        for ((g, &dy), &w) in g.iter_mut().zip(dy).zip(weight) {
            *g = dy * w;
        }
        total += lanes(x, g, |x, g| (g, g * ((x - stats.mean) * stats.rstd)));
    }
    total
}

/// Sums the pairs that `f` makes of `a` and `b`.
#[inline(always)]
fn lanes<A: Acc>(a: &[A], b: &[A], f: impl Fn(A, A) -> (A, A)) -> Sums {
    let (mut s0, mut s1) = ([A::zero(); LANES], [A::zero(); LANES]);
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_lanes.remainder(), b_lanes.remainder());
    for (a, b) in a_lanes.zip(b_lanes) {
        for lane in 0..LANES {
            let (v0, v1) = f(a[lane], b[lane]);
            s0[lane] += v0;
            s1[lane] += v1;
        }
    }
    for (lane, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        let (v0, v1) = f(a, b);
        s0[lane] += v0;
        s1[lane] += v1;
    }
    let sum = |s: [A; LANES]| s.iter().map(|v| v.widen_to_f64()).sum();
    Sums(sum(s0), sum(s1))
}

/// y = (x - mean) * rstd * weight + bias.
#[inline(always)]
pub(crate) fn normalize<T: Element>(
    x: &[T],
    stats: RowStatistics<T::Acc>,
    params: &Params<'_, T::Acc>,
    y: &mut [T],
) {
    let mut x_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut y_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    for (chunk, (x, y)) in x.chunks(CHUNK).zip(y.chunks_mut(CHUNK)).enumerate() {
        let weight = params.weight(chunk * CHUNK, x.len());
        let bias = params.bias(chunk * CHUNK, x.len());
        let x = T::read(x, &mut x_buffer);
        T::write(
            y,
            &mut y_buffer,
            #[inline(always)]
            |y| {
                for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                    *y = (x - stats.mean) * stats.rstd * w + b;
                }
            },
        );
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
            mean_g: A::narrow(removed * inv_cols),
            mean_g_xhat: A::narrow(sums.1 * inv_cols),
        }
    }
}

/// dx = (dy*weight - mean_g - xhat * mean_g_xhat) * rstd.
#[inline(always)]
pub(crate) fn dx<T: Element>(
    x: &[T],
    dy: &[T],
    params: &Params<'_, T::Acc>,
    stats: RowStatistics<T::Acc>,
    scales: GradientScales<T::Acc>,
    dx: &mut [T],
) {
    let mut x_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut dy_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut dx_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let chunks = x
        .chunks(CHUNK)
        .zip(dy.chunks(CHUNK))
        .zip(dx.chunks_mut(CHUNK));
    for (chunk, ((x, dy), dx)) in chunks.enumerate() {
        let weight = params.weight(chunk * CHUNK, x.len());
        let x = T::read(x, &mut x_buffer);
        let dy = T::read(dy, &mut dy_buffer);
        T::write(
            dx,
            &mut dx_buffer,
            #[inline(always)]
            |dx| {
                for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                    let xhat = (x - stats.mean) * stats.rstd;
                    *dx = (dy * w - scales.mean_g - xhat * scales.mean_g_xhat) * stats.rstd;
                }
            },
        );
    }
}

/// dweight += dy * xhat and dbias += dy, where they are not empty.
#[inline(always)]
pub(crate) fn add_param_gradients<T: Element>(
    x: &[T],
    dy: &[T],
    stats: RowStatistics<T::Acc>,
    dweight: &mut [T::Acc],
    dbias: &mut [T::Acc],
) {
    let mut x_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    let mut dy_buffer = [num_traits::zero::<T::Acc>(); CHUNK];
    for (chunk, (x, dy)) in x.chunks(CHUNK).zip(dy.chunks(CHUNK)).enumerate() {
        let dy = T::read(dy, &mut dy_buffer);
        let columns = chunk * CHUNK..chunk * CHUNK + dy.len();
        if !dweight.is_empty() {
            let x = T::read(x, &mut x_buffer);
            for ((dw, &x), &dy) in dweight[columns.clone()].iter_mut().zip(x).zip(dy) {
                *dw += dy * ((x - stats.mean) * stats.rstd);
            }
        }
        if !dbias.is_empty() {
            for (db, &dy) in dbias[columns].iter_mut().zip(dy) {
                *db += dy;
            }
        }
    }
}
