// Rows that pass through a ring in shared memory, and the blocks that share a row.
//
// A block has compute warps and, behind them, communication warps. A compute warp owns kPer chunks of 32 vectors of its block's
// slice of every row; each of its lanes copies its own vectors asynchronously into its own slots of the ring, so that no
// barrier guards the ring. What a row's owners must know of each other goes by a communication warp: the compute warps leave
// their parts of a row's sums and arrive on an mbarrier, the communication warp adds them up, over all blocks of the row, and
// publishes what the compute warps need some rows later.
#pragma once
#include "row.cuh"

constexpr int kSector = 32;  // bytes that L2 gives at once
// Bytes of a ring that leave L1 room for what many vectors a thread have on their way.
constexpr uint32_t kRoomyRing = 192 * 1024;

// Who owns a row: a block, a cluster of blocks that reach each other's shared memory, or a group of blocks of the grid, all
// resident at once, that meet in global memory.
enum class Owner { Block, Cluster, Grid };

constexpr int kMaxWarps = 16;      // that compute
constexpr int kMaxCluster = 16;    // blocks
constexpr int kMaxGroup = 160;     // blocks of a row in Owner::Grid
constexpr int kMaxOthers = kMaxGroup / kWarp;
// Acc of a block's copy of a merged pair, which has a sector or more.
constexpr int kToldStride = 8;
// A row's place in global memory, where `blocks` meet: a message of each, and a copy for each. plan.rs counts it too.
template <typename Message> __device__ __forceinline__ int meeting_size(int blocks) {
  return blocks * int(sizeof(Message) / sizeof(Acc) + kToldStride);
}
template <typename Message> __device__ __forceinline__ Message* meeting_of(Acc* meetings, int64_t row, int blocks) {
  return reinterpret_cast<Message*>(meetings + row * meeting_size<Message>(blocks));
}
// Has L2 get the place: rows that passed since its last use may have pushed it out, and who writes a part of a sector or looks for it would
// wait for DRAM. By all lanes of a warp.
template <typename Message> __device__ __forceinline__ void prefetch_meeting(const Acc* meetings, int64_t row, int blocks) {
  constexpr int kLine = 128;
  const int bytes = meeting_size<Message>(blocks) * int(sizeof(Acc));
  const char* const place = reinterpret_cast<const char*>(meetings) + row * bytes;
  for (int at = threadIdx.x % kWarp * kLine; at < bytes; at += kWarp * kLine)
    asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(place + at));
}

// What a part of a row tells of its moments: the mean in two terms, of which the second is what rounding the first leaves, and m2. In one term,
// the means of two parts would be too coarse for the distance between them where mean >> std.
struct alignas(4 * sizeof(Acc)) Part {
  Acc mean, rest, m2, again;  // m2, or nothing
  // Of a mean about a center, whichever is larger (Knuth's sum).
  __device__ __forceinline__ static Part of(Acc center, const Moments& about) {
    const Acc mean = center + about.mean, added = mean - center;
    return {mean, (center - (mean - added)) + (about.mean - added), about.m2, 0};
  }
};
// Of all parts that the warp's lanes hold, kPer each of `counts` values.
template <int kPer> __device__ __forceinline__ Part merge_parts(const Part (&parts)[kPer], const Acc (&counts)[kPer], Acc inv_count) {
  const Acc center = __shfl_sync(kFull, parts[0].mean, 0);
  Pair about[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) about[i] = {parts[i].mean - center + parts[i].rest, parts[i].m2};
  return Part::of(center, merge_moments(0, about, counts, inv_count));
}

// A row as whole vectors of memory, which compute warps hold. Where rows do not start on 16 bytes but their tensor does, less than kVec of
// its columns come before them, and kVec - 1 or more behind, as load_skewed_if reads them: `outer`, which lanes of one warp hold, one each. There
// are equally many vectors in all rows.
template <int kVec, bool kShifted> struct Frame {
  static_assert(!kShifted || kVec == kWide, "vectors of 16 bytes");
  // Vectors of a row, and columns before the first.
  int vectors, head = 0;

  __device__ __forceinline__ Frame(int cols, int64_t row) : vectors(vectors_of(cols)) {
    if constexpr (kShifted) head = min(int(kVec - uint32_t(row) * uint32_t(cols) % kVec) % kVec, cols);
  }
  __device__ __forceinline__ static int vectors_of(int cols) { return kShifted ? shifted_vectors(cols) : uint32_t(cols) / kVec; }
  // The first of a vector.
  __device__ __forceinline__ int column(int vector) const { return head + vector * kVec; }
  // How many columns are outer, and the lane's.
  __device__ __forceinline__ static int outer_columns(int cols) { return cols - vectors_of(cols) * kVec; }
  __device__ __forceinline__ int outer(int lane) const { return lane < head ? lane : lane + vectors * kVec; }
};

