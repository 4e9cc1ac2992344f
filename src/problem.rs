//! What one call normalises, validated once. Every error about the arguments of a call is written here.

use crate::NormConfig;
use candle_core::{DType, Result, Tensor, bail};

/// A validated call, flattened to `rows` x `cols`: `cols` is the product of `normalized_shape`.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// How many rows are normalised, each on its own; 0 for an empty batch.
    pub rows: usize,
    /// The length of a row, in elements.
    pub cols: usize,
    /// dtype of xs and ys.
    pub dtype: DType,
    /// dtype of weight and bias: `dtype`, or f32 beside f16 or bf16; `dtype` if there are neither.
    pub param_dtype: DType,
    /// Whether ys is multiplied by a weight.
    pub weight: bool,
    /// Whether it is multiplied by 1 + weight instead. `false` if there is none.
    pub zero_centered_weight: bool,
    /// Whether a bias is added to ys.
    pub bias: bool,
    /// `false` is RMSNorm: the mean is taken as 0.
    pub remove_mean: bool,
    /// Added to the variance.
    pub eps: f64,
}

impl Problem {
    /// Checks the arguments of a call. `normalized_shape` are the trailing dims of `xs` that form a row.
    pub fn new(
        xs: &Tensor,
        normalized_shape: &[usize],
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        config: &NormConfig,
    ) -> Result<Self> {
        let NormConfig {
            eps, remove_mean, ..
        } = *config;
        let op = op_name(remove_mean);
        if xs.rank() == 0 {
            bail!("{op}: xs: expected rank 1 or more, got a scalar")
        }
        if !matches!(
            xs.dtype(),
            DType::F32 | DType::F16 | DType::BF16 | DType::F64
        ) {
            bail!(
                "{op}: xs: expected dtype f32, f16, bf16 or f64, got {}",
                xs.dtype().as_str()
            )
        }
        if !(eps.is_finite() && eps >= 0.) {
            bail!("{op}: eps: expected a finite number >= 0, got {eps}")
        }
        if normalized_shape.is_empty() {
            bail!("{op}: normalized_shape: expected at least one dim, got none (a scalar weight?)")
        }
        let Some(batch_dims) = xs.dims().strip_suffix(normalized_shape) else {
            bail!(
                "{op}: xs: expected the last dims to be the normalized shape {normalized_shape:?}, got {:?}",
                xs.dims()
            )
        };
        let mut param_dtype = None;
        for (name, tensor) in [("weight", weight), ("bias", bias)] {
            let Some(tensor) = tensor else { continue };
            if tensor.dims() != normalized_shape {
                bail!(
                    "{op}: {name}: expected shape {normalized_shape:?}, got {:?}",
                    tensor.dims()
                )
            }
            let half = matches!(xs.dtype(), DType::F16 | DType::BF16);
            if tensor.dtype() != xs.dtype() && !(half && tensor.dtype() == DType::F32) {
                let expected = if half {
                    format!("{} (as xs) or f32", xs.dtype().as_str())
                } else {
                    format!("{} (as xs)", xs.dtype().as_str())
                };
                bail!(
                    "{op}: {name}: expected dtype {expected}, got {}",
                    tensor.dtype().as_str()
                )
            }
            if *param_dtype.get_or_insert(tensor.dtype()) != tensor.dtype() {
                bail!(
                    "{op}: bias: expected dtype {} (as weight), got {}",
                    param_dtype.unwrap_or(tensor.dtype()).as_str(),
                    tensor.dtype().as_str()
                )
            }
            if !tensor.device().same_device(xs.device()) {
                bail!(
                    "{op}: {name}: expected device {:?} (as xs), got {:?}",
                    xs.device().location(),
                    tensor.device().location()
                )
            }
        }
        // Of dims that are not zero: beside a zero the product is none, and yet rows or cols may overflow, or their statistics.
        let size = xs.dims().iter().filter(|&&dim| dim > 0);
        if size
            .copied()
            .try_fold(1, usize::checked_mul)
            .is_none_or(|elements| elements > MAX_ELEMENTS)
        {
            bail!(
                "{op}: xs: expected dims of at most {MAX_ELEMENTS} elements, those of 0 not counted, got {:?}",
                xs.dims()
            )
        }
        Ok(Self {
            rows: batch_dims.iter().product(),
            cols: normalized_shape.iter().product(),
            dtype: xs.dtype(),
            param_dtype: param_dtype.unwrap_or(xs.dtype()),
            weight: weight.is_some(),
            zero_centered_weight: config.zero_centered_weight && weight.is_some(),
            bias: bias.is_some(),
            remove_mean,
            eps,
        })
    }

