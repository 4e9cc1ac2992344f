//! Element types, and how a kernel reads and writes them in their accumulation type: a chunk at a time, in plain loops
//! that compile to vector code inside [`super::simd::dispatch`]. Sums, whose order the compiler may not change, are
//! written in pulp's vectors.

use super::simd::{Isa, with_vectors};
use candle_core::{CpuStorage, WithDType};
use half::{bf16, f16};
use num_traits::Float;
use pulp::Simd;
use std::iter::zip;
use std::mem::MaybeUninit;
use std::ops::{Add, AddAssign};

/// Elements converted and summed at a time: what a kernel has of them stays in the first-level cache.
pub(crate) const CHUNK: usize = 1024;

/// Two sums over columns.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums(pub f64, pub f64);

impl Add for Sums {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0, self.1 + other.1)
    }
}

impl AddAssign for Sums {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// The type statistics and sums are computed in: f32, or f64 for f64.
pub(crate) trait Acc: Element<Acc = Self> + Float + AddAssign {
    const ZEROS: &'static [Self; CHUNK];
    const ONES: &'static [Self; CHUNK];

    fn of_f64(value: f64) -> Self;
    fn in_f64(self) -> f64;

    /// The sums of (x - center) and (x - center)^2 over a chunk.
    fn deviations(isa: Isa, x: &[Self], center: Self) -> Sums;
    /// The sums of dy*weight and dy*weight*(x - mean)*rstd over a chunk.
    fn products(isa: Isa, x: &[Self], dy: &[Self], weight: &[Self], mean: Self, rstd: Self)
    -> Sums;
}

/// A type that tensors hold.
pub(crate) trait Element: WithDType + bytemuck::Pod {
    type Acc: Acc;
    /// Room for a chunk in the accumulation type, where that is another one.
    type Buffer: Default;

    /// Whether [`Element::widen`] and [`Element::narrow`] become vector code in a loop of more than them. If not, loops
    /// that read and write a chunk convert it in a buffer.
    fn converts_in_loops(isa: Isa) -> bool;
    fn widen(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn narrow(value: Self::Acc) -> Self;

    /// A chunk in the accumulation type.
    fn read<'a>(isa: Isa, from: &'a [Self], buffer: &'a mut Self::Buffer) -> &'a [Self::Acc];
    /// Where a chunk is written in the accumulation type: `to` itself, or the buffer that [`Element::finish`] takes.
    fn slots<'a>(
        to: &'a mut [MaybeUninit<Self>],
        buffer: &'a mut Self::Buffer,
    ) -> &'a mut [MaybeUninit<Self::Acc>];
    /// Writes a chunk from its buffer.
    fn finish(isa: Isa, buffer: &Self::Buffer, to: &mut [MaybeUninit<Self>]);
    /// Rounds to nearest, ties to even.
    fn round(isa: Isa, from: &[Self::Acc], to: &mut [MaybeUninit<Self>]);

