//! Tuning files: kernels and grids that were measured to be faster than the built-in plan on the GPU at hand.
//!
//! The built-in plan chooses by rules that were measured on an H200. Where speed matters on another GPU or for certain shapes,
//! measure once, in a clone of the crate's repository,
//!
//! ```sh
//! cargo run --release --features cuda --example tune -- --shapes 512x768,8192x4096 --dtypes bf16 --output tuning.json
//! ```
//!
//! and let the program use the file: call [`load`], or set the environment variable [`VARIABLE`] to the file's path. Nothing is
//! loaded unless asked for. Only CUDA calls ask; the CPU has nothing to tune.
//!
//! A call takes the file's choice for its direction, dtypes, alignment to 16 bytes and columns, from the entry whose rows are
//! nearest, if they are within a factor of 2 of the call's. Without such an entry, or if its choice cannot hold the call's rows,
//! the built-in plan runs. Another choice may sum in another order: results differ within the crate's accuracy, and stay the
//! same from run to run with the same file. The norm of a residual sum, where one kernel does both, has one plan, and does not look at
//! the file.
//!
//! # The file
//! JSON, with times in microseconds, which are for the reader:
//!
//! ```json
//! {"crate": "candle-fused-layer-norm", "version": "0.1.0", "gpu": "NVIDIA H200", "multiprocessors": 132, "choices": [
//!   {"dir": "fwd", "dtype": "f32", "param_dtype": "f32", "access": "wide", "rows": 512, "cols": 768,
//!    "kernel": "forward_block_small_64x4x1", "warps": 2, "blocks": 1, "us": 5.0, "builtin_us": 5.6}
//! ]}
//! ```
//!
//! # Errors
//! A file that cannot be read or parsed, is of another crate version, or names a kernel that the crate lacks is refused by
//! [`load`]. One that was measured on another GPU (by name and number of multiprocessors) is refused by every CUDA call on a
//! device that is not such a GPU, until [`clear`] or another [`load`]; so is, by every CUDA call, a file of the environment
//! variable that [`load`] would refuse. Every error names the file, what was expected and what was given.

use crate::bench;
use crate::plan::{self, Access, Choice, DeviceFacts};
use crate::problem::Problem;
use candle_core::{DType, Error, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The environment variable that names a tuning file. It is read once, at the first CUDA call, unless [`load`] or [`clear`] came
/// before; empty is as unset.
pub const VARIABLE: &str = "CANDLE_FUSED_LAYER_NORM_TUNING";

/// Uses a tuning file for the process's CUDA calls from now on, in place of any loaded before.
///
/// No device is needed: that the file was measured on the device's GPU is checked by each call. An error leaves what was loaded
/// before; [the module](self) says what is refused.
pub fn load(path: impl AsRef<Path>) -> Result<()> {
    match Tuning::read(path.as_ref()) {
        Ok(tuning) => {
            STORE.set(State::Loaded(tuning));
            Ok(())
        }
        Err(why) => bail!("tuning: {why}"),
    }
}

/// Goes back to the built-in plan for all CUDA calls of the process from now on, whatever [`VARIABLE`] names.
pub fn clear() {
    STORE.set(State::Empty);
}

/// Which pass a choice is for.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    #[serde(rename = "fwd")]
    Forward,
    #[serde(rename = "bwd")]
    Backward,
}

/// A tuning file, as `examples/tune.rs` writes it.
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    #[serde(rename = "crate")]
    name: String,
    version: String,
    gpu: String,
    multiprocessors: usize,
    pub choices: Vec<Entry>,
}

/// A measured choice.
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub dir: Direction,
    pub dtype: String,
    pub param_dtype: String,
    pub access: Access,
    pub rows: usize,
    pub cols: usize,
    pub kernel: String,
    pub warps: usize,
    pub blocks: usize,
    pub us: f64,
    pub builtin_us: f64,
}

impl File {
    /// A file of this version of the crate.
    pub fn new(gpu: String, multiprocessors: usize, choices: Vec<Entry>) -> Self {
        Self {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            gpu,
            multiprocessors,
            choices,
        }
    }

    /// Writes the file, in place of one that is there.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = |why: String| Error::Msg(format!("tuning: {}: {why}", path.display()));
        let text = serde_json::to_string_pretty(self).map_err(|e| failed(e.to_string()))?;
        std::fs::write(path, text + "\n").map_err(|e| failed(format!("cannot be written: {e}")))
    }
}

