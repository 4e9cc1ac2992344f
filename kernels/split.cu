// Rows that no group of resident blocks holds: two launches each way, and x is read twice.
//
// Computes      as forward.cu and backward.cu.
// Algorithm     A thread owns columns, kPer vectors apart by the grid's width, in kRows rows at once: weight and bias are loaded once
//               for them, and dweight and dbias of these rows are finished where they are summed.
//               Forward: `split_moments` keeps (mean, m2) of each row, less one of its first values, in registers and merges them over
//               the block (Chan); `split_normalize` merges the blocks' and writes y.
//               Backward: `split_sums` keeps both sums of each row; `split_gradients` adds up the blocks' and writes dx.
//               The second launch walks backward, backward's over rows too: what the first read last is still in L2.
// Bytes moved   Forward 3 * rows * cols * sizeof(X), backward 5 *, less what L2 holds.
// Launch        grid (rows / kRows rounded up, blocks), block kThreads. Both launches of a pass have the same grid. Parts:
//               moments and sums [rows, blocks], dweight_part and dbias_part [row groups, cols]; with one row group they may be
//               null, and dweight and dbias, [cols], are written instead. kVec > 1: all pointers on 16 bytes, cols a
//               multiple of kVec. mean, rstd, weight, bias, dx, dweight_part, dbias_part may be null.
// Determinism   No atomics; every sum has one order.
// Source        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "row.cuh"

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 16;
// Rows whose vectors are in flight at once.
constexpr int kBatch = 4;

// This block's rows, and its threads' columns.
struct Piece {
  int64_t row;
  int rows;
  int first, step, vectors;
};
template <int kVec> __device__ __forceinline__ Piece piece_of(int64_t rows, int cols) {
  const int64_t row = int64_t(blockIdx.x) * kRows;
  return {row, int(min(int64_t(kRows), rows - row)), int(blockIdx.y * kThreads + threadIdx.x), int(gridDim.y * kThreads), cols / kVec};
}
// The last of a thread's vectors, or less than 0.
__device__ __forceinline__ int last_of(const Piece& p) {
  return p.first < p.vectors ? p.first + (p.vectors - 1 - p.first) / p.step * p.step : -1;
}

// What the moments of a row's parts are relative to, one of its first values and no outlier unless two of three are: two means, each rounded,
// would be too coarse for the distance between them where mean >> std.
__device__ __forceinline__ Acc reference_of(const X* row, int cols, bool remove_mean) {
  if (!remove_mean) return 0;
  const Acc first = widen(row[0]);
  return cols < 3 ? first : median(first, widen(row[1]), widen(row[2]));
}

template <int kVec>
__device__ __forceinline__ void split_moments(Pair* part, const X* x, int64_t rows, int cols, int remove_mean) {
  __shared__ Pair warps[kRows][kWarps];
  __shared__ Acc counts[kWarps];
  __shared__ Acc references[kRows];
  const Piece p = piece_of<kVec>(rows, cols);
  x += p.row * cols;
  if (threadIdx.x < kRows) references[threadIdx.x] = int(threadIdx.x) < p.rows ? reference_of(x + int64_t(threadIdx.x) * cols, cols, remove_mean) : Acc(0);
  __syncthreads();
  Moments row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) row[r] = {0, 0};
  int taken = 0;
  // v is unsigned: a step past the last may be past 2^31.
