//! The tolerance table and the one comparison.
//!
//! Element by element, so that no wrong element hides in a norm:
//!
//! ```text
//! |got - want| <= rounding * |want| + smallest + unit * (operations + sums) * scale
//! ```
//! The first two terms are half an ulp of the output's dtype. The last one is what computing the element costs, in
//! the type that sums are computed in: `scale` is the size of the terms that the element is made of (the oracle
//! gives it), `operations` a handful of roundings, `sums` what the sums behind it add to them.

use super::data::{round, values};
use candle_core::{DType, Result, Tensor};
use std::fmt::Display;

/// How far an element may be off, by the output's dtype.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Half an ulp, relative to the value: the last rounding.
    pub rounding: f64,
    /// Half the smallest subnormal: the last rounding of values near 0.
    pub smallest: f64,
    /// Half an ulp of the type that statistics and sums are computed in.
    pub unit: f64,
    /// Roundings on the way to an element, times `unit`.
    pub operations: f64,
}

/// The table.
pub fn tolerance(dtype: DType) -> Tolerance {
    let power = |exponent: i32| 2f64.powi(exponent);
    // Computed in f32. y takes four roundings besides those of rstd, dx about eight.
    let in_f32 = Tolerance {
        rounding: power(-24),
        smallest: power(-150),
        unit: power(-24),
        operations: 8.,
    };
    match dtype {
        DType::F32 => in_f32,
        DType::F16 => Tolerance {
            rounding: power(-11),
            smallest: power(-25),
            ..in_f32
        },
        DType::BF16 => Tolerance {
            rounding: power(-8),
            smallest: power(-134),
            ..in_f32
        },
        // Twice the operations: the oracle rounds as often as the op.
        DType::F64 => Tolerance {
            rounding: power(-53),
            smallest: 0.,
            unit: power(-53),
            operations: 16.,
        },
        dtype => panic!("no tolerance for dtype {dtype:?}"),
    }
}

/// Roundings of a sum over a row. They grow with the root of its length; a sixteenth of it is what 256 partial sums
/// leave, and no kernel sums a row that is long enough to matter in fewer.
pub fn sum_over_cols(cols: usize) -> f64 {
    (cols as f64).sqrt() / 16.
}

/// Roundings of a sum over rows, whose scale is the root of the sum of squares: one running sum over n random terms
/// is off by 0.4 * sqrt(n) units in the root mean square.
pub fn sum_over_rows(rows: usize) -> f64 {
    (rows as f64).sqrt()
}

/// Expected elements with their scales.
#[derive(Debug, Clone)]
pub struct Values {
    pub want: Vec<f64>,
    pub scale: Vec<f64>,
    /// Roundings of the sums behind an element.
    sums: f64,
    /// 1 against the oracle, 2 against another implementation that rounds as well.
    sides: f64,
    /// Expected values below it may have become zeros.
    flushed_below: f64,
}

impl Values {
    pub fn new(sums: f64) -> Self {
        Self {
            want: Vec::new(),
            scale: Vec::new(),
            sums,
            sides: 1.,
            flushed_below: 0.,
        }
    }

    pub fn push(&mut self, want: f64, scale: f64) {
        self.want.push(want);
        self.scale.push(scale);
    }

    /// Expects what another implementation gave, instead of the oracle's values.
    pub fn expecting(self, other: &Tensor) -> Result<Self> {
        Ok(Self {
            want: values(other)?,
            sides: 2.,
            ..self
        })
    }

    /// The same with every error allowed to be `factor` times as large.
    pub fn amplified(mut self, factor: f64) -> Self {
        self.sides *= factor;
        self
    }

    /// The sum over consecutive blocks, as the gradient of a tensor that was broadcast along them.
    pub fn summed_over_blocks(&self, blocks: usize) -> Self {
        let len = self.want.len() / blocks;
        let mut sums = Self::new(self.sums + sum_over_rows(blocks));
        for index in 0..len {
            let of = |v: &[f64]| (0..blocks).map(|block| v[block * len + index]).sum();
            sums.push(of(&self.want), of(&self.scale));
        }
        sums
    }

