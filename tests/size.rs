//! Promise: 64-bit sizes, tensors of more than 2^31 elements.

mod common;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
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
