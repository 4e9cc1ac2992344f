// Backward for rows that fit on chip: a group of lanes, a block, or a cluster of blocks owns a row.
//
// Computes      xhat = (x - mean) * rstd, g = dy * weight, a = sum(g) / cols (0 for RMSNorm), b = sum(g * xhat) / cols,
//               dx = (g - a - xhat * b) * rstd, dweight = sum over rows of dy * xhat, dbias = sum over rows of dy.
// Algorithm     Persistent owners stride over the rows. A thread owns the same kPer vectors of every row: weight and the
//               f32 sums for dweight and dbias stay in its registers. It copies its own vectors of x and dy
//               asynchronously into its own slots of a ring of kRing rows, so that no barrier guards the ring and kRing - kLag
//               rows are in flight. A block's warps leave their two sums of a row and arrive on an mbarrier; dx of a row
//               is written kLag rows later, when they are all there, so that nobody waits for a reduction. Blocks of a
//               cluster send their warps' sums to each other through distributed shared memory, counted on the same
//               mbarrier. finalize.cu adds the owners' partial dweight and dbias.
// Bytes moved   3 * rows * cols * sizeof(X), and 16 * parts * cols for the partials, written and read (in f32).
// Launch        backward_warp_*: block 256, `lanes` lanes (a power of 2 <= 32) a row, cols <= lanes * kPer * kVec;
//               shared: max(kRing * 512 * kPer * kVec * sizeof(X), 8 * cols * sizeof(Acc)).
//               backward_block_*: block B (a multiple of 32, <= kMaxThreads), cols <= B * kPer * kVec;
//               shared: kRing * 2 * B * kPer * kVec * sizeof(X).
//               backward_cluster_*: the same with clusters of C <= 8 blocks, cols <= C * B * kPer * kVec; sm_90.
//               Partials: [owners, cols], an owner being a block or a cluster. kVec > 1: all pointers on 16 bytes, cols a
//               multiple of kVec. dx, dweight_part, dbias_part, weight, mean may be null.
// Determinism   No atomics; every sum has one order, that of lanes, warps, blocks, owners.
// Source        Ba et al., arXiv:1607.06450, differentiated by hand.
#include "row.cuh"

constexpr int kWarpRowThreads = 256;
constexpr int kMaxThreads = sizeof(X) == 8 ? 384 : 512;
constexpr int kMaxThreadsSingle = 256;
constexpr int kMaxBlocks = 8;
// Vectors a thread. Its two sums for each element fill registers.
constexpr int kLargeWarp = sizeof(X) == 4 ? 8 : 4;
constexpr int kLarge = sizeof(X) == 2 ? 2 : 4;
constexpr int kLargeSingle = sizeof(X) == 8 ? 8 : 16;

// Rows in the ring of a block, by the bytes of a row that a thread holds, and how many rows dx lags behind the sums. plan.rs sizes
// shared memory by the same table.
template <int kThreadBytes> struct Ring {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr int rows = kThreadBytes >= 64 ? 3 : 6, lag = kThreadBytes >= 64 ? 1 : sizeof(X) == 2 ? 3 : 2;
#else
  static constexpr int rows = kThreadBytes >= 64 ? 2 : 3, lag = 1;
#endif
};
template <int kThreadBytes> constexpr int kWarpRing = kThreadBytes >= 128 ? 3 : 4;

#define BACKWARD_ARGUMENTS                                                                                             \
  X *__restrict__ dx /* [rows, cols] */, Acc *__restrict__ dweight_part /* [owners, cols] */,                          \
      Acc *__restrict__ dbias_part /* [owners, cols] */, const X *__restrict__ x /* [rows, cols] */,                   \
      const X *__restrict__ dy /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                      \
      const Acc *__restrict__ mean /* [rows] */, const Acc *__restrict__ rstd /* [rows] */, int64_t rows, int cols,    \
      int remove_mean