    fn to_storage(values: Vec<Self>) -> CpuStorage {
        Self::to_cpu_storage_owned(values)
    }
}

/// A chunk of f32 that is always written: zeros at first.
// Vectors of a buffer do not cross cache lines.
#[repr(align(64))]
pub(crate) struct Converted([MaybeUninit<f32>; CHUNK]);

impl Default for Converted {
    #[inline(always)]
    fn default() -> Self {
        Self([MaybeUninit::new(0.); CHUNK])
    }
}

impl Converted {
    #[inline(always)]
    #[allow(unsafe_code)]
    fn values(&self, len: usize) -> &[f32] {
        let slots = &self.0[..len];
        // SAFETY: zeros at first, and then only ever written; `MaybeUninit<f32>` has the layout of `f32`.
        unsafe { &*(std::ptr::from_ref(slots) as *const [f32]) }
    }
}

macro_rules! full_precision {
    ($t:ident, $vectors:ty, $splat:ident, $sub:ident, $mul:ident, $add:ident, $mul_add:ident, $as_simd:ident) => {
        impl Acc for $t {
            const ZEROS: &'static [Self; CHUNK] = &[0.; CHUNK];
            const ONES: &'static [Self; CHUNK] = &[1.; CHUNK];

            #[inline(always)]
            fn of_f64(value: f64) -> Self {
                value as $t
            }

            #[inline(always)]
            fn in_f64(self) -> f64 {
                self.into()
            }

            #[inline(always)]
            fn deviations(isa: Isa, x: &[Self], center: Self) -> Sums {
                with_vectors!(isa, simd => $t::deviations(simd, x, center))
            }

            #[inline(always)]
            fn products(
                isa: Isa,
                x: &[Self],
                dy: &[Self],
                weight: &[Self],
                mean: Self,
                rstd: Self,
            ) -> Sums {
                with_vectors!(isa, simd => $t::products(simd, x, dy, weight, mean, rstd))
            }
        }

        impl Element for $t {
            type Acc = $t;
            type Buffer = ();

            #[inline(always)]
            fn converts_in_loops(_: Isa) -> bool {
                true
            }

            #[inline(always)]
            fn widen(self) -> Self {
                self
            }

            #[inline(always)]
            fn narrow(value: Self) -> Self {
                value
            }

            #[inline(always)]
            fn read<'a>(_: Isa, from: &'a [Self], _: &'a mut ()) -> &'a [Self] {
                from
            }

            #[inline(always)]
            fn slots<'a>(to: &'a mut [MaybeUninit<Self>], _: &'a mut ()) -> &'a mut [MaybeUninit<Self>] {
                to
            }

            #[inline(always)]
            fn finish(_: Isa, _: &(), _: &mut [MaybeUninit<Self>]) {}

            #[inline(always)]
            fn round(_: Isa, from: &[Self], to: &mut [MaybeUninit<Self>]) {
                for (to, &from) in zip(to, from) {
                    to.write(from);
                }
            }
        }

        /// Four running sums of vectors, which hide the latency of an addition, for each of two sums.
        mod $t {
            use super::*;

            #[inline(always)]
            pub fn deviations<S: Simd>(simd: S, x: &[$t], center: $t) -> Sums {
                let centers = simd.$splat(center);
                let (mut sum, mut square) = ([simd.$splat(0.); 4], [simd.$splat(0.); 4]);
                let (x, x_rest) = S::$as_simd(x);
                let (x, x_fours) = pulp::as_arrays::<4, _>(x);
                for x in x {
                    for i in 0..4 {
                        let d = simd.$sub(x[i], centers);
                        sum[i] = simd.$add(sum[i], d);
                        square[i] = simd.$mul_add(d, d, square[i]);
                    }
                }
                for &x in x_fours {
                    let d = simd.$sub(x, centers);
                    sum[0] = simd.$add(sum[0], d);
                    square[0] = simd.$mul_add(d, d, square[0]);
                }
                let mut total = Sums(sum_of(simd, sum), sum_of(simd, square));
                for &x in x_rest {
                    let d = x - center;
                    total += Sums(d.in_f64(), (d * d).in_f64());
                }
                total
            }

            #[inline(always)]
            pub fn products<S: Simd>(
                simd: S,
                x: &[$t],
                dy: &[$t],
                weight: &[$t],
                mean: $t,
                rstd: $t,
            ) -> Sums {
                let (means, rstds) = (simd.$splat(mean), simd.$splat(rstd));
                let (mut sum, mut product) = ([simd.$splat(0.); 4], [simd.$splat(0.); 4]);
                let (x, x_rest) = S::$as_simd(x);
                let (dy, dy_rest) = S::$as_simd(dy);
                let (weight, weight_rest) = S::$as_simd(weight);
                let (x, x_fours) = pulp::as_arrays::<4, _>(x);
                let (dy, dy_fours) = pulp::as_arrays::<4, _>(dy);
                let (weight, weight_fours) = pulp::as_arrays::<4, _>(weight);
                for ((x, dy), weight) in zip(zip(x, dy), weight) {
                    for i in 0..4 {
                        let g = simd.$mul(dy[i], weight[i]);
                        let xhat = simd.$mul(simd.$sub(x[i], means), rstds);
                        sum[i] = simd.$add(sum[i], g);
                        product[i] = simd.$mul_add(g, xhat, product[i]);
                    }
                }
                for ((&x, &dy), &weight) in zip(zip(x_fours, dy_fours), weight_fours) {
                    let g = simd.$mul(dy, weight);
                    let xhat = simd.$mul(simd.$sub(x, means), rstds);
                    sum[0] = simd.$add(sum[0], g);
                    product[0] = simd.$mul_add(g, xhat, product[0]);
                }
                let mut total = Sums(sum_of(simd, sum), sum_of(simd, product));
                for ((&x, &dy), &weight) in zip(zip(x_rest, dy_rest), weight_rest) {
                    let g = dy * weight;
                    let xhat = (x - mean) * rstd;
                    total += Sums(g.in_f64(), (g * xhat).in_f64());
                }
                total
            }

            /// Vectors pairwise, then their lanes in f64.
            #[inline(always)]
            fn sum_of<S: Simd>(simd: S, [a, b, c, d]: [$vectors; 4]) -> f64 {
                let sum = simd.$add(simd.$add(a, b), simd.$add(c, d));
                let lanes: &[$t] = bytemuck::cast_slice(std::slice::from_ref(&sum));
                let mut total = 0.;
                for lane in lanes {
                    total += lane.in_f64();
                }
                total
            }
        }
    };
}

full_precision!(
    f32,
    S::f32s,
    splat_f32s,
    sub_f32s,
    mul_f32s,
    add_f32s,
    mul_add_e_f32s,
    as_simd_f32s
);
full_precision!(
    f64,
    S::f64s,
    splat_f64s,
    sub_f64s,
    mul_f64s,
    add_f64s,
    mul_add_e_f64s,
    as_simd_f64s
);

macro_rules! half_precision {
    ($t:ident, $widen:ident, $narrow:ident, $widen_one:ident, $narrow_one:ident, $in_loops:expr) => {
        impl Element for $t {
            type Acc = f32;
            type Buffer = Converted;

            #[inline(always)]
            fn converts_in_loops(isa: Isa) -> bool {
                $in_loops(isa)
            }

            #[inline(always)]
            fn widen(self) -> f32 {
                $widen_one(self.to_bits())
            }

            #[inline(always)]
            fn narrow(value: f32) -> Self {
                Self::from_bits($narrow_one(value))
            }

            #[inline(always)]
            fn read<'a>(isa: Isa, from: &'a [Self], buffer: &'a mut Converted) -> &'a [f32] {
                $widen(isa, from, &mut buffer.0[..from.len()]);
                buffer.values(from.len())
            }

            #[inline(always)]
            fn slots<'a>(
                to: &'a mut [MaybeUninit<Self>],
                buffer: &'a mut Converted,
            ) -> &'a mut [MaybeUninit<f32>] {
                &mut buffer.0[..to.len()]
            }

            #[inline(always)]
            fn finish(isa: Isa, buffer: &Converted, to: &mut [MaybeUninit<Self>]) {
                $narrow(isa, buffer.values(to.len()), to);
            }

            #[inline(always)]
            fn round(isa: Isa, from: &[f32], to: &mut [MaybeUninit<Self>]) {
                $narrow(isa, from, to);
            }
        }
    };
}

