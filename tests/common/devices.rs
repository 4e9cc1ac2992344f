//! The devices that tests run on.

#[cfg(feature = "cuda")]
use super::case::Dtypes;
use candle_core::Device;
use std::io::Write;
use std::sync::OnceLock;

/// Set to 1, a test without a usable CUDA device fails: a run on a GPU cannot pass by skipping.
const REQUIRE_CUDA: &str = "CFLN_REQUIRE_CUDA";

/// The CPU, and the CUDA device where the crate is built with `cuda` and one is present.
///
/// One value for the process: two devices of one GPU are different ones to candle.
pub fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| match cuda() {
        Ok(cuda) => vec![Device::Cpu, cuda],
        Err(reason) => {
            assert!(
                !std::env::var(REQUIRE_CUDA).is_ok_and(|value| value == "1"),
                "{REQUIRE_CUDA}=1, but {reason}"
            );
            // Not `eprintln!`, which the test harness captures.
            let _ = writeln!(std::io::stderr(), "{reason}");
            vec![Device::Cpu]
        }
    })
}

/// The CUDA device, if there is one.
pub fn cuda_devices() -> impl Iterator<Item = &'static Device> {
    devices().iter().filter(|device| device.is_cuda())
}

/// Holds that calls of this process have loaded every kernel of the build for these dtypes whose `file/entry` is `held`.
#[cfg(feature = "cuda")]
#[track_caller]
pub fn assert_loaded(
    device: &Device,
    dtypes: Dtypes,
    held: impl Fn(&str) -> bool,
) -> candle_core::Result<()> {
    let kernels = candle_fused_layer_norm::bench::kernels(device, (dtypes.xs, dtypes.params))?;
    let (kernels, missed): (Vec<_>, Vec<_>) = kernels
        .into_iter()
        .filter(|(kernel, _)| held(kernel))
        .partition(|&(_, loaded)| loaded);
    assert!(
        !kernels.is_empty() && missed.is_empty(),
        "{dtypes:?}: loaded {}, but no call reached {missed:?}",
        kernels.len()
    );
    Ok(())
}

fn cuda() -> Result<Device, String> {
    if !cfg!(feature = "cuda") {
        return Err("CUDA tests skipped: built without feature cuda".into());
    }
    // Of `Device::new_cuda`, each thread has a stream of its own: nothing orders what two threads do with a tensor, and drivers were
    // seen to deadlock when a thread ends.
    Device::new_cuda_with_stream(0).map_err(|error| {
        let error = error.to_string();
        format!(
            "no CUDA device: {}",
            error.lines().next().unwrap_or_default()
        )
    })
}
