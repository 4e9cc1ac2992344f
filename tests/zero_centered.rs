//! Promise: a zero-centred weight multiplies by 1 + weight, a sum that is not rounded to the weight's dtype, and starts at 0.
//!
//! `Kind::ALL` holds it at every shape and dtype; here is what is particular to it.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_fused_layer_norm::{
    LayerNorm, LayerNormConfig, NormConfig, RmsNorm, layer_norm, ops, rms_norm_zero_centered,
};
use candle_nn::{VarBuilder, VarMap};
use common::case::{Case, Dtypes, Kind, Tracked, loss};
use common::compare::assert_same_bits;
use common::data::values;
use common::devices::devices;

const ZERO_CENTERED: [Kind; 2] = [Kind::ZeroCentered, Kind::ZeroCenteredRmsNorm];

/// 1 + 2^-10 is no bf16: a sum that is rounded loses the weight, and its gradient would be right all the same.
#[test]
fn the_sum_is_not_rounded_to_the_weights_dtype() -> Result<()> {
    for kind in ZERO_CENTERED {
        // Serial, and on all threads.
        for shape in [[2, 64], [64, 1024]] {
            let mut case = Case::random(kind, Dtypes::BF16, &shape, 1);
            let small = 2f64.powi(-10);
            case.weight = Some(vec![small; shape[1]]);
            let none = Case {
                weight: Some(vec![0.; shape[1]]),
                ..case.clone()
            };
            for device in devices() {
                let (y, without) = (case.forward(device)?, none.forward(device)?);
                let moved = values(&y)?
                    .into_iter()
                    .zip(values(&without)?)
                    .any(|(y, without)| y != without);
                assert!(moved, "{case}: y is that of a weight of 0");
                case.check(device, Tracked::ALL, &case.gradients(device)?);
            }
        }
    }
    Ok(())
}

/// 1 + weight of -1 is 0: y is the bias, dx is 0, dweight is not.
#[test]
fn a_weight_of_minus_one_lets_nothing_through() -> Result<()> {
    for device in devices() {
        let mut case = Case::random(Kind::ZeroCentered, Dtypes::F32, &[5, 33], 1);
        case.weight = Some(vec![-1.; 33]);
        let outputs = case.gradients(device)?;
        let bias = case.bias(device)?.expect("this kind has one");
        assert_same_bits(&case, "y", &outputs.y, &bias.broadcast_as((5, 33))?);
        assert_eq!(values(&outputs.dx.expect("tracked"))?, [0.; 5 * 33]);
        let dweight = values(&outputs.dweight.expect("tracked"))?;
        assert!(dweight.iter().all(|&dweight| dweight != 0.), "{dweight:?}");
    }
    Ok(())
}

#[test]
fn without_a_weight_there_is_nothing_to_center() -> Result<()> {
    for device in devices() {
        let case = Case::random(Kind::NoAffine, Dtypes::F32, &[5, 33], 1);
        let config = NormConfig {
            zero_centered_weight: true,
            ..case.kind.config(case.eps)
        };
        let y = ops::normalize(&case.xs(device)?, 33, None, None, &config)?;
        assert_same_bits(&case, "y", &y, &case.forward(device)?);
    }
    Ok(())
}

#[test]
fn a_bias_beside_no_weight() -> Result<()> {
    for device in devices() {
        let case = Case::random(Kind::LayerNorm, Dtypes::F32, &[5, 33], 1);
        let alone = Case {
            weight: None,
            ..case.clone()
        };
        let outputs = alone.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
            ops::normalize(xs, 33, weight, bias, &case.kind.config(case.eps))
        })?;
        let tracked = Tracked {
            weight: false,
            ..Tracked::ALL
        };
        alone.check(device, tracked, &outputs);
    }
    Ok(())
}