half_precision!(
    bf16,
    widen_bf16,
    narrow_bf16,
    f32_of_bf16_bits,
    bf16_bits,
    |_| true
);
half_precision!(
    f16,
    widen_f16,
    narrow_f16,
    f32_of_f16_bits,
    f16_bits,
    |isa: Isa| !isa.converts_f16()
);

#[inline(always)]
fn widen_bf16(_: Isa, from: &[bf16], to: &mut [MaybeUninit<f32>]) {
    for (to, from) in zip(to, from) {
        to.write(from.widen());
    }
}

#[inline(always)]
fn narrow_bf16(_: Isa, from: &[f32], to: &mut [MaybeUninit<bf16>]) {
    for (to, from) in zip(to, from) {
        to.write(bf16::narrow(*from));
    }
}

#[inline(always)]
fn widen_f16(isa: Isa, from: &[f16], to: &mut [MaybeUninit<f32>]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(token) = isa.f16c() {
        let (blocks, rest) = from.as_chunks();
        let (to_blocks, to_rest) = to.as_chunks_mut();
        for (to, from) in zip(to_blocks, blocks) {
            f16c::widen(token, from, to);
        }
        return widen_f16_bits(rest, to_rest);
    }
    let _ = isa;
    widen_f16_bits(from, to);
}

