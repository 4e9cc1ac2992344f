//! Memory for outputs: written once, by the threads that compute it, and never zeroed before.

use std::mem::MaybeUninit;

/// Room for `len` values that are not there yet.
pub(crate) struct Fresh<T> {
    values: Vec<T>,
    len: usize,
}

impl<T> Fresh<T> {
    pub fn new(len: usize) -> Self {
        let mut values = Vec::with_capacity(len);
        in_huge_pages(&mut values.spare_capacity_mut()[..len]);
        Self { values, len }
    }

    pub fn slots(&mut self) -> &mut [MaybeUninit<T>] {
        &mut self.values.spare_capacity_mut()[..self.len]
    }

    /// # Safety
    ///
    /// Every one of [`Fresh::slots`] was written.
    pub unsafe fn assume_written(mut self) -> Vec<T> {
        // SAFETY: the capacity is at least `len`, and the caller has written that many values.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

/// Writes zeros, and returns them as values.
pub(crate) fn zeroed<T: bytemuck::Pod>(slots: &mut [MaybeUninit<T>]) -> &mut [T] {
    slots.fill(MaybeUninit::new(T::zeroed()));
    // SAFETY: every slot was just written, and `MaybeUninit<T>` has the layout of `T`.
    unsafe { &mut *(std::ptr::from_mut(slots) as *mut [T]) }
}

/// Asks the kernel for huge pages: most of the time of an output of many megabytes goes into page faults, of which
/// there is one for 4 KiB else. Advice about memory that nobody else has; an error changes nothing.
#[cfg(target_os = "linux")]
fn in_huge_pages<T>(slots: &mut [MaybeUninit<T>]) {
    /// Two huge pages on most machines, so that one lies inside wherever the memory starts.
    const LEAST: usize = 4 << 20;
    const PAGE: usize = 4096;
    let bytes = size_of_val(slots);
    if bytes < LEAST {
        return;
    }
    let start = slots.as_mut_ptr().cast::<u8>();
    let skip = start.align_offset(PAGE);
    // SAFETY: whole pages inside an allocation of our own, whose contents the advice does not change.
    unsafe { libc::madvise(start.add(skip).cast(), bytes - skip, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn in_huge_pages<T>(_: &mut [MaybeUninit<T>]) {}
