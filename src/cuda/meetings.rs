//! Memory through which the blocks of a row meet (ring.cuh). A kernel finds it zero and leaves it zero, so that no call has to clear it.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, sys::CUstreamCaptureStatus};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, Result};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

thread_local! {
    // Of each thread, because candle's stream is (`CU_STREAM_PER_THREAD`), and calls on two streams may run at once.
    static KEPT: RefCell<HashMap<DeviceId, CudaSlice<u8>>> = RefCell::default();
}

/// Zeros, which are this thread's next call's once this one is queued.
pub(super) struct Meetings {
    zeros: Option<CudaSlice<u8>>,
    /// The device for which they are kept.
    keep: Option<DeviceId>,
}

impl Meetings {
    /// `bytes` or more.
    pub fn take(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let status = device.cuda_stream().capture_status().w()?;
        // A captured graph runs when it is launched, on any stream: what it uses is its own.
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(Self {
                zeros: Some(device.alloc_zeros(bytes)?),
                keep: None,
            });
        }
        let kept = KEPT.with_borrow_mut(|kept| {
            // A device that is gone has left its stream to them alone.
            kept.retain(|_, zeros| Arc::strong_count(zeros.stream()) > 1);
            kept.remove(&device.id())
        });
        let zeros = match kept.filter(|zeros| zeros.len() >= bytes) {
            Some(zeros) => zeros,
            None => device.alloc_zeros(bytes.next_power_of_two())?,
        };
        Ok(Self {
            zeros: Some(zeros),
            keep: Some(device.id()),
        })
    }

    /// The kernel's argument.
    pub fn zeros(&mut self) -> Option<&mut CudaSlice<u8>> {
        self.zeros.as_mut()
    }
}

impl Drop for Meetings {
    fn drop(&mut self) {
        if let (Some(zeros), Some(device)) = (self.zeros.take(), self.keep) {
            // A thread that ends keeps nothing.
            let _ = KEPT.try_with(|kept| kept.borrow_mut().insert(device, zeros));
        }
    }
}
