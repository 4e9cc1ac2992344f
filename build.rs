//! Compiles `kernels/*.cu` to PTX, once for each pair of dtypes and each base architecture, takes that apart into a module for each
//! kernel, because the driver compiles all of a module when it loads it, and writes a table of them for `src/cuda/ptx.rs`. Needs nvcc and
//! no GPU; does nothing without the feature `cuda`.
//!
//! PTX of compute_80 runs on devices of compute capability 8.x, that of compute_90 on 9.0 and later.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// (name, C type, bytes)
type Dtype = (&'static str, &'static str, u32);

const F32: Dtype = ("f32", "float", 4);
const F64: Dtype = ("f64", "double", 8);
const F16: Dtype = ("f16", "__half", 2);
const BF16: Dtype = ("bf16", "__nv_bfloat16", 2);
/// (xs, weight and bias): the pairs that `Problem` admits.
const DTYPES: [(Dtype, Dtype); 6] = [
    (F32, F32),
    (F64, F64),
    (F16, F16),
    (F16, F32),
    (BF16, BF16),
    (BF16, F32),
];
const FILES: [&str; 22] = [
    "add",
    "forward",
    "forward_add",
    "forward_single",
    "forward_shifted",
    "forward_skewed",
    "forward_ring",
    "forward_ring_shifted",
    "forward_ring_skewed",
    "backward",
    "backward_add",
    "backward_single",
    "backward_shifted",
    "backward_skewed",
    "backward_ring",
    "backward_ring_add",
    "backward_ring_shifted",
    "backward_ring_skewed",
    "backward_strips",
    "split",
    "split_single",
    "finalize",
];
const HEADERS: [&str; 4] = ["add.cuh", "common.cuh", "row.cuh", "ring.cuh"];

struct Unit {
    file: &'static str,
    x: Dtype,
    param: Dtype,
    base: u32,
}

impl Unit {
    fn name(&self) -> String {
        format!(
            "{}_{}_{}_sm{}",
            self.file, self.x.0, self.param.0, self.base
        )
    }
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        // A panic would bury the sentence in a backtrace.
        eprintln!("error: {message}");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    for var in [
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_COMPUTE_CAP",
        "CANDLE_FUSED_LAYER_NORM_PTX",
        "CANDLE_FUSED_LAYER_NORM_RACECHECK",
    ] {
        println!("cargo:rerun-if-env-changed={var}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run through cargo")?);
    let kernels = Path::new("kernels");
    for file in FILES {
        println!("cargo:rerun-if-changed=kernels/{file}.cu");
    }
    for header in HEADERS {
        println!("cargo:rerun-if-changed=kernels/{header}");
    }
    let nvcc = find_nvcc();
    let toolkit = toolkit_version(&nvcc)?;
    let bases = bases()?;
    let racecheck = racecheck()?;

    clear(&out)?;
    let mut units = Vec::new();
    for file in FILES {
        for (x, param) in DTYPES {
            for &base in &bases {
                units.push(Unit {
                    file,
                    x,
                    param,
                    base,
                });
            }
        }
    }
    let queue = Mutex::new(units);
    let results = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                // The lock is released before the compiler runs.
                while let Some(unit) = queue.lock().ok().and_then(|mut q| q.pop()) {
                    let compiled = compile_unit(&nvcc, kernels, &out, &unit, racecheck)
                        .and_then(|()| take_apart(&out, &unit.name()));
                    if let Ok(mut results) = results.lock() {
                        results.push(compiled.map(|entries| (unit, entries)));
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_default();
    let mut compiled = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    compiled.sort_by_key(|(unit, _)| unit.name());
    let table = table(&compiled, &toolkit);
    fs::write(out.join("ptx_table.rs"), table)
        .map_err(|e| format!("cannot write {}: {e}", out.join("ptx_table.rs").display()))
}

/// Removes the PTX of an earlier build, which may be of files that are no more.
fn clear(out: &Path) -> Result<(), String> {
    let failed = |e| format!("cannot clear {}: {e}", out.display());
    for entry in fs::read_dir(out).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            fs::remove_file(path).map_err(failed)?;
        }
    }
    Ok(())
}

fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(PathBuf::from)
        .chain([PathBuf::from("/usr/local/cuda")]);
    let exe = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    homes
        .map(|home| home.join("bin").join(exe))
        .find(|nvcc| nvcc.is_file())
        .unwrap_or_else(|| exe.into())
}