#pragma unroll 1
  for (uint32_t v = p.first; v < uint32_t(p.vectors); v += p.step) {
    taken++;
    // A vector's own moments, merged into the thread's: 1 / n and n1 * n2 / n of Chan's formula.
    const Acc share = Acc(1) / taken, between = Acc(kVec) * (taken - 1) * share;
#pragma unroll
    for (int first = 0; first < kRows; first += kBatch) {
      Vec<X, kVec> xs[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; r++) xs[r] = load_vec<X, kVec>(x + int64_t(first + r) * cols + v * kVec, first + r < p.rows);
#pragma unroll
      for (int r = 0; r < kBatch; r++) {
        const Acc reference = references[first + r];
        Acc f[kVec], mean = 0, m2 = 0;
#pragma unroll
        for (int i = 0; i < kVec; i++) f[i] = xs[r][i] - reference;
        if (remove_mean) {
#pragma unroll
          for (int i = 0; i < kVec; i++) mean += f[i];
          mean *= Acc(1) / kVec;
        }
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          const Acc d = f[i] - mean;
          m2 += d * d;
        }
        Moments& m = row[first + r];
        const Acc d = mean - m.mean;
        m.mean += d * share;
        m.m2 += m2 + d * d * between;
      }
    }
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Acc count[1] = {Acc(taken) * kVec}, warp_count = warp_sum(count[0]);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Pair piece[1] = {{row[r].mean, row[r].m2}};
    const Moments m = merge_moments(piece, count, warp_count > 0 ? Acc(1) / warp_count : Acc(0));
    if (lane == 0) warps[r][warp] = {m.mean, m.m2};
  }
  if (lane == 0) counts[warp] = warp_count;
  __syncthreads();
  const Acc warp_counts[1] = {lane < kWarps ? counts[lane] : Acc(0)};
  const Acc block_count = warp_sum(warp_counts[0]);
  for (int r = warp; r < p.rows; r += kWarps) {
    const Pair piece[1] = {lane < kWarps ? warps[r][lane] : Pair{0, 0}};
    const Moments m = merge_moments(piece, warp_counts, block_count > 0 ? Acc(1) / block_count : Acc(0));
    if (lane == 0) part[(p.row + r) * gridDim.y + blockIdx.y] = {m.mean, m.m2};
  }
}

template <int kVec>
__device__ __forceinline__ void split_normalize(X* y, Acc* mean, Acc* rstd, const Pair* part, const X* x, const Param* weight,
                                                const Param* bias, int64_t rows, int cols, Acc eps, int remove_mean, Acc weight_offset) {
  __shared__ Normalizer normalizers[kRows];
  const Piece p = piece_of<kVec>(rows, cols);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, blocks = gridDim.y;
  // Columns that block b took.
  const auto columns_of = [&](int b) {
    const int first = b * kThreads, full = p.vectors / p.step, rest = p.vectors - full * p.step;
    return Acc(full * kThreads + max(0, min(kThreads, rest - first))) * kVec;
  };
  const Acc inv_cols = Acc(1) / cols;
  for (int r = warp; r < p.rows; r += kWarps) {
    const Pair* const parts = part + (p.row + r) * blocks;
    const Acc center = parts[0].a;
    Acc rest = 0, m2 = 0;
    for (int b = lane; b < blocks; b += kWarp) rest += (parts[b].a - center) * columns_of(b);
    rest = warp_sum(rest) * inv_cols;
    for (int b = lane; b < blocks; b += kWarp) {
      const Acc d = parts[b].a - center - rest;
      m2 += parts[b].b + d * d * columns_of(b);
    }
    const Acc row_mean = reference_of(x + (p.row + r) * cols, cols, remove_mean) + (center + rest);
    const Acc row_rstd = rsqrt_acc(warp_sum(m2) * inv_cols + eps);
    if (lane == 0) {
      normalizers[r] = Normalizer{row_mean, row_rstd};
      if (blockIdx.y == 0) {
        if (mean) mean[p.row + r] = row_mean;
        if (rstd) rstd[p.row + r] = row_rstd;
      }
    }
  }
  __syncthreads();
  x += p.row * cols;
  y += p.row * cols;
#pragma unroll 1
  for (int v = last_of(p); v >= 0; v -= p.step) {
    const Vec<Param, kVec> w = load_weight<kVec>(weight, v * kVec, weight_offset), b = load_param<kVec>(bias, v * kVec, 0);
#pragma unroll
    for (int first = 0; first < kRows; first += kBatch) {
      Vec<X, kVec> xs[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; r++) xs[r] = load_vec<X, kVec>(x + int64_t(first + r) * cols + v * kVec, first + r < p.rows);
#pragma unroll
      for (int r = 0; r < kBatch; r++) {
        const Normalizer n = normalizers[first + r];
        Acc f[kVec];
#pragma unroll
        for (int i = 0; i < kVec; i++) f[i] = n.xhat(xs[r][i]) * weight_of(w[i], weight_offset) + b[i];
        store<X, kVec>(y + int64_t(first + r) * cols + v * kVec, f, first + r < p.rows);
      }
    }
  }
}

