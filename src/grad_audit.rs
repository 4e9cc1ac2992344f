//! Which variables a loss reaches.

use candle_core::{DType, Result, Tensor, backprop::GradStore};
use candle_nn::VarMap;
use std::{collections::BTreeMap, fmt, sync::PoisonError};

/// What [`grad_audit`] found. Names are in alphabetical order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GradAudit {
    variables: usize,
    missing: Vec<String>,
    zero: Vec<String>,
    not_finite: Vec<String>,
}

impl GradAudit {
    /// The number of variables in the map.
    pub fn variables(&self) -> usize {
        self.variables
    }

    /// The number of variables that got a gradient.
    pub fn with_gradient(&self) -> usize {
        self.variables - self.missing.len()
    }

    /// The variables that got no gradient: an optimizer never changes them.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// The variables whose gradient is zero in every element, those without elements included.
    pub fn zero(&self) -> &[String] {
        &self.zero
    }

    /// The variables whose gradient has an infinite element or a NaN.
    pub fn not_finite(&self) -> &[String] {
        &self.not_finite
    }

    /// Whether every variable got a gradient, finite and not all zero.
    pub fn is_ok(&self) -> bool {
        self.missing.is_empty() && self.zero.is_empty() && self.not_finite.is_empty()
    }
}

/// `5 of 7 variables`, then the names of those that need a look.
impl fmt::Display for GradAudit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} of {} variables",
            self.with_gradient(),
            self.variables
        )?;
        for (what, names) in [
            ("without a gradient", &self.missing),
            ("all zero", &self.zero),
            ("not finite", &self.not_finite),
        ] {
            if !names.is_empty() {
                write!(f, "; {what}: {}", names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// Looks up the gradient of each variable in `varmap`: how many there are, which are missing, zero or not finite.
///
/// Worth a call after the first `backward` of a new model: candle leaves out without an error what a loss does not reach,
/// or what an op without a backward pass cut off, and the loss falls all the same.
///
/// | argument | |
/// |---|---|
/// | `varmap` | variables of any shape, device and float dtype |
/// | `grads` | what `backward` returned |
///
/// The largest magnitude of each gradient is reduced on its device in its own dtype, and read by the host.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_fused_layer_norm::grad_audit;
/// use candle_nn::{VarBuilder, VarMap, linear};
/// # fn main() -> candle_core::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let (used, _unused) = (linear(3, 2, vb.pp("used"))?, linear(3, 2, vb.pp("unused"))?);
/// let loss = used.forward(&Tensor::ones((1, 3), DType::F32, &Device::Cpu)?)?.sum_all()?;
///
/// let audit = grad_audit(&varmap, &loss.backward()?)?;
/// assert_eq!((audit.with_gradient(), audit.variables()), (2, 4));
/// assert_eq!(audit.missing(), ["unused.bias", "unused.weight"]);
/// assert!(audit.zero().is_empty() && audit.not_finite().is_empty());
/// assert_eq!(
///     audit.to_string(),
///     "2 of 4 variables; without a gradient: unused.bias, unused.weight"
/// );
/// # Ok(()) }
/// ```
///
/// # Errors
/// Those of candle's reductions, such as a device that is lost.
pub fn grad_audit(varmap: &VarMap, grads: &GradStore) -> Result<GradAudit> {
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let vars: BTreeMap<_, _> = vars.iter().collect();
    let mut audit = GradAudit {
        variables: vars.len(),
        ..GradAudit::default()
    };
    for (name, var) in vars {
        let list = match grads.get(var) {
            None => &mut audit.missing,
            Some(grad) => {
                let magnitude = magnitude(grad)?;
                if magnitude == 0. {
                    &mut audit.zero
                } else if magnitude.is_finite() {
                    continue;
                } else {
                    &mut audit.not_finite
                }
            }
        };
        list.push(name.clone());
    }
    Ok(audit)
}

/// The largest magnitude in `grad`, 0 if it is empty, NaN or infinite if an element is.
fn magnitude(grad: &Tensor) -> Result<f64> {
    if grad.elem_count() == 0 {
        return Ok(0.);
    }
    let grad = grad.flatten_all()?;
    let max = grad
        .abs()?
        .max(0)?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?;
    // A maximum may pass over NaN, a product with zero does not.
    let nan = (grad * 0.)?
        .sum_all()?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?;
    Ok(max + nan)
}
