// Forward for rows that a group of lanes or a block holds.
//
// Computes      mean = sum(x) / cols (0 for RMSNorm), var = sum((x - mean)^2) / cols, rstd = 1 / sqrt(var + eps),
//               y = (x - mean) * rstd * weight + bias.
// Algorithm     Each thread loads its kPer vectors of kRows rows. The sum of the first vectors gives a center near the row's mean, then the sums
//               of (x - center) and (x - center)^2 its mean and variance (two-pass, corrected for how far off the center is). Lanes meet
//               in shuffles, the warps of a block behind a barrier for each pass. x stays in registers, or is loaded again, from L1.
//               weight and bias come from L1 or L2, once for the kRows rows; in small kernels they are asked for before x. Where they are
//               wider than x, and rows aligned, a thread's P vectors are twice as many of 8 bytes.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once. weight and bias: once, if they stay in L2.
// Launch        forward_warp_{wide,shifted,single,add}_LxPxR: block 128, L lanes for R rows, cols / kVec <= L * P, grid rows / R * L / 128;
//               shifted, R > 1: L lanes for each of kVec rows of every R * kVec.
//               forward_warp_small_LxPx1, forward_block_small_BxPx1: the same, of exactly B threads, for calls of one wave;
//               forward_block_wide_BxPx1 for more.
//               forward_block_{wide,twice,shifted,shiftedtwice,single,add}_PxR: block B (a multiple of 32, to the bound) for R
//               rows, of every R * kVec as above, grid rows / R, cols / kVec <= B * P. twice: x is loaded so often.
//               wide, small, add: kVec > 1, all pointers on 16 bytes, cols a multiple of kVec. shifted: kVec > 1, x and y on 16 bytes, compiled with
//               LN_SKEWED y alone. mean, rstd, weight, bias may be null.
//               On sm_90 they may be launched before what they follow has ended (programmatic dependent launch), and wait.
// Determinism   No atomics; every sum has one order.
// Source        Ba et al., arXiv:1607.06450; two-pass variance: Chan, Golub, LeVeque, "Algorithms for computing the
//               sample variance" (1983).
#include "row.cuh"

constexpr int kWarpRowThreads = 128;

// Where weight and bias start: on 16 bytes; kWords words past them, or less than a word more, or anywhere; kSkip elements past them.
struct Aligned {
  template <int kVec> __device__ __forceinline__ static auto load(const Param* p, bool valid) { return load_vec_if<Param, kVec>(p, valid); }
};
constexpr int kAnywhere = -1;
template <bool kInOrder> struct SkewedBy {
  template <int kWords> struct Start {
    template <int kVec> __device__ __forceinline__ static auto load(const Param* p, bool valid) {
      return load_skewed_if<Param, kVec, kWords, kInOrder>(p, valid);
    }
  };
};
template <int kSkip> struct Skipped {
  template <int kVec> __device__ __forceinline__ static auto load(const Param* p, bool valid) { return SkippedVec<Param, kVec, kSkip>::load(p, valid); }
};

// kPlain: a weight that is there, and not centred at 0. Rows are y_step elements apart.
template <bool kPlain, typename Start, int kVec, int kPer, int kRows>
__device__ __forceinline__ void write_vectors(const Slice<kVec, kPer> (&slices)[kRows], const Normalizer (&n)[kRows], X* y, int64_t y_step,
                                              const Param* weight, Acc weight_offset, const Param* bias, int rows, int t, int threads, int cols) {
  const auto load = [](const Param* p, bool valid) { return Start::template load<kVec>(p, valid); };
  const auto load_weight = [&](int c, bool valid) {
    if constexpr (kPlain) return load(weight + c, valid);
    else return with_offset<kVec>(weight ? load(weight + c, valid) : filled<Param, kVec>(1), weight_offset);
  };
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * threads + t) * kVec;
    const bool valid = c < cols;
    const auto w = load_weight(c, valid), b = load(bias + c, valid && bias);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      Acc f[kVec];
