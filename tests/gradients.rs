//! Promise: dx, dweight and dbias for every tracked argument, equal to f64; never cut, frozen ones not computed.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use common::case::{Case, Dtypes, Field, Kind, Tracked, loss};
use common::compare::{Values, assert_close, assert_same_bits};
use common::data::{normals, rng, rounded, tensor, values};
use common::devices::{cuda_devices, devices};
use common::grid::{GIANT_DTYPES, GIANT_NORMALIZED_DIMS, GIANT_SHAPE, grid};

/// candle's own ops of the backward pass launch nothing on CUDA for no elements, and fail at it.
fn candle_can_differentiate(case: &Case, device: &Device) -> bool {
    !(device.is_cuda() && case.x.is_empty())
}

fn check(case: &Case) -> Result<()> {
    for device in devices() {
        if candle_can_differentiate(case, device) {
            case.check(device, Tracked::ALL, &case.gradients(device)?);
            if let Some(outputs) = case.gradients_as_of_larger(device)? {
                case.check(device, Tracked::ALL, &outputs);
            }
        }
    }
    Ok(())
}

fn grid_equals_f64(dtypes: Dtypes) -> Result<()> {
    for shape in grid(dtypes) {
        for kind in Kind::ALL {
            check(&Case::random(kind, dtypes, &[shape.rows, shape.cols], 1))?;
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
            case.check(device, Tracked::ALL, &case.gradients(device)?);
        }
    }
    Ok(())
}

#[test]
fn rank_1_to_4() -> Result<()> {
    for shape in [&[24][..], &[5, 24], &[3, 5, 24], &[2, 3, 5, 24]] {
        for kind in Kind::ALL {
            check(&Case::random(kind, Dtypes::F32, shape, 1))?;
        }
    }
    Ok(())
}

#[test]
fn normalized_shape_of_several_dims() -> Result<()> {
    for normalized_dims in 1..=4 {
        for kind in Kind::ALL {
            for dtypes in Dtypes::ALL {
                check(&Case::random(kind, dtypes, &[4, 6, 10, 3], normalized_dims))?;
            }
        }
    }
    Ok(())
}

/// sum(y * dy) of the call, as the crate computes it, with nothing tracked.
fn untracked_loss(case: &Case, device: &Device) -> Result<f64> {
    Ok(loss(&case.forward(device)?, &case.dy(device)?)?.to_scalar()?)
}

