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

// Choices made at compile time, passed as arguments.
struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

struct alignas(2 * sizeof(Acc)) Pair {
  Acc a, b;
};
__device__ __forceinline__ Pair operator+(Pair p, Pair q) { return {p.a + q.a, p.b + q.b}; }

// ---- elements -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> struct Half2;
template <> struct Half2<__half> { using type = __half2; };
template <> struct Half2<__nv_bfloat16> { using type = __nv_bfloat162; };
__device__ __forceinline__ __half2 narrow2(float a, float b, __half2*) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __nv_bfloat162 narrow2(float a, float b, __nv_bfloat162*) { return __floats2bfloat162_rn(a, b); }

__device__ __forceinline__ float rsqrt_acc(float v) { return __frsqrt_rn(v); }
__device__ __forceinline__ double rsqrt_acc(double v) { return rsqrt(v); }

// ---- vectors --------------------------------------------------------------------------------------------------------

// kVec elements as they lie in memory. A vector of 32 bytes (f32 weight beside 8 half elements) is two of 16.
template <typename T, int kVec> struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec {
  T v[kVec];
  __device__ __forceinline__ Acc operator[](int i) const { return widen(v[i]); }
};

template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_vec(const T* p) {
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
  if (p) return load_vec<Param, kVec>(p + c);
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

// Both sums at little more than the price of one: the lower half of the lanes goes on with a, the upper with b. Returns the sum
// that the lane's half has.
__device__ __forceinline__ Acc warp_sum_by_halves(Pair p, int lanes = kWarp) {
  const bool upper = threadIdx.x & lanes / 2;
  const Acc v = (upper ? p.b : p.a) + __shfl_xor_sync(kFull, upper ? p.a : p.b, lanes / 2);
  return warp_sum(v, lanes / 2);
}
// Gives all lanes both.
__device__ __forceinline__ Pair from_halves(Acc v, int lanes = kWarp) {
  const Acc other = __shfl_xor_sync(kFull, v, lanes / 2);
  return threadIdx.x & lanes / 2 ? Pair{other, v} : Pair{v, other};
}
// `lanes` >= 2.
__device__ __forceinline__ Pair warp_sum(Pair p, int lanes = kWarp) { return from_halves(warp_sum_by_halves(p, lanes), lanes); }

// A warp's part of a sum over several warps: lane 0 leaves a, lane 16 b.
__device__ __forceinline__ void leave_part(Pair& part, Acc half) {
  if (threadIdx.x % (kWarp / 2) == 0) (threadIdx.x % kWarp ? part.b : part.a) = half;
}
// The sum of the first `count` of kParts parts, for all lanes.
template <int kParts> __device__ __forceinline__ Pair sum_parts(const Pair (&part)[kParts], int count) {
  static_assert(kParts % (kWarp / 2) == 0, "whole halves of a warp");
  const int lane = threadIdx.x % (kWarp / 2);
  const Acc* const own = threadIdx.x & kWarp / 2 ? &part[lane].b : &part[lane].a;
  Acc v = 0;
#pragma unroll
  for (int i = 0; i < kParts; i += kWarp / 2)
    if (i + lane < count) v += own[2 * i];
  return from_halves(warp_sum(v, kWarp / 2));
}

// Sum over the block, in one order; all threads must call it and get the result. Uses `part`, one slot a warp, with one
// barrier inside and none at the end: the next call must use other slots.
__device__ __forceinline__ Pair block_sum(Pair p, Pair (&part)[kWarp]) {
  leave_part(part[threadIdx.x / kWarp], warp_sum_by_halves(p));
  __syncthreads();
  return sum_parts(part, blockDim.x / kWarp);
}
__device__ __forceinline__ Acc block_sum(Acc v, Pair (&part)[kWarp]) {
  v = warp_sum(v);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) part[threadIdx.x / kWarp].a = v;
  __syncthreads();
  return warp_sum(lane < int(blockDim.x / kWarp) ? part[lane].a : Acc(0));
}

// mean and the sum of squared deviations of `count` values; merges by Chan et al. (1979).
struct Moments {
  Acc mean, m2;
};

// From the sums of (x - center) and (x - center)^2. What is left of the mean after `center` corrects both, so that
// mean >> std costs no accuracy although `center` was summed in the accumulation type.
__device__ __forceinline__ Moments moments_about(Acc center, Pair sums, Acc inv_count, bool remove_mean) {
  if (!remove_mean) return {0, sums.b};
  const Acc rest = sums.a * inv_count;
  const Acc m2 = sums.b - sums.a * rest;
  // A NaN must reach the output: not fmax.
  return {center + rest, m2 < 0 ? Acc(0) : m2};
}

// ---- asynchronous copies and mbarriers ------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies kBytes, or writes zeros and reads nothing.
template <int kBytes> __device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes) : "memory");
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
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Writes a value into another block's shared memory and counts its bytes on that block's barrier.
__device__ __forceinline__ void send(uint32_t to, Acc v, uint32_t barrier) {
  if constexpr (sizeof(Acc) == 4)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(float(v)), "r"(barrier)
                 : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];" ::"r"(to), "d"(double(v)), "r"(barrier)
                 : "memory");
}
#endif
