//! Promise: the result equals f64 at every shape, dtype, affine and layout.

mod common;

use anyhow::Result;
use candle_core::{IndexOp, Module, Tensor};
use candle_fused_layer_norm::{LayerNorm, RmsNorm};
use common::case::{Case, Dtypes, Kind};
use common::compare::{assert_close, assert_same_bits};
use common::devices::{cuda_devices, devices};
use common::grid::{GIANT_DTYPES, GIANT_NORMALIZED_DIMS, GIANT_SHAPE, grid};

fn grid_equals_f64(dtypes: Dtypes) -> Result<()> {
    for shape in grid(dtypes) {
        for kind in Kind::ALL {
            let case = Case::random(kind, dtypes, &[shape.rows, shape.cols], 1);
            let want = case.oracle().y();
            for device in devices() {
                let name = format!("{case} on {:?} ({})", device.location(), shape.why);
                let check = |y: Tensor| {
                    assert_eq!(y.dims(), case.shape, "{name}");
                    assert_eq!(y.dtype(), dtypes.xs, "{name}");
                    assert_close(&name, "y", &y, &want);
                };
                check(case.forward(device)?);
                case.forward_as_of_larger(device)?.map(check);
            }
        }
    }
    Ok(())
}

grid_tests!(grid_equals_f64);

#[test]
fn giant_rows_equal_f64_on_cuda() -> Result<()> {
    for device in cuda_devices() {
        for dtype in GIANT_DTYPES {
            let case = Case::random(Kind::LayerNorm, dtype, &GIANT_SHAPE, GIANT_NORMALIZED_DIMS);
            assert_close(&case, "y", &case.forward(device)?, &case.oracle().y());
        }
    }
    Ok(())
}

#[test]
fn rank_1_to_4() -> Result<()> {
    for shape in [&[24][..], &[5, 24], &[3, 5, 24], &[2, 3, 5, 24]] {
        for kind in Kind::ALL {
            let case = Case::random(kind, Dtypes::F32, shape, 1);
            for device in devices() {
                assert_close(&case, "y", &case.forward(device)?, &case.oracle().y());
            }
        }
    }
    Ok(())
}

