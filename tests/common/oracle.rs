//! LayerNorm and RMSNorm with their gradients, in f64 and plain loops, written from the formulas:
//!
//! ```text
//! xhat    = (x - mean) * rstd                              rstd = 1 / sqrt(var + eps), biased variance
//! y       = xhat * weight + bias
//! g       = dy * weight
//! dx      = (g - mean(g) - xhat * mean(g * xhat)) * rstd    means over the row
//! dweight = sum(dy * xhat), dbias = sum(dy)                over the rows
//! ```
//! RMSNorm: both means of the first and third line are 0. A zero-centred weight: 1 + weight in its place. `gradients.rs` holds the oracle itself against finite
//! differences.
//!
//! Beside each expected element stands its *scale*: the size of the terms that the element is computed from, which
//! is what the rounding errors of any computation of it are proportional to (see `compare`).

use super::compare::{Values, sum_over_cols, sum_over_rows};

/// The mean is right to three units of itself and of the spread (each half an ulp of f32 at their size): a part of
/// the `operations` that everything else may take. "Rounded once" is one unit, and so are the inverse of the number of columns
/// and the product with it.
const MEAN_SHARE: f64 = 0.375;

/// The arguments of one call, flattened to `rows` x `cols`.
#[derive(Debug, Clone, Copy)]
pub struct Arguments<'a> {
    pub rows: usize,
    pub cols: usize,
    pub x: &'a [f64],
    pub weight: Option<&'a [f64]>,
    pub bias: Option<&'a [f64]>,
    pub dy: &'a [f64],
    pub remove_mean: bool,
    pub zero_centered_weight: bool,
    pub eps: f64,
    /// Of the accumulation type: below it, an operation rounds to a unit of this and not of its own result.
    pub smallest_normal: f64,
}

/// One row's statistics.
#[derive(Debug, Clone, Copy)]
pub struct RowStatistics {
    pub mean: f64,
    pub var: f64,
    pub rstd: f64,
}

/// What a call should give.
pub struct Oracle<'a> {
    arguments: Arguments<'a>,
    statistics: Vec<RowStatistics>,
    /// How often the terms of sums over rows repeat.
    repeats: usize,
}

/// A sum with the error of each addition carried along, so that the oracle's own error stays below that of f64 ops.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    total: f64,
    lost: f64,
}

impl Sum {
    fn add(&mut self, value: f64) {
        let total = self.total + value;
        self.lost += if self.total.abs() >= value.abs() {
            (self.total - total) + value
        } else {
            (value - total) + self.total
        };
        self.total = total;
    }

    fn value(self) -> f64 {
        // What an infinity loses is NaN.
        if self.total.is_finite() {
            self.total + self.lost
        } else {
            self.total
        }
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let len = values.len() as f64;
    let mut sum = Sum::default();
    for value in values {
        sum.add(value);
    }
    sum.value() / len
}

impl<'a> Oracle<'a> {
    pub fn new(arguments: Arguments<'a>) -> Self {
        let statistics = (0..arguments.rows)
            .map(|row| {
                let x = arguments.row(arguments.x, row);
                let center = if arguments.remove_mean {
                    // The quotient is rounded, and with it equal values would have deviations: so a second step.
                    let near = mean(x.iter().copied());
                    let rest = mean(x.iter().map(|x| x - near));
                    if rest.is_finite() { near + rest } else { near }
                } else {
                    0.
                };
                let var = mean(x.iter().map(|x| (x - center) * (x - center)));
                RowStatistics {
                    mean: center,
                    var,
                    rstd: 1. / (var + arguments.eps).sqrt(),
                }
            })
            .collect();
        Self {
            arguments,
            statistics,
            repeats: 0,
        }
    }

    pub fn y(&self) -> Values {
        let args = &self.arguments;
        let mut y = Values::new(sum_over_cols(args.cols));
        for row in 0..args.rows {
            for col in 0..args.cols {
                let xhat = self.xhat(row, col);
                let (weight, bias) = (args.weight(col), args.bias(col));
                y.push(
                    xhat * weight + bias,
                    weight.abs() * (xhat.abs() + self.mean_error(row)) + bias.abs(),
                );
            }
        }
        y
    }

