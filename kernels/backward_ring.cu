// Backward for longer rows: a team of a block's warps, a cluster of blocks, or a group of blocks of the grid owns a row.
//
// Computes      as backward.cu.
// Algorithm     Persistent owners stride over the rows; ring.cuh says how they work together. A thread owns the same kPer vectors of
//               every row: weight and the sums for dweight and dbias stay in its registers. dx of a row is written kLag rows
//               after its sums, so that nobody waits for a reduction; in groups of the grid half a row's after half a row's sums.
//               finalize.cu adds up the owners' partial dweight and dbias; a block has added up its teams'. Where rows do not all
//               start alike, sums move with the columns (`move_sums`).
// Bytes moved   3 * rows * cols * sizeof(X), and 16 * owners * cols for the partials, written and read (in f32).
// Launch        T teams of W warps that compute and C that communicate, C = 1 or, in a grid, 4; T * W <= 16. shared:
//               max(kRing * 2 * T * W * 32 * kPer * kVec * sizeof(X), T > 1 ? 2 * T * part_step(cols) * sizeof(Acc) : 0),
//               with LN_SKEWED of the ring kRing * 2 * T * W * kPer * 16 more;
//               cols <= blocks * W * 32 * kPer * kVec.
//               backward_block_*, backward_long_block_*: T >= 1 teams, partials [blocks, cols].
//               backward_cluster_*, backward_long_cluster_*: clusters of 2 to 16 blocks, T = 1, partials [clusters, cols]; sm_90.
//               backward_grid_*: cooperative, T = 1, `group_blocks` (to 160) blocks a row, a grid of whole groups, partials
//               [groups, cols]; meetings: [rows, 10 * group_blocks], zeros before and after.
//               wide: all pointers on 16 bytes, cols a multiple of kVec. shifted: x, dy and dx on 16 bytes, compiled with
//               LN_SKEWED dx alone. For blocks, owners (of all teams) * cols is a multiple of kVec, or there is an owner for each row.
//               For clusters and groups, each row of partials has `Edges` behind it, unless there is but one row of x.
//               dx, dweight_part, dbias_part, weight, mean may be null.
// Determinism   No atomics; every sum has one order, that of lanes, warps, blocks, owners.
// Source        Ba et al., arXiv:1607.06450, differentiated by hand.
#include "ring.cuh"

template <int kLag> constexpr int kSetsFor = kLag <= 2 ? 4 : 8;
template <Owner kOwner> constexpr int kMaxTeams = kOwner == Owner::Block ? 8 : 1;
#ifdef LN_ADD
constexpr bool kAdds = true;
#else
constexpr bool kAdds = false;
#endif

