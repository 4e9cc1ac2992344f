//! Promise: a result of another dtype than xs is computed in f32, or f64, and rounded once; gradients have the dtypes of their
//! arguments.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_fused_layer_norm::{LayerNorm, RmsNorm, layer_norm_no_affine, ops};
use common::case::{Case, Dtypes, Kind, loss};
use common::compare::{assert_close, assert_same_bits};
use common::data::{rounded, tensor, values};
use common::devices::devices;

const OUTPUTS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn normalize(
    case: &Case,
    dtype: DType,
    xs: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    let config = case.kind.config(case.eps);
    ops::normalize_to_dtype(xs, case.normalized_shape(), weight, bias, &config, dtype)
}

/// The tolerances are those of the result's dtype: a rounding to half on the way to f32, or to half twice, is over them.
#[test]
fn every_pair_of_dtypes_equals_f64() -> Result<()> {
    for kind in Kind::ALL {
        for dtypes in Dtypes::ALL {
            for dtype in OUTPUTS {
                let mut case = Case::random(kind, dtypes, &[7, 96], 1);
                case.dy = rounded(case.dy, dtype);
                let oracle = case.oracle();
                for device in devices() {
                    let name = format!("{case} to {dtype:?}");
                    let var =
                        |param: Option<Tensor>| param.map(|p| Var::from_tensor(&p)).transpose();
                    let xs = Var::from_tensor(&case.xs(device)?)?;
                    let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
                    let y = normalize(&case, dtype, &xs, weight.as_deref(), bias.as_deref())?;
                    assert_eq!((y.dims(), y.dtype()), (&[7, 96][..], dtype), "{name}");
                    let dy = tensor(&case.dy, (7, 96), dtype, device)?;
                    let grads = loss(&y, &dy)?.backward()?;

                    assert_close(&name, "y", &y, &oracle.y());
                    let check = |output: &str, var: &Var, want| {
                        let gradient = grads.get(var).expect("all is tracked");
                        assert_eq!(gradient.dtype(), var.dtype(), "{name}: {output}");
                        assert_close(&name, output, gradient, &want);
                    };
                    check("dx", &xs, oracle.dx());
                    if let Some(weight) = &weight {
                        check("dweight", weight, oracle.dweight());
                    }
                    if let Some(bias) = &bias {
                        check("dbias", bias, oracle.dbias());
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_dtype_of_xs_changes_nothing() -> Result<()> {
    for kind in Kind::ALL {
        for dtypes in Dtypes::ALL {
            let case = Case::random(kind, dtypes, &[7, 96], 1);
            for device in devices() {
                let (xs, weight, bias) =
                    (case.xs(device)?, case.weight(device)?, case.bias(device)?);
                let y = normalize(&case, dtypes.xs, &xs, weight.as_ref(), bias.as_ref())?;
                assert_same_bits(&case, "y", &y, &case.forward(device)?);
            }
        }
    }
    Ok(())
}

/// f32 of bf16 has digits that a result of bf16, widened, has not.
#[test]
fn a_wider_result_is_not_a_rounded_one() -> Result<()> {
    let case = Case::random(Kind::LayerNorm, Dtypes::BF16, &[7, 96], 1);
    for device in devices() {
        let (xs, weight, bias) = (case.xs(device)?, case.weight(device)?, case.bias(device)?);
        let y = normalize(&case, DType::F32, &xs, weight.as_ref(), bias.as_ref())?;
        let rounded = case.forward(device)?;
        assert_ne!(values(&y)?, values(&rounded)?);
        assert_same_bits(&case, "y", &y.to_dtype(DType::BF16)?, &rounded);
    }
    Ok(())
}

#[test]
fn layers_give_the_dtype_they_are_set_to() -> Result<()> {
    for device in devices() {
        let case = Case::random(Kind::LayerNorm, Dtypes::BF16_F32, &[5, 24], 1);
        let xs = case.xs(device)?;
        let (weight, bias) = (case.weight(device)?, case.bias(device)?);
        let (weight, bias) = (weight.expect("it has one"), bias.expect("it has one"));
        let eps = f64::from(case.eps);
        let layer = LayerNorm::new(weight.clone(), bias.clone(), eps);
        assert_eq!(layer.output_dtype(), None);
        let layer = layer.with_output_dtype(DType::F32);
        assert_eq!(layer.output_dtype(), Some(DType::F32));
        let want = normalize(&case, DType::F32, &xs, Some(&weight), Some(&bias))?;
        assert_same_bits(&case, "y", &layer.forward(&xs)?, &want);

        let f32 = |case: &Case, y: candle_core::Result<Tensor>| -> Result<()> {
            let y = y?;
            assert_eq!(y.dtype(), DType::F32, "{case}");
            assert_close(case, "y", &y, &case.oracle().y());
            Ok(())
        };
        let rms_norm = Case {
            kind: Kind::RmsNorm,
            bias: None,
            ..case.clone()
        };
        let layer = RmsNorm::new(weight, eps).with_output_dtype(DType::F32);
        f32(&rms_norm, layer.forward(&xs))?;
        f32(&rms_norm, layer.forward_diff(&xs))?;
        let no_affine = Case {
            kind: Kind::NoAffine,
            weight: None,
            bias: None,
            ..case
        };
        let layer = layer_norm_no_affine(24, eps).with_output_dtype(DType::F32);
        f32(&no_affine, layer.forward(&xs))?;
    }
    Ok(())
}

#[test]
fn integers_are_an_error() -> Result<()> {
    let ones = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    for (layer, op) in [
        (
            LayerNorm::new(ones.clone(), ones.clone(), 1e-5),
            "layer-norm",
        ),
        (LayerNorm::rms_norm(ones.clone(), 1e-5), "rms-norm"),
    ] {
        let error = layer.with_output_dtype(DType::U32).forward(&ones);
        let error = error.expect_err("a norm of u32").to_string();
        let want = format!("{op}: output dtype: expected f32, f16, bf16 or f64, got u32");
        assert_eq!(error.lines().next(), Some(want.as_str()));
    }
    Ok(())
}
