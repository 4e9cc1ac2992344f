//! The compiled kernels, and which of them a device runs.

use candle_core::{CudaDevice, DType, Result, bail};
use cudarc::driver::CudaFunction;
use std::sync::{Mutex, PoisonError};

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

/// Names the newest base to be used, so that kernels of older devices can be tested on a newer one.
const BASE_VARIABLE: &str = "CANDLE_FUSED_LAYER_NORM_BASE";

/// The newest base that this build has and the device runs, no newer than [`BASE_VARIABLE`] says.
pub(super) fn base(op: &str, capability: (i32, i32)) -> Result<u32> {
    let device = (capability.0 * 10 + capability.1) as u32;
    let bases = FILES.iter().map(|file| file.base);
    let newest = match std::env::var(BASE_VARIABLE) {
        Err(_) => device,
        Ok(value) => match value.parse() {
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

pub(super) fn function(
    op: &str,
    device: &CudaDevice,
    base: u32,
    file: &str,
    (x, param): (DType, DType),
    entry: &str,
) -> Result<CudaFunction> {
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
    // Left to itself, candle loads a module for each thread that finds it missing, and unloads the one before.
    static LOADING: Mutex<()> = Mutex::new(());
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    device
        .get_or_load_custom_func(entry, kernel.module, kernel.ptx)
        .map(|function| function.into_cuda_function())
        .map_err(|error| explain(op, kernel, base, error))
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