// The rows of one of `owners`, in order. Elsewhere every owners-th; where they are sorted, those of one kind, which start equally far from
// 16 bytes, one after another, and kinds by how many columns come before the first vector, so that weight and sums change their frame as seldom
// and by as little as can be. An owner has consecutive ones. Rows of a kind are `step` apart, a power of 2, and the first rows of the
// kinds are below that: `turn` from one to the next, modulo step. Each kind has `each` rows, or one more: `longer`, a bit for each.
// If every owners-th row starts alike, they are not: `turn` is 0.
template <bool kSorted> struct RowIndex { using Type = int64_t; };
// Rows that blocks share are long, and so fewer than 2^31.
template <> struct RowIndex<true> { using Type = int; };
template <bool kSorted> struct Rows {
  using Row = typename RowIndex<kSorted>::Type;
  Row rows, first, begin, step, turn;
  int count, each;
  unsigned longer;

  template <int kVec> __device__ __forceinline__ static Rows of(int64_t rows, int cols, int owner, int owners) {
    if constexpr (!kSorted) {
      return {rows, 0, owner, owners, 0, owner < rows ? int((rows - 1 - owner) / owners + 1) : 0, 0, 0};
    } else {
      const int begin = int(rows * owner / owners), apart = min(kVec, cols & -cols), step = kVec / apart;
      // One kind without an end: `count` has it.
      if (owners % step == 0) return {1 << 30, owner, 0, owners, 0, owner < rows ? (int(rows) - 1 - owner) / owners + 1 : 0, 1 << 27, 0};
      // -row * cols is the head, modulo kVec, and an odd number its own inverse modulo 8.
      const int turn = -(cols / apart) & (step - 1);
      unsigned longer = 0;
#pragma unroll
      for (int kind = 0; kind < kWide; kind++) longer |= unsigned((kind * turn & (step - 1)) < rows % step) << kind;
      return {int(rows), 0, begin, step, turn, int(rows * (owner + 1) / owners) - begin, int(rows) / step, longer};
    }
  }
  __device__ __forceinline__ Row at(int it) const {
    if constexpr (!kSorted) {
      return begin + it * step;
    } else {
      const int place = begin + it;
      int kind = 0;
#pragma unroll
      for (int next = 1; next < kWide; next++) kind += next < step && before_kind(next) <= place;
      return first + (kind * turn & (step - 1)) + step * (place - before_kind(kind));
    }
  }
  // The row `its` iterations after.
  __device__ __forceinline__ Row next(Row row, int its = 1) const {
    for (int i = 0; i < its; i++) {
      row += step;
      // The first of the next kind, of those that have rows.
      if constexpr (kSorted)
        while (row >= rows) row = (row + turn) & (step - 1);
    }
    return row;
  }
  // Whether it is the first row of its kind but not of all.
  __device__ __forceinline__ bool starts_kind(Row row) const { return kSorted && row < step && row > 0; }
  // The end of the iterations with rows of the same kind as `row`, that of iteration it.
  __device__ __forceinline__ int end_of_kind(int it, Row row) const {
    return kSorted ? min(count, it + int((rows - 1 - row) / step) + 1) : count;
  }

 private:
  // How many there are of the kinds before.
  __device__ __forceinline__ int before_kind(int kind) const { return kind * each + __popc(longer & ((1u << kind) - 1)); }
};

// The part of a row that a block owns: whole chunks of 32 vectors, contiguous, fewer or none in the last blocks.
struct Share {
  int begin, vectors;
};
__device__ __forceinline__ Share share_of(int vectors, int rank, int blocks) {
  const int each = (vectors + blocks * kWarp - 1) / (blocks * kWarp) * kWarp, begin = min(rank * each, vectors);
  return {begin, min(each, vectors - begin)};
}

// weight or bias for a vector, or zeros.
template <int kVec, bool kShifted>
__device__ __forceinline__ Vec<Param, kVec> load_param_of(const Frame<kVec, kShifted>& frame, const Param* p, int vector, Acc absent, bool valid) {
  const int c = frame.column(vector);
  if constexpr (!kShifted) {
    return valid ? load_param<kVec>(p, c, absent) : filled<Param, kVec>(0);
  } else {
    // No branches: what is loaded for several vectors is to be on its way at once.
    const Vec<Param, kVec> r = load_skewed_if<Param, kVec, -1>(p + c, valid && p);
    return p ? r : filled<Param, kVec>(valid ? absent : Acc(0));
  }
}
// As load_weight.
template <int kVec, bool kShifted>
__device__ __forceinline__ Vec<Param, kVec> load_weight_of(const Frame<kVec, kShifted>& frame, const Param* p, int vector, Acc offset, bool valid) {
  return with_offset<kVec>(load_param_of(frame, p, vector, 1, valid), offset);
}

