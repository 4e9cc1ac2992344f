//! Promise: a build with the feature `cuda` that cannot succeed ends in a sentence that says what to do.
//!
//! `build.rs` is compiled on its own and run in environments that it may meet, with stand-ins for nvcc.

#![cfg(unix)]

use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The compiled build script.
fn build_script() -> &'static Path {
    static SCRIPT: OnceLock<PathBuf> = OnceLock::new();
    SCRIPT.get_or_init(|| {
        let script = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build-script");
        let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
        let compiled = Command::new(rustc)
            .args(["--edition=2024", "-o"])
            .arg(&script)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("build.rs"))
            .status();
        assert!(
            compiled.is_ok_and(|status| status.success()),
            "rustc build.rs"
        );
        script
    })
}

/// A folder of its own for a run, gone after it.
struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("out"))?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A stand-in for nvcc.
    fn nvcc(&self, script: &str) -> Result<String> {
        let nvcc = self.path("nvcc");
        fs::write(&nvcc, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755))?;
        Ok(nvcc.to_str().context("a path in UTF-8")?.to_string())
    }

    fn build(&self, variables: &[(&str, &str)]) -> Result<Output> {
        Ok(Command::new(build_script())
            .env_clear()
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("CARGO_FEATURE_CUDA", "1")
            .env("CARGO_PKG_VERSION", "0.0.0")
            .env("OUT_DIR", self.path("out"))
            .envs(variables.iter().copied())
            .output()?)
    }

    /// The one line of stderr of a build that fails.
    fn error(&self, variables: &[(&str, &str)]) -> Result<String> {
        let output = self.build(variables)?;
        let text = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{text}");
        let error = text.strip_prefix("error: ").context("no error")?;
        Ok(error
            .trim_end()
            .replace(&*self.dir.path().to_string_lossy(), "DIR"))
    }
}

/// Answers as release 13.0 does, and writes what `-o` names.
const GOOD: &str = r#"
[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit
while [ "$1" != -o ]; do shift; done
printf '.target sm_90\n\n.visible .entry one(\n)\n{\n\tret;\n\n}\n\t// .globl two\n.visible .entry two(\n)\n{\n\tret;\n\n}\n' > "$2""#;

const NEEDS: &str = "feature `cuda` needs nvcc of a CUDA toolkit 12.0 or later";
const WHAT_TO_DO: &str = "put nvcc on PATH or set CUDA_HOME or NVCC. The README says how to install a toolkit from PyPI wheels. \
     Without the feature, no toolkit is needed.";

#[test]
fn without_the_feature_nothing_is_needed() -> Result<()> {
    let output = Command::new(build_script())
        .env_clear()
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()?;
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn nvcc_that_is_missing() -> Result<()> {
    assert_eq!(
        Run::new()?.error(&[("NVCC", "/nonexistent/nvcc")])?,
        format!(
            "{NEEDS}, but `/nonexistent/nvcc` cannot be run (No such file or directory (os error 2)); {WHAT_TO_DO}"
        )
    );
    Ok(())
}

#[test]
fn nvcc_that_may_not_be_run() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(GOOD)?;
    fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o644))?;
    assert_eq!(
        run.error(&[("NVCC", &nvcc)])?,
        format!(
            "{NEEDS}, but `DIR/nvcc` cannot be run (Permission denied (os error 13)); {WHAT_TO_DO}"
        )
    );
    Ok(())
}

#[test]
fn nvcc_that_is_too_old() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(r#"echo "Cuda compilation tools, release 11.8, V11.8.89""#)?;
    assert_eq!(
        run.error(&[("NVCC", &nvcc)])?,
        format!("{NEEDS}, but `DIR/nvcc` is of release 11.8; {WHAT_TO_DO}")
    );
    Ok(())
}

#[test]
fn nvcc_that_is_something_else() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc("echo gcc 12.2")?;
    assert_eq!(
        run.error(&[("NVCC", &nvcc)])?,
        format!(
            "{NEEDS}, but `DIR/nvcc --version` does not name a release: `gcc 12.2`; {WHAT_TO_DO}"
        )
    );
    Ok(())
}

/// What nvcc says of its source comes through, with what it was compiling.
#[test]
fn nvcc_that_fails() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(
        r#"[ "$1" = --version ] && echo "release 12.4, V12.4.1" && exit
echo "nvcc fatal: no C++ compiler" >&2
exit 1"#,
    )?;
    let error = run.error(&[("NVCC", &nvcc)])?;
    assert!(error.starts_with("nvcc failed on kernels/"), "{error}");
    assert!(error.ends_with(":\nnvcc fatal: no C++ compiler"), "{error}");
    assert!(!run.path("out/ptx_table.rs").exists(), "a table of nothing");
    Ok(())
}

#[test]
fn compute_capability_that_no_kernel_is_for() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(GOOD)?;
    for cap in ["75", "7.5", "7", "", "sm_", "-1"] {
        assert_eq!(
            run.error(&[("NVCC", &nvcc), ("CUDA_COMPUTE_CAP", cap)])?,
            format!(
                "CUDA_COMPUTE_CAP: expected a compute capability of 80 or more (80: A100, and later), got `{cap}`"
            )
        );
    }
    Ok(())
}

