//! Checkpoints: safetensors files that hold all that a run needs to go on, replaced atomically.

use crate::{
    data::Vocabulary,
    model::{Config, Gpt, named_vars},
    optimizer::{LossScale, OptimizerState},
    record,
    settings::Settings,
};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write,
    path::Path,
};

/// The key in the metadata that tells these checkpoints from other safetensors files.
const KEY: &str = "candle-fused-layer-norm.transformer";

/// What the weights are named before their moments: nothing, so that other programs find them.
const KINDS: [&str; 3] = ["", "first_moment.", "second_moment."];

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: usize,
    pub held_out: f64,
}

/// Where a run stands. The seed among the settings and the step are the state of all random numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub settings: Settings,
    /// All characters in order.
    pub vocabulary: String,
    /// Of the text that was trained on.
    pub fingerprint: String,
    pub step: usize,
    pub best: Option<Best>,
    pub loss_scale: LossScale,
    updates: usize,
    /// Of the tensors, as they lie in the file.
    checksum: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    pub progress: Progress,
    pub optimizer: OptimizerState,
}

impl Checkpoint {
    pub fn new(
        settings: Settings,
        vocabulary: &Vocabulary,
        fingerprint: String,
        step: usize,
        best: Option<Best>,
        loss_scale: LossScale,
        optimizer: OptimizerState,
    ) -> Self {
        let progress = Progress {
            settings,
            vocabulary: vocabulary.text(),
            fingerprint,
            step,
            best,
            loss_scale,
            updates: optimizer.updates,
            checksum: String::new(),
        };
        Self {
            progress,
            optimizer,
        }
    }

    pub fn vocabulary(&self) -> Vocabulary {
        Vocabulary::of(&self.progress.vocabulary)
    }

    /// Writes the file beside its place and renames it: `path` holds the old checkpoint or the new one at every moment.
    pub fn save(&self, path: &Path) -> Result<()> {
        let name = path.display();
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let save = || -> Result<()> {
            let mut file = record::temporary_file(dir)?;
            self.write(file.as_file_mut())?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            // The rename itself lasts only once the directory is on the disk. Windows cannot open one.
            #[cfg(unix)]
            File::open(dir)?.sync_all()?;
            Ok(())
        };
        save().with_context(|| {
            format!("cannot write the checkpoint {name}; the one before it is as it was")
        })
    }

    pub fn write(&self, file: &mut File) -> Result<()> {
        let state = &self.optimizer;
        let parts = [&state.weights, &state.first_moment, &state.second_moment];
        let mut tensors = BTreeMap::new();
        for (kind, part) in KINDS.into_iter().zip(parts) {
            for (name, values) in part {
                let shape = state.shapes[name].clone();
                let bytes = bytemuck::cast_slice(values);
                tensors.insert(
                    format!("{kind}{name}"),
                    TensorView::new(Dtype::F32, shape, bytes)?,
                );
            }
        }
        let mut progress = self.progress.clone();
        progress.checksum = checksum(tensors.values().map(TensorView::data));
        let metadata = HashMap::from([(KEY.to_owned(), serde_json::to_string(&progress)?)]);
        file.write_all(&safetensors::serialize(tensors, Some(metadata))?)?;
        Ok(())
    }

    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display();
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
        Self::parse(&bytes).with_context(|| format!("cannot use {name} as a checkpoint"))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let broken = "it is damaged, or no safetensors file";
        let (_, header) = SafeTensors::read_metadata(bytes).context(broken)?;
        let tensors = SafeTensors::deserialize(bytes).context(broken)?;
        let Some(progress) = header.metadata().as_ref().and_then(|map| map.get(KEY)) else {
            bail!("it was not written by this trainer: its metadata has no `{KEY}`");
        };
        let progress: Progress = serde_json::from_str(progress)
            .context("it was written by another version of this trainer")?;
        progress
            .settings
            .validate()
            .context("its settings are no settings")?;
        let mut sorted = tensors.tensors();
        sorted.sort_by(|(a, _), (b, _)| a.cmp(b));
        ensure!(
            checksum(sorted.iter().map(|(_, view)| view.data())) == progress.checksum,
            "it is damaged: its checksum does not match"
        );
        let shapes = shapes(&progress)?;
        let mut parts = KINDS.into_iter().map(|kind| {
            let mut part = BTreeMap::new();
            for (name, shape) in &shapes {
                let name_in_file = format!("{kind}{name}");
                let view = tensors
                    .tensor(&name_in_file)
                    .with_context(|| format!("it has no tensor {name_in_file}"))?;
                ensure!(
                    view.dtype() == Dtype::F32 && view.shape() == shape,
                    "{name_in_file}: expected f32 {shape:?}, got {:?} {:?}",
                    view.dtype(),
                    view.shape()
                );
                part.insert(name.clone(), bytemuck::pod_collect_to_vec(view.data()));
            }
            Ok(part)
        });
        let mut next = || parts.next().unwrap_or_else(|| Ok(BTreeMap::new()));
        let optimizer = OptimizerState {
            updates: progress.updates,
            shapes: shapes.clone(),
            weights: next()?,
            first_moment: next()?,
            second_moment: next()?,
        };
        drop(parts);
        Ok(Self {
            progress: Progress {
                checksum: String::new(),
                ..progress
            },
            optimizer,
        })
    }

    /// The model with these weights in f32.
    pub fn model(&self, device: &Device) -> Result<Gpt> {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let config = Config::new(&self.progress.settings, self.vocabulary().len());
        let gpt = Gpt::new(config, vb)?;
        for (name, var) in named_vars(&varmap) {
            let values = self.optimizer.weights[&name].clone();
            var.set(&Tensor::from_vec(values, var.shape(), device)?)?;
        }
        Ok(gpt)
    }
}

/// The shapes of the variables that a model of these settings has.
fn shapes(progress: &Progress) -> Result<BTreeMap<String, Vec<usize>>> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let vocab_size = Vocabulary::of(&progress.vocabulary).len();
    Gpt::new(Config::new(&progress.settings, vocab_size), vb)?;
    Ok(named_vars(&varmap)
        .into_iter()
        .map(|(name, var)| (name, var.dims().to_vec()))
        .collect())
}

/// FNV-1a over words of four bytes.
fn checksum<'a>(tensors: impl Iterator<Item = &'a [u8]>) -> String {
    let words = tensors.flat_map(|bytes| bytes.chunks_exact(4));
    let hash = words.fold(0xcbf2_9ce4_8422_2325u64, |hash, b| {
        let word = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        (hash ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