    /// `times` the values: sums over data that repeat. Each repeat rounds a running sum the same way, so that errors add up instead of
    /// cancelling; in a sixteenth of them at most, for that many partial sums and more.
    pub fn times(mut self, times: usize) -> Self {
        for value in self.want.iter_mut().chain(&mut self.scale) {
            *value *= times as f64;
        }
        self.sums += times as f64 / 16.;
        self
    }

    /// Sums over terms that repeat so many times: each step of one running sum may round the same way, by half a unit of what the
    /// sum is by then.
    pub fn over_repeats(mut self, times: usize) -> Self {
        self.sums += times as f64 / 2.;
        self
    }

    /// What follows the op takes expected values of less than `least` for zeros, or not.
    pub fn flushed_below(mut self, least: f64) -> Self {
        self.flushed_below = least;
        self
    }

    /// How far `got` is off, in tolerances; a NaN is infinitely far off, even where one is expected. An infinity is right
    /// where an expected value that the dtype cannot hold rounds to it.
    fn excess(&self, index: usize, got: f64, dtype: DType) -> f64 {
        let want = self.want[index];
        let allowed = self.allowed(index, dtype);
        if got == 0. && want.abs() < self.flushed_below {
            return 0.;
        }
        if got == want || (got.is_infinite() && round(want + allowed.copysign(got), dtype) == got) {
            return 0.;
        }
        let excess = (got - want).abs() / allowed;
        if excess.is_nan() {
            f64::INFINITY
        } else {
            excess
        }
    }

    fn allowed(&self, index: usize, dtype: DType) -> f64 {
        let tolerance = tolerance(dtype);
        let operations = tolerance.operations + self.sums;
        let rounding = tolerance.rounding * self.want[index].abs() + tolerance.smallest;
        self.sides * (rounding + tolerance.unit * operations * self.scale[index])
    }
}

/// Holds `got` against `want`; `case` says which call it was, `output` which of its outputs.
#[track_caller]
pub fn assert_close(case: &impl Display, output: &str, got: &Tensor, want: &Values) {
    let dtype = got.dtype();
    let shape = got.dims();
    let got = values(got).unwrap_or_else(|error| panic!("{case}: {output}: {error}"));
    assert_eq!(
        got.len(),
        want.want.len(),
        "{case}: {output} {shape:?}: number of elements"
    );
    let mut wrong = 0;
    let mut worst = (0, 0.);
    for (index, &got) in got.iter().enumerate() {
        let excess = want.excess(index, got, dtype);
        if excess > 1. {
            wrong += 1;
        }
        if excess > worst.1 {
            worst = (index, excess);
        }
    }
    let (index, excess) = worst;
    assert!(
        wrong == 0,
        "{case}: {output} {shape:?} of {dtype:?}: {wrong} of {} elements are wrong; worst at flat index {index}: \
         expected {} +- {:e}, got {} ({excess:.1} times the tolerance); rounded, the expected value is {}",
        got.len(),
        want.want[index],
        want.allowed(index, dtype),
        got[index],
        round(want.want[index], dtype),
    );
}

/// Holds two results against each other bit by bit.
#[track_caller]
pub fn assert_same_bits(case: &impl Display, output: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(
        (got.dims(), got.dtype()),
        (want.dims(), want.dtype()),
        "{case}: {output}: shape and dtype"
    );
    let bits = |tensor| {
        super::data::bits(tensor).unwrap_or_else(|error| panic!("{case}: {output}: {error}"))
    };
    let (got, want) = (bits(got), bits(want));
    if let Some(index) = got.iter().zip(&want).position(|(got, want)| got != want) {
        panic!(
            "{case}: {output}: not the same bits at flat index {index}: {} and {}",
            f64::from_bits(got[index]),
            f64::from_bits(want[index]),
        );
    }
}
