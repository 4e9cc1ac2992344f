//! AdamW over one flat f32 vector of all parameters.
//!
//! Flat, because then clipping, the average over GPUs and the update are a few ops, not a few for each variable, and
//! because the f32 master weights that bf16 and f16 need are the vector itself. candle-nn's AdamW keeps its moments in the
//! dtype of the variable, has one weight decay for all of them, and does not let its moments be saved.

use crate::{model::named_vars, settings::Settings};
use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore};
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const EPS: f64 = 1e-8;

/// The vectors are padded to rows of this length: candle sums each row in a block of its own on CUDA, but all of a vector
/// in a single one.
const ROW: usize = 1024;

struct Slot {
    name: String,
    var: Var,
    start: usize,
}

pub struct AdamW {
    slots: Vec<Slot>,
    len: usize,
    device: Device,
    /// f32, whatever the dtype of the variables.
    weights: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    /// Which variables got a gradient in the last step, and the weight decay of each element: 0 where there was none.
    decay: Option<(Vec<bool>, Tensor)>,
    updates: usize,
    settings: Settings,
}

/// What a checkpoint holds of an optimizer, each variable under its name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    pub updates: usize,
    pub shapes: BTreeMap<String, Vec<usize>>,
    pub weights: BTreeMap<String, Vec<f32>>,
    pub first_moment: BTreeMap<String, Vec<f32>>,
    pub second_moment: BTreeMap<String, Vec<f32>>,
}

impl AdamW {
    pub fn new(varmap: &VarMap, settings: &Settings, device: &Device) -> Result<Self> {
        let mut start = 0;
        let mut slots = Vec::new();
        for (name, var) in named_vars(varmap) {
            let len = var.elem_count();
            slots.push(Slot { name, var, start });
            start += len;
        }
        let len = start.next_multiple_of(ROW);
        let zeros = Tensor::zeros(len, DType::F32, device)?;
        let mut this = Self {
            slots,
            len,
            device: device.clone(),
            weights: zeros.clone(),
            first_moment: zeros.clone(),
            second_moment: zeros,
            decay: None,
            updates: 0,
            settings: settings.clone(),
        };
        this.weights = this.flatten(|slot| Ok(Some(slot.var.as_tensor().clone())))?;
        Ok(this)
    }

