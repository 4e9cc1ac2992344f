// Forward for rows that a group of lanes or a block holds in registers.
//
// Computes      mean = sum(x) / cols (0 for RMSNorm), var = sum((x - mean)^2) / cols, rstd = 1 / sqrt(var + eps),
//               y = (x - mean) * rstd * weight + bias.
// Algorithm     Each thread loads its kPer vectors of kRows rows, where they stay. The sum over a warp's columns gives a center, then the
//               sums of (x - center) and (x - center)^2 their mean and variance (two-pass, corrected for what rounding left in
//               the center). A block merges its warps' moments (Chan) behind one barrier. weight and bias come from L1 or L2,
//               once for the kRows rows.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once. weight and bias: once, if they stay in L2.
// Launch        forward_warp_{wide,single}_LxPxR: block 128, L lanes for R rows, cols <= L * P * kVec, grid rows / R * L / 128.
//               forward_block_{wide,single}_PxR: block B (a multiple of 32, to the bound) for R rows, grid rows / R,
//               cols <= B * P * kVec.
//               wide: kVec > 1, all pointers on 16 bytes, cols a multiple of kVec. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Ba et al., arXiv:1607.06450; two-pass variance: Chan, Golub, LeVeque, "Algorithms for computing the
//               sample variance" (1983).
#include "row.cuh"

constexpr int kWarpRowThreads = 128;

// The Normalizers of kRows slices are ready: writes y, with weight and bias loaded once.
template <int kVec, int kPer, int kRows>
__device__ __forceinline__ void write_rows(const Slice<kVec, kPer> (&slices)[kRows], const Normalizer (&n)[kRows], X* y,
                                           const Param* weight, Acc weight_offset, const Param* bias, int rows, int t, int threads, int cols) {
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * threads + t) * kVec;
    const bool valid = c < cols;
    const Vec<Param, kVec> w = load_weight<kVec>(weight, c, weight_offset, valid), b = load_param<kVec>(bias, c, 0, valid);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      Acc f[kVec];
#pragma unroll
      for (int i = 0; i < kVec; i++) f[i] = n[r].xhat(slices[r].v[k][i]) * weight_of(w[i], weight_offset) + b[i];
      store<X, kVec>(y + int64_t(r) * cols + c, f, valid && r < rows);
    }
  }
}

template <int kVec, int kPer, int kLanes, int kRows> __device__ __forceinline__ void forward_warp(FORWARD_TAKES) {
  const int t = threadIdx.x % kLanes;
  const int64_t first = (int64_t(blockIdx.x) * kWarpRowThreads + threadIdx.x) / kLanes * kRows;
  // Lanes past the last row stay for the shuffles.
  const int own_rows = int(max(int64_t(0), min(int64_t(kRows), rows - first)));
  const Acc inv_cols = inverse(cols);
  x += first * cols;
  Slice<kVec, kPer> slices[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].load(x + int64_t(r) * cols, t, kLanes, r < own_rows ? cols : 0);
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].add(added, (first + r) * cols, t, kLanes, r < own_rows ? cols : 0);
  Normalizer n[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Acc center = remove_mean ? warp_sum(slices[r].sum(), kLanes) * inv_cols : Acc(0);
    const Pair rest = about_center(warp_sum(slices[r].sums(center, t, kLanes, cols), kLanes), inv_cols, remove_mean);
    n[r] = {center + rest.a, rsqrt_acc(rest.b * inv_cols + eps)};
    if (t == 0 && r < own_rows) {
      if (mean) mean[first + r] = n[r].mean;
      if (rstd) rstd[first + r] = n[r].rstd;
    }
  }
  write_rows(slices, n, y + first * cols, weight, weight_offset, bias, own_rows, t, kLanes, cols);
}

// The moments of each warp's columns are its own business; one barrier, and all warps merge them.
template <int kVec, int kPer, int kRows> __device__ __forceinline__ void forward_block(FORWARD_TAKES) {
  // Of the warps' columns: a center, and (mean - center, m2).
  __shared__ Acc centers[kRows][kWarp];
  __shared__ Pair part[kRows][kWarp];
  const int64_t first = int64_t(blockIdx.x) * kRows;
  const int own_rows = kRows == 1 ? 1 : int(min(int64_t(kRows), rows - first));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, threads = blockDim.x;
  x += first * cols;
  Slice<kVec, kPer> slices[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].load(x + int64_t(r) * cols, threadIdx.x, threads, r < own_rows ? cols : 0);
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].add(added, (first + r) * cols, threadIdx.x, threads, r < own_rows ? cols : 0);
  const auto columns_of = [&](int w) {
    int sum = 0;
#pragma unroll
    for (int k = 0; k < kPer; k++) sum += max(0, min(kWarp * kVec, cols - (k * threads + w * kWarp) * kVec));
    return sum;
  };
  const Acc inv_own = inverse(max(columns_of(warp), 1));
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Acc center = remove_mean ? warp_sum(slices[r].sum()) * inv_own : Acc(0);
    const Pair own = about_center(warp_sum(slices[r].sums(center, threadIdx.x, threads, cols)), inv_own, remove_mean);
    if (lane == 0) {
      centers[r][warp] = center;
      part[r][warp] = own;
    }
  }
  const Acc counts[1] = {lane < warps ? Acc(columns_of(lane)) : Acc(0)};
  __syncthreads();
  const Acc inv_cols = inverse(cols);
  Normalizer n[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Acc base = centers[r][0];
    Pair pieces[1] = {{0, 0}};
    if (lane < warps) pieces[0] = {centers[r][lane] - base + part[r][lane].a, part[r][lane].b};
    const Moments m = merge_moments(base, pieces, counts, inv_cols);
    n[r] = {m.mean, rsqrt_acc(m.m2 * inv_cols + eps)};
    if (threadIdx.x == 0 && r < own_rows) {
      if (mean) mean[first + r] = n[r].mean;
      if (rstd) rstd[first + r] = n[r].rstd;
    }
  }
  write_rows(slices, n, y + first * cols, weight, weight_offset, bias, own_rows, threadIdx.x, threads, cols);
}

