//! Promise: accurate where formulas cancel or overflow. Each test is a trap that an implementation has fallen into.

mod common;

use anyhow::Result;
use candle_core::{Device, IndexOp, Tensor};
use common::case::{Case, Dtypes, Kind, Tracked};
use common::compare::{assert_close, assert_same_bits};
use common::data::{normal, round, values};
use common::devices::devices;

/// The widths of a serial call, of several tasks, and of rows that threads share.
const SHAPES: [[usize; 2]; 5] = [[3, 5], [5, 768], [33, 4096], [2, 20001], [2, 70001]];

fn check(case: &Case) -> Result<()> {
    for device in devices() {
        case.check(device, Tracked::ALL, &case.gradients(device)?);
        if let Some(outputs) = case.gradients_as_of_larger(device)? {
            case.check(device, Tracked::ALL, &outputs);
        }
    }
    Ok(())
}

fn check_rows(
    dtypes: Dtypes,
    mut x: impl FnMut(&mut rand::rngs::StdRng, usize) -> f64,
) -> Result<()> {
    for shape in SHAPES {
        for kind in Kind::ALL {
            check(&Case::with_rows(kind, dtypes, &shape, 1, &mut x))?;
        }
    }
    Ok(())
}

/// E[x^2] - E[x]^2 in f32 loses 3% of this variance, and all of it at 10000.
#[test]
fn mean_far_above_std() -> Result<()> {
    for mean in [1e3, -1e3, 1e4] {
        for dtypes in [Dtypes::F32, Dtypes::F64] {
            check_rows(dtypes, |rng, _| mean + normal(rng))?;
        }
    }
    Ok(())
}

/// Noise of a few ulps: the oracle sees the same rounded values.
#[test]
fn mean_far_above_std_in_half_types() -> Result<()> {
    for dtypes in [Dtypes::F16, Dtypes::F16_F32, Dtypes::BF16, Dtypes::BF16_F32] {
        check_rows(dtypes, |rng, _| 1e3 + 8. * normal(rng))?;
    }
    Ok(())
}

/// One element says nothing about the row: sums of deviations from it would cancel, in all of the row or in what one thread sums.
#[test]
fn an_element_far_from_the_row() -> Result<()> {
    let shapes = [[64, 300], [64, 1023], [8, 32768], [2, 140000], [1, 1000000]];
    for shape in SHAPES.into_iter().chain(shapes) {
        for (column, value) in [(0, 1e4), (1, -16.), (8, 1e4)] {
            for dtypes in [Dtypes::F32, Dtypes::F16] {
                for kind in Kind::ALL {
                    let mut case = Case::random(kind, dtypes, &shape, 1);
                    for row in case.x.chunks_mut(shape[1]) {
                        row[column.min(shape[1] - 1)] = value;
                    }
                    check(&case)?;
                }
            }
        }
    }
    Ok(())
}

/// xhat is 0 exactly, and so is everything made of it; 0.1 and 1/3 have no exact sums.
#[test]
fn constant_rows_give_the_bias() -> Result<()> {
    for constant in [0., 0.1, -1. / 3., 1000., 12345.678, -3e4] {
        for shape in SHAPES {
            for dtypes in Dtypes::ALL {
                let case = Case::with_rows(Kind::LayerNorm, dtypes, &shape, 1, |_, row| {
                    constant * (row + 1) as f64 / 33.
                });
                let bias = case.bias.clone().expect("a layer norm has one");
                for device in devices() {
                    let outputs = case.gradients(device)?;
                    let y = values(&outputs.y)?;
                    for (index, y) in y.into_iter().enumerate() {
                        let bias = round(bias[index % shape[1]], dtypes.xs);
                        assert_eq!(y, bias, "{case} of {constant}: y[{index}] is not the bias");
                    }
                    case.check(device, Tracked::ALL, &outputs);
                }
            }
        }
    }
    Ok(())
}

/// The same for rows of one element, whose gradient is 0.
#[test]
fn one_column_gives_the_bias_and_no_gradient() -> Result<()> {
    for kind in [Kind::LayerNorm, Kind::NoBias, Kind::NoAffine] {
        for dtypes in Dtypes::ALL {
            let case = Case::random(kind, dtypes, &[70, 1], 1);
            let bias = case
                .bias
                .as_ref()
                .map_or(0., |bias| round(bias[0], dtypes.xs));
            for device in devices() {
                let outputs = case.gradients(device)?;
                assert!(
                    values(&outputs.y)?.into_iter().all(|y| y == bias),
                    "{case}: y"
                );
                for (name, gradient) in [("dx", &outputs.dx), ("dweight", &outputs.dweight)] {
                    let Some(gradient) = gradient else { continue };
                    assert!(
                        values(gradient)?.into_iter().all(|g| g == 0.),
                        "{case}: {name}"
                    );
                }
            }
        }
    }
    check(&Case::random(Kind::RmsNorm, Dtypes::F32, &[70, 1], 1))
}