/// The op against itself, and with it the oracle.
#[test]
fn gradients_equal_finite_differences_in_f64() -> Result<()> {
    // Steps of 1e-5: the differences are off by about 1e-10, their third derivatives and rounding in equal parts.
    const TOLERANCE: f64 = 1e-7;
    for kind in Kind::ALL {
        for (shape, normalized_dims) in [(&[3, 7][..], 1), (&[2, 3, 4], 2), (&[4, 1], 1)] {
            let case = Case::random(kind, Dtypes::F64, shape, normalized_dims);
            let oracle = case.oracle();
            for device in devices() {
                let outputs = case.gradients(device)?;
                let gradients: [(&str, Field, _, _); 3] = [
                    ("dx", |case| Some(&mut case.x), outputs.dx, oracle.dx()),
                    (
                        "dweight",
                        |case| case.weight.as_mut(),
                        outputs.dweight,
                        oracle.dweight(),
                    ),
                    (
                        "dbias",
                        |case| case.bias.as_mut(),
                        outputs.dbias,
                        oracle.dbias(),
                    ),
                ];
                for (name, field, gradient, oracle) in gradients {
                    let Some(gradient) = gradient else { continue };
                    let gradient = values(&gradient)?;
                    let differences =
                        case.finite_differences(field, |case| untracked_loss(case, device))?;
                    assert_eq!(gradient.len(), differences.len(), "{case}: {name}");
                    for (index, want) in differences.into_iter().enumerate() {
                        for got in [gradient[index], oracle.want[index]] {
                            assert!(
                                (got - want).abs() <= TOLERANCE * (1. + want.abs()),
                                "{case}: {name}[{index}]: expected {want} by differences, got {got}"
                            );
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn tracked_arguments_get_their_gradient_and_frozen_ones_get_none() -> Result<()> {
    // A shape for each way the CPU divides its work.
    for shape in [[5, 24], [64, 1024], [3, 70001]] {
        for kind in Kind::ALL {
            let case = Case::random(kind, Dtypes::F32, &shape, 1);
            for mask in 1..8 {
                let tracked = Tracked {
                    xs: mask & 1 != 0,
                    weight: mask & 2 != 0,
                    bias: mask & 4 != 0,
                };
                for device in devices() {
                    let outputs = case.gradients_of(device, tracked, |xs, weight, bias| {
                        case.apply(xs, weight, bias)
                    })?;
                    case.check(device, tracked, &outputs);
                }
            }
        }
    }
    Ok(())
}

/// A tracked argument that is no variable: candle fails where its gradient is missing, and a cut would show in the
/// variable's.
#[test]
fn gradients_reach_variables_behind_every_argument() -> Result<()> {
    let case = Case::random(Kind::LayerNorm, Dtypes::F32, &[5, 24], 1);
    for device in devices() {
        let halved = |tensor: &Tensor| tensor.affine(0.5, 0.);
        let outputs = case.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
            let double = |tensor: Option<&Tensor>| tensor.map(|t| halved(t)? * 2.).transpose();
            let (weight, bias) = (double(weight)?, double(bias)?);
            case.apply(&(halved(xs)? * 2.)?, weight.as_ref(), bias.as_ref())
        })?;
        case.check(device, Tracked::ALL, &outputs);
    }
    Ok(())
}

/// The gradient of the variable behind a view, seen through the same view, is dx, and 0 wherever the view is not.
fn check_view_of_xs(
    case: &Case,
    base: Tensor,
    view: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<()> {
    let device = base.device().clone();
    let base = Var::from_tensor(&base)?;
    let (weight, bias) = (case.weight(&device)?, case.bias(&device)?);
    let y = case.apply(&view(&base)?, weight.as_ref(), bias.as_ref())?;
    let grads = loss(&y, &case.dy(&device)?)?.backward()?;
    let gradient = grads
        .get(&base)
        .expect("a gradient for the variable behind the view");
    let seen = view(gradient)?;
    assert_close(case, "dx through the view", &seen, &case.oracle().dx());
    let nonzero = |tensor: &Tensor| -> Result<usize> {
        Ok(values(tensor)?
            .into_iter()
            .filter(|&value| value != 0.)
            .count())
    };
    assert_eq!(
        nonzero(gradient)?,
        nonzero(&seen)?,
        "{case}: a gradient beside the view"
    );
    Ok(())
}

#[test]
fn views_of_xs() -> Result<()> {
    let (rows, cols) = (7, 96);
    for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::F64] {
        for kind in Kind::ALL {
            let case = Case::random(kind, dtypes, &[rows, cols], 1);
            for device in devices() {
                let xs = case.xs(device)?;
                check_view_of_xs(&case, xs.t()?.contiguous()?, |base| base.t())?;
                for offset in [1, 2, 3, 4, 8] {
                    let junk = Tensor::full(1e4f32, offset, device)?.to_dtype(dtypes.xs)?;
                    let flat = Tensor::cat(&[&junk, &xs.flatten_all()?, &junk], 0)?;
                    check_view_of_xs(&case, flat, |base| {
                        base.narrow(0, offset, rows * cols)?.reshape((rows, cols))
                    })?;
                    let junk = Tensor::full(1e4f32, (rows, offset), device)?.to_dtype(dtypes.xs)?;
                    let wide = Tensor::cat(&[&junk, &xs, &junk], 1)?;
                    check_view_of_xs(&case, wide, |base| base.narrow(1, offset, cols))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn broadcast_xs() -> Result<()> {
    let (rows, cols) = (6, 96);
    for kind in Kind::ALL {
        let mut case = Case::random(kind, Dtypes::F32, &[rows, cols], 1);
        case.x = case.x[..cols].repeat(rows);
        for device in devices() {
            let row = tensor(&case.x[..cols], (1, cols), case.dtypes.xs, device)?;
            let row = Var::from_tensor(&row)?;
            let (weight, bias) = (case.weight(device)?, case.bias(device)?);
            let xs = row.broadcast_as((rows, cols))?;
            let y = case.apply(&xs, weight.as_ref(), bias.as_ref())?;
            let grads = loss(&y, &case.dy(device)?)?.backward()?;
            let gradient = grads.get(&row).expect("a gradient for the broadcast row");
            let want = case.oracle().dx().summed_over_blocks(rows);
            assert_close(&case, "dx of the broadcast row", gradient, &want);
        }
    }
    Ok(())
}

#[test]
fn views_of_weight_and_bias() -> Result<()> {
    for dtypes in [Dtypes::F32, Dtypes::BF16, Dtypes::BF16_F32] {
        let case = Case::random(Kind::LayerNorm, dtypes, &[5, 6, 20], 2);
        let oracle = case.oracle();
        for device in devices() {
            let base = |param: Option<Tensor>| -> Result<Var> {
                let param = param
                    .expect("a layer norm has weight and bias")
                    .flatten_all()?;
                let junk = Tensor::full(1e4f32, 3, device)?.to_dtype(dtypes.params)?;
                Ok(Var::from_tensor(&Tensor::cat(&[&junk, &param], 0)?)?)
            };
            let view = |base: &Tensor| base.narrow(0, 3, case.cols())?.reshape((6, 20));
            let (weight, bias) = (base(case.weight(device)?)?, base(case.bias(device)?)?);
            let y = case.apply(
                &case.xs(device)?,
                Some(&view(&weight)?),
                Some(&view(&bias)?),
            )?;
            let grads = loss(&y, &case.dy(device)?)?.backward()?;
            let gradient = |base: &Var| view(grads.get(base).expect("a gradient for the base"));
            assert_close(&case, "dweight", &gradient(&weight)?, &oracle.dweight());
            assert_close(&case, "dbias", &gradient(&bias)?, &oracle.dbias());
        }
    }
    Ok(())
}

/// What follows the op decides which dy it gets: transposed, with holes, broadcast.
#[test]
fn views_of_dy() -> Result<()> {
    type After = fn(&Tensor) -> candle_core::Result<Tensor>;
    let (rows, cols) = (6, 40);
    let followers: [(&str, After); 6] = [
        ("transpose", |y| y.t()),
        ("columns 3..", |y| y.narrow(1, 3, 21)),
        ("rows 2..", |y| y.narrow(0, 2, 3)),
        ("sum over rows", |y| y.sum(0)),
        ("sum over columns", |y| y.sum_keepdim(1)),
        ("broadcast", |y| y.unsqueeze(0)?.broadcast_as((2, 6, 40))),
    ];
    for (follower, after) in followers {
        for kind in Kind::ALL {
            let mut case = Case::random(kind, Dtypes::F32, &[rows, cols], 1);
            for device in devices() {
                let shape = after(&case.xs(device)?)?.shape().clone();
                let upstream = normals(&mut rng(7), shape.elem_count());
                let upstream = tensor(&rounded(upstream, DType::F32), shape, DType::F32, device)?;

                // The dy that `follower` sends back, from candle alone.
                let y = Var::zeros((rows, cols), DType::F32, device)?;
                let grads = loss(&after(&y)?, &upstream)?.backward()?;
                case.dy = values(grads.get(&y).expect("candle differentiates its own ops"))?;

                let xs = Var::from_tensor(&case.xs(device)?)?;
                let (weight, bias) = (case.weight(device)?, case.bias(device)?);
                let y = case.apply(&xs, weight.as_ref(), bias.as_ref())?;
                let grads = loss(&after(&y)?, &upstream)?.backward()?;
                let dx = grads.get(&xs).expect("a gradient for xs");
                assert_close(
                    &case,
                    &format!("dx before {follower}"),
                    dx,
                    &case.oracle().dx(),
                );
            }
        }
    }
    Ok(())
}

/// 24 layers, each with its own weight and bias, against the oracle's layers in the same order.
#[test]
fn gradients_through_a_chain_of_layers() -> Result<()> {
    const LAYERS: usize = 24;
    // Errors of a layer pass through those before it; in f64 there is room for that.
    const AMPLIFICATION: f64 = 1e4;
    for device in devices() {
        let mut cases = Vec::new();
        let mut x = normals(&mut rng(1), 5 * 32);
        for index in 0..LAYERS {
            let mut case = Case::random(Kind::LayerNorm, Dtypes::F64, &[5, 32], 1);
            let mut rng = rng(index as u64);
            case.weight = Some(normals(&mut rng, 32));
            case.bias = Some(normals(&mut rng, 32));
            case.x = x;
            x = case.oracle().y().want;
            cases.push(case);
        }
        for index in (1..LAYERS).rev() {
            cases[index - 1].dy = cases[index].oracle().dx().want;
        }

        let xs = Var::from_tensor(&cases[0].xs(device)?)?;
        let mut y = xs.as_tensor().clone();
        let mut params = Vec::new();
        for case in &cases {
            let var = |param: Option<Tensor>| Var::from_tensor(&param.expect("a layer norm"));
            let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
            y = case.apply(&y, Some(&weight), Some(&bias))?;
            params.push((weight, bias));
        }
        let grads = loss(&y, &cases[LAYERS - 1].dy(device)?)?.backward()?;
        let check = |output: &str, var: &Var, want: Values| {
            let gradient = grads.get(var).expect("every layer gets its gradients");
            assert_close(
                &"24 layers",
                output,
                gradient,
                &want.amplified(AMPLIFICATION),
            );
        };
        check("dx of the first layer", &xs, cases[0].oracle().dx());
        for (index, ((weight, bias), case)) in params.iter().zip(&cases).enumerate() {
            check(
                &format!("dweight of layer {index}"),
                weight,
                case.oracle().dweight(),
            );
            check(
                &format!("dbias of layer {index}"),
                bias,
                case.oracle().dbias(),
            );
        }
    }
    Ok(())
}

#[test]
fn a_second_backward_over_the_same_graph_gives_the_same() -> Result<()> {
    for shape in [[5, 24], [64, 1024], [2, 70001]] {
        for kind in Kind::ALL {
            let case = Case::random(kind, Dtypes::F32, &shape, 1);
            for device in devices() {
                let xs = Var::from_tensor(&case.xs(device)?)?;
                let var = |param: Option<Tensor>| param.map(|p| Var::from_tensor(&p)).transpose();
                let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
                let y = case.apply(&xs, weight.as_deref(), bias.as_deref())?;
                let loss = loss(&y, &case.dy(device)?)?;
                let (first, second) = (loss.backward()?, loss.backward()?);
                for var in [Some(&xs), weight.as_ref(), bias.as_ref()]
                    .into_iter()
                    .flatten()
                {
                    let of = |grads: &candle_core::backprop::GradStore| grads.get(var).cloned();
                    let (first, second) = (of(&first), of(&second));
                    let (Some(first), Some(second)) = (first, second) else {
                        panic!("{case}: a gradient is missing")
                    };
                    assert_same_bits(&case, "gradient", &second, &first);
                }
            }
        }
    }
    Ok(())
}
