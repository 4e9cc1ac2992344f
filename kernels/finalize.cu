// The last launch of a backward pass: adds up the partial dweight and dbias that its owners of rows left.
//
// Computes      dweight[c] = sum over parts of dweight_part[part][c], dbias likewise.
// Algorithm     A lane owns kVec columns; S warps add every S-th part, then their sums are added in order.
// Bytes moved   2 * parts * cols * sizeof(Acc), mostly from L2, where the owners left them.
// Launch        block (32, S), S <= kMaxSplits, grid (cols / (32 * kVec) rounded up, 2). Either output may be null. On sm_90 it may be
//               launched before the parts are there (programmatic dependent launch), and waits.
// Determinism   No atomics; one order.
#include "common.cuh"

constexpr int kMaxSplits = 32;
constexpr int kVec = 16 / sizeof(Acc);

extern "C" __global__ void __launch_bounds__(kWarp* kMaxSplits, 1)
    finalize(Param* __restrict__ dweight /* [cols] */, Param* __restrict__ dbias /* [cols] */,
             const Acc* __restrict__ dweight_part /* [parts, cols], rows part_step apart */,
             const Acc* __restrict__ dbias_part /* [parts, cols], rows part_step apart */, int parts, int cols) {
  wait_for_previous();
  __shared__ Vec<Acc, kVec> sums[kMaxSplits][kWarp];
  const int splits = blockDim.y;
  Param* const out = blockIdx.y ? dbias : dweight;
  const Acc* const part = blockIdx.y ? dbias_part : dweight_part;
  if (!out) return;
  const int c = (blockIdx.x * kWarp + threadIdx.x) * kVec;
  Acc sum[kVec];
#pragma unroll
  for (int i = 0; i < kVec; i++) sum[i] = 0;
  const auto add = [&](const Vec<Acc, kVec>& v) {
#pragma unroll
    for (int i = 0; i < kVec; i++) sum[i] += v[i];
  };
  if (c + kVec <= cols) {
#pragma unroll 8
    for (int p = threadIdx.y; p < parts; p += splits) add(load_vec<Acc, kVec>(part + p * int64_t(part_step(cols)) + c));
  } else {
    // Behind the last column nothing was written.
    for (int p = threadIdx.y; p < parts; p += splits)
#pragma unroll
      for (int i = 0; i < kVec; i++) sum[i] += c + i < cols ? __ldg(part + p * int64_t(part_step(cols)) + c + i) : Acc(0);
  }
  if (splits > 1) {
    sums[threadIdx.y][threadIdx.x] = Vec<Acc, kVec>::of(sum);
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int s = 1; s < splits; s++) add(sums[s][threadIdx.x]);
  }
#pragma unroll
  for (int i = 0; i < kVec; i++)
    if (c + i < cols) out[c + i] = Param(sum[i]);
}
