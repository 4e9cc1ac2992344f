// Backward for short rows: a group of lanes owns a row.
//
// Computes      xhat = (x - mean) * rstd, g = dy * weight, a = sum(g) / cols (0 for RMSNorm), b = sum(g * xhat) / cols,
//               dx = (g - a - xhat * b) * rstd, dweight = sum over rows of dy * xhat, dbias = sum over rows of dy.
// Algorithm     Persistent warps stride over the rows. A lane owns the same P vectors of every row: weight and the sums for dweight and
//               dbias stay in its registers. It copies its own vectors of x and dy asynchronously into its own slots of a
//               ring of rows, so that no barrier guards the ring. It reads them once: xhat and g stay in registers until the row's sums are
//               there, and the slots are free. At the end the block adds up its warps; finalize.cu adds up the blocks.
// Bytes moved   3 * rows * cols * sizeof(X), and 16 * blocks * cols for the partials, written and read (in f32).
// Launch        backward_warp_{wide,shifted,single}_LxP: block T, L lanes a row, cols <= L * P * kVec; shared: with R rows in the ring
//               max(R * 2 * T * P * kVec * sizeof(X), T / 32 * part_step(cols) * sizeof(Acc)), with LN_SKEWED of the ring R * T * P more.
//               Partials: [blocks, cols].
//               wide: kVec > 1, all pointers on 16 bytes, cols a multiple of kVec. shifted: L = 32; x, dy and dx on 16 bytes,
//               compiled with LN_SKEWED dx alone; warps of the grid * cols a multiple of kVec, or a warp for each row. dx, dweight_part,
//               dbias_part, weight, mean may be null.
// Determinism   No atomics; every sum has one order, that of lanes, warps, blocks.
// Source        Ba et al., arXiv:1607.06450, differentiated by hand.
#include "ring.cuh"

// What a lane keeps of its columns over all its rows: weight, widened, and the sums. And of the row at hand, from its sums to its dx. Columns
// past the last are zero in x and dy.
template <int kVec, int kPer> struct RowColumns {
  Acc weight[kPer][kVec], dweight[kPer][kVec], dbias[kPer][kVec];
  Acc g[kPer][kVec], xhat[kPer][kVec];

  // `w` as of load_weight.
  __device__ __forceinline__ void start(int k, const Vec<Param, kVec>& w, Acc weight_offset) {
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      weight[k][i] = weight_of(w[i], weight_offset);
      dweight[k][i] = dbias[k][i] = 0;
    }
  }
  // Takes vector k of a row: adds to the sums over rows, and its part of the row's own sums to `sums`.
  __device__ __forceinline__ void add(int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, const Normalizer& row, Pair& sums) {
    // Two short chains of additions for one long one.
    Pair s = {0, 0};
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      const Acc d = dy[i];
      xhat[k][i] = row.xhat(x[i]);
      g[k][i] = d * weight[k][i];
      s.a += g[k][i];
      s.b += g[k][i] * xhat[k][i];
      dbias[k][i] += d;
      dweight[k][i] += d * xhat[k][i];
    }
    sums = sums + s;
  }
  // dx of that vector.
  __device__ __forceinline__ void gradient(int k, Acc a, Acc b, Acc rstd, Acc (&f)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; i++) f[i] = (g[k][i] - a - xhat[k][i] * b) * rstd;
  }
};

