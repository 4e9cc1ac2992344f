#![doc = include_str!("../README.md")]
//! # How a call travels
//! Forward: [`LayerNorm::forward`](candle_core::Module::forward) -> [`ops`] (validates into a `Problem`, asks whether
//! anything is tracked) -> the custom op's `cpu_fwd` or `cuda_fwd` -> on CUDA, `plan` chooses kernel and grid as plain data,
//! unless [`tuning`] holds a choice -> allocation -> launch. mean and rstd stay in the op value when something is tracked.
//!
//! Backward: candle calls `bwd` -> which of dx, dweight, dbias are wanted -> plan -> one launch (two for rows longer than
//! the resident blocks hold), and one that adds partial dweight and dbias, where there are any -> tensors.
//!
//! The norm of a residual sum has two outputs, and candle's ops one: `add` says of which nodes it is made.
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod add;
#[doc(hidden)]
pub mod bench;
#[doc = include_str!("docs/coming_from.md")]
pub mod coming_from {}
pub mod composed;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod cuda;
mod dropout;
mod grad_audit;
mod layer_norm;
mod op;
pub mod ops;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod plan;
mod problem;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub mod tuning;

pub use config::NormConfig;
pub use grad_audit::{GradAudit, grad_audit};
pub use layer_norm::{
    LayerNorm, LayerNormConfig, LayerNormNoAffine, RmsNorm, layer_norm, layer_norm_no_affine,
    layer_norm_no_bias, rms_norm, rms_norm_zero_centered,
};
