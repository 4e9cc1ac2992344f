//! One call of the op with its data, and how it is run.

use super::compare::{Values, assert_close};
use super::data::{normal, normals, rng, rounded, tensor};
use super::oracle::{Arguments, Oracle};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_layer_norm::bench::{self, Choice};
use candle_fused_layer_norm::{NormConfig, ops};
use rand::rngs::StdRng;
use std::fmt;

/// Which function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    LayerNorm,
    NoBias,
    NoAffine,
    RmsNorm,
    /// Weight and bias, multiplied by 1 + weight.
    ZeroCentered,
    /// Gemma's.
    ZeroCenteredRmsNorm,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::LayerNorm,
        Self::NoBias,
        Self::NoAffine,
        Self::RmsNorm,
        Self::ZeroCentered,
        Self::ZeroCenteredRmsNorm,
    ];

    pub fn has_weight(self) -> bool {
        self != Self::NoAffine
    }

    pub fn has_bias(self) -> bool {
        matches!(self, Self::LayerNorm | Self::ZeroCentered)
    }

    pub fn removes_mean(self) -> bool {
        !matches!(self, Self::RmsNorm | Self::ZeroCenteredRmsNorm)
    }

    pub fn has_zero_centered_weight(self) -> bool {
        matches!(self, Self::ZeroCentered | Self::ZeroCenteredRmsNorm)
    }

    pub fn config(self, eps: f32) -> NormConfig {
        NormConfig {
            eps: f64::from(eps),
            remove_mean: self.removes_mean(),
            bias: self.has_bias(),
            zero_centered_weight: self.has_zero_centered_weight(),
        }
    }

    /// Calls the crate's function of this kind.
    pub fn apply(
        self,
        xs: &Tensor,
        normalized_shape: &[usize],
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Result<Tensor> {
        match (self, weight, bias) {
            (Self::LayerNorm, Some(weight), Some(bias)) => ops::layer_norm(xs, weight, bias, eps),
            (Self::NoBias, Some(weight), None) => ops::layer_norm_no_bias(xs, weight, eps),
            (Self::NoAffine, None, None) => ops::layer_norm_no_affine(xs, normalized_shape, eps),
            (Self::RmsNorm, Some(weight), None) => ops::rms_norm(xs, weight, eps),
            (Self::ZeroCentered, Some(_), Some(_)) | (Self::ZeroCenteredRmsNorm, Some(_), None) => {
                ops::normalize(xs, normalized_shape, weight, bias, &self.config(eps))
            }
            _ => panic!("{self:?} does not take these arguments"),
        }
    }
}

/// dtypes of xs, and of weight and bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtypes {
    pub xs: DType,
    pub params: DType,
}

impl Dtypes {
    pub const F32: Self = Self::same(DType::F32);
    pub const F64: Self = Self::same(DType::F64);
    pub const F16: Self = Self::same(DType::F16);
    pub const BF16: Self = Self::same(DType::BF16);
    pub const F16_F32: Self = Self {
        xs: DType::F16,
        params: DType::F32,
    };
    pub const BF16_F32: Self = Self {
        xs: DType::BF16,
        params: DType::F32,
    };
    pub const ALL: [Self; 6] = [
        Self::F32,
        Self::F64,
        Self::F16,
        Self::BF16,
        Self::F16_F32,
        Self::BF16_F32,
    ];

    const fn same(dtype: DType) -> Self {
        Self {
            xs: dtype,
            params: dtype,
        }
    }
}

/// One call: arguments, and the upstream gradient that its result receives.
#[derive(Debug, Clone)]
pub struct Case {
    pub kind: Kind,
    pub dtypes: Dtypes,
    /// Shape of xs.
    pub shape: Vec<usize>,
    /// How many trailing dims are normalised.
    pub normalized_dims: usize,
    pub eps: f32,
    pub x: Vec<f64>,
    pub weight: Option<Vec<f64>>,
    pub bias: Option<Vec<f64>>,
    pub dy: Vec<f64>,
}

