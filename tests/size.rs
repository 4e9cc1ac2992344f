//! Promise: 64-bit sizes, tensors of more than 2^31 elements.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_layer_norm::ops;
use common::case::{Case, Dtypes, Kind, loss};
use common::compare::assert_close;
use common::devices::{cuda_devices, devices};

const PATTERN_ROWS: usize = 64;
const COLS: usize = 4096;

/// A pattern of rows that repeats: y and dx repeat with it, dweight and dbias are as many times the pattern's.
fn repeats(device: &Device, times: usize) -> Result<()> {
    let case = Case::random(Kind::LayerNorm, Dtypes::BF16_F32, &[PATTERN_ROWS, COLS], 1);
    let oracle = case.oracle();
    let repeated = |pattern: Tensor| pattern.repeat((times, 1));
    let var = |param: Option<Tensor>| Var::from_tensor(&param.expect("a layer norm has both"));
    let xs = Var::from_tensor(&repeated(case.xs(device)?)?)?;
    let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
    let y = case.apply(&xs, Some(&weight), Some(&bias))?;
    let grads = loss(&y, &repeated(case.dy(device)?)?)?.backward()?;
    let gradient = |var: &Var| grads.get(var).expect("all is tracked");
    for at in [0, times / 2, times - 1] {
        let rows = |tensor: &Tensor| tensor.narrow(0, at * PATTERN_ROWS, PATTERN_ROWS);
        assert_close(
            &format!("{case}, repeat {at}"),
            "y",
            &rows(&y)?,
            &oracle.y(),
        );
        assert_close(
            &format!("{case}, repeat {at}"),
            "dx",
            &rows(gradient(&xs))?,
            &oracle.dx(),
        );
    }
    assert_close(
        &case,
        "dweight",
        gradient(&weight),
        &oracle.dweight().times(times),
    );
    assert_close(
        &case,
        "dbias",
        gradient(&bias),
        &oracle.dbias().times(times),
    );
    Ok(())
}

#[test]
fn repeated_rows_repeat_their_results() -> Result<()> {
    for device in devices() {
        repeats(device, 5)?;
    }
    Ok(())
}

#[test]
#[ignore = "on CUDA alone, and needs about 50 GiB of its memory"]
fn more_than_2_to_the_31_elements_on_cuda() -> Result<()> {
    let times = (1usize << 31) / (PATTERN_ROWS * COLS) + 1;
    for device in cuda_devices() {
        repeats(device, times)?;
    }
    Ok(())
}

/// Forward alone: backward has three such tensors more.
fn more_than_2_to_the_32_elements(device: &Device) -> Result<()> {
    let times = (1usize << 32) / (PATTERN_ROWS * COLS) + 1;
    let case = Case::random(Kind::LayerNorm, Dtypes::BF16_F32, &[PATTERN_ROWS, COLS], 1);
    let want = case.oracle().y();
    let (weight, bias) = (case.weight(device)?, case.bias(device)?);
    let xs = case.xs(device)?.repeat((times, 1))?;
    let y = case.apply(&xs, weight.as_ref(), bias.as_ref())?;
    for at in [0, times / 2, times - 2, times - 1] {
        let rows = y.narrow(0, at * PATTERN_ROWS, PATTERN_ROWS)?;
        assert_close(&format!("{case}, repeat {at}"), "y", &rows, &want);
    }
    Ok(())
}

#[test]
#[ignore = "on the CPU, and needs about 17 GiB of memory; a minute on two cores"]
fn more_than_2_to_the_32_elements_on_the_cpu() -> Result<()> {
    more_than_2_to_the_32_elements(&Device::Cpu)
}

#[test]
#[ignore = "on CUDA alone, and needs about 25 GiB of its memory"]
fn more_than_2_to_the_32_elements_on_cuda() -> Result<()> {
    cuda_devices().try_for_each(more_than_2_to_the_32_elements)
}

/// One row. All elements are 0 but the last, so that y is known, and the mean a small number that f32 has.
fn one_row(device: &Device, cols: usize) -> Result<()> {
    let zeros = Tensor::zeros(cols - 1, DType::BF16, device)?;
    let last = Tensor::ones(1, DType::BF16, device)?;
    let xs = Tensor::cat(&[zeros, last], 0)?;
    let y = ops::layer_norm_no_affine(&xs, cols, 0.)?;
    let at = |index| -> Result<f32> {
        Ok(y.narrow(0, index, 1)?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?[0])
    };
    // xhat of the last one is sqrt(cols - 1), of the others its inverse.
    let root = ((cols - 1) as f32).sqrt();
    for index in [0, cols / 2, cols - 2] {
        let got = at(index)?;
        assert!((got * root + 1.).abs() < 0.01, "y[{index}]: {got}");
    }
    let got = at(cols - 1)?;
    assert!((got / root - 1.).abs() < 0.01, "the last y: {got}");
    Ok(())
}

/// On the CPU there is no limit.
#[test]
#[ignore = "on the CPU, and needs about 17 GiB of memory; half a minute on two cores"]
fn a_row_of_more_than_2_to_the_31_columns_on_the_cpu() -> Result<()> {
    one_row(&Device::Cpu, (1 << 31) + 3)
}

#[test]
#[ignore = "on CUDA alone, and needs about 13 GiB of its memory"]
fn a_row_of_the_most_columns_on_cuda() -> Result<()> {
    cuda_devices().try_for_each(|device| one_row(device, (1 << 31) - 1))
}
