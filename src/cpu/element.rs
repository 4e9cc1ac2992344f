//! Element types, and how a kernel reads and writes them in their accumulation type.

use candle_core::{CpuStorage, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use num_traits::Float;
use std::borrow::Cow;
use std::ops::AddAssign;

/// The type statistics and sums are computed in: f32, or f64 for f64.
pub(crate) trait Acc: Element<Acc = Self> + Float + AddAssign {
    fn narrow(value: f64) -> Self;
    fn widen_to_f64(self) -> f64;
}

/// A type that tensors hold.
pub(crate) trait Element: WithDType + bytemuck::Pod {
    type Acc: Acc;

    /// The values of `src`, converted into `buffer` where the type is not its own accumulation type.
    fn read<'a>(src: &'a [Self], buffer: &'a mut [Self::Acc]) -> &'a [Self::Acc];
    /// Lets `fill` write every value of `dst`, through `buffer` where the type is not its own accumulation type.
    fn write(dst: &mut [Self], buffer: &mut [Self::Acc], fill: impl FnOnce(&mut [Self::Acc]));
    /// All values in the accumulation type.
    fn widen(src: &[Self]) -> Cow<'_, [Self::Acc]>;
    /// The values rounded to nearest.
    fn round(values: Vec<Self::Acc>) -> Vec<Self>;

    fn to_storage(values: Vec<Self>) -> CpuStorage {
        Self::to_cpu_storage_owned(values)
    }
}

macro_rules! full_precision {
    ($t:ty) => {
        impl Acc for $t {
            #[inline(always)]
            fn narrow(value: f64) -> Self {
                value as $t
            }

            #[inline(always)]
            fn widen_to_f64(self) -> f64 {
                self.into()
            }
        }

        impl Element for $t {
            type Acc = $t;

            #[inline(always)]
            fn read<'a>(src: &'a [Self], _: &'a mut [Self]) -> &'a [Self] {
                src
            }

            #[inline(always)]
            fn write(dst: &mut [Self], _: &mut [Self], fill: impl FnOnce(&mut [Self])) {
                fill(dst);
            }

            fn widen(src: &[Self]) -> Cow<'_, [Self]> {
                Cow::Borrowed(src)
            }

            fn round(values: Vec<Self>) -> Vec<Self> {
                values
            }
        }
    };
}

macro_rules! half_precision {
    ($t:ty) => {
        impl Element for $t {
            type Acc = f32;

            #[inline(always)]
            fn read<'a>(src: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
                let buffer = &mut buffer[..src.len()];
                src.convert_to_f32_slice(buffer);
                buffer
            }

            #[inline(always)]
            fn write(dst: &mut [Self], buffer: &mut [f32], fill: impl FnOnce(&mut [f32])) {
                let buffer = &mut buffer[..dst.len()];
                fill(buffer);
                dst.convert_from_f32_slice(buffer);
            }

            fn widen(src: &[Self]) -> Cow<'_, [f32]> {
                Cow::Owned(src.iter().map(|v| v.to_f32()).collect())
            }

            fn round(values: Vec<f32>) -> Vec<Self> {
                values.into_iter().map(Self::from_f32).collect()
            }
        }
    };
}

full_precision!(f32);
full_precision!(f64);
half_precision!(f16);
half_precision!(bf16);