// Among the kVec lanes of an aligned group: lane i gets element i of each lane's values.
template <int kVec> __device__ __forceinline__ void transpose(Acc (&f)[kVec]) {
#pragma unroll
  for (int s = 1; s < kVec; s *= 2) {
    const bool upper = threadIdx.x & s;
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      if (i & s) continue;
      const Acc got = __shfl_xor_sync(kFull, upper ? f[i] : f[i | s], s);
      if (upper) f[i] = got;
      else f[i | s] = got;
    }
  }
}

// Stores the sums for dweight or dbias of a vector before vector `end` at the row of sums `out`. All lanes of the warp call it, for vectors
// side by side.
template <int kVec, bool kShifted>
__device__ __forceinline__ void store_columns(const Frame<kVec, kShifted>& frame, Acc* out, int vector, const Acc (&f)[kVec], int end) {
  if constexpr (!kShifted) {
    if (vector < end) store_acc<kVec>(out + frame.column(vector), f);
  } else if constexpr (kVec == 8) {
    // Eight sums that lie 32 bytes from the next lane's would each write a part of a sector: eight lanes write the whole of it.
    Acc g[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i++) g[i] = f[i];
    transpose(g);
    const int i = threadIdx.x % kVec, first = vector - i;
#pragma unroll
    for (int j = 0; j < kVec; j++)
      if (first + j < end) out[frame.column(first + j) + i] = g[j];
  } else if (vector < end) {
#pragma unroll
    for (int i = 0; i < kVec; i++) out[frame.column(vector) + i] = f[i];
  }
}

// Moves a thread's sums over rows to the frame of rows with `by` columns more before the first vector, of which there were `head`: each vector is so
// many columns further on, and takes over what the next of its chunk had. What no vector of its chunk has any more goes to `edges`, those of
// the warp's chunks. By all lanes of a warp.
template <int kVec, int kPer>
__device__ __forceinline__ void move_sums(Acc (&f)[kPer][kVec], int head, int by, const bool (&valid)[kPer], Acc* edges) {
  const bool first = edges && threadIdx.x % kWarp == 0, last = threadIdx.x % kWarp == kWarp - 1;
#pragma unroll 1
  for (int i = head; i < head + by; i++)
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      if (first && valid[k]) edges[k * kVec + i] = f[k][0];
      const Acc next = __shfl_down_sync(kFull, f[k][0], 1);
#pragma unroll
      for (int j = 0; j < kVec - 1; j++) f[k][j] = f[k][j + 1];
      f[k][kVec - 1] = last ? Acc(0) : next;
    }
}

// The blocks that share rows, and which of the grid's owners of rows they are.
struct Group {
  int rank, blocks, owner, owners;
};
template <Owner kOwner> __device__ __forceinline__ Group group_of(int blocks) {
  int rank = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kOwner == Owner::Cluster) {
    rank = cluster_rank();
    blocks = cluster_size();
  }
#endif
  if constexpr (kOwner == Owner::Block) blocks = 1;
  if constexpr (kOwner == Owner::Grid) rank = blockIdx.x % blocks;
  return {rank, blocks, int(blockIdx.x / blocks), int(gridDim.x / blocks)};
}

// Lets no thread of the block pass before all have come, of compute and communication warps by copies of the code, where the compiler
// made two of what is behind both: bar.sync, which __syncthreads is, asks for one.
__device__ __forceinline__ void block_sync() { asm volatile("barrier.sync 0;" ::: "memory"); }

// Lets no communication warp of the block pass before all kWarps have come.
template <int kWarps> __device__ __forceinline__ void communication_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kWarps * kWarp) : "memory"); }

// Lets no thread of the cluster pass before all have come.
template <Owner kOwner> __device__ __forceinline__ void sync_owner() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kOwner == Owner::Cluster) cluster_sync();
#endif
}

// mean and rstd of an owner's rows, each lane those of every 32nd, loaded 32 rows ahead: a load that every lane waited for would
// hold up each row. Iterations come in order, kStep apart. kPadded: for xhat alone, and of_padded.
template <int kStep, bool kPadded> struct Statistics {
  Acc mean = 0, rstd = 0, mean_ahead = 0, rstd_ahead = 0;

  template <bool kSorted> __device__ __forceinline__ void load(const Acc* means, const Acc* rstds, const Rows<kSorted>& rows, int from) {
    const int it = from + int(threadIdx.x % kWarp);
    if (it < rows.count) {
      const int64_t row = rows.at(it);
      if (means) mean_ahead = __ldg(means + row);
      rstd_ahead = __ldg(rstds + row);
    }
  }
  template <bool kSorted>
  __device__ __forceinline__ Normalizer at(const Acc* means, const Acc* rstds, const Rows<kSorted>& rows, int it) {
    if (it % kWarp < kStep) {
      mean = mean_ahead;
      rstd = kPadded ? Normalizer{mean_ahead, rstd_ahead}.of_padded().rstd : rstd_ahead;
      load(means, rstds, rows, it / kWarp * kWarp + kWarp);
    }
    return Normalizer{__shfl_sync(kFull, mean, it % kWarp), __shfl_sync(kFull, rstd, it % kWarp)};
  }
};

