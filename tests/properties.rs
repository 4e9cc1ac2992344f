//! Promise: forward and every gradient equal f64 for any rank, shape, strides, offset, dtype, eps, magnitude, mean far above
//! the deviation, affine choice and set of tracked arguments.
//!
//! 256 cases, the same in every run. For a long run with new cases each time:
//!
//! ```sh
//! PROPTEST_CASES=20000 cargo test --release --test properties
//! ```
//!
//! `PROPTEST_RNG_SEED` repeats one. A failure prints the smallest [`Spec`] that fails: it becomes a test of its own below.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_layer_norm::ops;
use common::case::{Case, Dtypes, Kind, Tracked};
use common::compare::assert_close;
use common::data::{normal, rounded};
use common::devices::devices;
use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a tensor lies in its storage.
#[derive(Debug, Clone, Copy, PartialEq)]
enum View {
    Dense,
    /// Behind so many other elements.
    Offset(usize),
    /// Dense in an order of the dims that is rotated by so many.
    Permuted(usize),
    /// Between others along a dim.
    Narrowed {
        dim: usize,
        before: usize,
    },
    /// Every second element.
    Strided,
    /// The first block along the first dim, again and again.
    Broadcast,
}

/// What follows the op, and so what lies in dy.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Follower {
    Nothing,
    Permute(usize),
    SumOverFirstDim,
}

/// The elements of a row, with mean 0 and a deviation of about 1.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pattern {
    Normal,
    Constant,
    /// One element far from the others, the first or another one.
    Outlier(usize),
    /// The first elements say nothing of the others.
    Ramp,
    Alternating,
}

#[derive(Debug, Clone)]
struct Spec {
    kind: Kind,
    dtypes: Dtypes,
    shape: Vec<usize>,
    normalized_dims: usize,
    eps: f32,
    pattern: Pattern,
    /// Of the larger of mean and deviation, as a power of ten.
    magnitude: i32,
    /// mean / deviation, or 0.
    mean_ratio: f64,
    dy_scale: f64,
    xs: View,
    weight: View,
    bias: View,
    follower: Follower,
    tracked: Tracked,
}

impl View {
    /// This view, or a dense one where a tensor of this shape has no such view.
    fn of(self, shape: &[usize]) -> Self {
        match self {
            Self::Narrowed { dim, before } => Self::Narrowed {
                dim: dim % shape.len(),
                before,
            },
            Self::Permuted(by) => Self::Permuted(by % shape.len()),
            view => view,
        }
    }

    fn permutation(by: usize, rank: usize) -> (Vec<usize>, Vec<usize>) {
        let there = (0..rank).map(|dim| (dim + by) % rank).collect();
        let back = (0..rank).map(|dim| (dim + rank - by) % rank).collect();
        (there, back)
    }

    /// A storage in which `see` finds the elements of `dense`, which repeats where it is a broadcast.
    fn base(self, dense: &Tensor) -> candle_core::Result<Tensor> {
        let junk =
            |shape: &[usize]| Tensor::full(1e4f32, shape, dense.device())?.to_dtype(dense.dtype());
        match self {
            Self::Dense => Ok(dense.clone()),
            Self::Offset(offset) => Tensor::cat(&[junk(&[offset])?, dense.flatten_all()?], 0),
            Self::Permuted(by) => {
                let (there, _) = Self::permutation(by, dense.rank());
                dense.permute(there)?.contiguous()
            }
            Self::Narrowed { dim, before } => {
                let mut beside = dense.dims().to_vec();
                beside[dim] = before;
                let before = junk(&beside)?;
                beside[dim] = 1;
                Tensor::cat(&[&before, dense, &junk(&beside)?], dim)
            }
            Self::Strided => {
                let dense = dense.unsqueeze(dense.rank())?;
                Tensor::cat(&[&dense, &junk(dense.dims())?], dense.rank() - 1)
            }
            Self::Broadcast => dense.narrow(0, 0, 1)?.contiguous(),
        }
    }

