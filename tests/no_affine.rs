//! Promise: the layer without weight and bias is the norm alone, has a gradient, and leaves no trace in a checkpoint.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_fused_layer_norm::{
    LayerNormNoAffine, NormConfig, grad_audit, layer_norm_no_affine, ops,
};
use candle_nn::{VarBuilder, VarMap, linear, seq};
use common::case::{Case, Dtypes, Kind, Tracked, loss};
use common::compare::assert_same_bits;
use common::devices::devices;

#[test]
fn equals_f64_with_its_gradient() -> Result<()> {
    for dtypes in Dtypes::ALL {
        for normalized_dims in [1, 2] {
            let case = Case::random(Kind::NoAffine, dtypes, &[5, 6, 20], normalized_dims);
            let layer = layer_norm_no_affine(case.normalized_shape(), f64::from(case.eps));
            assert_eq!(layer.normalized_shape().dims(), case.normalized_shape());
            assert_eq!(layer.config(), case.kind.config(case.eps));
            for device in devices() {
                let outputs =
                    case.gradients_of(device, Tracked::ALL, |xs, _, _| layer.forward(xs))?;
                case.check(device, Tracked::ALL, &outputs);
                assert_same_bits(&case, "y", &outputs.y, &case.forward(device)?);
            }
        }
    }
    Ok(())
}

#[test]
fn takes_a_config_for_rms_norm() -> Result<()> {
    let layer = LayerNormNoAffine::new(24, NormConfig::rms_norm(1e-6));
    let case = Case::random(Kind::RmsNorm, Dtypes::F32, &[5, 24], 1);
    for device in devices() {
        let xs = case.xs(device)?;
        let ones = Tensor::ones(24, DType::F32, device)?;
        let want = ops::rms_norm(&xs, &ones, 1e-6)?;
        assert_same_bits(&case, "y", &layer.forward(&xs)?, &want);
    }
    Ok(())
}

#[test]
fn has_no_variables_and_cuts_none_off() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let model = seq()
            .add(linear(8, 16, vb.pp("up"))?)
            .add(layer_norm_no_affine(16, 1e-5).clone())
            .add(linear(16, 4, vb.pp("down"))?);
        assert_eq!(varmap.all_vars().len(), 4);
        let xs = Tensor::randn(0f32, 1., (3, 8), device)?;
        let dy = Tensor::randn(0f32, 1., (3, 4), device)?;
        let audit = grad_audit(&varmap, &loss(&model.forward(&xs)?, &dy)?.backward()?)?;
        assert!(audit.is_ok(), "{audit}");
    }
    Ok(())
}

#[test]
fn another_shape_is_an_error() -> Result<()> {
    let xs = Tensor::ones((2, 3, 4), DType::F32, &Device::Cpu)?;
    let error = layer_norm_no_affine(5, 1e-5).forward(&xs);
    let error = error.expect_err("5 columns of a tensor of 4").to_string();
    assert_eq!(
        error.lines().next(),
        Some(
            "layer-norm: xs: expected the last dims to be the normalized shape [5], got [2, 3, 4]"
        )
    );
    Ok(())
}
