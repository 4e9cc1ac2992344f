//! Element types: how a kernel reads and writes vectors of them in their accumulation type. pulp's vectors, and what pulp has not.

use super::memory::{self, LINE};
use super::simd::Isa;
use candle_core::{CpuStorage, WithDType};
use half::{bf16, f16};
use num_traits::Float;
use pulp::Simd;
use std::iter::zip;
use std::mem::MaybeUninit;
use std::ops::{Add, AddAssign};

/// Elements summed at a time: running sums of vectors do not grow beyond.
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
    type Vector<S: Simd>: bytemuck::Pod;

    fn of_f64(value: f64) -> Self;
    fn in_f64(self) -> f64;
    /// All bits set.
    fn all_bits() -> Self;

    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    fn add_lanes<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn sub_lanes<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn mul_lanes<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// a * b + c of running sums, of vectors alone: rounded once on machines that can.
    fn mul_add_lanes<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// a * b + c of elements, of which some are computed one at a time: rounded once on machines that can, whichever way.
    fn fused<S: Simd>(
        isa: Isa,
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// Bit by bit.
    fn and_lanes<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;

    /// Elements of a vector.
    #[inline(always)]
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }

    /// The sum of all lanes: vectors pairwise, then lanes in f64, by halves.
    #[inline(always)]
    fn total<S: Simd>(simd: S, [a, b, c, d]: [Self::Vector<S>; 4]) -> f64 {
        let sum = Self::add_lanes(
            simd,
            Self::add_lanes(simd, a, b),
            Self::add_lanes(simd, c, d),
        );
        let mut lanes = [0.; 16];
        for (lane, value) in zip(&mut lanes, lanes_of::<Self, S>(&sum)) {
            *lane = value.in_f64();
        }
        let mut half = Self::lanes::<S>() / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

#[inline(always)]
pub(crate) fn lanes_of<A: Acc, S: Simd>(vector: &A::Vector<S>) -> &[A] {
    bytemuck::cast_slice(std::slice::from_ref(vector))
}

/// A vector of what `T` is computed in.
pub(crate) type Vector<T, S> = <<T as Element>::Acc as Acc>::Vector<S>;

/// A type that tensors hold.
pub(crate) trait Element: WithDType + bytemuck::Pod {
    type Acc: Acc;
    const ZEROS: &'static [Self; LINE];
    const ONES: &'static [Self; LINE];
    /// From 1 to the next number.
    const EPSILON: f64;

    fn widen(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn narrow(value: Self::Acc) -> Self;

    /// A vector of as many elements.
    fn load<S: Simd>(isa: Isa, simd: S, from: &[Self]) -> Vector<Self, S>;
    /// Rounds to nearest, ties to even; past the caches if `STREAM`.
    fn store<S: Simd, const STREAM: bool>(
        isa: Isa,
        simd: S,
        value: Vector<Self, S>,
        to: &mut [MaybeUninit<Self>],
    );

    fn to_storage(values: Vec<Self>) -> CpuStorage {
        Self::to_cpu_storage_owned(values)
    }
}

macro_rules! full_precision {
    ($t:ident, $bits:ty, $vectors:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident, $mul_add:ident, $fused:ident, $and:ident) => {
        impl Acc for $t {
            type Vector<S: Simd> = S::$vectors;

            #[inline(always)]
            fn of_f64(value: f64) -> Self {
                value as $t
            }

            #[inline(always)]
            fn in_f64(self) -> f64 {
                self.into()
            }

            #[inline(always)]
            fn all_bits() -> Self {
                $t::from_bits(<$bits>::MAX)
            }

            #[inline(always)]
            fn splat<S: Simd>(simd: S, value: Self) -> S::$vectors {
                simd.$splat(value)
            }

            #[inline(always)]
            fn add_lanes<S: Simd>(simd: S, a: S::$vectors, b: S::$vectors) -> S::$vectors {
                simd.$add(a, b)
            }

            #[inline(always)]
            fn sub_lanes<S: Simd>(simd: S, a: S::$vectors, b: S::$vectors) -> S::$vectors {
                simd.$sub(a, b)
            }

            #[inline(always)]
            fn mul_lanes<S: Simd>(simd: S, a: S::$vectors, b: S::$vectors) -> S::$vectors {
                simd.$mul(a, b)
            }

            #[inline(always)]
            fn mul_add_lanes<S: Simd>(
                simd: S,
                a: S::$vectors,
                b: S::$vectors,
                c: S::$vectors,
            ) -> S::$vectors {
                simd.$mul_add(a, b, c)
            }

            #[inline(always)]
            fn fused<S: Simd>(
                isa: Isa,
                simd: S,
                a: S::$vectors,
                b: S::$vectors,
                c: S::$vectors,
            ) -> S::$vectors {
                match isa {
                    // One rounding would be a call there.
                    Isa::Base => simd.$add(simd.$mul(a, b), c),
                    _ => simd.$fused(a, b, c),
                }
            }

            #[inline(always)]
            fn and_lanes<S: Simd>(simd: S, a: S::$vectors, b: S::$vectors) -> S::$vectors {
                simd.$and(a, b)
            }
        }

        impl Element for $t {
            type Acc = $t;
            const ZEROS: &'static [Self; LINE] = &[0.; LINE];
            const ONES: &'static [Self; LINE] = &[1.; LINE];
            const EPSILON: f64 = $t::EPSILON as f64;

            #[inline(always)]
            fn widen(self) -> Self {
                self
            }

            #[inline(always)]
            fn narrow(value: Self) -> Self {
                value
            }

            #[inline(always)]
            fn load<S: Simd>(_: Isa, _: S, from: &[Self]) -> S::$vectors {
                bytemuck::pod_read_unaligned(bytemuck::cast_slice(from))
            }

            #[inline(always)]
            fn store<S: Simd, const STREAM: bool>(
                _: Isa,
                simd: S,
                value: S::$vectors,
                to: &mut [MaybeUninit<Self>],
            ) {
                memory::write::<S, Self, STREAM>(simd, to, lanes_of::<Self, S>(&value));
            }
        }
    };
}

full_precision!(
    f32,
    u32,
    f32s,
    splat_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    mul_add_e_f32s,
    mul_add_f32s,
    and_f32s
);
full_precision!(
    f64,
    u64,
    f64s,
    splat_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    mul_add_e_f64s,
    mul_add_f64s,
    and_f64s
);

macro_rules! half_precision {
    ($t:ident, $widen:ident, $narrow:ident, $widen_one:ident, $narrow_one:ident) => {
        impl Element for $t {
            type Acc = f32;
            const ZEROS: &'static [Self; LINE] = &[$t::ZERO; LINE];
            const ONES: &'static [Self; LINE] = &[$t::ONE; LINE];
            const EPSILON: f64 = $t::EPSILON.to_f64_const();

            #[inline(always)]
            fn widen(self) -> f32 {
                $widen_one(self.to_bits())
            }

            #[inline(always)]
            fn narrow(value: f32) -> Self {
                Self::from_bits($narrow_one(value))
            }

            #[inline(always)]
            fn load<S: Simd>(isa: Isa, simd: S, from: &[Self]) -> S::f32s {
                let mut wide = simd.splat_f32s(0.);
                let lanes = bytemuck::cast_slice_mut(std::slice::from_mut(&mut wide));
                assert_eq!(from.len(), lanes.len());
                $widen(isa, from, lanes);
                wide
            }

            #[inline(always)]
            fn store<S: Simd, const STREAM: bool>(
                isa: Isa,
                simd: S,
                value: S::f32s,
                to: &mut [MaybeUninit<Self>],
            ) {
                // As many as the widest vector has.
                let mut narrow = [$t::ZERO; 16];
                let narrow = &mut narrow[..f32::lanes::<S>()];
                $narrow(isa, lanes_of::<f32, S>(&value), narrow);
                memory::write::<S, Self, STREAM>(simd, to, narrow);
            }
        }
    };
}

half_precision!(bf16, widen_bf16, narrow_bf16, f32_of_bf16_bits, bf16_bits);
half_precision!(f16, widen_f16, narrow_f16, f32_of_f16_bits, f16_bits);

#[inline(always)]
fn widen_bf16(isa: Isa, from: &[bf16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512(simd, _), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx512::widen_bf16(simd, from));
    } else if let (Isa::Avx2(simd, _), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx2::widen_bf16(simd, from));
    }
    let _ = isa;
    for (to, from) in zip(to, from) {
        *to = from.widen();
    }
}