// A lane's own slots in a warp's part of the ring: kTensors vectors of each chunk. Addresses, for one addition a step: an index would
// be multiplied, and ptxas 13.0 encodes an asynchronous copy with a cache hint wrongly if its address has a uniform part.
// Of a tensor that does not start on 16 bytes, a slot is filled with the first of the two aligned vectors that the lane's spans: the other is the
// next lane's, of the last lane behind the chunk. So lanes synchronise between copies, reads, and writes or copies again (`sync_slots`).
template <int kVec, int kTensors> struct Chunks {
  static constexpr int kBytes = kVec * sizeof(X), kTensor = kWarp * kBytes + (kSkewed ? 16 : 0), kChunk = kTensors * kTensor;
  static_assert(!kSkewed || kBytes == 16, "vectors of 16 bytes");

  // The lane's slot in the warp's first chunk.
  __device__ __forceinline__ static uint32_t start(const unsigned char* ring, int warp, int chunks) {
    return shared_address(ring) + warp * chunks * kChunk + threadIdx.x % kWarp * kBytes;
  }
  __device__ __forceinline__ static Vec<X, kVec> read(uint32_t at) { return load_shared<Vec<X, kVec>>(at); }
  // A slot that is never filled stays zero.
  __device__ __forceinline__ static void clear(uint32_t at) { store_shared(at, filled<X, kVec>(0), true); }
  // Whether copies of kPer vectors a thread go through L1: where rows do not all start on a sector, eight lanes' vectors lie in five, of which L1 has
  // the fifth for the next eight.
  template <int kPer> __device__ __forceinline__ static bool by_l1(int cols) {
    return uint32_t(cols) * sizeof(X) % kSector != 0 && (kPer <= 4 || dynamic_shared() <= kRoomyRing);
  }
  __device__ __forceinline__ static void fill(uint32_t at, const X* from, bool by_l1, uint64_t policy) { copy_async<kBytes>(at, from, by_l1, policy); }
  // Start a copy, or write zeros if not valid. A 2-byte element is more than cp.async can split: it is copied at once.
  __device__ __forceinline__ static void fill(uint32_t at, const X* from, bool valid, bool by_l1, uint64_t policy) {
    if constexpr (kBytes >= 4) copy_async<kBytes>(at, from, valid, by_l1, policy);
    else store_shared(at, load_vec<X, kVec>(from, valid), true);
  }

  // Of a tensor that need not start on 16 bytes: how far past them it does, and how many aligned vectors a row has from the lane's on.
  struct Skew {
    uint32_t bytes = 0;
    int reach = 0;

    // `limit`: vectors from the lane's own on.
    __device__ __forceinline__ static Skew of(const X* tensor, int limit) {
      Skew skew = {skew_of(tensor), limit};
      skew.reach += skew.bytes > 0;
      // Else the compiler works them out for every vector.
      asm("" : "+r"(skew.bytes), "+r"(skew.reach));
      return skew;
    }
    // The first aligned vector that one of the tensor's spans is as far into this as that is into the tensor.
    __device__ __forceinline__ const X* source(const X* tensor) const { return tensor - bytes / uint32_t(sizeof(X)); }
    // Calls `copy` for each vector that the lane copies of chunk k.
    template <typename Copy> __device__ __forceinline__ void each(uint32_t at, const X* from, int k, const Copy& copy) const {
      if (reach > k * kWarp) copy(at, from);
      if (threadIdx.x % kWarp == kWarp - 1 && bytes && reach > k * kWarp + 1) copy(at + 16, from + kVec);
    }
  };
  // Starts the copies of chunk k of which the lane's vector is at `from` in the source, by all lanes; or writes zeros if not valid.
  __device__ __forceinline__ static void fill(uint32_t at, const X* from, const Skew& skew, int k, uint64_t policy) {
    skew.each(at, from, k, [&](uint32_t to, const X* vector) { copy_async_by_l1<16>(to, vector, policy); });
  }
  __device__ __forceinline__ static void fill(uint32_t at, const X* from, const Skew& skew, int k, bool valid, uint64_t policy) {
    skew.each(at, from, k, [&](uint32_t to, const X* vector) { copy_async_by_l1<16>(to, vector, valid, policy); });
  }
  // A vector, or zeros if not valid.
  __device__ __forceinline__ static Vec<X, kVec> read(uint32_t at, const Skew& skew, bool valid) {
    Vec<X, kVec> v = read(at);
    if (skew.bytes) {
      Spanned<X, kVec, -1> spanned;
      reinterpret_cast<Vec<X, kVec>&>(spanned.w[0]) = v;
      reinterpret_cast<Vec<X, kVec>&>(spanned.w[4]) = read(at + 16);
      v = spanned.at(skew.bytes);
      if (!valid) v = filled<X, kVec>(0);
    }
    return v;
  }
  // Has the slot hold the vector itself, once all lanes have read.
  __device__ __forceinline__ static void settle(uint32_t at, const Skew& skew, const Vec<X, kVec>& v) { store_shared(at, v, skew.bytes > 0); }
};
// Other lanes' copies, which they have waited for, are there; or other lanes have read what is to be filled again.
__device__ __forceinline__ void sync_slots() {
  if constexpr (kSkewed) __syncwarp();
}