#pragma unroll
      for (int i = 0; i < kVec; i++) f[i] = n[r].xhat(slices[r].v[k][i]) * (kPlain ? w[i] : weight_of(w[i], weight_offset)) + b[i];
      store<X, kVec>(y + r * y_step + c, f, valid && r < rows);
    }
  }
}
template <bool kPlain, int kVec, int kPer, int kRows>
__device__ __forceinline__ void write_rows_of(const Slice<kVec, kPer> (&slices)[kRows], const Normalizer (&n)[kRows], X* y, const Param* weight,
                                              Acc weight_offset, const Param* bias, int rows, int t, int threads, int cols) {
  write_vectors<kPlain, Aligned>(slices, n, y, cols, weight, weight_offset, bias, rows, t, threads, cols);
}
// Calls f with Start<start>, kFirst <= start < kEnd.
template <template <int> typename Start, int kFirst, int kEnd, typename F> __device__ __forceinline__ void with_start(int start, const F& f) {
  if constexpr (kFirst + 1 == kEnd) f(Start<kFirst>());
  else if (start == kFirst) f(Start<kFirst>());
  else with_start<Start, kFirst + 1, kEnd>(start, f);
}
template <bool kPlain, int kVec, int kPer, WeightLoads kLoads, int kRows>
__device__ __forceinline__ void write_rows_of(const ShiftedSlice<kVec, kPer, kLoads> (&slices)[kRows], const Normalizer (&n)[kRows], X* y,
                                              const Param* weight, Acc weight_offset, const Param* bias, int rows, int t, int threads, int cols) {
  using Skewed = SkewedBy<kLoads != WeightLoads::kFree>;
  Slice<kVec, kPer> inner[kRows];
  Slice<1, 1> outer[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    inner[r] = slices[r].inner;
    outer[r] = slices[r].outer;
  }
  const auto write = [&](auto start, const auto& parts, int from, int part_cols) {
    write_vectors<kPlain, decltype(start)>(parts, n, y + from, int64_t(slices[0].kApart) * cols, weight ? weight + from : nullptr, weight_offset,
                                           bias ? bias + from : nullptr, rows, t, threads, part_cols);
  };
  const auto write_inner = [&](auto start) { write(start, inner, slices[0].head, slices[0].body); };
  if (t < kWarp) write(Aligned(), outer, slices[0].skip(t), cols - slices[0].body);
  if constexpr (kPlain) {
    // The same for all of a row's vectors, and the row's own: few instructions of many, or none, once that is known.
    const uint32_t skew = skew_of(weight + slices[0].head);
    if (!bias || skew_of(bias + slices[0].head) == skew) {
      if constexpr (kLoads == WeightLoads::kEachSkip) with_start<Skipped, 0, kVec>(skew / sizeof(Param), write_inner);
      else with_start<Skewed::template Start, 0, 4>(skew / 4, write_inner);
      return;
    }
  }
  write_inner(typename Skewed::template Start<kAnywhere>());
}
// The Normalizers of kRows slices are ready: writes y, with weight and bias loaded once. What most weights do not need, the others pay:
// an offset is one more instruction an element, to about 20.
template <typename Part, int kRows>
__device__ __forceinline__ void write_rows(const Part (&slices)[kRows], const Normalizer (&n)[kRows], X* y, const Param* weight, Acc weight_offset,
                                           const Param* bias, int rows, int t, int threads, int cols) {
  if (weight && weight_offset == 0) write_rows_of<true>(slices, n, y, weight, weight_offset, bias, rows, t, threads, cols);
  else write_rows_of<false>(slices, n, y, weight, weight_offset, bias, rows, t, threads, cols);
}

// Small kernels: weight and bias of a thread's kPer vectors, asked for right before x, so that a call that is over in one wave waits for
// memory once. 0: not so.
template <int kPer> struct Affine {
  Vec<Param, kNarrow> w[kPer], b[kPer];
  __device__ __forceinline__ void load(const Param* weight, const Param* bias, int t, int threads, int cols) {
    const int weight_cols = weight ? cols : 0, bias_cols = bias ? cols : 0;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kNarrow;
      w[k] = load_vec_in_order<Param, kNarrow>(weight + c, c < weight_cols, evict_last());
      b[k] = load_vec_in_order<Param, kNarrow>(bias + c, c < bias_cols, evict_last());
    }
  }
  // `offset`: of a weight that is absent, and was loaded as 0, it is 1.
  __device__ __forceinline__ void write(const Slice<kNarrow, kPer, true>& slice, const Normalizer& n, X* y, Acc offset, bool valid, int t, int threads,
                                        int cols) const {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kNarrow;
      Acc f[kNarrow];
#pragma unroll
      for (int i = 0; i < kNarrow; i++) f[i] = n.xhat(slice.v[k][i]) * (w[k][i] + offset) + b[k][i];
      store<X, kNarrow>(y + c, f, valid && c < cols);
    }
  }
};
template <> struct Affine<0> {
  __device__ __forceinline__ void load(const Param*, const Param*, int, int, int) {}
};

