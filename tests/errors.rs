//! Promise: bad input is an error that names the op, the argument, what was expected and what was given.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_fused_layer_norm::{LayerNorm, NormConfig, RmsNorm, composed, ops};
use common::devices::{cuda_devices, devices};

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

fn good(device: &Device) -> Result<Arguments> {
    Ok(Arguments {
        xs: Tensor::ones((2, 3, 4), DType::F32, device)?,
        weight: Tensor::ones(4, DType::F32, device)?,
        bias: Tensor::ones(4, DType::F32, device)?,
        eps: 1e-5,
    })
}

/// Holds every entry point's error against `{op}: text`, or its success where it does not take the argument.
#[track_caller]
fn check(wrong: Wrong, arguments: &Arguments, text: &str) {
    for entry in ENTRIES {
        let concerned = match wrong {
            Wrong::Call => true,
            Wrong::Weight => entry.takes_weight,
            Wrong::Bias => entry.takes_bias,
        };
        match (entry.call)(arguments) {
            Ok(_) => assert!(!concerned, "{}: accepted, expected: {text}", entry.name),
            Err(error) => {
                // A backtrace, where one is on, follows the first line.
                let error = error.to_string();
                let first = error.lines().next().unwrap_or_default();
                assert!(
                    concerned,
                    "{}: takes no such argument, but says: {first}",
                    entry.name
                );
                assert_eq!(first, format!("{}: {text}", entry.op), "{}", entry.name);
            }
        }
    }
}

/// Holds every entry point to a result of the shape of xs.
#[track_caller]
fn check_accepted(arguments: &Arguments) -> Result<()> {
    for entry in ENTRIES {
        let ys = (entry.call)(arguments)?;
        assert_eq!(ys.dims(), arguments.xs.dims(), "{}", entry.name);
    }
    Ok(())
}

#[test]
fn good_input_is_accepted_by_every_entry_point() -> Result<()> {
    for device in devices() {
        check_accepted(&good(device)?)?;
    }
    Ok(())
}

#[test]
fn scalar_xs() -> Result<()> {
    for device in devices() {
        let xs = Tensor::new(1f32, device)?;
        let arguments = Arguments {
            xs,
            ..good(device)?
        };
        check(
            Wrong::Call,
            &arguments,
            "xs: expected rank 1 or more, got a scalar",
        );
    }
    Ok(())
}

#[test]
fn integer_xs() -> Result<()> {
    let dtypes = [
        (DType::U8, "u8"),
        (DType::U32, "u32"),
        (DType::I16, "i16"),
        (DType::I32, "i32"),
        (DType::I64, "i64"),
    ];
    for (dtype, name) in dtypes {
        let xs = Tensor::zeros((2, 3, 4), dtype, &Device::Cpu)?;
        let arguments = Arguments {
            xs,
            ..good(&Device::Cpu)?
        };
        let text = format!("xs: expected dtype f32, f16, bf16 or f64, got {name}");
        check(Wrong::Call, &arguments, &text);
    }
    Ok(())
}