// kRing: rows in the ring.
template <int kVec, int kPer, int kLanes, int kRing, bool kShifted> __device__ __forceinline__ void backward_warp(BACKWARD_TAKES) {
  extern __shared__ __align__(16) unsigned char shared[];
  // Of code that runs once, and comes from memory too: 16384 x 769 in bf16 31.6 us with one, 34.3 with more; in f32 47.6 and 46.8.
  constexpr int kCopies = sizeof(X) == 2 ? 1 : 4;
  launch_next();
  const int lane = threadIdx.x % kWarp, warp = __shfl_sync(kFull, threadIdx.x / kWarp, 0), warps = blockDim.x / kWarp;
  const int t = lane % kLanes, per_warp = kWarp / kLanes;
  const int64_t stride = int64_t(gridDim.x) * warps * per_warp;
  const int64_t first = (int64_t(blockIdx.x) * warps + warp) * per_warp, own_first = first + lane / kLanes;
  const auto rows_from = [&](int64_t row) { return row < rows ? int((rows - 1 - row) / stride + 1) : 0; };
  // A warp's lanes shuffle together; some may have one row fewer, and take zeros for it.
  const int iterations = rows_from(first), own_iterations = rows_from(own_first);
  const Acc inv_cols = inverse(cols);
  static_assert(!kShifted || kLanes == kWarp, "a shift a warp");
  using F = Frame<kVec, kShifted>;
  const F frame(cols, first);

  using C = Chunks<kVec, 2>;
  const uint32_t begin = C::start(shared, warp, kRing * kPer), end = begin + kRing * kPer * C::kChunk;
  RowColumns<kVec, kPer> own;
  bool valid[kPer];
#pragma unroll
  for (int k = 0; k < kPer; k++) {
    valid[k] = k * kLanes + t < frame.vectors;
    if (!valid[k])
      for (uint32_t at = begin + k * C::kChunk; at < end; at += kPer * C::kChunk) {
        C::clear(at);
        C::clear(at + C::kTensor);
      }
  }
  // Of this lane's first vector in the next row to be copied, and to be written.
  const int64_t step = stride * cols;
  int64_t next = own_first * cols + frame.column(t), out = next;
  const uint64_t policy = evict_last();
  sync_slots();
  typename C::Skew x_skew, dy_skew;
  const X *x_source = x, *dy_source = dy;
  if constexpr (kSkewed) {
    x_skew = C::Skew::of(x, frame.vectors - t), dy_skew = C::Skew::of(dy, frame.vectors - t);
    x_source = x_skew.source(x), dy_source = dy_skew.source(dy);
  }
  const auto read = [&](uint32_t at, const auto& skew, int k) {
    if constexpr (kSkewed) return C::read(at, skew, valid[k]);
    else return C::read(at);
  };
  // Of narrow rows the choice cost more than it gave: 65536 x 256 in f32 56 to 57.5 us.
  const bool by_l1 = kShifted || (kLanes == kWarp && C::template by_l1<1>(cols));
  const auto fill = [&](int it, uint32_t at) {
    if (it < iterations) {
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        const uint32_t xs = at + k * C::kChunk, dys = xs + C::kTensor;
        const int64_t from = next + k * kLanes * kVec;
        if constexpr (kSkewed) {
          C::fill(xs, x_source + from, x_skew, k, it < own_iterations, policy);
          C::fill(dys, dy_source + from, dy_skew, k, it < own_iterations, policy);
        } else if (valid[k]) {
          C::fill(xs, x + from, it < own_iterations, by_l1, policy);
          C::fill(dys, dy + from, it < own_iterations, by_l1, policy);
        }
      }
    }
    next += step;
    copy_async_commit();
  };
#pragma unroll(kCopies)
  for (int r = 0; r < kRing; r++) fill(r, begin + r * kPer * C::kChunk);
#pragma unroll
  for (int k = 0; k < kPer; k++) own.start(k, load_weight_of(frame, weight, k * kLanes + t, weight_offset, valid[k]), weight_offset);
  OuterColumns<kVec, kShifted> outer;
  const bool has_outer = lane < F::outer_columns(cols);
  outer.start(frame, has_outer, weight, weight_offset);
  int64_t row_ahead = own_first;
  Acc mean_ahead = 0, rstd_ahead = 0;
  const auto load_ahead = [&](int it) {
    if (it < own_iterations) {
      if (mean) mean_ahead = __ldg(mean + row_ahead);
      rstd_ahead = __ldg(rstd + row_ahead);
      outer.load(frame, has_outer, x, dy, row_ahead * cols);
      row_ahead += stride;
    }
  };
  load_ahead(0);
  // One column less its own mean is nothing, whatever the rounding.
  const Acc varies = cols > 1 || !remove_mean;

  uint32_t at = begin;
#pragma unroll 1
  for (int it = 0; it < iterations; it++) {
    const Normalizer row = {mean_ahead, rstd_ahead * varies}, padded = row.of_padded();
    Pair sums = {0, 0};
    outer.add(padded, weight_offset, sums);
    load_ahead(it + 1);
    const bool writes = it < own_iterations;
    Arriving<kVec, kPer> arriving;
#pragma unroll
    for (int k = 0; k < kPer; k++) arriving.load(added, k, out + k * kLanes * kVec, writes && valid[k]);
    copy_async_wait<kRing - 1>();
    sync_slots();
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const uint32_t xs = at + k * C::kChunk, dys = xs + C::kTensor;
      own.add(k, read(xs, x_skew, k), read(dys, dy_skew, k), padded, sums);
    }
    sync_slots();
    fill(it + kRing, at);
    at += kPer * C::kChunk;
    if (at == end) at = begin;
    sums = warp_sum(sums, kLanes);
    const Acc a = remove_mean ? sums.a * inv_cols : Acc(0), b = sums.b * inv_cols;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      Acc f[kVec];
      own.gradient(k, a, b, row.rstd, f);
      arriving.finish(added, k, f, out + k * kLanes * kVec, writes && valid[k]);
      store<X, kVec>(dx + out + k * kLanes * kVec, f, dx && writes && valid[k]);
    }
    outer.store_dx(dx, out - frame.column(t), Scales::of(sums, row, inv_cols, remove_mean), weight_offset);
    out += step;
  }

  // Rows of one warp, then the warps in order, through shared memory that the ring no longer needs.
  copy_async_wait<0>();
  Acc* const part = reinterpret_cast<Acc*>(shared);
