//! What candle's users reported, held as tests; the numbers are those of huggingface/candle's issues and patches.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Module, Shape, Tensor, Var};
use candle_fused_layer_norm::{
    LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{
    AdamW, Embedding, Init, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap, embedding, linear,
};
use common::case::{Case, Dtypes, Kind, Tracked, loss};
use common::compare::{assert_close, assert_same_bits};
use common::data::{bits, named_vars, normals, rng, tensor, values};
use common::devices::devices;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

/// Gives every matrix seeded values of standard deviation 1/sqrt(inputs): candle cannot seed its CPU generator.
fn seed(varmap: &VarMap, seed: u64) -> Result<()> {
    let mut rng = rng(seed);
    for var in named_vars(varmap).values() {
        if let [_, inputs] = *var.dims() {
            let values = normals(&mut rng, var.elem_count());
            let values = tensor(&values, var.shape(), var.dtype(), var.device())?;
            var.set(&(values / (inputs as f64).sqrt())?)?;
        }
    }
    Ok(())
}

fn random(shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let values = normals(&mut rng(11), shape.elem_count());
    Ok(tensor(&values, shape, DType::F32, device)?)
}

fn is_zero(tensor: &Tensor) -> Result<bool> {
    Ok(values(tensor)?.into_iter().all(|value| value == 0.))
}

/// A model that has every layer of this crate, with the layers of `$layers`: what a user's file is before and after
/// its `use` line is changed.
macro_rules! model_with {
    ($name:ident, $layers:ident) => {
        mod $name {
            use candle_core::{Module, Result, Tensor};
            use candle_nn::{Linear, VarBuilder, linear};
            use $layers::{
                LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
            };

            pub struct Model {
                first: LayerNorm,
                hidden: Linear,
                second: LayerNorm,
                third: RmsNorm,
                configured: LayerNorm,
                last: LayerNorm,
            }

            impl Model {
                pub fn new(width: usize, vb: VarBuilder) -> Result<Self> {
                    let config = LayerNormConfig {
                        eps: 1e-6,
                        ..Default::default()
                    };
                    let configured = layer_norm(width, config, vb.pp("configured"))?;
                    let bias = configured.bias().cloned().expect("the config is affine");
                    let last = LayerNorm::new(configured.weight().clone(), bias, configured.eps());
                    let third = rms_norm(width, 1e-5, vb.pp("third"))?;
                    assert_eq!((third.weight().dims(), third.eps()), (&[width][..], 1e-5));
                    assert!(!third.clone().into_inner().remove_mean());
                    Ok(Self {
                        first: layer_norm(width, 1e-5, vb.pp("first"))?,
                        hidden: linear(width, width, vb.pp("hidden"))?,
                        second: layer_norm_no_bias(width, 1e-5, vb.pp("second"))?,
                        third: RmsNorm::new(third.weight().clone(), third.eps()),
                        configured,
                        last,
                    })
                }
            }

            impl Module for Model {
                fn forward(&self, xs: &Tensor) -> Result<Tensor> {
                    let xs = xs
                        .apply(&self.first)?
                        .apply(&self.hidden)?
                        .apply(&self.second)?;
                    let xs = self.third.forward_diff(&xs)?.apply(&self.third)?;
                    xs.apply(&self.configured)?.apply(&self.last)
                }
            }
        }
    };
}

model_with!(model_of_candle_nn, candle_nn);
model_with!(model_of_this_crate, candle_fused_layer_norm);

#[test]
fn switching_a_models_import_is_enough() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = model_of_candle_nn::Model::new(48, vb.clone())?;
        let names: Vec<_> = named_vars(&varmap).into_keys().collect();
        let ours = model_of_this_crate::Model::new(48, vb)?;
        assert_eq!(
            named_vars(&varmap).into_keys().collect::<Vec<_>>(),
            names,
            "variables"
        );
        seed(&varmap, 5)?;

        let xs = random((3, 7, 48), device)?;
        let (theirs, ours) = (values(&theirs.forward(&xs)?)?, values(&ours.forward(&xs)?)?);
        for (index, (ours, theirs)) in ours.into_iter().zip(theirs).enumerate() {
            assert!(
                (ours - theirs).abs() < 1e-5,
                "y[{index}]: expected {theirs}, got {ours}"
            );
        }
    }
    Ok(())
}

