//! The instruction sets that the loops are compiled for, and the choice between them at run time.

#[cfg(target_arch = "aarch64")]
use pulp::aarch64::Neon;
#[cfg(target_arch = "x86_64")]
use pulp::{
    core_arch::x86::{Avx512bf16, F16c},
    x86::{V3, V4},
};

#[cfg(target_arch = "x86_64")]
pulp::simd_type! {
    /// [`V3`], and the conversions of f16.
    struct Avx2 {
        avx: "avx",
        avx2: "avx2",
        fma: "fma",
        bmi1: "bmi1",
        bmi2: "bmi2",
        lzcnt: "lzcnt",
        popcnt: "popcnt",
        f16c: "f16c",
    }
}

#[cfg(target_arch = "x86_64")]
pulp::simd_type! {
    /// [`V4`], and the conversion to bf16.
    struct Avx512Bf16 {
        sse: "sse",
        sse2: "sse2",
        fxsr: "fxsr",
        sse3: "sse3",
        ssse3: "ssse3",
        sse4_1: "sse4.1",
        sse4_2: "sse4.2",
        popcnt: "popcnt",
        avx: "avx",
        avx2: "avx2",
        bmi1: "bmi1",
        bmi2: "bmi2",
        fma: "fma",
        lzcnt: "lzcnt",
        avx512f: "avx512f",
        avx512bw: "avx512bw",
        avx512cd: "avx512cd",
        avx512dq: "avx512dq",
        avx512vl: "avx512vl",
        avx512bf16: "avx512bf16",
    }
}

/// What a loop may use beyond plain Rust: a constant where the loop is inlined.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512(V4, Option<Avx512bf16>),
    #[cfg(target_arch = "x86_64")]
    Avx2(V3, F16c),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Base,
}

/// Runs `$body` with `$simd` bound to pulp's vectors of `$isa`.
macro_rules! with_vectors {
    ($isa:expr, $simd:ident => $body:expr) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::Avx512($simd, _) => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::Avx2($simd, _) => $body,
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::simd::Isa::Neon($simd) => $body,
            $crate::cpu::simd::Isa::Base => {
                let $simd = pulp::Scalar;
                $body
            }
        }
    };
}
pub(crate) use with_vectors;

/// Runs `f` compiled for the best instruction set of this machine. All that `f` calls must be inlined into it.
#[inline(always)]
pub(crate) fn dispatch<R>(f: impl FnOnce(Isa) -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if let (Some(bf16), Some(simd)) = (Avx512Bf16::try_new(), V4::try_new()) {
        return bf16.vectorize(
            #[inline(always)]
            || f(Isa::Avx512(simd, Some(bf16.avx512bf16))),
        );
    } else if let Some(simd) = V4::try_new() {
        return simd.vectorize(
            #[inline(always)]
            || f(Isa::Avx512(simd, None)),
        );
    } else if let (Some(avx2), Some(simd)) = (Avx2::try_new(), V3::try_new()) {
        return avx2.vectorize(
            #[inline(always)]
            || f(Isa::Avx2(simd, avx2.f16c)),
        );
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(simd) = Neon::try_new() {
        return simd.vectorize(
            #[inline(always)]
            || f(Isa::Neon(simd)),
        );
    }
    f(Isa::Base)
}

/// Runs `f` for each instruction set that this machine has, the best one included.
#[cfg(test)]
pub(crate) fn for_each_isa(f: impl Fn(Isa)) {
    f(Isa::Base);
    #[cfg(target_arch = "x86_64")]
    if let (Some(avx2), Some(simd)) = (Avx2::try_new(), V3::try_new()) {
        avx2.vectorize(
            #[inline(always)]
            || f(Isa::Avx2(simd, avx2.f16c)),
        );
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V4::try_new() {
        simd.vectorize(
            #[inline(always)]
            || f(Isa::Avx512(simd, None)),
        );
    }
    dispatch(f);
}
