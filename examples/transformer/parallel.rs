//! Data parallel training: each rank has a whole model on a GPU of its own and trains on its share of each batch.
//!
//! One thread a GPU, in one process. A rank that fails is heard of at once, so the run ends with its error, whatever the
//! other ranks wait for.

use anyhow::{Result, anyhow, ensure};
use candle_core::Tensor;
use std::{panic::AssertUnwindSafe, sync::mpsc, thread};

/// What the ranks do together. All of them must call it, in the same order.
pub trait Collective {
    fn rank(&self) -> usize;

    fn ranks(&self) -> usize;

    /// The sum over all ranks of a contiguous f32 tensor, the same on each.
    fn sum(&self, xs: &Tensor) -> candle_core::Result<Tensor>;
}

/// A run on one device.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn sum(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        Ok(xs.clone())
    }
}

/// The share of `items` that belongs to `rank`: neighbours, as many for each rank as can be.
pub fn shard<T>(items: &[T], rank: usize, ranks: usize) -> &[T] {
    &items[items.len() * rank / ranks..items.len() * (rank + 1) / ranks]
}

/// Fails on every rank whose `hash` is not that of all the others, and on at least one if they differ.
pub fn check_equal(
    collective: &impl Collective,
    hash: u64,
    device: &candle_core::Device,
) -> Result<()> {
    // In pieces of 16 bits, whose sum over up to 256 ranks is exact in f32.
    let pieces: Vec<f32> = (0..4)
        .map(|i| f32::from((hash >> (16 * i)) as u16))
        .collect();
    let sum = collective.sum(&Tensor::new(pieces.as_slice(), device)?)?;
    let ranks = collective.ranks() as f32;
    ensure!(
        sum.to_vec1::<f32>()?
            .iter()
            .zip(&pieces)
            .all(|(sum, piece)| *sum == ranks * piece),
        "rank {}: the parameters are not those of the other ranks",
        collective.rank()
    );
    Ok(())
}

/// Runs `rank(0)` to `rank(ranks - 1)`, each in a thread, and returns what rank 0 does, or the first error.
///
/// Does not wait for the other ranks after an error: they may hang in a collective that the failed one never joins. They
/// end with the process. Only NCCL needs it outside of tests.
#[cfg_attr(not(feature = "nccl"), allow(dead_code))]
pub fn run<T: Send + 'static>(
    ranks: usize,
    rank: impl Fn(usize) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    for index in 0..ranks {
        let (sender, rank) = (sender.clone(), rank.clone());
        thread::spawn(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| rank(index)))
                .unwrap_or_else(|_| Err(anyhow!("the thread panicked")));
            // The receiver is gone if another rank failed before.
            let _ = sender.send((index, result));
        });
    }
    drop(sender);
    let mut first = None;
    for (index, result) in receiver {
        let value = result.map_err(|error| error.context(format!("rank {index} of {ranks}")))?;
        if index == 0 {
            first = Some(value);
        }
    }
    first.ok_or_else(|| anyhow!("rank 0 of {ranks} returned nothing"))
}

/// Ends the process some seconds from now if it has not ended by then: CUDA's own clean-up may wait for a collective that
/// never ends.
#[cfg(feature = "nccl")]
pub fn exit_for_sure() {
    thread::spawn(|| {
        thread::sleep(std::time::Duration::from_secs(10));
        std::process::abort();
    });
}

#[cfg(feature = "nccl")]
pub use nccl::{Nccl, error as nccl_error};

#[cfg(feature = "nccl")]
mod nccl {
    use super::Collective;
    use candle_core::{
        CpuStorage, CudaDevice, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor,
        backend::BackendStorage, bail,
    };
    use cudarc::nccl::{Comm, Id, ReduceOp};

    /// The GPUs of this process, over NCCL.
    pub struct Nccl(Comm);

    impl Nccl {
        /// Waits until all ranks call it, with the same id.
        pub fn new(device: &CudaDevice, rank: usize, ranks: usize, id: Id) -> anyhow::Result<Self> {
            let comm = Comm::from_rank(device.cuda_stream(), rank, ranks, id);
            Ok(Self(comm.map_err(error)?))
        }
    }

