// Backward for longer rows: a team of a block's warps, a cluster of blocks, or a group of blocks of the grid owns a row.
//
// Computes      as backward.cu.
// Algorithm     Persistent owners stride over the rows; ring.cuh says how they work together. A thread owns the same kPer vectors of
//               every row: weight and the sums for dweight and dbias stay in its registers. dx of a row is written kLag rows
//               after its sums, so that nobody waits for a reduction. finalize.cu adds up the owners' partial dweight and
//               dbias; a block has added up its teams'.
// Bytes moved   3 * rows * cols * sizeof(X), and 16 * parts * cols for the partials, written and read (in f32).
// Launch        T teams of W warps that compute and C that communicate, C = 1 or, in a grid, 4 (wide) or 2; T * W <= 16. shared:
//               max(kRing * 2 * T * W * 32 * kPer * kVec * sizeof(X), T > 1 ? T * cols * sizeof(Acc) : 0);
//               cols <= blocks * W * 32 * kPer * kVec.
//               backward_block_*: T >= 1 teams, partials [blocks, cols].
//               backward_cluster_*: clusters of 2 to 16 blocks, T = 1, partials [clusters, cols]; sm_90.
//               backward_grid_*: cooperative, T = 1, `group_blocks` (to 160) blocks a row, a grid of whole groups, partials
//               [groups, cols]; meetings: zeros, [rows, group_blocks + 32] pairs.
//               wide: all pointers on 16 bytes, cols a multiple of kVec. shifted: x, dy and dx on 16 bytes, and owners (of all
//               teams) * cols a multiple of kVec, or an owner for each row. dx, dweight_part, dbias_part, weight, mean may
//               be null.
// Determinism   No atomics; every sum has one order, that of lanes, warps, blocks, owners.
// Source        Ba et al., arXiv:1607.06450, differentiated by hand.
#include "ring.cuh"

#define BACKWARD_ARGUMENTS                                                                                             \
  X *__restrict__ dx /* [rows, cols] */, Acc *__restrict__ dweight_part /* [owners, cols] */,                          \
      Acc *__restrict__ dbias_part /* [owners, cols] */, const X *__restrict__ x /* [rows, cols] */,                   \
      const X *__restrict__ dy /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                      \
      const Acc *__restrict__ mean /* [rows] */, const Acc *__restrict__ rstd /* [rows] */, int64_t rows, int cols,    \
      int remove_mean