#[test]
fn eps() -> Result<()> {
    let bad = [
        (-1., "-1"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
        (f64::NEG_INFINITY, "-inf"),
    ];
    for device in devices() {
        for (eps, given) in bad {
            let arguments = Arguments {
                eps,
                ..good(device)?
            };
            let text = format!("eps: expected a finite number >= 0, got {given}");
            check(Wrong::Call, &arguments, &text);
        }
    }
    Ok(())
}

#[test]
fn eps_of_zero_is_accepted() -> Result<()> {
    let arguments = Arguments {
        eps: 0.,
        ..good(&Device::Cpu)?
    };
    check_accepted(&arguments)
}

#[test]
fn weight_that_is_no_trailing_part_of_xs() -> Result<()> {
    for device in devices() {
        for (shape, given) in [
            (&[5][..], "[5]"),
            (&[3], "[3]"),
            (&[1], "[1]"),
            (&[2, 4], "[2, 4]"),
            (&[1, 2, 3, 4], "[1, 2, 3, 4]"),
            (&[0], "[0]"),
        ] {
            // Not `ones`: candle cannot launch a fill of no elements on CUDA.
            let weight = Tensor::zeros(shape, DType::F32, device)?;
            let arguments = Arguments {
                weight: weight.clone(),
                bias: weight,
                ..good(device)?
            };
            let text = format!(
                "xs: expected the last dims to be the normalized shape {given}, got [2, 3, 4]"
            );
            check(Wrong::Call, &arguments, &text);
        }
    }
    Ok(())
}

#[test]
fn scalar_weight() -> Result<()> {
    let weight = Tensor::new(1f32, &Device::Cpu)?;
    let arguments = Arguments {
        weight,
        ..good(&Device::Cpu)?
    };
    let text = "normalized_shape: expected at least one dim, got none (a scalar weight?)";
    check(Wrong::Call, &arguments, text);
    Ok(())
}

#[test]
fn weight_that_is_not_of_the_normalized_shape() -> Result<()> {
    let Arguments {
        xs, weight, eps, ..
    } = good(&Device::Cpu)?;
    let error = composed::normalize(&xs, (3, 4), Some(&weight), None, &eps.into())
        .expect_err("a weight of another shape than the normalized one")
        .to_string();
    let first = error.lines().next();
    assert_eq!(
        first,
        Some("layer-norm: weight: expected shape [3, 4], got [4]")
    );
    Ok(())
}

#[test]
fn bias_of_another_shape() -> Result<()> {
    for device in devices() {
        for (shape, given) in [
            (&[3][..], "[3]"),
            (&[1], "[1]"),
            (&[3, 4], "[3, 4]"),
            (&[], "[]"),
        ] {
            let bias = Tensor::ones(shape, DType::F32, device)?;
            let arguments = Arguments {
                bias,
                ..good(device)?
            };
            let text = format!("bias: expected shape [4], got {given}");
            check(Wrong::Bias, &arguments, &text);
        }
    }
    Ok(())
}

#[test]
fn dtypes_that_do_not_mix() -> Result<()> {
    use DType::{BF16, F16, F32, F64, U32};
    let device = &Device::Cpu;
    // dtypes of xs, weight and bias, and what is wrong.
    let mixes = [
        (
            F32,
            F64,
            F64,
            Wrong::Weight,
            "weight: expected dtype f32 (as xs), got f64",
        ),
        (
            F32,
            F16,
            F16,
            Wrong::Weight,
            "weight: expected dtype f32 (as xs), got f16",
        ),
        (
            F64,
            F32,
            F32,
            Wrong::Weight,
            "weight: expected dtype f64 (as xs), got f32",
        ),
        (
            F16,
            BF16,
            BF16,
            Wrong::Weight,
            "weight: expected dtype f16 (as xs) or f32, got bf16",
        ),
        (
            BF16,
            F16,
            F16,
            Wrong::Weight,
            "weight: expected dtype bf16 (as xs) or f32, got f16",
        ),
        (
            BF16,
            F64,
            F64,
            Wrong::Weight,
            "weight: expected dtype bf16 (as xs) or f32, got f64",
        ),
        (
            F32,
            U32,
            U32,
            Wrong::Weight,
            "weight: expected dtype f32 (as xs), got u32",
        ),
        (
            F32,
            F32,
            F64,
            Wrong::Bias,
            "bias: expected dtype f32 (as xs), got f64",
        ),
        (
            F32,
            F32,
            U32,
            Wrong::Bias,
            "bias: expected dtype f32 (as xs), got u32",
        ),
        (
            F16,
            F16,
            F32,
            Wrong::Bias,
            "bias: expected dtype f16 (as weight), got f32",
        ),
        (
            BF16,
            F32,
            BF16,
            Wrong::Bias,
            "bias: expected dtype f32 (as weight), got bf16",
        ),
        (
            F16,
            F32,
            BF16,
            Wrong::Bias,
            "bias: expected dtype f16 (as xs) or f32, got bf16",
        ),
    ];
    for (xs, weight, bias, wrong, text) in mixes {
        let arguments = Arguments {
            xs: Tensor::ones((2, 3, 4), xs, device)?,
            weight: Tensor::ones(4, weight, device)?,
            bias: Tensor::ones(4, bias, device)?,
            eps: 1e-5,
        };
        check(wrong, &arguments, text);
    }
    Ok(())
}

#[test]
fn tracked_arguments_give_the_same_errors() -> Result<()> {
    let tracked = |tensor: &Tensor| Var::from_tensor(tensor).map(Var::into_inner);
    let Arguments {
        xs, weight, eps, ..
    } = good(&Device::Cpu)?;
    let arguments = Arguments {
        xs: tracked(&xs)?,
        weight: tracked(&weight)?,
        bias: tracked(&Tensor::ones(7, DType::F32, &Device::Cpu)?)?,
        eps,
    };
    check(Wrong::Bias, &arguments, "bias: expected shape [4], got [7]");
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
