//! Promise: the first calls of a process may come from several threads at once. One test, so that nothing is before it.

mod common;

use anyhow::Result;
use common::case::{Case, Dtypes, Kind, Tracked};
use common::devices::devices;
use std::sync::Barrier;

#[test]
fn several_threads_are_the_first_at_once() -> Result<()> {
    const THREADS: usize = 12;
    let cases: Vec<_> = (0..THREADS)
        .map(|thread| {
            let kind = Kind::ALL[thread % Kind::ALL.len()];
            let dtypes = Dtypes::ALL[thread % Dtypes::ALL.len()];
            // On one thread, and in the pool.
            let shape = [[7, 100], [70, 1000]][thread / 2 % 2];
            Case::random(kind, dtypes, &shape, 1)
        })
        .collect();
    for device in devices() {
        let start = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for case in &cases {
                scope.spawn(|| {
                    start.wait();
                    let outputs = case.gradients(device).expect("a first call");
                    case.check(device, Tracked::ALL, &outputs);
                });
            }
        });
    }
    Ok(())
}
