//! Promise: NaN, infinities, subnormals and overflows come out where the formulas put them, as the documentation of
//! `ops` says, and nowhere else.

mod common;

use anyhow::Result;
use candle_core::{Device, IndexOp, Tensor};
use common::case::{Case, Dtypes, Field, Kind, Tracked};
use common::compare::{Values, assert_close, assert_same_bits};
use common::data::{normal, round, rounded, values};
use common::devices::devices;

const SPECIAL: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
/// The ways in which work is divided: serial, by rows, by columns.
const SHAPES: [[usize; 2]; 4] = [[5, 7], [300, 130], [40, 1500], [5, 20001]];

/// Holds `got` to `want` as always, but for elements that `judged` has an opinion of its own of, by their index, got and expected.
#[track_caller]
fn assert_close_but(
    case: &str,
    output: &str,
    got: &Tensor,
    want: &Values,
    mut judged: impl FnMut(usize, f64, f64) -> bool,
) -> Result<()> {
    let (mut close, mut want) = (values(got)?, want.clone());
    assert_eq!(close.len(), want.want.len(), "{case}: {output}");
    for (index, close) in close.iter_mut().enumerate() {
        if judged(index, *close, want.want[index]) {
            (*close, want.want[index], want.scale[index]) = (0., 0., 0.);
        }
    }
    let close = common::data::tensor(&close, got.shape(), got.dtype(), &Device::Cpu)?;
    assert_close(&case, output, &close, &want);
    Ok(())
}

/// Holds NaN against NaN and infinity against infinity, and the rest as always.
#[track_caller]
fn check(case: &str, output: &str, got: &Tensor, want: Values) -> Result<()> {
    assert_close_but(case, output, got, &want, |index, got, expected| {
        assert_eq!(
            (
                got.is_nan(),
                got.is_infinite() && got > 0.,
                got.is_infinite() && got < 0.
            ),
            (
                expected.is_nan(),
                expected == f64::INFINITY,
                expected == f64::NEG_INFINITY
            ),
            "{case}: {output}[{index}]: expected {expected}, got {got}"
        );
        !expected.is_finite()
    })
}

fn gradient(gradient: &Option<Tensor>) -> &Tensor {
    gradient.as_ref().expect("all is tracked")
}

