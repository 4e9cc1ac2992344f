//! Promise: bad input is an error that names the op, the argument, what was expected and what was given.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_fused_layer_norm::{
    LayerNorm, LayerNormConfig, NormConfig, RmsNorm, composed, layer_norm, layer_norm_no_bias, ops,
    rms_norm,
};
use candle_nn::VarBuilder;
use common::devices::{cuda_devices, devices};
use std::collections::HashMap;

/// The arguments of a call. Each entry point takes those that it has.
#[derive(Clone)]
struct Arguments {
    xs: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

/// A public way into the op.
struct Entry {
    name: &'static str,
    /// The op that its errors name.
    op: &'static str,
    takes_weight: bool,
    takes_bias: bool,
    call: fn(&Arguments) -> candle_core::Result<Tensor>,
}

const ENTRIES: &[Entry] = &[
    Entry {
        name: "ops::layer_norm",
        op: "layer-norm",
        takes_weight: true,
        takes_bias: true,
        call: |a| ops::layer_norm(&a.xs, &a.weight, &a.bias, a.eps as f32),
    },
    Entry {
        name: "ops::layer_norm_no_bias",
        op: "layer-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| ops::layer_norm_no_bias(&a.xs, &a.weight, a.eps as f32),
    },
    Entry {
        name: "ops::layer_norm_no_affine",
        op: "layer-norm",
        takes_weight: false,
        takes_bias: false,
        call: |a| ops::layer_norm_no_affine(&a.xs, a.weight.shape(), a.eps as f32),
    },
    Entry {
        name: "ops::rms_norm",
        op: "rms-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| ops::rms_norm(&a.xs, &a.weight, a.eps as f32),
    },
    Entry {
        name: "ops::normalize with a zero-centred weight",
        op: "layer-norm",
        takes_weight: true,
        takes_bias: true,
        call: |a| {
            let config = NormConfig {
                zero_centered_weight: true,
                ..a.eps.into()
            };
            let (weight, bias) = (Some(&a.weight), Some(&a.bias));
            ops::normalize(&a.xs, a.weight.dims(), weight, bias, &config)
        },
    },
    Entry {
        name: "ops::normalize without a weight",
        op: "rms-norm",
        takes_weight: false,
        takes_bias: false,
        call: |a| {
            let config = NormConfig::rms_norm(a.eps);
            ops::normalize(&a.xs, a.weight.dims(), None, None, &config)
        },
    },
    Entry {
        name: "LayerNorm::new",
        op: "layer-norm",
        takes_weight: true,
        takes_bias: true,
        call: |a| LayerNorm::new(a.weight.clone(), a.bias.clone(), a.eps).forward(&a.xs),
    },
    Entry {
        name: "LayerNorm::new_no_bias",
        op: "layer-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| LayerNorm::new_no_bias(a.weight.clone(), a.eps).forward(&a.xs),
    },
    Entry {
        name: "LayerNorm::rms_norm",
        op: "rms-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| LayerNorm::rms_norm(a.weight.clone(), a.eps).forward(&a.xs),
    },
    Entry {
        name: "RmsNorm::forward",
        op: "rms-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| RmsNorm::new(a.weight.clone(), a.eps).forward(&a.xs),
    },
    Entry {
        name: "RmsNorm::forward_diff",
        op: "rms-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| RmsNorm::new(a.weight.clone(), a.eps).forward_diff(&a.xs),
    },
    Entry {
        name: "RmsNorm::new_zero_centered",
        op: "rms-norm",
        takes_weight: true,
        takes_bias: false,
        call: |a| RmsNorm::new_zero_centered(a.weight.clone(), a.eps).forward(&a.xs),
    },
    Entry {
        name: "composed::normalize",
        op: "layer-norm",
        takes_weight: true,
        takes_bias: true,
        call: |a| {
            let (weight, bias) = (Some(&a.weight), Some(&a.bias));
            composed::normalize(&a.xs, a.weight.dims(), weight, bias, &a.eps.into())
        },
    },
    Entry {
        name: "composed::normalize without weight and mean",
        op: "rms-norm",
        takes_weight: false,
        takes_bias: false,
        call: |a| {
            let config = NormConfig::rms_norm(a.eps);
            composed::normalize(&a.xs, a.weight.dims(), None, None, &config)
        },
    },
];

/// Which argument is wrong: entry points that do not take it accept the call.
#[derive(Clone, Copy, PartialEq)]
enum Wrong {
    Call,
    Weight,
    Bias,
}
use Wrong::{Bias, Call, Weight};

fn good(device: &Device) -> Result<Arguments> {
    Ok(Arguments {
        xs: Tensor::ones((2, 3, 4), DType::F32, device)?,
        weight: Tensor::ones(4, DType::F32, device)?,
        bias: Tensor::ones(4, DType::F32, device)?,
        eps: 1e-5,
    })
}

/// The first line of an error: a backtrace, where one is on, follows it.
fn first_line(error: &candle_core::Error) -> String {
    let error = error.to_string();
    error.lines().next().unwrap_or_default().to_string()
}

/// What entry points say to a call of these arguments that they should not: of those concerned, anything but `{op}: text`.
fn misjudged(wrong: Wrong, arguments: &Arguments, text: &str) -> Vec<String> {
    let mut misjudged = Vec::new();
    for entry in ENTRIES {
        let concerned = match wrong {
            Call => true,
            Weight => entry.takes_weight,
            Bias => entry.takes_bias,
        };
        let got = match (entry.call)(arguments) {
            Ok(_) => "accepted".to_string(),
            Err(error) => first_line(&error),
        };
        let want = if concerned {
            format!("{}: {text}", entry.op)
        } else {
            "accepted".to_string()
        };
        if got != want {
            misjudged.push(format!("{}: expected `{want}`, got `{got}`", entry.name));
        }
    }
    misjudged
}

#[track_caller]
fn check(wrong: Wrong, arguments: &Arguments, text: &str) {
    let misjudged = misjudged(wrong, arguments, text);
    assert!(misjudged.is_empty(), "{}", misjudged.join("\n"));
}

/// A change to a good call, and what is said of it.
struct Bad {
    wrong: Wrong,
    change: Change,
    text: &'static str,
}

enum Change {
    Eps(f64),
    Xs(&'static [usize], DType),
    /// weight and bias.
    Params(&'static [usize], DType),
    Bias(&'static [usize], DType),
    /// dtypes of xs, weight and bias.
    Dtypes(DType, DType, DType),
    /// xs, weight and bias of one element that is broadcast to these shapes: sizes that no memory holds.
    Broadcast {
        xs: &'static [usize],
        params: &'static [usize],
    },
}

impl Change {
    fn apply(&self, good: Arguments, device: &Device) -> Result<Arguments> {
        let tensor = |shape, dtype| Tensor::zeros::<&[usize]>(shape, dtype, device);
        let one = |shape| tensor(&[], DType::F32)?.broadcast_as::<&[usize]>(shape);
        Ok(match *self {
            Self::Eps(eps) => Arguments { eps, ..good },
            Self::Xs(shape, dtype) => Arguments {
                xs: tensor(shape, dtype)?,
                ..good
            },
            Self::Params(shape, dtype) => Arguments {
                weight: tensor(shape, dtype)?,
                bias: tensor(shape, dtype)?,
                ..good
            },
            Self::Bias(shape, dtype) => Arguments {
                bias: tensor(shape, dtype)?,
                ..good
            },
            Self::Dtypes(xs, weight, bias) => Arguments {
                xs: tensor(&[2, 3, 4], xs)?,
                weight: tensor(&[4], weight)?,
                bias: tensor(&[4], bias)?,
                ..good
            },
            Self::Broadcast { xs, params } => Arguments {
                xs: one(xs)?,
                weight: one(params)?,
                bias: one(params)?,
                ..good
            },
        })
    }
}

macro_rules! bad {
    ($($wrong:ident, $change:expr, $text:literal;)*) => {
        &[$(Bad { wrong: $wrong, change: $change, text: $text }),*]
    };
}

#[rustfmt::skip]
const TABLE: &[Bad] = {
    use Change::{Broadcast, Dtypes, Eps, Params, Xs};
    use DType::{BF16, F16, F32, F64, I16, I32, I64, U8, U32};
    bad! {
        // rank 0
        Call, Xs(&[], F32), "xs: expected rank 1 or more, got a scalar";
        Call, Params(&[], F32), "normalized_shape: expected at least one dim, got none (a scalar weight?)";
        // dtypes
        Call, Xs(&[2, 3, 4], U8), "xs: expected dtype f32, f16, bf16 or f64, got u8";
        Call, Xs(&[2, 3, 4], U32), "xs: expected dtype f32, f16, bf16 or f64, got u32";
        Call, Xs(&[2, 3, 4], I16), "xs: expected dtype f32, f16, bf16 or f64, got i16";
        Call, Xs(&[2, 3, 4], I32), "xs: expected dtype f32, f16, bf16 or f64, got i32";
        Call, Xs(&[2, 3, 4], I64), "xs: expected dtype f32, f16, bf16 or f64, got i64";
        Call, Xs(&[2, 3, 4], DType::F8E4M3), "xs: expected dtype f32, f16, bf16 or f64, got f8e4m3";
        Weight, Dtypes(F32, F64, F64), "weight: expected dtype f32 (as xs), got f64";
        Weight, Dtypes(F32, F16, F16), "weight: expected dtype f32 (as xs), got f16";
        Weight, Dtypes(F32, BF16, BF16), "weight: expected dtype f32 (as xs), got bf16";
        Weight, Dtypes(F64, F32, F32), "weight: expected dtype f64 (as xs), got f32";
        Weight, Dtypes(F16, BF16, BF16), "weight: expected dtype f16 (as xs) or f32, got bf16";
        Weight, Dtypes(F16, F64, F64), "weight: expected dtype f16 (as xs) or f32, got f64";
        Weight, Dtypes(BF16, F16, F16), "weight: expected dtype bf16 (as xs) or f32, got f16";
        Weight, Dtypes(BF16, F64, F64), "weight: expected dtype bf16 (as xs) or f32, got f64";
        Weight, Dtypes(F32, U32, U32), "weight: expected dtype f32 (as xs), got u32";
        Bias, Dtypes(F32, F32, F64), "bias: expected dtype f32 (as xs), got f64";
        Bias, Dtypes(F32, F32, U32), "bias: expected dtype f32 (as xs), got u32";
        Bias, Dtypes(F64, F64, F32), "bias: expected dtype f64 (as xs), got f32";
        Bias, Dtypes(F16, F16, F32), "bias: expected dtype f16 (as weight), got f32";
        Bias, Dtypes(BF16, F32, BF16), "bias: expected dtype f32 (as weight), got bf16";
        Bias, Dtypes(F16, F32, BF16), "bias: expected dtype f16 (as xs) or f32, got bf16";
        // shapes
        Call, Params(&[5], F32), "xs: expected the last dims to be the normalized shape [5], got [2, 3, 4]";
        Call, Params(&[3], F32), "xs: expected the last dims to be the normalized shape [3], got [2, 3, 4]";
        Call, Params(&[1], F32), "xs: expected the last dims to be the normalized shape [1], got [2, 3, 4]";
        Call, Params(&[2, 4], F32), "xs: expected the last dims to be the normalized shape [2, 4], got [2, 3, 4]";
        Call, Params(&[1, 2, 3, 4], F32), "xs: expected the last dims to be the normalized shape [1, 2, 3, 4], got [2, 3, 4]";
        Call, Params(&[0], F32), "xs: expected the last dims to be the normalized shape [0], got [2, 3, 4]";
        Call, Xs(&[4, 3], F32), "xs: expected the last dims to be the normalized shape [4], got [4, 3]";
        Call, Xs(&[2, 0], F32), "xs: expected the last dims to be the normalized shape [4], got [2, 0]";
        Bias, Change::Bias(&[3], F32), "bias: expected shape [4], got [3]";
        Bias, Change::Bias(&[1], F32), "bias: expected shape [4], got [1]";
        Bias, Change::Bias(&[3, 4], F32), "bias: expected shape [4], got [3, 4]";
        Bias, Change::Bias(&[], F32), "bias: expected shape [4], got []";
        Bias, Change::Bias(&[0], F32), "bias: expected shape [4], got [0]";
        // eps
        Call, Eps(-1.), "eps: expected a finite number >= 0, got -1";
        Call, Eps(f64::NAN), "eps: expected a finite number >= 0, got NaN";
        Call, Eps(f64::INFINITY), "eps: expected a finite number >= 0, got inf";
        Call, Eps(f64::NEG_INFINITY), "eps: expected a finite number >= 0, got -inf";
        // sizes that overflow: the bytes, the elements, the elements of an empty tensor's rows, and the statistics of its rows
        Call, Broadcast { xs: &[1 << 59, 4], params: &[4] },
            "xs: expected dims of at most 576460752303423487 elements, those of 0 not counted, got [576460752303423488, 4]";
        Call, Broadcast { xs: &[1 << 40, 1 << 40], params: &[1 << 40] },
            "xs: expected dims of at most 576460752303423487 elements, those of 0 not counted, got [1099511627776, 1099511627776]";
        Call, Broadcast { xs: &[0, 1 << 40, 1 << 40], params: &[1 << 40, 1 << 40] },
            "xs: expected dims of at most 576460752303423487 elements, those of 0 not counted, got [0, 1099511627776, 1099511627776]";
        Call, Broadcast { xs: &[1 << 60, 0], params: &[0] },
            "xs: expected dims of at most 576460752303423487 elements, those of 0 not counted, got [1152921504606846976, 0]";
    }
};

#[test]
fn every_bad_call_gets_its_sentence_from_every_entry_point() -> Result<()> {
    for device in devices() {
        let mut failed = Vec::new();
        for Bad {
            wrong,
            change,
            text,
        } in TABLE
        {
            let arguments = change.apply(good(device)?, device)?;
            failed.extend(misjudged(*wrong, &arguments, text));
        }
        let location = device.location();
        assert!(failed.is_empty(), "on {location:?}:\n{}", failed.join("\n"));
    }
    Ok(())
}

/// Tracked arguments take another way, through the graph: it is not entered.
#[test]
fn tracked_arguments_give_the_same_errors() -> Result<()> {
    let tracked = |tensor: &Tensor| Var::from_tensor(tensor).map(Var::into_inner);
    for device in devices() {
        for bad in TABLE {
            // A broadcast that no memory holds cannot be copied into a variable.
            if matches!(bad.change, Change::Broadcast { .. }) {
                continue;
            }
            let arguments = bad.change.apply(good(device)?, device)?;
            let arguments = Arguments {
                xs: tracked(&arguments.xs)?,
                weight: tracked(&arguments.weight)?,
                bias: tracked(&arguments.bias)?,
                ..arguments
            };
            check(bad.wrong, &arguments, bad.text);
        }
    }
    Ok(())
}

#[test]
fn good_input_is_accepted_by_every_entry_point() -> Result<()> {
    for device in devices() {
        // eps of 0 is the smallest that is.
        for eps in [1e-5, 0., f64::from(f32::MAX)] {
            for entry in ENTRIES {
                let arguments = Arguments {
                    eps,
                    ..good(device)?
                };
                let ys = (entry.call)(&arguments)?;
                assert_eq!(ys.dims(), arguments.xs.dims(), "{}", entry.name);
            }
        }
    }
    Ok(())
}

#[test]
fn weight_that_is_not_of_the_normalized_shape() -> Result<()> {
    for device in devices() {
        let Arguments {
            xs, weight, eps, ..
        } = good(device)?;
        let error = composed::normalize(&xs, (3, 4), Some(&weight), None, &eps.into())
            .expect_err("a weight of another shape than the normalized one");
        assert_eq!(
            first_line(&error),
            "layer-norm: weight: expected shape [3, 4], got [4]"
        );
    }
    Ok(())
}

/// What a VarBuilder says is candle's; it names the tensor, and it is said when the layer is made, not when it is used.
#[test]
fn checkpoints_with_a_tensor_that_is_missing_or_wrong() -> Result<()> {
    type Make = fn(VarBuilder) -> candle_core::Result<()>;
    const LAYER_NORM: Make = |vb| layer_norm(4, 1e-5, vb).map(drop);
    const NO_BIAS: Make = |vb| layer_norm_no_bias(4, 1e-5, vb).map(drop);
    const RMS_NORM: Make = |vb| rms_norm(4, 1e-5, vb).map(drop);
    const SEVERAL_DIMS: Make = |vb| layer_norm((3, 4), LayerNormConfig::default(), vb).map(drop);
    type Shapes<'a> = &'a [(&'a str, &'a [usize])];
    let cases: [(Shapes, Make, &str); 9] = [
        (
            &[("norm.weight", &[5]), ("norm.bias", &[4])],
            LAYER_NORM,
            "shape mismatch for norm.weight, expected: [4], got: [5]",
        ),
        (
            &[("norm.weight", &[4]), ("norm.bias", &[5])],
            LAYER_NORM,
            "shape mismatch for norm.bias, expected: [4], got: [5]",
        ),
        (
            &[("norm.gamma", &[4, 1]), ("norm.beta", &[4])],
            LAYER_NORM,
            "shape mismatch for norm.gamma, expected: [4], got: [4, 1]",
        ),
        (
            &[("norm.gamma", &[4]), ("norm.beta", &[])],
            LAYER_NORM,
            "shape mismatch for norm.beta, expected: [4], got: []",
        ),
        (
            &[("norm.weight", &[4])],
            LAYER_NORM,
            "cannot find tensor norm.bias",
        ),
        (
            &[("norm.bias", &[4])],
            LAYER_NORM,
            "cannot find tensor norm.weight",
        ),
        (
            &[("norm.weight", &[3])],
            NO_BIAS,
            "shape mismatch for norm.weight, expected: [4], got: [3]",
        ),
        (
            &[("norm.weight", &[0])],
            RMS_NORM,
            "shape mismatch for norm.weight, expected: [4], got: [0]",
        ),
        (
            &[("norm.weight", &[4]), ("norm.bias", &[4])],
            SEVERAL_DIMS,
            "shape mismatch for norm.weight, expected: [3, 4], got: [4]",
        ),
    ];
    for device in devices() {
        for (tensors, make, text) in &cases {
            let tensors = tensors
                .iter()
                .map(|&(name, shape)| {
                    Ok((name.to_string(), Tensor::zeros(shape, DType::F32, device)?))
                })
                .collect::<Result<HashMap<_, _>>>()?;
            let vb = VarBuilder::from_tensors(tensors, DType::F32, device);
            let error = make(vb.pp("norm")).expect_err(text);
            assert_eq!(first_line(&error), *text);
        }
    }
    Ok(())
}

#[test]
fn tensors_on_several_devices() -> Result<()> {
    for device in cuda_devices() {
        let (on_cpu, on_cuda) = (good(&Device::Cpu)?, good(device)?);
        let location = device.location();
        let arguments = Arguments {
            weight: on_cpu.weight.clone(),
            ..on_cuda.clone()
        };
        let text = format!("weight: expected device {location:?} (as xs), got Cpu");
        check(Wrong::Weight, &arguments, &text);

        let arguments = Arguments {
            bias: on_cpu.bias.clone(),
            ..on_cuda.clone()
        };
        let text = format!("bias: expected device {location:?} (as xs), got Cpu");
        check(Wrong::Bias, &arguments, &text);

        let arguments = Arguments {
            weight: on_cuda.weight,
            ..on_cpu
        };
        let text = format!("weight: expected device Cpu (as xs), got {location:?}");
        check(Wrong::Weight, &arguments, &text);
    }
    Ok(())
}
