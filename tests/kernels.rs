//! Promise: every kernel of the build equals f64, whichever of them a plan picks.
#![cfg(feature = "cuda")]

mod common;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use candle_fused_layer_norm::bench::{self, Choice};
use common::case::{Case, Dtypes, Kind, Outputs, Tracked};
use common::compare::assert_close;
use common::devices::{assert_loaded, cuda_devices};
use std::collections::BTreeMap;

// Small, so that compute-sanitizer goes over them in minutes; each kernel holds the rows of some.
const ALIGNED: [[usize; 2]; 8] = [
    [40, 32],
    [70, 64],
    [40, 200],
    [24, 768],
    [24, 1536],
    [17, 4096],
    [9, 8192],
    [9, 20480],
];
// In halves, rows of these start in eight ways, in four (12 x 4002), or, being so few, in three of eight (3 x 20003). Of 70 x 9001, a block of a
// cluster owns several that start alike, and a warp several chunks; of 30 x 30001, several that do not.
const UNALIGNED: [[usize; 2]; 12] = [
    [40, 31],
    [70, 65],
    [40, 203],
    [24, 769],
    [24, 1537],
    [17, 4001],
    [9, 8191],
    [9, 20001],
    [12, 4002],
    [3, 20003],
    [70, 9001],
    [30, 30001],
];

// Of views: how many elements x and dy are past 16 bytes. The one starts on them, or the other, or neither.
const DISPLACED: [([usize; 2], [usize; 2]); 12] = [
    ([40, 203], [1, 0]),
    ([24, 768], [0, 3]),
    ([24, 769], [6, 7]),
    ([24, 1537], [1, 0]),
    ([17, 4001], [0, 3]),
    ([17, 4096], [7, 1]),
    ([9, 8191], [2, 5]),
    ([9, 20480], [1, 0]),
    ([12, 4002], [3, 3]),
    ([3, 20003], [6, 7]),
    ([70, 9001], [5, 0]),
    ([30, 30001], [1, 6]),
];

/// More than every device with clusters takes. synccheck fails at it, the other tools do not (kernels/README.md): tests of their own.
fn is_large_cluster(choice: &Choice) -> bool {
    choice.entry.contains("cluster") && choice.blocks > 8
}

/// Of each kernel, the choices of the fewest and of the most blocks.
fn extremes(choices: impl Iterator<Item = Choice>) -> impl Iterator<Item = Choice> {
    let mut of_kernels: BTreeMap<_, (Choice, Choice)> = BTreeMap::new();
    for choice in choices {
        let (fewest, most) = of_kernels.entry(choice.entry).or_insert((choice, choice));
        if choice.blocks < fewest.blocks {
            *fewest = choice;
        }
        if choice.blocks > most.blocks {
            *most = choice;
        }
    }
    let both = |(fewest, most)| [Some(fewest), (most != fewest).then_some(most)];
    of_kernels.into_values().flat_map(both).flatten()
}

/// Whether a `file/entry` is a kernel of tensors that do not start on 16 bytes.
fn is_of_skewed(kernel: &str) -> bool {
    kernel.contains("_skewed/")
}

/// Holds a case against f64 by all kernels that take it, each in its extremes among the choices that are `held`.
fn check_kernels(case: &Case, device: &Device, held: impl Fn(&Choice) -> bool) -> Result<()> {
    let oracle = case.oracle();
    let y = oracle.y();
    let [forward, backward] = case.choices(device)?;
    for choice in extremes(forward.into_iter().filter(&held)) {
        let name = format!("{case} by {choice:?}");
        let got = bench::forced(Some(choice), None, || case.forward(device))?;
        assert_close(&name, "y", &got, &y);
    }
    for choice in extremes(backward.into_iter().filter(&held)) {
        let name = format!("{case} by {choice:?}");
        let got = bench::forced(None, Some(choice), || case.gradients(device))?;
        case.check_against(&name, &oracle, Tracked::ALL, &got);
    }
    Ok(())
}

fn check_shapes(
    shapes: &[[usize; 2]],
    dtypes: Dtypes,
    device: &Device,
    held: impl Fn(&Choice) -> bool,
) -> Result<()> {
    for shape in shapes {
        let case = Case::random(Kind::LayerNorm, dtypes, shape, 1);
        check_kernels(&case, device, &held)?;
    }
    Ok(())
}

