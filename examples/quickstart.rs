//! The smallest model with a LayerNorm: how many of its variables learn with candle-nn's layer and with this crate's.
//!
//! `cargo run --release --example quickstart`

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap, linear, loss::mse, seq};

/// Linear -> norm -> Linear, the norm built by `norm`.
fn model<N: Module + 'static>(
    norm: impl Fn(usize, f64, VarBuilder) -> Result<N>,
) -> Result<(VarMap, impl Module)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let model = seq()
        .add(linear(8, 64, vb.pp("input"))?)
        .add(norm(64, 1e-5, vb.pp("norm"))?)
        .add(linear(64, 1, vb.pp("output"))?);
    Ok((varmap, model))
}

fn print_gradients(name: &str, varmap: &VarMap, loss: &Tensor) -> Result<()> {
    let grads = loss.backward()?;
    let vars = varmap.all_vars();
    let learning = vars.iter().filter(|var| grads.get(var).is_some()).count();
    println!("{name}: {learning} of {} variables", vars.len());
    Ok(())
}

fn main() -> Result<()> {
    let xs = Tensor::randn(0f32, 1., (256, 8), &Device::Cpu)?;
    let target = xs.sqr()?.sum_keepdim(1)?;

    println!("Variables that receive a gradient:");
    let (varmap, theirs) = model(candle_nn::layer_norm)?;
    print_gradients("candle_nn", &varmap, &mse(&theirs.forward(&xs)?, &target)?)?;
    let (varmap, ours) = model(candle_fused_layer_norm::layer_norm)?;
    print_gradients("this crate", &varmap, &mse(&ours.forward(&xs)?, &target)?)?;

    println!("Training with this crate's:");
    let mut opt = AdamW::new_lr(varmap.all_vars(), 1e-2)?;
    for step in 0..=100u32 {
        let loss = mse(&ours.forward(&xs)?, &target)?;
        if step.is_multiple_of(20) {
            println!("step {step:3}: loss {:.3}", loss.to_scalar::<f32>()?);
        }
        opt.backward_step(&loss)?;
    }
    Ok(())
}
