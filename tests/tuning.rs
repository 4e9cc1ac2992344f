//! Promise: a tuning file is used as it says, or refused with a reason that names it.

#[cfg(feature = "cuda")]
mod common;

use anyhow::Result;
use candle_fused_layer_norm::bench::Access;
use candle_fused_layer_norm::tuning::{self, Direction, Entry, File};
use std::path::Path;
use tempfile::NamedTempFile;

fn written(text: &str) -> Result<NamedTempFile> {
    let file = NamedTempFile::new()?;
    std::fs::write(&file, text)?;
    Ok(file)
}

/// Why `load` refuses a file, without the prefix that all reasons share.
fn refusal(path: &Path) -> String {
    let error = tuning::load(path).expect_err("it is refused").to_string();
    let prefix = format!("tuning: {}: ", path.display());
    let line = error.lines().next().unwrap_or_default();
    line.strip_prefix(&prefix)
        .unwrap_or_else(|| panic!("expected {prefix}.., got {line}"))
        .to_owned()
}

fn entry(kernel: &str) -> Entry {
    Entry {
        dir: Direction::Forward,
        dtype: "f32".into(),
        param_dtype: "f32".into(),
        access: Access::Wide,
        rows: 512,
        cols: 768,
        kernel: kernel.into(),
        warps: 3,
        blocks: 1,
        us: 5.,
        builtin_us: 5.6,
    }
}

#[test]
fn a_file_that_cannot_be_read_is_refused() -> Result<()> {
    let reason = refusal(&tempfile::tempdir()?.path().join("missing"));
    let expected = "expected a readable tuning file, got: ";
    assert!(reason.starts_with(expected), "{reason}");
    Ok(())
}

#[test]
fn what_is_no_tuning_file_is_refused() -> Result<()> {
    for (name, text, got) in [
        ("empty", "", "EOF while parsing a value"),
        ("cut", "{\"crate\": \"candle", "EOF while parsing a string"),
        ("list", "[1, 2]", "invalid type: "),
        ("other", "{\"learning_rate\": 0.1}", "missing field `crate`"),
        (
            "negative",
            &text_with("\"rows\":512", "\"rows\":-1")?,
            "invalid value: integer `-1`",
        ),
        (
            "unknown",
            &text_with("\"rows\":512", "\"rows\":512,\"row\":1")?,
            "unknown field `row`",
        ),
        (
            "direction",
            &text_with("fwd", "forward")?,
            "unknown variant `forward`",
        ),
    ] {
        let reason = refusal(written(text)?.path());
        let expected = format!("expected the JSON of a tuning file, got: {got}");
        assert!(reason.starts_with(&expected), "{name}: {reason}");
    }
    Ok(())
}

/// A good file's text with one change.
fn text_with(from: &str, to: &str) -> Result<String> {
    let file = File::new("GPU".into(), 1, vec![entry("forward_block_wide_4x1")]);
    let text = serde_json::to_string(&file)?;
    assert!(text.contains(from), "{text}");
    Ok(text.replacen(from, to, 1))
}

#[test]
fn a_file_of_another_crate_or_version_is_refused_even_of_another_form() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    for (name, text, expected) in [
        (
            "version",
            r#"{"crate": "candle-fused-layer-norm", "version": "0.0.1", "gpus": []}"#.to_owned(),
            format!("version: expected {version}, got 0.0.1"),
        ),
        (
            "crate",
            format!(r#"{{"crate": "another", "version": "{version}"}}"#),
            "crate: expected candle-fused-layer-norm, got another".to_owned(),
        ),
    ] {
        assert_eq!(refusal(written(&text)?.path()), expected, "{name}");
    }
    Ok(())
}

#[test]
fn a_kernel_that_the_crate_lacks_is_refused() -> Result<()> {
    let path = NamedTempFile::new()?;
    File::new("GPU".into(), 1, vec![entry("forward_fast")]).write(path.path())?;
    assert_eq!(
        refusal(path.path()),
        "choices[0]: kernel: expected the name of a forward kernel, got `forward_fast`"
    );
    Ok(())
}