/// Holds shapes against f64 by all kernels but in large clusters, and that no kernel of such rows is left out.
fn check_all_kernels(shapes: &[[usize; 2]], dtypes: Dtypes, are_aligned: bool) -> Result<()> {
    for device in cuda_devices() {
        check_shapes(shapes, dtypes, device, |choice| !is_large_cluster(choice))?;
        assert_loaded(device, dtypes, |kernel| {
            let of_unaligned = kernel.contains("_shifted/") || kernel.contains("_single/");
            // Those that add a residual are tests/add.rs'.
            of_unaligned != are_aligned && !kernel.contains("add") && !is_of_skewed(kernel)
        })?;
    }
    Ok(())
}

mod aligned_rows {
    use super::*;

    fn equal_f64(dtypes: Dtypes) -> Result<()> {
        check_all_kernels(&ALIGNED, dtypes, true)
    }
    crate::grid_tests!(equal_f64);
}

mod unaligned_rows {
    use super::*;

    fn equal_f64(dtypes: Dtypes) -> Result<()> {
        check_all_kernels(&UNALIGNED, dtypes, false)
    }
    crate::grid_tests!(equal_f64);
}

mod unaligned_tensors {
    use super::*;

    /// A view of the same values, `by` elements into its memory, between NaN.
    fn displaced(tensor: &Tensor, by: usize) -> Result<Tensor> {
        if by == 0 {
            return Ok(tensor.clone());
        }
        let nan = Tensor::full(f32::NAN, by, tensor.device())?.to_dtype(tensor.dtype())?;
        let memory = Tensor::cat(&[&nan, &tensor.flatten_all()?, &nan], 0)?;
        Ok(memory
            .narrow(0, by, tensor.elem_count())?
            .reshape(tensor.shape())?)
    }

    /// By the kernels of whole vectors: those of single elements are unaligned_rows'.
    pub fn check(dtypes: Dtypes, device: &Device, held: impl Fn(&Choice) -> bool) -> Result<()> {
        let held = |choice: &Choice| choice.entry.contains("shifted") && held(choice);
        for (shape, [x_by, dy_by]) in DISPLACED {
            let case = Case::random(Kind::LayerNorm, dtypes, &shape, 1);
            let oracle = case.oracle();
            let x = displaced(Var::from_tensor(&case.xs(device)?)?.as_tensor(), x_by)?;
            let dy = displaced(&case.dy(device)?, dy_by)?;
            let var = |param: Option<Tensor>| Var::from_tensor(&param.expect("a layer norm"));
            let (weight, bias) = (var(case.weight(device)?)?, var(case.bias(device)?)?);
            let forward = bench::forward_candidates(&x, &weight, &bias)?.choices;
            for choice in extremes(forward.into_iter().filter(&held)) {
                let name = format!("{case}, {x_by} elements in, by {choice:?}");
                let (y, _) = bench::forced(Some(choice), None, || {
                    bench::layer_norm(&x, &weight, &bias, case.eps.into())
                })?;
                assert_close(&name, "y", &y, &oracle.y());
            }
            let backward = bench::backward_candidates(&x, &weight, &dy)?.choices;
            for choice in extremes(backward.into_iter().filter(&held)) {
                let name = format!("{case}, {x_by} and {dy_by} elements in, by {choice:?}");
                let (y, of) = bench::layer_norm(&x, &weight, &bias, case.eps.into())?;
                let (dx, dweight, dbias) = bench::forced(None, Some(choice), || of(&dy))?;
                let outputs = Outputs {
                    y,
                    dx,
                    dweight,
                    dbias,
                };
                case.check_against(&name, &oracle, Tracked::ALL, &outputs);
            }
        }
        Ok(())
    }

    fn equal_f64(dtypes: Dtypes) -> Result<()> {
        for device in cuda_devices() {
            check(dtypes, device, |choice| !is_large_cluster(choice))?;
            assert_loaded(device, dtypes, is_of_skewed)?;
        }
        Ok(())
    }
    crate::grid_tests!(equal_f64);
}

mod large_clusters {
    use super::*;

    fn equal_f64(dtypes: Dtypes) -> Result<()> {
        for device in cuda_devices() {
            for shapes in [&ALIGNED[..], &UNALIGNED] {
                check_shapes(shapes, dtypes, device, is_large_cluster)?;
            }
            unaligned_tensors::check(dtypes, device, is_large_cluster)?;
        }
        Ok(())
    }
    crate::grid_tests!(equal_f64);
}