#[test]
fn every_variable_around_a_layer_norm_gets_a_gradient_3011() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let before = linear(32, 64, vb.pp("before"))?;
        let norm = layer_norm(64, 1e-5, vb.pp("norm"))?;
        let after = linear(64, 8, vb.pp("after"))?;
        let y = random((4, 32), device)?
            .apply(&before)?
            .apply(&norm)?
            .apply(&after)?;
        let grads = loss(&y, &random((4, 8), device)?)?.backward()?;
        let vars = named_vars(&varmap);
        assert_eq!(vars.len(), 6);
        for (name, var) in vars {
            let gradient = grads
                .get(&var)
                .unwrap_or_else(|| panic!("{name}: no gradient"));
            assert!(!is_zero(gradient)?, "{name}: the gradient is zero");
        }
    }
    Ok(())
}

#[test]
fn gradients_equal_those_of_layer_norm_slow_2977_3613() -> Result<()> {
    for dtypes in [Dtypes::F32, Dtypes::F64] {
        let case = Case::random(Kind::LayerNorm, dtypes, &[6, 5, 64], 1);
        let oracle = case.oracle();
        let views: [fn(&Tensor) -> candle_core::Result<Tensor>; 2] = [
            |xs| Ok(xs.clone()),
            |xs| xs.transpose(0, 1)?.contiguous()?.transpose(0, 1),
        ];
        for device in devices() {
            for view in views {
                let params = "a layer norm has weight and bias";
                let fused = case.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
                    case.apply(&view(xs)?, weight, bias)
                })?;
                let slow = case.gradients_of(device, Tracked::ALL, |xs, weight, bias| {
                    let (weight, bias) = (weight.expect(params), bias.expect(params));
                    candle_nn::ops::layer_norm_slow(&view(xs)?, weight, bias, case.eps)
                })?;
                case.check(device, Tracked::ALL, &fused);
                for (output, fused, slow, want) in [
                    ("y", Some(fused.y), Some(slow.y), oracle.y()),
                    ("dx", fused.dx, slow.dx, oracle.dx()),
                    ("dweight", fused.dweight, slow.dweight, oracle.dweight()),
                    ("dbias", fused.dbias, slow.dbias, oracle.dbias()),
                ] {
                    let (fused, slow) = (
                        fused.expect("all is tracked"),
                        slow.expect("all is tracked"),
                    );
                    assert_close(&case, output, &fused, &want.expecting(&slow)?);
                }
            }
        }
    }
    Ok(())
}

/// A linear layer, frozen with a trained adapter of low rank beside it, or trained itself.
struct Adapted {
    base: Linear,
    adapter: Option<(Linear, Linear)>,
}

impl Adapted {
    fn new(
        inputs: usize,
        outputs: usize,
        vb: VarBuilder,
        lora: Option<VarBuilder>,
    ) -> Result<Self> {
        const RANK: usize = 4;
        let adapter = |lora: VarBuilder| -> Result<(Linear, Linear)> {
            let down = candle_nn::linear_no_bias(inputs, RANK, lora.pp("down"))?;
            let up = lora.get_with_hints((outputs, RANK), "up", Init::Const(0.))?;
            Ok((down, Linear::new(up, None)))
        };
        Ok(Self {
            base: linear(inputs, outputs, vb)?,
            adapter: lora.map(adapter).transpose()?,
        })
    }
}

impl Module for Adapted {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let ys = xs.apply(&self.base)?;
        match &self.adapter {
            None => Ok(ys),
            Some((down, up)) => ys + xs.apply(down)?.apply(up)?,
        }
    }
}

/// A GPT of one block and one head.
struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    norm_1: LayerNorm,
    qkv: Adapted,
    project: Adapted,
    norm_2: LayerNorm,
    up: Adapted,
    down: Adapted,
    norm_3: LayerNorm,
    head: Linear,
}