// As `inverse`, to an ulp of f32, in one instruction where the exact quotient is 45: what it scales are sums of deviations. Blocks of
// shifted rows and with a residual spill for it.
__device__ __forceinline__ Acc near_inverse(int n) {
#if !defined(LN_SHIFTED) && !defined(LN_ADD) && !defined(LN_SINGLE)
  if constexpr (sizeof(Acc) == 4) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(float(n)));
    return r;
  }
#endif
  return inverse(n);
}

// As rsqrt_acc, to 1.1 ulp, in one instruction, three for subnormals, where the exact root is 20: of small calls, whose time is latency.
template <bool kSmall> __device__ __forceinline__ Acc rsqrt_of_row(Acc v) {
  if constexpr (kSmall && sizeof(Acc) == 4) {
    float r;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(float(v)));
    return r;
  }
  return rsqrt_acc(v);
}

template <typename Part, int kLanes, int kRows, bool kSmall = false> __device__ __forceinline__ void forward_warp(FORWARD_TAKES) {
  wait_for_previous();
  static_assert(Part::kMostOuter <= kLanes, "an element outside vectors a lane");
  const int t = threadIdx.x % kLanes;
  constexpr int kApart = kRows == 1 ? 1 : Part::kApart;
  const int64_t group = (int64_t(blockIdx.x) * kWarpRowThreads + threadIdx.x) / kLanes, first = group / kApart * kApart * kRows + group % kApart;
  // Lanes past the last row stay for the shuffles.
  const int own_rows = int(max(int64_t(0), min(int64_t(kRows), (rows - first + kApart - 1) / kApart)));
  const auto one_over = [](int n) { return kSmall ? near_inverse(n) : inverse(n); };
  const Acc inv_cols = one_over(cols);
  const uint32_t skew = kSkewed ? skew_of(x) : 0;
  x += first * cols;
  Affine<kSmall ? Part::kVectors : 0> affine;
  affine.load(weight, bias, t, kLanes, cols);
  Part slices[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].load(x + int64_t(r) * kApart * cols, t, kLanes, r < own_rows ? cols : 0, evict_last(), skew);
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].add(added, (first + r * kApart) * cols, t, kLanes, r < own_rows ? cols : 0);
  Acc centers[kRows];
  Pair sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) centers[r] = slices[r].sum_of_first();
  warp_sums(centers, kLanes);
  const Acc inv_summed = one_over(slices[0].columns_of_first(kLanes, cols));
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    centers[r] = remove_mean ? centers[r] * inv_summed : Acc(0);
    sums[r] = slices[r].sums(centers[r], t, kLanes, cols);
  }
  warp_sums(sums, kLanes);
  Normalizer n[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Pair rest = about_center(sums[r], inv_cols, remove_mean);
    n[r] = {centers[r] + rest.a, rsqrt_of_row<kSmall>(rest.b * inv_cols + eps)};
    if (t == 0 && r < own_rows) {
      if (mean) mean[first + r * kApart] = n[r].mean;
      if (rstd) rstd[first + r * kApart] = n[r].rstd;
    }
  }
  if constexpr (kSmall) affine.write(slices[0], n[0], y + first * cols, weight ? weight_offset : Acc(1), own_rows > 0, t, kLanes, cols);
  else write_rows(slices, n, y + first * cols, weight, weight_offset, bias, own_rows, t, kLanes, cols);
}

// The sum of what `warps` warps left in shared memory. Of up to kRead, each lane reads it all, 16 bytes at a time, in less time than shuffles
// take.
template <int kRead, typename T, int kWarps> __device__ __forceinline__ T sum_of_warps(const T (&parts)[kWarps], int warps) {
  if constexpr (kWarps <= kRead) {
    T sum = parts[0];
#pragma unroll
    for (int w = 1; w < kWarps; w++)
      if (w < warps) sum = sum + parts[w];
    return sum;
  } else {
    // Each group of kWarps lanes collects what all warps have.
    const int w = threadIdx.x % kWarps;
    T sum[1] = {w < warps ? parts[w] : T{}};
    warp_sums(sum, kWarps);
    return sum[0];
  }
}

