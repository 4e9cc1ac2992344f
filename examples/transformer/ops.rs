//! Softmax and dropout as training needs them: differentiable, with few passes over memory, and repeatable.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, DType, Device, Layout, Module, Result, Shape, Storage,
    Tensor, backend::BackendStorage, bail,
};
use candle_nn::ops::softmax_last_dim;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::{Arc, Mutex, PoisonError};

/// A value that was computed outside the graph, put into it with the gradient that belongs to it.
///
/// candle computes and adds up a gradient for both arguments of each product and sum, also for a mask that nobody
/// trains, and keeps what every one of them read. One node for the whole formula spares that.
struct WithBackward<F> {
    name: &'static str,
    value: Mutex<Option<Tensor>>,
    /// From the result and its gradient to the gradient of the argument.
    backward: F,
}

fn with_backward<F>(name: &'static str, xs: &Tensor, value: Tensor, backward: F) -> Result<Tensor>
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    if !xs.track_op() {
        return Ok(value);
    }
    xs.apply_op1(WithBackward {
        name,
        value: Mutex::new(Some(value)),
        backward,
    })
}

impl<F> WithBackward<F> {
    fn take(&self) -> Result<Tensor> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => value.contiguous(),
            None => bail!("{}: the value was taken before", self.name),
        }
    }
}

impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor>> CustomOp1 for WithBackward<F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("{}: expected a value on the CPU", self.name),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("{}: expected a value on CUDA", self.name),
        }
    }

    fn bwd(&self, _: &Tensor, ys: &Tensor, dys: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(ys, dys).map(Some)
    }
}

/// Softmax over the last dim of `scores + mask`, the mask broadcast over the leading dims of the scores.
///
/// The forward pass is candle-nn's fused `softmax_last_dim`, which has no backward pass of its own.
pub fn masked_softmax(scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    // As a matrix with one row a head: candle's strided kernels divide once a dim and element.
    let (batch, heads, rows, cols) = scores.dims4()?;
    let value = scores
        .detach()
        .reshape((batch * heads, rows * cols))?
        .broadcast_add(&mask.reshape((1, rows * cols))?)?
        .reshape((batch, heads, rows, cols))?;
    let value = softmax_last_dim(&value)?;
    with_backward("masked-softmax", scores, value, |ys, dys| {
        let shape = ys.shape();
        let ys = ys.flatten_to(D::Minus2)?;
        let weighted = (&ys * dys.reshape(ys.shape())?)?;
        let sums = weighted.sum_keepdim(D::Minus1)?;
        (weighted - ys.broadcast_mul(&sums)?)?.reshape(shape)
    })
}

/// What random numbers are for: each use has a stream of its own.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    Weights,
    Batch,
    Dropout,
    Sample,
    Estimate,
}

/// The random numbers of a step on a rank. They depend on nothing but the arguments, so the seed and the number of the
/// step are all the random state that a checkpoint has to hold.
pub fn rng(seed: u64, purpose: Purpose, step: usize, rank: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((step as u64) << 16 | (rank as u64) << 4 | purpose as u64);
    rng
}

/// Sets elements to 0 with probability `p` and divides the others by `1 - p`, as [`candle_nn::Dropout`] does, whose
/// masks cannot be seeded on the CPU. Clones draw from one generator.
#[derive(Clone, Debug)]
pub struct Dropout {
    p: f64,
    rng: Arc<Mutex<ChaCha8Rng>>,
}

impl Dropout {
    pub fn new(p: f64) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(0);
        Self {
            p,
            rng: Arc::new(Mutex::new(rng)),
        }
    }

    /// Begins the masks of a step. `fresh` starts CUDA's generator anew, which waits for the GPU.
    pub fn reseed(&self, mut rng: ChaCha8Rng, device: &Device, fresh: bool) -> Result<()> {
        if self.p == 0. {
            return Ok(());
        }
        if fresh && !device.is_cpu() {
            device.set_seed(rng.next_u64())?;
        }
        *self.rng.lock().unwrap_or_else(PoisonError::into_inner) = rng;
        Ok(())
    }

    /// 0 or `1 / (1 - p)`.
    fn mask(&self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let keep = 1. - self.p;
        if !device.is_cpu() {
            let mask = Tensor::rand(keep as f32, (1. + keep) as f32, shape, device)?.floor()?;
            return mask.to_dtype(dtype)?.affine(1. / keep, 0.);
        }
        let mut bytes = vec![0; 4 * shape.elem_count()];
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        rng.fill_bytes(&mut bytes);
        let limit = (self.p * 2f64.powi(32)) as u32;
        let mask: Vec<f32> = bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .map(|random| if random < limit { 0. } else { 1. / keep as f32 })
            .collect();
        Tensor::from_vec(mask, shape, device)?.to_dtype(dtype)
    }

    pub fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if !train || self.p == 0. {
            return Ok(xs.clone());
        }
        let mask = self.mask(xs.shape(), xs.dtype(), xs.device())?;
        let value = (xs.detach() * &mask)?;
        with_backward("dropout", xs, value, move |_, dys| dys * &mask)
    }
}

