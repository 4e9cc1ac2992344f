// Forward for longer rows, which a cluster of blocks or a group of blocks of the grid holds in shared memory.
//
// Computes      as forward.cu.
// Algorithm     Persistent groups of blocks stride over the rows; ring.cuh says how a row's owners work together. weight and bias stay
//               in registers. A thread sums about one of its first values of a row, in one pass; warps, blocks and the group merge
//               their moments (Chan). Statistics run kLead chunks ahead of y.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once.
// Launch        W warps that compute (to 16) and C that communicate, C = 1 for clusters and giant rows, else 4; shared:
//               kSlots * W * 32 * kVec * sizeof(X); cols <= blocks * W * 32 * kPer * kVec.
//               forward_block_shifted: grid of as many blocks as are resident.
//               forward_cluster_*: clusters of 2 to 16 blocks; sm_90.
//               forward_grid_*, forward_giant_*: cooperative, `group_blocks` (to 160) blocks a row, a grid of whole groups;
//               meetings: zeros, [rows, group_blocks + 32] pairs.
//               forward_warp_shifted_32xP: block kThreads, a warp a row, cols <= 32 * P * kVec - 2 * (kVec - 1); warps of the grid
//               * cols a multiple of kVec, or a warp for each row; shared: kRing * kThreads * P * kVec * sizeof(X).
//               wide: all pointers on 16 bytes, cols a multiple of kVec. shifted: x and y on 16 bytes; for blocks, owners * cols
//               a multiple of kVec, or an owner for each row. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "ring.cuh"

