// Forward for longer rows, which a cluster of blocks or a group of blocks of the grid holds in shared memory.
//
// Computes      as forward.cu.
// Algorithm     Persistent groups of blocks stride over the rows; ring.cuh says how a row's owners work together. weight and bias stay
//               in registers; the f32 bias of giant rows, for which there are too few, comes anew with each row, through slots of its own.
//               A thread sums about one of its first values of a row, in one pass; warps, blocks and the group merge
//               their moments (Chan), of which the means are in two terms. Statistics run kLead chunks ahead of y.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once.
// Launch        W warps that compute (to 16) and C that communicate, C = 1 for clusters and giant rows, else 4; shared:
//               W * 32 * kVec * (kSlots * sizeof(X) + kBiasSlots * sizeof(Param)), with LN_SKEWED W * kSlots * 16 more;
//               cols <= blocks * W * 32 * kPer * kVec.
//               forward_cluster_*, forward_long_cluster_*: clusters of 2 to 16 blocks; sm_90.
//               forward_grid_*, forward_giant_*: cooperative, `group_blocks` (to 160) blocks a row, a grid of whole groups;
//               meetings: [rows, 12 * group_blocks], zeros before and after.
//               wide: all pointers on 16 bytes, cols a multiple of kVec. shifted: x and y on 16 bytes, compiled with
//               LN_SKEWED y alone. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "ring.cuh"