#pragma unroll(kCopies)
  for (int tensor = 0; tensor < 2; tensor++) {
    Acc* const out = tensor ? dbias_part : dweight_part;
    if (out) __syncthreads();
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      Acc(&sum)[kVec] = own.dweight[k];
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        if (tensor) sum[i] = own.dbias[k][i];
#pragma unroll
        for (int o = kWarp / 2; o; o /= 2)
          if (o >= kLanes) sum[i] += __shfl_xor_sync(kFull, sum[i], o);
      }
      if (out) store_columns(frame, part + warp * part_step(cols), k * kLanes + t, sum, lane < kLanes ? frame.vectors : 0);
    }
    if (!out) continue;
    outer.store_sums(part + warp * part_step(cols), tensor);
    __syncthreads();
    add_owners(out + int64_t(blockIdx.x) * part_step(cols), part, warps, cols, threadIdx.x, blockDim.x);
  }
}

#define BACKWARD_WARP(name, vec, lanes, per, ring, threads, blocks) BACKWARD_WARP_OF(name, vec, lanes, per, ring, threads, blocks)
#define BACKWARD_WARP_OF(name, vec, lanes, per, ring, threads, blocks)                                                  \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                                        \
      backward_warp_##name##_##lanes##x##per(BACKWARD_ARGUMENTS) {                                                     \
    backward_warp<vec, per, lanes, ring, kShifted>(BACKWARD_PASS);                                                     \
  }
#ifdef LN_SHIFTED
constexpr bool kShifted = true;
#else
constexpr bool kShifted = false;
#endif
#ifdef LN_ADD
#define WIDE add
#else
#define WIDE wide
#endif

#ifdef LN_SINGLE
BACKWARD_WARP(single, 1, 8, 8, 4, 256, 1)
BACKWARD_WARP(single, 1, 32, 4, 4, 256, 1)
BACKWARD_WARP(single, 1, 32, 8, 4, 256, 1)
#if LN_X_BYTES != 8
BACKWARD_WARP(single, 1, 32, 16, 4, 256, 1)
#endif
#elif defined(LN_SHIFTED)
#if LN_X_BYTES == 2
BACKWARD_WARP(shifted, kWide, 32, 2, 3, 256, 2)
BACKWARD_WARP(shifted, kWide, 32, 3, 3, 384, 1)
#ifndef LN_SKEWED
BACKWARD_WARP(shifted, kWide, 32, 4, 3, 256, 1)
#endif
#elif LN_X_BYTES == 4
BACKWARD_WARP(shifted, kWide, 32, 4, 3, 256, 1)
BACKWARD_WARP(shifted, kWide, 32, 6, 3, 256, 1)
#ifndef LN_SKEWED
BACKWARD_WARP(shifted, kWide, 32, 8, 3, 256, 1)
#endif
#else
BACKWARD_WARP(shifted, kWide, 32, 4, 4, 256, 1)
#endif
#elif LN_X_BYTES == 2
BACKWARD_WARP(WIDE, kWide, 8, 2, 2, 256, 2)
BACKWARD_WARP(WIDE, kWide, 16, 2, 2, 256, 2)
BACKWARD_WARP(WIDE, kWide, 32, 2, 2, 256, 2)
#ifdef LN_ADD
BACKWARD_WARP(WIDE, kWide, 32, 3, 3, 256, 1)
#else
BACKWARD_WARP(WIDE, kWide, 32, 3, 3, 384, 1)
#endif
BACKWARD_WARP(WIDE, kWide, 32, 4, 3, 256, 1)
#elif LN_X_BYTES == 4
#ifdef LN_ADD
BACKWARD_WARP(WIDE, kWide, 8, 4, 3, 256, 1)
BACKWARD_WARP(WIDE, kWide, 16, 4, 3, 256, 1)
BACKWARD_WARP(WIDE, kWide, 32, 4, 3, 256, 1)
BACKWARD_WARP(WIDE, kWide, 32, 6, 3, 256, 1)
#else
BACKWARD_WARP(WIDE, kWide, 8, 4, 3, 256, 2)
BACKWARD_WARP(WIDE, kWide, 16, 4, 3, 256, 2)
BACKWARD_WARP(WIDE, kWide, 32, 4, 3, 256, 2)
BACKWARD_WARP(WIDE, kWide, 32, 6, 3, 384, 1)
BACKWARD_WARP(WIDE, kWide, 32, 8, 3, 256, 1)
#endif
#else
BACKWARD_WARP(WIDE, kWide, 8, 4, 4, 256, 1)
BACKWARD_WARP(WIDE, kWide, 32, 4, 4, 256, 1)
#endif