// A lane's own slots for vectors of weight or bias that L2 keeps, because every row takes them anew: 16 bytes of each lane side by side.
template <int kVec> struct Slots {
  static constexpr int kBytes = kVec * sizeof(Param), kPart = kWarp * 16, kChunk = kWarp * kBytes;
  using V = Vec<Param, kVec>;

  __device__ __forceinline__ static uint32_t start(const unsigned char* slots, int warp, int each) {
    return shared_address(slots) + warp * each * kChunk + threadIdx.x % kWarp * 16;
  }
  __device__ __forceinline__ static V read(uint32_t at) {
    V r;
#pragma unroll
    for (int i = 0; i < kBytes / 16; i++) reinterpret_cast<uint4*>(&r)[i] = load_shared<uint4>(at + i * kPart);
    return r;
  }
  __device__ __forceinline__ static void clear(uint32_t at) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; i++) store_shared(at + i * kPart, uint4{0, 0, 0, 0}, true);
  }
  __device__ __forceinline__ static void fill(uint32_t at, const Param* from) {
    const uint64_t stays = evict_last();
#pragma unroll
    for (int i = 0; i < kBytes / 16; i++) {
      const uint4* const part = reinterpret_cast<const uint4*>(from) + i;
      // Of vectors of more than 16 bytes, a copy takes half of each sector: L1 has the other half for the next.
      copy_async<16>(at + i * kPart, part, kBytes > 16, stays);
    }
  }
};

// The sums of a thread's part of a row about one of its first values, in one pass, and exactly where mean >> std.
template <int kVec> struct OwnSums {
  Acc center = 0;
  Pair sums = {0, 0};

  // Of the values that sums start with: all others' deviations from an outlier would cancel.
  __device__ __forceinline__ static Acc center_of(const Vec<X, kVec>& v) {
    if constexpr (kVec > 2) return median(v[0], v[1], v[2]);
    else return v[0];
  }

  // Adds a vector, the row's or, if not valid, zeros.
  __device__ __forceinline__ void add(const Vec<X, kVec>& v, bool first, bool valid, bool remove_mean) {
    if (first) *this = {remove_mean ? center_of(v) : Acc(0), {0, 0}};
    const Acc from = valid ? center : Acc(0);
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      const Acc d = v[i] - from;
      sums.a += d;
      sums.b += d * d;
    }
  }
  // The warp's part, from the sums of its threads, of `count` values.
  __device__ __forceinline__ Part merge(Acc count, Acc inv_count, Acc inv_warp, bool remove_mean) const {
    const Pair own = about_center(sums, inv_count, remove_mean);
    // A mean, not a value: rounding costs a share of how far it is from the warp's.
    const Acc warp_center = __shfl_sync(kFull, center + own.a, 0);
    const Pair pieces[1] = {{center - warp_center + own.a, own.b}};
    const Acc counts[1] = {count};
    return Part::of(warp_center, merge_moments(0, pieces, counts, inv_warp));
  }
};

