//! `grad_audit` tells variables that learn from those that do not.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_fused_layer_norm::{GradAudit, grad_audit};
use candle_nn::{Init, VarBuilder, VarMap, linear};

/// A variable `name` of four elements of `value`.
fn var(varmap: &VarMap, name: &str, value: f64, dtype: DType) -> Result<Tensor> {
    varmap.get(4, name, Init::Const(value), dtype, &Device::Cpu)
}

/// The audit of a loss in which each variable has another fate.
fn audit(dtype: DType) -> Result<GradAudit> {
    let varmap = VarMap::new();
    let good = var(&varmap, "good", 2., dtype)?;
    let zero = var(&varmap, "zero", 2., dtype)?;
    let nan = var(&varmap, "nan", 2., dtype)?;
    let infinite = var(&varmap, "infinite", 0., dtype)?;
    var(&varmap, "unused", 2., dtype)?;
    let cut = var(&varmap, "cut", 2., dtype)?;
    let one_nan = Tensor::new(&[1f32, f32::NAN, 1., 1.], &Device::Cpu)?.to_dtype(dtype)?;
    let loss = (good.sqr()?.sum_all()?
        + (&zero * zero.zeros_like()?.detach())?.sum_all()?
        + (nan * one_nan)?.sum_all()?
        + infinite.recip()?.sum_all()?
        + cut.detach().sum_all()?)?;
    grad_audit(&varmap, &loss.backward()?)
}

#[test]
fn each_variable_is_in_its_list() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let audit = audit(dtype)?;
        assert_eq!((audit.with_gradient(), audit.variables()), (4, 6));
        assert_eq!(audit.missing(), ["cut", "unused"]);
        assert_eq!(audit.zero(), ["zero"]);
        assert_eq!(audit.not_finite(), ["infinite", "nan"]);
        assert!(!audit.is_ok());
        assert_eq!(
            audit.to_string(),
            "4 of 6 variables; without a gradient: cut, unused; all zero: zero; not finite: infinite, nan"
        );
    }
    Ok(())
}

#[test]
fn nothing_to_find_is_ok() -> Result<()> {
    let varmap = VarMap::new();
    let loss = var(&varmap, "good", 2., DType::F32)?.sqr()?.sum_all()?;
    let found = grad_audit(&varmap, &loss.backward()?)?;
    assert!(found.is_ok());
    assert_eq!(found.to_string(), "1 of 1 variables");
    let empty = grad_audit(&VarMap::new(), &loss.backward()?)?;
    assert!(empty.is_ok());
    assert_eq!(empty.to_string(), "0 of 0 variables");
    Ok(())
}

#[test]
fn it_finds_what_candle_nns_norm_cuts_off() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let up = linear(8, 16, vb.pp("up"))?;
    let norm = candle_nn::layer_norm(16, 1e-5, vb.pp("norm"))?;
    let down = linear(16, 1, vb.pp("down"))?;
    let xs = Tensor::randn(0f32, 1., (4, 8), &Device::Cpu)?;
    let hidden = up.forward(&xs)?;
    let grads = |norm: &dyn Module| {
        down.forward(&norm.forward(&hidden)?)?
            .sqr()?
            .sum_all()?
            .backward()
    };
    let audit = grad_audit(&varmap, &grads(&norm)?)?;
    assert_eq!(
        audit.missing(),
        ["norm.bias", "norm.weight", "up.bias", "up.weight"]
    );
    let fused = candle_fused_layer_norm::LayerNorm::from(norm);
    assert!(grad_audit(&varmap, &grads(&fused)?)?.is_ok());
    Ok(())
}
