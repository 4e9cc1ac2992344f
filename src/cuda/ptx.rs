//! The compiled kernels, and which of them a device runs.

use super::launch::Function;
use crate::plan::{DeviceFacts, Launch};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Result, bail};
use cudarc::driver::{CudaFunction, sys};
use foldhash::fast::RandomState;
use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

/// The kernels of one file for one pair of dtypes.
pub(super) struct File {
    name: &'static str,
    x: DType,
    param: DType,
    base: u32,
    kernels: &'static [Kernel],
}

/// A kernel in a module of its own.
pub(super) struct Kernel {
    entry: &'static str,
    /// Unique among crates, versions and architectures: candle caches modules by name alone.
    module: &'static str,
    ptx: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/ptx_table.rs"));

/// Blocks of a cluster that every device with clusters takes.
const PORTABLE_CLUSTER: usize = 8;

/// Names the newest base to be used, so that kernels of older devices can be tested on a newer one.
const BASE_VARIABLE: &str = "CANDLE_FUSED_LAYER_NORM_BASE";

/// The newest base that this build has and the device runs, no newer than [`BASE_VARIABLE`] says.
pub(super) fn base(op: &str, capability: (i32, i32)) -> Result<u32> {
    let asked = std::env::var(BASE_VARIABLE).ok();
    base_of(
        op,
        capability,
        FILES.iter().map(|file| file.base),
        asked.as_deref(),
    )
}

/// The same of these bases, with what the variable says.
fn base_of(
    op: &str,
    capability: (i32, i32),
    bases: impl Iterator<Item = u32> + Clone,
    asked: Option<&str>,
) -> Result<u32> {
    let device = (capability.0 * 10 + capability.1) as u32;
    let newest = match asked {
        None => device,
        Some(value) => match value.parse() {
            Ok(base) if bases.clone().any(|b| b == base) => device.min(base),
            _ => bail!(
                "{op}: {BASE_VARIABLE}: expected one of {:?}, got `{value}`",
                bases.collect::<std::collections::BTreeSet<_>>()
            ),
        },
    };
    match bases.clone().filter(|&base| base <= newest).max() {
        Some(base) => Ok(base),
        None => bail!(
            "{op}: device: expected compute capability {} or more, got {}.{}: {}",
            bases
                .min()
                .map_or_else(String::new, |b| format!("{}.{}", b / 10, b % 10)),
            capability.0,
            capability.1,
            if device >= 80 {
                "build again with CUDA_COMPUTE_CAP unset or set for this device"
            } else {
                "use the CPU, or a GPU of the Ampere generation or later"
            }
        ),
    }
}

/// The device, the dtypes of x and of weight, and a launch's file and entry.
type Key = (DeviceId, (DType, DType), &'static str, &'static str);

// candle itself looks a module up by name, and a function in it by asking the driver. Of threads that miss a module it lets each load
// it, and unloads the one before.
static LOADED: LazyLock<RwLock<HashMap<Key, Function, RandomState>>> =
    LazyLock::new(Default::default);

/// The kernels that this build has for the device and these dtypes, `file/entry`, and whether a call has loaded each.
pub(super) fn kernels(
    device: &CudaDevice,
    base: u32,
    dtypes: (DType, DType),
) -> Vec<(String, bool)> {
    let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    let of_file = |file: &'static File| file.kernels.iter().map(move |k| (file.name, k.entry));
    FILES
        .iter()
        .filter(|file| file.base == base && (file.x, file.param) == dtypes)
        .flat_map(of_file)
        .map(|(file, entry)| {
            let is_loaded = loaded.contains_key(&(device.id(), dtypes, file, entry));
            (format!("{file}/{entry}"), is_loaded)
        })
        .collect()
}

/// A launch's kernel, loaded when the device first needs it. candle keeps the module as long as the device, whose id no other ever has.
pub(super) fn function(
    op: &str,
    device: &CudaDevice,
    facts: &DeviceFacts,
    dtypes: (DType, DType),
    launch: &Launch,
) -> Result<Function> {
    let key = (device.id(), dtypes, launch.file, launch.entry);
    // No panic leaves an entry half written.
    let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(&function) = loaded.get(&key) {
        return Ok(function);
    }
    drop(loaded);
    let mut loaded = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(&function) = loaded.get(&key) {
        return Ok(function);
    }
    let function = load(op, device, facts, dtypes, launch)?;
    prepare(&function, facts, launch)?;
    Ok(*loaded.entry(key).or_insert(Function::of(&function)))
}

fn load(
    op: &str,
    device: &CudaDevice,
    facts: &DeviceFacts,
    (x, param): (DType, DType),
    launch: &Launch,
) -> Result<CudaFunction> {
    let (file, entry, base) = (launch.file, launch.entry, facts.base);
    let kernel = FILES
        .iter()
        .find(|f| f.base == base && f.x == x && f.param == param && f.name == file)
        .and_then(|file| file.kernels.iter().find(|kernel| kernel.entry == entry));
    let Some(kernel) = kernel else {
        bail!(
            "{op}: no kernel `{entry}` in `{file}` for xs of {} and weight of {}",
            x.as_str(),
            param.as_str()
        )
    };
    device
        .get_or_load_custom_func(entry, kernel.module, kernel.ptx)
        .map(|function| function.into_cuda_function())
        .map_err(|error| explain(op, kernel, base, error))
}

/// Lets a kernel have what its launches may ask for: without asking, a block has 48 KiB of shared memory, and a cluster 8 blocks.
fn prepare(function: &CudaFunction, facts: &DeviceFacts, launch: &Launch) -> Result<()> {
    use sys::CUfunction_attribute as A;
    if launch.shared > 0 {
        let taken = function.get_attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        let left = facts.shared_per_block as i32 - taken.w()?;
        let attribute = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, left).w()?;
    }
    if launch.cluster > 1 && facts.max_cluster > PORTABLE_CLUSTER {
        let attribute = A::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        function.set_attribute(attribute, 1).w()?;
    }
    Ok(())
}

