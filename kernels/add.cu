// The residual add in a launch of its own, beside a norm whose kernels do not add: long rows, and rows that do not start on 16 bytes.
//
// Computes      add_forward: sum = residual + dropout(x). add_backward: dresidual = d + dsum, dx = dropout(d + dsum), where d is what dx
//               held, the norm's gradient of the sum, or nothing if not `norm`.
// Bytes moved   3 * n * sizeof(X); backward 4 * n * sizeof(X) with dropout. As a part of the norm's kernels, 2 and 1 or 2 fewer.
// Launch        block kThreads, any grid; vectors: n / kWide, or 0 where a pointer does not lie on 16 bytes. dsum and dresidual may be
//               null.
#include "add.cuh"

constexpr int kThreads = 256;

// f of each vector, then of each element that is left, over the threads of the grid.
template <typename F> __device__ __forceinline__ void for_each(int64_t n, int64_t vectors, const F& f) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
#pragma unroll 2
  for (int64_t v = thread; v < vectors; v += threads) f.template operator()<kWide>(v * kWide);
  for (int64_t i = vectors * kWide + thread; i < n; i += threads) f.template operator()<1>(i);
}

struct AddForward {
  X* sum;
  const X *x, *residual;
  Dropout dropout;
  template <int kVec> __device__ __forceinline__ void operator()(int64_t at) const {
    Vec<X, kVec> v = load_vec<X, kVec>(x + at);
    add_residual(v, load_vec<X, kVec>(residual + at), dropout, at);
    *reinterpret_cast<Vec<X, kVec>*>(sum + at) = v;
  }
};
struct AddBackward {
  X *dx, *dresidual;
  const X* dsum;
  bool norm;
  Dropout dropout;
  template <int kVec> __device__ __forceinline__ void operator()(int64_t at) const {
    Vec<X, kVec> v = filled<X, kVec>(0);
    // Not by the read-only path: it is written below.
    if (norm) v = *reinterpret_cast<const Vec<X, kVec>*>(dx + at);
    Acc f[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i++) f[i] = v[i];
    add_gradient(f, load_vec<X, kVec>(dsum + at, dsum), dresidual, dropout, at, true);
    store<X, kVec>(dx + at, f);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    add_forward(X* __restrict__ sum /* [n] */, const X* __restrict__ x /* [n] */, const X* __restrict__ residual /* [n] */, int64_t n,
                int64_t vectors, DROPOUT_ARGUMENTS) {
  for_each(n, vectors, AddForward{sum, x, residual, DROPOUT});
}
extern "C" __global__ void __launch_bounds__(kThreads)
    add_backward(X* __restrict__ dx /* [n] */, X* __restrict__ dresidual /* [n] */, const X* __restrict__ dsum /* [n] */, int norm,
                 int64_t n, int64_t vectors, DROPOUT_ARGUMENTS) {
  for_each(n, vectors, AddBackward{dx, dresidual, dsum, norm != 0, DROPOUT});
}
