// Forward for rows that fit on chip: a group of lanes, a block, or a cluster of blocks owns a row.
//
// Computes      mean = sum(x) / cols (0 for RMSNorm), var = sum((x - mean)^2) / cols, rstd = 1 / sqrt(var + eps),
//               y = (x - mean) * rstd * weight + bias.
// Algorithm     Lanes or a block: each thread loads its kPer vectors of the row into registers, where they stay. Their sum over
//               the owners gives a center; then the sums of (x - center) and (x - center)^2 give mean and variance
//               (two-pass, corrected for what rounding left in the center). y comes from registers; weight and bias from L1 or L2.
//               A cluster is persistent: weight and bias stay in registers, a thread's vectors pass through its ring of rows
//               in shared memory, each warp takes (mean, m2) of its own columns and sends them to all blocks of the cluster
//               through distributed shared memory, and kLag rows later everyone merges them, in the order of the warps.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once. weight and bias: once, if they stay in L2.
// Launch        forward_warp_*: block 128, `lanes` lanes (a power of 2 <= 32) a row, cols <= lanes * kPer * kVec.
//               forward_block_*: block B (a multiple of 32, <= kMaxThreads*), grid rows, cols <= B * kPer * kVec.
//               forward_cluster_*: clusters of C <= 8 blocks of B <= kClusterThreads, cols <= C * B * kPer * kVec; shared:
//               kRing * B * kPer * kVec * sizeof(X); sm_90.
//               kVec > 1: all pointers on 16 bytes, cols a multiple of kVec. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Ba et al., arXiv:1607.06450; two-pass variance: Chan, Golub, LeVeque, "Algorithms for computing the
//               sample variance" (1983).
#include "row.cuh"

constexpr int kWarpRowThreads = 128;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kMaxThreads = 896;
#else
constexpr int kMaxThreads = 1024;
#endif
constexpr int kMaxThreadsSingle = 640;
constexpr int kClusterThreads = 512;
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
  const Moments m = moments_about(center, warp_sum(slice.sums(center, t, lanes, cols), lanes), inv_cols, remove_mean);
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
  const Acc inv_cols = Acc(1) / cols;
  const Moments m = block_moments(slice, cols, inv_cols, remove_mean, part);
  const Acc r = rsqrt_acc(m.m2 * inv_cols + eps);
  slice.normalize(y, weight, bias, m.mean, r, threadIdx.x, blockDim.x, cols);
  if (threadIdx.x == 0) {
    if (mean) mean[row] = m.mean;
    if (rstd) rstd[row] = r;
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// backward.cu says how the ring works, and why no set of partial sums is overrun.
template <int kVec, int kPer>
__device__ __forceinline__ void forward_cluster(X* y, Acc* mean, Acc* rstd, const X* x, const Param* weight, const Param* bias,
                                                int64_t rows, int cols, Acc eps, int remove_mean) {
  constexpr int kRing = 6, kLag = 2, kSets = 8, kMaxWarps = kClusterThreads / kWarp, kMaxBlocks = 8;
  static_assert(kSets >= 2 * kLag + 2 && kRing > kLag, "sets and ring rows that cannot be overrun");
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Pair part[kSets][kMaxBlocks * kMaxWarps];  // mean and m2 of a warp's columns
  __shared__ uint64_t full[kSets];

  const Slots<kVec, kPer, 1> slots(shared);
  const int t = threadIdx.x, threads = blockDim.x, lane = t % kWarp, warp = t / kWarp, warps = threads / kWarp;
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  const int64_t owner = blockIdx.x / blocks, owners = gridDim.x / blocks;
  const int iterations = owner < rows ? int((rows - 1 - owner) / owners + 1) : 0;
  const int vectors = cols / kVec, slice = (vectors + int(blocks) - 1) / int(blocks);
  const int begin = min(int(rank) * slice, vectors) * kVec, own_cols = min(slice * kVec, cols - begin);
  const Acc inv_cols = Acc(1) / cols;
  // Columns that warp w of the cluster holds.
  const auto columns_of = [&](int w) {
    const int block = w / warps, in_block = min(slice, vectors - block * slice) * kVec;
    int sum = 0;
#pragma unroll
    for (int k = 0; k < kPer; k++) sum += max(0, min(kWarp * kVec, in_block - (k * threads + w % warps * kWarp) * kVec));
    return sum;
  };
  constexpr int kOthers = kMaxBlocks * kMaxWarps / kWarp;
  Acc counts[kOthers];
#pragma unroll
  for (int i = 0; i < kOthers; i++) {
    const int w = lane + i * kWarp;
    counts[i] = w < int(blocks) * warps ? columns_of(w) : 0;
  }
  const int own_count = columns_of(rank * warps + warp);
  const Acc inv_count = Acc(1) / max(own_count, 1);

  if (t == 0) {
    for (int s = 0; s < kSets; s++) barrier_init(&full[s], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  const int64_t step = owners * cols, start = owner * cols + begin + t * kVec;
  const X* next = x + start;
  X* out = y + start;
  const auto fill = [&](int it, int slot) {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = k * threads * kVec;
      slots.fill(slot, k, 0, next + c, it < iterations && c + t * kVec < own_cols);
    }
    next += step;
    copy_async_commit();
  };
  for (int r = 0; r < kRing; r++) fill(r, r);
  Vec<Param, kVec> w[kPer], b[kPer];
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * threads + t) * kVec;
    if (c < own_cols) {
      w[k] = load_param<kVec>(weight, begin + c, 1);
      b[k] = load_param<kVec>(bias, begin + c, 0);
    }
  }

  int sum_slot = 0, out_slot = 0;
#pragma unroll 1
  for (int it = 0; it < iterations + kLag; it++) {
    if (it < iterations) {
      const int set = it % kSets;
      copy_async_wait<kRing - kLag - 1>();
      Vec<X, kVec> v[kPer];
#pragma unroll
      for (int k = 0; k < kPer; k++) v[k] = slots.read(sum_slot, k, 0);
      if (++sum_slot == kRing) sum_slot = 0;
      Acc center = 0;
      if (remove_mean) {
#pragma unroll
        for (int k = 0; k < kPer; k++)
#pragma unroll
          for (int i = 0; i < kVec; i++) center += v[k][i];
        center = warp_sum(center) * inv_count;
      }
      Pair sums = {0, 0};
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        // Columns past the last are zero and stay so.
        const Acc from = (k * threads + t) * kVec < own_cols ? center : Acc(0);
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          const Acc d = v[k][i] - from;
          sums.a += d;
          sums.b += d * d;
        }
      }
      const Moments m = moments_about(center, warp_sum(sums), inv_count, remove_mean);
      if (t == 0) barrier_expect(&full[set], blocks * warps * sizeof(Pair));
      const int to = lane % (kWarp / 2);
      Pair* const own = &part[set][rank * warps + warp];
      if (to < int(blocks)) send(address_in(to, to == lane ? &own->a : &own->b), to == lane ? m.mean : m.m2, address_in(to, &full[set]));
    }
    if (it >= kLag) {
      const int row = it - kLag, set = row % kSets;
      barrier_wait(&full[set], row / kSets & 1);
      // About the first warp's mean, so that mean >> std loses nothing.
      const Acc center = part[set][0].a;
      Pair others[kOthers];
      Acc rest = 0, m2 = 0;
#pragma unroll
      for (int i = 0; i < kOthers; i++) {
        others[i] = counts[i] > 0 ? part[set][lane + i * kWarp] : Pair{center, 0};
        rest += (others[i].a - center) * counts[i];
      }
      const Acc row_mean = center + warp_sum(rest) * inv_cols;
#pragma unroll
      for (int i = 0; i < kOthers; i++) {
        const Acc d = others[i].a - row_mean;
        m2 += others[i].b + d * d * counts[i];
      }
      const Acc r = rsqrt_acc(warp_sum(m2) * inv_cols + eps);
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        const int c = k * threads * kVec;
        if (c + t * kVec < own_cols) {
          const Vec<X, kVec> v = slots.read(out_slot, k, 0);
          Acc f[kVec];
#pragma unroll
          for (int i = 0; i < kVec; i++) f[i] = (v[i] - row_mean) * r * w[k][i] + b[k][i];
          store<X, kVec>(out + c, f);
        }
      }
      out += step;
      fill(row + kRing, out_slot);
      if (++out_slot == kRing) out_slot = 0;
      if (rank == 0 && t == 0) {
        const int64_t at = owner + row * owners;
        if (mean) mean[at] = row_mean;
        if (rstd) rstd[at] = r;
      }
    }
  }
  // No block leaves while another may send to it.
  cluster_sync();
}
#endif

