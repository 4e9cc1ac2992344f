//! A call of a public entry point with any tensors is a result of the right shape with the right gradients, or an error.

#![no_main]

use arbitrary::{Arbitrary, Result as Drawn, Unstructured};
use candle_core::{DType, Device, Module, Result, Shape, Tensor, Var};
use candle_fused_layer_norm::ops::Dropout;
use candle_fused_layer_norm::{LayerNorm, NormConfig, RmsNorm, composed, layer_norm, ops};
use candle_nn::{LayerNormConfig, VarBuilder};
use libfuzzer_sys::fuzz_target;
use std::collections::HashMap;

/// Of a tensor: what a run has time for, and more than a call needs to be shared out among threads.
const MOST_ELEMENTS: usize = 1 << 18;

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Entry {
    LayerNorm,
    NoBias,
    NoAffine,
    RmsNorm,
    LayerNormLayer,
    RmsNormLayer,
    Checkpoint {
        affine: bool,
        remove_mean: bool,
    },
    Normalize(Config),
    ToDtype(Config, OutputDtype),
    /// `dy` is the residual too, as far as it fits.
    Add {
        config: Config,
        dropout: Option<(f32, u64)>,
        fitting: bool,
    },
    Composed(Config),
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
struct Config {
    weight: bool,
    bias: bool,
    remove_mean: bool,
    zero_centered_weight: bool,
}

impl Config {
    fn of(self, eps: f64) -> NormConfig {
        NormConfig {
            eps,
            remove_mean: self.remove_mean,
            bias: self.bias,
            zero_centered_weight: self.zero_centered_weight,
        }
    }

    fn params<'a>(
        self,
        weight: &'a Tensor,
        bias: &'a Tensor,
    ) -> (Option<&'a Tensor>, Option<&'a Tensor>) {
        (self.weight.then_some(weight), self.bias.then_some(bias))
    }
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum OutputDtype {
    F32,
    F64,
    F16,
    BF16,
    I64,
}

impl From<OutputDtype> for DType {
    fn from(dtype: OutputDtype) -> Self {
        match dtype {
            OutputDtype::F32 => DType::F32,
            OutputDtype::F64 => DType::F64,
            OutputDtype::F16 => DType::F16,
            OutputDtype::BF16 => DType::BF16,
            OutputDtype::I64 => DType::I64,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum View {
    Transpose(u8, u8),
    Narrow { dim: u8, start: u16, len: u16 },
    Unsqueeze(u8),
    Squeeze(u8),
    Broadcast { dim: u8, size: u8 },
    Flatten,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Content {
    Zeros,
    Moderate(u64),
    /// NaN, infinities, subnormals and all the rest.
    AnyBits(u64),
}

#[derive(Debug)]
struct Operand {
    dims: Vec<usize>,
    dtype: DType,
    views: Vec<View>,
    content: Content,
    tracked: bool,
}

#[derive(Arbitrary, Debug)]
struct Call {
    entry: Entry,
    xs: Operand,
    weight: Operand,
    bias: Operand,
    /// Whether weight and bias take the shape of so many trailing dims of xs, and its dtype or f32.
    fitting: bool,
    params_in_f32: bool,
    normalized_dims: u8,
    eps: Eps,
    dy: Operand,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Eps {
    Usual,
    Zero,
    Any(f64),
}

impl<'a> Arbitrary<'a> for Operand {
    fn arbitrary(u: &mut Unstructured<'a>) -> Drawn<Self> {
        let mut dims = Vec::new();
        let mut elements = 1;
        for _ in 0..u.int_in_range(0..=4)? {
            let dim = match u.int_in_range(0..=9)? {
                0 => 0,
                1 => *u.choose(&[1, 64, 1023, 1024, 8192, 16384, 32768, 65537])?,
                2 => u.int_in_range(1..=100_000)?,
                3 | 4 => u.int_in_range(1..=3000)?,
                _ => u.int_in_range(1..=24)?,
            };
            let dim = if elements * dim > MOST_ELEMENTS {
                1
            } else {
                dim
            };
            elements *= dim.max(1);
            dims.push(dim);
        }
        let dtype = match u.int_in_range(0..=15)? {
            0 => DType::U8,
            1 => DType::U32,
            2 => DType::I64,
            3..=6 => DType::F16,
            7..=9 => DType::BF16,
            10..=11 => DType::F64,
            _ => DType::F32,
        };
        let views = (0..u.int_in_range(0..=3)?)
            .map(|_| u.arbitrary())
            .collect::<Drawn<_>>()?;
        Ok(Self {
            dims,
            dtype,
            views,
            content: u.arbitrary()?,
            tracked: u.arbitrary()?,
        })
    }
}

fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 27)
}

fn tensor(content: Content, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let elements: usize = dims.iter().product();
    let device = &Device::Cpu;
    match content {
        Content::Zeros => Tensor::zeros(dims, dtype, device),
        Content::Moderate(mut seed) => {
            let values: Vec<_> = (0..elements)
                .map(|_| (next(&mut seed) % 4001) as f32 / 1000. - 2.)
                .collect();
            Tensor::from_vec(values, dims, device)?.to_dtype(dtype)
        }
        Content::AnyBits(mut seed) => {
            let mut bits = || next(&mut seed);
            let mut draw = |of: &mut dyn FnMut(u64)| (0..elements).for_each(|_| of(bits()));
            macro_rules! any {
                ($from:expr) => {{
                    let mut values = Vec::with_capacity(elements);
                    draw(&mut |bits| values.push($from(bits)));
                    Tensor::from_vec(values, dims, device)
                }};
            }
            match dtype {
                DType::F32 => any!(|bits| f32::from_bits(bits as u32)),
                DType::F64 => any!(f64::from_bits),
                DType::F16 => any!(|bits| half::f16::from_bits(bits as u16)),
                DType::BF16 => any!(|bits| half::bf16::from_bits(bits as u16)),
                _ => any!(|bits| bits as u8)?.to_dtype(dtype),
            }
        }
    }
}

/// A view that the tensor does not have leaves it as it is.
fn view(tensor: &Tensor, view: View) -> Result<Tensor> {
    let rank = tensor.rank();
    if rank == 0 {
        return tensor.unsqueeze(0);
    }
    let of = |dim: u8| usize::from(dim) % rank;
    match view {
        View::Transpose(a, b) => tensor.transpose(of(a), of(b)),
        View::Narrow { dim, start, len } => {
            let size = tensor.dim(of(dim))?;
            if size == 0 {
                return Ok(tensor.clone());
            }
            let start = usize::from(start) % size;
            tensor.narrow(of(dim), start, usize::from(len) % (size - start + 1))
        }
        View::Unsqueeze(dim) => tensor.unsqueeze(usize::from(dim) % (rank + 1)),
        View::Squeeze(dim) => tensor.squeeze(of(dim)),
        View::Broadcast { dim, size } => {
            let mut dims = tensor.dims().to_vec();
            let fits = tensor.elem_count() * usize::from(size) <= MOST_ELEMENTS;
            if dims[of(dim)] == 1 && fits {
                dims[of(dim)] = size.into();
            }
            tensor.broadcast_as(dims)
        }
        View::Flatten => tensor.flatten_all(),
    }
}

/// The tensor, and the variable behind its views if it is tracked.
fn operand(operand: &Operand, dims: &[usize], dtype: DType) -> Result<(Tensor, Option<Var>)> {
    let base = tensor(operand.content, dims, dtype)?;
    let (mut seen, var) = if operand.tracked && dtype.is_float() {
        let var = Var::from_tensor(&base)?;
        (var.as_tensor().clone(), Some(var))
    } else {
        (base, None)
    };
    for &next in &operand.views {
        seen = view(&seen, next)?;
    }
    Ok((seen, var))
}

/// The result, and the sum with a residual where there is one.
fn apply(
    call: &Call,
    xs: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let eps = match call.eps {
        Eps::Usual => 1e-5,
        Eps::Zero => 0.,
        Eps::Any(eps) => eps,
    };
    let ys = match call.entry {
        Entry::LayerNorm => ops::layer_norm(xs, weight, bias, eps as f32),
        Entry::NoBias => ops::layer_norm_no_bias(xs, weight, eps as f32),
        Entry::NoAffine => ops::layer_norm_no_affine(xs, weight.shape(), eps as f32),
        Entry::RmsNorm => ops::rms_norm(xs, weight, eps as f32),
        Entry::LayerNormLayer => LayerNorm::new(weight.clone(), bias.clone(), eps).forward(xs),
        Entry::RmsNormLayer => RmsNorm::new(weight.clone(), eps).forward(xs),
        Entry::Checkpoint {
            affine,
            remove_mean,
        } => {
            let tensors = [("weight", weight), ("bias", bias)];
            let tensors: HashMap<_, _> = tensors
                .map(|(name, tensor)| (name.to_string(), tensor.clone()))
                .into();
            let vb = VarBuilder::from_tensors(tensors, xs.dtype(), &Device::Cpu);
            let config = LayerNormConfig {
                eps,
                remove_mean,
                affine,
            };
            let size = Shape::from(trailing(xs, call.normalized_dims));
            layer_norm(size, config, vb)?.forward(xs)
        }
        Entry::Normalize(config) => {
            let (weight, bias) = config.params(weight, bias);
            let shape = trailing(xs, call.normalized_dims);
            ops::normalize(xs, shape, weight, bias, &config.of(eps))
        }
        Entry::ToDtype(config, dtype) => {
            let (weight, bias) = config.params(weight, bias);
            let shape = trailing(xs, call.normalized_dims);
            ops::normalize_to_dtype(xs, shape, weight, bias, &config.of(eps), dtype.into())
        }
        Entry::Add {
            config,
            dropout,
            fitting,
        } => {
            let residual = match fitting {
                true => operand(&call.dy, xs.dims(), xs.dtype())?.0,
                false => operand(&call.dy, &call.dy.dims, call.dy.dtype)?.0,
            };
            let shape = trailing(xs, call.normalized_dims);
            let params = config.params(weight, bias);
            let dropout = dropout.map(|(probability, seed)| Dropout { probability, seed });
            let (ys, sum) =
                ops::add_normalize(xs, &residual, shape, params, &config.of(eps), dropout)?;
            return Ok((ys, Some(sum)));
        }
        Entry::Composed(config) => {
            let shape = trailing(xs, call.normalized_dims);
            let (weight, bias) = config.params(weight, bias);
            composed::normalize(xs, shape, weight, bias, &config.of(eps))
        }
    };
    Ok((ys?, None))
}

fn trailing(xs: &Tensor, dims: u8) -> &[usize] {
    let dims = usize::from(dims) % (xs.rank() + 1);
    &xs.dims()[xs.rank() - dims..]
}

/// What candle cannot make of the operands is no finding.
fn operands(call: &Call) -> Result<[(Tensor, Option<Var>); 3]> {
    let xs = operand(&call.xs, &call.xs.dims, call.xs.dtype)?;
    let param = |param: &Operand| {
        if !call.fitting {
            return operand(param, &param.dims, param.dtype);
        }
        let dtype = if call.params_in_f32 {
            DType::F32
        } else {
            xs.0.dtype()
        };
        let dims = trailing(&xs.0, call.normalized_dims);
        let dense = Operand {
            dims: dims.to_vec(),
            views: Vec::new(),
            ..*param
        };
        operand(&dense, dims, dtype)
    };
    let (weight, bias) = (param(&call.weight)?, param(&call.bias)?);
    Ok([xs, weight, bias])
}

fn run(call: &Call) {
    let Ok([(xs, xs_var), (weight, weight_var), (bias, bias_var)]) = operands(call) else {
        return;
    };
    let (ys, sum) = match apply(call, &xs, &weight, &bias) {
        Ok(results) => results,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let dtype = match call.entry {
        Entry::ToDtype(_, dtype) => dtype.into(),
        _ => xs.dtype(),
    };
    assert_eq!((ys.shape(), ys.dtype()), (xs.shape(), dtype));
    if let Some(sum) = &sum {
        assert_eq!((sum.shape(), sum.dtype()), (xs.shape(), xs.dtype()));
    }
    if !ys.track_op() {
        return;
    }
    let dy = tensor(call.dy.content, ys.dims(), ys.dtype()).expect("a tensor as ys is one");
    let seen = call.dy.views.iter().try_fold((ys, dy), |(ys, dy), &next| {
        Ok::<_, candle_core::Error>((view(&ys, next)?, view(&dy, next)?))
    });
    let Ok((ys, dy)) = seen else { return };
    let grads = (ys * dy)
        .and_then(|product| product.sum_all())
        .and_then(|loss| match sum {
            // Two gradients arrive.
            Some(sum) => loss + sum.sum_all()?,
            None => Ok(loss),
        })
        .and_then(|loss| loss.backward())
        .expect("a result that is tracked has gradients");
    for (tensor, var) in [(&xs, xs_var), (&weight, weight_var), (&bias, bias_var)] {
        if let Some(gradient) = var.as_ref().and_then(|var| grads.get(var)) {
            let var = var.as_ref().expect("it has a gradient");
            assert_eq!(
                (gradient.shape(), gradient.dtype()),
                (var.shape(), tensor.dtype())
            );
        }
    }
}

fuzz_target!(
    init: {
        // As many on any machine: the division of the work depends on it.
        rayon::ThreadPoolBuilder::new()
            .num_threads(3)
            .build_global()
            .expect("nothing has used the pool before");
    },
    |call: Call| run(&call)
);