const CYCLE: usize = 25;
const CONTEXT: usize = 12;
const WIDTH: usize = 32;

impl Gpt {
    fn new(vb: &VarBuilder, lora: Option<&VarBuilder>) -> Result<Self> {
        let adapted = |name: &str, inputs, outputs| {
            Adapted::new(inputs, outputs, vb.pp(name), lora.map(|lora| lora.pp(name)))
        };
        Ok(Self {
            tokens: embedding(CYCLE, WIDTH, vb.pp("tokens"))?,
            positions: embedding(CONTEXT, WIDTH, vb.pp("positions"))?,
            norm_1: layer_norm(WIDTH, 1e-5, vb.pp("norm_1"))?,
            qkv: adapted("qkv", WIDTH, 3 * WIDTH)?,
            project: adapted("project", WIDTH, WIDTH)?,
            norm_2: layer_norm(WIDTH, 1e-5, vb.pp("norm_2"))?,
            up: adapted("up", WIDTH, 4 * WIDTH)?,
            down: adapted("down", 4 * WIDTH, WIDTH)?,
            norm_3: layer_norm(WIDTH, 1e-5, vb.pp("norm_3"))?,
            head: linear(WIDTH, CYCLE, vb.pp("head"))?,
        })
    }

    fn attention(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let qkv = xs.apply(&self.qkv)?;
        let part = |index| qkv.narrow(2, index * WIDTH, WIDTH)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? / (WIDTH as f64).sqrt())?;
        let mask: Vec<_> = (0..CONTEXT * CONTEXT)
            .map(|index| {
                if index % CONTEXT > index / CONTEXT {
                    -1e9f32
                } else {
                    0.
                }
            })
            .collect();
        let mask = Tensor::from_vec(mask, (CONTEXT, CONTEXT), xs.device())?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, 2)?;
        weights.matmul(&v)?.apply(&self.project)
    }
}

impl Module for Gpt {
    fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        let positions = Tensor::arange(0, CONTEXT as u32, tokens.device())?;
        let xs = tokens
            .apply(&self.tokens)?
            .broadcast_add(&positions.apply(&self.positions)?)?;
        let xs = (&xs + self.attention(&xs.apply(&self.norm_1)?)?)?;
        let hidden = xs.apply(&self.norm_2)?.apply(&self.up)?.gelu()?;
        (xs + hidden.apply(&self.down)?)?
            .apply(&self.norm_3)?
            .apply(&self.head)
    }
}

/// Windows of a corpus that repeats after `CYCLE` tokens, and the tokens that follow.
fn batch(step: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    const WINDOWS: usize = 4;
    let token = |position: usize| (position % CYCLE * 7 % CYCLE) as u32;
    let windows = |offset| -> Result<Tensor> {
        let tokens = (0..WINDOWS).flat_map(|window| {
            (0..CONTEXT).map(move |at| token(step * 11 + window * 6 + at + offset))
        });
        Ok(Tensor::from_vec(
            tokens.collect::<Vec<_>>(),
            (WINDOWS, CONTEXT),
            device,
        )?)
    };
    Ok((windows(0)?, windows(1)?))
}

/// Trains the variables for 200 steps; the first and the last loss.
fn train(model: &Gpt, trained: Vec<Var>, device: &Device) -> Result<(f32, f32)> {
    const STEPS: usize = 200;
    let params = ParamsAdamW {
        lr: 5e-3,
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(trained, params)?;
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let (tokens, next) = batch(step, device)?;
        let logits = model.forward(&tokens)?.flatten_to(1)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &next.flatten_all()?)?;
        optimizer.backward_step(&loss)?;
        losses.push(loss.to_scalar()?);
    }
    Ok((losses[0], losses[STEPS - 1]))
}

/// The bits of all tensors, by name.
fn snapshot<'a>(
    tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>,
) -> Result<BTreeMap<String, Vec<u64>>> {
    tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name.clone(), bits(tensor)?)))
        .collect()
}