#[inline(always)]
fn widen_f16_bits(from: &[f16], to: &mut [MaybeUninit<f32>]) {
    for (to, from) in zip(to, from) {
        to.write(from.widen());
    }
}

#[inline(always)]
fn narrow_f16(isa: Isa, from: &[f32], to: &mut [MaybeUninit<f16>]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(token) = isa.f16c() {
        let (blocks, rest) = from.as_chunks();
        let (to_blocks, to_rest) = to.as_chunks_mut();
        for (to, from) in zip(to_blocks, blocks) {
            f16c::narrow(token, from, to);
        }
        return narrow_f16_bits(rest, to_rest);
    }
    let _ = isa;
    narrow_f16_bits(from, to);
}

#[inline(always)]
fn narrow_f16_bits(from: &[f32], to: &mut [MaybeUninit<f16>]) {
    for (to, from) in zip(to, from) {
        to.write(f16::narrow(*from));
    }
}

#[inline(always)]
fn f32_of_bf16_bits(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// bf16 of an f32, without branches. A NaN keeps its upper bits and becomes quiet.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    (if value.is_nan() { nan } else { rounded }) as u16
}

/// The f32 of an f16, without branches.
#[inline(always)]
fn f32_of_f16_bits(bits: u16) -> f32 {
    const EXPONENT: u32 = 0x7c00 << 13;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // 2^(127 - 15) moves the exponent to f32's bias, and makes a subnormal normal.
    let finite = (f32::from_bits(magnitude) * f32::from_bits((254 - 15) << 23)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let sign = u32::from(bits & 0x8000) << 16;
    f32::from_bits(
        sign | if magnitude >= EXPONENT {
            special
        } else {
            finite
        },
    )
}

/// f16 of an f32, without branches. A NaN keeps its upper bits and becomes quiet.
#[inline(always)]
fn f16_bits(value: f32) -> u16 {
    const INFINITY: u32 = 0x7f80_0000;
    /// 2^16: rounds to infinity, as all from 65520 do.
    const OVERFLOW: u32 = (127 + 16) << 23;
    /// 2^-14, f16's smallest normal.
    const NORMAL: u32 = (127 - 14) << 23;
    /// Its last place is that of f16's subnormals.
    const HALF: f32 = 0.5;
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let odd = magnitude >> 13 & 1;
    let normal = magnitude
        .wrapping_sub((127 - 15) << 23)
        .wrapping_add(0xfff + odd)
        >> 13;
    let subnormal = (f32::from_bits(magnitude) + HALF)
        .to_bits()
        .wrapping_sub(HALF.to_bits());
    let nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
    let special = if magnitude > INFINITY { nan } else { 0x7c00 };
    let rounded = if magnitude < NORMAL {
        subnormal
    } else {
        normal
    };
    let magnitude = if magnitude >= OVERFLOW {
        special
    } else {
        rounded
    };
    (bits >> 16 & 0x8000 | magnitude) as u16
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod f16c {
    use super::f16;
    use pulp::core_arch::x86::F16c;
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    #[inline(always)]
    pub fn widen(_: F16c, from: &[f16; 8], to: &mut [MaybeUninit<f32>; 8]) {
        // SAFETY: an `F16c` exists only where the machine has the instructions.
        unsafe { widen_unchecked(from, to) }
    }

    #[inline(always)]
    pub fn narrow(_: F16c, from: &[f32; 8], to: &mut [MaybeUninit<f16>; 8]) {
        // SAFETY: an `F16c` exists only where the machine has the instructions.
        unsafe { narrow_unchecked(from, to) }
    }

    #[target_feature(enable = "f16c")]
    #[inline]
    fn widen_unchecked(from: &[f16; 8], to: &mut [MaybeUninit<f32>; 8]) {
        let wide: [f32; 8] = bytemuck::cast(_mm256_cvtph_ps(bytemuck::cast(*from)));
        *to = written(wide);
    }

    #[target_feature(enable = "f16c")]
    #[inline]
    fn narrow_unchecked(from: &[f32; 8], to: &mut [MaybeUninit<f16>; 8]) {
        let from: __m256 = bytemuck::cast(*from);
        let narrow: [f16; 8] = bytemuck::cast(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(from));
        *to = written(narrow);
    }

    #[inline(always)]
    fn written<T: Copy>(values: [T; 8]) -> [MaybeUninit<T>; 8] {
        let mut written = [MaybeUninit::uninit(); 8];
        for (to, value) in std::iter::zip(&mut written, values) {
            to.write(value);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::dispatch;

    /// Every 251st f32, the neighbours of every f16 and bf16, and of the halfway points above them.
    fn f32s() -> Vec<f32> {
        let sample = (0..=u32::MAX).step_by(251);
        let near = (0..=u16::MAX).flat_map(|bits| {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            [half.to_f32().to_bits(), brain.to_f32().to_bits()]
                .into_iter()
                .flat_map(|bits| [bits, bits ^ 0x1000, bits ^ 0x8000])
                .flat_map(|bits| [bits.wrapping_sub(1), bits, bits.wrapping_add(1)])
        });
        sample.chain(near).map(f32::from_bits).collect()
    }

    /// What `read` makes of `values`, by chunks that end in every remainder of a vector.
    fn widened<T: Element<Acc = f32>>(isa: Isa, values: &[T]) -> Vec<f32> {
        let mut wide = Vec::new();
        let mut buffer = T::Buffer::default();
        for (index, chunk) in values.chunks(CHUNK).enumerate() {
            let (first, second) = chunk.split_at(index.min(chunk.len()));
            wide.extend_from_slice(T::read(isa, first, &mut buffer));
            wide.extend_from_slice(T::read(isa, second, &mut buffer));
        }
        wide
    }

    fn rounded<T: Element<Acc = f32>>(isa: Isa, values: &[f32]) -> Vec<T> {
        let mut narrow = crate::cpu::memory::Fresh::<T>::new(values.len());
        let slots = narrow.slots();
        for (index, (to, from)) in zip(slots.chunks_mut(CHUNK), values.chunks(CHUNK)).enumerate() {
            let middle = (index % 64).min(from.len());
            T::round(isa, &from[..middle], &mut to[..middle]);
            T::round(isa, &from[middle..], &mut to[middle..]);
        }
        // SAFETY: `round` writes all that it is given.
        #[allow(unsafe_code)]
        unsafe {
            narrow.assume_written()
        }
    }

    fn everywhere(check: impl Fn(Isa)) {
        check(Isa::Base);
        dispatch(&check);
    }

    #[test]
    fn every_half_widens_as_in_half() {
        let halves: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
        let brains: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let same = |got: f32, want: f32| {
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan())
        };
        everywhere(|isa| {
            for (half, wide) in zip(&halves, widened(isa, &halves)) {
                assert!(same(wide, half.to_f32()), "f16 {:#x}", half.to_bits());
            }
            for (brain, wide) in zip(&brains, widened(isa, &brains)) {
                assert!(same(wide, brain.to_f32()), "bf16 {:#x}", brain.to_bits());
            }
        });
    }

    #[test]
    fn f32_rounds_as_in_half() {
        let values = f32s();
        everywhere(|isa| {
            for (value, half) in zip(&values, rounded::<f16>(isa, &values)) {
                let want = f16::from_f32(*value).to_bits();
                assert_eq!(half.to_bits(), want, "f16 of {:#x}", value.to_bits());
            }
            for (value, brain) in zip(&values, rounded::<bf16>(isa, &values)) {
                let want = bf16::from_f32(*value).to_bits();
                assert_eq!(brain.to_bits(), want, "bf16 of {:#x}", value.to_bits());
            }
        });
    }
}