// kSlots chunks a warp in the ring; the statistics run kLead chunks ahead of y, across rows, so that nobody waits for them.
template <int kVec, int kPer, int kSlots, int kLead, Owner kOwner, int kComm, bool kGiant, bool kShifted>
__device__ __forceinline__ void forward_ring(FORWARD_TAKES, Pair* meetings, int group_blocks) {
  constexpr int kLag = (kLead + kPer - 1) / kPer, kSets = kLag <= 2 ? 4 : 8;
  static_assert(kSlots > kLead && kLead >= kPer && kSets >= kLag + 2, "sets and slots that cannot be overrun");
  static_assert(kGiant || kSlots % kPer == 0, "slots that keep to their k");
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ MailBox<kSets, Normalizer> box;
  const Mail<kSets, Normalizer> mail(box);

  const Group group = group_of<kOwner>(group_blocks);
  const int lane = threadIdx.x % kWarp, warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp - kComm;
  // A block keeps to rows of one shift: there are blocks enough.
  constexpr bool kSorted = kShifted && kOwner != Owner::Block;
  const auto own = Rows<kSorted>::template of<kVec>(rows, cols, group.owner, group.owners);
  using F = Frame<kVec, kShifted>;
  const auto share_at = [&](int rank) { return share_of(F::vectors(cols), rank, group.blocks); };
  const auto columns_at = [&](const F& frame, int rank) { return frame.count(share_at(rank).begin, share_at(rank).begin + share_at(rank).vectors); };
  const Share share = share_at(group.rank);
  // Columns of a warp's part of the share.
  const auto columns_of = [&](const F& frame, int w) {
    const int begin = min(w * kPer * kWarp, share.vectors), end = min(begin + kPer * kWarp, share.vectors);
    return frame.count(share.begin + begin, share.begin + end);
  };

  if (threadIdx.x == 0) mail.init(warps);
  __syncthreads();
  sync_owner<kOwner>();

  if (warp >= warps) {
    const Acc inv_cols = inverse(cols);
    constexpr int kHeard = kOwner == Owner::Grid ? kMaxOthers : 1;
    Acc counts[1], inv_share = 0, shares[kHeard];
    const auto count = [&](const F& frame) {
      counts[0] = lane < warps ? Acc(columns_of(frame, lane)) : Acc(0);
      inv_share = inverse(max(columns_at(frame, group.rank), 1));
#pragma unroll
      for (int j = 0; j < kHeard; j++) {
        const int block = lane + j * kWarp;
        shares[j] = block < group.blocks ? Acc(columns_at(frame, block)) : Acc(0);
      }
    };
    const auto merge = [&](const Pair (&heard)[kHeard]) {
      const Moments m = merge_moments(heard, shares, inv_cols);
      return Pair{m.mean, m.m2};
    };
    auto row = own.at(0);
    int counted = -1;
    if constexpr (!kSorted) count(F(cols, row));
#pragma unroll 1
    for (int it = 0; it < own.count; it++, row = own.next(row)) {
      if (it % kComm != warp - warps) continue;
      if constexpr (kSorted)
        if (const F frame(cols, row); frame.shift != counted) {
          count(frame);
          counted = frame.shift;
        }
      const Pair parts[1] = {mail.collect(it, warps)};
      const Moments block = merge_moments(parts, counts, inv_share);
      const Pair m = mail.template agree<kOwner>(it, group, Pair{block.mean, block.m2}, meetings + int64_t(row) * meeting_pairs(group.blocks), merge);
      const Acc r = rsqrt_acc(m.b * inv_cols + eps);
      mail.deliver(it, Normalizer{m.a, r});
      if (group.rank == 0 && lane == 0) {
        if (mean) mean[row] = m.a;
        if (rstd) rstd[row] = r;
      }
    }
  } else {
    // This thread's vectors: of the share, and of the row.
    const int first = warp * kPer * kWarp + lane, vector = share.begin + first;
    const int last = share.begin + share.vectors, limit = last - vector;
    const auto valid = [&](int k) {
      int l = limit;
      // Else the compiler keeps the answers for all k, in registers that giant rows do not have.
      if constexpr (kGiant) asm volatile("" : "+r"(l));
      return k * kWarp < l;
    };
    using C = Chunks<kVec, 1>;
    const uint32_t begin = C::start(shared, warp, kSlots), end = begin + kSlots * C::kChunk;
    const auto advance = [&](uint32_t& at) {
      at += C::kChunk;
      if (at == end) at = begin;
    };
    // Giant rows pass once and leave L2 to weight and bias.
    uint64_t once = 0;
    if constexpr (kGiant) once = evict_first();

    const auto offset_of = [&](const F& frame, int64_t row) { return row * cols + frame.column(vector); };
    // Of the next chunk to be copied.
    int next_it = 0;
    auto next_row = own.at(0);
    F next_frame(cols, next_row);
    const X* next = x + offset_of(next_frame, next_row);
    const auto fill = [&](int k, uint32_t at) {
      if (next_it < own.count && valid(k)) {
        if constexpr (kGiant) copy_async16(at, next + k * kWarp * kVec, once);
        else C::fill_of(next_frame, at, next + k * kWarp * kVec, vector + k * kWarp, x + rows * cols);
      }
      copy_async_commit();
      if (k == kPer - 1) {
        next_it++;
        next_row = own.next(next_row);
        if constexpr (kSorted) next_frame = F(cols, next_row);
        next = x + offset_of(next_frame, next_row);
      }
    };
    uint32_t at = begin;
#pragma unroll 1
    for (int k = 0; at < end; k = k == kPer - 1 ? 0 : k + 1) {
      // Only a slot of a giant row is another k's in the next.
      if (!kGiant && !valid(k)) C::clear(at);
      fill(k, at);
      at += C::kChunk;
    }

    // Of the row that is being summed.
    auto sum_row = own.at(0);
    F sum_frame(cols, sum_row);
    OwnSums<kVec, kShifted> sums;
    Acc own_count = 0, inv_own = 0, inv_warp = 0;
    const auto count = [&]() {
      int columns = 0;
#pragma unroll
      for (int k = 0; k < kPer; k++)
        if (valid(k)) columns += sum_frame.count(vector + k * kWarp, vector + k * kWarp + 1);
      own_count = columns;
      inv_own = inverse(max(columns, 1));
      inv_warp = inverse(max(columns_of(sum_frame, warp), 1));
    };
    count();
    uint32_t sum_at = begin, out_at = begin;
    const auto add_ahead = [&](int it, int k) {
      copy_async_wait<kSlots - kLead>();
      if (it < own.count) {
        if (!kGiant || valid(k)) sums.add(sum_frame, sum_at, vector + k * kWarp, k == 0, valid(k), remove_mean);
        else if (k == 0) sums = {};
        advance(sum_at);
        if (k == kPer - 1) {
          const Moments all = sums.merge(own_count, inv_own, inv_warp, remove_mean);
          mail.leave(it, warp, lane < kWarp / 2 ? all.mean : all.m2);
          if constexpr (kSorted) {
            sum_row = own.next(sum_row);
            if (const F frame(cols, sum_row); frame.shift != sum_frame.shift) {
              sum_frame = frame;
              count();
            }
          }
        }
      }
    };
#pragma unroll 1
    for (int it = 0; it < kLead / kPer; it++)
#pragma unroll
      for (int k = 0; k < kPer; k++) add_ahead(it, k);
#pragma unroll
    for (int k = 0; k < kLead % kPer; k++) add_ahead(kLead / kPer, k);

    auto out_row = own.at(0);
    int it = 0;
#pragma unroll 1
    do {
      const F frame(cols, out_row);
      Vec<Param, kVec> w[kPer], b[kPer];
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        w[k] = load_weight_of(frame, weight, vector + k * kWarp, weight_offset, last);
        b[k] = load_param_of(frame, bias, vector + k * kWarp, 0, last);
      }
      const int stop = own.end_of_kind(it, out_row);
#pragma unroll 1
      for (; it < stop; it++, out_row = own.next(out_row)) {
        X* const out = y + offset_of(frame, out_row);
        const Normalizer n = mail.wait(it);
#pragma unroll
        for (int k = 0; k < kPer; k++) {
          const Vec<X, kVec> v = C::read(out_at);
          w[k].keep();
          b[k].keep();
          Acc f[kVec];
#pragma unroll
          for (int i = 0; i < kVec; i++) f[i] = n.xhat(v[i]) * weight_of(w[k][i], weight_offset) + b[k][i];
          if constexpr (kGiant) store<X, kVec>(out + k * kWarp * kVec, f, valid(k), once);
          else store_of(frame, out + k * kWarp * kVec, f, vector + k * kWarp, valid(k));
          // The slot's next chunk is kSlots further on.
          fill((k + kSlots) % kPer, out_at);
          advance(out_at);
          add_ahead(it + (k + kLead) / kPer, (k + kLead) % kPer);
        }
      }
    } while (kSorted && it < own.count);
    copy_async_wait<0>();
  }
  // No block leaves while another may send to it.
  sync_owner<kOwner>();
}