#define FORWARD_ARGUMENTS                                                                                              \
  X *__restrict__ y /* [rows, cols] */, Acc *__restrict__ mean /* [rows] */, Acc *__restrict__ rstd /* [rows] */,       \
      const X *__restrict__ x /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                       \
      const Param *__restrict__ bias /* [cols] */, int64_t rows, int cols, Acc eps, int remove_mean

#define FORWARD_WARP(name, vec, per)                                                                                   \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, 4) forward_warp_##name(FORWARD_ARGUMENTS, int lanes) {     \
    forward_warp<vec, per>(y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean, lanes);                       \
  }
#define FORWARD_BLOCK(name, vec, per, threads)                                                                         \
  extern "C" __global__ void __launch_bounds__(threads, 1) forward_block_##name(FORWARD_ARGUMENTS) {                   \
    forward_block<vec, per>(y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean);                             \
  }

// Suffixes are fractions of kLarge or kLargeSingle.
FORWARD_WARP(wide_quarter, kWide, kLarge / 4)
FORWARD_WARP(wide_half, kWide, kLarge / 2)
FORWARD_WARP(wide_full, kWide, kLarge)
FORWARD_WARP(single_quarter, 1, kLargeSingle / 4)
FORWARD_WARP(single_half, 1, kLargeSingle / 2)
FORWARD_WARP(single_full, 1, kLargeSingle)
#if LN_X_BYTES != 2
FORWARD_BLOCK(wide_half, kWide, kLarge / 2, kMaxThreads)
#endif
FORWARD_BLOCK(wide_full, kWide, kLarge, kMaxThreads)
FORWARD_BLOCK(single_full, 1, kLargeSingle, kMaxThreadsSingle)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FORWARD_CLUSTER(name, vec, per)                                                                                \
  extern "C" __global__ void __launch_bounds__(kClusterThreads, 1) forward_cluster_##name(FORWARD_ARGUMENTS) {         \
    forward_cluster<vec, per>(y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean);                           \
  }

FORWARD_CLUSTER(wide, kWide, 4)
FORWARD_CLUSTER(single, 1, kLargeSingle)
#endif
