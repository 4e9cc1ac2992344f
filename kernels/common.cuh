// What all kernels share: element types, vectors in registers, reductions over lanes and threads, mbarriers.
//
// A translation unit is compiled once for each pair of dtypes (build.rs): LN_X is the type of x, y, dy and dx, LN_PARAM
// that of weight, bias, dweight and dbias. Entries are therefore named without a dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

using X = LN_X;
using Param = LN_PARAM;

// Sums and statistics: f32, f64 for f64.
template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
using Acc = AccOf<X>::type;

// Elements in a 16-byte vector of x. Rows that do not start on 16 bytes take the same kernels with vectors of 1.
constexpr int kWide = 16 / sizeof(X);
constexpr int kWarp = 32;
constexpr unsigned kFull = 0xffffffffu;

struct alignas(2 * sizeof(Acc)) Pair {
  Acc a, b;
};
__device__ __forceinline__ Pair operator+(Pair p, Pair q) { return {p.a + q.a, p.b + q.b}; }

// ---- elements -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ __forceinline__ T narrow(Acc v);
template <> __device__ __forceinline__ Acc narrow<Acc>(Acc v) { return v; }
template <typename T> struct Half2;
template <> struct Half2<__half> { using type = __half2; };
template <> struct Half2<__nv_bfloat16> { using type = __nv_bfloat162; };
__device__ __forceinline__ __half2 narrow2(float a, float b, __half2*) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __nv_bfloat162 narrow2(float a, float b, __nv_bfloat162*) { return __floats2bfloat162_rn(a, b); }

__device__ __forceinline__ float rsqrt_acc(float v) { return 1.f / sqrtf(v); }
__device__ __forceinline__ double rsqrt_acc(double v) { return 1. / sqrt(v); }

// ---- vectors --------------------------------------------------------------------------------------------------------

// kVec elements as they lie in memory. A vector of 32 bytes (f32 weight beside 8 half elements) is two of 16.
template <typename T, int kVec> struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec {
  T v[kVec];
  __device__ __forceinline__ Acc operator[](int i) const { return widen(v[i]); }
};

// x, dy: read once, so kept out of L1, which is left to weight and bias.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_once(const T* p) {
  Vec<T, kVec> r;
  if constexpr (sizeof(r) == 16) {
    uint4 u;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "l"(p));
    r = *reinterpret_cast<Vec<T, kVec>*>(&u);
  } else {
    static_assert(kVec == 1, "a vector is 16 bytes or one element");
    r.v[0] = __ldg(p);
  }
  return r;
}

// weight, bias: shared by all rows.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_shared_by_rows(const T* p) {
  Vec<T, kVec> r;
  if constexpr (sizeof(r) >= 16) {
    static_assert(sizeof(r) % 16 == 0, "whole 16-byte parts");
#pragma unroll
    for (int i = 0; i < int(sizeof(r) / 16); i++) reinterpret_cast<uint4*>(&r)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i++) r.v[i] = __ldg(p + i);
  }
  return r;
}

// The vector at column c of a weight or bias that may be absent.
template <int kVec> __device__ __forceinline__ Vec<Param, kVec> load_param(const Param* p, int c, float absent) {
  if (p) return load_shared_by_rows<Param, kVec>(p + c);
  Vec<Param, kVec> r;
#pragma unroll
  for (int i = 0; i < kVec; i++) r.v[i] = Param(absent);
  return r;
}

template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> narrow_vec(const Acc (&f)[kVec]) {
  Vec<T, kVec> r;
  if constexpr (sizeof(T) == 2 && kVec % 2 == 0) {
    using T2 = typename Half2<T>::type;
#pragma unroll
    for (int i = 0; i < kVec; i += 2) *reinterpret_cast<T2*>(&r.v[i]) = narrow2(f[i], f[i + 1], static_cast<T2*>(nullptr));
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i++) r.v[i] = T(f[i]);
  }
  return r;
}

// y, dx: not read again by this kernel.
template <typename T, int kVec> __device__ __forceinline__ void store(T* p, const Acc (&f)[kVec]) {
  const Vec<T, kVec> r = narrow_vec<T, kVec>(f);
  *reinterpret_cast<Vec<T, kVec>*>(p) = r;
}

// ---- reductions -----------------------------------------------------------------------------------------------------

// Sum over aligned groups of `lanes` lanes (a power of 2); all 32 lanes must call it. No shared memory.
__device__ __forceinline__ Acc warp_sum(Acc v, int lanes = kWarp) {
  for (int o = lanes / 2; o; o >>= 1) v += __shfl_xor_sync(kFull, v, o);
  return v;
}
__device__ __forceinline__ Pair warp_sum(Pair p, int lanes = kWarp) {
  for (int o = lanes / 2; o; o >>= 1) {
    p.a += __shfl_xor_sync(kFull, p.a, o);
    p.b += __shfl_xor_sync(kFull, p.b, o);
  }
  return p;
}

// Sum over the block, in the order of its warps; all threads must call it and get the result. Uses `part`, one slot a
// warp, with one barrier inside and none at the end: the next call must use other slots.
__device__ __forceinline__ Pair block_sum(Pair p, Pair (&part)[kWarp]) {
  p = warp_sum(p);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = p;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < int(blockDim.x / kWarp) ? part[lane] : Pair{0, 0});
}

// mean and the sum of squared deviations of `count` values; merges by Chan et al. (1979).
struct Moments {
  Acc mean, m2;
};

// From the sums of (x - center) and (x - center)^2. What is left of the mean after `center` corrects both, so that
// mean >> std costs no accuracy although `center` was summed in the accumulation type.
__device__ __forceinline__ Moments moments_about(Acc center, Pair sums, Acc count, bool remove_mean) {
  if (!remove_mean) return {0, sums.b};
  const Acc rest = sums.a / count;
  const Acc m2 = sums.b - sums.a * rest;
  // A NaN must reach the output: not fmax.
  return {center + rest, m2 < 0 ? Acc(0) : m2};
}

// ---- asynchronous copies and mbarriers ------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

template <int kBytes> __device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  if constexpr (kBytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, uint32_t parity) {
  uint32_t done;
  do {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
#endif
  } while (!done);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
// Orders what the cluster's threads wrote before against what they read after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of block `rank`'s copy of a shared variable.
__device__ __forceinline__ uint32_t address_in(uint32_t rank, const void* p) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
  return r;
}
__device__ __forceinline__ void store_remote(uint32_t to, Pair p) {
  if constexpr (sizeof(Acc) == 4)
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};" ::"r"(to), "f"(float(p.a)), "f"(float(p.b)) : "memory");
  else
    asm volatile("st.shared::cluster.v2.f64 [%0], {%1,%2};" ::"r"(to), "d"(double(p.a)), "d"(double(p.b)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Writes a pair into another block's shared memory and counts its bytes on that block's barrier.
__device__ __forceinline__ void send(uint32_t to, Pair p, uint32_t barrier) {
  if constexpr (sizeof(Acc) == 4)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(to), "f"(float(p.a)),
                 "f"(float(p.b)), "r"(barrier) : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f64 [%0], {%1,%2}, [%3];" ::"r"(to), "d"(double(p.a)),
                 "d"(double(p.b)), "r"(barrier) : "memory");
}
#endif