// Backward, a row's outer columns, one a lane: as Columns. Nothing where there are none.
template <int kVec, bool kShifted> struct OuterColumns {
  Columns<1, 1> own;
  // Sums of the column behind the last vector that the lane had until it got one before the first.
  Pair left = {0, 0};
  // Of the row that is next, on their way.
  Vec<X, 1> x_ahead, dy_ahead;
  // Of the row at hand.
  Vec<X, 1> x, dy;
  int column;
  bool has;

  using F = Frame<kVec, kShifted>;

  // Of rows in `frame`, the first. `valid`: whether the lane has a column.
  __device__ __forceinline__ void start(const F& frame, bool valid, const Param* weight, Acc weight_offset) {
    if constexpr (kShifted) {
      column = frame.outer(threadIdx.x % kWarp);
      has = valid;
      own.start(0, load_weight<1>(weight, column, weight_offset, has));
    }
  }
  // The same, from here on, of rows with as many columns or more before the first vector.
  __device__ __forceinline__ void go_on(const F& frame, const Param* weight, Acc weight_offset) {
    if constexpr (kShifted) {
      if (frame.outer(threadIdx.x % kWarp) == column) return;
      left = {own.dweight[0][0], own.dbias[0][0]};
      start(frame, has, weight, weight_offset);
    }
  }
  // Asks for a row, which starts at `at`.
  __device__ __forceinline__ void load(const F& frame, bool valid, const X* xs, const X* dys, int64_t at) {
    if constexpr (kShifted) {
      const int64_t from = at + frame.outer(threadIdx.x % kWarp);
      x_ahead = load_vec<X, 1>(xs + from, valid);
      dy_ahead = load_vec<X, 1>(dys + from, valid);
    }
  }
  // Has L2 get a row that is asked for later.
  __device__ __forceinline__ static void prefetch(const F& frame, bool valid, const X* xs, const X* dys, int64_t at) {
    if constexpr (kShifted) {
      const int64_t from = at + frame.outer(threadIdx.x % kWarp);
      prefetch_if(xs + from, valid);
      prefetch_if(dys + from, valid);
    }
  }
  // Adds the row that was asked for.
  __device__ __forceinline__ void add(const Normalizer& row, Acc weight_offset, Pair& sums) {
    if constexpr (kShifted) {
      x = x_ahead;
      dy = dy_ahead;
      own.add(0, x, dy, row, weight_offset, sums);
    }
  }
  __device__ __forceinline__ void store_dx(X* dx, int64_t at, const Scales& s, Acc weight_offset) {
    if constexpr (kShifted) own.store_dx(dx + at + column, 0, x, dy, s, weight_offset, dx && has);
  }
  // Of all kWarps warps that have rows, the first gets the sums, added in order.
  template <int kWarps> __device__ __forceinline__ void add_up(int warp) {
    if constexpr (kWarps > 1) {
      __shared__ Pair parts[kWarps][kWarp], parts_left[kWarps][kVec];
      const int lane = threadIdx.x % kWarp;
      parts[warp][lane] = {own.dweight[0][0], own.dbias[0][0]};
      if (lane < kVec) parts_left[warp][lane] = left;
      communication_sync<kWarps>();
      Pair sum = {0, 0}, sum_left = {0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        sum = sum + parts[w][lane];
        sum_left = sum_left + parts_left[w][lane % kVec];
      }
      own.dweight[0][0] = sum.a;
      own.dbias[0][0] = sum.b;
      left = sum_left;
    }
  }
  __device__ __forceinline__ void store_sums(Acc* out, bool bias) const {
    if constexpr (kShifted)
      if (has) out[column] = bias ? own.dbias[0][0] : own.dweight[0][0];
  }
  __device__ __forceinline__ void store_left(Acc* edges, const Edges& places, bool bias) const {
    const int lane = threadIdx.x % kWarp;
    if (lane < kVec) edges[places.behind() + lane] = bias ? left.b : left.a;
  }
};

// ---- between the blocks of a row ------------------------------------------------------------------------------------

// Meeting in global memory: a slot is zero until its message is there, and a value of +0 goes as -0. Each value is its own flag, so that no
// fence and no counter is needed. Whoever a message is for is alone in reading it, and clears its slot: a launch finds zeros and leaves zeros.
__device__ __forceinline__ float not_zero(float v) { return __float_as_uint(v) == 0 ? -0.f : v; }
__device__ __forceinline__ double not_zero(double v) { return __double_as_longlong(v) == 0 ? -0. : v; }
__device__ __forceinline__ bool is_there(float v) { return __float_as_uint(v) != 0; }
__device__ __forceinline__ bool is_there(double v) { return __double_as_longlong(v) != 0; }
__device__ __forceinline__ bool is_there(const Pair& p) { return is_there(p.a) && is_there(p.b); }
__device__ __forceinline__ bool is_there(const Part& p) { return is_there(p.mean) && is_there(p.rest) && is_there(p.m2) && is_there(p.again); }
__device__ __forceinline__ void publish(Pair* slot, Pair p) {
  p = {not_zero(p.a), not_zero(p.b)};
  if constexpr (sizeof(Acc) == 4)
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(slot), "f"(float(p.a)), "f"(float(p.b)) : "memory");
  else
    asm volatile("st.relaxed.gpu.global.v2.f64 [%0], {%1, %2};" ::"l"(slot), "d"(double(p.a)), "d"(double(p.b)) : "memory");
}
__device__ __forceinline__ Pair look(const Pair* slot) {
  if constexpr (sizeof(Acc) == 4) {
    float a, b;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "l"(slot) : "memory");
    return {Acc(a), Acc(b)};
  } else {
    double a, b;
    asm volatile("ld.relaxed.gpu.global.v2.f64 {%0, %1}, [%2];" : "=d"(a), "=d"(b) : "l"(slot) : "memory");
    return {Acc(a), Acc(b)};
  }
}
__device__ __forceinline__ void publish(Part* slot, const Part& p) {
  const Acc mean = not_zero(p.mean), rest = not_zero(p.rest), m2 = not_zero(p.m2);
  if constexpr (sizeof(Acc) == 4) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %3};" ::"l"(slot), "f"(float(mean)), "f"(float(rest)), "f"(float(m2)) : "memory");
  } else {
    Pair* const pairs = reinterpret_cast<Pair*>(slot);
    publish(pairs, {mean, rest});
    publish(pairs + 1, {m2, m2});
  }
}
__device__ __forceinline__ Part look(const Part* slot) {
  if constexpr (sizeof(Acc) == 4) {
    float mean, rest, m2, again;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(mean), "=f"(rest), "=f"(m2), "=f"(again) : "l"(slot) : "memory");
    return {Acc(mean), Acc(rest), Acc(m2), Acc(again)};
  } else {
    const Pair* const pairs = reinterpret_cast<const Pair*>(slot);
    const Pair mean = look(pairs), m2 = look(pairs + 1);
    return {mean.a, mean.b, m2.a, m2.b};
  }
}
template <typename Message> __device__ __forceinline__ void clear(Message* slot) {
  if constexpr (sizeof(Message) == 8)
    asm volatile("st.relaxed.gpu.global.b64 [%0], 0;" ::"l"(slot) : "memory");
  else
#pragma unroll
    for (int at = 0; at < int(sizeof(Message)); at += 16)
      asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {0, 0};" ::"l"(reinterpret_cast<char*>(slot) + at) : "memory");
}