#ifdef LN_SHIFTED
constexpr int kThreads = 256;

// A persistent warp owns rows, as in backward.cu.
template <int kVec, int kPer> __device__ __forceinline__ void forward_warp_ring(FORWARD_TAKES) {
  constexpr int kRing = kWarpRing<kPer * kVec * int(sizeof(X))>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarp, warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp;
  const auto own = Rows<false>::of<kVec>(rows, cols, blockIdx.x * warps + warp, gridDim.x * warps);
  const Frame<kVec, true> frame(cols, own.begin);
  using C = Chunks<kVec, 1>;
  const uint32_t begin = C::start(shared, warp, kRing * kPer), end = begin + kRing * kPer * C::kChunk;
  bool valid[kPer];
  Vec<Param, kVec> w[kPer], b[kPer];
  int columns = 0;
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int vector = k * kWarp + lane;
    valid[k] = frame.column(vector) < cols;
    w[k] = load_weight_of(frame, weight, vector, weight_offset, frame.vectors(cols));
    b[k] = load_param_of(frame, bias, vector, 0, frame.vectors(cols));
    columns += frame.count(vector, vector + 1);
    if (!valid[k])
      for (uint32_t at = begin + k * C::kChunk; at < end; at += kPer * C::kChunk) C::clear(at);
  }
  const Acc count = columns, inv_count = inverse(max(columns, 1)), inv_cols = inverse(cols);
  const int64_t step = own.step * cols;
  int64_t next = own.begin * cols + frame.column(lane);
  const auto fill = [&](int it, uint32_t at) {
    if (it < own.count) {
#pragma unroll
      for (int k = 0; k < kPer; k++)
        if (valid[k]) C::fill_of(frame, at + k * C::kChunk, x + next + k * kWarp * kVec, k * kWarp + lane, x + rows * cols);
    }
    next += step;
    copy_async_commit();
  };
  for (int r = 0; r < kRing; r++) fill(r, begin + r * kPer * C::kChunk);

  uint32_t at = begin;