/// Or the reason against it.
type Checked<T> = std::result::Result<T, String>;

/// What a file says of itself, whatever the rest of it looks like.
#[derive(Deserialize)]
struct Header {
    #[serde(rename = "crate")]
    name: String,
    version: String,
}

/// What a choice is looked up by, besides rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dir: Direction,
    dtype: DType,
    param_dtype: DType,
    access: Access,
    cols: usize,
}

/// The most by which a call's rows may be more or fewer than those measured.
const MOST_RATIO: f64 = 2.;

/// A device as tuning knows it.
#[derive(Debug, Clone)]
pub(crate) struct Gpu {
    pub name: String,
    pub facts: DeviceFacts,
}

/// A file that was read and found good. Reasons against one begin with its path.
#[derive(Debug)]
struct Tuning {
    path: String,
    gpu: String,
    multiprocessors: usize,
    /// By rows.
    choices: HashMap<Key, Vec<(usize, Choice)>>,
}

impl Tuning {
    fn read(path: &Path) -> Checked<Self> {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(name, &text),
            Err(error) => Err(format!(
                "{name}: expected a readable tuning file, got: {error}"
            )),
        }
    }

    fn parse(path: String, text: &str) -> Checked<Self> {
        let malformed = |error| format!("{path}: expected the JSON of a tuning file, got: {error}");
        let header: Header = serde_json::from_str(text).map_err(malformed)?;
        for (what, expected, got) in [
            ("crate", env!("CARGO_PKG_NAME"), header.name),
            ("version", env!("CARGO_PKG_VERSION"), header.version),
        ] {
            if got != expected {
                return Err(format!("{path}: {what}: expected {expected}, got {got}"));
            }
        }
        let file: File = serde_json::from_str(text).map_err(malformed)?;
        let mut choices: HashMap<_, Vec<_>> = HashMap::new();
        for (index, entry) in file.choices.iter().enumerate() {
            let (key, choice) =
                resolve(entry).map_err(|why| format!("{path}: choices[{index}]: {why}"))?;
            choices.entry(key).or_default().push((entry.rows, choice));
        }
        Ok(Self {
            path,
            gpu: file.gpu,
            multiprocessors: file.multiprocessors,
            choices,
        })
    }

    fn check_gpu(&self, gpu: &Gpu) -> Checked<()> {
        let multiprocessors = gpu.facts.multiprocessors;
        if self.gpu == gpu.name && self.multiprocessors == multiprocessors {
            return Ok(());
        }
        Err(format!(
            "{}: gpu: expected a file for {} of {multiprocessors} multiprocessors, got one for {} of {}",
            self.path, gpu.name, self.gpu, self.multiprocessors
        ))
    }

    /// The choice measured for the nearest number of rows. `rows` is not 0.
    fn nearest(&self, key: &Key, rows: usize) -> Option<Choice> {
        let ratio = |measured: usize| measured.max(rows) as f64 / measured.min(rows) as f64;
        self.choices
            .get(key)?
            .iter()
            .map(|&(measured, choice)| (ratio(measured), choice))
            .filter(|&(ratio, _)| ratio <= MOST_RATIO)
            .min_by(|(a, _), (b, _)| a.total_cmp(b))
            .map(|(_, choice)| choice)
    }
}

/// An entry in the crate's own terms. Whether a problem can take the choice is for the plan to say.
fn resolve(entry: &Entry) -> Checked<(Key, Choice)> {
    for (what, got) in [("rows", entry.rows), ("cols", entry.cols)] {
        if got == 0 {
            return Err(format!("{what}: expected 1 or more, got 0"));
        }
    }
    let (kernel, direction) = match entry.dir {
        Direction::Forward => (plan::forward_entry(&entry.kernel), "forward"),
        Direction::Backward => (plan::backward_entry(&entry.kernel), "backward"),
    };
    let Some(kernel) = kernel else {
        return Err(format!(
            "kernel: expected the name of a {direction} kernel, got `{}`",
            entry.kernel
        ));
    };
    let key = Key {
        dir: entry.dir,
        dtype: parse_dtype("dtype", &entry.dtype)?,
        param_dtype: parse_dtype("param_dtype", &entry.param_dtype)?,
        access: entry.access,
        cols: entry.cols,
    };
    let choice = Choice {
        entry: kernel,
        warps: entry.warps,
        blocks: entry.blocks,
    };
    Ok((key, choice))
}

