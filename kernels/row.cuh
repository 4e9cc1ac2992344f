// What a thread holds of a row, and what it computes of it: `Slice` forward, `Columns` backward.
#pragma once
#include "common.cuh"

// kPer vectors of a row, a thread's own; those past the row are zero and are left out of every sum.
template <int kVec, int kPer> struct Slice {
  Vec<X, kVec> v[kPer];

  // Vector k of thread t of `threads` starts at column (k * threads + t) * kVec.
  __device__ __forceinline__ void load(const X* row, int t, int threads, int cols) {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kVec;
      if (c < cols) v[k] = load_once<X, kVec>(row + c);
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
__device__ __forceinline__ Moments block_moments(const Slice<kVec, kPer>& slice, int cols, int remove_mean,
                                                 Pair (&part)[2][kWarp]) {
  const int t = threadIdx.x, threads = blockDim.x;
  Acc center = 0;
  if (remove_mean) center = block_sum({slice.sums(0, t, threads, cols).a, 0}, part[0]).a / cols;
  return moments_about(center, block_sum(slice.sums(center, t, threads, cols), part[1]), cols, remove_mean);
}

// The coefficients of a row's dx: dx = g * rstd + (x - mean) * slope + offset.
struct Scales {
  Acc slope, offset;
};
__device__ __forceinline__ Scales scales_of(Pair sums, Acc rstd, Acc inv_cols, bool remove_mean) {
  return {-rstd * rstd * (sums.b * inv_cols), remove_mean ? -rstd * (sums.a * inv_cols) : Acc(0)};
}

// What a thread keeps of its columns over all its rows.
template <int kVec, int kPer> struct Columns {
  Vec<Param, kVec> weight[kPer];
  Acc dweight[kPer][kVec], dbias[kPer][kVec];

  __device__ __forceinline__ void zero(int k) {
#pragma unroll
    for (int i = 0; i < kVec; i++) dweight[k][i] = dbias[k][i] = 0;
  }
  // Adds vector k of a row to the sums over rows, and its part of the row's own sums to `sums`.
  __device__ __forceinline__ void add(int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, Acc mean, Acc rstd, Pair& sums) {
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      const Acc xhat = (x[i] - mean) * rstd, d = dy[i], g = d * weight[k][i];
      sums.a += g;
      sums.b += g * xhat;
      dbias[k][i] += d;
      dweight[k][i] += d * xhat;
    }
  }
  __device__ __forceinline__ void store_dx(X* dx, int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, Acc mean, Acc rstd,
                                           Scales s) const {
    Acc f[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i++) f[i] = dy[i] * weight[k][i] * rstd + ((x[i] - mean) * s.slope + s.offset);
    store<X, kVec>(dx, f);
  }
};