    fn see(self, base: &Tensor, shape: &[usize]) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense => Ok(base.clone()),
            Self::Offset(offset) => base
                .narrow(0, offset, base.elem_count() - offset)?
                .reshape(shape),
            Self::Permuted(by) => base.permute(Self::permutation(by, shape.len()).1),
            Self::Narrowed { dim, before } => base.narrow(dim, before, shape[dim]),
            Self::Strided => base.narrow(shape.len(), 0, 1)?.squeeze(shape.len()),
            Self::Broadcast => base.broadcast_as(shape),
        }
    }
}

/// Makes a broadcast's data what it is.
fn repeat_first_block(values: &mut [f64], blocks: usize) {
    let len = values.len() / blocks;
    let (first, rest) = values.split_at_mut(len);
    for block in rest.chunks_mut(len) {
        block.copy_from_slice(first);
    }
}

impl Spec {
    fn case(&self) -> Case {
        // A thirtieth of it: f16's largest is 65504.
        let largest = match self.dtypes.xs {
            DType::F16 => 4.5,
            _ => 30.,
        };
        let magnitude = 10f64.powf(f64::from(self.magnitude).min(largest) - 1.3);
        let deviation = magnitude / self.mean_ratio.abs().max(1.);
        let mean = self.mean_ratio * deviation;
        let cols: usize = self.shape[self.shape.len() - self.normalized_dims..]
            .iter()
            .product();
        let mut column = 0;
        let mut case = Case::with_rows(
            self.kind,
            self.dtypes,
            &self.shape,
            self.normalized_dims,
            |rng, row| {
                let at = column % cols;
                column += 1;
                let noise = match self.pattern {
                    Pattern::Normal => normal(rng),
                    Pattern::Constant => 0.,
                    Pattern::Outlier(place) if at == place % cols => 5.,
                    Pattern::Outlier(_) => 1e-3 * normal(rng),
                    Pattern::Ramp => 3.4 * (at as f64 / cols as f64 - 0.5),
                    Pattern::Alternating => 1. - 2. * (at % 2) as f64,
                };
                // Rows differ, so that a row that takes another's statistics is wrong.
                let own = 1. + (row % 3) as f64;
                own * (mean + deviation * noise)
            },
        );
        for dy in &mut case.dy {
            *dy *= self.dy_scale;
        }
        case.dy = rounded(case.dy, case.dtypes.xs);
        case.eps = self.eps;
        if self.xs == View::Broadcast {
            repeat_first_block(&mut case.x, self.shape[0]);
        }
        if self.follower == Follower::SumOverFirstDim {
            repeat_first_block(&mut case.dy, self.shape[0]);
        }
        let normalized = self.shape[self.shape.len() - self.normalized_dims];
        for (param, view) in [(&mut case.weight, self.weight), (&mut case.bias, self.bias)] {
            if let Some(param) = param
                && view == View::Broadcast
            {
                repeat_first_block(param, normalized);
            }
        }
        case
    }

    /// Whether f32 (f64 for f64) holds the squares of all deviations as normal numbers, or overflows beyond doubt: between
    /// the two, and where only squares that vanish stand beside an eps of 0, the formula has no answer to hold a kernel to.
    fn in_domain(&self, case: &Case) -> bool {
        let (least, doubtful) = match case.dtypes.xs {
            DType::F64 => (1e-290, 1e300..f64::INFINITY),
            _ => (1e-30, 1e36..1e40),
        };
        let rows = case.x.chunks(case.cols());
        rows.into_iter().all(|row| {
            let len = row.len() as f64;
            // About the first value: equal ones have no deviations.
            let center = if case.kind.removes_mean() {
                row[0] + row.iter().map(|x| x - row[0]).sum::<f64>() / len
            } else {
                0.
            };
            let squares = row.iter().map(|x| (x - center).powi(2));
            let largest = squares.clone().fold(0., f64::max);
            let sum: f64 = squares.sum();
            let vanishes = case.eps == 0. && sum / len < least;
            // What a mean that is rounded leaves of a variance in f32: a millionth of the square of its own unit.
            let unit = match case.dtypes.xs {
                DType::F64 => 2f64.powi(-53),
                _ => 2f64.powi(-24),
            };
            let blurred = f64::from(case.eps) + sum / len < (unit * center).powi(2) * 1e-6;
            !vanishes
                && !blurred
                && !doubtful.contains(&largest)
                && (largest >= doubtful.start || sum <= doubtful.start)
        })
    }