/// Rows of a table, picked by a product with a one-hot matrix.
///
/// The backward pass of [`candle_nn::Embedding`] is candle's `index_add`, which on CUDA walks through all ids in a single
/// thread a channel. For a vocabulary of characters the product takes a fraction of that, and its gradient is one too.
#[derive(Clone, Debug)]
pub struct OneHotEmbedding {
    embeddings: Tensor,
    ids: Tensor,
}

impl OneHotEmbedding {
    pub fn new(embeddings: Tensor) -> Result<Self> {
        let rows = embeddings.dim(0)? as u32;
        let ids = Tensor::arange(0, rows, embeddings.device())?;
        Ok(Self { embeddings, ids })
    }
}

impl Module for OneHotEmbedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let one_hot = ids
            .flatten_all()?
            .unsqueeze(1)?
            .broadcast_eq(&self.ids)?
            .to_dtype(self.embeddings.dtype())?;
        let channels = self.embeddings.dim(1)?;
        let shape = [ids.dims(), &[channels]].concat();
        one_hot.matmul(&self.embeddings)?.reshape(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use candle_nn::ops::softmax;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        for (a, b) in values(a).into_iter().zip(values(b)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn softmax_and_its_gradient_are_those_of_candle() {
        let device = &Device::Cpu;
        let scores = Var::randn(0f32, 1., (2, 3, 4, 4), device).unwrap();
        let mask = Tensor::randn(0f32, 1., (4, 4), device).unwrap();
        let weights = Tensor::randn(0f32, 1., (2, 3, 4, 4), device).unwrap();
        let gradient = |ys: &Tensor| {
            let loss = (ys * &weights).unwrap().sum_all().unwrap();
            loss.backward().unwrap().remove(&scores).unwrap()
        };
        let ys = masked_softmax(&scores, &mask).unwrap();
        let expected = softmax(&scores.broadcast_add(&mask).unwrap(), D::Minus1).unwrap();
        assert_close(&ys, &expected);
        assert_close(&gradient(&ys), &gradient(&expected));
    }

    #[test]
    fn dropout_keeps_the_mean_and_its_gradient_is_its_mask() {
        let dropout = Dropout::new(0.25);
        let xs = Var::ones(40_000, DType::F32, &Device::Cpu).unwrap();
        let ys = dropout.forward_t(&xs, true).unwrap();
        let mean = ys.mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((mean - 1.).abs() < 0.02, "{mean}");
        let grads = ys.sum_all().unwrap().backward().unwrap();
        assert_eq!(values(grads.get(&xs).unwrap()), values(&ys));
        assert_eq!(values(&dropout.forward_t(&xs, false).unwrap()), values(&xs));
    }

    #[test]
    fn seed_step_and_rank_decide_the_masks() {
        let mask = |seed, step, rank| {
            let dropout = Dropout::new(0.5);
            let rng = rng(seed, Purpose::Dropout, step, rank);
            dropout.reseed(rng, &Device::Cpu, true).unwrap();
            values(&dropout.mask(&64.into(), DType::F32, &Device::Cpu).unwrap())
        };
        assert_eq!(mask(1, 2, 0), mask(1, 2, 0));
        for other in [mask(2, 2, 0), mask(1, 3, 0), mask(1, 2, 1)] {
            assert_ne!(mask(1, 2, 0), other);
        }
    }

    #[test]
    fn the_embedding_and_its_gradient_are_those_of_candle_nn() {
        let table = Var::randn(0f32, 1., (5, 3), &Device::Cpu).unwrap();
        let ids = Tensor::new(&[[0u32, 4, 4], [2, 0, 1]], &Device::Cpu).unwrap();
        let ours = OneHotEmbedding::new(table.as_tensor().clone()).unwrap();
        let ours = ours.forward(&ids).unwrap();
        let theirs = candle_nn::Embedding::new(table.as_tensor().clone(), 3);
        let theirs = theirs.forward(&ids).unwrap();
        assert_close(&ours, &theirs);
        let gradient = |ys: Tensor| {
            let loss = ys.powf(3.).unwrap().sum_all().unwrap();
            loss.backward().unwrap().remove(&table).unwrap()
        };
        assert_close(&gradient(ours), &gradient(theirs));
    }
}
