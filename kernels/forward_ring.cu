// Forward for longer rows, which a cluster of blocks or a group of blocks of the grid holds in shared memory.
//
// Computes      as forward.cu.
// Algorithm     Persistent groups of blocks stride over the rows; ring.cuh says how a row's owners work together. weight and bias stay
//               in registers. A thread sums about its first value of a row, in one pass; warps, blocks and the group merge
//               their moments (Chan). Statistics run kLead chunks ahead of y.
// Bytes moved   2 * rows * cols * sizeof(X): x is read once.
// Launch        W warps that compute (to 16) and C that communicate, C = 1 for clusters and giant rows, else 4; shared:
//               (kSlots + kBiasSlots) * W * 32 * kVec * sizeof(X); cols <= blocks * W * 32 * kPer * kVec.
//               forward_block_shifted: grid of as many blocks as are resident.
//               forward_cluster_*: clusters of 2 to 16 blocks; sm_90.
//               forward_grid_*, forward_giant_*: cooperative, `group_blocks` (to 160) blocks a row, a grid of whole groups;
//               meetings: zeros, [rows, group_blocks + 32] pairs.
//               wide: all pointers on 16 bytes, cols a multiple of kVec. shifted: x and y on 16 bytes, and owners * cols a
//               multiple of kVec, or an owner for each row. mean, rstd, weight, bias may be null.
// Determinism   No atomics; every sum has one order.
// Source        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "ring.cuh"

#define FORWARD_ARGUMENTS                                                                                              \
  X *__restrict__ y /* [rows, cols] */, Acc *__restrict__ mean /* [rows] */, Acc *__restrict__ rstd /* [rows] */,       \
      const X *__restrict__ x /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                       \
      const Param *__restrict__ bias /* [cols] */, int64_t rows, int cols, Acc eps, int remove_mean