// kPlain: a weight that is not centred at 0.
template <int kVec, int kPer, int kRing, int kLag, Owner kOwner, int kComm, bool kShifted, bool kPlain>
__device__ __forceinline__ void backward_ring(BACKWARD_TAKES, Acc* meetings, int group_blocks, int teams,
                                              MailBox<kSetsFor<kLag>, Pair, Scales> (&boxes)[kMaxTeams<kOwner>]) {
  constexpr int kSets = kSetsFor<kLag>;
  static_assert(kSets >= kLag + 2 && kRing > kLag, "sets and ring rows that cannot be overrun");
  // Parts of a row that are copied, summed and written one by one: the next is on its way while one is summed. Clusters, teams and unaligned
  // halves are slower so.
  constexpr int kParts = kOwner == Owner::Grid && !(kShifted && sizeof(X) == 2) ? 2 : 1, kEach = kPer / kParts;
  static_assert(kPer % kParts == 0 && (!kAdds || kParts == 1), "equal parts, and loops of their own");
  extern __shared__ __align__(16) unsigned char shared[];
  const auto offset = known_offset<kPlain>(weight_offset);

  // Blocks that wait for each other in global memory share the device with nothing.
  if constexpr (kOwner != Owner::Grid) launch_next();
  // A row's owner is a team of a block's warps, one of `teams`, or one or more blocks. All lanes know the same.
  const int lane = threadIdx.x % kWarp, block_warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0);
  const int team_warps = blockDim.x / kWarp / teams, warps = team_warps - kComm;
  const int team = block_warp / team_warps, warp = block_warp % team_warps;
  const Mail<kSets, Pair, Scales> mail(boxes[team]);
  Group group = group_of<kOwner>(group_blocks);
  if constexpr (kOwner == Owner::Block) {
    group.owner = group.owner * teams + team;
    group.owners *= teams;
  }
  // Teams keep to rows of one shift: there are owners enough.
  constexpr bool kSorted = kShifted && kOwner != Owner::Block;
  const auto own_rows = Rows<kSorted>::template of<kVec>(rows, cols, group.owner, group.owners);
  if (warp == 0 && lane == 0) mail.init(warps);
  __syncthreads();
  sync_owner<kOwner>();

  using F = Frame<kVec, kShifted>;
  const auto first_row = own_rows.at(0);
  const F first_frame(cols, first_row);
  const Edges edges = Edges::of(cols);
  const bool has_edges = kSorted && rows > 1 && own_rows.turn;
  // Partial sums of a block, or of an owner.
  const int step = part_step(cols);
  const int64_t part = (kOwner == Owner::Block ? int64_t(blockIdx.x) : group.owner) * (step + (has_edges ? edges.count() : 0));

  const Share share = share_of(first_frame.vectors, group.rank, group.blocks);
  // A compute thread's vectors.
  const int vector = share.begin + warp * kPer * kWarp + lane, end_vector = share.begin + share.vectors;
  // The sums of a compute thread's columns, and of a communication thread's.
  Columns<kVec, kPer> own;
  OuterColumns<kVec, kShifted> outer;
  if (warp >= warps) {
    const int own_warp = warp - warps;
    const Acc inv_cols = inverse(cols);
    Statistics<kComm, false> statistics;
    statistics.load(mean, rstd, own_rows, 0);
    // The first of a row's blocks has its outer columns.
    const bool has_outer = group.rank == 0 && lane < F::outer_columns(cols);
    // Of this warp's rows, the one ahead is on its way from L2, and the next kFar on their way to it.
    constexpr int kFar = kRing / kComm + 2;
    auto place = first_row, ahead = first_row, far = first_row;
    const auto load_ahead = [&](int it) {
      if (it < own_rows.count) outer.load(F(cols, ahead), has_outer, x, dy, ahead * int64_t(cols));
      ahead = own_rows.next(ahead, kComm);
    };
    const auto prefetch = [&](int it) {
      if (it < own_rows.count) outer.prefetch(F(cols, far), has_outer, x, dy, far * int64_t(cols));
      far = own_rows.next(far, kComm);
    };
    if constexpr (kShifted) {
      ahead = own_rows.next(ahead, own_warp);
      far = ahead;
      load_ahead(own_warp);
#pragma unroll 1
      for (int i = 0; i < kFar; i++) prefetch(own_warp + i * kComm);
    }
    outer.start(first_frame, has_outer, weight, weight_offset);
    int it = 0;
#pragma unroll 1
    do {
      if constexpr (kSorted) outer.go_on(F(cols, place), weight, weight_offset);
      const int stop = own_rows.end_of_kind(it, place);
#pragma unroll 1
      for (; it < stop; it++, place = own_rows.next(place)) {
        if (it % kComm != own_warp) continue;
        const Normalizer row = statistics.at(mean, rstd, own_rows, it);
        Pair outer_sums = {0, 0};
        outer.add(row.of_padded(), weight_offset, outer_sums);
        if constexpr (kShifted) {
          load_ahead(it + kComm);
          prefetch(it + kFar * kComm);
        }
        if (kOwner == Owner::Grid && group.rank == 0 && it + kComm < own_rows.count)
          prefetch_meeting<Pair>(meetings, own_rows.next(place, kComm), group.blocks);
        const Pair own = warp_sum(mail.collect(it, warps) + outer_sums);
        const auto sum = [](const auto& heard) {
          Pair p = {0, 0};
          for (const Pair& h : heard) p = p + h;
          return warp_sum(p);
        };
        const Pair sums = mail.template agree<kOwner>(it, group, own, meeting_of<Pair>(meetings, place, group.blocks), sum);
        const Scales s = Scales::of(sums, row, inv_cols, remove_mean);
        mail.deliver(it, s);
        outer.store_dx(dx, place * int64_t(cols), s, weight_offset);
      }
    } while (kSorted && it < own_rows.count);
    if constexpr (kShifted) outer.template add_up<kComm>(own_warp);
    if (own_warp == 0 && teams == 1) {
#pragma unroll
      for (int tensor = 0; tensor < 2; tensor++) {
        Acc* const out = tensor ? dbias_part : dweight_part;
        if (!out) continue;
        outer.store_sums(out + part, tensor);
        if (has_edges && group.rank == 0) outer.store_left(out + part + step, edges, tensor);
      }
    }
  } else {
    bool valid[kPer];
#pragma unroll
    for (int k = 0; k < kPer; k++) valid[k] = vector + k * kWarp < end_vector;
    using C = Chunks<kVec, 2>;
    const uint32_t begin = C::start(shared, team * warps + warp, kRing * kPer), end = begin + kRing * kPer * C::kChunk;
    const auto advance = [&](uint32_t& at) {
      at += kPer * C::kChunk;
      if (at == end) at = begin;
    };
    if constexpr (!kShifted || kSkewed)
#pragma unroll
      for (int k = 0; k < kPer; k++)
        if (!valid[k])
          for (uint32_t at = begin + k * C::kChunk; at < end; at += kPer * C::kChunk) {
            C::clear(at);
            C::clear(at + C::kTensor);
          }
    sync_slots();
    typename C::Skew x_skew, dy_skew;
    const X *x_source = x, *dy_source = dy;
    if constexpr (kSkewed) {
      x_skew = C::Skew::of(x, end_vector - vector), dy_skew = C::Skew::of(dy, end_vector - vector);
      x_source = x_skew.source(x), dy_source = dy_skew.source(dy);
    }
    const auto offset_of = [&](const F& frame, int64_t row) { return row * cols + frame.column(vector); };
    auto next = first_row;
    F next_frame = first_frame;
    Statistics<1, true> statistics;
    statistics.load(mean, rstd, own_rows, 0);
    const uint64_t policy = evict_last();
    // Halves, and f32 in groups, are 1 to 4% faster through L1 even where rows start on sectors; f32 in clusters is to 7% slower, with 6 vectors a
    // thread 12%.
    const bool by_l1 = kShifted || sizeof(X) == 2 || (sizeof(X) == 4 && kOwner == Owner::Grid) || C::template by_l1<kPer>(cols);
    // A part of a row: its copies are a group, and its slots are filled again once its dx is written.
    const auto fill = [&](int it, uint32_t at, int part) {
      if (it < own_rows.count) {
        if (part == 0 && own_rows.starts_kind(next)) next_frame = F(cols, next);
        const int64_t from = offset_of(next_frame, next);
#pragma unroll
        for (int k = part * kEach; k < (part + 1) * kEach; k++) {
          const uint32_t xs = at + k * C::kChunk, dys = xs + C::kTensor;
          if constexpr (kSkewed) {
            C::fill(xs, x_source + from + k * kWarp * kVec, x_skew, k, policy);
            C::fill(dys, dy_source + from + k * kWarp * kVec, dy_skew, k, policy);
          } else if constexpr (kShifted) {
            C::fill(xs, x + from + k * kWarp * kVec, valid[k], by_l1, policy);
            C::fill(dys, dy + from + k * kWarp * kVec, valid[k], by_l1, policy);
          } else if (valid[k]) {
            C::fill(xs, x + from + k * kWarp * kVec, by_l1, policy);
            C::fill(dys, dy + from + k * kWarp * kVec, by_l1, policy);
          }
        }
      }
      if (part == kParts - 1) next = own_rows.next(next);
      copy_async_commit();
    };
#pragma unroll(kAdds ? kRing : 1)
    for (int r = 0; r < kRing; r++)
#pragma unroll
      for (int part = 0; part < kParts; part++) fill(r, begin + r * kPer * C::kChunk, part);

    uint32_t sum_at = begin, dx_at = begin;
    Pair sums;
    Normalizer summed;
    const auto add_part = [&](int it, int part) {
      copy_async_wait<(kRing - kLag) * kParts - 1>();
      sync_slots();
      if (part == 0) {
        summed = statistics.at(mean, rstd, own_rows, it);
        sums = {0, 0};
      }
#pragma unroll
      for (int k = part * kEach; k < (part + 1) * kEach; k++) {
        const uint32_t xs = sum_at + k * C::kChunk, dys = xs + C::kTensor;
        if constexpr (kSkewed) {
          const Vec<X, kVec> x_part = C::read(xs, x_skew, valid[k]), dy_part = C::read(dys, dy_skew, valid[k]);
          sync_slots();
          C::settle(xs, x_skew, x_part);
          C::settle(dys, dy_skew, dy_part);
          own.add(k, x_part, dy_part, summed, offset, sums);
        } else {
          own.add(k, C::read(xs), C::read(dys), summed, offset, sums);
        }
      }
      if (part < kParts - 1) return;
      advance(sum_at);
      mail.leave(it, warp, warp_sum_by_halves(sums));
    };
    // Of the row whose dx is written next.
    auto dx_row = first_row;
    F dx_frame = first_frame;
    const auto dx_offset = [&]() { return offset_of(dx_frame, kSorted ? dx_row : next - kRing * own_rows.step); };
    // Loaded while another is summed.
    Arriving<kVec, kPer> arriving;
    const auto load_arriving = [&]() {
#pragma unroll
      for (int k = 0; k < kPer; k++) arriving.load(added, k, dx_offset() + k * kWarp * kVec, valid[k]);
    };
    const auto weights_in = [&](const F& frame, int k) { return load_weight_of(frame, weight, vector + k * kWarp, weight_offset, valid[k]); };
    Scales scales;
    // The weight at hand is that of the row that is summed: of a row that starts otherwise, it is loaded.
    const auto write_part = [&](int it, bool other_kind, int part) {
      if (part == 0) scales = mail.wait(it);
      const int64_t out = dx_offset();
#pragma unroll
      for (int k = part * kEach; k < (part + 1) * kEach; k++) {
        const Vec<X, kVec> xs = C::read(dx_at + k * C::kChunk), dys = C::read(dx_at + k * C::kChunk + C::kTensor);
        Acc f[kVec];
        if (kSorted && other_kind)
          own.gradient_of(weights_in(dx_frame, k), xs, dys, scales, offset, f);
        else own.gradient(k, xs, dys, scales, offset, f);
        arriving.finish(added, k, f, out + k * kWarp * kVec, valid[k]);
        store<X, kVec>(dx + out + k * kWarp * kVec, f, dx && valid[k]);
      }
      if constexpr (kSorted) {
        if (part == kParts - 1) {
          dx_row = own_rows.next(dx_row);
          if (own_rows.starts_kind(dx_row)) dx_frame = F(cols, dx_row);
        }
      }
      fill(it + kRing, dx_at, part);
      if (part == kParts - 1) advance(dx_at);
    };
    // Of the warp's chunks: worked out where it is needed, or it takes registers that the loop over rows lacks.
    const auto edges_at = [&]() {
      int of_warp = vector;
      asm volatile("" : "+r"(of_warp));
      return part + step + of_warp / kWarp * kVec;
    };
    const int chunks = min(kPer, (end_vector - vector + lane + kWarp - 1) / kWarp);
    if (has_edges && lane < kVec)
#pragma unroll 1
      for (int at = lane; at < chunks * kVec; at += kVec) {
        if (dweight_part) dweight_part[edges_at() + at] = 0;
        if (dbias_part) dbias_part[edges_at() + at] = 0;
      }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kPer; k++) own.start(k, {});
    int it = 0;
    // Of the rows that are summed.
    auto sum_row = first_row;
    F frame = first_frame;