#[test]
fn gpt_block_trains_in_full_3752() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let model = Gpt::new(&VarBuilder::from_varmap(&varmap, DType::F32, device), None)?;
        seed(&varmap, 1)?;
        let vars = named_vars(&varmap);
        let tensors = || snapshot(vars.iter().map(|(name, var)| (name, var.as_tensor())));
        let before = tensors()?;
        let (first, last) = train(&model, varmap.all_vars(), device)?;
        assert!(last < 0.05 * first, "the loss went from {first} to {last}");
        for (name, after) in tensors()? {
            assert_ne!(after, before[&name], "{name} did not move");
        }
    }
    Ok(())
}

/// The adapters below a norm learn through its frozen weight and bias.
#[test]
fn gpt_block_trains_its_adapters_3752() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        Gpt::new(&VarBuilder::from_varmap(&varmap, DType::F32, device), None)?;
        seed(&varmap, 1)?;
        let frozen: HashMap<_, _> = named_vars(&varmap)
            .into_iter()
            .map(|(name, var)| (name, var.as_detached_tensor()))
            .collect();
        let frozen_vb = VarBuilder::from_tensors(frozen.clone(), DType::F32, device);

        let lora = VarMap::new();
        let lora_vb = VarBuilder::from_varmap(&lora, DType::F32, device);
        let model = Gpt::new(&frozen_vb, Some(&lora_vb))?;
        seed(&lora, 2)?;
        let vars = named_vars(&lora);
        let adapters = || snapshot(vars.iter().map(|(name, var)| (name, var.as_tensor())));
        let (frozen_before, adapters_before) = (snapshot(&frozen)?, adapters()?);
        let (first, last) = train(&model, lora.all_vars(), device)?;
        assert!(last < 0.5 * first, "the loss went from {first} to {last}");
        assert_eq!(snapshot(&frozen)?, frozen_before, "a frozen tensor moved");
        assert_eq!(adapters_before.len(), 8);
        for (name, after) in adapters()? {
            assert_ne!(after, adapters_before[&name], "{name} did not move");
        }
    }
    Ok(())
}

#[test]
fn untracked_inputs_give_the_values_of_tracked_ones_3823() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let tracked = layer_norm(64, 1e-5, vb)?;
        let bias = tracked
            .bias()
            .map(Tensor::detach)
            .expect("the default config is affine");
        let untracked = LayerNorm::new(tracked.weight().detach(), bias, tracked.eps());
        let xs = random((4, 64), device)?;
        let (with, without) = (tracked.forward(&xs)?, untracked.forward(&xs)?);
        assert_same_bits(&"layer norm", "y", &without, &with);
        assert!(
            with.track_op(),
            "the tracked layer's result has no gradient"
        );
        assert!(
            !without.track_op(),
            "the untracked layer's result keeps its inputs"
        );
    }
    Ok(())
}

/// Why upstream gradients are random in these tests: a sum's dx is zero, right or wrong.
#[test]
fn the_gradient_of_a_plain_sum_says_nothing() -> Result<()> {
    for device in devices() {
        let xs = Var::from_tensor(&random((4, 64), device)?)?;
        let norm = LayerNorm::new(
            Tensor::full(1.5f32, 64, device)?,
            Tensor::zeros(64, DType::F32, device)?,
            1e-5,
        );
        let largest = |loss: Tensor| -> Result<f64> {
            let grads = loss.backward()?;
            let dx = values(grads.get(&xs).expect("xs is tracked"))?;
            Ok(dx.into_iter().map(f64::abs).fold(0., f64::max))
        };
        let y = norm.forward(&xs)?;
        assert!(largest(y.sum_all()?)? < 1e-6);
        assert!(largest(loss(&y, &random((4, 64), device)?.flip(&[1])?)?)? > 0.1);
    }
    Ok(())
}

