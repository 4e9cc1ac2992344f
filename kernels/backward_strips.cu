// Backward for small tensors, in one launch: rows are owned by teams of warps, columns by blocks.
//
// Computes      xhat = (x - mean) * rstd, g = dy * weight, a = sum(g) / cols (0 for RMSNorm), b = sum(g * xhat) / cols,
//               dx = (g - a - xhat * b) * rstd, dweight = sum over rows of dy * xhat, dbias = sum over rows of dy.
// Algorithm     dweight and dbias need mean and rstd, which the forward pass kept, and no sum over a row: the first blocks take a strip of
//               columns each, 32 bytes wide, of all rows, and write its dweight and dbias. The others write dx, a team a row. Both
//               read x and dy, one of them from L2; partial sums and the launch that would add them are saved.
// Bytes moved   3 * rows * cols * sizeof(X), and 2 from L2.
// Launch        backward_strips_wide_P: block (L, R), L whole warps, L * R <= kThreads; cols <= L * P * kVec; grid cols / kStrip + rows / R, each
//               rounded up. rows within 32 bits; all pointers on 16 bytes, cols a multiple of kVec. dx, dweight, dbias, weight, mean may be null.
// Determinism   No atomics; every sum has one order.
// Source        Ba et al., arXiv:1607.06450, differentiated by hand.
#include "row.cuh"

constexpr int kThreads = 256;
constexpr int kVec = kWide;
// Lanes, and columns, of a strip: a sector of L2.
constexpr int kStripLanes = 2, kStrip = kStripLanes * kVec;
// Rows of a strip whose vectors a thread has on their way. Registers are rows' too: f32 has none for more.
constexpr int kAhead = sizeof(X) == 2 ? 8 : 4;

// dweight and dbias of a strip of columns.
__device__ __forceinline__ void sum_strip(int strip, int t, int threads, Param* dweight, Param* dbias, const X* x, const X* dy, const Acc* mean,
                                          const Acc* rstd, int rows, int cols) {
  // Of a group of lanes, dweight and then dbias of each column.
  constexpr int kSums = 2 * kStrip;
  __shared__ Vec<Acc, kVec> of_group[kThreads / kStripLanes][2][kStripLanes];
  __shared__ Acc of_split[kThreads];
  const int lane = t % kStripLanes, group = t / kStripLanes, groups = threads / kStripLanes;
  const int c = strip * kStrip + lane * kVec;
  Acc w[kVec] = {}, b[kVec] = {};
  const uint64_t policy = evict_last();
#pragma unroll 1
  for (int row = group; row < rows; row += groups * kAhead) {
    Vec<X, kVec> xs[kAhead], dys[kAhead];
    Normalizer n[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int r = row + j * groups;
      const bool valid = r < rows && c < cols;
      const int64_t at = int64_t(r) * cols + c;
      xs[j] = load_vec_if<X, kVec>(x + at, valid, policy);
      dys[j] = load_vec_if<X, kVec>(dy + at, valid, policy);
      n[j].mean = mean && valid ? __ldg(mean + r) : Acc(0);
      n[j].rstd = valid ? __ldg(rstd + r) : Acc(0);
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++)
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        const Acc d = dys[j][i];
        w[i] += d * n[j].xhat(xs[j][i]);
        b[i] += d;
      }
  }
  of_group[group][0][lane] = Vec<Acc, kVec>::of(w);
  of_group[group][1][lane] = Vec<Acc, kVec>::of(b);
  __syncthreads();
  const Acc* const sums = reinterpret_cast<const Acc*>(of_group);
  const int splits = threads / kSums;
  Acc sum = 0;
#pragma unroll 4
  for (int i = t; i < groups * kSums; i += splits * kSums) sum += sums[i];
  of_split[t] = sum;
  __syncthreads();
  if (t >= kSums) return;
  Acc total = 0;
#pragma unroll 4
  for (int s = 0; s < splits; s++) total += of_split[s * kSums + t];
  const int column = strip * kStrip + t % kStrip;
  Param* const out = t < kStrip ? dweight : dbias;
  if (out && column < cols) out[column] = Param(total);
}