template <int kVec, int kPer, int kRing, int kLag, Owner kOwner, int kComm, bool kShifted>
__device__ __forceinline__ void backward_ring(BACKWARD_ARGUMENTS, Pair* meetings, int group_blocks, int teams) {
  constexpr int kSets = kLag <= 2 ? 4 : 8;
  static_assert(kSets >= kLag + 2 && kRing > kLag, "sets and ring rows that cannot be overrun");
  constexpr int kMaxTeams = kOwner == Owner::Block ? 8 : 1;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ MailBox<kSets, Scales> boxes[kMaxTeams];

  // A row's owner is a team of a block's warps, one of `teams`, or one or more blocks. All lanes know the same.
  const int lane = threadIdx.x % kWarp, block_warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0);
  const int team_warps = blockDim.x / kWarp / teams, warps = team_warps - kComm;
  const int team = block_warp / team_warps, warp = block_warp % team_warps;
  const Mail<kSets, Scales> mail(boxes[team]);
  Group group = group_of<kOwner>(group_blocks);
  if constexpr (kOwner == Owner::Block) {
    group.owner = group.owner * teams + team;
    group.owners *= teams;
  }
  const int iterations = group.owner < rows ? int((rows - 1 - group.owner) / group.owners + 1) : 0;
  const auto row_at = [&](int it) { return group.owner + int64_t(it) * group.owners; };
  if (warp == 0 && lane == 0) mail.init(warps);
  __syncthreads();
  sync_owner<kOwner>();

  if (warp >= warps) {
    const Acc inv_cols = inverse(cols);
    Statistics<kComm> statistics;
    statistics.load(mean, rstd, group, rows, 0);
#pragma unroll 1
    for (int it = warp - warps; it < iterations; it += kComm) {
      const Normalizer row = statistics.at(mean, rstd, group, rows, it);
      const Pair own = warp_sum(mail.collect(it, warps));
      const auto sum = [](const auto& heard) {
        Pair p = {0, 0};
        for (const Pair& h : heard) p = p + h;
        return warp_sum(p);
      };
      const Pair sums = mail.template agree<kOwner>(it, group, own, meetings + row_at(it) * meeting_pairs(group.blocks), sum);
      mail.deliver(it, Scales::of(sums, row, inv_cols, remove_mean));
    }
  } else {
    const Frame<kVec, kShifted> frame(cols, group.owner);
    const Share share = share_of(frame.vectors, group.rank, group.blocks);
    // This thread's vectors: of the share, and of the row.
    const int first = warp * kPer * kWarp + lane, vector = share.begin + first;
    bool valid[kPer];
    Columns<kVec, kPer> own;
    using C = Chunks<kVec, 2>;
    const uint32_t begin = C::start(shared, team * warps + warp, kRing * kPer), end = begin + kRing * kPer * C::kChunk;
    const auto advance = [&](uint32_t& at) {
      at += kPer * C::kChunk;
      if (at == end) at = begin;
    };
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      valid[k] = first + k * kWarp < share.vectors;
      own.start(k, load_param_of(frame, weight, vector + k * kWarp, 1, valid[k]));
      if (!valid[k])
        for (uint32_t at = begin + k * C::kChunk; at < end; at += kPer * C::kChunk) {
          C::clear(at);
          C::clear(at + C::kTensor);
        }
    }
    // Of this thread's first vector in the next row to be copied; dx is written kRing rows behind.
    const int64_t step = int64_t(group.owners) * cols;
    int64_t next = int64_t(group.owner) * cols + frame.column(vector);
    Statistics<1> statistics;
    statistics.load(mean, rstd, group, rows, 0);
    const auto fill = [&](int it, uint32_t at) {
      if (it < iterations) {
#pragma unroll
        for (int k = 0; k < kPer; k++)
          if (valid[k]) {
            if (frame.whole(vector + k * kWarp)) {
              C::fill(at + k * C::kChunk, x + next + k * kWarp * kVec);
              C::fill(at + k * C::kChunk + C::kTensor, dy + next + k * kWarp * kVec);
            } else if constexpr (kShifted) {
              const int64_t from = next + k * kWarp * kVec;
              C::fill_before(at + k * C::kChunk, x + from, rows * cols - from);
              C::fill_before(at + k * C::kChunk + C::kTensor, dy + from, rows * cols - from);
            }
          }
      }
      next += step;
      copy_async_commit();
    };
    for (int r = 0; r < kRing; r++) fill(r, begin + r * kPer * C::kChunk);

    uint32_t sum_at = begin, dx_at = begin;
    const auto add_row = [&](int it) {
      copy_async_wait<kRing - kLag - 1>();
      const Normalizer row = statistics.at(mean, rstd, group, rows, it);
      Pair sums = {0, 0};
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        Vec<X, kVec> xs = C::read(sum_at + k * C::kChunk), dys = C::read(sum_at + k * C::kChunk + C::kTensor);
        // What a vector holds of other rows must not reach this row's sums, not even a NaN.
        if (kShifted && valid[k] && !frame.whole(vector + k * kWarp)) {
          xs = masked(frame, xs, vector + k * kWarp);
          dys = masked(frame, dys, vector + k * kWarp);
        }
        own.add(k, xs, dys, row, sums);
      }
      advance(sum_at);
      mail.leave(it, warp, warp_sum_by_halves(sums));
    };
    const auto write_dx = [&](int it) {
      const Scales s = mail.wait(it);
      const int64_t out = next - kRing * step;
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        Acc f[kVec];
        own.gradient(k, C::read(dx_at + k * C::kChunk), C::read(dx_at + k * C::kChunk + C::kTensor), s, f);
        store_of(frame, dx + out + k * kWarp * kVec, f, vector + k * kWarp, dx && valid[k]);
      }
      fill(it + kRing, dx_at);
      advance(dx_at);
    };
    int it = 0;
