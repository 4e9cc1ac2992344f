//! Promises: bit-identical results from run to run, for any number of threads, and beside other work; nothing kept for
//! a backward pass where nothing is tracked.

mod common;

use anyhow::Result;
use candle_core::Device;
use common::case::{Case, Dtypes, Kind, Outputs};
use common::compare::assert_same_bits;
use common::devices::devices;
use std::sync::atomic::{AtomicBool, Ordering};

/// Shapes for each way of dividing the work: serial, blocks of rows (one uneven), segments of few wide rows, more rows
/// than a grid's second axis has, and both sides of where the CPU changes from rows to columns, by the number of rows, by
/// the width, and where a group holds some of the rows.
const SHAPES: [[usize; 2]; 14] = [
    [255, 1024],
    [256, 1024],
    [255, 1023],
    [260, 32767],
    [260, 32768],
    [16, 4097],
    [7, 270001],
    [5, 33],
    [521, 768],
    [37, 3001],
    [4099, 64],
    [70001, 8],
    [3, 100003],
    [2, 65536],
];

fn assert_same(case: &Case, got: &Outputs, want: &Outputs) {
    assert_same_bits(case, "y", &got.y, &want.y);
    for (output, got, want) in [
        ("dx", &got.dx, &want.dx),
        ("dweight", &got.dweight, &want.dweight),
        ("dbias", &got.dbias, &want.dbias),
    ] {
        match (got, want) {
            (Some(got), Some(want)) => assert_same_bits(case, output, got, want),
            (None, None) => {}
            _ => panic!("{case}: {output}: computed in one of two runs"),
        }
    }
}

fn cases() -> impl Iterator<Item = Case> {
    SHAPES.iter().flat_map(|shape| {
        [
            (Kind::LayerNorm, Dtypes::F32),
            (Kind::RmsNorm, Dtypes::F32),
            (Kind::LayerNorm, Dtypes::BF16),
        ]
        .map(|(kind, dtypes)| Case::random(kind, dtypes, shape, 1))
    })
}

#[test]
fn the_same_bits_from_run_to_run() -> Result<()> {
    for case in cases() {
        for device in devices() {
            let first = case.gradients(device)?;
            for _ in 0..if device.is_cuda() { 20 } else { 3 } {
                assert_same(&case, &case.gradients(device)?, &first);
            }
            let Some(first) = case.gradients_as_of_larger(device)? else {
                continue;
            };
            for _ in 0..20 {
                let again = case.gradients_as_of_larger(device)?;
                assert_same(&case, &again.expect("as the first time"), &first);
            }
        }
    }
    Ok(())
}

#[test]
fn the_same_bits_for_any_number_of_threads() -> Result<()> {
    for case in cases() {
        let on_threads = |threads| -> Result<Outputs> {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()?;
            Ok(pool.install(|| case.gradients(&Device::Cpu))?)
        };
        let alone = on_threads(1)?;
        for threads in [2, 3, 4] {
            assert_same(&case, &on_threads(threads)?, &alone);
        }
    }
    Ok(())
}

/// Other calls of the op at the same time, from threads of their own.
#[test]
fn the_same_bits_beside_other_work() -> Result<()> {
    for device in devices() {
        let cases: Vec<_> = cases().collect();
        let alone = cases
            .iter()
            .map(|case| case.gradients(device))
            .collect::<Result<Vec<_>, _>>()?;
        std::thread::scope(|scope| -> Result<()> {
            let threads: Vec<_> = (0..4)
                .map(|thread| {
                    let (cases, alone) = (&cases, &alone);
                    scope.spawn(move || -> Result<()> {
                        for index in 0..cases.len() {
                            let index = (index + thread * 5) % cases.len();
                            assert_same(
                                &cases[index],
                                &cases[index].gradients(device)?,
                                &alone[index],
                            );
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("no panic beside others"))
        })?;
    }
    Ok(())
}

/// A hundred times, forward and backward, while other threads keep the device, the cores and the pool busy.
#[test]
fn the_same_bits_a_hundred_times_under_load() -> Result<()> {
    const REPETITIONS: usize = 100;
    // Each way of dividing the work, in sizes that leave time for a hundred.
    const SHAPES: [[usize; 2]; 6] = [
        [5, 33],
        [255, 1024],
        [521, 200],
        [4099, 32],
        [7, 33001],
        [2, 65536],
    ];
    for device in devices() {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            for load in 0..3 {
                let stop = &stop;
                scope.spawn(move || {
                    let shape = [[64, 1000], [3, 20000], [2000, 40]][load];
                    let case = Case::random(Kind::LayerNorm, Dtypes::F32, &shape, 1);
                    while !stop.load(Ordering::Relaxed) {
                        case.gradients(device).expect("a call beside others");
                    }
                });
            }
            // The load ends with this, whichever way.
            let _stop = StopOnDrop(&stop);
            for shape in SHAPES {
                for (kind, dtypes) in [
                    (Kind::LayerNorm, Dtypes::F32),
                    (Kind::LayerNorm, Dtypes::F16_F32),
                    (Kind::RmsNorm, Dtypes::BF16),
                ] {
                    let case = Case::random(kind, dtypes, &shape, 1);
                    let first = case.gradients(device)?;
                    for _ in 1..REPETITIONS {
                        assert_same(&case, &case.gradients(device)?, &first);
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is tracked decides what is kept and what is computed, not the values.
#[test]
fn the_same_bits_tracked_or_not() -> Result<()> {
    for case in cases() {
        for device in devices() {
            let tracked = case.gradients(device)?.y;
            assert_same_bits(&case, "y", &case.forward(device)?, &tracked);
        }
    }
    Ok(())
}

#[test]
fn untracked_arguments_leave_no_op() -> Result<()> {
    for kind in Kind::ALL {
        let case = Case::random(kind, Dtypes::F32, &[5, 33], 1);
        for device in devices() {
            assert!(!case.forward(device)?.track_op(), "{case}: an op is kept");
            assert!(
                case.gradients(device)?.y.track_op(),
                "{case}: no op is kept"
            );
        }
    }
    Ok(())
}