template <int kVec> __device__ __forceinline__ void store_params(Param* p, const Acc (&f)[kVec]) {
  *reinterpret_cast<Vec<Param, kVec>*>(p) = Vec<Param, kVec>::of(f);
}

template <int kVec>
__device__ __forceinline__ void split_sums(Param* dweight, Param* dbias, Acc* dweight_part, Acc* dbias_part, Pair* part, const X* x, const X* dy,
                                           const Param* weight, const Acc* mean, const Acc* rstd, int64_t rows, int cols,
                                           Acc weight_offset) {
  __shared__ Normalizer normalizers[kRows];
  __shared__ Pair warps[kRows][kWarps];
  const Piece p = piece_of<kVec>(rows, cols);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x < kRows) {
    const bool valid = int(threadIdx.x) < p.rows;
    normalizers[threadIdx.x] = Normalizer{mean && valid ? mean[p.row + threadIdx.x] : Acc(0), valid ? rstd[p.row + threadIdx.x] : Acc(0)};
  }
  __syncthreads();
  x += p.row * cols;
  dy += p.row * cols;
  Pair sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) sums[r] = {0, 0};
  const uint64_t normal = evict_normal(), last = evict_last();
#pragma unroll 1
  for (uint32_t v = p.first; v < uint32_t(p.vectors); v += p.step) {
    // The second launch starts with what is read last.
    const uint64_t policy = v + p.step < uint32_t(p.vectors) ? normal : last;
    Columns<kVec, 1> own;
    own.start(0, load_weight<kVec>(weight, v * kVec, weight_offset));
#pragma unroll
    for (int first = 0; first < kRows; first += kBatch) {
      Vec<X, kVec> xs[kBatch], dys[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; r++) {
        const int64_t at = int64_t(first + r) * cols + v * kVec;
        xs[r] = load_vec<X, kVec>(x + at, first + r < p.rows, policy);
        dys[r] = load_vec<X, kVec>(dy + at, first + r < p.rows, policy);
      }
#pragma unroll
      for (int r = 0; r < kBatch; r++) own.add(0, xs[r], dys[r], normalizers[first + r], weight_offset, sums[first + r]);
    }
    const int64_t at = blockIdx.x * int64_t(part_step(cols)) + v * kVec;
    if (dweight_part) store_acc<kVec>(dweight_part + at, own.dweight[0]);
    if (dbias_part) store_acc<kVec>(dbias_part + at, own.dbias[0]);
    if (dweight) store_params<kVec>(dweight + v * kVec, own.dweight[0]);
    if (dbias) store_params<kVec>(dbias + v * kVec, own.dbias[0]);
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Pair sum = warp_sum(sums[r]);
    if (lane == 0) warps[r][warp] = sum;
  }
  __syncthreads();
  for (int r = warp; r < p.rows; r += kWarps) {
    const Pair sum = warp_sum(lane < kWarps ? warps[r][lane] : Pair{0, 0});
    if (lane == 0) part[(p.row + r) * gridDim.y + blockIdx.y] = sum;
  }
}