// kSlots chunks a warp in the ring; the statistics run kLead chunks ahead of y, across rows, so that nobody waits for them.
template <int kVec, int kPer, int kSlots, int kLead, Owner kOwner, int kComm, bool kGiant, bool kShifted>
__device__ __forceinline__ void forward_ring(FORWARD_ARGUMENTS, Pair* meetings, int group_blocks) {
  constexpr int kLag = (kLead + kPer - 1) / kPer, kSets = kLag <= 2 ? 4 : 8;
  static_assert(kSlots > kLead && kLead >= kPer && kSets >= kLag + 2, "sets and slots that cannot be overrun");
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ MailBox<kSets, Normalizer> box;
  const Mail<kSets, Normalizer> mail(box);

  const Group group = group_of<kOwner>(group_blocks);
  const int lane = threadIdx.x % kWarp, warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp - kComm;
  const int iterations = group.owner < rows ? int((rows - 1 - group.owner) / group.owners + 1) : 0;
  const auto row_at = [&](int it) { return group.owner + int64_t(it) * group.owners; };
  const Frame<kVec, kShifted> frame(cols, group.owner);
  const auto share_at = [&](int rank) { return share_of(frame.vectors, rank, group.blocks); };
  const auto columns_at = [&](int rank) { return frame.count(share_at(rank).begin, share_at(rank).begin + share_at(rank).vectors); };
  const Share share = share_at(group.rank);
  // Columns of a warp's part of the share.
  const auto columns_of = [&](int w) {
    const int begin = min(w * kPer * kWarp, share.vectors), end = min(begin + kPer * kWarp, share.vectors);
    return frame.count(share.begin + begin, share.begin + end);
  };

  if (threadIdx.x == 0) mail.init(warps);
  __syncthreads();
  sync_owner<kOwner>();

  if (warp >= warps) {
    const Acc inv_cols = inverse(cols);
    const Acc counts[1] = {lane < warps ? Acc(columns_of(lane)) : Acc(0)}, inv_share = inverse(max(columns_at(group.rank), 1));
    constexpr int kHeard = kOwner == Owner::Grid ? kMaxOthers : 1;
    Acc shares[kHeard];
#pragma unroll
    for (int j = 0; j < kHeard; j++) {
      const int block = lane + j * kWarp;
      shares[j] = block < group.blocks ? Acc(columns_at(block)) : Acc(0);
    }
    const auto merge = [&](const Pair (&heard)[kHeard]) {
      const Moments m = merge_moments(heard, shares, inv_cols);
      return Pair{m.mean, m.m2};
    };
#pragma unroll 1
    for (int it = warp - warps; it < iterations; it += kComm) {
      const Pair parts[1] = {mail.collect(it, warps)};
      const Moments own = merge_moments(parts, counts, inv_share);
      const Pair m = mail.template agree<kOwner>(it, group, Pair{own.mean, own.m2},
                                                 meetings + row_at(it) * meeting_pairs(group.blocks), merge);
      const Acc r = rsqrt_acc(m.b * inv_cols + eps);
      mail.deliver(it, Normalizer{m.a, r});
      if (group.rank == 0 && lane == 0) {
        if (mean) mean[row_at(it)] = m.a;
        if (rstd) rstd[row_at(it)] = r;
      }
    }
  } else {
    // This thread's vectors: of the share, and of the row.
    const int first = warp * kPer * kWarp + lane, vector = share.begin + first;
    const int limit = share.vectors - first;
    const auto valid = [&](int k) {
      int l = limit;
      // Else the compiler keeps the answers for all k, in registers that giant rows do not have.
      if constexpr (kGiant) asm volatile("" : "+r"(l));
      return k * kWarp < l;
    };
    using C = Chunks<kVec, 1>;
    const uint32_t begin = C::start(shared, warp, kSlots), end = begin + kSlots * C::kChunk;
    // Of giant rows in f32, bias passes through slots of its own: with weight, the registers are full.
    constexpr int kBiasSlots = kGiant && sizeof(Param) == 4 ? kSlots - kLead + 1 : 0;
    const uint32_t bias_begin = C::start(shared + warps * kSlots * C::kChunk, warp, kBiasSlots);
    const auto advance = [](uint32_t& at, uint32_t begin, uint32_t end) {
      at += C::kChunk;
      if (at == end) at = begin;
    };
    // x and y of giant rows pass once and leave L2 to bias.
    uint64_t once = 0, again = 0;
    if constexpr (kGiant) {
      once = evict_first();
      again = evict_last();
    }

    const int64_t step = int64_t(group.owners) * cols, start = int64_t(group.owner) * cols + frame.column(vector);
    // Of the next chunk to be copied.
    const X* next = x + start;
    int next_row = 0;
    const auto fill = [&](int k, uint32_t at) {
      if (next_row < iterations) {
        if constexpr (kGiant) {
          if (valid(k)) copy_async16(at, next + k * kWarp * kVec, once);
        } else if (frame.whole(vector + k * kWarp)) {
          C::fill(at, next + k * kWarp * kVec, valid(k));
        } else if constexpr (kShifted) {
          if (valid(k)) C::fill_before(at, next + k * kWarp * kVec, x + rows * cols - (next + k * kWarp * kVec));
        }
      }
      copy_async_commit();
      if (k == kPer - 1) {
        next += step;
        next_row++;
      }
    };
    const Param* const own_bias = bias + frame.column(vector);
    const auto fill_bias = [&](int k, uint32_t at) {
      if (bias && valid(k)) copy_async16(at, own_bias + k * kWarp * kVec, again);
    };
    if constexpr (kBiasSlots > 0)
      for (int k = 0; k < kBiasSlots; k++) {
        C::clear(bias_begin + k * C::kChunk);
        fill_bias(k, bias_begin + k * C::kChunk);
      }
    uint32_t at = begin;
#pragma unroll 1
    for (int k = 0; at < end; k = k == kPer - 1 ? 0 : k + 1) {
      fill(k, at);
      at += C::kChunk;
    }
    Vec<Param, kVec> w[kPer], b[kPer];
    int own_columns = 0;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int v = vector + k * kWarp;
      w[k] = load_param_of(frame, weight, v, 1, valid(k));
      if constexpr (kBiasSlots == 0) b[k] = load_param_of(frame, bias, v, 0, valid(k));
      if (valid(k)) own_columns += frame.count(v, v + 1);
    }

    // A thread sums about its first value of the row: in one pass, and exactly where mean >> std.
    const Acc own_count = own_columns, inv_own = inverse(max(own_columns, 1)), inv_warp = inverse(max(columns_of(warp), 1));
    Acc center = 0;
    Pair sums = {0, 0};
    uint32_t sum_at = begin, out_at = begin, bias_at = bias_begin;
    const auto add = [&](int k) {
      const Vec<X, kVec> v = C::read(sum_at);
      const int c = frame.column(vector + k * kWarp);
      if (k == 0 && remove_mean) {
        center = v[0];
        // The first that is the row's own.
        if constexpr (kShifted)
#pragma unroll
          for (int i = 1; i < kVec; i++)
            if (c + i == 0) center = v[i];
      }
      if (!remove_mean) center = 0;
      if (kShifted && valid(k) && !frame.whole(vector + k * kWarp)) {
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          const Acc d = frame.holds(c + i) ? v[i] - center : Acc(0);
          sums.a += d;
          sums.b += d * d;
        }
      } else if ((!kGiant && !kShifted) || valid(k)) {
        // A slot of giant rows may hold another chunk's values where this one has none; else it holds zeros.
        const Acc from = valid(k) ? center : Acc(0);
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          const Acc d = v[i] - from;
          sums.a += d;
          sums.b += d * d;
        }
      }
      advance(sum_at, begin, end);
    };
    const auto leave = [&](int it) {
      const Acc warp_center = __shfl_sync(kFull, center, 0);
      const Pair own = about_center(sums, inv_own, remove_mean), pieces[1] = {{center - warp_center + own.a, own.b}};
      const Acc counts[1] = {own_count};
      const Moments all = merge_moments(warp_center, pieces, counts, inv_warp);
      mail.leave(it, warp, lane < kWarp / 2 ? all.mean : all.m2);
      sums = {0, 0};
    };
    const auto add_ahead = [&](int it, int k) {
      copy_async_wait<kSlots - kLead>();
      if (it < iterations) {
        add(k);
        if (k == kPer - 1) leave(it);
      }
    };