#pragma unroll 1
    for (; it < min(kLag, iterations); it++) add_row(it);
#pragma unroll 1
    for (; it < iterations; it++) {
      add_row(it);
      write_dx(it - kLag);
    }
#pragma unroll 1
    for (it = max(0, iterations - kLag); it < iterations; it++) write_dx(it);
    copy_async_wait<0>();

    const int64_t part = int64_t(kOwner == Owner::Block ? int(blockIdx.x) : group.owner) * cols;
#pragma unroll
    for (int tensor = 0; tensor < 2; tensor++) {
      Acc* const out = tensor ? dbias_part : dweight_part;
      if (!out) continue;
      if (teams == 1) {
#pragma unroll
        for (int k = 0; k < kPer; k++)
          if (valid[k]) store_columns(frame, out + part, vector + k * kWarp, tensor ? own.dbias[k] : own.dweight[k]);
        continue;
      }
      // The teams' sums in order, through shared memory that the ring no longer needs.
      Acc* const sums = reinterpret_cast<Acc*>(shared);
      compute_sync(teams * warps);
#pragma unroll
      for (int k = 0; k < kPer; k++)
        if (valid[k]) store_columns(frame, sums + team * cols, vector + k * kWarp, tensor ? own.dbias[k] : own.dweight[k]);
      compute_sync(teams * warps);
      add_owners<kShifted ? 1 : kVec>(out + part, sums, teams, cols, (team * warps + warp) * kWarp + lane, teams * warps * kWarp);
    }
  }
  // No block leaves while another may send to it.
  sync_owner<kOwner>();
}

#define BACKWARD_RING(name, per, ring, lag, owner, comm, threads)                                                      \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                             \
      backward_##name(BACKWARD_ARGUMENTS, Pair* __restrict__ meetings /* [rows, group_blocks + 32] */, int group_blocks, \
                      int teams) {                                                                                     \
    backward_ring<kWide, per, ring, lag, owner, comm, kShifted>(dx, dweight_part, dbias_part, x, dy, weight, mean, rstd, \
                                                                rows, cols, remove_mean, meetings, group_blocks, teams); \
  }
#ifdef LN_SHIFTED
constexpr bool kShifted = true;
// The first and last vectors of a row take registers.
constexpr int kBlock = LN_X_BYTES == 4 ? 512 : 384, kCluster = kBlock, kGrid = kBlock;
#define NAME(owner) owner##_shifted
#else
constexpr bool kShifted = false;
constexpr int kBlock = LN_X_BYTES == 8 ? 416 : 640, kCluster = LN_X_BYTES == 8 ? 416 : 544, kGrid = LN_X_BYTES == 8 ? 384 : 640;
#define NAME(owner) owner##_wide
#endif
#define RING(owner, per, ring, lag, type, comm, threads) RING_OF(NAME(owner), per, ring, lag, type, comm, threads)
#define RING_OF(name, per, ring, lag, type, comm, threads) BACKWARD_RING(name, per, ring, lag, type, comm, threads)

#if LN_X_BYTES == 2
RING(block, 2, 3, 1, Owner::Block, 1, kBlock)
RING(grid, 2, 6, 4, Owner::Grid, 4, kGrid)
#elif LN_X_BYTES == 4
RING(block, 2, 4, 2, Owner::Block, 1, kBlock)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
RING(grid, 4, 3, 2, Owner::Grid, 4, kGrid)
#else
// Shared memory holds no more warps there.
RING(grid, 4, 3, 2, Owner::Grid, 4, 384)
#endif
#else
RING(block, 4, 3, 1, Owner::Block, 1, kBlock)
RING(grid, 4, 3, 2, Owner::Grid, 4, kGrid)
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#if LN_X_BYTES == 8
RING(cluster, 4, 3, 1, Owner::Cluster, 1, kCluster)
#else
RING(cluster, 2, 6, 2, Owner::Cluster, 1, kCluster)
#endif
#endif