fn parse_dtype(what: &str, name: &str) -> Checked<DType> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        "f64" => Ok(DType::F64),
        _ => Err(format!(
            "{what}: expected f32, f16, bf16 or f64, got `{name}`"
        )),
    }
}

static STORE: Store = Store::new();

/// What a process has loaded.
struct Store {
    /// Whether there is nothing to look up: all that a call asks where tuning is not used.
    empty: AtomicBool,
    state: RwLock<State>,
}

enum State {
    /// The environment variable has not been read.
    Unread,
    Empty,
    Loaded(Tuning),
    /// Why the file of the environment variable was refused.
    Refused(String),
}

impl Store {
    const fn new() -> Self {
        Self {
            empty: AtomicBool::new(false),
            state: RwLock::new(State::Unread),
        }
    }

    // No panic leaves a state half written.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        self.replace(&mut self.write(), state);
    }

    /// Under the lock, so that `empty` is never that of another state.
    fn replace(&self, current: &mut State, state: State) {
        let empty = matches!(state, State::Empty);
        *current = state;
        self.empty.store(empty, Ordering::Release);
    }

    fn read_variable(&self, variable: impl FnOnce() -> Option<OsString>) {
        if !matches!(*self.read(), State::Unread) {
            return;
        }
        let mut current = self.write();
        // Another thread may have been first.
        if matches!(*current, State::Unread) {
            let state = match variable().filter(|path| !path.is_empty()) {
                None => State::Empty,
                Some(path) => match Tuning::read(Path::new(&path)) {
                    Ok(tuning) => State::Loaded(tuning),
                    Err(why) => State::Refused(format!("{VARIABLE}: {why}")),
                },
            };
            self.replace(&mut current, state);
        }
    }

    /// The choice for a call, or why there can be none. `variable` gives the environment variable.
    fn choice(
        &self,
        key: &Key,
        rows: usize,
        gpu: &Gpu,
        variable: impl FnOnce() -> Option<OsString>,
    ) -> Checked<Option<Choice>> {
        if self.empty.load(Ordering::Acquire) {
            return Ok(None);
        }
        self.read_variable(variable);
        match &*self.read() {
            State::Unread | State::Empty => Ok(None),
            State::Loaded(tuning) => {
                tuning.check_gpu(gpu)?;
                Ok(tuning.nearest(key, rows))
            }
            State::Refused(why) => Err(why.clone()),
        }
    }
}

/// `plan::forward` or `plan::backward`.
type Planning<P> = fn(&Problem, Access, &DeviceFacts, Option<&Choice>) -> Result<P>;

/// The plan of a call: with the choice forced on this thread, else with that of a tuning file, else the built-in one.
pub(crate) fn plan<P>(
    dir: Direction,
    planning: Planning<P>,
    problem: &Problem,
    access: Access,
    gpu: &Gpu,
) -> Result<P> {
    match bench::forced_choice(dir) {
        Some(choice) => planning(problem, access, &gpu.facts, Some(&choice)),
        None => STORE.plan(dir, planning, problem, access, gpu),
    }
}