/// What is loaded holds for the process, so all of it is one test.
#[test]
fn a_written_file_loads() -> Result<()> {
    let file = NamedTempFile::new()?;
    let path = file.path();
    File::new("GPU".into(), 1, vec![entry("forward_block_wide_4x1")]).write(path)?;
    tuning::load(path)?;
    #[cfg(feature = "cuda")]
    for device in common::devices::cuda_devices() {
        cuda::refuses_the_file_of_another_gpu(device, path)?;
        cuda::takes_each_choice(device)?;
    }
    tuning::clear();
    Ok(())
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use candle_core::{Device, Tensor, Var};
    use candle_fused_layer_norm::bench::{self, Choice};

    const ROWS: usize = 300;
    const COLS: usize = 8192;

    struct Case {
        x: Var,
        weight: Var,
        bias: Var,
        dy: Tensor,
    }

    /// Bits of y, dx, dweight and dbias.
    type Results = Vec<Vec<u32>>;

    impl Case {
        fn random(device: &Device) -> Result<Self> {
            let random = |shape: &[usize]| Tensor::randn(0.5f32, 1., shape, device);
            Ok(Self {
                x: Var::from_tensor(&random(&[ROWS, COLS])?)?,
                weight: Var::from_tensor(&random(&[COLS])?)?,
                bias: Var::from_tensor(&random(&[COLS])?)?,
                dy: random(&[ROWS, COLS])?,
            })
        }

        fn run(&self) -> Result<Results> {
            let (y, backward) = bench::layer_norm(&self.x, &self.weight, &self.bias, 1e-5)?;
            let (dx, dweight, dbias) = backward(&self.dy)?;
            [Some(y), dx, dweight, dbias]
                .into_iter()
                .flatten()
                .map(|t| {
                    let values = t.flatten_all()?.to_vec1::<f32>()?;
                    Ok(values.into_iter().map(f32::to_bits).collect())
                })
                .collect()
        }
    }

    pub fn refuses_the_file_of_another_gpu(device: &Device, path: &Path) -> Result<()> {
        let case = Case::random(device)?;
        let error = case.run().expect_err("it is refused").to_string();
        let (gpu, multiprocessors) = bench::gpu(device)?;
        let expected = format!(
            "layer-norm: tuning: {}: gpu: expected a file for {gpu} of {multiprocessors} multiprocessors, got one for GPU of 1",
            path.display()
        );
        assert_eq!(error.lines().next(), Some(&*expected));
        tuning::clear();
        case.run()?;
        Ok(())
    }

    /// A file's choice gives the bits that the same choice gives when it is forced, for rows within a factor of 2.
    pub fn takes_each_choice(device: &Device) -> Result<()> {
        let case = Case::random(device)?;
        let forward = bench::forward_candidates(&case.x, &case.weight, &case.bias)?;
        let backward = bench::backward_candidates(&case.x, &case.weight, &case.dy)?;
        assert_eq!(
            (forward.access, backward.access),
            (Access::Wide, Access::Wide)
        );
        let (gpu, multiprocessors) = bench::gpu(device)?;
        let path = NamedTempFile::new()?;
        for (i, &f) in forward.choices.iter().enumerate() {
            let b = backward.choices[i % backward.choices.len()];
            let entries = vec![
                measured(Direction::Forward, f),
                measured(Direction::Backward, b),
            ];
            File::new(gpu.clone(), multiprocessors, entries).write(&path)?;
            tuning::load(&path)?;
            let tuned = case.run()?;
            tuning::clear();
            let forced = bench::forced(Some(f), Some(b), || case.run())?;
            assert!(tuned == forced, "{f:?}, {b:?}");
        }
        Ok(())
    }

    fn measured(dir: Direction, choice: Choice) -> Entry {
        Entry {
            dir,
            rows: 2 * ROWS,
            cols: COLS,
            warps: choice.warps,
            blocks: choice.blocks,
            ..entry(choice.entry)
        }
    }
}