// kWarps: a power of 2, no less than the warps of a block; kExact: so many.
// kLoads: 2 loads x anew, from L1, before y is written: fewer registers, more threads.
template <typename Part, int kRows, int kWarps, int kLoads, bool kExact = false, bool kSmall = false>
__device__ __forceinline__ void forward_block(FORWARD_TAKES) {
  wait_for_previous();
  __shared__ __align__(16) Acc warp_centers[kRows][kWarps];
  __shared__ __align__(16) Pair warp_parts[kRows][kWarps];
  constexpr int kApart = kRows == 1 ? 1 : Part::kApart;
  const int64_t first = int64_t(blockIdx.x / kApart) * kApart * kRows + blockIdx.x % kApart;
  const int own_rows = kRows == 1 ? 1 : int(max(int64_t(0), min(int64_t(kRows), (rows - first + kApart - 1) / kApart)));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, threads = kExact ? kWarps * kWarp : int(blockDim.x);
  // More would take registers from what the block holds of the row.
  constexpr int kRead = kExact ? 8 : 4;
  const Acc inv_cols = near_inverse(cols);
  const uint32_t skew = kSkewed ? skew_of(x) : 0;
  x += first * cols;
  Affine<kSmall ? Part::kVectors : 0> affine;
  affine.load(weight, bias, threadIdx.x, threads, cols);
  Part slices[kRows];
  const auto load = [&](uint64_t policy) {
#pragma unroll
    for (int r = 0; r < kRows; r++) slices[r].load(x + int64_t(r) * kApart * cols, threadIdx.x, threads, r < own_rows ? cols : 0, policy, skew);
  };
  load(evict_last());
#pragma unroll
  for (int r = 0; r < kRows; r++) slices[r].add(added, (first + r * kApart) * cols, threadIdx.x, threads, r < own_rows ? cols : 0);
  Acc centers[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) centers[r] = 0;
  if (remove_mean) {
#pragma unroll
    for (int r = 0; r < kRows; r++) centers[r] = slices[r].sum_of_first();
    warp_sums(centers);
    if (lane == 0)
#pragma unroll
      for (int r = 0; r < kRows; r++) warp_centers[r][warp] = centers[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; r++)
      centers[r] = sum_of_warps<kRead>(warp_centers[r], threads / kWarp) * near_inverse(slices[r].columns_of_first(threads, cols));
  }
  Pair sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) sums[r] = slices[r].sums(centers[r], threadIdx.x, threads, cols);
  warp_sums(sums);
  if (lane == 0)
#pragma unroll
    for (int r = 0; r < kRows; r++) warp_parts[r][warp] = sums[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; r++) sums[r] = sum_of_warps<kRead>(warp_parts[r], threads / kWarp);
  Normalizer n[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Pair rest = about_center(sums[r], inv_cols, remove_mean);
    n[r] = {centers[r] + rest.a, rsqrt_of_row<kSmall>(rest.b * inv_cols + eps)};
    if (threadIdx.x == 0 && r < own_rows) {
      if (mean) mean[first + r * kApart] = n[r].mean;
      if (rstd) rstd[first + r * kApart] = n[r].rstd;
    }
  }
  if (kLoads > 1) load(evict_first());
  if constexpr (kSmall) affine.write(slices[0], n[0], y + first * cols, weight ? weight_offset : Acc(1), own_rows > 0, threadIdx.x, threads, cols);
  else write_rows(slices, n, y + first * cols, weight, weight_offset, bias, own_rows, threadIdx.x, threads, cols);
}

// Where rows start on 16 bytes, kPer vectors of kVec elements are more of fewer where weights are wider.
constexpr int narrow(int vec) { return vec > 1 ? kNarrow : 1; }
template <int kVec, int kPer, bool kInOrder = false> using AlignedPart = Slice<narrow(kVec), kPer * kVec / narrow(kVec), kInOrder>;
#ifdef LN_SHIFTED
// As measured (README.md, the log). Eight codes are too many for a multiprocessor's warps of different rows, not for its blocks.
constexpr bool kOfHalves = sizeof(X) == 2 && sizeof(Param) == 2;
template <int kVec, int kPer, int kRows>
using WarpPart = ShiftedSlice<kVec, kPer, kRows == 1 || sizeof(X) == 2 ? WeightLoads::kInOrder : WeightLoads::kFree>;
template <int kVec, int kPer, int kRows>
using BlockPart = ShiftedSlice<kVec, kPer, (kRows > 1) ? WeightLoads::kFree : kOfHalves ? WeightLoads::kEachSkip : WeightLoads::kInOrder>;
#else
template <int kVec, int kPer, int kRows> using WarpPart = AlignedPart<kVec, kPer>;
template <int kVec, int kPer, int kRows> using BlockPart = AlignedPart<kVec, kPer>;
#endif