#pragma unroll 1
  for (int it = 0; it < own.count; it++) {
    copy_async_wait<kRing - 1>();
    OwnSums<kVec, true> sums;
#pragma unroll
    for (int k = 0; k < kPer; k++) sums.add(frame, at + k * C::kChunk, k * kWarp + lane, k == 0, valid[k], remove_mean);
    const Moments m = sums.merge(count, inv_count, inv_cols, remove_mean);
    const Normalizer n = {m.mean, rsqrt_acc(m.m2 * inv_cols + eps)};
    X* const out = y + next - kRing * step;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      w[k].keep();
      b[k].keep();
      const Vec<X, kVec> v = C::read(at + k * C::kChunk);
      Acc f[kVec];
#pragma unroll
      for (int i = 0; i < kVec; i++) f[i] = n.xhat(v[i]) * weight_of(w[k][i], weight_offset) + b[k][i];
      store_of(frame, out + k * kWarp * kVec, f, k * kWarp + lane, valid[k]);
    }
    if (lane == 0) {
      const int64_t row = own.begin + it * own.step;
      if (mean) mean[row] = n.mean;
      if (rstd) rstd[row] = n.rstd;
    }
    fill(it + kRing, at);
    at += kPer * C::kChunk;
    if (at == end) at = begin;
  }
}

#define FORWARD_WARP_RING(lanes, per, blocks)                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, blocks) forward_warp_shifted_##lanes##x##per(FORWARD_ARGUMENTS) { \
    forward_warp_ring<kWide, per>(FORWARD_PASS);                                                                       \
  }
#if LN_X_BYTES == 2 && LN_PARAM_BYTES == 2
FORWARD_WARP_RING(32, 2, 4)
FORWARD_WARP_RING(32, 4, 3)
#elif LN_X_BYTES == 2
FORWARD_WARP_RING(32, 2, 3)
FORWARD_WARP_RING(32, 4, 2)
#elif LN_X_BYTES == 4
FORWARD_WARP_RING(32, 4, 3)
FORWARD_WARP_RING(32, 8, 2)
#else
FORWARD_WARP_RING(32, 4, 2)
#endif
#endif

#define FORWARD_RING(name, per, slots, lead, owner, comm, giant, threads)                                              \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                             \
      forward_##name(FORWARD_ARGUMENTS, Pair* __restrict__ meetings /* [rows, group_blocks + 32] */, int group_blocks) { \
    forward_ring<kWide, per, slots, lead, owner, comm, giant, kShifted>(FORWARD_PASS, meetings, group_blocks);         \
  }
#ifdef LN_SHIFTED
constexpr bool kShifted = true;
// f32 weights beside half precision take registers.
constexpr int kOne = LN_X_BYTES < LN_PARAM_BYTES ? 384 : LN_X_BYTES == 8 ? 512 : 544;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kGrid = LN_X_BYTES < LN_PARAM_BYTES ? 384 : LN_X_BYTES == 8 ? 512 : 640;
#else
constexpr int kGrid = LN_X_BYTES < LN_PARAM_BYTES ? 384 : 512;
#endif
#define NAME(owner) owner##_shifted
#else
constexpr bool kShifted = false;
constexpr int kOne = 544, kGrid = 640;
#define NAME(owner) owner##_wide
#endif
#define RING(owner, per, slots, lead, type, comm, threads) RING_OF(NAME(owner), per, slots, lead, type, comm, threads)
#define RING_OF(name, per, slots, lead, type, comm, threads) FORWARD_RING(name, per, slots, lead, type, comm, false, threads)

#ifdef LN_SHIFTED
RING(block, 4, 12, 8, Owner::Block, 1, kOne)
#elif LN_X_BYTES == 2 && LN_PARAM_BYTES == 2
FORWARD_RING(giant_wide, 9, 28, 18, Owner::Grid, 1, true, 480)
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
RING(cluster, 4, 20, 8, Owner::Cluster, 1, kOne)
#endif
RING(grid, 4, 24, 16, Owner::Grid, 4, kGrid)
