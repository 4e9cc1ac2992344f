//! Promise: layers convert to candle-nn's and back with the variables they had; what candle-nn's cannot do is an error.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, TensorId};
use candle_fused_layer_norm::{
    LayerNorm, LayerNormConfig, NormConfig, RmsNorm, layer_norm, rms_norm,
};
use candle_nn::{VarBuilder, VarMap};
use common::data::values;
use common::devices::devices;

fn id(tensor: Option<&Tensor>) -> Option<TensorId> {
    tensor.map(Tensor::id)
}

/// A config of each kind that both have.
const BOTH: [LayerNormConfig; 3] = [
    LayerNormConfig {
        eps: 1e-3,
        remove_mean: true,
        affine: true,
    },
    LayerNormConfig {
        eps: 1e-4,
        remove_mean: true,
        affine: false,
    },
    LayerNormConfig {
        eps: 1e-6,
        remove_mean: false,
        affine: false,
    },
];

#[test]
fn layers_go_there_and_back_with_their_variables() -> Result<()> {
    for device in devices() {
        for config in BOTH {
            let varmap = VarMap::new();
            let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
            let ours = layer_norm(16, config, vb)?;
            let theirs = candle_nn::LayerNorm::try_from(ours.clone())?;
            let back = LayerNorm::from(theirs.clone());
            assert_eq!(theirs.weight().id(), ours.weight().id(), "{config:?}");
            assert_eq!(id(theirs.bias()), id(ours.bias()), "{config:?}");
            assert_eq!(theirs.eps(), config.eps);
            assert_eq!(theirs.remove_mean(), config.remove_mean);
            assert_eq!(back.weight().id(), ours.weight().id(), "{config:?}");
            assert_eq!(id(back.bias()), id(ours.bias()), "{config:?}");
            assert_eq!(back.config(), ours.config());

            let xs = Tensor::randn(0f32, 1., (3, 16), device)?;
            let (theirs, ours) = (values(&theirs.forward(&xs)?)?, values(&ours.forward(&xs)?)?);
            for (ours, theirs) in ours.into_iter().zip(theirs) {
                assert!((ours - theirs).abs() < 1e-5, "{config:?}: {ours}, {theirs}");
            }
        }
    }
    Ok(())
}

#[test]
fn rms_norms_go_there_and_back_with_their_variable() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let ours = rms_norm(
            16,
            1e-6,
            VarBuilder::from_varmap(&varmap, DType::F32, device),
        )?;
        let theirs = candle_nn::RmsNorm::try_from(ours.clone())?;
        assert_eq!(theirs.weight().id(), varmap.all_vars()[0].id());
        assert_eq!(theirs.eps(), 1e-6);
        let back = RmsNorm::from(theirs);
        assert_eq!(back.weight().id(), ours.weight().id());
        assert_eq!(back.into_inner().config(), ours.into_inner().config());
    }
    Ok(())
}

#[test]
fn configs_go_there_and_back() -> Result<()> {
    for config in BOTH {
        assert_eq!(LayerNormConfig::try_from(NormConfig::from(config))?, config);
    }
    Ok(())
}

#[track_caller]
fn refused<T>(result: candle_core::Result<T>, text: &str) {
    let Err(error) = result else {
        panic!("accepted, expected: {text}")
    };
    let error = error.to_string();
    assert_eq!(error.lines().next(), Some(text));
}

#[test]
fn what_candle_nn_cannot_do_is_an_error() -> Result<()> {
    let device = &Device::Cpu;
    let ones = Tensor::ones(4, DType::F32, device)?;
    let zero_centered = NormConfig {
        zero_centered_weight: true,
        ..Default::default()
    };
    let theirs = |layer: LayerNorm| candle_nn::LayerNorm::try_from(layer);
    refused(
        theirs(LayerNorm::from_config(ones.clone(), None, zero_centered)),
        "layer-norm: weight: expected one that multiplies as it is for candle_nn::LayerNorm, got a zero-centred one",
    );
    refused(
        candle_nn::RmsNorm::try_from(RmsNorm::new_zero_centered(ones.clone(), 1e-6)),
        "rms-norm: weight: expected one that multiplies as it is for candle_nn::LayerNorm, got a zero-centred one",
    );
    let rms_norm = NormConfig::rms_norm(1e-6);
    refused(
        theirs(LayerNorm::from_config(
            ones.clone(),
            Some(ones.clone()),
            rms_norm,
        )),
        "rms-norm: bias: expected none for candle_nn::LayerNorm where the mean stays, got one",
    );
    let wide = Tensor::ones((2, 2), DType::F32, device)?;
    refused(
        theirs(LayerNorm::new(wide.clone(), wide, 1e-5)),
        "layer-norm: weight: expected one dim for candle_nn::LayerNorm, got [2, 2]",
    );
    let layer = LayerNorm::new(ones.clone(), ones, 1e-5);
    refused(
        theirs(layer.with_output_dtype(DType::F32)),
        "layer-norm: output dtype: expected that of xs for candle_nn::LayerNorm, got f32",
    );
    refused(
        LayerNormConfig::try_from(zero_centered),
        "layer-norm: zero_centered_weight: expected false for candle_nn::LayerNormConfig, got true",
    );
    Ok(())
}
