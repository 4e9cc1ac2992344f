//! Promise: a call for which the GPU has no memory is an error, and the next call works. A process of its own: it takes all there is.

#![cfg(feature = "cuda")]

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_layer_norm::ops;
use common::devices::cuda_devices;

/// So much that what else lives on the device is nothing beside it.
const BYTES: usize = 2 << 30;

/// Takes memory in pieces until no piece of `BYTES` is left.
fn fill(device: &Device) -> Vec<Tensor> {
    let piece = || Tensor::zeros(BYTES, DType::U8, device);
    std::iter::from_fn(|| piece().ok()).collect()
}

#[test]
fn out_of_memory_is_an_error_and_the_next_call_works() -> Result<()> {
    for device in cuda_devices() {
        let cols = 4096;
        let xs = Var::zeros((BYTES / 4 / cols, cols), DType::F32, device)?;
        let weight = Var::ones(cols, DType::F32, device)?;
        let bias = Var::zeros(cols, DType::F32, device)?;
        let norm = || ops::layer_norm(&xs, &weight, &bias, 1e-5);
        let says_so = |error: candle_core::Error| {
            let error = error.to_string();
            assert!(error.contains("OUT_OF_MEMORY"), "{error}");
        };

        let filled = fill(device);
        says_so(norm().expect_err("there is no memory for y"));
        drop(filled);
        let loss = norm()?.sum_all()?;

        let filled = fill(device);
        says_so(loss.backward().expect_err("there is no memory for dx"));
        drop(filled);
        let grads = loss.backward()?;
        for var in [&xs, &weight, &bias] {
            let gradient = grads.get(var).expect("all are tracked");
            assert_eq!(gradient.dims(), var.dims());
        }
        assert_eq!(
            grads.get(&bias).unwrap().to_vec1::<f32>()?[0],
            (BYTES / 4 / cols) as f32
        );
    }
    Ok(())
}