    fn check(&self) -> Result<()> {
        let case = self.case();
        if self.in_domain(&case) {
            for device in devices() {
                // candle's own ops of the backward pass launch nothing on CUDA for no elements, and fail at it.
                if !(device.is_cuda() && case.x.is_empty()) {
                    self.check_on(&case, device)?;
                }
            }
        }
        Ok(())
    }

    fn check_on(&self, case: &Case, device: &Device) -> Result<()> {
        let operand = |tensor: Option<Tensor>, view: View, tracked: bool| -> Result<_> {
            let Some(tensor) = tensor else {
                return Ok((None, None));
            };
            let base = view.base(&tensor)?;
            let var = tracked.then(|| Var::from_tensor(&base)).transpose()?;
            let base = var.as_ref().map_or(base, |var| var.as_tensor().clone());
            Ok((Some(view.see(&base, tensor.dims())?), var))
        };
        let normalized = case.normalized_shape();
        let (xs_view, weight_view, bias_view) = (
            self.xs.of(&self.shape),
            self.weight.of(normalized),
            self.bias.of(normalized),
        );
        let (xs, xs_var) = operand(Some(case.xs(device)?), xs_view, self.tracked.xs)?;
        let (weight, weight_var) = operand(case.weight(device)?, weight_view, self.tracked.weight)?;
        let (bias, bias_var) = operand(case.bias(device)?, bias_view, self.tracked.bias)?;
        let xs = xs.expect("every call has xs");
        let y = case.apply(&xs, weight.as_ref(), bias.as_ref())?;

        let largest_square = match case.dtypes.xs {
            DType::F64 => f64::INFINITY,
            _ => f64::from(f32::MAX),
        };
        let repeats = match self.follower {
            Follower::SumOverFirstDim => self.shape[0],
            _ => 1,
        };
        let oracle = case
            .oracle()
            .overflowing(largest_square)
            .over_repeats(repeats);
        let name = format!("{self:?} on {:?}", device.location());
        assert_eq!((y.dims(), y.dtype()), (xs.dims(), xs.dtype()), "{name}: y");
        assert_close(&name, "y", &y, &oracle.y());
        // The same data, dense: few calls here are large enough for those kernels.
        if let Some(outputs) = case.gradients_as_of_larger(device)? {
            let name = format!("{name}, by the kernels of larger calls");
            case.check_against(&name, &oracle, Tracked::ALL, &outputs);
        }
        let tracked = [&xs_var, &weight_var, &bias_var]
            .iter()
            .any(|var| var.is_some());
        assert_eq!(y.track_op(), tracked, "{name}: whether an op is kept");
        if !tracked {
            return Ok(());
        }

        let dy = case.dy(device)?;
        let (y, dy) = match self.follower {
            Follower::Nothing => (y, dy),
            Follower::Permute(by) => {
                let (there, _) = View::permutation(by % y.rank(), y.rank());
                (y.permute(there.clone())?, dy.permute(there)?)
            }
            Follower::SumOverFirstDim => (y.sum_keepdim(0)?, dy.narrow(0, 0, 1)?),
        };
        let grads = (y * dy)?.sum_all()?.backward()?;
        for (output, var, view, mut want, shape) in [
            (
                "dx",
                &xs_var,
                xs_view,
                // Each row's own, unless candle sums those of a broadcast.
                match xs_view {
                    View::Broadcast => oracle.dx().over_repeats(repeats),
                    _ => oracle.dx(),
                },
                case.shape.as_slice(),
            ),
            (
                "dweight",
                &weight_var,
                weight_view,
                oracle.dweight(),
                normalized,
            ),
            ("dbias", &bias_var, bias_view, oracle.dbias(), normalized),
        ] {
            let Some(var) = var else { continue };
            let gradient = grads
                .get(var)
                .unwrap_or_else(|| panic!("{name}: {output}: no gradient"));
            assert_eq!(
                (gradient.dims(), gradient.dtype()),
                (var.dims(), var.dtype()),
                "{name}: {output}: shape and dtype"
            );
            // candle adds every gradient to zeros, in bf16 by `vcvtneps2bf16` where a CPU has it.
            if device.is_cpu() && gradient.dtype() == DType::BF16 {
                want = want.flushed_below(bf16::MIN_POSITIVE.to_f64());
            }
            if view == View::Broadcast {
                assert_close(&name, output, gradient, &want.summed_over_blocks(shape[0]));
            } else {
                assert_close(&name, output, &view.see(gradient, shape)?, &want);
            }
        }
        Ok(())
    }
}