#[test]
fn every_layer_of_a_deep_encoder_gets_its_gradients() -> Result<()> {
    const LAYERS: usize = 24;
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let mut xs = random((2, 3, 16), device)?;
        for layer in 0..LAYERS {
            let norm = layer_norm(16, 1e-5, vb.pp(format!("{layer}.norm")))?;
            let linear = linear(16, 16, vb.pp(format!("{layer}.linear")))?;
            xs = (&xs + xs.apply(&norm)?.apply(&linear)?.gelu()?)?;
        }
        seed(&varmap, 4)?;
        let grads = loss(&xs, &random((2, 3, 16), device)?)?.backward()?;
        let vars = named_vars(&varmap);
        let with_gradient: Vec<_> = vars
            .iter()
            .filter(|(_, var)| grads.get(var).is_some())
            .collect();
        assert_eq!((vars.len(), with_gradient.len()), (4 * LAYERS, 4 * LAYERS));
        for (name, var) in with_gradient {
            assert!(
                !is_zero(grads.get(var).expect("counted above"))?,
                "{name}: zero"
            );
        }
    }
    Ok(())
}

#[test]
fn a_lazily_initialised_varmap_gets_weight_and_bias() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let norm = layer_norm(6, 1e-5, vb.pp("norm"))?;
        assert_eq!(values(norm.weight())?, [1.; 6]);
        assert_eq!(
            values(norm.bias().expect("the default config is affine"))?,
            [0.; 6]
        );
        let names: Vec<_> = named_vars(&varmap).into_keys().collect();
        assert_eq!(names, ["norm.bias", "norm.weight"]);

        let again = layer_norm(6, 1e-5, vb.pp("norm"))?;
        assert_eq!(
            again.weight().id(),
            norm.weight().id(),
            "a second layer of the same name"
        );
    }
    Ok(())
}

#[test]
fn a_normalized_shape_of_several_dims_is_created_in_the_varmap() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let norm = layer_norm((3, 4), 1e-5, vb)?;
        assert_eq!(norm.weight().dims(), [3, 4]);
        assert_eq!(norm.forward(&random((2, 3, 4), device)?)?.dims(), [2, 3, 4]);
    }
    Ok(())
}

/// Tensors by the names in `names`, each filled with its index.
fn checkpoint(names: &[&str], device: &Device) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for (index, name) in names.iter().enumerate() {
        tensors.insert(name.to_string(), Tensor::full(index as f32, 4, device)?);
    }
    Ok(tensors)
}

#[test]
fn checkpoints_name_weight_and_bias_or_gamma_and_beta() -> Result<()> {
    for device in devices() {
        // The tensors of a checkpoint, and which of them are taken as weight and bias.
        for (names, weight, bias) in [
            (&["weight", "bias"][..], 0., 1.),
            (&["gamma", "beta"], 0., 1.),
            (&["weight", "beta"], 0., 1.),
            (&["gamma", "bias"], 0., 1.),
            (&["gamma", "beta", "weight", "bias"], 2., 3.),
        ] {
            let vb = VarBuilder::from_tensors(checkpoint(names, device)?, DType::F32, device);
            let norm = layer_norm(4, 1e-5, vb)?;
            assert_eq!(values(norm.weight())?, [weight; 4], "{names:?}: weight");
            assert_eq!(
                values(norm.bias().expect("affine"))?,
                [bias; 4],
                "{names:?}: bias"
            );
        }
    }
    Ok(())
}

#[test]
fn a_varmap_with_gamma_and_beta_keeps_them() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        vb.get_with_hints(4, "gamma", Init::Const(2.))?;
        vb.get_with_hints(4, "beta", Init::Const(3.))?;
        let norm = layer_norm(4, 1e-5, vb)?;
        assert_eq!(values(norm.weight())?, [2.; 4]);
        assert_eq!(values(norm.bias().expect("affine"))?, [3.; 4]);
        let names: Vec<_> = named_vars(&varmap).into_keys().collect();
        assert_eq!(names, ["beta", "gamma"]);
    }
    Ok(())
}

#[test]
fn a_checkpoint_without_the_tensor_or_of_another_shape_is_an_error() -> Result<()> {
    let device = &Device::Cpu;
    for (names, size) in [
        (&["weight"][..], 4),
        (&["bias"], 4),
        (&["weight", "bias"], 5),
    ] {
        let vb = VarBuilder::from_tensors(checkpoint(names, device)?, DType::F32, device);
        assert!(
            layer_norm(size, 1e-5, vb).is_err(),
            "{names:?} of 4 as {size}"
        );
    }
    Ok(())
}

