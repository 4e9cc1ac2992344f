//! Launching a planned kernel, whose arguments the caller vouches for.

use super::memory::Memory;
use super::ptx;
use crate::plan::{DeviceFacts, Launch};
use crate::problem::Problem;
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Result};
use cudarc::driver::{CudaFunction, CudaStream, CudaView, DevicePtrMut, SyncOnDrop, sys};
use smallvec::SmallVec;
use std::ffi::c_void;
use std::marker::PhantomData;

/// A loaded kernel, as long as its module is.
#[derive(Clone, Copy)]
pub(super) struct Function(sys::CUfunction);

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    pub fn of(function: &CudaFunction) -> Self {
        Self(function.cu_function())
    }
}

/// What the driver is told of a launch beyond its grid.
fn attributes(launch: &Launch) -> SmallVec<[sys::CUlaunchAttribute; 3]> {
    use sys::CUlaunchAttributeID as A;
    let attribute = |id| sys::CUlaunchAttribute {
        id,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { pad: [0; 64] },
    };
    let mut attributes = SmallVec::new();
    if launch.cluster > 1 {
        let mut a = attribute(A::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
        a.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
            x: launch.cluster,
            y: 1,
            z: 1,
        };
        attributes.push(a);
    }
    if launch.cooperative {
        let mut a = attribute(A::CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
        a.value.cooperative = 1;
        attributes.push(a);
    }
    if launch.early {
        let mut a = attribute(A::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
        a.value.programmaticStreamSerializationAllowed = 1;
        attributes.push(a);
    }
    attributes
}

/// A buffer that kernels read: its address, and what says once it is dropped, behind the launches, that the stream has read it.
///
/// cudarc gives the address out along with a wait for the buffer's writer and a record of the reader, so it is asked once.
pub(super) struct Input<'a, T> {
    pointer: sys::CUdeviceptr,
    _read: SyncOnDrop<'a>,
    element: PhantomData<T>,
}

impl<'a, T> Input<'a, T> {
    pub fn new(view: CudaView<'a, T>, stream: &'a CudaStream) -> Self {
        let (pointer, read) = view.view_ptr(stream);
        Self {
            pointer,
            _read: read,
            element: PhantomData,
        }
    }

    /// Elements from `first` on.
    pub fn of_memory(memory: &'a Memory, first: usize, stream: &'a CudaStream) -> Self {
        let (pointer, read) = memory.read(stream);
        Self {
            pointer: pointer + (first * size_of::<T>()) as sys::CUdeviceptr,
            _read: read,
            element: PhantomData,
        }
    }

    pub fn starts_on_16(&self) -> bool {
        self.pointer.is_multiple_of(16)
    }
}

/// A kernel's arguments, in its order: outputs, inputs, scalars.
///
/// Each is kept in a cell of 8 bytes; the driver reads as many of them as the parameter has.
pub(super) struct Arguments<'a> {
    stream: &'a CudaStream,
    cells: SmallVec<[[u8; 8]; 24]>,
    // Record, once the launch is queued, that these outputs are in use.
    guards: SmallVec<[SyncOnDrop<'a>; 6]>,
}

impl<'a> Arguments<'a> {
    pub fn new(stream: &'a CudaStream) -> Self {
        Self {
            stream,
            cells: SmallVec::new(),
            guards: SmallVec::new(),
        }
    }

    fn cell(&mut self, bytes: &[u8]) {
        let mut cell = [0; 8];
        cell[..bytes.len()].copy_from_slice(bytes);
        self.cells.push(cell);
    }

    /// A buffer the kernel writes, or null.
    pub fn output<T>(&mut self, slice: Option<&'a mut impl DevicePtrMut<T>>) {
        let pointer = slice.filter(|slice| slice.len() > 0).map(|slice| {
            let (pointer, guard) = slice.device_ptr_mut(self.stream);
            self.guards.push(guard);
            pointer
        });
        self.pointer(pointer);
    }

    /// Memory the kernel writes, or null.
    pub fn memory(&mut self, memory: Option<&'a mut Memory>) {
        let pointer = self.written(memory);
        self.pointer(pointer);
    }

    /// mean and rstd, or null: `means` of A, which come before the rstds, may be none.
    pub fn statistics<A>(&mut self, memory: Option<&'a mut Memory>, means: usize) {
        let mean = self.written(memory);
        self.pointer(mean.filter(|_| means > 0));
        self.pointer(mean.map(|mean| mean + (means * size_of::<A>()) as sys::CUdeviceptr));
    }

    fn written(&mut self, memory: Option<&'a mut Memory>) -> Option<sys::CUdeviceptr> {
        let (pointer, guard) = memory?.write(self.stream);
        self.guards.push(guard);
        Some(pointer)
    }

    fn pointer(&mut self, pointer: Option<sys::CUdeviceptr>) {
        self.cell(&pointer.unwrap_or_default().to_ne_bytes());
    }

    /// A buffer the kernel reads, or null.
    pub fn input<T>(&mut self, input: Option<&'a Input<'_, T>>) {
        self.pointer(input.map(|input| input.pointer));
    }

    pub fn i64(&mut self, value: usize) {
        self.cell(&(value as i64).to_ne_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.cell(&value.to_ne_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.cell(&value.to_ne_bytes());
    }

    pub fn i32(&mut self, value: usize) {
        self.cell(&(value as i32).to_ne_bytes());
    }

    pub fn bool(&mut self, value: bool) {
        self.i32(usize::from(value));
    }

    /// A scalar in the accumulation type.
    pub fn acc<A: super::Acc>(&mut self, value: f64) {
        A::with_bytes(value, |bytes| self.cell(bytes));
    }

    /// Queues the kernel on the stream.
    ///
    /// # Safety
    /// The arguments must be those of `launch.entry` in number, order and type, and the buffers as long as the kernel's
    /// comments say for the problem's rows and cols. `launch` must come from [`crate::plan`] for this problem, and for an
    /// [`crate::plan::Access`] that the pointers allow.
    pub unsafe fn launch(
        mut self,
        problem: &Problem,
        device: &CudaDevice,
        facts: &DeviceFacts,
        launch: &Launch,
    ) -> Result<()> {
        let op = problem.op_name();
        let dtypes = (problem.dtype, problem.param_dtype);
        let function = ptx::function(op, device, facts, dtypes, launch)?;
        let mut parameters: SmallVec<[*mut c_void; 24]> = self
            .cells
            .iter_mut()
            .map(|c| c.as_mut_ptr().cast())
            .collect();
        let mut attributes = attributes(launch);
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: 1,
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: `config`, `attributes` and `parameters` outlive the call, which copies them; the caller vouches for
        // what the parameters mean.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.0,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| {
            candle_core::Error::Msg(format!("{op}: cannot launch {launch:?}: {error}"))
        })
    }
}