/// dweight takes what the row's xhat has, dbias nothing. tests/accuracy.rs has y and dx.
#[test]
fn a_special_element_of_xs_reaches_dweight_and_not_dbias() -> Result<()> {
    for [rows, cols] in SHAPES {
        for kind in [Kind::LayerNorm, Kind::RmsNorm] {
            for dtypes in [Dtypes::F32, Dtypes::BF16_F32, Dtypes::F16, Dtypes::F64] {
                let clean = Case::random(kind, dtypes, &[rows, cols], 1);
                for special in SPECIAL {
                    let mut case = clean.clone();
                    case.x[2 * cols + cols / 2] = special;
                    for device in devices() {
                        let (clean, outputs) = (clean.gradients(device)?, case.gradients(device)?);
                        let name = format!("{case} with {special}");
                        check(
                            &name,
                            "dweight",
                            gradient(&outputs.dweight),
                            case.oracle().dweight(),
                        )?;
                        if kind.has_bias() {
                            let (got, want) = (gradient(&outputs.dbias), gradient(&clean.dbias));
                            assert_same_bits(&name, "dbias", got, want);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Of an upstream gradient: its row of dx, its column of dweight and dbias, and nothing of y.
#[test]
fn a_special_element_of_dy_stays_in_its_row_and_its_column() -> Result<()> {
    for [rows, cols] in SHAPES {
        for kind in Kind::ALL {
            let clean = Case::random(kind, Dtypes::F32, &[rows, cols], 1);
            for special in SPECIAL {
                let mut case = clean.clone();
                case.dy[2 * cols + 3] = special;
                for device in devices() {
                    let (clean, outputs) = (clean.gradients(device)?, case.gradients(device)?);
                    let name = format!("{case} with {special} in dy");
                    assert_same_bits(&name, "y", &outputs.y, &clean.y);
                    let (dx, clean_dx) = (gradient(&outputs.dx), gradient(&clean.dx));
                    for others in [0..2, 3..rows] {
                        let (got, want) = (dx.i(others.clone())?, clean_dx.i(others)?);
                        assert_same_bits(&name, "dx of other rows", &got, &want);
                    }
                    let own = values(&dx.i(2)?)?;
                    assert!(own.iter().all(|dx| !dx.is_finite()), "{name}: dx: {own:?}");
                    if kind.has_weight() {
                        check(
                            &name,
                            "dweight",
                            gradient(&outputs.dweight),
                            case.oracle().dweight(),
                        )?;
                    }
                    if kind.has_bias() {
                        check(
                            &name,
                            "dbias",
                            gradient(&outputs.dbias),
                            case.oracle().dbias(),
                        )?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Of weight and of bias: their column of y. weight reaches all of dx, bias nothing of it.
#[test]
fn a_special_element_of_weight_or_bias_stays_in_its_column_of_y() -> Result<()> {
    let fields: [(&str, Field); 2] = [
        ("weight", |case| case.weight.as_mut()),
        ("bias", |case| case.bias.as_mut()),
    ];
    for [rows, cols] in SHAPES {
        let clean = Case::random(Kind::LayerNorm, Dtypes::F32, &[rows, cols], 1);
        for (param, field) in fields {
            for special in SPECIAL {
                let mut case = clean.clone();
                field(&mut case).expect("a layer norm has both")[3] = special;
                for device in devices() {
                    let (clean, outputs) = (clean.gradients(device)?, case.gradients(device)?);
                    let name = format!("{case} with {special} in {param}");
                    let (y, clean_y) = (values(&outputs.y)?, values(&clean.y)?);
                    for (index, (y, clean)) in y.into_iter().zip(clean_y).enumerate() {
                        let right = if index % cols == 3 {
                            !y.is_finite()
                        } else {
                            y == clean
                        };
                        assert!(right, "{name}: y[{index}] is {y}");
                    }
                    let (dx, clean_dx) = (gradient(&outputs.dx), gradient(&clean.dx));
                    if param == "bias" {
                        assert_same_bits(&name, "dx", dx, clean_dx);
                    } else {
                        assert!(values(dx)?.iter().all(|dx| !dx.is_finite()), "{name}: dx");
                    }
                    for (output, got, want) in [
                        ("dweight", &outputs.dweight, &clean.dweight),
                        ("dbias", &outputs.dbias, &clean.dbias),
                    ] {
                        assert_same_bits(&name, output, gradient(got), gradient(want));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Subnormal elements are not flushed to 0, on the way in or out.
#[test]
fn subnormals_count() -> Result<()> {
    // Below each dtype's smallest normal, but for elements above the deviation: rounding the mean to a subnormal may cost
    // no more than the table allows.
    for (dtypes, size) in [
        (Dtypes::F32, 1e-38),
        (Dtypes::BF16, 1e-38),
        (Dtypes::BF16_F32, 1e-38),
        (Dtypes::F16, 1e-6),
        (Dtypes::F16_F32, 1e-6),
        (Dtypes::F64, 2e-308),
    ] {
        for shape in SHAPES {
            for kind in [Kind::NoBias, Kind::NoAffine, Kind::RmsNorm] {
                // 1e-12 makes normal numbers of them, 1 leaves them as small as they are.
                for eps in [1e-12, 1.] {
                    let case = Case {
                        eps,
                        ..Case::with_rows(kind, dtypes, &shape, 1, |rng, _| size * normal(rng))
                    };
                    let some = |values: &[f64]| values.iter().any(|&value| value != 0.);
                    assert!(some(&case.x), "{case}: all x are 0");
                    for device in devices() {
                        let outputs = case.gradients(device)?;
                        assert!(some(&values(&outputs.y)?), "{case}: all y are 0");
                        // In f64 the deviation, by which the oracle judges, vanishes as well.
                        if eps < 1. && dtypes != Dtypes::F64 {
                            case.check(device, Tracked::ALL, &outputs);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// dx and the sums over rows overflow as y does: to an infinity of the right sign.
#[test]
fn f16_gradients_overflow_to_infinity() -> Result<()> {
    // rstd is 1e6 where x is constant up to 1e-6; sums of 600 rows of 3e4 reach 1e7.
    let tiny = Case {
        eps: 1e-12,
        ..Case::with_rows(Kind::LayerNorm, Dtypes::F16, &[5, 700], 1, |rng, _| {
            1e-6 * normal(rng)
        })
    };
    let mut large = Case::random(Kind::LayerNorm, Dtypes::F16, &[600, 70], 1);
    for (index, dy) in large.dy.iter_mut().enumerate() {
        *dy = if index % 70 < 35 { 3e4 } else { -3e4 };
    }
    large.dy = rounded(large.dy, large.dtypes.xs);
    for device in devices() {
        let outputs = tiny.gradients(device)?;
        tiny.check(device, Tracked::ALL, &outputs);
        let infinite = |gradient: &Tensor| -> Result<usize> {
            Ok(values(gradient)?
                .into_iter()
                .filter(|v| v.is_infinite())
                .count())
        };
        assert!(infinite(gradient(&outputs.dx))? > 2000, "{tiny}: dx");
        let outputs = large.gradients(device)?;
        large.check(device, Tracked::ALL, &outputs);
        assert_eq!(infinite(gradient(&outputs.dbias))?, 70, "{large}: dbias");
    }
    Ok(())
}

/// The variance is infinite and rstd 0, as in PyTorch: y is the bias, and such rows leave nothing in any gradient but dbias.
#[test]
fn rows_whose_squares_overflow_give_the_bias() -> Result<()> {
    for [rows, cols] in SHAPES {
        for kind in Kind::ALL {
            for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::BF16_F32] {
                let case = Case::with_rows(kind, dtypes, &[rows, cols], 1, |rng, row| {
                    if row % 2 == 0 {
                        1e25 * normal(rng)
                    } else {
                        normal(rng)
                    }
                });
                let oracle = case.oracle().overflowing(f64::from(f32::MAX));
                for device in devices() {
                    let outputs = case.gradients(device)?;
                    let y = values(&outputs.y)?;
                    for (col, &y) in y[..cols].iter().enumerate() {
                        let bias = case.bias.as_ref().map_or(0., |bias| bias[col]);
                        assert_eq!(y, round(bias, dtypes.xs), "{case}: y[{col}]");
                    }
                    let dx = values(gradient(&outputs.dx))?;
                    assert!(dx[..cols].iter().all(|&dx| dx == 0.), "{case}: dx");
                    assert_close(&case, "y", &outputs.y, &oracle.y());
                    assert_close(&case, "dx", gradient(&outputs.dx), &oracle.dx());
                    if kind.has_weight() {
                        assert_close(
                            &case,
                            "dweight",
                            gradient(&outputs.dweight),
                            &oracle.dweight(),
                        );
                    }
                    if kind.has_bias() {
                        assert_close(&case, "dbias", gradient(&outputs.dbias), &oracle.dbias());
                    }
                }
            }
        }
    }
    Ok(())
}

/// Constant rows so far from 0 that mean * rstd overflows, where rstd is not 0: y is the bias, and xhat is 0, so that dweight
/// has nothing of them. dx is (g - mean(g)) * rstd, or as much smaller as the mean's rounding makes rstd.
#[test]
fn constant_rows_far_from_zero() -> Result<()> {
    // Widths that leave some of a kernel's columns empty, in rows enough for the kernels of larger tensors.
    let narrow = [[300, 24], [3000, 72], [3000, 520]];
    for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::BF16_F32, Dtypes::F64] {
        // The mean of powers of 2 is exact however it is computed. 20001 of each do not overflow.
        let constants = match dtypes {
            Dtypes::F64 => [[2f64.powi(1007), -2f64.powi(1008)], [1e303, -5e303]],
            _ => [[2f64.powi(110), -2f64.powi(112)], [1e33, -1e34]],
        };
        for [rows, cols] in SHAPES.into_iter().chain(narrow) {
            let far = |row: usize| row % 3 != 1;
            let near = Case {
                eps: 1e-12,
                ..Case::with_rows(Kind::LayerNorm, dtypes, &[rows, cols], 1, |rng, row| {
                    if far(row) { 0. } else { normal(rng) }
                })
            };
            // xhat of a row of zeros is 0 as well, and the oracle's mean of these is exact.
            let oracle = near.oracle();
            let (y, dx) = (oracle.y(), oracle.dx());
            let (dweight, dbias) = (oracle.dweight(), oracle.dbias());
            for constants in constants {
                let mut case = near.clone();
                for (row, x) in case.x.chunks_mut(cols).enumerate() {
                    if far(row) {
                        x.fill(round(constants[row % 2], dtypes.xs));
                    }
                }
                let name = format!("{case} of {constants:?}");
                for device in devices() {
                    let outputs = [
                        Some(case.gradients(device)?),
                        case.gradients_as_of_larger(device)?,
                    ];
                    for outputs in outputs.into_iter().flatten() {
                        assert_close(&name, "y", &outputs.y, &y);
                        assert_close(&name, "dweight", gradient(&outputs.dweight), &dweight);
                        assert_close(&name, "dbias", gradient(&outputs.dbias), &dbias);
                        let got = gradient(&outputs.dx);
                        assert_close_but(&name, "dx", got, &dx, |index, got, most| {
                            // What cancels in g - mean(g), and the rounding of bf16.
                            let slack = 1e-5 * dx.scale[index] + 0.01 * most.abs();
                            let right = most.min(0.) - slack..=most.max(0.) + slack;
                            let far = far(index / cols);
                            assert!(
                                !far || right.contains(&got),
                                "{name}: dx[{index}] is {got}, of {most}"
                            );
                            far
                        })?;
                    }
                }
            }
        }
    }
    Ok(())
}