template <int kVec, int kPer>
__device__ __forceinline__ void backward_warp(BACKWARD_ARGUMENTS, int lanes) {
  constexpr int kRing = kWarpRing<kPer * kVec * int(sizeof(X))>;
  extern __shared__ __align__(16) unsigned char shared[];
  const Slots<kVec, kPer, 2> slots(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane % lanes, warps = kWarpRowThreads / kWarp;
  const int per_warp = kWarp / lanes;
  const int64_t stride = int64_t(gridDim.x) * warps * per_warp;
  const int64_t first = (int64_t(blockIdx.x) * warps + warp) * per_warp;
  // Of the warp's first row: the same for all its lanes, which shuffle together.
  const int iterations = first < rows ? int((rows - 1 - first) / stride + 1) : 0;
  const Acc inv_cols = Acc(1) / cols;

  Columns<kVec, kPer> own;
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * lanes + t) * kVec;
    own.start(k, weight, c, c < cols);
  }
  const auto row_of = [&](int it) { return first + lane / lanes + it * stride; };
  const auto fill = [&](int it, int slot) {
    const bool valid = it < iterations && row_of(it) < rows;
    const int64_t at = row_of(it) * cols;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * lanes + t) * kVec;
      slots.fill(slot, k, 0, x + at + c, valid && c < cols);
      slots.fill(slot, k, 1, dy + at + c, valid && c < cols);
    }
    copy_async_commit();
  };
  for (int r = 0; r < kRing; r++) fill(r, r);
  Acc next_mean = 0, next_rstd = 0;
  const auto prefetch_statistics = [&](int it) {
    if (it < iterations && row_of(it) < rows) {
      next_mean = mean ? __ldg(mean + row_of(it)) : Acc(0);
      next_rstd = __ldg(rstd + row_of(it));
    }
  };
  prefetch_statistics(0);
  // One column less its own mean is nothing, whatever the rounding.
  const Acc varies = cols > 1 || !remove_mean;

  int slot = 0;
#pragma unroll 1
  for (int it = 0; it < iterations; it++) {
    const RowStatistics row = {next_mean, next_rstd * varies};
    prefetch_statistics(it + 1);
    copy_async_wait<kRing - 1>();
    Pair sums = {0, 0};
#pragma unroll
    for (int k = 0; k < kPer; k++) own.add(k, slots.read(slot, k, 0), slots.read(slot, k, 1), row, sums);
    const Scales s = scales_of(warp_sum(sums, lanes), row, inv_cols, remove_mean);
    if (dx && row_of(it) < rows) {
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        const int c = (k * lanes + t) * kVec;
        own.store_dx(dx + row_of(it) * cols + c, k, slots.read(slot, k, 0), slots.read(slot, k, 1), s, c < cols);
      }
    }
    fill(it + kRing, slot);
    if (++slot == kRing) slot = 0;
  }

  // Rows of one warp, then the warps in order, through shared memory that the ring no longer needs.
  copy_async_wait<0>();
  Acc* const part = reinterpret_cast<Acc*>(shared);
#pragma unroll
  for (int tensor = 0; tensor < 2; tensor++) {
    Acc* const out = tensor ? dbias_part : dweight_part;
    if (!out) continue;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * lanes + t) * kVec;
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        Acc v = tensor ? own.dbias[k][i] : own.dweight[k][i];
        for (int o = lanes; o < kWarp; o *= 2) v += __shfl_xor_sync(kFull, v, o);
        if (lane < lanes && c < cols) part[warp * cols + c + i] = v;
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < cols; c += kWarpRowThreads) {
      Acc sum = 0;
      for (int w = 0; w < warps; w++) sum += part[w * cols + c];
      out[int64_t(blockIdx.x) * cols + c] = sum;
    }
  }
}

template <int kVec, int kPer, bool kCluster>
__device__ __forceinline__ void backward_block(BACKWARD_ARGUMENTS) {
  using R = Ring<kPer * kVec * int(sizeof(X))>;
  constexpr int kRing = R::rows, kLag = R::lag, kMaxWarps = 16;
  // A warp leaves its sums of row i after it gathered those of row i - kLag, which every warp of the row's owner had left, and so
  // had gathered those of row i - 2 * kLag. With more sets than that, no sum and no phase of a barrier is overrun.
  constexpr int kSets = 8;
  static_assert(kSets > 2 * kLag && kRing > kLag && kMaxThreads <= kMaxWarps * kWarp, "sets and ring rows that cannot be overrun");
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Pair part[kSets][kCluster ? kMaxBlocks * kMaxWarps : kMaxWarps];
  __shared__ uint64_t full[kSets];

  const Slots<kVec, kPer, 2> slots(shared);
  const int t = threadIdx.x, threads = blockDim.x, lane = t % kWarp, warp = t / kWarp, warps = threads / kWarp;
  uint32_t rank = 0, blocks = 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kCluster) {
    rank = cluster_rank();
    blocks = cluster_size();
  }