fn shapes() -> impl Strategy<Value = (Vec<usize>, usize)> {
    let dims = |each, count| prop::collection::vec(each, count);
    let joined = |(mut shape, normalized): (Vec<usize>, Vec<usize>)| {
        let dims = normalized.len();
        shape.extend(normalized);
        (shape, dims)
    };
    prop_oneof![
        6 => (dims(1..=6usize, 0..=3usize), dims(1..=40usize, 1..=2)).prop_map(joined),
        2 => (dims(1..=12usize, 0..=2), dims(1..=1500usize, 1..=1)).prop_map(joined),
        // Many rows.
        1 => (dims(200..=700usize, 1..=1), dims(1..=130usize, 1..=1)).prop_map(joined),
        // Rows that threads share.
        1 => (dims(1..=3usize, 0..=1), dims(8192..=70_000usize, 1..=1)).prop_map(joined),
    ]
}

fn views() -> impl Strategy<Value = View> {
    prop_oneof![
        3 => Just(View::Dense),
        2 => (1..=9usize).prop_map(View::Offset),
        2 => (1..=3usize).prop_map(View::Permuted),
        2 => (0..=3usize, 1..=4usize).prop_map(|(dim, before)| View::Narrowed { dim, before }),
        1 => Just(View::Strided),
        1 => Just(View::Broadcast),
    ]
}

fn specs() -> impl Strategy<Value = Spec> {
    let call = (
        prop::sample::select(Kind::ALL.to_vec()),
        prop::sample::select(Dtypes::ALL.to_vec()),
        shapes(),
        prop::sample::select(vec![1e-5f32, 0., 1e-12, 1e-8, 1e-2, 1., 1e3]),
    );
    let patterns = prop_oneof![
        4 => Just(Pattern::Normal),
        1 => Just(Pattern::Constant),
        1 => (0..5000usize).prop_map(Pattern::Outlier),
        1 => Just(Pattern::Ramp),
        1 => Just(Pattern::Alternating),
    ];
    let data = (
        patterns,
        prop_oneof![2 => -2..=2, 1 => -30..=30],
        prop::sample::select(vec![0f64, 0.3, -3., 100., -1e4]),
        prop::sample::select(vec![1f64, 1e-4, 1e4]),
    );
    let followers = prop_oneof![
        3 => Just(Follower::Nothing),
        1 => (1..=3usize).prop_map(Follower::Permute),
        1 => Just(Follower::SumOverFirstDim),
    ];
    let tracked = prop_oneof![
        2 => Just(Tracked::ALL),
        1 => (any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(xs, weight, bias)| Tracked { xs, weight, bias }),
    ];
    (call, data, (views(), views(), views()), followers, tracked).prop_map(
        |(
            (kind, dtypes, (shape, normalized_dims), eps),
            (pattern, magnitude, mean_ratio, dy_scale),
            (xs, weight, bias),
            mut follower,
            tracked,
        )| {
            // Broadcasts of xs and sums are along a dim of the batch. candle sums the gradients of what was broadcast, and
            // of half types in half precision.
            let batch = shape.len() > normalized_dims;
            let dense = |view, possible: bool| {
                if view == View::Broadcast && !possible {
                    View::Dense
                } else {
                    view
                }
            };
            let half = |dtype| matches!(dtype, DType::F16 | DType::BF16);
            let xs = dense(xs, batch && !half(dtypes.xs));
            let weight = dense(weight, !half(dtypes.params));
            let bias = dense(bias, !half(dtypes.params));
            if follower == Follower::SumOverFirstDim && !batch {
                follower = Follower::Nothing;
            }
            Spec {
                kind,
                dtypes,
                shape,
                normalized_dims,
                eps,
                pattern,
                magnitude,
                mean_ratio,
                dy_scale,
                xs,
                weight,
                bias,
                follower,
                tracked,
            }
        },
    )
}

