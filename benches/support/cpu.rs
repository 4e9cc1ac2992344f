//! Wall time on the CPU, against copies and adds by all threads.
//!
//! The calls that are compared take turns, so that what the machine does beside them meets all of them alike.

use super::Row;
use anyhow::Result;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Samples shorter than this hold several calls.
const SAMPLE_SECONDS: f64 = 200e-6;

type Call<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// Calls that are timed in turns.
pub struct Turns<'a> {
    calls: Vec<Timed<'a>>,
    reps: usize,
}

struct Timed<'a> {
    dir: &'static str,
    name: &'static str,
    call: Call<'a>,
    reps: usize,
    times: Vec<f64>,
}

impl<'a> Turns<'a> {
    pub fn new(reps: usize) -> Self {
        Self {
            calls: Vec::new(),
            reps,
        }
    }

    pub fn add(
        &mut self,
        dir: &'static str,
        name: &'static str,
        call: impl FnMut() -> Result<()> + 'a,
    ) {
        self.add_for(self.reps, dir, name, call);
    }

    /// For calls that take too long for all turns.
    pub fn add_for(
        &mut self,
        reps: usize,
        dir: &'static str,
        name: &'static str,
        call: impl FnMut() -> Result<()> + 'a,
    ) {
        let call = Box::new(call);
        let times = Vec::with_capacity(reps);
        self.calls.push(Timed {
            dir,
            name,
            call,
            reps,
            times,
        });
    }

    /// Copies (forward) and adds (backward) of tensors of `bytes`, the fastest of which is the roof.
    pub fn add_roofs(&mut self, dir: &'static str, bytes: usize) {
        // Pieces that stay in a cache, and one for each thread, which memcpy may write past the caches.
        let len = bytes.div_ceil(4);
        for piece in [1 << 16, len.div_ceil(rayon::current_num_threads())] {
            let (a, b, mut c) = (vec![1f32; len], vec![2f32; len], vec![0f32; len]);
            self.add(dir, "roof", move || {
                let copy_or_add = |((c, a), b): ((&mut [f32], &[f32]), &[f32])| {
                    if dir == "fwd" {
                        c.copy_from_slice(a);
                    } else {
                        pulp::Arch::new().dispatch(
                            #[inline(always)]
                            || {
                                for ((c, a), b) in c.iter_mut().zip(a).zip(b) {
                                    *c = a + b;
                                }
                            },
                        );
                    }
                };
                if len <= piece {
                    copy_or_add(((&mut c, &a), &b));
                } else {
                    c.par_chunks_mut(piece)
                        .zip(a.par_chunks(piece))
                        .zip(b.par_chunks(piece))
                        .for_each(copy_or_add);
                }
                black_box(&mut c);
                Ok(())
            });
        }
    }

    /// Median microseconds of each call.
    pub fn run(mut self) -> Result<Vec<Row>> {
        let mut calls_per_sample = Vec::new();
        for timed in &mut self.calls {
            (timed.call)()?;
            let start = Instant::now();
            (timed.call)()?;
            let seconds = start.elapsed().as_secs_f64();
            calls_per_sample.push((SAMPLE_SECONDS / seconds).ceil().min(1000.) as usize);
        }
        for turn in 0..self.reps {
            for (timed, &calls) in self.calls.iter_mut().zip(&calls_per_sample) {
                if turn >= timed.reps {
                    continue;
                }
                let start = Instant::now();
                for _ in 0..calls {
                    (timed.call)()?;
                }
                let seconds = start.elapsed().as_secs_f64();
                timed.times.push(seconds * 1e6 / calls as f64);
            }
        }
        let mut rows: Vec<Row> = Vec::new();
        for timed in &mut self.calls {
            timed.times.sort_by(f64::total_cmp);
            let us = timed.times[timed.times.len() / 2];
            let earlier = rows
                .iter_mut()
                .find(|row| (row.dir, row.name) == (timed.dir, timed.name));
            match earlier {
                Some(row) => row.us = row.us.min(us),
                None => rows.push(Row {
                    dir: timed.dir,
                    name: timed.name,
                    us,
                    roof: None,
                    wall_us: None,
                }),
            }
        }
        let roofs: Vec<_> = rows
            .iter()
            .filter(|row| row.name == "roof")
            .map(|row| (row.dir, row.us))
            .collect();
        for row in rows.iter_mut().filter(|row| row.name != "roof") {
            row.roof = roofs
                .iter()
                .find(|(dir, _)| *dir == row.dir)
                .map(|roof| roof.1);
        }
        Ok(rows)
    }
}