// `blocks` on a multiprocessor: as many as the registers of kPer vectors allow.
#define FORWARD_WARP(name, vec, lanes, per, rows, blocks)                                                              \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, blocks)                                                \
      forward_warp_##name##_##lanes##x##per##x##rows(FORWARD_ARGUMENTS) {                                              \
    forward_warp<vec, per, lanes, rows>(FORWARD_PASS);                                                                 \
  }
#define FORWARD_BLOCK(name, vec, per, rows, threads, blocks)                                                           \
  extern "C" __global__ void __launch_bounds__(threads, blocks) forward_block_##name##_##per##x##rows(FORWARD_ARGUMENTS) { \
    forward_block<vec, per, rows>(FORWARD_PASS);                                                                       \
  }
// Without clusters, a block takes rows as long as it can, alone on its multiprocessor.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FORWARD_BLOCK_MOST(name, vec, per, alone, shared) FORWARD_BLOCK(name, vec, per, 1, shared, 2)
#else
#define FORWARD_BLOCK_MOST(name, vec, per, alone, shared) FORWARD_BLOCK(name, vec, per, 1, alone, 1)
#endif

#ifdef LN_SINGLE
FORWARD_WARP(single, 1, 4, 8, 1, 4)
FORWARD_WARP(single, 1, 32, 4, 1, 4)
FORWARD_WARP(single, 1, 32, 8, 1, 4)
#if LN_X_BYTES == 8
FORWARD_BLOCK(single, 1, 8, 1, 512, 1)
#else
FORWARD_WARP(single, 1, 32, 16, 1, 4)
FORWARD_BLOCK(single, 1, 16, 1, 512, 1)
#endif
#elif defined(LN_ADD)
FORWARD_WARP(add, kWide, 4, 4, 1, 4)
#if LN_X_BYTES == 2
FORWARD_WARP(add, kWide, 16, 2, 1, 8)
FORWARD_WARP(add, kWide, 32, 2, 1, 8)
FORWARD_WARP(add, kWide, 32, 3, 1, 6)
FORWARD_BLOCK(add, kWide, 2, 1, 512, 3)
FORWARD_BLOCK(add, kWide, 4, 1, 512, 2)
#elif LN_X_BYTES == 4
FORWARD_WARP(add, kWide, 16, 2, 1, 8)
FORWARD_WARP(add, kWide, 32, 2, 1, 8)
FORWARD_BLOCK(add, kWide, 2, 1, 512, 3)
FORWARD_BLOCK(add, kWide, 4, 1, 1024, 1)
#else
FORWARD_WARP(add, kWide, 32, 4, 1, 4)
FORWARD_BLOCK(add, kWide, 4, 1, 512, 1)
#endif
#elif LN_X_BYTES == 2
FORWARD_WARP(wide, kWide, 4, 4, 1, 6)
FORWARD_WARP(wide, kWide, 16, 2, 2, 8)
FORWARD_WARP(wide, kWide, 32, 2, 2, 8)
FORWARD_WARP(wide, kWide, 32, 3, 1, 7)
FORWARD_BLOCK(wide, kWide, 1, 1, 512, 4)
FORWARD_BLOCK(wide, kWide, 2, 2, 256, 5)
FORWARD_BLOCK(wide, kWide, 4, 2, 256, 3)
FORWARD_BLOCK_MOST(wide, kWide, 4, 896, 448)
#elif LN_X_BYTES == 4
FORWARD_WARP(wide, kWide, 4, 4, 1, 6)
FORWARD_WARP(wide, kWide, 16, 2, 1, 9)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
FORWARD_WARP(wide, kWide, 32, 2, 1, 16)
FORWARD_BLOCK(wide, kWide, 2, 1, 512, 4)
#else
FORWARD_WARP(wide, kWide, 32, 2, 1, 12)
FORWARD_BLOCK(wide, kWide, 2, 1, 512, 3)
#endif
FORWARD_BLOCK(wide, kWide, 4, 1, 512, 3)
FORWARD_BLOCK_MOST(wide, kWide, 8, 1024, 512)
#else
FORWARD_WARP(wide, kWide, 4, 4, 1, 4)
FORWARD_WARP(wide, kWide, 32, 4, 1, 4)
FORWARD_BLOCK_MOST(wide, kWide, 4, 1024, 512)
#endif
