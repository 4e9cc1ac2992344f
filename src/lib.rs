#![doc = include_str!("../README.md")]
//! # How a call travels
//! Forward: [`LayerNorm::forward`](candle_core::Module::forward) -> [`ops`] (validates into a `Problem`, asks whether
//! anything is tracked) -> the custom op's `cpu_fwd` or `cuda_fwd` -> on CUDA, `plan` chooses kernel and grid as plain data,
//! unless [`tuning`] holds a choice -> allocation -> launch. mean and rstd stay in the op value when something is tracked.
//!
//! Backward: candle calls `bwd` -> which of dx, dweight, dbias are wanted -> plan -> one launch (two for rows longer than
//! the resident blocks hold), and one that adds partial dweight and dbias -> tensors.
#![deny(missing_docs)]
#![deny(unsafe_code)]

#[doc(hidden)]
pub mod bench;
pub mod composed;
mod cpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod cuda;
mod grad_audit;
mod layer_norm;
mod op;
pub mod ops;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod plan;
mod problem;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub mod tuning;

pub use grad_audit::{GradAudit, grad_audit};
pub use layer_norm::{
    LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
};