/// Finds data of a case, if it has them.
pub type Field = fn(&mut Case) -> Option<&mut Vec<f64>>;

/// The result of a call and the gradients of those of its arguments that were tracked.
#[derive(Debug)]
pub struct Outputs {
    pub y: Tensor,
    pub dx: Option<Tensor>,
    pub dweight: Option<Tensor>,
    pub dbias: Option<Tensor>,
}

/// Which arguments are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracked {
    pub xs: bool,
    pub weight: bool,
    pub bias: bool,
}

impl Tracked {
    pub const ALL: Self = Self {
        xs: true,
        weight: true,
        bias: true,
    };
    pub const NONE: Self = Self {
        xs: false,
        weight: false,
        bias: false,
    };
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dtypes { xs, params } = self.dtypes;
        write!(
            f,
            "{:?} of {:?} over {:?}, xs {xs:?}, weight and bias {params:?}",
            self.kind,
            self.shape,
            self.normalized_shape()
        )
    }
}

impl Case {
    /// Random data that depends on the arguments alone. Rows differ in mean and spread, so that a row that is
    /// normalised with another's statistics is wrong.
    pub fn random(kind: Kind, dtypes: Dtypes, shape: &[usize], normalized_dims: usize) -> Self {
        Self::with_rows(kind, dtypes, shape, normalized_dims, |rng, row| {
            let (mean, std) = (0.4 * (row % 5) as f64 - 0.6, 0.5 + (row % 3) as f64);
            mean + std * normal(rng)
        })
    }

    /// As [`Case::random`], with the elements of x from `x(rng, row)`.
    pub fn with_rows(
        kind: Kind,
        dtypes: Dtypes,
        shape: &[usize],
        normalized_dims: usize,
        mut x: impl FnMut(&mut StdRng, usize) -> f64,
    ) -> Self {
        let elements: usize = shape.iter().product();
        let cols: usize = shape[shape.len() - normalized_dims..].iter().product();
        let mut rng = rng((elements * 31 + cols) as u64);
        let x = (0..elements)
            .map(|index| x(&mut rng, index / cols))
            .collect();
        let dy = normals(&mut rng, elements);
        // 1 + weight of a half type has digits below it, which must not be lost.
        let mean = if kind.has_zero_centered_weight() {
            -0.2
        } else {
            0.8
        };
        let weight = (0..cols).map(|_| mean + 0.5 * normal(&mut rng)).collect();
        let bias = normals(&mut rng, cols);
        Self {
            kind,
            dtypes,
            shape: shape.to_vec(),
            normalized_dims,
            eps: 1e-5,
            x: rounded(x, dtypes.xs),
            weight: kind.has_weight().then(|| rounded(weight, dtypes.params)),
            bias: kind.has_bias().then(|| rounded(bias, dtypes.params)),
            dy: rounded(dy, dtypes.xs),
        }
    }

    pub fn normalized_shape(&self) -> &[usize] {
        &self.shape[self.shape.len() - self.normalized_dims..]
    }

