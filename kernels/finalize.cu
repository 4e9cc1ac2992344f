// The second launch of a backward pass: adds the partial dweight and dbias that its owners of rows left.
//
// Computes      dweight[c] = sum over parts of dweight_part[part][c], dbias likewise.
// Algorithm     A block owns 32 columns; 16 threads a column add every 16th part, then their sums are added in order.
// Bytes moved   2 * parts * cols * sizeof(Acc), mostly from L2, where the first launch left them.
// Launch        block (32, 16), grid (cols / 32 rounded up, 2). Either output may be null.
// Determinism   No atomics; one order.
#include "common.cuh"

constexpr int kColumns = 32, kSplits = 16;

extern "C" __global__ void __launch_bounds__(kColumns* kSplits, 1)
    finalize(Param* __restrict__ dweight /* [cols] */, Param* __restrict__ dbias /* [cols] */,
             const Acc* __restrict__ dweight_part /* [parts, cols] */, const Acc* __restrict__ dbias_part /* [parts, cols] */,
             int parts, int cols) {
  __shared__ Acc sums[kSplits][kColumns];
  Param* const out = blockIdx.y ? dbias : dweight;
  const Acc* const part = blockIdx.y ? dbias_part : dweight_part;
  if (!out) return;
  const int c = blockIdx.x * kColumns + threadIdx.x;
  Acc sum = 0;
  if (c < cols) {
#pragma unroll 8
    for (int p = threadIdx.y; p < parts; p += kSplits) sum += part[int64_t(p) * cols + c];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < cols) {
    for (int s = 1; s < kSplits; s++) sum += sums[s][threadIdx.x];
    out[c] = Param(sum);
  }
}