#endif
  const int64_t owner = blockIdx.x / blocks, owners = gridDim.x / blocks;
  const int iterations = owner < rows ? int((rows - 1 - owner) / owners + 1) : 0;
  // This block's columns: whole vectors, the last block's may be fewer or none.
  const int vectors = cols / kVec, slice = (vectors + int(blocks) - 1) / int(blocks);
  const int begin = min(int(rank) * slice, vectors) * kVec, own_cols = min(slice * kVec, cols - begin);
  const Acc inv_cols = Acc(1) / cols;

  if (t == 0) {
    for (int s = 0; s < kSets; s++) barrier_init(&full[s], kCluster ? 1 : 2 * warps);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __syncthreads();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kCluster) cluster_sync();
#endif

  Columns<kVec, kPer> own;
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * threads + t) * kVec;
    own.start(k, weight, begin + c, c < own_cols);
  }
  const int64_t step_elements = owners * cols, start = owner * cols + begin + t * kVec;
  const X *next_x = x + start, *next_dy = dy + start;
  X* out = dx + start;
  const auto fill = [&](int it, int slot) {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = k * threads * kVec;
      const bool valid = it < iterations && c + t * kVec < own_cols;
      slots.fill(slot, k, 0, next_x + c, valid);
      slots.fill(slot, k, 1, next_dy + c, valid);
    }
    next_x += step_elements;
    next_dy += step_elements;
    copy_async_commit();
  };
  for (int r = 0; r < kRing; r++) fill(r, r);

  // Statistics: of the next row, and of the rows between the sums and dx.
  Acc next_mean = 0, next_rstd = 0;
  RowStatistics lagged[kLag + 1];
  const auto prefetch_statistics = [&](int it) {
    if (it < iterations) {
      const int64_t row = owner + it * owners;
      next_mean = mean ? __ldg(mean + row) : Acc(0);
      next_rstd = __ldg(rstd + row);
    }
  };
  prefetch_statistics(0);

  int sum_slot = 0, dx_slot = 0;
  const auto add_row = [&](int it) {
    copy_async_wait<kRing - kLag - 1>();
    lagged[0] = {next_mean, next_rstd};
    prefetch_statistics(it + 1);
    Pair sums = {0, 0};
#pragma unroll
    for (int k = 0; k < kPer; k++) own.add(k, slots.read(sum_slot, k, 0), slots.read(sum_slot, k, 1), lagged[0], sums);
    if (++sum_slot == kRing) sum_slot = 0;
    return warp_sum_by_halves(sums);
  };
  const auto leave_sums = [&](int it, Acc half) {
    const int set = it % kSets;
    if constexpr (kCluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      if (t == 0) barrier_expect(&full[set], blocks * warps * sizeof(Pair));
      const int to = lane % (kWarp / 2);
      Pair* const own_part = &part[set][rank * warps + warp];
      if (to < int(blocks)) send(address_in(to, to == lane ? &own_part->a : &own_part->b), half, address_in(to, &full[set]));
#endif
    } else {
      leave_part(part[set][warp], half);
      if (lane % (kWarp / 2) == 0) barrier_arrive(&full[set]);
    }
  };
  const auto gather_sums = [&](int row) {
    barrier_wait(&full[row % kSets], row / kSets & 1);
    return sum_parts(part[row % kSets], blocks * warps);
  };
  const auto write_dx = [&](Pair row_sums) {
    const Scales s = scales_of(row_sums, lagged[kLag], inv_cols, remove_mean);
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = k * threads * kVec;
      own.store_dx(out + c, k, slots.read(dx_slot, k, 0), slots.read(dx_slot, k, 1), s, dx && c + t * kVec < own_cols);
    }
    out += step_elements;
  };
  // One step takes the sums of row `it` and writes dx of row it - kLag. The first steps have no dx, the last no sums.
  const auto step = [&](int it, auto with_sums, auto with_dx) {
    constexpr bool kSums = decltype(with_sums)::value, kDx = decltype(with_dx)::value;
    const int lag_row = it - kLag;
#pragma unroll
    for (int l = kLag; l > 0; l--) lagged[l] = lagged[l - 1];
    // Side by side: the latency of either's shuffles is filled with the other's arithmetic.
    Pair row_sums = {0, 0};
    Acc half = 0;
    if constexpr (kDx) row_sums = gather_sums(lag_row);
    if constexpr (kSums) half = add_row(it);
    if constexpr (kDx) write_dx(row_sums);
    if constexpr (kSums) leave_sums(it, half);
    if constexpr (kDx) {
      fill(lag_row + kRing, dx_slot);
      if (++dx_slot == kRing) dx_slot = 0;
    }
  };
  const Yes yes;
  const No no;
  int it = 0;
