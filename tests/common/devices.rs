//! The devices that tests run on.

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