    /// The op's name in errors.
    pub fn op_name(&self) -> &'static str {
        op_name(self.remove_mean)
    }

    /// dtype of the statistics and of every sum: f32, or f64 for f64.
    pub fn stats_dtype(&self) -> DType {
        match self.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }

    /// The dtype to compute results of `output` in: of those that hold xs and the sums, the least that holds `output`.
    pub fn dtype_towards(&self, output: DType) -> Result<DType> {
        match output {
            output if output == self.dtype => Ok(output),
            DType::F64 => Ok(DType::F64),
            DType::F32 | DType::F16 | DType::BF16 => Ok(self.stats_dtype()),
            other => bail!(
                "{}: output dtype: expected f32, f16, bf16 or f64, got {}",
                self.op_name(),
                other.as_str()
            ),
        }
    }

    /// How many means a forward pass keeps: they come before the rstds of all rows. RMSNorm has none.
    pub fn means(&self) -> usize {
        if self.remove_mean { self.rows } else { 0 }
    }

    /// What is added to the weight: 1 to one that is centred at 0.
    pub fn weight_offset(&self) -> f64 {
        f64::from(u8::from(self.weight && self.zero_centered_weight))
    }

    /// Whether there is nothing to normalise.
    pub fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }
}

/// Of the dims of xs that are not 0: 16 bytes, as two f64 statistics have, of as many do not overflow an `isize`.
const MAX_ELEMENTS: usize = isize::MAX as usize / 16;

/// Which gradients a backward pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The gradient of xs.
    pub dx: bool,
    /// The gradient of weight.
    pub dweight: bool,
    /// The gradient of bias.
    pub dbias: bool,
}

/// The op's name in errors: `layer-norm` or `rms-norm`.
pub(crate) fn op_name(remove_mean: bool) -> &'static str {
    if remove_mean {
        "layer-norm"
    } else {
        "rms-norm"
    }
}

/// Runs `$body` with `$t` bound to the Rust type of xs, and `$p` to that of weight and bias. `$backend` is for the error.
macro_rules! dispatch {
    ($backend:literal, $problem:expr, $t:ident => $body:expr) => {{
        use candle_core::DType::{BF16, F16, F32, F64};
        match $problem.dtype {
            F32 => dispatch!(@ $t = f32, $body),
            F64 => dispatch!(@ $t = f64, $body),
            F16 => dispatch!(@ $t = half::f16, $body),
            BF16 => dispatch!(@ $t = half::bf16, $body),
            x => candle_core::bail!(
                "{}: xs: no {} kernel for dtype {}", $problem.op_name(), $backend, x.as_str()
            ),
        }
    }};
    ($backend:literal, $problem:expr, $t:ident, $p:ident => $body:expr) => {{
        use candle_core::DType::{BF16, F16, F32, F64};
        match ($problem.dtype, $problem.param_dtype) {
            (F32, F32) => dispatch!(@ $t = f32, $p = f32, $body),
            (F64, F64) => dispatch!(@ $t = f64, $p = f64, $body),
            (F16, F16) => dispatch!(@ $t = half::f16, $p = half::f16, $body),
            (F16, F32) => dispatch!(@ $t = half::f16, $p = f32, $body),
            (BF16, BF16) => dispatch!(@ $t = half::bf16, $p = half::bf16, $body),
            (BF16, F32) => dispatch!(@ $t = half::bf16, $p = f32, $body),
            (x, p) => candle_core::bail!(
                "{}: xs: no {} kernel for dtype {} with weight of {}",
                $problem.op_name(), $backend, x.as_str(), p.as_str()
            ),
        }
    }};
    (@ $t:ident = $xs:ty, $body:expr) => {{
        type $t = $xs;
        $body
    }};
    (@ $t:ident = $xs:ty, $p:ident = $params:ty, $body:expr) => {{
        type $t = $xs;
        type $p = $params;
        $body
    }};
}
pub(crate) use dispatch;
