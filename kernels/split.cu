// Rows too long for a block or a cluster: the row is split into tiles of columns, in two launches each way.
//
// Computes      as forward.cu and backward.cu.
// Algorithm     Forward: `split_moments` takes (mean, m2) of every tile of every row, two-pass in registers;
//               `split_normalize` loads a tile, merges its row's moments (Chan), writes y.
//               Backward: `split_sums` takes the two row sums of every tile; in `split_gradients` a block owns a tile's
//               columns over its share of the rows, merges those rows' sums first, and writes dx; weight and the sums for
//               dweight and dbias stay in registers, one part a share.
//               Tiles are the slow index of the grid and the second launch walks them backward: the blocks of one tile share
//               weight and bias in L2, and what the first launch read last is found there.
// Bytes moved   Forward 3 * rows * cols * sizeof(X), backward 5 *, less what L2 holds.
// Launch        block B (a multiple of 32, <= kMaxThreads*), tile_cols = B * kPer * kVec, tiles = cols / tile_cols rounded
//               up. split_moments, split_normalize, split_sums: grid tiles * rows. split_gradients: grid (tiles, shares),
//               rows <= shares * kMaxShare. kVec > 1: all pointers on 16 bytes, cols a multiple of kVec. mean, rstd, weight, bias,
//               dx, dweight_part, dbias_part may be null.
// Determinism   No atomics; every sum has one order.
// Source        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "row.cuh"

constexpr int kMaxThreads = 384;
constexpr int kMaxThreadsSingle = 256;
// Rows a block of split_gradients serves: their scales are in shared memory.
constexpr int kMaxShare = 1024;
constexpr int kForward = sizeof(X) == 4 ? 8 : 4;
constexpr int kBackward = sizeof(X) == 2 ? 2 : 4;
constexpr int kSingle = sizeof(X) == 8 ? 8 : 16;

struct Tile {
  int64_t row;
  int index, begin, cols;
};

template <int kVec, int kPer> __device__ __forceinline__ Tile tile_at(int64_t block, int64_t rows, int cols) {
  const int width = blockDim.x * kPer * kVec, index = int(block / rows), begin = index * width;
  return {block % rows, index, begin, min(width, cols - begin)};
}

template <int kVec, int kPer>
__device__ __forceinline__ void split_moments(Pair* part, const X* x, int64_t rows, int cols, int tiles, int remove_mean) {
  __shared__ Pair scratch[2][kWarp];
  const Tile tile = tile_at<kVec, kPer>(blockIdx.x, rows, cols);
  Slice<kVec, kPer> slice;
  slice.load(x + tile.row * cols + tile.begin, threadIdx.x, blockDim.x, tile.cols);
  const Moments m = block_moments(slice, tile.cols, Acc(1) / tile.cols, remove_mean, scratch);
  if (threadIdx.x == 0) part[tile.row * tiles + tile.index] = {m.mean, m.m2};
}

template <int kVec, int kPer>
__device__ __forceinline__ void split_normalize(X* y, Acc* mean, Acc* rstd, const Pair* part, const X* x, const Param* weight,
                                                const Param* bias, int64_t rows, int cols, int tiles, Acc eps) {
  __shared__ Pair scratch[2][kWarp];
  const Tile tile = tile_at<kVec, kPer>(gridDim.x - 1 - int64_t(blockIdx.x), rows, cols);
  const int64_t at = tile.row * cols + tile.begin;
  Slice<kVec, kPer> slice;
  slice.load(x + at, threadIdx.x, blockDim.x, tile.cols);

  part += tile.row * tiles;
  const auto columns_of = [&](int i) { return Acc(min(blockDim.x * kPer * kVec, cols - i * blockDim.x * kPer * kVec)); };
  // About the first tile's mean, so that mean >> std loses nothing.
  const Acc center = part[0].a;
  Pair sums = {0, 0};
  for (int i = threadIdx.x; i < tiles; i += blockDim.x) sums.a += (part[i].a - center) * columns_of(i);
  const Acc row_mean = center + block_sum(sums, scratch[0]).a / cols;
  sums = {0, 0};
  for (int i = threadIdx.x; i < tiles; i += blockDim.x) {
    const Acc d = part[i].a - row_mean;
    sums.b += part[i].b + d * d * columns_of(i);
  }
  const Acc r = rsqrt_acc(block_sum(sums, scratch[1]).b / cols + eps);
  slice.normalize(y + at, weight ? weight + tile.begin : nullptr, bias ? bias + tile.begin : nullptr, row_mean, r, threadIdx.x,
                  blockDim.x, tile.cols);
  if (tile.index == 0 && threadIdx.x == 0) {
    if (mean) mean[tile.row] = row_mean;
    if (rstd) rstd[tile.row] = r;
  }
}

template <int kVec, int kPer>
__device__ __forceinline__ void split_sums(Pair* part, const X* x, const X* dy, const Param* weight, const Acc* mean,
                                           const Acc* rstd, int64_t rows, int cols, int tiles) {
  __shared__ Pair scratch[kWarp];
  const Tile tile = tile_at<kVec, kPer>(blockIdx.x, rows, cols);
  const int64_t at = tile.row * cols + tile.begin;
  Vec<X, kVec> xs[kPer], dys[kPer];
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * kVec;
    if (c < tile.cols) {
      xs[k] = load_vec<X, kVec>(x + at + c);
      dys[k] = load_vec<X, kVec>(dy + at + c);
    }
  }
  const Acc m = mean ? mean[tile.row] : Acc(0), r = rstd[tile.row];
  Pair sums = {0, 0};
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * kVec;
    if (c < tile.cols) {
      const Vec<Param, kVec> w = load_param<kVec>(weight, tile.begin + c, 1);
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        const Acc g = dys[k][i] * w[i];
        sums.a += g;
        sums.b += g * ((xs[k][i] - m) * r);
      }
    }
  }
  sums = block_sum(sums, scratch);
  if (threadIdx.x == 0) part[tile.row * tiles + tile.index] = sums;
}