    pub fn cols(&self) -> usize {
        self.normalized_shape().iter().product()
    }

    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len() - self.normalized_dims]
            .iter()
            .product()
    }

    pub fn oracle(&self) -> Oracle<'_> {
        Oracle::new(self.arguments())
    }

    pub fn arguments(&self) -> Arguments<'_> {
        Arguments {
            rows: self.rows(),
            cols: self.cols(),
            x: &self.x,
            weight: self.weight.as_deref(),
            bias: self.bias.as_deref(),
            dy: &self.dy,
            remove_mean: self.kind.removes_mean(),
            zero_centered_weight: self.kind.has_zero_centered_weight(),
            eps: f64::from(self.eps),
            smallest_normal: match self.dtypes.xs {
                DType::F64 => f64::MIN_POSITIVE,
                _ => f32::MIN_POSITIVE.into(),
            },
        }
    }

    pub fn xs(&self, device: &Device) -> Result<Tensor> {
        tensor(&self.x, self.shape.as_slice(), self.dtypes.xs, device)
    }

    pub fn dy(&self, device: &Device) -> Result<Tensor> {
        tensor(&self.dy, self.shape.as_slice(), self.dtypes.xs, device)
    }

    pub fn weight(&self, device: &Device) -> Result<Option<Tensor>> {
        self.param(self.weight.as_deref(), device)
    }

    pub fn bias(&self, device: &Device) -> Result<Option<Tensor>> {
        self.param(self.bias.as_deref(), device)
    }

    fn param(&self, values: Option<&[f64]>, device: &Device) -> Result<Option<Tensor>> {
        values
            .map(|values| tensor(values, self.normalized_shape(), self.dtypes.params, device))
            .transpose()
    }

    /// Calls the crate's function on these tensors.
    pub fn apply(
        &self,
        xs: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.kind
            .apply(xs, self.normalized_shape(), weight, bias, self.eps)
    }

    /// The result of the call with nothing tracked.
    pub fn forward(&self, device: &Device) -> Result<Tensor> {
        let (weight, bias) = (self.weight(device)?, self.bias(device)?);
        self.apply(&self.xs(device)?, weight.as_ref(), bias.as_ref())
    }

    /// The result and all gradients of the call.
    pub fn gradients(&self, device: &Device) -> Result<Outputs> {
        self.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
            self.apply(xs, weight, bias)
        })
    }

    /// As `forward`, by the kernels of larger tensors, if the case is so small that CUDA has kernels of their own for it.
    pub fn forward_as_of_larger(&self, device: &Device) -> Result<Option<Tensor>> {
        self.as_of_larger(device, false, || self.forward(device))
    }

    /// As `gradients`, in the same way, if either pass has such kernels.
    pub fn gradients_as_of_larger(&self, device: &Device) -> Result<Option<Outputs>> {
        self.as_of_larger(device, true, || self.gradients(device))
    }

    fn as_of_larger<T>(
        &self,
        device: &Device,
        goes_back: bool,
        f: impl FnOnce() -> Result<T>,
    ) -> Result<Option<T>> {
        if !device.is_cuda() || self.x.is_empty() {
            return Ok(None);
        }
        let larger = |choices: Vec<Choice>| {
            let small = |choice: &Choice| {
                choice.entry.contains("_small_") || choice.entry.starts_with("backward_strips")
            };
            small(&choices[0]).then(|| {
                let larger = choices.iter().copied().find(|choice| !small(choice));
                larger.unwrap_or_else(|| panic!("{self}: {choices:?}"))
            })
        };
        let [forward, backward] = self.choices(device)?.map(larger);
        let backward = backward.filter(|_| goes_back);
        if forward.is_none() && backward.is_none() {
            return Ok(None);
        }
        bench::forced(forward, backward, f).map(Some)
    }

    /// What the forward and the backward pass may choose from on a CUDA device, the built-in plan's choice first.
    #[cfg(feature = "cuda")]
    pub fn choices(&self, device: &Device) -> Result<[Vec<Choice>; 2]> {
        let xs = self.xs(device)?;
        // Kernels of no weight are those of one in the dtype of xs.
        let params = match self.kind.has_weight() {
            true => self.dtypes.params,
            false => self.dtypes.xs,
        };
        let weight = Tensor::ones(self.normalized_shape(), params, device)?;
        Ok([
            bench::forward_candidates(&xs, &weight, &weight)?.choices,
            bench::backward_candidates(&xs, &weight, &xs)?.choices,
        ])
    }

    #[cfg(not(feature = "cuda"))]
    pub fn choices(&self, _: &Device) -> Result<[Vec<Choice>; 2]> {
        candle_core::bail!("built without feature cuda")
    }

    /// The result and the gradients of `f`, a function of (xs, weight, bias).
    pub fn gradients_of(
        &self,
        device: &Device,
        tracked: Tracked,
        f: impl FnOnce(&Tensor, Option<&Tensor>, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Outputs> {
        let track = |tensor: Tensor, tracked| -> Result<Tensor> {
            Ok(if tracked {
                Var::from_tensor(&tensor)?.into_inner()
            } else {
                tensor
            })
        };
        let xs = track(self.xs(device)?, tracked.xs)?;
        let weight = self
            .weight(device)?
            .map(|w| track(w, tracked.weight))
            .transpose()?;
        let bias = self
            .bias(device)?
            .map(|b| track(b, tracked.bias))
            .transpose()?;
        let y = f(&xs, weight.as_ref(), bias.as_ref())?;
        let grads = loss(&y, &self.dy(device)?)?.backward()?;
        let of = |tensor: &Tensor| grads.get(tensor).cloned();
        Ok(Outputs {
            dx: of(&xs),
            dweight: weight.as_ref().and_then(of),
            dbias: bias.as_ref().and_then(of),
            y,
        })
    }

    /// Central differences of `f` along each element of `field`.
    pub fn finite_differences(
        &self,
        field: Field,
        f: impl Fn(&Self) -> anyhow::Result<f64>,
    ) -> anyhow::Result<Vec<f64>> {
        const STEP: f64 = 1e-5;
        let len = field(&mut self.clone()).map_or(0, |values| values.len());
        (0..len)
            .map(|index| {
                let moved = |step| {
                    let mut case = self.clone();
                    if let Some(values) = field(&mut case) {
                        values[index] += step;
                    }
                    f(&case)
                };
                Ok((moved(STEP)? - moved(-STEP)?) / (2. * STEP))
            })
            .collect()
    }

    /// Holds a result and the gradients of `tracked` against the oracle.
    #[track_caller]
    pub fn check(&self, device: &Device, tracked: Tracked, outputs: &Outputs) {
        let case = format!("{self} on {:?}", device.location());
        self.check_against(&case, &self.oracle(), tracked, outputs);
    }

    /// The same by another name of the call, against an oracle of this case.
    #[track_caller]
    pub fn check_against(
        &self,
        case: &impl fmt::Display,
        oracle: &Oracle<'_>,
        tracked: Tracked,
        outputs: &Outputs,
    ) {
        let check = |output: &str,
                     got: &Option<Tensor>,
                     wanted: bool,
                     want: &dyn Fn() -> Values,
                     shape: &[usize],
                     dtype| {
            match (got, wanted) {
                (None, false) => {}
                (Some(_), false) => panic!("{case}: {output}: computed for an untracked argument"),
                (None, true) => panic!("{case}: {output}: no gradient for a tracked argument"),
                (Some(got), true) => {
                    assert_eq!(
                        (got.dims(), got.dtype()),
                        (shape, dtype),
                        "{case}: {output}: shape and dtype"
                    );
                    assert_close(case, output, got, &want());
                }
            }
        };
        let Dtypes { xs, params } = self.dtypes;
        let y = Some(outputs.y.clone());
        check("y", &y, true, &|| oracle.y(), &self.shape, xs);
        check(
            "dx",
            &outputs.dx,
            tracked.xs,
            &|| oracle.dx(),
            &self.shape,
            xs,
        );
        let dweight = tracked.weight && self.kind.has_weight();
        check(
            "dweight",
            &outputs.dweight,
            dweight,
            &|| oracle.dweight(),
            self.normalized_shape(),
            params,
        );
        let dbias = tracked.bias && self.kind.has_bias();
        check(
            "dbias",
            &outputs.dbias,
            dbias,
            &|| oracle.dbias(),
            self.normalized_shape(),
            params,
        );
    }
}

/// A loss whose gradient with respect to `y` is `dy`, exactly: the upstream gradient of a test is random, since with
/// a uniform weight the dx of a plain sum is zero whatever the op does.
pub fn loss(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    (y * dy)?.sum_all()
}