    pub fn error(error: cudarc::nccl::result::NcclError) -> anyhow::Error {
        anyhow::anyhow!("NCCL: {error:?}; run with NCCL_DEBUG=INFO for the cause")
    }

    impl Collective for Nccl {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn ranks(&self) -> usize {
            self.0.world_size()
        }

        fn sum(&self, xs: &Tensor) -> Result<Tensor> {
            xs.apply_op1_no_bwd(&Sum(&self.0))
        }
    }

    struct Sum<'a>(&'a Comm);

    impl CustomOp1 for Sum<'_> {
        fn name(&self) -> &'static str {
            "all-reduce"
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            bail!("all-reduce: NCCL is for tensors on CUDA")
        }

        fn cuda_fwd(&self, xs: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
            let Some((start, end)) = layout.contiguous_offsets() else {
                bail!("all-reduce: expected a contiguous tensor")
            };
            let device = xs.device();
            let xs = xs.as_cuda_slice::<f32>()?.slice(start..end);
            let mut ys = device.alloc_zeros::<f32>(end - start)?;
            self.0
                .all_reduce(&xs, &mut ys, &ReduceOp::Sum)
                .map_err(|e| candle_core::Error::wrap(error(e)))?;
            let ys = CudaStorage::wrap_cuda_slice(ys, device.clone());
            Ok((ys, layout.shape().clone()))
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use candle_core::Device;
    use std::{
        sync::{Arc, Barrier, Mutex},
        time::Duration,
    };

    /// Ranks that are threads on the CPU.
    #[derive(Clone)]
    pub struct Threads {
        rank: usize,
        ranks: usize,
        sums: Arc<Mutex<Vec<Option<Tensor>>>>,
        barrier: Arc<Barrier>,
    }

    impl Threads {
        pub fn new(ranks: usize) -> Self {
            Self {
                rank: 0,
                ranks,
                sums: Arc::new(Mutex::new(vec![None; ranks])),
                barrier: Arc::new(Barrier::new(ranks)),
            }
        }

        pub fn on(&self, rank: usize) -> Self {
            Self {
                rank,
                ..self.clone()
            }
        }
    }

    impl Collective for Threads {
        fn rank(&self) -> usize {
            self.rank
        }

        fn ranks(&self) -> usize {
            self.ranks
        }

        fn sum(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
            self.sums.lock().unwrap()[self.rank] = Some(xs.clone());
            self.barrier.wait();
            let all: Vec<Tensor> = self
                .sums
                .lock()
                .unwrap()
                .iter()
                .flatten()
                .cloned()
                .collect();
            self.barrier.wait();
            all[1..].iter().try_fold(all[0].clone(), |sum, xs| sum + xs)
        }
    }

    #[test]
    fn shards_are_all_items_once() {
        let items: Vec<usize> = (0..13).collect();
        for ranks in 1..20 {
            let shards: Vec<&[usize]> = (0..ranks).map(|r| shard(&items, r, ranks)).collect();
            assert_eq!(shards.concat(), items);
            let lens = shards.iter().map(|shard| shard.len());
            assert!(lens.clone().max().unwrap() - lens.min().unwrap() <= 1);
        }
    }

    #[test]
    fn different_parameters_are_noticed() {
        let check = |hashes: [u64; 3]| {
            let threads = Threads::new(3);
            run(3, move |rank| {
                check_equal(&threads.on(rank), hashes[rank], &Device::Cpu)
            })
        };
        check([u64::MAX; 3]).unwrap();
        check([5, 5, 5 << 48]).unwrap_err();
        // The mean of the others.
        check([1, 2, 3]).unwrap_err();
    }

    #[test]
    fn a_rank_that_fails_ends_the_run_while_others_wait() {
        for panics in [false, true] {
            let result: Result<()> = run(3, move |rank| {
                if rank == 1 {
                    assert!(!panics);
                    anyhow::bail!("no memory");
                }
                thread::sleep(Duration::from_secs(3600));
                Ok(())
            });
            let error = format!("{:#}", result.unwrap_err());
            let expected = if panics {
                "the thread panicked"
            } else {
                "no memory"
            };
            assert_eq!(error, format!("rank 1 of 3: {expected}"));
        }
    }
}
