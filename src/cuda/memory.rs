//! Memory of calls that no tensor of candle's holds: mean and rstd, and the sums that blocks leave for the next launch.
//!
//! A piece from candle comes with two events, and the driver takes a microsecond to give it and to take it back: of a small call's time, a fifth.
//! So a thread keeps small pieces that it has dropped for its next calls of the same size, which run behind those that used them.

use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstreamCaptureStatus};
use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError, SyncOnDrop, result,
};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, ThreadId};

/// Bytes of a piece that is kept, and of all that a thread keeps; and how many of them there are.
const PIECE_BYTES: usize = 512 << 10;
const KEPT_BYTES: usize = 4 << 20;
const KEPT_PIECES: usize = 128;

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::new(Kept {
        pieces: VecDeque::new(),
        bytes: 0,
        thread: thread::current().id(),
    });
}

/// Bytes on a device, uninitialised, for the calls of its stream.
pub(crate) struct Memory(Inner);

enum Inner {
    /// Where no events order streams: candle has one, or one a thread. None once it is given back.
    Untracked(Option<Piece>),
    /// Where cudarc orders streams by events.
    Tracked(CudaSlice<u8>),
}

/// Goes back to the driver when it is dropped.
struct Piece {
    pointer: CUdeviceptr,
    bytes: usize,
    stream: Arc<CudaStream>,
    device: DeviceId,
    /// Whose next calls it may be kept for.
    thread: Option<ThreadId>,
}

struct Kept {
    /// The oldest first.
    pieces: VecDeque<Piece>,
    bytes: usize,
    thread: ThreadId,
}

impl Memory {
    /// `bytes` of them, or one if they are none.
    pub fn take(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(1);
        let stream = device.cuda_stream();
        let context = stream.context();
        if context.is_managing_stream_synchronization() || !context.has_async_alloc() {
            // SAFETY: kernels alone read it, whose launches answer for what they read.
            return Ok(Self(Inner::Tracked(unsafe { device.alloc(bytes)? })));
        }
        // A captured graph runs when it is launched, on any stream: what it uses is its own.
        let status = stream.capture_status().w()?;
        let captured = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (kept, thread) = match bytes <= PIECE_BYTES && !captured {
            true => KEPT.with_borrow_mut(|kept| (kept.take(device.id(), bytes), Some(kept.thread))),
            false => (None, None),
        };
        let piece = match kept {
            Some(piece) => piece,
            None => Piece {
                // SAFETY: as above; `capture_status` has bound the context.
                pointer: unsafe { result::malloc_async(stream.cu_stream(), bytes) }.w()?,
                bytes,
                stream,
                device: device.id(),
                thread,
            },
        };
        Ok(Self(Inner::Untracked(Some(piece))))
    }

    /// Its address, for a kernel that reads it, and what says once it is dropped, behind the launch, that the stream has.
    pub fn read<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        match &self.0 {
            Inner::Untracked(piece) => (pointer(piece), SyncOnDrop::Record(None)),
            Inner::Tracked(slice) => slice.device_ptr(stream),
        }
    }

    /// As [`read`](Self::read), for one that writes it.
    pub fn write<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        match &mut self.0 {
            Inner::Untracked(piece) => (pointer(piece), SyncOnDrop::Record(None)),
            Inner::Tracked(slice) => slice.device_ptr_mut(stream),
        }
    }
}

fn pointer(piece: &Option<Piece>) -> CUdeviceptr {
    piece.as_ref().map_or(0, |piece| piece.pointer)
}

impl Kept {
    fn take(&mut self, device: DeviceId, bytes: usize) -> Option<Piece> {
        // The latest: a cache still holds it.
        let index = self
            .pieces
            .iter()
            .rposition(|piece| piece.bytes == bytes && piece.device == device)?;
        self.bytes -= bytes;
        self.pieces.remove(index)
    }

    /// Frees it where it is not this thread's.
    fn put(&mut self, piece: Piece) {
        if piece.thread != Some(self.thread) {
            return;
        }
        self.bytes += piece.bytes;
        self.pieces.push_back(piece);
        while self.bytes > KEPT_BYTES || self.pieces.len() > KEPT_PIECES {
            self.bytes -= self.pieces.pop_front().map_or(0, |piece| piece.bytes);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Inner::Untracked(piece) = &mut self.0 else {
            return;
        };
        let Some(piece) = piece.take() else { return };
        let managing = piece.stream.context().is_managing_stream_synchronization();
        if piece.thread.is_some() && !managing {
            // A thread that ends keeps nothing.
            let _ = KEPT.try_with(|kept| kept.borrow_mut().put(piece));
        }
    }
}

impl Piece {
    fn free(&self) -> std::result::Result<(), DriverError> {
        let context = self.stream.context();
        context.bind_to_thread()?;
        if context.is_managing_stream_synchronization() {
            // There were no other streams when it was taken, and no event says which of them has read it since.
            context.synchronize()?;
        }
        // SAFETY: `malloc_async` gave it, and who owned it has let it go.
        unsafe { result::free_async(self.pointer, self.stream.cu_stream()) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // As cudarc does: the next call that can fail does.
        self.stream.context().record_err(self.free());
    }
}