// What the warps of a block and the blocks of a cluster leave for each other: a set a row, used again kSets rows later. A compute warp
// leaves its part of row i after it read the result of row i - kLag - 1, so that kSets >= kLag + 2 leave no set overrun.
template <int kSets, typename Message, typename Result> struct MailBox {
  Message part[kSets][kMaxWarps];     // of the compute warps
  Message block[kSets][kMaxCluster];  // of the cluster's blocks
  Result result[kSets];
  uint64_t part_full[kSets], block_full[kSets], result_full[kSets];
};
template <int kSets, typename Message, typename Result> struct Mail {
  using Box = MailBox<kSets, Message, Result>;
  static constexpr uint32_t kPart = offsetof(Box, part), kBlock = offsetof(Box, block), kResult = offsetof(Box, result),
                            kPartFull = offsetof(Box, part_full), kBlockFull = offsetof(Box, block_full),
                            kResultFull = offsetof(Box, result_full);
  // Of a warp's lanes, who arrives: one for all, behind a __syncwarp, because arrivals of one barrier are served one after another. racecheck
  // does not follow that, and gets kernels in which all do.
#ifdef LN_RACECHECK
  static constexpr bool kAllArrive = true;
#else
  static constexpr bool kAllArrive = false;
#endif
  // Lanes that leave a warp's part: of a pair, one for each sum.
  static constexpr int kLeave = sizeof(Message) == sizeof(Pair) ? 2 : 1;
  uint32_t box;

  __device__ __forceinline__ explicit Mail(Box& b) : box(shared_address(&b)) { asm volatile("" : "+r"(box)); }
  __device__ __forceinline__ static uint32_t set(int i) { return uint32_t(i) % kSets; }
  __device__ __forceinline__ static uint32_t phase(int i) { return uint32_t(i) / kSets & 1; }

  // By one thread; the block, or the cluster, synchronises after it.
  __device__ __forceinline__ void init(int warps) const {
    for (uint32_t s = 0; s < kSets; s++) {
      barrier_init(box + kPartFull + 8 * s, (kAllArrive ? kWarp : kLeave) * warps);
      barrier_init(box + kBlockFull + 8 * s, 1);
      barrier_init(box + kResultFull + 8 * s, kAllArrive ? kWarp : 1);
    }
    barrier_init_fence();
  }

  // A compute warp's part of row i: lanes 0 to 15 hold a, the others b.
  __device__ __forceinline__ void leave(int i, int warp, Acc half) const {
    static_assert(kLeave == 2, "a pair");
    const int lane = threadIdx.x % kWarp;
    leave(i, part_of(i, warp) + (lane ? sizeof(Acc) : 0), half, lane % (kWarp / 2) == 0);
  }
  // All lanes hold the same.
  __device__ __forceinline__ void leave(int i, int warp, const Message& message) const {
    static_assert(kLeave == 1, "more than a pair");
    leave(i, part_of(i, warp), message, threadIdx.x % kWarp == 0);
  }
  __device__ __forceinline__ Result wait(int i) const {
    barrier_wait(box + kResultFull + 8 * set(i), phase(i));
    return load_shared<Result>(box + kResult + set(i) * sizeof(Result));
  }

  // A communication warp's: the part of compute warp `lane`, or zeros.
  __device__ __forceinline__ Message collect(int i, int warps) const {
    barrier_wait(box + kPartFull + 8 * set(i), phase(i));
    const int lane = threadIdx.x % kWarp;
    return lane < warps ? load_shared<Message>(part_of(i, lane)) : Message{};
  }
  // By all lanes, with the same value.
  __device__ __forceinline__ void deliver(int i, const Result& r) const {
    const bool delivers = threadIdx.x % kWarp == 0;
    __syncwarp();
    store_shared(box + kResult + set(i) * sizeof(Result), r, delivers);
    barrier_arrive(box + kResultFull + 8 * set(i), kAllArrive || delivers);
  }

  // The row's pair: `merge` of the messages of its blocks, of which lane l has those of blocks l, l + 32, ... All blocks get the same
  // bits. `meeting` is the row's place in global memory, for Owner::Grid.
  template <Owner kOwner, typename Merge>
  __device__ __forceinline__ Pair agree(int i, const Group& group, const Message& own, Message* meeting, const Merge& merge) const {
    if constexpr (kOwner == Owner::Block) return own;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if constexpr (kOwner == Owner::Cluster) {
      // Half a warp sends half a message, a lane to each block.
      constexpr int kHalf = sizeof(Message) / sizeof(Acc) / 2;
      const int lane = threadIdx.x % kWarp, to = lane % (kWarp / 2), first = to == lane ? 0 : kHalf;
      const uint32_t full = box + kBlockFull + 8 * set(i), messages = box + kBlock + set(i) * kMaxCluster * sizeof(Message);
      if (lane == 0) barrier_expect(full, group.blocks * sizeof(Message));
      const uint32_t slot = messages + group.rank * sizeof(Message) + first * sizeof(Acc);
      const Acc* const words = reinterpret_cast<const Acc*>(&own);
      if (to < group.blocks)
#pragma unroll
        for (int w = 0; w < kHalf; w++) send(address_in(to, slot + w * sizeof(Acc)), first ? words[kHalf + w] : words[w], address_in(to, full));
      barrier_wait_cluster(full, phase(i));
      const Message heard[1] = {lane < group.blocks ? load_shared<Message>(messages + lane * sizeof(Message)) : Message{}};
      return merge(heard);
    }
#endif
    if constexpr (kOwner == Owner::Grid) return meet(group, own, meeting, merge);
  }

 private:
  __device__ __forceinline__ uint32_t part_of(int i, int warp) const { return box + kPart + (set(i) * kMaxWarps + warp) * sizeof(Message); }
  template <typename T> __device__ __forceinline__ void leave(int i, uint32_t at, const T& what, bool leaves) const {
    store_shared(at, what, leaves);
    // What the warp's other lanes read of this set's last use is read by now.
    __syncwarp();
    barrier_arrive(box + kPartFull + 8 * set(i), kAllArrive || leaves);
  }

  // The first block reads all messages and tells the others: where all poll all, they slow each other.
  template <typename Merge>
  __device__ __forceinline__ Pair meet(const Group& group, const Message& own, Message* meeting, const Merge& merge) const {
    const int lane = threadIdx.x % kWarp;
    Acc* const told = reinterpret_cast<Acc*>(meeting + group.blocks);
    const auto told_to = [&](int rank) { return reinterpret_cast<Pair*>(told + rank * kToldStride); };
    if (group.rank > 0) {
      if (lane == 0) publish(meeting + group.rank, own);
      Pair* const slot = told_to(group.rank);
      Pair merged = look(slot);
      while (!__all_sync(kFull, is_there(merged))) {
        __nanosleep(40);
        merged = look(slot);
      }
      if (lane == 0) clear(slot);
      return merged;
    }
    Message heard[kMaxOthers];
    bool all;
    do {
      // All on their way at once: each that is waited for before the next is asked for costs as much as a hop.
#pragma unroll
      for (int j = 0; j < kMaxOthers; j++) heard[j] = look(meeting + min(lane + j * kWarp, group.blocks - 1));
      all = true;
#pragma unroll
      for (int j = 0; j < kMaxOthers; j++) {
        const int from = lane + j * kWarp;
        if (from == 0) heard[j] = own;
        else if (from >= group.blocks) heard[j] = Message{};
        else all = all && is_there(heard[j]);
      }
    } while (!__all_sync(kFull, all));
    const Pair merged = merge(heard);
    const auto for_others = [&](const auto& f) {
#pragma unroll
      for (int j = 0; j < kMaxOthers; j++) {
        const int other = lane + j * kWarp;
        if (other > 0 && other < group.blocks) f(other);
      }
    };
    for_others([&](int other) { publish(told_to(other), merged); });
    for_others([&](int other) { clear(meeting + other); });
    return merged;
  }
};