#pragma unroll 1
    do {
#pragma unroll
      for (int k = 0; k < kPer; k++) own.weight[k] = weights_in(frame, k);
      const int start = it, stop = own_rows.end_of_kind(it, sum_row);
      if constexpr (kAdds) {
        // Where dsum is loaded ahead of a row, a loop for each: in the first the weights arrive, which one for all would wait for time and again,
        // and for dsum with them.
#pragma unroll 1
        for (; it < min(start + kLag, stop); it++) add_part(it, 0);
#pragma unroll 1
        for (; it < stop; it++) {
          load_arriving();
          add_part(it, 0);
          write_part(it - kLag, false, 0);
        }
#pragma unroll 1
        for (int late = max(0, it - kLag); late < it; late++) {
          load_arriving();
          write_part(late, false, 0);
        }
      } else {
        // One loop for rows that are summed alone, summed while another's dx is written, and written alone: code comes from memory too.
        const int end = stop < own_rows.count ? stop : stop + kLag;
#pragma unroll 1
        for (; it < end; it++) {
#pragma unroll
          for (int part = 0; part < kParts; part++) {
            if (it < stop) add_part(it, part);
            if (it >= kLag) write_part(it - kLag, it - kLag < start, part);
          }
        }
      }
      if constexpr (kSorted) {
        if (it < own_rows.count) {
          sum_row = own_rows.at(it);
          const F before = frame;
          frame = F(cols, sum_row);
          const int by = frame.head - before.head;
          move_sums(own.dweight, before.head, by, valid, dweight_part ? dweight_part + edges_at() : nullptr);
          move_sums(own.dbias, before.head, by, valid, dbias_part ? dbias_part + edges_at() : nullptr);
        }
      }
    } while (kSorted && it < own_rows.count);
    if (teams == 1) {
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        if (dweight_part) store_columns(frame, dweight_part + part, vector + k * kWarp, own.dweight[k], end_vector);
        if (dbias_part) store_columns(frame, dbias_part + part, vector + k * kWarp, own.dbias[k], end_vector);
      }
    }
    copy_async_wait<0>();
  }
  if constexpr (kOwner == Owner::Block) {
    if (teams > 1) {
      // The teams' sums in order, through shared memory that the ring no longer needs: those of dweight, then those of dbias.
      Acc* const sums = reinterpret_cast<Acc*>(shared);
      block_sync();
#pragma unroll
      for (int tensor = 0; tensor < 2; tensor++) {
        Acc* const to = sums + (tensor * teams + team) * step;
        if (warp >= warps) {
          outer.store_sums(to, tensor);
        } else {
#pragma unroll
          for (int k = 0; k < kPer; k++) store_columns(first_frame, to, vector + k * kWarp, tensor ? own.dbias[k] : own.dweight[k], end_vector);
        }
      }
      block_sync();
#pragma unroll
      for (int tensor = 0; tensor < 2; tensor++) {
        Acc* const out = tensor ? dbias_part : dweight_part;
        if (out) add_owners(out + blockIdx.x * int64_t(step), sums + tensor * teams * step, teams, cols, threadIdx.x, blockDim.x);
      }
    }
  }
  // No block leaves while another may send to it.
  sync_owner<kOwner>();
}

