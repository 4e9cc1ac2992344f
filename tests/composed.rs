//! Promise: `composed::normalize` is the same function as the fused op, in value and in gradients.

mod common;

use anyhow::Result;
use candle_core::Tensor;
use candle_fused_layer_norm::composed;
use common::case::{Case, Dtypes, Kind, Tracked};
use common::compare::{Values, assert_close};
use common::data::{normal, round, values};
use common::devices::devices;

const SHAPES: [(&[usize], usize); 6] = [
    (&[24], 1),
    (&[9, 1], 1),
    (&[7, 33], 1),
    (&[4, 6, 10, 3], 2),
    (&[3, 1025], 1),
    (&[300, 64], 1),
];

fn call(
    case: &Case,
    xs: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    let config = case.kind.config(case.eps);
    composed::normalize(xs, case.normalized_shape(), weight, bias, &config)
}

/// With the case's weight and bias.
fn forward(case: &Case, xs: &Tensor) -> candle_core::Result<Tensor> {
    let (weight, bias) = (case.weight(xs.device())?, case.bias(xs.device())?);
    call(case, xs, weight.as_ref(), bias.as_ref())
}

#[test]
fn composed_equals_the_fused_op() -> Result<()> {
    for (shape, normalized_dims) in SHAPES {
        for kind in Kind::ALL {
            for dtypes in Dtypes::ALL {
                let case = Case::random(kind, dtypes, shape, normalized_dims);
                let oracle = case.oracle();
                for device in devices() {
                    let fused = case.gradients(device)?;
                    let composed =
                        case.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
                            call(&case, xs, weight, bias)
                        })?;
                    let check =
                        |output, got: Option<Tensor>, fused, oracle: Values| match (got, fused) {
                            (Some(got), Some(fused)) => {
                                assert_eq!(got.dtype(), Tensor::dtype(&fused), "{case}: {output}");
                                assert_eq!(got.dims(), fused.dims(), "{case}: {output}");
                                assert_close(&case, output, &got, &oracle.expecting(&fused)?);
                                Ok(())
                            }
                            (None, None) => anyhow::Ok(()),
                            _ => panic!("{case}: {output}: given by one of the two"),
                        };
                    check("y", Some(composed.y), Some(fused.y), oracle.y())?;
                    check("dx", composed.dx, fused.dx, oracle.dx())?;
                    check("dweight", composed.dweight, fused.dweight, oracle.dweight())?;
                    check("dbias", composed.dbias, fused.dbias, oracle.dbias())?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn composed_takes_views() -> Result<()> {
    for kind in Kind::ALL {
        let case = Case::random(kind, Dtypes::F32, &[7, 33], 1);
        for device in devices() {
            let xs = case.xs(device)?.t()?.contiguous()?.t()?;
            let y = forward(&case, &xs)?;
            assert_close(&case, "y", &y, &case.oracle().y());
        }
    }
    Ok(())
}

#[test]
fn composed_takes_empty_tensors() -> Result<()> {
    for kind in Kind::ALL {
        for shape in [[0, 8], [3, 0]] {
            let case = Case::random(kind, Dtypes::F32, &shape, 1);
            let device = &candle_core::Device::Cpu;
            let y = forward(&case, &case.xs(device)?)?;
            assert_eq!(y.dims(), shape, "{case}");
        }
    }
    Ok(())
}

/// Where the deviations are less than what sums of the values are rounded to.
#[test]
fn composed_of_rows_far_from_zero() -> Result<()> {
    for kind in Kind::ALL {
        for dtypes in [Dtypes::F32, Dtypes::F64] {
            for far in [1e3, 1e4, -1e6] {
                let case = Case::with_rows(kind, dtypes, &[9, 1025], 1, |rng, row| {
                    far * (row + 1) as f64 + normal(rng)
                });
                for device in devices() {
                    let got = case.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
                        call(&case, xs, weight, bias)
                    })?;
                    case.check(device, Tracked::ALL, &got);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn composed_of_constant_rows_is_the_bias() -> Result<()> {
    for constant in [0., 0.1, -1. / 3., 1000., 12345.678, -3e4] {
        for cols in [1, 2, 3, 7, 1000] {
            for dtypes in Dtypes::ALL {
                let case = Case::with_rows(Kind::LayerNorm, dtypes, &[3, cols], 1, |_, row| {
                    constant * (row + 1) as f64 / 33.
                });
                let bias = case.bias.clone().expect("a layer norm has one");
                for device in devices() {
                    let y = forward(&case, &case.xs(device)?)?;
                    for (index, y) in values(&y)?.into_iter().enumerate() {
                        let bias = round(bias[index % cols], dtypes.xs);
                        assert_eq!(y, bias, "{case} of {constant}: y[{index}] is not the bias");
                    }
                }
            }
        }
    }
    Ok(())
}
