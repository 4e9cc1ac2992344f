//! Promise: the norm of a sum and the sum, differentiable through both, with dropout that is the same on every device.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_fused_layer_norm::ops::{self, Dropout};
use candle_fused_layer_norm::{LayerNorm, RmsNorm, layer_norm_no_affine};
use common::case::{Case, Dtypes, Kind, loss};
use common::compare::{Values, assert_close, assert_same_bits, tolerance};
use common::data::{normals, rng, round, rounded, tensor, values};
use common::devices::devices;
#[cfg(feature = "cuda")]
use common::devices::{assert_loaded, cuda_devices};
use common::grid::grid;

const KINDS: [Kind; 2] = [Kind::LayerNorm, Kind::RmsNorm];
const DROPOUT: Dropout = Dropout {
    probability: 0.25,
    seed: 0x5eed_0123_4567_89ab,
};

/// Which of a call's arguments are tracked.
#[derive(Debug, Clone, Copy)]
struct Tracked {
    xs: bool,
    residual: bool,
    weight: bool,
    bias: bool,
}

impl Tracked {
    const ALL: Self = Self {
        xs: true,
        residual: true,
        weight: true,
        bias: true,
    };
}

/// Which of the outputs the loss is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Used {
    Both,
    Ys,
    Sum,
}

/// A call: a [`Case`] of xs, weight, bias and dy, and what is added.
struct AddCase {
    case: Case,
    residual: Vec<f64>,
    dsum: Vec<f64>,
    dropout: Option<Dropout>,
}

struct Outputs {
    ys: Tensor,
    sum: Tensor,
    dxs: Option<Tensor>,
    dresidual: Option<Tensor>,
    dweight: Option<Tensor>,
    dbias: Option<Tensor>,
}

impl AddCase {
    fn random(
        kind: Kind,
        dtypes: Dtypes,
        shape: &[usize],
        normalized_dims: usize,
        dropout: Option<Dropout>,
    ) -> Self {
        let case = Case::random(kind, dtypes, shape, normalized_dims);
        let mut rng = rng(case.x.len() as u64 + 17);
        let mut values = || rounded(normals(&mut rng, case.x.len()), dtypes.xs);
        Self {
            residual: values(),
            dsum: values(),
            case,
            dropout,
        }
    }

    fn like_xs(&self, values: &[f64], device: &Device) -> Result<Tensor> {
        Ok(tensor(
            values,
            self.case.shape.as_slice(),
            self.case.dtypes.xs,
            device,
        )?)
    }

    fn apply(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let eps = self.case.eps;
        match (self.case.kind, weight, bias, self.dropout) {
            (Kind::LayerNorm, Some(weight), Some(bias), None) => {
                ops::add_layer_norm(xs, residual, weight, bias, eps)
            }
            (Kind::LayerNorm, Some(weight), Some(bias), Some(d)) => {
                ops::dropout_add_layer_norm(xs, residual, weight, bias, eps, d)
            }
            (Kind::RmsNorm, Some(weight), None, None) => {
                ops::add_rms_norm(xs, residual, weight, eps)
            }
            (Kind::RmsNorm, Some(weight), None, Some(d)) => {
                ops::dropout_add_rms_norm(xs, residual, weight, eps, d)
            }
            (kind, ..) => ops::add_normalize(
                xs,
                residual,
                self.case.normalized_shape(),
                (weight, bias),
                &kind.config(eps),
                self.dropout,
            ),
        }
    }

    fn run(&self, device: &Device, tracked: Tracked, used: Used) -> Result<Outputs> {
        let track = |tensor: Tensor, tracked: bool| -> Result<Tensor> {
            Ok(match tracked {
                true => Var::from_tensor(&tensor)?.into_inner(),
                false => tensor,
            })
        };
        let xs = track(self.case.xs(device)?, tracked.xs)?;
        let residual = track(self.like_xs(&self.residual, device)?, tracked.residual)?;
        let weight = self.case.weight(device)?;
        let weight = weight.map(|w| track(w, tracked.weight)).transpose()?;
        let bias = self.case.bias(device)?;
        let bias = bias.map(|b| track(b, tracked.bias)).transpose()?;
        let (ys, sum) = self.apply(&xs, &residual, weight.as_ref(), bias.as_ref())?;
        let of_ys = loss(&ys, &self.case.dy(device)?)?;
        let of_sum = loss(&sum, &self.like_xs(&self.dsum, device)?)?;
        let grads = match used {
            Used::Both => (of_ys + of_sum)?,
            Used::Ys => of_ys,
            Used::Sum => of_sum,
        }
        .backward()?;
        let of = |tensor: &Tensor| grads.get(tensor).cloned();
        Ok(Outputs {
            dxs: of(&xs),
            dresidual: of(&residual),
            dweight: weight.as_ref().and_then(of),
            dbias: bias.as_ref().and_then(of),
            ys,
            sum,
        })
    }