#define BACKWARD_RING(name, per, ring, lag, owner, comm, threads)                                                      \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                             \
      backward_##name(BACKWARD_ARGUMENTS, Acc* __restrict__ meetings /* [rows, 10 * group_blocks] */, int group_blocks, \
                      int teams) {                                                                                     \
    __shared__ MailBox<kSetsFor<lag>, Pair, Scales> boxes[kMaxTeams<owner>];                                           \
    if (!kOffsetOnLoad && weight_offset == 0)                                                                          \
      backward_ring<kWide, per, ring, lag, owner, comm, kShifted, !kOffsetOnLoad>(BACKWARD_PASS, meetings, group_blocks, teams, boxes); \
    else                                                                                                               \
      backward_ring<kWide, per, ring, lag, owner, comm, kShifted, false>(BACKWARD_PASS, meetings, group_blocks, teams, boxes); \
  }
#ifdef LN_SHIFTED
constexpr bool kShifted = true;
constexpr int kBlock = LN_X_BYTES == 8 ? 384 : 640;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// A few registers spill, and a row of a million columns is read once.
constexpr int kGrid = LN_X_BYTES == 8 ? 384 : 640;
#else
constexpr int kGrid = LN_X_BYTES == 8 ? 384 : 512;
#endif
#define NAME(owner) owner##_shifted
#else
constexpr bool kShifted = false;
constexpr int kBlock = LN_X_BYTES == 8 ? 416 : 640, kGrid = LN_X_BYTES == 8 ? 384 : 640;
#ifdef LN_ADD
#define NAME(owner) owner##_add
#else
#define NAME(owner) owner##_wide
#endif
#endif
#define RING(owner, per, ring, lag, type, comm, threads) RING_OF(NAME(owner), per, ring, lag, type, comm, threads)
#define RING_OF(name, per, ring, lag, type, comm, threads) BACKWARD_RING(name, per, ring, lag, type, comm, threads)