/// Says what to do about a module that does not load.
fn explain(op: &str, kernel: &Kernel, base: u32, error: candle_core::Error) -> candle_core::Error {
    let text = error.to_string();
    let advice = if text.contains("CUDA_ERROR_UNSUPPORTED_PTX_VERSION") {
        format!(
            "the driver is older than CUDA {TOOLKIT}, whose nvcc compiled the kernels: update the driver, or build with an older toolkit"
        )
    } else if text.contains("CUDA_ERROR_OUT_OF_MEMORY") {
        "the device has no memory left to load it".to_string()
    } else {
        format!("compiled by nvcc of CUDA {TOOLKIT} for compute capability {base} and later")
    };
    candle_core::Error::Msg(format!(
        "{op}: cannot load kernel `{}` of `{}`: {advice}: {text}",
        kernel.entry, kernel.module
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(
        capability: (i32, i32),
        bases: &[u32],
        asked: Option<&str>,
    ) -> std::result::Result<u32, String> {
        base_of("layer-norm", capability, bases.iter().copied(), asked)
            .map_err(|error| error.to_string().lines().next().unwrap_or_default().into())
    }

    #[test]
    fn a_device_takes_the_newest_base_that_it_runs() {
        let both = [80, 90, 80];
        for (capability, base) in [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((12, 0), 90)] {
            assert_eq!(of(capability, &both, None), Ok(base), "{capability:?}");
        }
        assert_eq!(of((9, 0), &both, Some("80")), Ok(80));
        assert_eq!(of((8, 6), &both, Some("90")), Ok(80));
    }

    #[test]
    fn a_device_that_no_kernel_is_for() {
        for (capability, bases, asked, sentence) in [
            (
                (7, 5),
                &[80, 90][..],
                None,
                "layer-norm: device: expected compute capability 8.0 or more, got 7.5: use the CPU, or a GPU of the Ampere generation or later",
            ),
            (
                (8, 6),
                &[90],
                None,
                "layer-norm: device: expected compute capability 9.0 or more, got 8.6: build again with CUDA_COMPUTE_CAP unset or set for this device",
            ),
            (
                (9, 0),
                &[80, 90],
                Some("75"),
                "layer-norm: CANDLE_FUSED_LAYER_NORM_BASE: expected one of {80, 90}, got `75`",
            ),
        ] {
            assert_eq!(of(capability, bases, asked), Err(sentence.to_owned()));
        }
    }

    #[test]
    fn a_module_that_does_not_load() {
        let kernel = Kernel {
            entry: "finalize",
            module: "a module",
            ptx: "",
        };
        for (error, advice) in [
            (
                "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
                "update the driver, or build with an older toolkit",
            ),
            (
                "CUDA_ERROR_OUT_OF_MEMORY",
                "the device has no memory left to load it",
            ),
            (
                "CUDA_ERROR_INVALID_PTX",
                "for compute capability 90 and later",
            ),
        ] {
            let cause = candle_core::Error::Msg(format!("DriverError({error})"));
            let text = explain("layer-norm", &kernel, 90, cause).to_string();
            let start = "layer-norm: cannot load kernel `finalize` of `a module`: ";
            assert!(
                text.starts_with(start) && text.contains(advice) && text.contains(error),
                "{text}"
            );
        }
    }
}
