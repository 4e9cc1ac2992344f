//! Wall time on the CPU, against a parallel copy or add.

use super::Bench;
use anyhow::Result;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

pub struct Cpu {
    reps: usize,
}

impl Cpu {
    pub fn new(reps: usize) -> Self {
        Self { reps }
    }
}

impl Bench for Cpu {
    fn time(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        call()?;
        let mut times = Vec::with_capacity(self.reps);
        for _ in 0..self.reps {
            let start = Instant::now();
            call()?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn roof(&mut self, inputs: usize, bytes: usize) -> Result<f64> {
        const CHUNK: usize = 1 << 16;
        let len = bytes.div_ceil(4);
        let (a, b, mut c) = (vec![1f32; len], vec![2f32; len], vec![0f32; len]);
        self.time(&mut || {
            c.par_chunks_mut(CHUNK)
                .zip(a.par_chunks(CHUNK))
                .zip(b.par_chunks(CHUNK))
                .for_each(|((c, a), b)| {
                    if inputs == 1 {
                        c.copy_from_slice(a);
                    } else {
                        for ((c, a), b) in c.iter_mut().zip(a).zip(b) {
                            *c = a + b;
                        }
                    }
                });
            black_box(&mut c);
            Ok(())
        })
    }

    fn wall(&mut self, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.time(call)
    }
}