#[test]
fn any_call_equals_f64() {
    let mut config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 256;
        config.rng_seed = RngSeed::Fixed(0);
    }
    let checked = TestRunner::new(config).run(&specs(), |spec| {
        // Assertions are panics: caught, so that the runner looks for a smaller spec.
        match catch_unwind(AssertUnwindSafe(|| spec.check())) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(TestCaseError::fail(error.to_string())),
            Err(_) => Err(TestCaseError::fail("an assertion above")),
        }
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}

/// Dense operands, all tracked: what a named call says is how it differs.
const PLAIN: Spec = Spec {
    kind: Kind::LayerNorm,
    dtypes: Dtypes::F32,
    shape: Vec::new(),
    normalized_dims: 1,
    eps: 1e-5,
    pattern: Pattern::Normal,
    magnitude: 0,
    mean_ratio: 0.,
    dy_scale: 1.,
    xs: View::Dense,
    weight: View::Dense,
    bias: View::Dense,
    follower: Follower::Nothing,
    tracked: Tracked::ALL,
};

/// Found by a long run: a running sum rounded each repeat of a value the same way.
#[test]
fn sorted_rows_in_bf16_beside_f32_weight() -> Result<()> {
    for cols in [1100, 1179, 1200, 1346] {
        let spec = Spec {
            kind: Kind::ZeroCentered,
            dtypes: Dtypes::BF16_F32,
            shape: vec![8, cols],
            pattern: Pattern::Ramp,
            magnitude: 2,
            ..PLAIN
        };
        spec.check()?;
    }
    Ok(())
}

/// Found by a long run: candle's sum with the zeros it starts from takes a subnormal dx in bf16 for zero.
#[test]
fn a_subnormal_gradient_in_bf16() -> Result<()> {
    let spec = Spec {
        kind: Kind::ZeroCenteredRmsNorm,
        dtypes: Dtypes::BF16,
        shape: vec![153],
        eps: 1e3,
        magnitude: -17,
        mean_ratio: -3.,
        dy_scale: 1e4,
        ..PLAIN
    };
    spec.check()
}

/// Found by a long run: candle sums 200 equal rows of dx, each step rounded the same way.
#[test]
fn a_broadcast_summed_over_its_rows() -> Result<()> {
    let spec = Spec {
        shape: vec![200, 18],
        eps: 1e-12,
        pattern: Pattern::Constant,
        xs: View::Broadcast,
        follower: Follower::SumOverFirstDim,
        ..PLAIN
    };
    spec.check()
}

/// Found by a long run: parts of a row whose means differ, where mean >> std, in rows that parts of a thread, a block or a cluster hold.
#[test]
fn a_ramp_far_from_zero() -> Result<()> {
    for dtypes in [Dtypes::F64, Dtypes::F32] {
        for cols in [500, 4096, 4097, 45596, 45597, 300_000, 1_200_000] {
            let spec = Spec {
                dtypes,
                shape: vec![2, cols],
                pattern: Pattern::Ramp,
                magnitude: 2,
                mean_ratio: -1e4,
                dy_scale: 1e4,
                ..PLAIN
            };
            spec.check()?;
        }
    }
    Ok(())
}

