//! Promise: the CPU's unsafe code reads nothing that was not written, and nothing that is not there.
//!
//! Calls that take every way through it, small enough for Miri:
//!
//! ```sh
//! MIRIFLAGS='-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows' cargo +nightly miri test --test memory_safety
//! ```
//!
//! Miri has no vector instructions to choose from and takes the plain loops. AddressSanitizer runs the others:
//!
//! ```sh
//! RUSTFLAGS=-Zsanitizer=address cargo +nightly test --release --target x86_64-unknown-linux-gnu --test memory_safety
//! ```

mod common;

use anyhow::Result;
use candle_core::{Device, Tensor};
use common::case::{Case, Dtypes, Kind, Tracked};

fn check(kind: Kind, dtypes: Dtypes, shape: [usize; 2], tracked: Tracked) -> Result<()> {
    let case = Case::random(kind, dtypes, &shape, 1);
    let outputs = case.gradients_of(&Device::Cpu, tracked, |xs, weight, bias| {
        case.apply(xs, weight, bias)
    })?;
    case.check(&Device::Cpu, tracked, &outputs);
    Ok(())
}

#[test]
fn on_the_calling_thread() -> Result<()> {
    for dtypes in Dtypes::ALL {
        for kind in Kind::ALL {
            // By rows with one and with several partials, and by columns.
            for shape in [[1, 1], [3, 7], [34, 5], [40, 33], [2, 1029]] {
                // Miri takes a minute for a few thousand elements.
                if cfg!(miri) && shape != [3, 7] && (kind, dtypes) != SLOWLY {
                    continue;
                }
                check(kind, dtypes, shape, Tracked::ALL)?;
            }
        }
    }
    Ok(())
}

/// What Miri also takes larger shapes of.
const SLOWLY: (Kind, Dtypes) = (Kind::LayerNorm, Dtypes::F16_F32);

#[test]
fn empty() -> Result<()> {
    for kind in Kind::ALL {
        for shape in [[0, 5], [3, 0], [0, 0]] {
            check(kind, Dtypes::F32, shape, Tracked::ALL)?;
            check(kind, Dtypes::F16_F32, shape, Tracked::ALL)?;
        }
    }
    Ok(())
}

#[test]
fn each_output_alone() -> Result<()> {
    for mask in 1..8 {
        let tracked = Tracked {
            xs: mask & 1 != 0,
            weight: mask & 2 != 0,
            bias: mask & 4 != 0,
        };
        for shape in [[34, 20], [2, 1100]] {
            let shape = if cfg!(miri) {
                [shape[0], shape[1].min(4)]
            } else {
                shape
            };
            check(Kind::LayerNorm, Dtypes::F16_F32, shape, tracked)?;
        }
    }
    Ok(())
}

/// Beyond 32768 elements: blocks of rows, and segments of wide rows.
#[test]
#[cfg_attr(miri, ignore = "too many elements")]
fn in_the_pool() -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    pool.install(|| {
        for dtypes in [Dtypes::F32, Dtypes::BF16] {
            for shape in [[520, 64], [2, 16500]] {
                check(Kind::LayerNorm, dtypes, shape, Tracked::ALL)?;
            }
        }
        Ok(())
    })
}

/// Outputs of more than 4 MiB, for which huge pages are asked.
#[test]
#[cfg_attr(miri, ignore = "too many elements")]
fn in_huge_pages() -> Result<()> {
    check(Kind::LayerNorm, Dtypes::F32, [1100, 1000], Tracked::ALL)
}

/// A view that ends where its storage does, and one with elements around it.
#[test]
fn views() -> Result<()> {
    for dtypes in [Dtypes::F32, Dtypes::F16] {
        let case = Case::random(Kind::NoAffine, dtypes, &[3, 37], 1);
        let xs = case.xs(&Device::Cpu)?;
        let around = Tensor::cat(&[&xs, &xs, &xs], 0)?;
        for first in [0, 3, 6] {
            let y = case.apply(&around.narrow(0, first, 3)?, None, None)?;
            common::compare::assert_close(&case, "y", &y, &case.oracle().y());
        }
    }
    Ok(())
}
