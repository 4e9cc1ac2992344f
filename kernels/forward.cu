// Forward for rows that fit on chip: a group of lanes, a block, or a cluster of blocks owns a row.
//
// Computes      mean = sum(x) / cols (0 for RMSNorm), var = sum((x - mean)^2) / cols, rstd = 1 / sqrt(var + eps),
//               y = (x - mean) * rstd * weight + bias.
// Algorithm     1. Each thread loads its kPer vectors of the row into registers; they stay there.
//               2. Sum over the owners gives a center; then the sums of (x - center) and (x - center)^2 give mean and
//                  variance (two-pass, corrected for what rounding left in the center).
//               3. A cluster's blocks each do 1 and 2 for their slice and merge (mean, m2) through distributed shared
//                  memory, in the order of the blocks.
//               4. y from registers; weight and bias come from L1 or L2.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once. weight and bias: once, if they stay in L2.
// Launch        forward_warp_*: block 128, `lanes` lanes (a power of 2 <= 32) a row, cols <= lanes * kPer * kVec.
//               forward_block_*: block B (a multiple of 32, <= kMaxThreads), grid rows, cols <= B * kPer * kVec.
//               forward_cluster_*: the same with clusters of C <= 8 blocks, cols <= C * B * kPer * kVec; sm_90.
//               kVec > 1: all pointers on 16 bytes, cols a multiple of kVec. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Ba et al., arXiv:1607.06450; two-pass variance: Chan, Golub, LeVeque, "Algorithms for computing the
//               sample variance" (1983).
#include "row.cuh"

constexpr int kWarpRowThreads = 128;
constexpr int kMaxThreads = 1024;
constexpr int kMaxThreadsSingle = 768;
// Vectors a thread: what the registers of that many threads hold without spilling.
constexpr int kLarge = sizeof(X) == 4 ? 8 : 4;
constexpr int kLargeSingle = sizeof(X) == 8 ? 8 : 16;

template <int kVec, int kPer>
__device__ __forceinline__ void forward_warp(X* y, Acc* mean, Acc* rstd, const X* x, const Param* weight,
                                             const Param* bias, int64_t rows, int cols, Acc eps, int remove_mean,
                                             int lanes) {
  const int t = threadIdx.x % lanes;
  const int64_t row = (int64_t(blockIdx.x) * kWarpRowThreads + threadIdx.x) / lanes;
  // Lanes past the last row stay for the shuffles.
  if (row >= rows) cols = 0;
  const Acc inv_cols = Acc(1) / cols;
  x += row * cols;
  y += row * cols;
  Slice<kVec, kPer> slice;
  slice.load(x, t, lanes, cols);
  const Acc center = remove_mean ? warp_sum(slice.sums(0, t, lanes, cols).a, lanes) * inv_cols : Acc(0);
  const Moments m = moments_about(center, warp_sum(slice.sums(center, t, lanes, cols), lanes), cols, remove_mean);
  const Acc r = rsqrt_acc(m.m2 * inv_cols + eps);
  slice.normalize(y, weight, bias, m.mean, r, t, lanes, cols);
  if (t == 0 && row < rows) {
    if (mean) mean[row] = m.mean;
    if (rstd) rstd[row] = r;
  }
}

