// The residual add, and the dropout before it: sum = residual + dropout(x).
#pragma once
#include "common.cuh"

// Element i is dropped if word i % 4 of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with counter
// i / 4 and key `seed` is less than `threshold`; else it is multiplied by `scale`. threshold 0: no dropout, and nothing computed.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  Acc scale;

  __device__ __forceinline__ uint4 words(uint64_t counter) const {
    uint4 c = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
      const uint64_t p = uint64_t(0xD2511F53u) * c.x, q = uint64_t(0xCD9E8D57u) * c.z;
      c = {uint32_t(q >> 32) ^ c.y ^ key0, uint32_t(q), uint32_t(p >> 32) ^ c.w ^ key1, uint32_t(p)};
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return c;
  }
  // Of elements first, first + 1, ..; first is a multiple of kVec.
  template <int kVec> __device__ __forceinline__ void apply(Acc (&f)[kVec], int64_t first) const {
    if (threshold == 0) return;
    constexpr int kStep = kVec < 4 ? kVec : 4;
#pragma unroll
    for (int i = 0; i < kVec; i += kStep) {
      uint4 w = words(uint64_t(first + i) / 4);
      if (kStep < 4 && first & 2) w.x = w.z, w.y = w.w;
      if (kStep < 2 && first & 1) w.x = w.y;
      const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < kStep; j++) f[i + j] = word[j] < threshold ? Acc(0) : f[i + j] * scale;
    }
  }
};
#define DROPOUT_ARGUMENTS uint64_t seed, uint32_t threshold, Acc scale
#define DROPOUT Dropout{seed, threshold, scale}

// sum = residual + dropout(x) of vectors of x, which become those of the sum, rounded as they are stored.
template <int kVec> __device__ __forceinline__ void add_residual(Vec<X, kVec>& x, const Vec<X, kVec>& residual, const Dropout& dropout, int64_t at) {
  Acc f[kVec];
#pragma unroll
  for (int i = 0; i < kVec; i++) f[i] = x[i];
  dropout.apply(f, at);
#pragma unroll
  for (int i = 0; i < kVec; i++) f[i] += residual[i];
  x = Vec<X, kVec>::of(f);
}
// d, the gradient of the sum so far, and dsum, its rest: writes dresidual = d + dsum if it is wanted, and leaves dx = dropout(d + dsum) in d.
template <int kVec>
__device__ __forceinline__ void add_gradient(Acc (&d)[kVec], const Vec<X, kVec>& dsum, X* dresidual, const Dropout& dropout, int64_t at, bool valid) {
#pragma unroll
  for (int i = 0; i < kVec; i++) d[i] += dsum[i];
  store<X, kVec>(dresidual + at, d, valid && dresidual);
  dropout.apply(d, at);
}