    /// The tensors of all variables one after another in f32, zeros where there is none and in the padding.
    fn flatten(&self, tensor: impl Fn(&Slot) -> Result<Option<Tensor>>) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(self.slots.len() + 1);
        for slot in &self.slots {
            parts.push(match tensor(slot)? {
                Some(tensor) => tensor.detach().flatten_all()?,
                None => slot.var.zeros_like()?.flatten_all()?,
            });
        }
        let (used, dtype) = parts.iter().fold((0, DType::F32), |(used, _), part| {
            (used + part.elem_count(), part.dtype())
        });
        if used < self.len {
            parts.push(Tensor::zeros(self.len - used, dtype, &self.device)?);
        }
        Tensor::cat(&parts, 0)?.to_dtype(DType::F32)
    }

    /// The gradients as a flat vector in f32.
    pub fn flatten_gradients(&mut self, grads: &GradStore) -> Result<Tensor> {
        let present: Vec<bool> = self
            .slots
            .iter()
            .map(|slot| grads.get(&slot.var).is_some())
            .collect();
        if self.decay.as_ref().is_none_or(|(last, _)| *last != present) {
            let decay: Vec<f32> = self
                .slots
                .iter()
                .zip(&present)
                .flat_map(|(slot, &present)| {
                    let decays = present && slot.var.rank() >= 2;
                    let decay = if decays {
                        self.settings.weight_decay
                    } else {
                        0.
                    };
                    std::iter::repeat_n(decay as f32, slot.var.elem_count())
                })
                .chain(std::iter::repeat(0.))
                .take(self.len)
                .collect();
            self.decay = Some((present, Tensor::from_vec(decay, self.len, &self.device)?));
        }
        self.flatten(|slot| Ok(grads.get(&slot.var).cloned()))
    }

    /// The norm of all gradients together, a scalar on the device.
    pub fn norm(&self, grads: &Tensor) -> Result<Tensor> {
        let rows = grads.reshape((self.len / ROW, ROW))?;
        rows.sqr()?.sum(1)?.sum(0)?.sqrt()
    }

    /// One update by `grads`, flat, of norm `norm`. Nothing of it waits for the device.
    pub fn step(&mut self, grads: &Tensor, norm: &Tensor, learning_rate: f64) -> Result<()> {
        let Settings {
            clip, beta1, beta2, ..
        } = self.settings;
        self.updates += 1;
        // clip / max(norm, clip)
        let scale = (norm / clip)?
            .affine(1., -1.)?
            .relu()?
            .affine(1., 1.)?
            .recip()?;
        let grads = grads.broadcast_mul(&scale)?;
        self.first_moment = ((&self.first_moment * beta1)? + (&grads * (1. - beta1))?)?;
        self.second_moment = ((&self.second_moment * beta2)? + (grads.sqr()? * (1. - beta2))?)?;
        let bias1 = 1. - beta1.powi(self.updates as i32);
        let bias2 = 1. - beta2.powi(self.updates as i32);
        let denominator = ((&self.second_moment / bias2)?.sqrt()? + EPS)?;
        let mut update = ((&self.first_moment / bias1)? / denominator)?;
        if let Some((_, decay)) = &self.decay {
            update = (update + (&self.weights * decay)?)?;
        }
        self.weights = (&self.weights - (update * learning_rate)?)?;
        self.write_vars()
    }

    fn write_vars(&self) -> Result<()> {
        let Some(dtype) = self.slots.first().map(|slot| slot.var.dtype()) else {
            return Ok(());
        };
        let weights = self.weights.to_dtype(dtype)?;
        for Slot { var, start, .. } in &self.slots {
            let value = weights.narrow(0, *start, var.elem_count())?;
            var.set(&value.reshape(var.shape())?)?;
        }
        Ok(())
    }

    /// The f32 weights of all variables, flat.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    pub fn state(&self) -> Result<OptimizerState> {
        let split = |flat: &Tensor| -> Result<BTreeMap<String, Vec<f32>>> {
            let flat: Vec<f32> = flat.to_vec1()?;
            let part = |slot: &Slot| flat[slot.start..][..slot.var.elem_count()].to_vec();
            Ok(self
                .slots
                .iter()
                .map(|slot| (slot.name.clone(), part(slot)))
                .collect())
        };
        Ok(OptimizerState {
            updates: self.updates,
            shapes: self
                .slots
                .iter()
                .map(|slot| (slot.name.clone(), slot.var.dims().to_vec()))
                .collect(),
            weights: split(&self.weights)?,
            first_moment: split(&self.first_moment)?,
            second_moment: split(&self.second_moment)?,
        })
    }

    /// Goes on from `state`, which must have every variable.
    pub fn restore(&mut self, state: &OptimizerState) -> Result<()> {
        let join = |what: &str, parts: &BTreeMap<String, Vec<f32>>| -> Result<Tensor> {
            let mut flat = Vec::with_capacity(self.len);
            for slot in &self.slots {
                let expected = slot.var.elem_count();
                let given = parts.get(&slot.name).map_or(0, Vec::len);
                if given != expected {
                    candle_core::bail!(
                        "{what} of {}: expected {expected} numbers, got {given}",
                        slot.name
                    );
                }
                flat.extend_from_slice(&parts[&slot.name]);
            }
            if parts.len() != self.slots.len() {
                candle_core::bail!(
                    "{what}: expected {} variables, got {}",
                    self.slots.len(),
                    parts.len()
                );
            }
            flat.resize(self.len, 0.);
            Tensor::from_vec(flat, self.len, &self.device)
        };
        self.weights = join("weights", &state.weights)?;
        self.first_moment = join("first moments", &state.first_moment)?;
        self.second_moment = join("second moments", &state.second_moment)?;
        self.updates = state.updates;
        self.write_vars()
    }
}

/// Loss scaling for f16, whose gradients would vanish below 6e-8: doubled after many steps without an overflow, halved at
/// each overflow, whose step is skipped.
///
/// Source: Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    pub scale: f64,
    steps_since_change: usize,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            scale: 65536.,
            steps_since_change: 0,
        }
    }
}

impl LossScale {
    const GROW_AFTER: usize = 1000;
    const MAX: f64 = 16777216.;