#[inline(always)]
fn narrow_bf16(isa: Isa, from: &[f32], to: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512(simd, Some(bf16)), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx512bf16::narrow(simd, bf16, from));
    } else if let (Isa::Avx512(simd, None), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx512::narrow_bf16(simd, from));
    } else if let (Isa::Avx2(simd, _), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx2::narrow_bf16(simd, from));
    }
    let _ = isa;
    for (to, from) in zip(to, from) {
        *to = bf16::narrow(*from);
    }
}

#[inline(always)]
fn widen_f16(isa: Isa, from: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512(simd, _), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx512::widen_f16(simd, from));
    } else if let (Isa::Avx2(_, token), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&f16c::widen(token, from));
    }
    let _ = isa;
    for (to, from) in zip(to, from) {
        *to = from.widen();
    }
}

#[inline(always)]
fn narrow_f16(isa: Isa, from: &[f32], to: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512(simd, _), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&avx512::narrow_f16(simd, from));
    } else if let (Isa::Avx2(_, token), Ok(from)) = (isa, from.try_into()) {
        return to.copy_from_slice(&f16c::narrow(token, from));
    }
    let _ = isa;
    for (to, from) in zip(to, from) {
        *to = f16::narrow(*from);
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

/// Vectors of 16.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{bf16, f16};
    use pulp::x86::V4;
    use std::arch::x86_64::{__m512i, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT};

    #[inline(always)]
    pub fn widen_bf16(simd: V4, from: &[bf16; 16]) -> [f32; 16] {
        let avx = simd.avx512f;
        let lanes = avx._mm512_cvtepu16_epi32(bytemuck::cast(*from));
        bytemuck::cast(avx._mm512_slli_epi32::<16>(lanes))
    }

    #[inline(always)]
    pub fn narrow_bf16(simd: V4, from: &[f32; 16]) -> [bf16; 16] {
        let (avx, bw) = (simd.avx512f, simd.avx512bw);
        let value = bytemuck::cast(*from);
        let bits: __m512i = bytemuck::cast(*from);
        let odd = avx._mm512_test_epi32_mask(bits, avx._mm512_set1_epi32(0x1_0000));
        let up = avx._mm512_add_epi32(bits, avx._mm512_set1_epi32(0x7fff));
        let rounded = avx._mm512_mask_add_epi32(up, odd, bits, avx._mm512_set1_epi32(0x8000));
        let is_nan = avx._mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        let quiet_bit = avx._mm512_set1_epi32(0x40_0000);
        let lanes = avx._mm512_mask_or_epi32(rounded, is_nan, bits, quiet_bit);
        let halves = bw._mm512_permutexvar_epi16(bytemuck::cast(UPPER), lanes);
        bytemuck::cast(avx._mm512_castsi512_si256(halves))
    }

    /// The upper half of each lane, then of each lane again.
    const UPPER: [u16; 32] = {
        let mut from = [0; 32];
        let mut half = 0;
        while half < 32 {
            from[half] = 2 * (half as u16 % 16) + 1;
            half += 1;
        }
        from
    };

    #[inline(always)]
    pub fn widen_f16(simd: V4, from: &[f16; 16]) -> [f32; 16] {
        bytemuck::cast(simd.avx512f._mm512_cvtph_ps(bytemuck::cast(*from)))
    }

    #[inline(always)]
    pub fn narrow_f16(simd: V4, from: &[f32; 16]) -> [f16; 16] {
        let value = bytemuck::cast(*from);
        bytemuck::cast(
            simd.avx512f
                ._mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value),
        )
    }
}

