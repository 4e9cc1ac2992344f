// What a thread holds of a row, and what it computes of it: `Slice` forward, `Columns` backward.
#pragma once
#include "common.cuh"

// kPer vectors of a row, a thread's own; those past the row are neither loaded nor read.
template <int kVec, int kPer> struct Slice {
  Vec<X, kVec> v[kPer];

  // Vector k of thread t of `threads` starts at column (k * threads + t) * kVec.
  __device__ __forceinline__ void load(const X* row, int t, int threads, int cols) {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kVec;
      if (c < cols) v[k] = load_vec<X, kVec>(row + c);
    }
  }

  // The sums of (x - center) and (x - center)^2.
  __device__ __forceinline__ Pair sums(Acc center, int t, int threads, int cols) const {
    Pair s = {0, 0};
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      if ((k * threads + t) * kVec < cols) {
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          const Acc d = v[k][i] - center;
          s.a += d;
          s.b += d * d;
        }
      }
    }
    return s;
  }

  __device__ __forceinline__ void normalize(X* y, const Param* weight, const Param* bias, Acc mean, Acc rstd, int t,
                                            int threads, int cols) const {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kVec;
      if (c < cols) {
        const Vec<Param, kVec> w = load_param<kVec>(weight, c, 1), b = load_param<kVec>(bias, c, 0);
        Acc f[kVec];
#pragma unroll
        for (int i = 0; i < kVec; i++) f[i] = (v[k][i] - mean) * rstd * w[i] + b[i];
        store<X, kVec>(y + c, f);
      }
    }
  }
};

// Moments of the block's slice of a row, `cols` columns long.
template <int kVec, int kPer>
__device__ __forceinline__ Moments block_moments(const Slice<kVec, kPer>& slice, int cols, Acc inv_cols, int remove_mean,
                                                 Pair (&part)[2][kWarp]) {
  const int t = threadIdx.x, threads = blockDim.x;
  Acc center = 0;
  if (remove_mean) center = block_sum(slice.sums(0, t, threads, cols).a, part[0]) * inv_cols;
  return moments_about(center, block_sum(slice.sums(center, t, threads, cols), part[1]), inv_cols, remove_mean);
}

// A thread's own vectors of kTensors tensors for several rows, in shared memory: slot, vector, tensor; a vector of all threads
// side by side, so that a warp's accesses are contiguous.
template <int kVec, int kPer, int kTensors> struct Slots {
  static constexpr int kBytes = kVec * sizeof(X);
  unsigned char* own;
  uint32_t stride;

  __device__ __forceinline__ Slots(unsigned char* ring)
      : own(ring + threadIdx.x * kBytes), stride(blockDim.x * kBytes) {}

  __device__ __forceinline__ unsigned char* at(int slot, int k, int tensor) const {
    return own + ((slot * kPer + k) * kTensors + tensor) * stride;
  }
  // Starts the copy of one vector, or of zeros. A 2-byte element is more than cp.async can split: it is copied at once.
  __device__ __forceinline__ void fill(int slot, int k, int tensor, const X* from, bool valid) const {
    if constexpr (kBytes >= 4) copy_async<kBytes>(shared_address(at(slot, k, tensor)), from, valid);
    else *reinterpret_cast<Vec<X, kVec>*>(at(slot, k, tensor)) = valid ? load_vec<X, kVec>(from) : Vec<X, kVec>{X(0.f)};
  }
  __device__ __forceinline__ Vec<X, kVec> read(int slot, int k, int tensor) const {
    return *reinterpret_cast<const Vec<X, kVec>*>(at(slot, k, tensor));
  }
};

// The coefficients of a row: xhat = (x - mean) * rstd, dx = (dy * weight + offset + (x - mean) * slope) * rstd.
struct RowStatistics {
  Acc mean, rstd;
};
struct Scales {
  Acc mean, slope, offset, rstd;
};
// `sums` over the row: of dy * weight and of dy * weight * xhat.
__device__ __forceinline__ Scales scales_of(Pair sums, RowStatistics row, Acc inv_cols, bool remove_mean) {
  const Acc b = sums.b * inv_cols, a = remove_mean ? sums.a * inv_cols : Acc(0);
  return {row.mean, -row.rstd * b, -a, row.rstd};
}

// What a thread keeps of its columns over all its rows. Columns past the last are zero in x, dy and weight.
template <int kVec, int kPer> struct Columns {
  Vec<Param, kVec> weight[kPer];
  Acc dweight[kPer][kVec], dbias[kPer][kVec];

  __device__ __forceinline__ void start(int k, const Param* w, int c, bool valid) {
    if (valid) weight[k] = load_param<kVec>(w, c, 1);
    else
#pragma unroll
      for (int i = 0; i < kVec; i++) weight[k].v[i] = Param(0.f);
#pragma unroll
    for (int i = 0; i < kVec; i++) dweight[k][i] = dbias[k][i] = 0;
  }
  // Adds vector k of a row to the sums over rows, and its part of the row's own sums to `sums`.
  __device__ __forceinline__ void add(int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, RowStatistics row, Pair& sums) {
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      const Acc xhat = (x[i] - row.mean) * row.rstd, d = dy[i], g = d * weight[k][i];
      sums.a += g;
      sums.b += g * xhat;
      dbias[k][i] += d;
      dweight[k][i] += d * xhat;
    }
  }
  __device__ __forceinline__ void store_dx(X* dx, int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, Scales s,
                                           bool valid = true) const {
    Acc f[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i++) f[i] = (dy[i] * weight[k][i] + s.offset + (x[i] - s.mean) * s.slope) * s.rstd;
    if (valid) store<X, kVec>(dx, f);
  }
};