#[test]
fn ptx_for_something_that_is_not_all() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(GOOD)?;
    assert_eq!(
        run.error(&[("NVCC", &nvcc), ("CANDLE_FUSED_LAYER_NORM_PTX", "90")])?,
        "CANDLE_FUSED_LAYER_NORM_PTX: expected `all` or nothing, got `90`"
    );
    Ok(())
}

#[test]
fn racecheck_for_something_that_is_not_1() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(GOOD)?;
    assert_eq!(
        run.error(&[
            ("NVCC", &nvcc),
            ("CANDLE_FUSED_LAYER_NORM_RACECHECK", "yes")
        ])?,
        "CANDLE_FUSED_LAYER_NORM_RACECHECK: expected `1` or nothing, got `yes`"
    );
    Ok(())
}

/// The stand-in is good enough for a build that succeeds: what the others are about is what they change.
#[test]
fn bases_are_those_asked_for() -> Result<()> {
    for (variables, bases) in [
        (&[][..], [true, true]),
        (&[("CUDA_COMPUTE_CAP", "8.9")], [true, false]),
        (
            &[
                ("CUDA_COMPUTE_CAP", "8.9"),
                ("CANDLE_FUSED_LAYER_NORM_PTX", ""),
                ("CANDLE_FUSED_LAYER_NORM_RACECHECK", ""),
            ],
            [true, false],
        ),
        (&[("CUDA_COMPUTE_CAP", "120")], [false, true]),
        (&[("CUDA_COMPUTE_CAP", "90a")], [false, true]),
        (&[("CUDA_COMPUTE_CAP", "sm_90")], [false, true]),
        (&[("CUDA_COMPUTE_CAP", "9")], [false, true]),
        (
            &[
                ("CUDA_COMPUTE_CAP", "90"),
                ("CANDLE_FUSED_LAYER_NORM_PTX", "all"),
            ],
            [true, true],
        ),
    ] {
        let run = Run::new()?;
        // Found by way of its home.
        fs::create_dir(run.path("bin"))?;
        fs::rename(run.nvcc(GOOD)?, run.path("bin/nvcc"))?;
        let home = run.dir.path().to_str().context("a path in UTF-8")?;
        let output = run.build(&[variables, &[("CUDA_HOME", home)]].concat())?;
        assert!(output.status.success(), "{output:?}");
        let table = fs::read_to_string(run.path("out/ptx_table.rs"))?;
        for (base, wanted) in [80, 90].into_iter().zip(bases) {
            assert_eq!(
                table.contains(&format!("base: {base}")),
                wanted,
                "{variables:?}: {base}"
            );
            let ptx = format!("out/backward_bf16_f32_sm{base}.ptx");
            assert_eq!(run.path(&ptx).exists(), wanted, "{variables:?}: {ptx}");
        }
    }
    Ok(())
}

/// The driver compiles all of a module when it loads it.
#[test]
fn each_kernel_is_a_module_of_its_own() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(GOOD)?;
    let output = run.build(&[("NVCC", &nvcc)])?;
    assert!(output.status.success(), "{output:?}");
    let table = fs::read_to_string(run.path("out/ptx_table.rs"))?;
    for (entry, behind) in [("one", "\n\t// .globl two"), ("two", "\n")] {
        assert_eq!(
            fs::read_to_string(run.path(&format!("out/split_f32_f32_sm80/{entry}.ptx")))?,
            format!(".target sm_90\n\n.visible .entry {entry}(\n)\n{{\n\tret;\n\n}}{behind}")
        );
        let name = format!("candle-fused-layer-norm-0.0.0-split_f32_f32_sm80-{entry}");
        assert_eq!(table.matches(&name).count(), 1, "{name}");
    }
    Ok(())
}

#[test]
fn ptx_of_an_earlier_build_goes() -> Result<()> {
    let run = Run::new()?;
    let nvcc = run.nvcc(GOOD)?;
    let old = run.path("out").join("gone_f32_f32_sm90.ptx");
    fs::write(&old, "")?;
    let output = run.build(&[("NVCC", &nvcc)])?;
    assert!(output.status.success(), "{output:?}");
    assert!(!old.exists());
    Ok(())
}

#[test]
fn ptx_of_another_form() -> Result<()> {
    for (ptx, why) in [
        ("// PTX", "no kernel"),
        ("\n.visible .entry one(", "no end of `one`"),
        (
            "\n.visible .entry one(\n)\n{\n}\n.func two",
            "`.func two` behind `one`",
        ),
    ] {
        let run = Run::new()?;
        let nvcc = run.nvcc(&format!(
            r#"[ "$1" = --version ] && echo "release 13.0, V13.0.88" && exit
while [ "$1" != -o ]; do shift; done
echo "{ptx}" > "$2""#
        ))?;
        let error = run.error(&[("NVCC", &nvcc)])?;
        let expected = format!(".ptx: expected declarations and then kernels, got {why}");
        assert!(
            error.starts_with("DIR/out/") && error.ends_with(&expected),
            "{error}"
        );
    }
    Ok(())
}