    pub fn dx(&self) -> Values {
        let args = &self.arguments;
        let mut dx = Values::new(sum_over_cols(args.cols));
        for row in 0..args.rows {
            let cols = || 0..args.cols;
            let g = |col| args.row(args.dy, row)[col] * args.weight(col);
            let g_xhat = |col| g(col) * self.xhat(row, col);
            let mean_g = if args.remove_mean {
                mean(cols().map(g))
            } else {
                0.
            };
            let mean_g_xhat = mean(cols().map(g_xhat));
            let size_g = mean(cols().map(|col| g(col).abs()));
            let size_g_xhat = mean(cols().map(|col| g_xhat(col).abs()));
            let rstd = self.statistics[row].rstd;
            let mean_error = self.mean_error(row);
            for col in cols() {
                let xhat = self.xhat(row, col);
                let terms = g(col).abs()
                    + if args.remove_mean { size_g } else { 0. }
                    + xhat.abs() * (size_g_xhat + mean_error * size_g)
                    + mean_error * mean_g_xhat.abs();
                // A large rstd brings back what the terms before it lost as subnormal numbers.
                let terms = terms.max(args.smallest_normal);
                dx.push((g(col) - mean_g - xhat * mean_g_xhat) * rstd, terms * rstd);
            }
        }
        dx
    }

    pub fn dweight(&self) -> Values {
        self.sum_over_rows(|row, col, dy| {
            let xhat = self.xhat(row, col);
            let size = dy.abs() * (xhat.abs() + self.mean_error(row));
            (dy * xhat, size.max(self.arguments.smallest_normal))
        })
    }

    pub fn dbias(&self) -> Values {
        self.sum_over_rows(|_, _, dy| (dy, dy.abs()))
    }

    /// Sums `f`'s (value, size). The running sum of independent terms reaches the root of the sum of their squares,
    /// and where it drifts, its own end.
    fn sum_over_rows(&self, f: impl Fn(usize, usize, f64) -> (f64, f64)) -> Values {
        let args = &self.arguments;
        let mut sums = vec![Sum::default(); args.cols];
        let mut squares = vec![0.; args.cols];
        for row in 0..args.rows {
            for (col, &dy) in args.row(args.dy, row).iter().enumerate() {
                let (value, size) = f(row, col, dy);
                sums[col].add(value);
                squares[col] += size * size;
            }
        }
        let mut values = Values::new(sum_over_rows(args.rows) + sum_over_cols(args.cols));
        for (sum, square) in sums.into_iter().zip(squares) {
            values.push(sum.value(), sum.value().hypot(square.sqrt()));
        }
        values.over_repeats(self.repeats)
    }

    fn xhat(&self, row: usize, col: usize) -> f64 {
        let RowStatistics { mean, rstd, .. } = self.statistics[row];
        (self.arguments.row(self.arguments.x, row)[col] - mean) * rstd
    }

    /// Rows with a deviation whose square is above `largest` lose it to an infinite variance: their rstd is 0.
    pub fn overflowing(mut self, largest: f64) -> Self {
        let Arguments { x, .. } = self.arguments;
        for (row, statistics) in self.statistics.iter_mut().enumerate() {
            let x = self.arguments.row(x, row);
            if x.iter().any(|x| (x - statistics.mean).powi(2) > largest) {
                statistics.rstd = 0.;
            }
        }
        self
    }

    /// Sums over rows are over terms that repeat so many times.
    pub fn over_repeats(mut self, times: usize) -> Self {
        self.repeats = times;
        self
    }

    /// What rounding the mean costs, in units of xhat.
    fn mean_error(&self, row: usize) -> f64 {
        if !self.arguments.remove_mean {
            return 0.;
        }
        let RowStatistics { mean, var, rstd } = self.statistics[row];
        MEAN_SHARE * (mean.abs() + var.sqrt()) * rstd
    }
}

impl<'a> Arguments<'a> {
    fn row(&self, values: &'a [f64], row: usize) -> &'a [f64] {
        &values[row * self.cols..(row + 1) * self.cols]
    }

    fn weight(&self, col: usize) -> f64 {
        let offset = f64::from(u8::from(self.zero_centered_weight));
        self.weight.map_or(1., |weight| offset + weight[col])
    }

    fn bias(&self, col: usize) -> f64 {
        self.bias.map_or(0., |bias| bias[col])
    }
}