// `blocks` on a multiprocessor: as many as the registers of kPer vectors allow, with f32 weights beside halves one fewer.
#define FORWARD_WARP(name, vec, lanes, per, rows, blocks)                                                              \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, blocks - (sizeof(Param) > sizeof(X)))                  \
      forward_warp_##name##_##lanes##x##per##x##rows(FORWARD_ARGUMENTS) {                                              \
    forward_warp<WarpPart<vec, per, rows>, lanes, rows>(FORWARD_PASS);                                                 \
  }
#define FORWARD_BLOCK(name, vec, per, rows, threads, blocks, loads)                                                    \
  extern "C" __global__ void __launch_bounds__(threads, blocks) forward_block_##name##_##per##x##rows(FORWARD_ARGUMENTS) { \
    forward_block<BlockPart<vec, per, rows>, rows, (threads > 512 ? 32 : threads > 256 ? 16 : threads > 128 ? 8 : 4), loads>(FORWARD_PASS); \
  }
// `blocks` on a multiprocessor, for any dtype of weight: a call of more takes the kernels above.
#define FORWARD_WARP_SMALL(lanes, per, blocks)                                                                         \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, blocks) forward_warp_small_##lanes##x##per##x1(FORWARD_ARGUMENTS) { \
    forward_warp<AlignedPart<kWide, per, true>, lanes, 1, true>(FORWARD_PASS);                                         \
  }
#define FORWARD_BLOCK_SMALL(threads, per, blocks)                                                                      \
  extern "C" __global__ void __launch_bounds__(threads, blocks) forward_block_small_##threads##x##per##x1(FORWARD_ARGUMENTS) { \
    forward_block<AlignedPart<kWide, per, true>, 1, threads / kWarp, 1, true, true>(FORWARD_PASS);                     \
  }
#define FORWARD_BLOCK_EXACT(threads, per, blocks)                                                                      \
  extern "C" __global__ void __launch_bounds__(threads, blocks) forward_block_wide_##threads##x##per##x1(FORWARD_ARGUMENTS) { \
    forward_block<AlignedPart<kWide, per>, 1, threads / kWarp, 1, true>(FORWARD_PASS);                                 \
  }

// Without clusters, a block takes rows as long as it can, alone on its multiprocessor.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FORWARD_BLOCK_MOST(name, vec, per, threads, blocks, loads) FORWARD_BLOCK(name, vec, per, 1, threads, blocks, loads)
#else
#define FORWARD_BLOCK_MOST(name, vec, per, threads, blocks, loads) FORWARD_BLOCK(name, vec, per, 1, 1024, 1, loads)
#endif