// kSlots chunks a warp in the ring; the statistics run kLead chunks ahead of y, across rows, so that nobody waits for them.
// kBiasSlots vectors of bias a thread are on their way, or, if 0, all are in registers.
template <int kVec, int kPer, int kSlots, int kLead, Owner kOwner, int kComm, bool kGiant, int kBiasSlots, bool kShifted>
__device__ __forceinline__ void forward_ring(FORWARD_TAKES, Acc* meetings, int group_blocks) {
  constexpr int kLag = (kLead + kPer - 1) / kPer, kSets = kLag <= 2 ? 4 : 8;
  static_assert(kSlots > kLead && kLead >= kPer && kSets >= kLag + 2, "sets and slots that cannot be overrun");
  static_assert(kGiant || kSlots % kPer == 0, "slots that keep to their k");
  // What a step copies has arrived kSlots - kLead + 1 steps later.
  static_assert(!kBiasSlots || (kGiant && kBiasSlots > kSlots - kLead && kBiasSlots <= kPer), "a bias that has arrived when it is read");
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ MailBox<kSets, Part, Normalizer> box;
  const Mail<kSets, Part, Normalizer> mail(box);

  const Group group = group_of<kOwner>(group_blocks);
  const int lane = threadIdx.x % kWarp, warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp - kComm;
  const auto own = Rows<kShifted>::template of<kVec>(rows, cols, group.owner, group.owners);
  using F = Frame<kVec, kShifted>;
  const auto share_at = [&](int rank) { return share_of(F::vectors_of(cols), rank, group.blocks); };
  // Columns of a block; the first of a row's has the outer ones, in its communication warps.
  const auto columns_at = [&](int rank) { return share_at(rank).vectors * kVec + (rank == 0 ? F::outer_columns(cols) : 0); };
  const Share share = share_at(group.rank);
  // Columns of a warp's part of the share.
  const auto columns_of = [&](int w) {
    const int begin = min(w * kPer * kWarp, share.vectors), end = min(begin + kPer * kWarp, share.vectors);
    return (end - begin) * kVec;
  };

  if (threadIdx.x == 0) mail.init(warps);
  __syncthreads();
  sync_owner<kOwner>();

  if (warp >= warps) {
    const Acc inv_cols = inverse(cols);
    constexpr int kHeard = kOwner == Owner::Grid ? kMaxOthers : 1;
    constexpr int kPieces = kShifted ? 2 : 1;
    const bool has_outer = group.rank == 0 && lane < F::outer_columns(cols);
    const Acc inv_share = inverse(max(columns_at(group.rank), 1));
    Acc counts[kPieces], shares[kHeard];
    counts[0] = lane < warps ? Acc(columns_of(lane)) : Acc(0);
    if constexpr (kShifted) counts[1] = has_outer;
#pragma unroll
    for (int j = 0; j < kHeard; j++) {
      const int block = lane + j * kWarp;
      shares[j] = block < group.blocks ? Acc(columns_at(block)) : Acc(0);
    }
    const auto merge = [&](const Part (&heard)[kHeard]) {
      const Part all = merge_parts(heard, shares, inv_cols);
      return Pair{all.mean, all.m2};
    };
    // The lane's outer column: weight and bias, and x of the row ahead.
    Acc w = 0, b = 0, x_ahead = 0;
    // Of this warp's rows, the one ahead is on its way from L2, and the next kFar on their way to it.
    constexpr int kFar = kSlots / kPer / kComm + 2;
    auto row = own.at(0), ahead = row, far = row;
    const auto outer_of = [&](const auto& row) { return x + row * int64_t(cols) + F(cols, row).outer(lane); };
    const auto load_ahead = [&](int it) {
      x_ahead = load_vec<X, 1>(outer_of(ahead), has_outer && it < own.count)[0];
      ahead = own.next(ahead, kComm);
    };
    const auto prefetch = [&](int it) {
      prefetch_if(outer_of(far), has_outer && it < own.count);
      far = own.next(far, kComm);
    };
    if constexpr (kShifted) {
      ahead = own.next(ahead, warp - warps);
      far = ahead;
      load_ahead(warp - warps);
      for (int i = 0; i < kFar; i++) prefetch(warp - warps + i * kComm);
    }
    int column = -1;
#pragma unroll 1
    for (int it = 0; it < own.count; it++, row = own.next(row)) {
      if (it % kComm != warp - warps) continue;
      const F frame(cols, row);
      if constexpr (kShifted)
        if (frame.outer(lane) != column) {
          column = frame.outer(lane);
          w = weight_of(load_weight<1>(weight, column, weight_offset, has_outer)[0], weight_offset);
          b = load_param<1>(bias, column, 0, has_outer)[0];
        }
      const Acc value = x_ahead;
      if constexpr (kShifted) {
        load_ahead(it + kComm);
        prefetch(it + kFar * kComm);
      }
      if (kOwner == Owner::Grid && group.rank == 0 && it + kComm < own.count)
        prefetch_meeting<Part>(meetings, own.next(row, kComm), group.blocks);
      Part parts[kPieces] = {mail.collect(it, warps)};
      if constexpr (kShifted) parts[1] = remove_mean ? Part{value, 0, 0, 0} : Part{0, 0, value * value, 0};
      const Part block = merge_parts(parts, counts, inv_share);
      const Pair m = mail.template agree<kOwner>(it, group, block, meeting_of<Part>(meetings, row, group.blocks), merge);
      const Normalizer n = {m.a, rsqrt_acc(m.b * inv_cols + eps)};
      mail.deliver(it, n);
      if (group.rank == 0 && lane == 0) {
        if (mean) mean[row] = n.mean;
        if (rstd) rstd[row] = n.rstd;
      }
      if constexpr (kShifted)
        if (has_outer) y[row * int64_t(cols) + column] = X(n.xhat(value) * w + b);
    }
  } else {
    // This thread's vectors, and how far the share reaches beyond the first.
    const int first = warp * kPer * kWarp + lane, vector = share.begin + first, limit = share.vectors - first;
    const auto valid = [limit](int k) {
      int reach = limit;
      // Else the compiler keeps the answers for all k, in registers that giant rows, and unaligned ones of f32, do not have.
      if constexpr (kGiant || (kShifted && sizeof(X) == 4)) asm volatile("" : "+r"(reach));
      return k * kWarp < reach;
    };
    using C = Chunks<kVec, 1>;
    const uint32_t begin = C::start(shared, warp, kSlots), end = begin + kSlots * C::kChunk;
    const auto advance = [&](uint32_t& at) {
      at += C::kChunk;
      if (at == end) at = begin;
    };
    // Giant rows pass once and leave L2 to weight and bias.
    const uint64_t policy = kGiant ? evict_first() : evict_last();
    using B = Slots<kVec>;
    const uint32_t bias_begin = B::start(shared + warps * kSlots * C::kChunk, warp, kBiasSlots), bias_end = bias_begin + kBiasSlots * B::kChunk;
    const Param* const own_biases = bias + int64_t(vector) * kVec;
    const auto fill_bias = [&](int k, uint32_t at) {
      if (bias && valid(k)) B::fill(at, own_biases + k * kWarp * kVec);
    };
#pragma unroll 1
    for (int k = 0; k < kBiasSlots; k++) {
      if (!bias) B::clear(bias_begin + k * B::kChunk);
      fill_bias(k, bias_begin + k * B::kChunk);
    }

    typename C::Skew skew;
    const X* source = x;
    if constexpr (kSkewed) {
      skew = C::Skew::of(x, limit);
      source = skew.source(x);
    }
    // Reads a vector for the first time: its slot holds it from then on.
    const auto first_read = [&](uint32_t at, bool is_valid) {
      if constexpr (kSkewed) {
        const Vec<X, kVec> v = C::read(at, skew, is_valid);
        sync_slots();
        C::settle(at, skew, v);
        return v;
      } else {
        return C::read(at);
      }
    };
    const auto offset_of = [&](const F& frame, int64_t row) { return row * cols + frame.column(vector); };
    const bool by_l1 = kShifted || (!kGiant && C::template by_l1<kPer>(cols));
    // Of the next chunk to be copied.
    int next_it = 0;
    auto next_row = own.at(0);
    F next_frame(cols, next_row);
    const X* next = source + offset_of(next_frame, next_row);
    const auto fill = [&](int k, uint32_t at) {
      if constexpr (kSkewed) {
        if (next_it < own.count) C::fill(at, next + k * kWarp * kVec, skew, k, policy);
      } else if (next_it < own.count && valid(k)) {
        const X* const from = next + k * kWarp * kVec;
        C::fill(at, from, by_l1, policy);
      }
      copy_async_commit();
      if (k == kPer - 1) {
        next_it++;
        next_row = own.next(next_row);
        if (own.starts_kind(next_row)) next_frame = F(cols, next_row);
        next = source + offset_of(next_frame, next_row);
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

    OwnSums<kVec> sums;
    int columns = 0;
#pragma unroll
    for (int k = 0; k < kPer; k++)
      if (valid(k)) columns += kVec;
    const Acc own_count = columns, inv_own = inverse(max(columns, 1)), inv_warp = inverse(max(columns_of(warp), 1));
    uint32_t sum_at = begin, out_at = begin;
    const auto add_ahead = [&](int it, int k) {
      copy_async_wait<kSlots - kLead>();
      sync_slots();
      if (it < own.count) {
        if (!kGiant || valid(k)) sums.add(first_read(sum_at, valid(k)), k == 0, valid(k), remove_mean);
        else if (k == 0) sums = {};
        advance(sum_at);
        if (k == kPer - 1) mail.leave(it, warp, sums.merge(own_count, inv_own, inv_warp, remove_mean));
      }
    };
#pragma unroll 1
    for (int it = 0; it < kLead / kPer; it++)
#pragma unroll
      for (int k = 0; k < kPer; k++) add_ahead(it, k);
#pragma unroll
    for (int k = 0; k < kLead % kPer; k++) add_ahead(kLead / kPer, k);

    auto out_row = own.at(0);
    uint32_t bias_at = bias_begin;
    int it = 0;
#pragma unroll 1
    do {
      const F frame(cols, out_row);
      Vec<Param, kVec> w[kPer], b[kBiasSlots ? 1 : kPer];
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        w[k] = load_weight_of(frame, weight, vector + k * kWarp, weight_offset, valid(k));
        if constexpr (!kBiasSlots) b[k] = load_param_of(frame, bias, vector + k * kWarp, 0, valid(k));
      }
      const int stop = own.end_of_kind(it, out_row);
#pragma unroll 1
      for (; it < stop; it++, out_row = own.next(out_row)) {
        X* out = y + offset_of(frame, out_row);
        // Else the compiler adds k to the column and keeps kPer of them.
        if constexpr (kGiant) asm volatile("" : "+l"(out));
        const Normalizer n = mail.wait(it);
#pragma unroll
        for (int k = 0; k < kPer; k++) {
          const Vec<X, kVec> v = C::read(out_at);
          Vec<Param, kVec>& own_bias = b[kBiasSlots ? 0 : k];
          if constexpr (kBiasSlots) own_bias = B::read(bias_at);
          w[k].keep();
          own_bias.keep();
          Acc f[kVec];
#pragma unroll
          for (int i = 0; i < kVec; i++) f[i] = n.xhat(v[i]) * weight_of(w[k][i], weight_offset) + own_bias[i];
          if constexpr (kGiant) store<X, kVec>(out + k * kWarp * kVec, f, valid(k), policy);
          else store<X, kVec>(out + k * kWarp * kVec, f, valid(k));
          if constexpr (kBiasSlots) {
            fill_bias((k + kBiasSlots) % kPer, bias_at);
            bias_at += B::kChunk;
            if (bias_at == bias_end) bias_at = bias_begin;
          }
          // The slot's next chunk is kSlots further on.
          fill((k + kSlots) % kPer, out_at);
          advance(out_at);
          add_ahead(it + (k + kLead) / kPer, (k + kLead) % kPer);
        }
      }
    } while (kShifted && it < own.count);
    copy_async_wait<0>();
  }
  // No block leaves while another may send to it.
  sync_owner<kOwner>();
}

#define FORWARD_RING(name, per, slots, lead, owner, comm, giant, bias_slots, threads)                                  \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                             \
      forward_##name(FORWARD_ARGUMENTS, Acc* __restrict__ meetings /* [rows, 12 * group_blocks] */, int group_blocks) { \
    forward_ring<kWide, per, slots, lead, owner, comm, giant, bias_slots, kShifted>(FORWARD_PASS, meetings, group_blocks); \
  }
