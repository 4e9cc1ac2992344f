//! Memory for outputs: written once, by the threads that compute it, and never zeroed before. How it is written and read.

use pulp::Simd;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut, Range};

/// The unit that caches and memory exchange, in bytes.
pub(crate) const LINE: usize = 64;

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

/// Values of a row's columns, of which the one behind the first `head` starts at a cache line, as it does in an output of which
/// [`super::row::head_of_first`] is that: vectors that cross lines take twice as long.
pub(crate) struct InLine<A> {
    values: Vec<A>,
    columns: Range<usize>,
}

impl<A: bytemuck::Pod> InLine<A> {
    pub fn zeros(len: usize, head: usize) -> Self {
        let line = LINE / size_of::<A>();
        let values = vec![A::zeroed(); len + 2 * line];
        let skip = values.as_ptr().align_offset(LINE) + head.wrapping_neg() % line;
        Self {
            values,
            columns: skip..skip + len,
        }
    }
}

impl<A> Deref for InLine<A> {
    type Target = [A];

    fn deref(&self) -> &[A] {
        &self.values[self.columns.clone()]
    }
}

impl<A> DerefMut for InLine<A> {
    fn deref_mut(&mut self) -> &mut [A] {
        &mut self.values[self.columns.clone()]
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
    let whole = (bytes - skip) / PAGE * PAGE;
    // SAFETY: inside an allocation of our own, whose contents the advice does not change, nor those of what shares pages larger than these.
    unsafe { libc::madvise(start.add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn in_huge_pages<T>(_: &mut [MaybeUninit<T>]) {}

/// Bytes of a row that is worth to begin at a cache line.
pub(crate) const WIDE: usize = 32 * LINE;
/// Outputs from this size on may be written past the caches: with what is read for them, they are more than most hold.
const STREAMED_BYTES: usize = 16 << 20;

/// Whether to write rows of `cols` slots past the caches, without reading them first: if they are more than a cache holds, memory is
/// there, and few lines belong to two rows. A page that is not there is zeroed at the first write to it, and then in a cache.
pub(crate) fn streams<T>(slots: &[MaybeUninit<T>], cols: usize) -> bool {
    size_of_val(slots) >= STREAMED_BYTES && cols * size_of::<T>() >= WIDE && is_resident(slots)
}

/// By a sample of pages.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn is_resident<T>(slots: &[MaybeUninit<T>]) -> bool {
    const PAGE: usize = 4096;
    const SAMPLES: usize = 8;
    let start = slots.as_ptr().cast_mut().cast::<u8>();
    let skip = start.align_offset(PAGE);
    let pages = (size_of_val(slots) - skip) / PAGE;
    (0..SAMPLES).all(|sample| {
        let page = (pages - 1) * sample / (SAMPLES - 1);
        let mut state = 0;
        // SAFETY: a page inside the slots, which the call does not touch, and a byte for its state.
        let failed =
            unsafe { libc::mincore(start.add(skip + page * PAGE).cast(), PAGE, &mut state) };
        failed == 0 && state & 1 == 1
    })
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn is_resident<T>(_: &[MaybeUninit<T>]) -> bool {
    false
}

/// Writes a vector of `simd`'s over as many elements, past the caches if `STREAM` and they are aligned.
#[inline(always)]
pub(crate) fn write<S: Simd, T: bytemuck::Pod, const STREAM: bool>(
    _simd: S,
    to: &mut [MaybeUninit<T>],
    values: &[T],
) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if STREAM && to.as_ptr().cast::<u8>().align_offset(size_of_val(values)) == 0 {
        use std::arch::x86_64::{
            __m128i, __m256i, __m512i, _mm_stream_si128, _mm256_stream_si256, _mm512_stream_si512,
        };
        assert_eq!(to.len(), values.len());
        let to = to.as_mut_ptr();
        // SAFETY: aligned slots of this size; there are values of 32 and 64 bytes only where the machine has registers of them.
        unsafe {
            match size_of_val(values) {
                16 => {
                    return _mm_stream_si128(
                        to.cast(),
                        values.as_ptr().cast::<__m128i>().read_unaligned(),
                    );
                }
                32 if size_of::<S::f32s>() >= 32 => {
                    return _mm256_stream_si256(
                        to.cast(),
                        values.as_ptr().cast::<__m256i>().read_unaligned(),
                    );
                }
                64 if size_of::<S::f32s>() >= 64 => {
                    return _mm512_stream_si512(
                        to.cast(),
                        values.as_ptr().cast::<__m512i>().read_unaligned(),
                    );
                }
                _ => {}
            }
        }
    }
    to.write_copy_of_slice(values);
}

/// After writes past the caches, and before another thread is told of them.
pub(crate) fn fence() {
    // SAFETY: every x86-64 has it.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Asks for the line at this place of `values`, or behind them, which is no access.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T], index: usize) {
    let place = values.as_ptr().wrapping_add(index);
    // SAFETY: a hint about an address, whatever is there.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(place.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = place;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_start_a_line_behind_the_head() {
        fn check<A: bytemuck::Pod + PartialEq + std::fmt::Debug>() {
            for len in [0, 1, 64, 769] {
                for head in 0..2 * LINE {
                    let mut values = InLine::<A>::zeros(len, head);
                    assert_eq!(*values, vec![A::zeroed(); len]);
                    let at_head = values.as_ptr().wrapping_add(head);
                    assert_eq!(
                        at_head.align_offset(LINE),
                        0,
                        "{len} columns, {head} of them before"
                    );
                    values.fill(A::zeroed());
                }
            }
        }
        check::<f32>();
        check::<f64>();
    }
}