#ifdef LN_SINGLE
FORWARD_WARP(single, 1, 4, 8, 1, 4)
FORWARD_WARP(single, 1, 32, 4, 1, 4)
FORWARD_WARP(single, 1, 32, 8, 1, 4)
#if LN_X_BYTES == 8
FORWARD_BLOCK(single, 1, 8, 1, 512, 1, 1)
#else
FORWARD_WARP(single, 1, 32, 16, 1, 4)
FORWARD_BLOCK(single, 1, 16, 1, 512, 1, 1)
#endif
#elif defined(LN_SHIFTED)
#if LN_X_BYTES == 2
#if LN_PARAM_BYTES == 2
FORWARD_WARP(shifted, kWide, 32, 2, 2, 7)
FORWARD_WARP(shifted, kWide, 32, 3, 2, 5)
FORWARD_WARP(shifted, kWide, 32, 4, 1, 7)
FORWARD_BLOCK(shifted, kWide, 3, 1, 64, 16, 1)
#else
// f32 weights take registers, and most of what L1 gives: loaded once for two rows.
FORWARD_WARP(shifted, kWide, 32, 2, 2, 6)
FORWARD_WARP(shifted, kWide, 32, 3, 2, 5)
FORWARD_WARP(shifted, kWide, 32, 4, 2, 5)
FORWARD_BLOCK(shifted, kWide, 3, 2, 64, 10, 1)
FORWARD_BLOCK(shifted, kWide, 4, 2, 128, 5, 1)
#endif
FORWARD_BLOCK(shifted, kWide, 4, 1, 256, 4, 1)
#ifndef LN_SKEWED
FORWARD_BLOCK_MOST(shiftedtwice, kWide, 6, 256, 4, 2)
#endif
#elif LN_X_BYTES == 4
FORWARD_WARP(shifted, kWide, 32, 4, 1, 9)
FORWARD_WARP(shifted, kWide, 32, 6, 2, 4)
FORWARD_BLOCK(shifted, kWide, 4, 1, 256, 5, 1)
FORWARD_BLOCK(shifted, kWide, 6, 1, 512, 2, 1)
FORWARD_BLOCK_MOST(shifted, kWide, 8, 512, 2, 1)
#else
FORWARD_WARP(shifted, kWide, 32, 4, 1, 4)
FORWARD_BLOCK_MOST(shifted, kWide, 4, 512, 2, 1)
#endif
#elif defined(LN_ADD)
FORWARD_WARP(add, kWide, 4, 4, 1, 4)
#if LN_X_BYTES == 2
FORWARD_WARP(add, kWide, 16, 2, 1, 8)
FORWARD_WARP(add, kWide, 32, 2, 1, 8)
FORWARD_WARP(add, kWide, 32, 3, 1, 6)
FORWARD_BLOCK(add, kWide, 2, 1, 512, 3, 1)
FORWARD_BLOCK(add, kWide, 4, 1, 512, 2, 1)
#elif LN_X_BYTES == 4
FORWARD_WARP(add, kWide, 16, 2, 1, 8)
FORWARD_WARP(add, kWide, 32, 2, 1, 8)
FORWARD_BLOCK(add, kWide, 2, 1, 512, 3, 1)
FORWARD_BLOCK(add, kWide, 4, 1, 1024, 1, 1)
#else
FORWARD_WARP(add, kWide, 32, 4, 1, 4)
FORWARD_BLOCK(add, kWide, 4, 1, 512, 1, 1)
#endif
#elif LN_X_BYTES == 2
FORWARD_WARP(wide, kWide, 4, 4, 1, 6)
FORWARD_WARP(wide, kWide, 16, 2, 2, 8)
FORWARD_WARP(wide, kWide, 16, 4, 1, 8)
FORWARD_WARP(wide, kWide, 32, 3, 1, 10)
#if LN_PARAM_BYTES == 2
FORWARD_WARP(wide, kWide, 32, 4, 1, 7)
#else
FORWARD_WARP(wide, kWide, 32, 4, 2, 5)
#endif
FORWARD_WARP_SMALL(16, 2, 7)
FORWARD_WARP_SMALL(32, 2, 7)
FORWARD_BLOCK_SMALL(64, 2, 16)
FORWARD_BLOCK_SMALL(64, 4, 8)
FORWARD_BLOCK_SMALL(128, 4, 4)
FORWARD_BLOCK_SMALL(256, 4, 2)
#if LN_PARAM_BYTES == 2
FORWARD_BLOCK(wide, kWide, 3, 1, 64, 14, 1)
#else
FORWARD_BLOCK(wide, kWide, 3, 2, 64, 10, 1)
#endif
FORWARD_BLOCK_EXACT(64, 4, 14)
FORWARD_BLOCK_EXACT(128, 4, 7)
FORWARD_BLOCK_EXACT(256, 4, 4)
FORWARD_BLOCK(wide, kWide, 4, 1, 256, 4, 1)
FORWARD_BLOCK_MOST(twice, kWide, 4, 512, 3, 2)
#elif LN_X_BYTES == 4
FORWARD_WARP(wide, kWide, 4, 4, 1, 6)
FORWARD_WARP(wide, kWide, 16, 4, 2, 6)
FORWARD_WARP(wide, kWide, 32, 4, 1, 8)
FORWARD_WARP_SMALL(8, 4, 7)
FORWARD_WARP_SMALL(32, 2, 10)
FORWARD_WARP_SMALL(32, 6, 4)
FORWARD_BLOCK_SMALL(64, 4, 16)
FORWARD_BLOCK_SMALL(128, 4, 8)
FORWARD_BLOCK_SMALL(256, 4, 4)
FORWARD_BLOCK(wide, kWide, 4, 1, 256, 4, 1)
FORWARD_BLOCK(twice, kWide, 4, 1, 512, 3, 2)
FORWARD_BLOCK_MOST(wide, kWide, 8, 512, 2, 1)
#else
FORWARD_WARP(wide, kWide, 4, 4, 1, 4)
FORWARD_WARP(wide, kWide, 32, 4, 1, 4)
FORWARD_BLOCK_MOST(wide, kWide, 4, 512, 2, 1)
#endif