/// The toolkit's release, `13.0` say; fails where there is none that serves.
fn toolkit_version(nvcc: &Path) -> Result<String, String> {
    let unfit = |why: String| {
        format!(
            "feature `cuda` needs nvcc of a CUDA toolkit 12.0 or later, but `{}{why}; put nvcc on PATH or set \
             CUDA_HOME or NVCC. The README says how to install a toolkit from PyPI wheels. Without the feature, no toolkit is needed.",
            nvcc.display()
        )
    };
    let output = Command::new(nvcc)
        .arg("--version")
        .output()
        .map_err(|e| unfit(format!("` cannot be run ({e})")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let release = text
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split(',').next());
    let major = release.and_then(|release| release.split('.').next()?.parse::<u32>().ok());
    match (release, major) {
        (Some(release), Some(12..)) => Ok(release.to_owned()),
        (Some(release), Some(_)) => Err(unfit(format!("` is of release {release}"))),
        _ => Err(unfit(format!(
            " --version` does not name a release: `{}`",
            text.trim()
        ))),
    }
}

/// Both bases, or the one that CUDA_COMPUTE_CAP asks for.
fn bases() -> Result<Vec<u32>, String> {
    let both = vec![80, 90];
    match env::var("CANDLE_FUSED_LAYER_NORM_PTX") {
        Ok(all) if all == "all" => return Ok(both),
        Ok(other) if !other.is_empty() => {
            return Err(format!(
                "CANDLE_FUSED_LAYER_NORM_PTX: expected `all` or nothing, got `{other}`"
            ));
        }
        _ => {}
    }
    let Ok(cap) = env::var("CUDA_COMPUTE_CAP") else {
        return Ok(both);
    };
    // candle's own build takes 90, 90a, sm_90, and 9 for 90.
    let number = cap.trim().to_lowercase().replace('.', "");
    let number = number
        .trim_start_matches("sm_")
        .trim_end_matches(['a', 'f']);
    match number.parse().map(|n: u32| if n < 20 { 10 * n } else { n }) {
        Ok(80..=89) => Ok(vec![80]),
        Ok(90..) => Ok(vec![90]),
        _ => Err(format!(
            "CUDA_COMPUTE_CAP: expected a compute capability of 80 or more (80: A100, and later), got `{cap}`"
        )),
    }
}

/// Whether all lanes arrive on barriers, as compute-sanitizer's racecheck can follow.
fn racecheck() -> Result<bool, String> {
    match env::var("CANDLE_FUSED_LAYER_NORM_RACECHECK") {
        Ok(one) if one == "1" => Ok(true),
        Ok(other) if !other.is_empty() => Err(format!(
            "CANDLE_FUSED_LAYER_NORM_RACECHECK: expected `1` or nothing, got `{other}`"
        )),
        _ => Ok(false),
    }
}

fn compile_unit(
    nvcc: &Path,
    kernels: &Path,
    out: &Path,
    unit: &Unit,
    racecheck: bool,
) -> Result<(), String> {
    let source = kernels.join(format!("{}.cu", unit.file));
    let output = Command::new(nvcc)
        .args(["-ptx", "-std=c++17", "-O3", "-diag-suppress=177"])
        .args(racecheck.then_some("-DLN_RACECHECK"))
        .arg(format!("-arch=compute_{}", unit.base))
        .arg(format!("-DLN_X={}", unit.x.1))
        .arg(format!("-DLN_X_BYTES={}", unit.x.2))
        .arg(format!("-DLN_PARAM={}", unit.param.1))
        .arg(format!("-DLN_PARAM_BYTES={}", unit.param.2))
        .arg("-o")
        .arg(out.join(format!("{}.ptx", unit.name())))
        .arg(&source)
        .output()
        .map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "nvcc failed on {} for {}:\n{}",
        source.display(),
        unit.name(),
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// Writes each kernel of a unit with what it may use, and returns their names.
fn take_apart(out: &Path, unit: &str) -> Result<Vec<String>, String> {
    let path = out.join(format!("{unit}.ptx"));
    let text =
        fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let unfit = |why: &str| {
        format!(
            "{}: expected declarations and then kernels, got {why}",
            path.display()
        )
    };
    let folder = out.join(unit);
    fs::create_dir_all(&folder).map_err(|e| format!("cannot make {}: {e}", folder.display()))?;
    let mut parts = text.split("\n.visible .entry ");
    let declarations = parts.next().unwrap_or_default();
    let mut entries = Vec::new();
    for kernel in parts {
        let entry = kernel.split('(').next().unwrap_or_default();
        let (_, behind) = kernel
            .split_once("\n}\n")
            .ok_or_else(|| unfit(&format!("no end of `{entry}`")))?;
        let is_comment = |line: &str| line.is_empty() || line.starts_with("//");
        if let Some(line) = behind.lines().map(str::trim).find(|line| !is_comment(line)) {
            return Err(unfit(&format!("`{line}` behind `{entry}`")));
        }
        let file = folder.join(format!("{entry}.ptx"));
        fs::write(&file, format!("{declarations}\n.visible .entry {kernel}"))
            .map_err(|e| format!("cannot write {}: {e}", file.display()))?;
        entries.push(entry.to_owned());
    }
    if entries.is_empty() {
        return Err(unfit("no kernel"));
    }
    Ok(entries)
}

/// Rust source: every kernel's PTX by (file, dtypes, base) and entry, under a name that no other crate or version uses.
fn table(units: &[(Unit, Vec<String>)], toolkit: &str) -> String {
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let mut table = format!("pub(super) const TOOLKIT: &str = {toolkit:?};\n");
    table += "pub(super) static FILES: &[File] = &[\n";
    for (unit, entries) in units {
        let name = unit.name();
        // Writing to a String cannot fail.
        let _ = writeln!(
            table,
            "    File {{ name: {:?}, x: DType::{}, param: DType::{}, base: {}, kernels: &[",
            unit.file,
            unit.x.0.to_uppercase(),
            unit.param.0.to_uppercase(),
            unit.base,
        );
        for entry in entries {
            let _ = writeln!(
                table,
                "        Kernel {{ entry: {entry:?}, module: {:?}, ptx: include_str!(concat!(env!(\"OUT_DIR\"), \"/{name}/{entry}.ptx\")) }},",
                format!("candle-fused-layer-norm-{version}-{name}-{entry}"),
            );
        }
        table += "    ] },\n";
    }
    table + "];\n"
}
