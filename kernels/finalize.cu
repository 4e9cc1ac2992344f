// The last launch of a backward pass: adds up the partial dweight and dbias that its owners of rows left.
//
// Computes      dweight[c] = sum over parts of dweight_part[part][c], dbias likewise.
// Algorithm     A thread owns kVec columns and every S-th part, all of them on their way at once: what this launch takes is latency. If S > 1, the
//               S sums of a column are added in order, by a thread a column. A part's `Edges` come behind it.
// Bytes moved   2 * parts * cols * sizeof(Acc), mostly from L2, where the owners left them.
// Launch        block (L, S), L * S = kThreads, S a power of 2; grid (cols / (L * kVec) rounded up, 2).
//               Either output may be null. On sm_90 it may be launched before the parts are there (programmatic dependent launch), and waits.
// Determinism   No atomics; one order.
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kVec = 16 / sizeof(Acc);
// Adds every `splits`-th part from `split` on, kAhead of them on their way at once.
template <int kAhead, typename Load>
__device__ __forceinline__ void add_parts(Acc (&sum)[kVec], const Acc* part, int64_t step, int parts, int split, int splits, const Load& load) {
#pragma unroll 1
  for (int p = split; p < parts; p += kAhead * splits) {
    Vec<Acc, kVec> v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; j++) v[j] = load(part + (p + j * splits) * step, p + j * splits < parts);
#pragma unroll
    for (int j = 0; j < kAhead; j++)
#pragma unroll
      for (int i = 0; i < kVec; i++) sum[i] += v[j][i];
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    finalize(Param* __restrict__ dweight /* [cols] */, Param* __restrict__ dbias /* [cols] */,
             const Acc* __restrict__ dweight_part /* [parts, cols], rows part_step, and Edges, apart */,
             const Acc* __restrict__ dbias_part /* as dweight_part */, int parts, int cols, int has_edges) {
  __shared__ Vec<Acc, kVec> sums[kThreads];
  const int lanes = blockDim.x, splits = blockDim.y, lane = threadIdx.x, split = threadIdx.y;
  const int own_columns = lanes * kVec, first = blockIdx.x * own_columns, c = first + lane * kVec;
  const Edges edges = Edges::of(cols);
  const int edge = has_edges ? edges.place(c) : -1;
  const int64_t step = part_step(cols) + (has_edges ? edges.count() : 0);
  Param* const out = blockIdx.y ? dbias : dweight;
  const Acc* const part = blockIdx.y ? dbias_part : dweight_part;
  Acc sum[kVec] = {};
  // No more instructions than few parts need, and all on their way of two blocks a multiprocessor, to 160.
  const auto add = [&](const Acc* part, const auto& load) {
    if (parts <= splits) add_parts<1>(sum, part, step, parts, split, splits, load);
    else if (parts <= 4 * splits) add_parts<4>(sum, part, step, parts, split, splits, load);
    else add_parts<10>(sum, part, step, parts, split, splits, load);
  };
  wait_for_previous();
  if (!out) return;
  const auto load = [](const Acc* from, bool valid) { return load_vec_if<Acc, kVec>(from, valid); };
  if (edge >= 0) add(part + part_step(cols) + edge, load);
  if (c + kVec <= cols) {
    add(part + c, load);
  } else {
    // Behind the last column nothing was written.
    add(part + c, [&](const Acc* from, bool valid) {
      Acc f[kVec];
#pragma unroll
      for (int i = 0; i < kVec; i++) f[i] = valid && c + i < cols ? __ldg(from + i) : Acc(0);
      return Vec<Acc, kVec>::of(f);
    });
  }
  if (splits == 1) {
    if (c + kVec <= cols) {
      store<Param, kVec>(out + c, sum);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; i++)
        if (c + i < cols) out[c + i] = Param(sum[i]);
    }
    return;
  }
  sums[split * lanes + lane] = Vec<Acc, kVec>::of(sum);
  __syncthreads();
  const Acc* const of_column = reinterpret_cast<const Acc*>(sums);
  for (int i = split * lanes + lane; i < own_columns && first + i < cols; i += kThreads) {
    Acc total = 0;
#pragma unroll 8
    for (int s = 0; s < splits; s++) total += of_column[s * own_columns + i];
    out[first + i] = Param(total);
  }
}