template <int kVec, int kPer>
__device__ __forceinline__ void forward_block(X* y, Acc* mean, Acc* rstd, const X* x, const Param* weight,
                                              const Param* bias, int64_t rows, int cols, Acc eps, int remove_mean) {
  __shared__ Pair part[2][kWarp];
  const int64_t row = blockIdx.x;
  x += row * cols;
  y += row * cols;
  Slice<kVec, kPer> slice;
  slice.load(x, threadIdx.x, blockDim.x, cols);
  const Moments m = block_moments(slice, cols, remove_mean, part);
  const Acc r = rsqrt_acc(m.m2 / cols + eps);
  slice.normalize(y, weight, bias, m.mean, r, threadIdx.x, blockDim.x, cols);
  if (threadIdx.x == 0) {
    if (mean) mean[row] = m.mean;
    if (rstd) rstd[row] = r;
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <int kVec, int kPer>
__device__ __forceinline__ void forward_cluster(X* y, Acc* mean, Acc* rstd, const X* x, const Param* weight,
                                                const Param* bias, int64_t rows, int cols, Acc eps, int remove_mean) {
  __shared__ Pair part[2][kWarp];
  // Two sets: a block may be a row ahead of one that still reads.
  constexpr int kMaxBlocks = 8;
  __shared__ Pair merged[2][kMaxBlocks];  // mean, m2
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  // Slices of whole vectors; the last may be shorter or empty.
  const int vectors = cols / kVec, slice_vectors = (vectors + blocks - 1) / blocks;
  const auto columns_of = [&](int b) { return max(0, min(slice_vectors, vectors - b * slice_vectors)) * kVec; };
  const int first = rank * slice_vectors * kVec, own = columns_of(rank);
  const int64_t clusters = gridDim.x / blocks;
  int set = 0;
  for (int64_t row = blockIdx.x / blocks; row < rows; row += clusters, set ^= 1) {
    Slice<kVec, kPer> slice;
    slice.load(x + row * cols + first, threadIdx.x, blockDim.x, own);
    Moments m = {0, 0};
    // An empty slice divides by 0; its moments are weighted by 0 columns below, which a NaN would survive.
    const Moments block = block_moments(slice, max(own, 1), remove_mean, part);
    if (own > 0) m = block;
    if (threadIdx.x < blocks) {
      store_remote(address_in(threadIdx.x, &merged[set][rank]), {m.mean, m.m2});
    }
    cluster_sync();
    // About the first block's mean, so that mean >> std loses nothing.
    const Acc center = merged[set][0].a;
    Acc rest = 0, m2 = 0;
    for (int b = 0; b < int(blocks); b++) rest += (merged[set][b].a - center) * columns_of(b);
    const Acc row_mean = center + rest / cols;
    for (int b = 0; b < int(blocks); b++) {
      const Acc d = merged[set][b].a - row_mean;
      m2 += merged[set][b].b + d * d * columns_of(b);
    }
    const Acc r = rsqrt_acc(m2 / cols + eps);
    slice.normalize(y + row * cols + first, weight ? weight + first : nullptr, bias ? bias + first : nullptr, row_mean, r,
                    threadIdx.x, blockDim.x, own);
    if (rank == 0 && threadIdx.x == 0) {
      if (mean) mean[row] = row_mean;
      if (rstd) rstd[row] = r;
    }
  }
  // No block leaves while another may write into its shared memory.
  cluster_sync();
}
#endif

#define FORWARD_ARGUMENTS                                                                                              \
  X *__restrict__ y /* [rows, cols] */, Acc *__restrict__ mean /* [rows] */, Acc *__restrict__ rstd /* [rows] */,       \
      const X *__restrict__ x /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                       \
      const Param *__restrict__ bias /* [cols] */, int64_t rows, int cols, Acc eps, int remove_mean

#define FORWARD_WARP(name, vec, per)                                                                                   \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, 5) forward_warp_##name(FORWARD_ARGUMENTS, int lanes) {     \
    forward_warp<vec, per>(y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean, lanes);                       \
  }
#define FORWARD_BLOCK(name, vec, per, threads)                                                                         \
  extern "C" __global__ void __launch_bounds__(threads, 1) forward_block_##name(FORWARD_ARGUMENTS) {                   \
    forward_block<vec, per>(y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean);                             \
  }

// Suffixes are fractions of kLarge or kLargeSingle.
#if LN_X_BYTES == 4
FORWARD_WARP(wide_eighth, kWide, kLarge / 8)
#endif
FORWARD_WARP(wide_quarter, kWide, kLarge / 4)
FORWARD_WARP(wide_half, kWide, kLarge / 2)
FORWARD_WARP(wide_full, kWide, kLarge)
FORWARD_WARP(single_quarter, 1, kLargeSingle / 4)
FORWARD_WARP(single_half, 1, kLargeSingle / 2)
FORWARD_WARP(single_full, 1, kLargeSingle)
FORWARD_BLOCK(wide_half, kWide, kLarge / 2, kMaxThreads)
FORWARD_BLOCK(wide_full, kWide, kLarge, kMaxThreads)
FORWARD_BLOCK(single_full, 1, kLargeSingle, kMaxThreadsSingle)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FORWARD_CLUSTER(name, vec, per, threads)                                                                       \
  extern "C" __global__ void __launch_bounds__(threads, 1) forward_cluster_##name(FORWARD_ARGUMENTS) {                 \
    forward_cluster<vec, per>(y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean);                           \
  }

FORWARD_CLUSTER(wide_full, kWide, kLarge, kMaxThreads)
FORWARD_CLUSTER(single_full, 1, kLargeSingle, kMaxThreadsSingle)
#endif