template <int kVec>
__device__ __forceinline__ void split_gradients(X* dx, const Pair* part, const X* x, const X* dy, const Param* weight,
                                                const Acc* mean, const Acc* rstd, int64_t rows, int cols, int remove_mean,
                                                Acc weight_offset) {
  __shared__ Scales scales[kRows];
  const Piece p = piece_of<kVec>(rows, cols);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, blocks = gridDim.y;
  for (int r = warp; r < p.rows; r += kWarps) {
    const int64_t row = p.row + r;
    Pair sum = {0, 0};
    for (int b = lane; b < blocks; b += kWarp) sum = sum + part[row * blocks + b];
    sum = warp_sum(sum);
    if (lane == 0) scales[r] = Scales::of(sum, Normalizer{mean ? mean[row] : Acc(0), rstd[row]}, Acc(1) / cols, remove_mean);
  }
  __syncthreads();
  x += p.row * cols;
  dy += p.row * cols;
  dx += p.row * cols;
  const uint64_t policy = evict_last();
#pragma unroll 1
  for (int v = last_of(p); v >= 0; v -= p.step) {
    Columns<kVec, 1> own;
    own.start(0, load_weight<kVec>(weight, v * kVec, weight_offset));
#pragma unroll
    for (int first = kRows - kBatch; first >= 0; first -= kBatch) {
      Vec<X, kVec> xs[kBatch], dys[kBatch];
#pragma unroll
      for (int r = kBatch - 1; r >= 0; r--) {
        const int64_t at = int64_t(first + r) * cols + v * kVec;
        xs[r] = load_vec<X, kVec>(x + at, first + r < p.rows, policy);
        dys[r] = load_vec<X, kVec>(dy + at, first + r < p.rows, policy);
      }
#pragma unroll
      for (int r = 0; r < kBatch; r++)
        own.store_dx(dx + int64_t(first + r) * cols + v * kVec, 0, xs[r], dys[r], scales[first + r], weight_offset, first + r < p.rows);
    }
  }
}

// Blocks of split_sums on a multiprocessor: of f64, 128 registers do not hold the sums of kRows rows.
constexpr int kSumsBlocks = sizeof(X) == 8 ? 1 : 2;

#define SPLIT(name, vec)                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                                             \
      split_moments_##name(Pair* __restrict__ part /* [rows, blocks] */, const X* __restrict__ x /* [rows, cols] */,   \
                           int64_t rows, int cols, int remove_mean) {                                                  \
    split_moments<vec>(part, x, rows, cols, remove_mean);                                                              \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                                             \
      split_normalize_##name(X* __restrict__ y /* [rows, cols] */, Acc* __restrict__ mean /* [rows] */,                \
                             Acc* __restrict__ rstd /* [rows] */, const Pair* __restrict__ part /* [rows, blocks] */,  \
                             const X* __restrict__ x /* [rows, cols] */, const Param* __restrict__ weight /* [cols] */, \
                             const Param* __restrict__ bias /* [cols] */, int64_t rows, int cols, Acc eps,             \
                             int remove_mean, Acc weight_offset) {                                                     \
    split_normalize<vec>(y, mean, rstd, part, x, weight, bias, rows, cols, eps, remove_mean, weight_offset);           \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, kSumsBlocks)                                                   \
      split_sums_##name(Param* __restrict__ dweight /* [cols] */, Param* __restrict__ dbias /* [cols] */,              \
                        Acc* __restrict__ dweight_part /* [row groups, cols], rows part_step apart */,                                       \
                        Acc* __restrict__ dbias_part /* [row groups, cols], rows part_step apart */,                                         \
                        Pair* __restrict__ part /* [rows, blocks] */, const X* __restrict__ x /* [rows, cols] */,      \
                        const X* __restrict__ dy /* [rows, cols] */, const Param* __restrict__ weight /* [cols] */,    \
                        const Acc* __restrict__ mean /* [rows] */, const Acc* __restrict__ rstd /* [rows] */,          \
                        int64_t rows, int cols, Acc weight_offset) {                                                   \
    split_sums<vec>(dweight, dbias, dweight_part, dbias_part, part, x, dy, weight, mean, rstd, rows, cols, weight_offset); \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                                             \
      split_gradients_##name(X* __restrict__ dx /* [rows, cols] */, const Pair* __restrict__ part /* [rows, blocks] */, \
                             const X* __restrict__ x /* [rows, cols] */, const X* __restrict__ dy /* [rows, cols] */,  \
                             const Param* __restrict__ weight /* [cols] */, const Acc* __restrict__ mean /* [rows] */, \
                             const Acc* __restrict__ rstd /* [rows] */, int64_t rows, int cols, int remove_mean,       \
                             Acc weight_offset) {                                                                      \
    split_gradients<vec>(dx, part, x, dy, weight, mean, rstd, rows, cols, remove_mean, weight_offset);                 \
  }

#ifdef LN_SINGLE
SPLIT(single, 1)
#else
SPLIT(wide, kWide)
#endif
