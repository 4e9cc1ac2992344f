// Forward for rows that a group of lanes or a block holds in registers.
//
// Computes      mean = sum(x) / cols (0 for RMSNorm), var = sum((x - mean)^2) / cols, rstd = 1 / sqrt(var + eps),
//               y = (x - mean) * rstd * weight + bias.
// Algorithm     Each thread loads its kPer vectors of the row, where they stay. The sum over a warp's columns gives a center, then the
//               sums of (x - center) and (x - center)^2 their mean and variance (two-pass, corrected for what rounding left in
//               the center). A block merges its warps' moments (Chan) behind one barrier. weight and bias come from L1 or L2.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once. weight and bias: once, if they stay in L2.
// Launch        forward_warp_{wide,single}_LxP: block 128, L lanes a row, cols <= L * P * kVec, grid rows * L / 128.
//               forward_block_{wide,single}_xP: block B (a multiple of 32, to the bound), grid rows, cols <= B * P * kVec.
//               wide: kVec > 1, all pointers on 16 bytes, cols a multiple of kVec. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Ba et al., arXiv:1607.06450; two-pass variance: Chan, Golub, LeVeque, "Algorithms for computing the
//               sample variance" (1983).
#include "row.cuh"

constexpr int kWarpRowThreads = 128;

#define FORWARD_ARGUMENTS                                                                                              \
  X *__restrict__ y /* [rows, cols] */, Acc *__restrict__ mean /* [rows] */, Acc *__restrict__ rstd /* [rows] */,       \
      const X *__restrict__ x /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                       \
      const Param *__restrict__ bias /* [cols] */, int64_t rows, int cols, Acc eps, int remove_mean

template <int kVec, int kPer, int kLanes> __device__ __forceinline__ void forward_warp(FORWARD_ARGUMENTS) {
  const int t = threadIdx.x % kLanes;
  const int64_t row = (int64_t(blockIdx.x) * kWarpRowThreads + threadIdx.x) / kLanes;
  // Lanes past the last row stay for the shuffles.
  if (row >= rows) cols = 0;
  const Acc inv_cols = inverse(cols);
  x += row * cols;
  y += row * cols;
  Slice<kVec, kPer> slice;
  slice.load(x, t, kLanes, cols);
  const Acc center = remove_mean ? warp_sum(slice.sum(), kLanes) * inv_cols : Acc(0);
  const Pair rest = about_center(warp_sum(slice.sums(center, t, kLanes, cols), kLanes), inv_cols, remove_mean);
  const Normalizer n = {center + rest.a, rsqrt_acc(rest.b * inv_cols + eps)};
  slice.normalize(y, weight, bias, n, t, kLanes, cols);
  if (t == 0 && row < rows) {
    if (mean) mean[row] = n.mean;
    if (rstd) rstd[row] = n.rstd;
  }
}

// The moments of each warp's columns are its own business; one barrier, and all warps merge them.
template <int kVec, int kPer>
__device__ __forceinline__ void forward_block(FORWARD_ARGUMENTS) {
  // Of the warps' columns: a center, and (mean - center, m2).
  __shared__ Acc centers[kWarp];
  __shared__ Pair part[kWarp];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, threads = blockDim.x;
  x += row * cols;
  y += row * cols;
  Slice<kVec, kPer> slice;
  slice.load(x, threadIdx.x, threads, cols);
  const auto columns_of = [&](int w) {
    int sum = 0;
#pragma unroll
    for (int k = 0; k < kPer; k++) sum += max(0, min(kWarp * kVec, cols - (k * threads + w * kWarp) * kVec));
    return sum;
  };
  const Acc inv_own = inverse(max(columns_of(warp), 1));
  const Acc center = remove_mean ? warp_sum(slice.sum()) * inv_own : Acc(0);
  const Pair own = about_center(warp_sum(slice.sums(center, threadIdx.x, threads, cols)), inv_own, remove_mean);
  if (lane == 0) {
    centers[warp] = center;
    part[warp] = own;
  }
  const Acc counts[1] = {lane < warps ? Acc(columns_of(lane)) : Acc(0)};
  __syncthreads();
  const Acc first = centers[0];
  Pair pieces[1] = {{0, 0}};
  if (lane < warps) pieces[0] = {centers[lane] - first + part[lane].a, part[lane].b};
  const Acc inv_cols = inverse(cols);
  const Moments m = merge_moments(first, pieces, counts, inv_cols);
  const Normalizer n = {m.mean, rsqrt_acc(m.m2 * inv_cols + eps)};
  slice.normalize(y, weight, bias, n, threadIdx.x, threads, cols);
  if (threadIdx.x == 0) {
    if (mean) mean[row] = n.mean;
    if (rstd) rstd[row] = n.rstd;
  }
}

#define FORWARD_PASS y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean
// `blocks` on a multiprocessor: as many as the registers of kPer vectors allow.
#define FORWARD_WARP(name, vec, lanes, per, blocks)                                                                    \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, blocks)                                                \
      forward_warp_##name##_##lanes##x##per(FORWARD_ARGUMENTS) {                                                       \
    forward_warp<vec, per, lanes>(FORWARD_PASS);                                                                       \
  }
#define FORWARD_BLOCK(name, vec, per, threads, blocks)                                                                 \
  extern "C" __global__ void __launch_bounds__(threads, blocks) forward_block_##name##_x##per(FORWARD_ARGUMENTS) {     \
    forward_block<vec, per>(FORWARD_PASS);                                                                             \
  }
// Without clusters, a block takes rows as long as it can, alone on its multiprocessor.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kMany = 16;
#define FORWARD_BLOCK_MOST(name, vec, per, alone, shared) FORWARD_BLOCK(name, vec, per, shared, 2)
#else
constexpr int kMany = 12;
#define FORWARD_BLOCK_MOST(name, vec, per, alone, shared) FORWARD_BLOCK(name, vec, per, alone, 1)
#endif

#ifdef LN_SINGLE
FORWARD_WARP(single, 1, 4, 8, 4)
FORWARD_WARP(single, 1, 32, 4, 4)
FORWARD_WARP(single, 1, 32, 8, 4)
#if LN_X_BYTES == 8
FORWARD_BLOCK(single, 1, 8, 512, 1)
#else
FORWARD_WARP(single, 1, 32, 16, 4)
FORWARD_BLOCK(single, 1, 16, 512, 1)
#endif
#else
#if LN_X_BYTES == 2
FORWARD_WARP(wide, kWide, 4, 4, 6)
FORWARD_WARP(wide, kWide, 16, 2, 9)
FORWARD_WARP(wide, kWide, 16, 4, 6)
FORWARD_WARP(wide, kWide, 32, 3, 7)
FORWARD_WARP(wide, kWide, 32, 4, 6)
#elif LN_X_BYTES == 4
FORWARD_WARP(wide, kWide, 4, 4, 6)
FORWARD_WARP(wide, kWide, 16, 2, 9)
FORWARD_WARP(wide, kWide, 32, 2, kMany)
FORWARD_BLOCK(wide, kWide, 2, 128, 12)
FORWARD_BLOCK(wide, kWide, 4, 512, 3)
#else
FORWARD_WARP(wide, kWide, 4, 4, 4)
FORWARD_WARP(wide, kWide, 32, 4, 4)
#endif
#if LN_X_BYTES == 4
FORWARD_BLOCK_MOST(wide, kWide, 8, 1024, 512)
#elif LN_X_BYTES == 2
FORWARD_BLOCK_MOST(wide, kWide, 4, 896, 448)
#else
FORWARD_BLOCK_MOST(wide, kWide, 4, 1024, 512)
#endif
#endif