/// bf16 in fewer instructions than the compiler finds: the upper bytes of a vector's lanes in one shuffle.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::bf16;
    use pulp::x86::V3;
    use std::arch::x86_64::{__m256i, _CMP_UNORD_Q};

    #[inline(always)]
    pub fn widen_bf16(simd: V3, from: &[bf16; 8]) -> [f32; 8] {
        let both_halves = simd.avx2._mm256_broadcastsi128_si256(bytemuck::cast(*from));
        bytemuck::cast(
            simd.avx2
                ._mm256_shuffle_epi8(both_halves, bytemuck::cast(UPPER_OF_LANES)),
        )
    }

    #[inline(always)]
    pub fn narrow_bf16(simd: V3, from: &[f32; 8]) -> [bf16; 8] {
        let (avx, avx2) = (simd.avx, simd.avx2);
        let value = bytemuck::cast(*from);
        let bits: __m256i = bytemuck::cast(*from);
        let odd =
            avx2._mm256_and_si256(avx2._mm256_srli_epi32::<16>(bits), avx._mm256_set1_epi32(1));
        let up = avx2._mm256_add_epi32(bits, avx._mm256_set1_epi32(0x7fff));
        let rounded = avx2._mm256_add_epi32(up, odd);
        let quiet = avx2._mm256_or_si256(bits, avx._mm256_set1_epi32(0x40_0000));
        let is_nan = bytemuck::cast(avx._mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
        let lanes = avx2._mm256_blendv_epi8(rounded, quiet, is_nan);
        let halves = avx2._mm256_shuffle_epi8(lanes, bytemuck::cast(LANES_TO_LOW));
        let low = avx2._mm256_permute4x64_epi64::<0b1000>(halves);
        bytemuck::cast(avx._mm256_castsi256_si128(low))
    }

    /// A byte of 0.
    const NONE: u8 = 0x80;

    /// The bytes of each half of 16 go to the upper bytes of four lanes, those of the first half to the first.
    const UPPER_OF_LANES: [u8; 32] = {
        let mut from = [NONE; 32];
        let mut lane = 0;
        while lane < 8 {
            from[4 * lane + 2] = 2 * lane as u8;
            from[4 * lane + 3] = 2 * lane as u8 + 1;
            lane += 1;
        }
        from
    };

    /// The upper bytes of the four lanes of each half go to its first eight bytes.
    const LANES_TO_LOW: [u8; 32] = {
        let mut from = [NONE; 32];
        let mut lane = 0;
        while lane < 8 {
            let to = lane / 4 * 16 + lane % 4 * 2;
            from[to] = lane as u8 % 4 * 4 + 2;
            from[to + 1] = lane as u8 % 4 * 4 + 3;
            lane += 1;
        }
        from
    };
}