#ifdef LN_SHIFTED
constexpr bool kShifted = true;
// f32 weights beside half precision take registers.
constexpr int kCluster = LN_X_BYTES < LN_PARAM_BYTES ? 384 : LN_X_BYTES == 8 ? 512 : 544;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kGrid = LN_X_BYTES < LN_PARAM_BYTES ? 384 : LN_X_BYTES == 8 ? 512 : 640;
#else
constexpr int kGrid = LN_X_BYTES < LN_PARAM_BYTES ? 384 : 512;
#endif
#define NAME(owner) owner##_shifted
#else
constexpr bool kShifted = false;
constexpr int kCluster = 544, kGrid = 640;
#define NAME(owner) owner##_wide
#endif
#define RING(owner, per, slots, lead, type, comm, threads) RING_OF(NAME(owner), per, slots, lead, type, comm, threads)
#define RING_OF(name, per, slots, lead, type, comm, threads) FORWARD_RING(name, per, slots, lead, type, comm, false, 0, threads)

#ifndef LN_SHIFTED
#if LN_X_BYTES == 2 && LN_PARAM_BYTES == 2
FORWARD_RING(giant_wide, 12, 40, 28, Owner::Grid, 1, true, 0, 384)
#elif LN_X_BYTES == 2
FORWARD_RING(giant_wide, 12, 30, 26, Owner::Grid, 1, true, 5, 384)
#elif LN_X_BYTES == 4
FORWARD_RING(giant_wide, 23, 36, 33, Owner::Grid, 1, true, 4, 384)
#endif
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#ifdef LN_SHIFTED
// What the ring leaves of shared memory is L1's, through which unaligned rows pass: 20 slots are 2 to 4% slower.
RING(cluster, 4, 16, 8, Owner::Cluster, 1, kCluster)
#elif LN_X_BYTES != 4
RING(cluster, 4, 20, 8, Owner::Cluster, 1, kCluster)
#endif
// Registers for 12 vectors, and their weight and bias, a thread.
#if LN_X_BYTES == LN_PARAM_BYTES && LN_X_BYTES < 8 && !defined(LN_SHIFTED)
RING(long_cluster, 12, 36, 24, Owner::Cluster, 1, 384)
#endif
#endif
RING(grid, 4, 24, 18, Owner::Grid, 4, kGrid)
