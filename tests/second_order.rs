//! Promise: under CANDLE_GRAD_DO_NOT_DETACH, gradients of gradients are right.
//!
//! candle reads the variable once a thread, so these tests are a binary of their own.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_fused_layer_norm::ops::{self, Dropout};
use common::case::{Case, Dtypes, Field, Kind, loss};
use common::data::{normals, rng, tensor, values};
use common::devices::devices;
use common::oracle::Oracle;
use std::sync::Once;

/// Has candle keep the graph of the backward pass. First statement of every test here.
fn do_not_detach() {
    static SET: Once = Once::new();
    // SAFETY: the tests of this binary call this before anything else and wait here for one another, so no other
    // thread reads the environment meanwhile but through std, which locks it.
    SET.call_once(|| unsafe { std::env::set_var("CANDLE_GRAD_DO_NOT_DETACH", "1") });
}

/// What the gradients are multiplied with and summed, to have a scalar of them.
struct Probe {
    dx: Vec<f64>,
    dweight: Vec<f64>,
}

impl Probe {
    fn new(case: &Case) -> Self {
        let mut rng = rng(3);
        Self {
            dx: normals(&mut rng, case.x.len()),
            dweight: normals(&mut rng, case.cols()),
        }
    }

    /// sum(dx * probe) + sum(dweight * probe), by the oracle.
    fn of_oracle(&self, case: &Case) -> f64 {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let oracle: Oracle = case.oracle();
        let dweight = if case.kind.has_weight() {
            dot(&oracle.dweight().want, &self.dweight)
        } else {
            0.
        };
        dot(&oracle.dx().want, &self.dx) + dweight
    }
}

#[test]
fn gradients_of_gradients_equal_finite_differences() -> Result<()> {
    do_not_detach();
    for kind in Kind::ALL {
        for (shape, normalized_dims) in [(&[3, 7][..], 1), (&[2, 3, 4], 2)] {
            let case = Case::random(kind, Dtypes::F64, shape, normalized_dims);
            let probe = Probe::new(&case);
            for device in devices() {
                let var = |param: Option<Tensor>| param.map(|p| Var::from_tensor(&p)).transpose();
                let xs = Var::from_tensor(&case.xs(device)?)?;
                let dy = Var::from_tensor(&case.dy(device)?)?;
                let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
                let y = case.apply(&xs, weight.as_deref(), bias.as_deref())?;
                let grads = loss(&y, &dy)?.backward()?;

                let gradient = |var: &Var| grads.get(var).expect("a first gradient").clone();
                let like = |values: &[f64], like: &Tensor| {
                    tensor(values, like.shape(), like.dtype(), device)
                };
                let mut second = loss(&gradient(&xs), &like(&probe.dx, &xs)?)?;
                if let Some(weight) = &weight {
                    let of_weight = loss(&gradient(weight), &like(&probe.dweight, weight)?)?;
                    second = (second + of_weight)?;
                }
                let grads = second.backward()?;

                let checks: [(&str, Field, Option<&Var>); 3] = [
                    ("xs", |case| Some(&mut case.x), Some(&xs)),
                    ("dy", |case| Some(&mut case.dy), Some(&dy)),
                    ("weight", |case| case.weight.as_mut(), weight.as_ref()),
                ];
                for (name, field, var) in checks {
                    let Some(var) = var else { continue };
                    let got = grads
                        .get(var)
                        .unwrap_or_else(|| panic!("{case}: none for {name}"));
                    let want = case.finite_differences(field, |case| Ok(probe.of_oracle(case)))?;
                    for (index, (got, want)) in values(got)?.into_iter().zip(want).enumerate() {
                        assert!(
                            (got - want).abs() <= 1e-6 * (1. + want.abs()),
                            "{case}: second gradient of {name}[{index}]: expected {want}, got {got}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// The first gradients are those of the fused op here as well.
#[test]
fn first_gradients_equal_f64() -> Result<()> {
    do_not_detach();
    for kind in Kind::ALL {
        for dtypes in Dtypes::ALL {
            let case = Case::random(kind, dtypes, &[7, 33], 1);
            for device in devices() {
                case.check(device, common::case::Tracked::ALL, &case.gradients(device)?);
            }
        }
    }
    Ok(())
}

/// A gradient penalty, what second order is used for: the norm of dx, differentiated into the weight.
#[test]
fn gradient_penalty_trains_the_weight() -> Result<()> {
    do_not_detach();
    let case = Case::random(Kind::LayerNorm, Dtypes::F32, &[4, 16], 1);
    for device in devices() {
        let xs = Var::from_tensor(&case.xs(device)?)?;
        let weight = Var::from_tensor(&case.weight(device)?.expect("a layer norm has one"))?;
        let penalty = |weight: &Tensor| -> Result<Tensor> {
            let y = case.apply(&xs, Some(weight), case.bias(device)?.as_ref())?;
            let grads = loss(&y, &case.dy(device)?)?.backward()?;
            let dx = grads.get(&xs).expect("a first gradient");
            Ok(dx.sqr()?.sum_all()?)
        };
        let before = penalty(&weight)?;
        let gradient = before.backward()?;
        let gradient = gradient.get(&weight).expect("a gradient of the penalty");
        let after = penalty(&(weight.as_tensor() - (gradient * 1e-3)?)?)?;
        let (before, after) = (before.to_scalar::<f32>()?, after.to_scalar::<f32>()?);
        assert!(
            after < before,
            "a step down the gradient: {before} to {after}"
        );
    }
    Ok(())
}

#[test]
fn first_gradients_of_empty_tensors_are_there() -> Result<()> {
    do_not_detach();
    for shape in [[0, 4], [3, 0]] {
        let case = Case::random(Kind::LayerNorm, Dtypes::F32, &shape, 1);
        let got = case.gradients(&Device::Cpu)?;
        case.check(&Device::Cpu, common::case::Tracked::ALL, &got);
    }
    Ok(())
}

/// Those kept by the fused op's factor, in all its digits, and the others 0, whatever they were.
#[test]
fn dropped_elements_are_those_of_the_fused_op() -> Result<()> {
    do_not_detach();
    let dropout = Dropout {
        probability: 0.1,
        seed: 5,
    };
    for dtype in [DType::F64, DType::F32] {
        for device in devices() {
            let zeros = Tensor::zeros((4, 64), dtype, device)?;
            let (weight, bias) = (zeros.i(0)?, zeros.i(0)?);
            for value in [1., f64::INFINITY, f64::NAN] {
                let xs = Var::from_tensor(&(&zeros + value)?)?;
                let sum = |xs: &Tensor| -> Result<Vec<f64>> {
                    let (_, sum) =
                        ops::dropout_add_layer_norm(xs, &zeros, &weight, &bias, 1e-5, dropout)?;
                    Ok(values(&sum)?)
                };
                // Where nothing is tracked there is no graph to keep.
                let (composed, fused) = (sum(&xs)?, sum(&xs.detach())?);
                assert!(fused.contains(&0.), "nothing was dropped");
                for (composed, fused) in composed.into_iter().zip(fused) {
                    assert_eq!(composed.to_bits(), fused.to_bits(), "{composed}, {fused}");
                }
            }
        }
    }
    Ok(())
}