template <int kVec, int kPer>
__device__ __forceinline__ void split_gradients(X* dx, Acc* dweight_part, Acc* dbias_part, const Pair* part, const X* x,
                                                const X* dy, const Param* weight, const Acc* mean, const Acc* rstd,
                                                int64_t rows, int cols, int tiles, int remove_mean) {
  __shared__ Pair row_sums[kMaxShare];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int tile = int(gridDim.x) - 1 - int(blockIdx.x), width = blockDim.x * kPer * kVec, begin = tile * width;
  const int tile_cols = min(width, cols - begin);
  // This share's rows are share, share + shares, ...
  const int64_t share = blockIdx.y, shares = gridDim.y;
  const int own_rows = share < rows ? int((rows - 1 - share) / shares + 1) : 0;
  for (int i = warp; i < own_rows; i += warps) {
    const Pair* const sums = part + (share + i * shares) * tiles;
    Pair sum = {0, 0};
    for (int t = lane; t < tiles; t += kWarp) sum = sum + sums[t];
    sum = warp_sum(sum);
    if (lane == 0) row_sums[i] = sum;
  }

  Columns<kVec, kPer> own;
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * kVec;
    own.start(k, weight, begin + c, c < tile_cols);
  }
  __syncthreads();

  const Acc inv_cols = Acc(1) / cols;
#pragma unroll 1
  for (int i = 0; i < own_rows; i++) {
    const int64_t row = share + i * shares, at = row * cols + begin;
    const RowStatistics stats = {mean ? __ldg(mean + row) : Acc(0), __ldg(rstd + row)};
    Vec<X, kVec> xs[kPer], dys[kPer];
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * blockDim.x + threadIdx.x) * kVec;
      if (c < tile_cols) {
        xs[k] = load_vec<X, kVec>(x + at + c);
        dys[k] = load_vec<X, kVec>(dy + at + c);
      }
    }
    const Scales s = scales_of(row_sums[i], stats, inv_cols, remove_mean);
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * blockDim.x + threadIdx.x) * kVec;
      if (c < tile_cols) {
        Pair unused = {0, 0};
        own.add(k, xs[k], dys[k], stats, unused);
        if (dx) own.store_dx(dx + at + c, k, xs[k], dys[k], s);
      }
    }
  }

#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * kVec;
    if (c < tile_cols) {
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        if (dweight_part) dweight_part[share * cols + begin + c + i] = own.dweight[k][i];
        if (dbias_part) dbias_part[share * cols + begin + c + i] = own.dbias[k][i];
      }
    }
  }
}

#define SPLIT(name, vec, forward_per, backward_per, threads)                                                           \
  extern "C" __global__ void __launch_bounds__(threads, 2)                                                             \
      split_moments_##name(Pair* __restrict__ part /* [rows, tiles] */, const X* __restrict__ x /* [rows, cols] */,    \
                           int64_t rows, int cols, int tiles, int remove_mean) {                                       \
    split_moments<vec, forward_per>(part, x, rows, cols, tiles, remove_mean);                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(threads, 2)                                                             \
      split_normalize_##name(X* __restrict__ y /* [rows, cols] */, Acc* __restrict__ mean /* [rows] */,                \
                             Acc* __restrict__ rstd /* [rows] */, const Pair* __restrict__ part /* [rows, tiles] */,   \
                             const X* __restrict__ x /* [rows, cols] */, const Param* __restrict__ weight /* [cols] */, \
                             const Param* __restrict__ bias /* [cols] */, int64_t rows, int cols, int tiles, Acc eps) { \
    split_normalize<vec, forward_per>(y, mean, rstd, part, x, weight, bias, rows, cols, tiles, eps);                   \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(threads, 2)                                                             \
      split_sums_##name(Pair* __restrict__ part /* [rows, tiles] */, const X* __restrict__ x /* [rows, cols] */,       \
                        const X* __restrict__ dy /* [rows, cols] */, const Param* __restrict__ weight /* [cols] */,    \
                        const Acc* __restrict__ mean /* [rows] */, const Acc* __restrict__ rstd /* [rows] */,          \
                        int64_t rows, int cols, int tiles) {                                                           \
    split_sums<vec, backward_per>(part, x, dy, weight, mean, rstd, rows, cols, tiles);                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                             \
      split_gradients_##name(X* __restrict__ dx /* [rows, cols] */, Acc* __restrict__ dweight_part /* [shares, cols] */, \
                             Acc* __restrict__ dbias_part /* [shares, cols] */,                                        \
                             const Pair* __restrict__ part /* [rows, tiles] */, const X* __restrict__ x /* [rows, cols] */, \
                             const X* __restrict__ dy /* [rows, cols] */, const Param* __restrict__ weight /* [cols] */, \
                             const Acc* __restrict__ mean /* [rows] */, const Acc* __restrict__ rstd /* [rows] */,     \
                             int64_t rows, int cols, int tiles, int remove_mean) {                                     \
    split_gradients<vec, backward_per>(dx, dweight_part, dbias_part, part, x, dy, weight, mean, rstd, rows, cols,      \
                                       tiles, remove_mean);                                                            \
  }

SPLIT(wide, kWide, kForward, kBackward, kMaxThreads)
SPLIT(single, 1, kSingle, kSingle, kMaxThreadsSingle)