/// bf16 in one instruction.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512bf16 {
    use super::{avx512, bf16};
    use pulp::core_arch::x86::Avx512bf16;
    use pulp::x86::V4;
    use std::arch::x86_64::*;

    #[inline(always)]
    pub fn narrow(simd: V4, _: Avx512bf16, from: &[f32; 16]) -> [bf16; 16] {
        const SUBNORMAL: i32 = 0x20;
        // The instruction takes subnormal numbers for 0.
        let value = bytemuck::cast(*from);
        if simd.avx512dq._mm512_fpclass_ps_mask::<SUBNORMAL>(value) != 0 {
            return avx512::narrow_bf16(simd, from);
        }
        // SAFETY: an `Avx512bf16` exists only where the machine has the instruction, and 16 bf16 are of the size and bits of its result.
        unsafe { std::mem::transmute(narrow_unchecked(value)) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn narrow_unchecked(value: __m512) -> __m256bh {
        _mm512_cvtneps_pbh(value)
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod f16c {
    use super::f16;
    use pulp::core_arch::x86::F16c;
    use std::arch::x86_64::*;

    #[inline(always)]
    pub fn widen(_: F16c, from: &[f16; 8]) -> [f32; 8] {
        // SAFETY: an `F16c` exists only where the machine has the instructions.
        unsafe { widen_unchecked(from) }
    }

    #[inline(always)]
    pub fn narrow(_: F16c, from: &[f32; 8]) -> [f16; 8] {
        // SAFETY: an `F16c` exists only where the machine has the instructions.
        unsafe { narrow_unchecked(from) }
    }

    #[target_feature(enable = "f16c")]
    #[inline]
    fn widen_unchecked(from: &[f16; 8]) -> [f32; 8] {
        bytemuck::cast(_mm256_cvtph_ps(bytemuck::cast(*from)))
    }

    #[target_feature(enable = "f16c")]
    #[inline]
    fn narrow_unchecked(from: &[f32; 8]) -> [f16; 8] {
        let from: __m256 = bytemuck::cast(*from);
        bytemuck::cast(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::row;
    use crate::cpu::simd::{for_each_isa, with_vectors};

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

    fn widen_part<T: Element<Acc = f32>, S: Simd>(
        isa: Isa,
        simd: S,
        values: &[T],
        wide: &mut Vec<f32>,
    ) {
        let mut vectors = values.chunks_exact(f32::lanes::<S>());
        for vector in &mut vectors {
            wide.extend(lanes_of::<f32, S>(&T::load(isa, simd, vector)));
        }
        wide.extend(vectors.remainder().iter().map(|value| value.widen()));
    }

    /// What `load` makes of `values`, by chunks that end in every remainder of a vector.
    fn widened<T: Element<Acc = f32>>(isa: Isa, values: &[T]) -> Vec<f32> {
        let mut wide = Vec::new();
        for (index, chunk) in values.chunks(CHUNK).enumerate() {
            let (first, second) = chunk.split_at(index.min(chunk.len()));
            for part in [first, second] {
                with_vectors!(isa, simd => widen_part(isa, simd, part, &mut wide));
            }
        }
        wide
    }

    fn rounded<T: Element<Acc = f32>>(isa: Isa, values: &[f32]) -> Vec<T> {
        let mut narrow = crate::cpu::memory::Fresh::<T>::new(values.len());
        let slots = narrow.slots();
        for (index, (to, from)) in zip(slots.chunks_mut(CHUNK), values.chunks(CHUNK)).enumerate() {
            let middle = (index % 64).min(from.len());
            row::round(isa, &from[..middle], &mut to[..middle]);
            row::round(isa, &from[middle..], &mut to[middle..]);
        }
        // SAFETY: `round` writes all that it is given.
        #[allow(unsafe_code)]
        unsafe {
            narrow.assume_written()
        }
    }

    #[test]
    fn every_half_widens_as_in_half() {
        let halves: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
        let brains: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let same = |got: f32, want: f32| {
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan())
        };
        for_each_isa(|isa| {
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
        for_each_isa(|isa| {
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