    /// By what each element of xs is multiplied, as the crate says by a sum of ones and zeros.
    fn factors(&self) -> Result<Vec<f64>> {
        let Some(dropout) = self.dropout else {
            return Ok(vec![1.; self.case.x.len()]);
        };
        let ones = Tensor::ones(self.case.shape.as_slice(), DType::F64, &Device::Cpu)?;
        let weight = Tensor::ones(self.case.normalized_shape(), DType::F64, &Device::Cpu)?;
        let (_, sum) =
            ops::dropout_add_rms_norm(&ones, &ones.zeros_like()?, &weight, 1e-5, dropout)?;
        Ok(values(&sum)?)
    }

    /// Holds outputs against the oracle.
    fn check(
        &self,
        device: &Device,
        tracked: Tracked,
        used: Used,
        outputs: &Outputs,
    ) -> Result<()> {
        let name = format!(
            "{} on {:?}, dropout {:?}, {tracked:?}, {used:?}",
            self.case,
            device.location(),
            self.dropout
        );
        let dtype = self.case.dtypes.xs;
        let factors = self.factors()?;
        // Rounded where the op rounds: products, sums, and results.
        let stats = if dtype == DType::F64 {
            dtype
        } else {
            DType::F32
        };
        let mut want = Values::new(0.);
        for ((x, residual), factor) in self.case.x.iter().zip(&self.residual).zip(&factors) {
            let x = x * factor;
            want.push(x + residual, x.abs() + residual.abs());
        }
        assert_close(&name, "sum", &outputs.sum, &want);
        // The norm is that of the sum as it was stored.
        let case = Case {
            x: values(&outputs.sum)?,
            ..self.case.clone()
        };
        let oracle = case.oracle();
        assert_close(&name, "ys", &outputs.ys, &oracle.y());

        let mut total = match used {
            Used::Sum => oracle.dx().amplified(1.),
            _ => oracle.dx(),
        };
        if used == Used::Sum {
            total.want.fill(0.);
            total.scale.fill(0.);
        }
        if used != Used::Ys {
            for (index, dsum) in self.dsum.iter().enumerate() {
                total.want[index] += dsum;
                total.scale[index] += dsum.abs();
            }
        }
        // Where the add is a pass of its own, the norm's gradient is rounded before it, and the sum's before dropout: by half an ulp of
        // itself each.
        let passes = if self.dropout.is_some() { 2. } else { 1. };
        let unit = tolerance(dtype).rounding / tolerance(dtype).unit / tolerance(stats).operations;
        for scale in &mut total.scale {
            *scale += *scale * unit * passes;
        }
        let mut of_xs = total.clone();
        for (index, factor) in factors.iter().enumerate() {
            of_xs.want[index] *= factor;
            of_xs.scale[index] *= factor;
        }
        let check = |output: &str, got: &Option<Tensor>, tracked: bool, want: &Values| {
            assert_eq!(got.is_some(), tracked, "{name}: {output}: a gradient");
            if let Some(got) = got {
                assert_close(&name, output, got, want);
            }
        };
        check("dxs", &outputs.dxs, tracked.xs, &of_xs);
        check("dresidual", &outputs.dresidual, tracked.residual, &total);
        let param = |mut values: Values| {
            if used == Used::Sum {
                values.want.fill(0.);
            }
            values
        };
        let bias = tracked.bias && self.case.kind.has_bias();
        let (dweight, dbias) = (param(oracle.dweight()), param(oracle.dbias()));
        let weight = tracked.weight && self.case.kind.has_weight();
        check("dweight", &outputs.dweight, weight, &dweight);
        check("dbias", &outputs.dbias, bias, &dbias);
        Ok(())
    }
}