#if LN_X_BYTES == 2
RING(block, 2, 3, 1, Owner::Block, 1, kBlock)
#if !defined(LN_ADD) && !defined(LN_SHIFTED)
RING(long_block, 3, 4, 2, Owner::Block, 1, 384)
#endif
#elif LN_X_BYTES == 4
RING(block, 2, 4, 2, Owner::Block, 1, kBlock)
#else
RING(block, 4, 3, 1, Owner::Block, 1, kBlock)
#endif
#ifndef LN_ADD
#if LN_X_BYTES == 2
RING(grid, 2, 6, 4, Owner::Grid, 4, kGrid)
#elif LN_X_BYTES == 8
RING(grid, 4, 3, 2, Owner::Grid, 4, kGrid)
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
RING(grid, 4, 3, 2, Owner::Grid, 4, kGrid)
#else
// Shared memory holds no more warps there.
RING(grid, 4, 3, 2, Owner::Grid, 4, 384)
#endif
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#if LN_X_BYTES == 8
RING(cluster, 4, 3, 1, Owner::Cluster, 1, kBlock)
#elif LN_X_BYTES == 4
RING(cluster, 4, 4, 2, Owner::Cluster, 1, 384)
#if !defined(LN_ADD) && !defined(LN_SHIFTED)
RING(long_cluster, 6, 3, 2, Owner::Cluster, 1, 384)
#endif
#elif defined(LN_SHIFTED)
// What the ring leaves of shared memory is L1's, through which unaligned rows pass: with 6 rows 2 to 6% slower.
RING(cluster, 2, 4, 2, Owner::Cluster, 1, 512)
#else
RING(cluster, 3, 4, 2, Owner::Cluster, 1, 384)
#endif
#endif