#[test]
fn normalized_shape_of_several_dims() -> Result<()> {
    for normalized_dims in 1..=4 {
        for kind in Kind::ALL {
            for dtypes in Dtypes::ALL {
                let case = Case::random(kind, dtypes, &[4, 6, 10, 3], normalized_dims);
                for device in devices() {
                    assert_close(&case, "y", &case.forward(device)?, &case.oracle().y());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn layers_give_the_bits_of_the_functions() -> Result<()> {
    for kind in Kind::ALL {
        let case = Case::random(kind, Dtypes::F32, &[6, 100], 1);
        for device in devices() {
            let xs = case.xs(device)?;
            let eps = f64::from(case.eps);
            let layer = match (kind, case.weight(device)?, case.bias(device)?) {
                (Kind::LayerNorm, Some(weight), Some(bias)) => LayerNorm::new(weight, bias, eps),
                (Kind::NoBias, Some(weight), _) => LayerNorm::new_no_bias(weight, eps),
                (Kind::RmsNorm, Some(weight), _) => {
                    let layer = RmsNorm::new(weight.clone(), eps);
                    let y = case.forward(device)?;
                    assert_same_bits(&case, "RmsNorm::forward", &layer.forward(&xs)?, &y);
                    assert_same_bits(&case, "forward_diff", &layer.forward_diff(&xs)?, &y);
                    LayerNorm::rms_norm(weight, eps)
                }
                (Kind::ZeroCentered, Some(weight), bias) => {
                    LayerNorm::from_config(weight, bias, kind.config(case.eps))
                }
                (Kind::ZeroCenteredRmsNorm, Some(weight), _) => {
                    RmsNorm::new_zero_centered(weight, eps).into_inner()
                }
                // No layer is without a weight.
                _ => continue,
            };
            assert_same_bits(&case, "y", &layer.forward(&xs)?, &case.forward(device)?);
        }
    }
    Ok(())
}

/// Views of xs that are not one dense block from the start of their storage.
#[test]
fn views_of_xs() -> Result<()> {
    let (rows, cols) = (7, 96);
    for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::F64] {
        for kind in Kind::ALL {
            let case = Case::random(kind, dtypes, &[rows, cols], 1);
            let want = case.oracle().y();
            for device in devices() {
                let (weight, bias) = (case.weight(device)?, case.bias(device)?);
                let xs = case.xs(device)?;
                let check = |view: &str, xs: &Tensor| -> Result<()> {
                    let y = case.apply(xs, weight.as_ref(), bias.as_ref())?;
                    assert_close(&format!("{case}, {view}"), "y", &y, &want);
                    Ok(())
                };
                let transposed = xs.t()?.contiguous()?.t()?;
                assert!(!transposed.is_contiguous());
                check("transposed", &transposed)?;

                for offset in [1, 2, 3, 4, 8] {
                    let junk = Tensor::full(1e4f32, offset, device)?.to_dtype(dtypes.xs)?;
                    let flat = Tensor::cat(&[&junk, &xs.flatten_all()?, &junk], 0)?;
                    let dense = flat.narrow(0, offset, rows * cols)?.reshape((rows, cols))?;
                    assert_eq!(dense.layout().start_offset(), offset);
                    check(&format!("dense from offset {offset}"), &dense)?;

                    let junk = Tensor::full(1e4f32, (rows, offset), device)?.to_dtype(dtypes.xs)?;
                    let wide = Tensor::cat(&[&junk, &xs, &junk], 1)?;
                    check(
                        &format!("columns from {offset}"),
                        &wide.narrow(1, offset, cols)?,
                    )?;
                }
                let tall = Tensor::cat(&[&xs, &xs, &xs], 0)?;
                check("rows from the middle", &tall.narrow(0, rows, rows)?)?;
                check(
                    "indexed out of a batch",
                    &tall.reshape((3, rows, cols))?.i(1)?,
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn broadcast_xs() -> Result<()> {
    for kind in Kind::ALL {
        let row = Case::random(kind, Dtypes::F32, &[1, 96], 1);
        let column = Case::with_rows(kind, Dtypes::F32, &[7, 96], 1, |_, row| row as f64);
        for device in devices() {
            let (weight, bias) = (row.weight(device)?, row.bias(device)?);
            let xs = row.xs(device)?.broadcast_as((7, 96))?;
            let y = row.apply(&xs, weight.as_ref(), bias.as_ref())?;
            let want = row.oracle().y();
            for index in 0..7 {
                assert_close(&row, "y of rows broadcast", &y.i(index)?, &want);
            }

            let (weight, bias) = (column.weight(device)?, column.bias(device)?);
            let xs = column.xs(device)?.narrow(1, 0, 1)?.broadcast_as((7, 96))?;
            let y = column.apply(&xs, weight.as_ref(), bias.as_ref())?;
            assert_close(&column, "y of columns broadcast", &y, &column.oracle().y());
        }
    }
    Ok(())
}

#[test]
fn views_of_weight_and_bias() -> Result<()> {
    for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::BF16_F32] {
        let case = Case::random(Kind::LayerNorm, dtypes, &[5, 6, 20], 2);
        let want = case.oracle().y();
        for device in devices() {
            let (xs, cols) = (case.xs(device)?, case.cols());
            let offset_view = |param: Option<Tensor>| -> Result<Tensor> {
                let param = param.expect("a layer norm has weight and bias");
                let junk = Tensor::full(1e4f32, 3, device)?.to_dtype(dtypes.params)?;
                let flat = Tensor::cat(&[&junk, &param.flatten_all()?], 0)?;
                Ok(flat.narrow(0, 3, cols)?.reshape(param.dims())?)
            };
            let weight = offset_view(case.weight(device)?)?;
            let bias = offset_view(case.bias(device)?)?.t()?.contiguous()?.t()?;
            assert_eq!(weight.layout().start_offset(), 3);
            assert!(!bias.is_contiguous());
            let y = case.apply(&xs, Some(&weight), Some(&bias))?;
            assert_close(&case, "y", &y, &want);
        }
    }
    Ok(())
}