/// Squares reach 1e36, a hundredth of the largest f32; f16 reaches its own largest, whose square it cannot hold.
#[test]
fn large_magnitude() -> Result<()> {
    check_rows(Dtypes::F32, |rng, _| 1e16 * normal(rng))?;
    check_rows(Dtypes::BF16, |rng, _| 1e16 * normal(rng))?;
    check_rows(Dtypes::F16, |rng, _| 2e4 * normal(rng))?;
    check_rows(Dtypes::F64, |rng, _| 1e140 * normal(rng))
}

/// eps alone decides the spread of such rows.
#[test]
fn tiny_magnitude() -> Result<()> {
    check_rows(Dtypes::F32, |rng, _| 1e-12 * normal(rng))?;
    check_rows(Dtypes::BF16, |rng, _| 1e-12 * normal(rng))?;
    check_rows(Dtypes::F16, |rng, _| 1e-6 * normal(rng))?;
    check_rows(Dtypes::F64, |rng, _| 1e-140 * normal(rng))
}

/// eps is added to the variance, in the size at which it matters.
#[test]
fn eps_beside_the_variance() -> Result<()> {
    for eps in [1e-12, 1e-6, 1e-2, 1., 100.] {
        for kind in Kind::ALL {
            let case = Case::random(kind, Dtypes::F32, &[5, 100], 1);
            check(&Case { eps, ..case })?;
        }
    }
    Ok(())
}

#[test]
fn eps_of_zero() -> Result<()> {
    for kind in Kind::ALL {
        let case = Case::random(kind, Dtypes::F32, &[5, 100], 1);
        check(&Case { eps: 0., ..case })?;
    }
    Ok(())
}

/// A NaN or an infinity spoils its own row, all of it where the mean is removed, and no other.
#[test]
fn nan_and_infinity_stay_in_their_row() -> Result<()> {
    for shape in [[5, 5], [40, 768], [5, 20001], [5, 70001]] {
        for kind in Kind::ALL {
            for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::F64] {
                let clean = Case::random(kind, dtypes, &shape, 1);
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let mut spoiled = clean.clone();
                    spoiled.x[2 * shape[1] + shape[1] / 2] = bad;
                    for device in devices() {
                        let (clean_outputs, outputs) =
                            (clean.gradients(device)?, spoiled.gradients(device)?);
                        let dx = |outputs: &Option<Tensor>| outputs.clone().expect("xs is tracked");
                        for (output, got, want) in [
                            ("y", outputs.y, clean_outputs.y),
                            ("dx", dx(&outputs.dx), dx(&clean_outputs.dx)),
                        ] {
                            for rows in [0..2, 3..shape[0]] {
                                let case = format!("{spoiled} with {bad}, rows {rows:?}");
                                assert_same_bits(
                                    &case,
                                    output,
                                    &got.i(rows.clone())?,
                                    &want.i(rows)?,
                                );
                            }
                            let row = values(&got.i(2)?)?;
                            let spoilt = row.iter().filter(|value| value.is_nan()).count();
                            let all = kind.removes_mean() || bad.is_nan();
                            assert!(
                                if all { spoilt == row.len() } else { spoilt > 0 },
                                "{spoiled} with {bad}: {output}: {spoilt} of the row's {} are NaN",
                                row.len()
                            );
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// An overflow of the output's type is an infinity, not a wrong number.
#[test]
fn f16_overflows_to_infinity() -> Result<()> {
    let mut case = Case::random(Kind::NoBias, Dtypes::F16_F32, &[3, 64], 1);
    case.weight = Some(vec![1e9; 64]);
    for device in devices() {
        let y = values(&case.forward(device)?)?;
        assert!(
            y.iter().all(|y| y.is_infinite()),
            "{case}: an element is finite"
        );
        for (y, want) in y.into_iter().zip(case.oracle().y().want) {
            assert_eq!(y.signum(), want.signum(), "{case}: the sign of an infinity");
        }
    }
    Ok(())
}

/// A million columns. One running sum in f32 would be off in the third digit.
#[test]
fn one_row_of_a_million_columns_is_close_to_f64() -> Result<()> {
    let case = Case::with_rows(
        Kind::LayerNorm,
        Dtypes::F32,
        &[1, 1_000_000],
        1,
        |rng, _| 10. + normal(rng),
    );
    let in_f64 = Case {
        dtypes: Dtypes::F64,
        ..case.clone()
    };
    let want = values(&in_f64.forward(&Device::Cpu)?)?;
    for device in devices() {
        let y = case.forward(device)?;
        assert_close(&case, "y", &y, &case.oracle().y());
        let worst = values(&y)?
            .iter()
            .zip(&want)
            .map(|(y, want)| (y - want).abs())
            .fold(0., f64::max);
        // A mean of 10 is rounded to 5e-7, weights reach 2.3; an ulp of y, which reaches 5, is 5e-7.
        assert!(worst < 3e-6, "{case}: off by {worst}");
        case.check(device, Tracked::ALL, &case.gradients(device)?);
    }
    Ok(())
}