#[test]
fn a_new_weight_starts_at_0_and_the_layer_as_one_without() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let config = NormConfig {
            zero_centered_weight: true,
            ..Default::default()
        };
        let norm = layer_norm((3, 4), config, vb.pp("norm"))?;
        assert!(norm.zero_centered_weight() && norm.remove_mean());
        assert_eq!(norm.config(), config);
        let rms_norm = rms_norm_zero_centered(12, 1e-6, vb.pp("rms_norm"))?;
        assert!(rms_norm.zero_centered_weight());
        assert_eq!(rms_norm.eps(), 1e-6);
        for weight in [norm.weight(), rms_norm.weight()] {
            assert_eq!(values(weight)?, [0.; 12]);
        }
        assert_eq!(varmap.all_vars().len(), 3);

        let xs = Tensor::randn(0f32, 1., (2, 3, 4), device)?;
        let plain = ops::layer_norm_no_affine(&xs, (3, 4), 1e-5)?;
        assert_same_bits(&"layer_norm", "y", &norm.forward(&xs)?, &plain);
        let xs = xs.reshape((2, 12))?;
        let plain = RmsNorm::new(Tensor::ones(12, DType::F32, device)?, 1e-6).forward(&xs)?;
        assert_same_bits(&"rms_norm", "y", &rms_norm.forward(&xs)?, &plain);
    }
    Ok(())
}

/// What weight decay does to it: towards the norm without a weight, not towards nothing.
#[test]
fn a_step_moves_the_weight_by_its_gradient() -> Result<()> {
    let case = Case::random(Kind::ZeroCenteredRmsNorm, Dtypes::F64, &[7, 24], 1);
    for device in devices() {
        let weight = Var::from_tensor(&case.weight(device)?.expect("this kind has one"))?;
        let objective = |weight: &Tensor| -> Result<Tensor> {
            let layer = RmsNorm::new_zero_centered(weight.clone(), f64::from(case.eps));
            Ok(loss(
                &layer.forward_diff(&case.xs(device)?)?,
                &case.dy(device)?,
            )?)
        };
        let before = objective(&weight)?;
        let grads = before.backward()?;
        let gradient = grads.get(&weight).expect("tracked");
        // The loss is linear in the weight.
        let after = objective(&(weight.as_tensor() - gradient)?)?;
        let fall = (before - after)?.to_scalar::<f64>()?;
        let want = gradient.sqr()?.sum_all()?.to_scalar::<f64>()?;
        assert!(
            (fall - want).abs() < 1e-9 * want,
            "{fall} instead of {want}"
        );
    }
    Ok(())
}

#[test]
fn configs_convert() {
    let theirs = LayerNormConfig {
        eps: 1e-3,
        remove_mean: false,
        affine: false,
    };
    assert_eq!(NormConfig::from(theirs), NormConfig::rms_norm(1e-3));
    assert_eq!(
        NormConfig::from(LayerNormConfig::default()),
        NormConfig::default()
    );
    assert_eq!(
        NormConfig::from(1e-3),
        NormConfig::from(LayerNormConfig::from(1e-3))
    );
    let NormConfig {
        eps,
        remove_mean,
        bias,
        zero_centered_weight,
    } = NormConfig::default();
    assert!(eps == 1e-5 && remove_mean && bias && !zero_centered_weight);
}

/// The tensors decide whether there is a bias, whatever the config says.
#[test]
fn a_layer_of_tensors_has_the_bias_it_was_given() -> Result<()> {
    let device = &Device::Cpu;
    let ones = Tensor::ones(4, DType::F32, device)?;
    let without = NormConfig {
        bias: false,
        ..Default::default()
    };
    let layer = LayerNorm::from_config(ones.clone(), Some(ones.clone()), without);
    assert!(layer.bias().is_some() && layer.config().bias);
    let layer = LayerNorm::from_config(ones, None, LayerNormConfig::default());
    assert!(layer.bias().is_none() && !layer.config().bias);
    Ok(())
}