impl Store {
    fn plan<P>(
        &self,
        dir: Direction,
        planning: Planning<P>,
        problem: &Problem,
        access: Access,
        gpu: &Gpu,
    ) -> Result<P> {
        let key = Key {
            dir,
            dtype: problem.dtype,
            param_dtype: problem.param_dtype,
            access,
            cols: problem.cols,
        };
        let variable = || std::env::var_os(VARIABLE);
        let choice = match self.choice(&key, problem.rows, gpu, variable) {
            Ok(choice) => choice,
            Err(why) => bail!("{}: tuning: {why}", problem.op_name()),
        };
        if let Some(choice) = choice
            && let Ok(plan) = planning(problem, access, &gpu.facts, Some(&choice))
        {
            return Ok(plan);
        }
        planning(problem, access, &gpu.facts, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "tuning.json";

    fn h200() -> Gpu {
        Gpu {
            name: "NVIDIA H200".into(),
            facts: DeviceFacts {
                multiprocessors: 132,
                shared_per_block: 227 * 1024,
                shared_per_multiprocessor: 228 * 1024,
                l2: 50 << 20,
                max_cluster: 16,
                cooperative: true,
                base: 90,
            },
        }
    }

    fn problem(rows: usize, cols: usize) -> Problem {
        Problem {
            rows,
            cols,
            dtype: DType::F32,
            param_dtype: DType::F32,
            weight: true,
            zero_centered_weight: false,
            bias: true,
            remove_mean: true,
            eps: 1e-5,
        }
    }

    /// Of 4096 columns of f32, for which the built-in plan is forward_block_wide_4x1 of 8 warps.
    fn entry(rows: usize, kernel: &str, warps: usize, blocks: usize) -> Entry {
        Entry {
            dir: Direction::Forward,
            dtype: "f32".into(),
            param_dtype: "f32".into(),
            access: Access::Wide,
            rows,
            cols: 4096,
            kernel: kernel.into(),
            warps,
            blocks,
            us: 5.,
            builtin_us: 5.6,
        }
    }

    fn file(choices: Vec<Entry>) -> File {
        File::new("NVIDIA H200".into(), 132, choices)
    }

    fn parse(file: &File) -> Checked<Tuning> {
        Tuning::parse(PATH.into(), &serde_json::to_string(file).unwrap())
    }

    fn store(choices: Vec<Entry>) -> Store {
        let store = Store::new();
        store.set(State::Loaded(parse(&file(choices)).unwrap()));
        store
    }

    /// The kernel and threads of a forward pass over rows of 4096 columns.
    fn forward(store: &Store, rows: usize, gpu: &Gpu) -> Result<(&'static str, u32)> {
        let p = problem(rows, 4096);
        let plan = store.plan(Direction::Forward, plan::forward, &p, Access::Wide, gpu)?;
        Ok((plan.launches[0].entry, plan.launches[0].block[0]))
    }

    const BUILT_IN: (&str, u32) = ("forward_block_small_256x4x1", 256);

    #[test]
    fn a_file_comes_back_as_it_was_written() {
        let written = file(vec![entry(512, "forward_block_wide_8x1", 4, 1)]);
        let text = serde_json::to_string(&written).unwrap();
        assert_eq!(serde_json::from_str::<File>(&text).unwrap(), written);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["crate"], "candle-fused-layer-norm");
        assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(json["choices"][0]["dir"], "fwd");
        assert_eq!(json["choices"][0]["us"], 5.);
    }

    #[test]
    fn what_a_file_gets_wrong_is_said() {
        let good = entry(512, "forward_block_wide_8x1", 4, 1);
        let refused = |entry| parse(&file(vec![entry])).unwrap_err();
        assert_eq!(
            refused(Entry {
                kernel: "forward_block_wide_5x1".into(),
                ..good.clone()
            }),
            "tuning.json: choices[0]: kernel: expected the name of a forward kernel, got `forward_block_wide_5x1`"
        );
        assert_eq!(
            refused(Entry {
                dir: Direction::Backward,
                ..good.clone()
            }),
            "tuning.json: choices[0]: kernel: expected the name of a backward kernel, got `forward_block_wide_8x1`"
        );
        assert_eq!(
            refused(Entry {
                param_dtype: "u8".into(),
                ..good.clone()
            }),
            "tuning.json: choices[0]: param_dtype: expected f32, f16, bf16 or f64, got `u8`"
        );
        assert_eq!(
            refused(Entry { rows: 0, ..good }),
            "tuning.json: choices[0]: rows: expected 1 or more, got 0"
        );
    }

    #[test]
    fn nearest_rows_within_a_factor_of_2_are_taken() {
        let store = store(vec![
            entry(1024, "forward_block_wide_8x1", 4, 1),
            entry(2048, "forward_long_cluster_wide", 2, 2),
        ]);
        let (x8, cluster) = (("forward_block_wide_8x1", 128), "forward_long_cluster_wide");
        let of = |rows| forward(&store, rows, &h200()).unwrap();
        assert_eq!(of(511), BUILT_IN);
        assert_eq!(of(512), x8);
        assert_eq!(of(1024), x8);
        assert_eq!(of(1448), x8);
        assert_eq!(of(1449).0, cluster);
        assert_eq!(of(4096).0, cluster);
        assert_eq!(of(4097), ("forward_block_wide_4x1", 256));
    }

    #[test]
    fn all_but_rows_must_be_the_same() {
        let store = store(vec![entry(512, "forward_block_wide_8x1", 4, 1)]);
        let key = Key {
            dir: Direction::Forward,
            dtype: DType::F32,
            param_dtype: DType::F32,
            access: Access::Wide,
            cols: 4096,
        };
        let found = |key| store.choice(&key, 512, &h200(), || None).unwrap().is_some();
        assert!(found(key));
        for other in [
            Key {
                dir: Direction::Backward,
                ..key
            },
            Key {
                dtype: DType::BF16,
                ..key
            },
            Key {
                param_dtype: DType::BF16,
                ..key
            },
            Key {
                access: Access::Single,
                ..key
            },
            Key { cols: 4097, ..key },
        ] {
            assert!(!found(other), "{other:?}");
        }
    }

    #[test]
    fn a_choice_that_cannot_hold_the_row_leaves_the_built_in_plan() {
        for (kernel, warps, blocks) in [
            ("forward_block_wide_8x1", 3, 1),
            ("forward_block_small_256x4x1", 7, 1),
            ("forward_block_wide_8x1", usize::MAX, 1),
            ("forward_block_wide_8x1", 4, usize::MAX),
            ("forward_block_single_16x1", 8, 1),
            ("forward_warp_wide_32x4x1", 4, 1),
            ("forward_long_cluster_wide", 2, 3),
            ("forward_long_cluster_wide", 0, 0),
            ("forward_grid_wide", 4, usize::MAX),
            ("split_moments_wide", 8, usize::MAX),
        ] {
            let store = store(vec![entry(512, kernel, warps, blocks)]);
            assert_eq!(forward(&store, 512, &h200()).unwrap(), BUILT_IN, "{kernel}");
        }
    }

    #[test]
    fn a_file_of_another_gpu_is_refused_until_it_is_cleared() {
        let store = store(vec![entry(512, "forward_block_wide_8x1", 4, 1)]);
        let mut slice = h200();
        slice.facts.multiprocessors = 60;
        let mut h100 = h200();
        h100.name = "NVIDIA H100".into();
        for (gpu, expected) in [(slice, "NVIDIA H200 of 60"), (h100, "NVIDIA H100 of 132")] {
            for _ in 0..2 {
                let error = forward(&store, 512, &gpu).unwrap_err().to_string();
                assert_eq!(
                    error.lines().next(),
                    Some(&*format!(
                        "layer-norm: tuning: tuning.json: gpu: expected a file for {expected} multiprocessors, got one for \
                         NVIDIA H200 of 132"
                    ))
                );
            }
        }
        store.set(State::Empty);
        assert_eq!(forward(&store, 512, &h200()).unwrap(), BUILT_IN);
    }

    #[test]
    fn the_variable_is_read_once_and_not_after_a_load() {
        let key = Key {
            dir: Direction::Forward,
            dtype: DType::F32,
            param_dtype: DType::F32,
            access: Access::Wide,
            cols: 4096,
        };
        let missing = || Some(OsString::from("/no/such/tuning.json"));
        let never = || -> Option<OsString> { panic!("read again") };

        let unset = Store::new();
        assert_eq!(unset.choice(&key, 1, &h200(), || None), Ok(None));
        assert_eq!(unset.choice(&key, 1, &h200(), never), Ok(None));

        let refused = Store::new();
        let why = refused.choice(&key, 1, &h200(), missing).unwrap_err();
        assert!(
            why.starts_with(
                "CANDLE_FUSED_LAYER_NORM_TUNING: /no/such/tuning.json: expected a readable tuning file, got: "
            ),
            "{why}"
        );
        assert_eq!(refused.choice(&key, 1, &h200(), never), Err(why));
        refused.set(State::Empty);
        assert_eq!(refused.choice(&key, 1, &h200(), never), Ok(None));

        let loaded = store(vec![entry(512, "forward_block_wide_8x1", 4, 1)]);
        assert!(loaded.choice(&key, 512, &h200(), never).unwrap().is_some());
    }

    #[test]
    fn a_forced_choice_comes_first_and_is_not_replaced() {
        let choice = |warps| Choice {
            entry: "forward_block_wide_8x1",
            warps,
            blocks: 1,
        };
        let p = problem(512, 4096);
        let planned = || super::plan(Direction::Forward, plan::forward, &p, Access::Wide, &h200());
        let forced = bench::forced(Some(choice(4)), None, planned).unwrap();
        assert_eq!(forced.launches[0].entry, "forward_block_wide_8x1");
        let error = bench::forced(Some(choice(3)), None, planned).unwrap_err();
        assert!(error.to_string().contains("forward_block_wide_8x1"));
        assert_eq!(bench::forced_choice(Direction::Forward), None);
    }
}