#pragma unroll 1
  for (; it < min(kLag, iterations); it++) step(it, yes, no);
#pragma unroll 1
  for (; it < kLag; it++) step(it, no, no);
#pragma unroll 1
  for (; it < iterations; it++) step(it, yes, yes);
#pragma unroll 1
  for (; it < iterations + kLag; it++) step(it, no, yes);
  copy_async_wait<0>();

#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * threads + t) * kVec;
    if (c < own_cols) {
      const int64_t at = owner * cols + begin + c;
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        if (dweight_part) dweight_part[at + i] = own.dweight[k][i];
        if (dbias_part) dbias_part[at + i] = own.dbias[k][i];
      }
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // No block leaves while another may send to it.
  if constexpr (kCluster) cluster_sync();
#endif
}

#define BACKWARD_PASS dx, dweight_part, dbias_part, x, dy, weight, mean, rstd, rows, cols, remove_mean
#define BACKWARD_WARP(name, vec, per, blocks)                                                                          \
  extern "C" __global__ void __launch_bounds__(kWarpRowThreads, blocks)                                                \
      backward_warp_##name(BACKWARD_ARGUMENTS, int lanes) {                                                            \
    backward_warp<vec, per>(BACKWARD_PASS, lanes);                                                                     \
  }
#define BACKWARD_BLOCK(name, vec, per, threads)                                                                        \
  extern "C" __global__ void __launch_bounds__(threads, 1) backward_block_##name(BACKWARD_ARGUMENTS) {                 \
    backward_block<vec, per, false>(BACKWARD_PASS);                                                                    \
  }

// Suffixes are fractions of the large constants.
BACKWARD_WARP(wide_quarter, kWide, kLargeWarp / 4, 2)
BACKWARD_WARP(wide_half, kWide, kLargeWarp / 2, 2)
BACKWARD_WARP(wide_full, kWide, kLargeWarp, 1)
BACKWARD_WARP(single_half, 1, kLargeSingle / 2, 2)
BACKWARD_WARP(single_full, 1, kLargeSingle, 1)
#if LN_X_BYTES != 2
BACKWARD_BLOCK(wide_half, kWide, kLarge / 2, kMaxThreads)
#endif
// f32 at 64 bytes a thread spills on some devices; with clusters, two blocks take such rows.
#if LN_X_BYTES != 4 || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
BACKWARD_BLOCK(wide_full, kWide, kLarge, kMaxThreads)
#endif
BACKWARD_BLOCK(single_full, 1, kLargeSingle, kMaxThreadsSingle)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BACKWARD_CLUSTER(name, vec, per, threads)                                                                      \
  extern "C" __global__ void __launch_bounds__(threads, 1) backward_cluster_##name(BACKWARD_ARGUMENTS) {               \
    backward_block<vec, per, true>(BACKWARD_PASS);                                                                     \
  }

BACKWARD_CLUSTER(wide_full, kWide, kLarge, kMaxThreads)
BACKWARD_CLUSTER(single_full, 1, kLargeSingle, kMaxThreadsSingle)
#endif
