//! Seeded random values, rounded to a dtype, and tensors from values and back.
//!
//! Values travel as f64 that the tested dtype holds exactly, so that the oracle sees what the op sees.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::VarMap;
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::BTreeMap;

/// A generator whose values depend on `seed` alone.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// A value with mean 0, standard deviation 1 and a bell-shaped distribution: three uniform ones, summed.
///
/// Of all 53 bits: with fewer, sums round the same way at every step, and errors that are random in any other data
/// add up.
pub fn normal(rng: &mut impl Rng) -> f64 {
    let mut uniform = || rng.random::<f64>() - 0.5;
    2. * (uniform() + uniform() + uniform())
}

/// `len` values of [`normal`].
pub fn normals(rng: &mut impl Rng, len: usize) -> Vec<f64> {
    (0..len).map(|_| normal(rng)).collect()
}

/// The value of `dtype` nearest to `value`. Half types by way of f32: `half` drops the low bits of an f64 before it
/// rounds, and so takes values beside a tie for the tie.
pub fn round(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        DType::F16 => f16::from_f32(value as f32).to_f64(),
        DType::BF16 => bf16::from_f32(value as f32).to_f64(),
        dtype => panic!("the tests have no values of dtype {dtype:?}"),
    }
}

/// All values rounded to `dtype`.
pub fn rounded(mut values: Vec<f64>, dtype: DType) -> Vec<f64> {
    for value in &mut values {
        *value = round(*value, dtype);
    }
    values
}

/// A tensor of values that `dtype` holds exactly.
pub fn tensor<S: Into<Shape>>(
    values: &[f64],
    shape: S,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let shape = shape.into();
    let values = values.iter();
    match dtype {
        DType::F64 => Tensor::from_vec(values.copied().collect::<Vec<_>>(), shape, device),
        DType::F32 => {
            Tensor::from_vec(values.map(|&v| v as f32).collect::<Vec<_>>(), shape, device)
        }
        DType::F16 => Tensor::from_vec(
            values.map(|&v| f16::from_f64(v)).collect::<Vec<_>>(),
            shape,
            device,
        ),
        DType::BF16 => Tensor::from_vec(
            values.map(|&v| bf16::from_f64(v)).collect::<Vec<_>>(),
            shape,
            device,
        ),
        dtype => panic!("the tests have no values of dtype {dtype:?}"),
    }
}

/// The elements of a tensor in row-major order. Widening is exact: equal values are equal bits, but for NaN and -0.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => tensor.to_vec1::<f64>()?,
        DType::F32 => widened(&tensor.to_vec1::<f32>()?),
        DType::F16 => widened(&tensor.to_vec1::<f16>()?),
        DType::BF16 => widened(&tensor.to_vec1::<bf16>()?),
        dtype => panic!("the tests have no values of dtype {dtype:?}"),
    })
}

/// The bits of all elements, after exact widening to f64.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(values(tensor)?.into_iter().map(f64::to_bits).collect())
}

/// The variables by name, in the order of the names.
pub fn named_vars(varmap: &VarMap) -> BTreeMap<String, Var> {
    let data = varmap
        .data()
        .lock()
        .expect("no test panics while it holds the map");
    data.iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect()
}

fn widened<T: Copy + Into<f64>>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}