fn grid_equals_f64(dtypes: Dtypes) -> Result<()> {
    for shape in grid(dtypes) {
        // Beyond, the kernels are those of the others: the norm's own, and an add.
        if shape.rows * shape.cols > 1 << 19 {
            continue;
        }
        for (kind, dropout) in [
            (Kind::LayerNorm, None),
            (Kind::RmsNorm, Some(DROPOUT)),
            (Kind::NoAffine, Some(DROPOUT)),
            (Kind::ZeroCentered, None),
        ] {
            let case = AddCase::random(kind, dtypes, &[shape.rows, shape.cols], 1, dropout);
            for device in devices() {
                // candle's own ops launch nothing on CUDA for no elements, and fail at it.
                if device.is_cuda() && case.case.x.is_empty() {
                    continue;
                }
                let outputs = case.run(device, Tracked::ALL, Used::Both)?;
                case.check(device, Tracked::ALL, Used::Both, &outputs)?;
            }
        }
    }
    Ok(())
}

grid_tests!(grid_equals_f64);

/// As tests/kernels.rs, of the kernels that add a residual.
#[cfg(feature = "cuda")]
fn every_kernel_equals_f64(dtypes: Dtypes) -> Result<()> {
    for device in cuda_devices() {
        for shape in [
            [40, 32],
            [40, 64],
            [40, 128],
            [40, 256],
            [24, 512],
            [24, 768],
            [24, 1024],
            [17, 4096],
            [9, 8192],
            [9, 16384],
            // As an add and a norm.
            [24, 769],
        ] {
            for dropout in [None, Some(DROPOUT)] {
                let case = AddCase::random(Kind::LayerNorm, dtypes, &shape, 1, dropout);
                let outputs = case.run(device, Tracked::ALL, Used::Both)?;
                case.check(device, Tracked::ALL, Used::Both, &outputs)?;
            }
        }
        assert_loaded(device, dtypes, |kernel| kernel.contains("add"))?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
mod every_kernel {
    crate::grid_tests!(super::every_kernel_equals_f64);
}

#[test]
fn each_output_alone_and_every_tracked_subset() -> Result<()> {
    for dtypes in [Dtypes::F32, Dtypes::BF16_F32] {
        for kind in KINDS {
            for dropout in [None, Some(DROPOUT)] {
                for used in [Used::Both, Used::Ys, Used::Sum] {
                    for subset in 1..16 {
                        let tracked = Tracked {
                            xs: subset & 1 > 0,
                            residual: subset & 2 > 0,
                            weight: subset & 4 > 0,
                            bias: subset & 8 > 0,
                        };
                        // candle has nothing to differentiate.
                        if subset == 8 && !kind.has_bias() {
                            continue;
                        }
                        // With a kernel that adds, and without.
                        for shape in [[6, 64], [5, 33]] {
                            let case = AddCase::random(kind, dtypes, &shape, 1, dropout);
                            for device in devices() {
                                let outputs = case.run(device, tracked, used)?;
                                case.check(device, tracked, used, &outputs)?;
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_tracked_gives_the_same() -> Result<()> {
    for dropout in [None, Some(DROPOUT)] {
        for shape in [[6, 64], [5, 33]] {
            let case = AddCase::random(Kind::LayerNorm, Dtypes::F32, &shape, 1, dropout);
            for device in devices() {
                let tracked = case.run(device, Tracked::ALL, Used::Both)?;
                let weight = case.case.weight(device)?.expect("a weight");
                let (ys, sum) = case.apply(
                    &case.case.xs(device)?,
                    &case.like_xs(&case.residual, device)?,
                    Some(&weight),
                    case.case.bias(device)?.as_ref(),
                )?;
                assert!(!ys.track_op() && !sum.track_op());
                assert_same_bits(&case.case, "ys", &ys, &tracked.ys);
                assert_same_bits(&case.case, "sum", &sum, &tracked.sum);
            }
        }
    }
    Ok(())
}

#[test]
fn normalized_shape_of_several_dims() -> Result<()> {
    let case = AddCase::random(Kind::LayerNorm, Dtypes::F32, &[3, 4, 2, 8], 2, None);
    for device in devices() {
        let outputs = case.run(device, Tracked::ALL, Used::Both)?;
        case.check(device, Tracked::ALL, Used::Both, &outputs)?;
        assert_eq!(outputs.dweight.unwrap().dims(), [2, 8]);
    }
    Ok(())
}

#[test]
fn on_the_cpu_it_is_the_norm_of_the_sum_bit_for_bit() -> Result<()> {
    for dtypes in Dtypes::ALL {
        let case = AddCase::random(Kind::LayerNorm, dtypes, &[33, 1024], 1, None);
        let outputs = case.run(&Device::Cpu, Tracked::ALL, Used::Both)?;
        let residual = case.like_xs(&case.residual, &Device::Cpu)?;
        let sum = (case.case.xs(&Device::Cpu)? + residual)?;
        assert_same_bits(&case.case, "sum", &outputs.sum, &sum);
        let ys = case.case.apply(
            &sum,
            case.case.weight(&Device::Cpu)?.as_ref(),
            case.case.bias(&Device::Cpu)?.as_ref(),
        )?;
        assert_same_bits(&case.case, "ys", &outputs.ys, &ys);
    }
    Ok(())
}

/// Views that are dense but start at an odd element, and views that are not dense.
#[test]
fn offsets_and_strides() -> Result<()> {
    for dropout in [None, Some(DROPOUT)] {
        let case = AddCase::random(Kind::LayerNorm, Dtypes::BF16, &[7, 64], 1, dropout);
        for device in devices() {
            let plain = case.run(device, Tracked::ALL, Used::Both)?;
            let (weight, bias) = (case.case.weight(device)?.unwrap(), case.case.bias(device)?);
            let xs = case.case.xs(device)?;
            let residual = case.like_xs(&case.residual, device)?;
            let odd = |t: &Tensor| -> Result<Tensor> {
                let one = Tensor::zeros(1, t.dtype(), device)?;
                let all = Tensor::cat(&[one, t.flatten_all()?], 0)?;
                Ok(all.narrow(0, 1, t.elem_count())?.reshape(t.dims())?)
            };
            let strided = |t: &Tensor| -> Result<Tensor> { Ok(t.t()?.contiguous()?.t()?) };
            for (xs, residual) in [
                (odd(&xs)?, odd(&residual)?),
                (xs.clone(), odd(&residual)?),
                (strided(&xs)?, residual.clone()),
                (xs.clone(), strided(&residual)?),
            ] {
                let (ys, sum) = case.apply(&xs, &residual, Some(&weight), bias.as_ref())?;
                assert_same_bits(&case.case, "sum", &sum, &plain.sum);
                let oracle = Case {
                    x: values(&sum)?,
                    ..case.case.clone()
                };
                assert_close(&case.case, "ys", &ys, &oracle.oracle().y());
            }
        }
    }
    Ok(())
}

#[test]
fn xs_may_be_the_residual() -> Result<()> {
    for device in devices() {
        let case = AddCase::random(Kind::LayerNorm, Dtypes::F64, &[4, 16], 1, None);
        let xs = Var::from_tensor(&case.case.xs(device)?)?;
        let (weight, bias) = (case.case.weight(device)?.unwrap(), case.case.bias(device)?);
        let (ys, sum) = case.apply(&xs, &xs, Some(&weight), bias.as_ref())?;
        let dy = case.case.dy(device)?;
        let grads = (loss(&ys, &dy)? + loss(&sum, &dy)?)?.backward()?;
        let doubled = Case {
            x: case.case.x.iter().map(|x| 2. * x).collect(),
            ..case.case.clone()
        };
        let mut want = doubled.oracle().dx();
        for (index, dy) in doubled.dy.iter().enumerate() {
            want.want[index] = 2. * (want.want[index] + dy);
            want.scale[index] = 2. * (want.scale[index] + dy.abs());
        }
        assert_close(&case.case, "dx", grads.get(&xs).unwrap(), &want);
    }
    Ok(())
}

/// A chain, as a transformer has it: each sum is the next residual, and parameters are shared.
#[test]
fn blocks_in_a_row_equal_add_and_norm() -> Result<()> {
    for device in devices() {
        let case = AddCase::random(Kind::LayerNorm, Dtypes::F64, &[6, 32], 1, None);
        let var = |t: Tensor| Var::from_tensor(&t);
        let xs = var(case.case.xs(device)?)?;
        let residual = var(case.like_xs(&case.residual, device)?)?;
        let weight = var(case.case.weight(device)?.unwrap())?;
        let bias = var(case.case.bias(device)?.unwrap())?;
        let run = |fused: bool| -> Result<Vec<Tensor>> {
            let (mut x, mut stream) = (xs.as_tensor().clone(), residual.as_tensor().clone());
            for _ in 0..4 {
                let (y, sum) = if fused {
                    case.apply(&x, &stream, Some(&weight), Some(&bias))?
                } else {
                    let sum = (&stream + &x)?;
                    (ops::layer_norm(&sum, &weight, &bias, case.case.eps)?, sum)
                };
                (x, stream) = (y.tanh()?, sum);
            }
            let grads = loss(&(x + stream)?, &case.case.dy(device)?)?.backward()?;
            let of = |var: &Var| grads.get(var).unwrap().clone();
            Ok(vec![of(&xs), of(&residual), of(&weight), of(&bias)])
        };
        for (fused, plain) in run(true)?.iter().zip(run(false)?) {
            let (fused, plain) = (values(fused)?, values(&plain)?);
            for (fused, plain) in fused.iter().zip(&plain) {
                assert!(
                    (fused - plain).abs() <= 1e-11 * (1. + plain.abs()),
                    "{fused} {plain}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn one_graph_may_be_walked_again_and_by_several_threads() -> Result<()> {
    for device in devices() {
        let case = AddCase::random(Kind::LayerNorm, Dtypes::F32, &[64, 128], 1, Some(DROPOUT));
        let var = |t: Tensor| Var::from_tensor(&t);
        let xs = var(case.case.xs(device)?)?;
        let residual = var(case.like_xs(&case.residual, device)?)?;
        let weight = var(case.case.weight(device)?.unwrap())?;
        let bias = var(case.case.bias(device)?.unwrap())?;
        let (ys, sum) = case.apply(&xs, &residual, Some(&weight), Some(&bias))?;
        let dy = case.case.dy(device)?;
        let losses = [
            loss(&ys, &dy)?,
            loss(&sum, &dy)?,
            (loss(&ys, &dy)? + loss(&sum, &dy)?)?,
        ];
        let walk = |loss: &Tensor| -> Result<Vec<Tensor>> {
            let grads = loss.backward()?;
            let of = |var: &Var| grads.get(var).unwrap().clone();
            Ok(vec![of(&xs), of(&residual), of(&weight), of(&bias)])
        };
        let once: Vec<_> = losses.iter().map(walk).collect::<Result<_>>()?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..6)
                .map(|thread| {
                    let (losses, once, walk, case) = (&losses, &once, &walk, &case);
                    scope.spawn(move || {
                        for turn in 0..20 {
                            let which = (thread + turn) % 3;
                            let again = walk(&losses[which]).unwrap();
                            for (again, once) in again.iter().zip(&once[which]) {
                                assert_same_bits(&case.case, "gradient", again, once);
                            }
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
    Ok(())
}

/// The graph of a call holds its sum, and the call its graph.
#[cfg(target_os = "linux")]
#[test]
fn dropped_graphs_are_freed() -> Result<()> {
    let resident = || -> Result<usize> {
        let status = std::fs::read_to_string("/proc/self/statm")?;
        let pages: usize = status.split_whitespace().nth(1).unwrap_or("0").parse()?;
        Ok(pages * 4096)
    };
    let var = |shape: &[usize]| Var::ones(shape, DType::F32, &Device::Cpu);
    let (xs, weight, bias) = (var(&[256, 1024])?, var(&[1024])?, var(&[1024])?);
    let before = resident()?;
    for step in 0..1200 {
        let (ys, sum) = ops::add_layer_norm(&xs, &xs, &weight, &bias, 1e-5)?;
        if step % 2 == 0 {
            (ys + sum)?.sum_all()?.backward()?;
        }
    }
    // A leak would be more than a megabyte a step; the other tests take some meanwhile.
    let growth = resident()?.saturating_sub(before);
    assert!(growth < 800 << 20, "{} MB more", growth >> 20);
    Ok(())
}

#[test]
fn the_same_elements_are_dropped_on_every_device() -> Result<()> {
    let case = AddCase::random(Kind::RmsNorm, Dtypes::F32, &[31, 100], 1, Some(DROPOUT));
    let factors = case.factors()?;
    let kept = factors.iter().filter(|&&f| f > 0.).count();
    assert!(
        (kept as f64 / factors.len() as f64 - 0.75).abs() < 0.05,
        "{kept}"
    );
    for (dtype, shape) in [
        (DType::F32, [31, 100]),
        (DType::BF16, [31, 100]),
        (DType::F64, [31, 100]),
        (DType::F32, [100, 31]),
        (DType::F16, [4, 775]),
        (DType::F64, [775, 4]),
    ] {
        for device in devices() {
            let ones = Tensor::ones(&shape, dtype, device)?;
            let weight = Tensor::ones(shape[1], dtype, device)?;
            let (_, sum) =
                ops::dropout_add_rms_norm(&ones, &ones.zeros_like()?, &weight, 1e-5, DROPOUT)?;
            for (got, want) in values(&sum)?.iter().zip(&factors) {
                assert_eq!(*got, round(*want, dtype), "{dtype:?} {shape:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn bad_arguments_say_what_was_expected() -> Result<()> {
    for device in devices() {
        let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, device);
        let xs = ones(&[2, 4], DType::F32)?;
        let (weight, bias) = (ones(&[4], DType::F32)?, ones(&[4], DType::F32)?);
        let error = |residual: &Tensor, dropout: Option<Dropout>| {
            let result = match dropout {
                Some(d) => ops::dropout_add_layer_norm(&xs, residual, &weight, &bias, 1e-5, d),
                None => ops::add_layer_norm(&xs, residual, &weight, &bias, 1e-5),
            };
            let text = result.unwrap_err().to_string();
            text.lines().next().unwrap_or_default().to_string()
        };
        assert_eq!(
            error(&ones(&[4], DType::F32)?, None),
            "layer-norm: residual: expected shape [2, 4] (as xs), got [4]"
        );
        assert_eq!(
            error(&ones(&[2, 4], DType::F64)?, None),
            "layer-norm: residual: expected dtype f32 (as xs), got f64"
        );
        let all = Dropout {
            probability: 1.,
            seed: 0,
        };
        assert_eq!(
            error(&xs, Some(all)),
            "layer-norm: dropout: expected a probability from 0 to below 1, got 1"
        );
        if device.is_cuda() {
            let elsewhere = Tensor::ones(&[2, 4], DType::F32, &Device::Cpu)?;
            assert_eq!(
                error(&elsewhere, None),
                "layer-norm: residual: expected device Cuda { gpu_id: 0 } (as xs), got Cpu"
            );
        }
    }
    Ok(())
}

#[test]
fn layers_add() -> Result<()> {
    for device in devices() {
        let xs = Tensor::randn(0f32, 1., (5, 16), device)?;
        let residual = Tensor::randn(0f32, 1., (5, 16), device)?;
        let weight = Tensor::randn(1f32, 0.2, 16, device)?;
        let bias = Tensor::randn(0f32, 1., 16, device)?;
        let same = |got: (Tensor, Tensor), want: (Tensor, Tensor)| {
            assert_same_bits(&"a layer", "ys", &got.0, &want.0);
            assert_same_bits(&"a layer", "sum", &got.1, &want.1);
        };
        let layer = LayerNorm::new(weight.clone(), bias.clone(), 1e-5);
        same(
            layer.forward_add(&xs, &residual)?,
            ops::add_layer_norm(&xs, &residual, &weight, &bias, 1e-5)?,
        );
        same(
            layer.forward_dropout_add(&xs, &residual, DROPOUT)?,
            ops::dropout_add_layer_norm(&xs, &residual, &weight, &bias, 1e-5, DROPOUT)?,
        );
        let layer = RmsNorm::new(weight.clone(), 1e-5);
        same(
            layer.forward_add(&xs, &residual)?,
            ops::add_rms_norm(&xs, &residual, &weight, 1e-5)?,
        );
        same(
            layer.forward_dropout_add(&xs, &residual, DROPOUT)?,
            ops::dropout_add_rms_norm(&xs, &residual, &weight, 1e-5, DROPOUT)?,
        );
        let layer = layer_norm_no_affine(16, 1e-5);
        let (ys, sum) = layer.forward_add(&xs, &residual)?;
        let want = layer.forward(&sum)?;
        let difference = (ys - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-6, "{difference}");
    }
    Ok(())
}

/// Of f32 from halves, nothing is rounded to halves between.
#[test]
fn layers_add_with_another_output_dtype() -> Result<()> {
    for device in devices() {
        let xs = Tensor::randn(0f32, 1., (5, 16), device)?.to_dtype(DType::BF16)?;
        let weight = Tensor::randn(1f32, 0.2, 16, device)?;
        let layer = LayerNorm::new_no_bias(weight, 1e-5).with_output_dtype(DType::F32);
        let (ys, sum) = layer.forward_add(&xs, &xs)?;
        assert_eq!((ys.dtype(), sum.dtype()), (DType::F32, DType::BF16));
        assert_same_bits(&"a layer", "ys", &ys, &layer.forward(&sum)?);
    }
    Ok(())
}