/// A checkpoint that notes which names it is asked for.
struct Recorder {
    tensors: HashMap<String, Tensor>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    fn note(&self, name: &str) {
        self.asked
            .lock()
            .expect("no test panics while it holds the list")
            .push(name.into());
    }
}

impl SimpleBackend for Recorder {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.note(name);
        SimpleBackend::get(&self.tensors, shape, name, init, dtype, device)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.note(name);
        self.tensors.get_unchecked(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.note(name);
        self.tensors.contains_tensor(name)
    }
}

/// A way to build a layer; the bias it has.
type Build = fn(VarBuilder) -> candle_core::Result<Option<Tensor>>;

const WITHOUT_BIAS: [(&str, Build); 4] = [
    ("layer_norm_no_bias", |vb| {
        Ok(layer_norm_no_bias(4, 1e-5, vb)?.bias().cloned())
    }),
    ("rms_norm", |vb| {
        Ok(rms_norm(4, 1e-5, vb)?.into_inner().bias().cloned())
    }),
    ("affine: false", |vb| {
        let config = LayerNormConfig {
            affine: false,
            ..Default::default()
        };
        Ok(layer_norm(4, config, vb)?.bias().cloned())
    }),
    ("affine: false, remove_mean: false", |vb| {
        let config = LayerNormConfig {
            affine: false,
            remove_mean: false,
            eps: 1e-5,
        };
        Ok(layer_norm(4, config, vb)?.bias().cloned())
    }),
];

#[test]
fn no_bias_neither_probes_nor_creates_one_3972() -> Result<()> {
    for device in devices() {
        for (name, build) in WITHOUT_BIAS {
            let asked = Arc::new(Mutex::new(Vec::new()));
            let tensors = checkpoint(&["weight", "bias", "beta"], device)?;
            let recorder = Recorder {
                tensors,
                asked: asked.clone(),
            };
            let vb = VarBuilder::from_backend(Box::new(recorder), DType::F32, device.clone());
            assert!(build(vb)?.is_none(), "{name}: a bias");
            let asked = asked.lock().expect("no other thread has it").clone();
            assert!(
                asked.iter().any(|asked| asked == "weight"),
                "{name}: asked for {asked:?}"
            );
            assert!(
                !asked.iter().any(|asked| asked == "bias" || asked == "beta"),
                "{name}: asked for {asked:?}"
            );

            let varmap = VarMap::new();
            build(VarBuilder::from_varmap(&varmap, DType::F32, device))?;
            let names: Vec<_> = named_vars(&varmap).into_keys().collect();
            assert_eq!(names, ["weight"], "{name}: created");
        }
    }
    Ok(())
}

#[test]
fn layers_of_candle_nn_convert_with_their_variables() -> Result<()> {
    for device in devices() {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let theirs = candle_nn::layer_norm(64, 1e-3, vb.pp("affine"))?;
        let ours = LayerNorm::from(theirs.clone());
        let id = |tensor: Option<&Tensor>| tensor.map(Tensor::id);
        assert_eq!(ours.weight().id(), theirs.weight().id());
        assert_eq!(id(ours.bias()), id(theirs.bias()));
        assert!(ours.bias().is_some() && ours.remove_mean());
        assert_eq!(ours.eps(), 1e-3);

        let config = LayerNormConfig {
            eps: 1e-4,
            remove_mean: false,
            affine: false,
        };
        let ours = LayerNorm::from(candle_nn::layer_norm(64, config, vb.pp("rms"))?);
        assert!(ours.bias().is_none() && !ours.remove_mean());

        let theirs = candle_nn::rms_norm(64, 1e-4, vb.pp("rms"))?;
        let ours = RmsNorm::from(theirs.clone());
        assert_eq!(
            (ours.weight().id(), ours.eps()),
            (theirs.weight().id(), 1e-4)
        );
        assert!(!ours.clone().into_inner().remove_mean());

        let xs = random((4, 64), device)?;
        let grads = loss(&ours.forward(&xs)?, &xs)?.backward()?;
        assert!(
            grads.get(theirs.weight()).is_some(),
            "the variable is another one"
        );
    }
    Ok(())
}