// dx of a row, by `lanes` threads of a block; all of its threads call it.
template <int kPer>
__device__ __forceinline__ void write_row(int64_t row, bool owns, int t, int lanes, X* dx, const X* x, const X* dy, const Param* weight, const Acc* mean,
                                          const Acc* rstd, int cols, int remove_mean, Acc weight_offset) {
  __shared__ Pair of_warp[kThreads / kWarp];
  const int64_t start = row * cols;
  const uint64_t policy = evict_last();
  Vec<X, kVec> xs[kPer], dys[kPer];
  Vec<Param, kVec> w[kPer];
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * lanes + t) * kVec;
    xs[k] = load_vec_if<X, kVec>(x + start + c, owns && c < cols, policy);
    dys[k] = load_vec_if<X, kVec>(dy + start + c, owns && c < cols, policy);
    w[k] = with_offset<kVec>(weight ? load_vec_if<Param, kVec>(weight + c, c < cols) : filled<Param, kVec>(1), weight_offset);
  }
  const Normalizer n = {mean && owns ? __ldg(mean + row) : Acc(0), owns ? __ldg(rstd + row) : Acc(0)};
  Acc g[kPer][kVec], xhat[kPer][kVec];
  const Normalizer padded = n.of_padded();
  Pair sums = {0, 0};
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    Pair s = {0, 0};
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      xhat[k][i] = padded.xhat(xs[k][i]);
      g[k][i] = dys[k][i] * weight_of(w[k][i], weight_offset);
      s.a += g[k][i];
      s.b += g[k][i] * xhat[k][i];
    }
    sums = sums + s;
  }
  sums = warp_sum(sums);
  if (lanes > kWarp) {
    const int warps = lanes / kWarp, first = threadIdx.y * warps;
    if (t % kWarp == 0) of_warp[first + t / kWarp] = sums;
    __syncthreads();
    sums = {0, 0};
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; i++)
      if (i < warps) sums = sums + of_warp[first + i];
  }
  const Acc inv_cols = inverse(cols), a = remove_mean ? sums.a * inv_cols : Acc(0), b = sums.b * inv_cols;
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    const int c = (k * lanes + t) * kVec;
    Acc f[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i++) f[i] = (g[k][i] - a - xhat[k][i] * b) * n.rstd;
    store<X, kVec>(dx + start + c, f, owns && c < cols);
  }
}

template <int kPer>
__device__ __forceinline__ void backward_strips(X* dx, Param* dweight, Param* dbias, const X* x, const X* dy, const Param* weight, const Acc* mean,
                                                const Acc* rstd, int64_t rows, int cols, int remove_mean, Acc weight_offset) {
  const int strips = (cols + kStrip - 1) / kStrip, block = blockIdx.x;
  if (block < strips) {
    if (dweight || dbias) sum_strip(block, threadIdx.y * blockDim.x + threadIdx.x, blockDim.x * blockDim.y, dweight, dbias, x, dy, mean, rstd, int(rows), cols);
  } else if (dx) {
    const int64_t row = int64_t(block - strips) * blockDim.y + threadIdx.y;
    write_row<kPer>(row, row < rows, threadIdx.x, blockDim.x, dx, x, dy, weight, mean, rstd, cols, remove_mean, weight_offset);
  }
}

#define BACKWARD_STRIPS(per)                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) backward_strips_wide_##per(                                    \
      X* __restrict__ dx /* [rows, cols] */, Param* __restrict__ dweight /* [cols] */, Param* __restrict__ dbias /* [cols] */, \
      const X* __restrict__ x /* [rows, cols] */, const X* __restrict__ dy /* [rows, cols] */, const Param* __restrict__ weight /* [cols] */, \
      const Acc* __restrict__ mean /* [rows] */, const Acc* __restrict__ rstd /* [rows] */, int64_t rows, int cols, int remove_mean, \
      Acc weight_offset) {                                                                                             \
    backward_strips<per>(dx, dweight, dbias, x, dy, weight, mean, rstd, rows, cols, remove_mean, weight_offset);       \
  }

BACKWARD_STRIPS(2)
#if LN_X_BYTES != 2
BACKWARD_STRIPS(4)
#endif
