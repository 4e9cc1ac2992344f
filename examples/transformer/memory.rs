//! The most memory that the process held at any one time.

use candle_core::Device;

/// In bytes, of the GPU for CUDA, else resident in the main memory. `None` where the system does not tell.
pub fn peak(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => resident_peak(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::peak(device),
        _ => None,
    }
}

/// Linux counts it for each process.
fn resident_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// Keeps freed GPU memory for the process at each wait for the GPU, instead of handing it back to the driver. `false`
/// where that cannot be had; training is then a little slower.
pub fn keep(device: &Device) -> bool {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::keep(device).is_some(),
        _ => true,
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::CudaDevice;
    use cudarc::driver::{result, sys};
    use std::ffi::c_void;

    /// The pool that candle's tensors are allocated from.
    fn pool(device: &CudaDevice) -> Option<sys::CUmemoryPool> {
        let device = device.cuda_stream().context().cu_device();
        // SAFETY: the device is that of a context that lives.
        unsafe { result::device::get_default_mem_pool(device) }.ok()
    }

    pub fn peak(device: &CudaDevice) -> Option<u64> {
        let mut bytes = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let value: *mut c_void = (&raw mut bytes).cast();
        // SAFETY: the attribute is a cuuint64_t, which `value` points to.
        unsafe { result::mem_pool::get_attribute(pool(device)?, attribute, value) }.ok()?;
        Some(bytes)
    }

    pub fn keep(device: &CudaDevice) -> Option<()> {
        let mut bytes = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let value: *mut c_void = (&raw mut bytes).cast();
        // SAFETY: the attribute is a cuuint64_t, which `value` points to.
        unsafe { result::mem_pool::set_attribute(pool(device)?, attribute, value) }.ok()
    }
}