#pragma unroll 1
    for (int it = 0; it < kLead / kPer; it++)
#pragma unroll
      for (int k = 0; k < kPer; k++) add_ahead(it, k);
#pragma unroll
    for (int k = 0; k < kLead % kPer; k++) add_ahead(kLead / kPer, k);

    X* out = y + start;
#pragma unroll 1
    for (int it = 0; it < iterations; it++) {
      const Normalizer n = mail.wait(it);
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        const Vec<X, kVec> v = C::read(out_at);
        w[k].keep();
        Vec<Param, kVec> bias_k;
        if constexpr (kBiasSlots > 0) {
          bias_k = load_shared<Vec<Param, kVec>>(bias_at);
          fill_bias((k + kBiasSlots) % kPer, bias_at);
          advance(bias_at, bias_begin, bias_begin + kBiasSlots * C::kChunk);
        } else {
          b[k].keep();
          bias_k = b[k];
        }
        Acc f[kVec];
#pragma unroll
        for (int i = 0; i < kVec; i++) f[i] = n.xhat(v[i]) * w[k][i] + bias_k[i];
        if constexpr (kGiant) store<X, kVec>(out + k * kWarp * kVec, f, valid(k), once);
        else store_of(frame, out + k * kWarp * kVec, f, vector + k * kWarp, valid(k));
        // The slot's next chunk is kSlots further on.
        fill((k + kSlots) % kPer, out_at);
        advance(out_at, begin, end);
        add_ahead(it + (k + kLead) / kPer, (k + kLead) % kPer);
      }
      out += step;
    }
    copy_async_wait<0>();
  }
  // No block leaves while another may send to it.
  sync_owner<kOwner>();
}

#define FORWARD_RING(name, per, slots, lead, owner, comm, giant, threads)                                              \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                             \
      forward_##name(FORWARD_ARGUMENTS, Pair* __restrict__ meetings /* [rows, group_blocks + 32] */, int group_blocks) { \
    forward_ring<kWide, per, slots, lead, owner, comm, giant, kShifted>(y, mean, rstd, x, weight, bias, rows, cols, eps, \
                                                                        remove_mean, meetings, group_blocks);          \
  }
#ifdef LN_SHIFTED
constexpr bool kShifted = true;
// The first and last vectors of a row take registers.
constexpr int kOne = 512, kGrid = 512;
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