    /// Whether gradients of this norm can be used.
    pub fn update(&mut self, norm: f64) -> bool {
        let usable = norm.is_finite();
        self.steps_since_change += 1;
        if !usable {
            (self.scale, self.steps_since_change) = ((self.scale / 2.).max(1.), 0);
        } else if self.steps_since_change == Self::GROW_AFTER {
            (self.scale, self.steps_since_change) = ((self.scale * 2.).min(Self::MAX), 0);
        }
        usable
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Preset;
    use candle_nn::{AdamW as CandleAdamW, Init, Optimizer, ParamsAdamW};

    fn settings(weight_decay: f64, clip: f64) -> Settings {
        Settings {
            weight_decay,
            clip,
            ..Preset::Quick.settings()
        }
    }

    fn varmap() -> VarMap {
        let varmap = VarMap::new();
        let device = &Device::Cpu;
        for (name, shape, value) in [("a", vec![3, 2], 0.5), ("b", vec![4], -0.25)] {
            let init = Init::Const(value);
            varmap.get(shape, name, init, DType::F32, device).unwrap();
        }
        varmap
    }

    fn loss(varmap: &VarMap) -> Tensor {
        let vars = named_vars(varmap);
        let a = (vars["a"].as_tensor() - 2.).unwrap().sqr().unwrap();
        let b = vars["b"].as_tensor().powf(3.).unwrap();
        (a.sum_all().unwrap() + b.sum_all().unwrap()).unwrap()
    }

    fn step(optimizer: &mut AdamW, varmap: &VarMap) -> f32 {
        let grads = loss(varmap).backward().unwrap();
        let grads = optimizer.flatten_gradients(&grads).unwrap();
        let norm = optimizer.norm(&grads).unwrap();
        optimizer.step(&grads, &norm, 0.01).unwrap();
        norm.to_scalar().unwrap()
    }

    fn values(varmap: &VarMap) -> Vec<f32> {
        let vars = named_vars(varmap);
        let values = |name: &str| vars[name].flatten_all().unwrap().to_vec1().unwrap();
        [values("a"), values("b")].concat()
    }

    #[test]
    fn without_clipping_it_is_candles_adamw_with_decay_on_matrices() {
        let (ours, theirs) = (varmap(), varmap());
        let mut optimizer = AdamW::new(&ours, &settings(0.1, 1e9), &Device::Cpu).unwrap();
        let vars = named_vars(&theirs);
        let adamw = |name: &str, weight_decay| {
            let params = ParamsAdamW {
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.99,
                eps: EPS,
                weight_decay,
            };
            CandleAdamW::new(vec![vars[name].clone()], params).unwrap()
        };
        let (mut a, mut b) = (adamw("a", 0.1), adamw("b", 0.));
        for _ in 0..20 {
            step(&mut optimizer, &ours);
            let grads = loss(&theirs).backward().unwrap();
            a.step(&grads).unwrap();
            b.step(&grads).unwrap();
        }
        for (ours, theirs) in values(&ours).into_iter().zip(values(&theirs)) {
            assert!((ours - theirs).abs() < 1e-5, "{ours} {theirs}");
        }
    }

    #[test]
    fn gradients_are_clipped_by_their_common_norm() {
        let varmap = varmap();
        let mut optimizer = AdamW::new(&varmap, &settings(0., 1.), &Device::Cpu).unwrap();
        let norm = step(&mut optimizer, &varmap);
        assert!(norm > 1., "{norm}");
        let state = optimizer.state().unwrap();
        let first = &state.first_moment;
        let clipped: f32 = first.values().flatten().map(|m| (10. * m).powi(2)).sum();
        assert!((clipped - 1.).abs() < 1e-5, "{clipped}");
    }

    #[test]
    fn a_variable_without_gradient_stays_as_it_is() {
        let varmap = varmap();
        let mut optimizer = AdamW::new(&varmap, &settings(0.1, 1.), &Device::Cpu).unwrap();
        let before = values(&varmap);
        let b = named_vars(&varmap)["b"].clone();
        let grads = b.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let grads = optimizer.flatten_gradients(&grads).unwrap();
        let norm = optimizer.norm(&grads).unwrap();
        optimizer.step(&grads, &norm, 0.01).unwrap();
        let after = values(&varmap);
        assert_eq!(before[..6], after[..6]);
        assert_ne!(before[6..], after[6..]);
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let (one, two) = (varmap(), varmap());
        let settings = settings(0.1, 1.);
        let mut first = AdamW::new(&one, &settings, &Device::Cpu).unwrap();
        for _ in 0..3 {
            step(&mut first, &one);
        }
        let mut second = AdamW::new(&two, &settings, &Device::Cpu).unwrap();
        second.restore(&first.state().unwrap()).unwrap();
        for _ in 0..3 {
            step(&mut first, &one);
            step(&mut second, &two);
        }
        assert_eq!(values(&one), values(&two));
        assert_eq!(first.state().unwrap(), second.state().unwrap());
    }

    #[test]
    fn the_loss_scale_halves_at_an_overflow_and_grows_after_calm() {
        let mut scale = LossScale::default();
        assert!(!scale.update(f64::INFINITY));
        assert!(!scale.update(f64::NAN));
        assert_eq!(scale.scale, 16384.);
        for _ in 0..LossScale::GROW_AFTER {
            assert_eq!(scale.scale, 16384.);
            assert!(scale.update(1.));
        }
        assert_eq!(scale.scale, 32768.);
        for _ in 0..100 {
            scale.update(f64::NAN);
        }
        assert_eq!(scale.scale, 1.);
        for _ in 0..100 * LossScale::GROW_AFTER {
            scale.update(1.);
        }
        assert_eq!(scale.scale, LossScale::MAX);
    }
}