/// Found by a long run: the oracle's own mean of equal values was not their value, by a unit of 1e13 and, with a small eps, 20 deviations.
#[test]
fn equal_values_of_f64_and_a_small_eps() -> Result<()> {
    let spec = Spec {
        dtypes: Dtypes::F64,
        shape: vec![4, 5, 35, 20],
        normalized_dims: 2,
        eps: 1e-8,
        pattern: Pattern::Constant,
        magnitude: 15,
        mean_ratio: 0.3,
        xs: View::Strided,
        weight: View::Strided,
        bias: View::Narrowed { dim: 2, before: 2 },
        ..PLAIN
    };
    spec.check()
}

/// Found by a long run: dbias of 502 rows was one running sum.
#[test]
fn sums_over_many_short_rows() -> Result<()> {
    let spec = Spec {
        shape: vec![502, 49],
        eps: 1e-8,
        magnitude: -16,
        mean_ratio: 0.3,
        dy_scale: 1e-4,
        xs: View::Offset(3),
        weight: View::Offset(1),
        bias: View::Strided,
        follower: Follower::Permute(3),
        ..PLAIN
    };
    spec.check()
}

/// Found by a long run: dweight of equal rows, whose running sum over 128 of them rounded each addition the same way.
#[test]
fn sums_over_many_equal_rows() -> Result<()> {
    let spec = Spec {
        kind: Kind::RmsNorm,
        shape: vec![287, 126],
        eps: 0.,
        pattern: Pattern::Constant,
        magnitude: -1,
        mean_ratio: 0.3,
        ..PLAIN
    };
    spec.check()
}

/// Found by a long run: products that are subnormal in f32, before they are multiplied with an rstd of a million.
#[test]
fn subnormal_products_and_a_large_rstd() -> Result<()> {
    let spec = Spec {
        kind: Kind::ZeroCenteredRmsNorm,
        dtypes: Dtypes::BF16,
        shape: vec![38505],
        eps: 1e-12,
        pattern: Pattern::Ramp,
        magnitude: -23,
        mean_ratio: -3.,
        dy_scale: 1e-4,
        xs: View::Offset(5),
        bias: View::Permuted(3),
        follower: Follower::Permute(3),
        ..PLAIN
    };
    spec.check()
}

/// Found by a long run: the products that dweight sums are subnormal in f32.
#[test]
fn subnormal_products_over_many_rows() -> Result<()> {
    let spec = Spec {
        kind: Kind::RmsNorm,
        shape: vec![245, 119],
        eps: 1e-8,
        pattern: Pattern::Ramp,
        magnitude: -23,
        mean_ratio: 0.3,
        dy_scale: 1e-4,
        xs: View::Permuted(1),
        bias: View::Offset(4),
        ..PLAIN
    };
    spec.check()
}

/// Found by fuzzing: an empty view's start may lie behind the end of its storage.
#[test]
fn empty_view_behind_its_storage() -> Result<()> {
    let empty = |dims: &[usize]| Var::zeros(dims, DType::F32, &Device::Cpu);
    let (xs, residual) = (empty(&[0, 4])?, empty(&[0, 4])?);
    let (weight, bias) = (empty(&[2])?, empty(&[2])?);
    let narrowed = |var: &Var| var.narrow(1, 1, 2);
    let ys = ops::layer_norm(&narrowed(&xs)?, &weight, &bias, 1e-5)?;
    let (zs, sum) =
        ops::add_layer_norm(&narrowed(&xs)?, &narrowed(&residual)?, &weight, &bias, 1e-5)?;
    let grads = ((ys + zs)?.sum_all()? + sum.sum_all()?)?.backward()?;
    for (var, dims) in [(&xs, [0, 4].as_slice()), (&weight, &[2]), (&bias, &[2])] {
        let Some(gradient) = grads.get(var) else {
            anyhow::bail!("no gradient of the variable of shape {dims:?}")
        };
        assert_eq!(gradient.dims(), dims);
    }
    Ok(())
}
