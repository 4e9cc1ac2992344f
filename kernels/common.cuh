// What all kernels share: element types, vectors in registers, reductions over lanes and threads, mbarriers.
//
// A translation unit is compiled once for each pair of dtypes (build.rs): LN_X is the type of x, y, dy and dx, LN_PARAM
// that of weight, bias, dweight and dbias. Entries are therefore named without a dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstddef>
#include <cstdint>

using X = LN_X;
using Param = LN_PARAM;

// Sums and statistics: f32, f64 for f64.
template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
using Acc = AccOf<X>::type;

// Elements in a 16-byte vector of x; single kernels take vectors of 1.
constexpr int kWide = 16 / sizeof(X);
// The same where weights pass as often as x: in a 16-byte vector of the wider of the two. Of f32 weights beside halves, a lane would have two vectors
// beside each of x, 32 bytes from the next lane's, and L1 would move twice what it needs.
constexpr int kNarrow = 16 / (sizeof(Param) > sizeof(X) ? sizeof(Param) : sizeof(X));
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

// Two elements of half precision in a word.
template <typename T> struct Two;
template <> struct Two<__half> {
  __device__ __forceinline__ static float low(uint32_t w) { return __low2float(reinterpret_cast<const __half2&>(w)); }
  __device__ __forceinline__ static float high(uint32_t w) { return __high2float(reinterpret_cast<const __half2&>(w)); }
  __device__ __forceinline__ static uint32_t of(float a, float b) {
    const __half2 h = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(h);
  }
};
template <> struct Two<__nv_bfloat16> {
  __device__ __forceinline__ static float low(uint32_t w) { return __uint_as_float(w << 16); }
  __device__ __forceinline__ static float high(uint32_t w) { return __uint_as_float(w & 0xffff0000u); }
  __device__ __forceinline__ static uint32_t of(float a, float b) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(h);
  }
};

__device__ __forceinline__ float rsqrt_acc(float v) { return __frsqrt_rn(v); }
__device__ __forceinline__ double rsqrt_acc(double v) { return rsqrt(v); }
// 1 / n for a count n > 0.
__device__ __forceinline__ Acc inverse(int n) {
  if constexpr (sizeof(Acc) == 4) return __frcp_rn(float(n));
  else return Acc(1) / n;
}

// ---- vectors --------------------------------------------------------------------------------------------------------

// kVec elements as they lie in memory, on 16 bytes or their size. Half precision stays in words: arrays of 2-byte elements are
// taken apart and put together again at every move.
template <typename T, int kVec, bool kWords = sizeof(T) == 2 && kVec % 2 == 0> struct Vec;
template <typename T, int kVec> struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec<T, kVec, false> {
  T v[kVec];
  __device__ __forceinline__ Acc operator[](int i) const { return widen(v[i]); }
  __device__ __forceinline__ static Vec of(const Acc (&f)[kVec]) {
    Vec r;
#pragma unroll
    for (int i = 0; i < kVec; i++) r.v[i] = T(f[i]);
    return r;
  }
  // As they are, and not to be widened before they are used.
  __device__ __forceinline__ void keep() {}
};
template <typename T, int kVec> struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec<T, kVec, true> {
  uint32_t w[kVec / 2];
  __device__ __forceinline__ Acc operator[](int i) const { return i % 2 ? Two<T>::high(w[i / 2]) : Two<T>::low(w[i / 2]); }
  __device__ __forceinline__ static Vec of(const Acc (&f)[kVec]) {
    Vec r;
#pragma unroll
    for (int i = 0; i < kVec / 2; i++) r.w[i] = Two<T>::of(f[2 * i], f[2 * i + 1]);
    return r;
  }
  // The compiler would widen, once, what stays in registers from row to row, into twice as many, and spill.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int i = 0; i < kVec / 2; i++) asm volatile("" : "+r"(w[i]));
  }
};

template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> filled(Acc value) {
  Acc f[kVec];
#pragma unroll
  for (int i = 0; i < kVec; i++) f[i] = value;
  return Vec<T, kVec>::of(f);
}

// The vector at p, or of zeros.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_vec(const T* p, bool valid = true) {
  Vec<T, kVec> r = filled<T, kVec>(0);
  if (valid) {
    if constexpr (sizeof(r) >= 16) {
      static_assert(sizeof(r) % 16 == 0, "whole 16-byte parts");
#pragma unroll
      for (int i = 0; i < int(sizeof(r) / 16); i++) reinterpret_cast<uint4*>(&r)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    } else {
      static_assert(kVec == 1, "16 bytes or an element");
      r.v[0] = __ldg(p);
    }
  }
  return r;
}

// The same, and each call loads. L2 keeps it as the policy says, but for single elements.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_vec(const T* p, bool valid, uint64_t policy) {
  if constexpr (sizeof(Vec<T, kVec>) == 16) {
    Vec<T, kVec> r = filled<T, kVec>(0);
    uint4& u = reinterpret_cast<uint4&>(r);
    if (valid)
      asm volatile("ld.global.nc.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "l"(p), "l"(policy));
    return r;
  } else {
    return load_vec<T, kVec>(p, valid);
  }
}

// As load_vec without a branch, so that vectors that may not be valid are in one basic block, where their loads overlap.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_vec_if(const T* p, bool valid) {
  Vec<T, kVec> r;
  if constexpr (sizeof(r) >= 16) {
#pragma unroll
    for (int i = 0; i < int(sizeof(r) / 16); i++) {
      uint4& u = reinterpret_cast<uint4*>(&r)[i];
      asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
                   " @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                   : "=&r"(u.x), "=&r"(u.y), "=&r"(u.z), "=&r"(u.w) : "l"(reinterpret_cast<const uint4*>(p) + i), "r"(uint32_t(valid)));
    }
    return r;
  } else {
    return load_vec<T, kVec>(p, valid);
  }
}
// Loads r, of 16 or 8 bytes, from p by `op`, or zeros.
#define LOAD_IF(op, r, p, valid, policy)                                                                               \
  if constexpr (sizeof(r) == 16) {                                                                                     \
    uint4& u = reinterpret_cast<uint4&>(r);                                                                            \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"   \
                 " @p " op ".v4.b32 {%0, %1, %2, %3}, [%4], %6; }"                                                     \
                 : "=&r"(u.x), "=&r"(u.y), "=&r"(u.z), "=&r"(u.w) : "l"(p), "r"(uint32_t(valid)), "l"(policy));        \
  } else {                                                                                                             \
    static_assert(sizeof(r) == 8, "16 or 8 bytes");                                                                    \
    uint2& u = reinterpret_cast<uint2&>(r);                                                                            \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p " op ".v2.b32 {%0, %1}, [%2], %4; }" \
                 : "=&r"(u.x), "=&r"(u.y) : "l"(p), "r"(uint32_t(valid)), "l"(policy));                                \
  }
// load_vec_if with a policy.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_vec_if(const T* p, bool valid, uint64_t policy) {
  if constexpr (kVec == 1) {
    return load_vec<T, 1>(p, valid);
  } else {
    Vec<T, kVec> r;
    LOAD_IF("ld.global.L2::cache_hint", r, p, valid, policy)
    return r;
  }
}

// How long L2 keeps what is loaded, copied or stored. x and dy, though read once, are to be evicted last: tensors that L2 does not hold pass
// to 5% faster so (README.md, "What L2 keeps").
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
__device__ __forceinline__ uint64_t evict_normal() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p));
  return p;
}
__device__ __forceinline__ uint64_t evict_last() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
}

// As load_vec_if, and the compiler keeps such loads in the order of the program. Others it moves behind the first use of those before them, if their
// own use is far: a warp then waits for memory twice.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_vec_in_order(const T* p, bool valid, uint64_t policy) {
  Vec<T, kVec> r;
  LOAD_IF("ld.relaxed.cta.global.L2::cache_hint", r, p, valid, policy)
  return r;
}
#undef LOAD_IF

// How far p is past 16 bytes, in bytes.
__device__ __forceinline__ uint32_t skew_of(const void* p) { return uint32_t(reinterpret_cast<uintptr_t>(p)) % 16; }
// The vector that starts `skew` bytes past the first of the words that it spans. kSkewWords: skew / 4, which moves no words then, or -1 if it is
// not known.
template <typename T, int kVec, int kSkewWords> struct Spanned {
  static constexpr int kWords = int(sizeof(Vec<T, kVec>)) / 4;
  uint32_t w[kWords + 4];

  __device__ __forceinline__ Vec<T, kVec> at(uint32_t skew) {
    if constexpr (kSkewWords < 0) {
#pragma unroll
      for (int i = 0; i < kWords + 2; i++) w[i] = skew & 8 ? w[i + 2] : w[i];
#pragma unroll
      for (int i = 0; i < kWords + 1; i++) w[i] = skew & 4 ? w[i + 1] : w[i];
    } else {
#pragma unroll
      for (int i = 0; i < kWords + 4 - kSkewWords; i++) w[i] = w[i + kSkewWords];
    }
    if constexpr (sizeof(T) == 2)
#pragma unroll
      for (int i = 0; i < kWords; i++) w[i] = __funnelshift_r(w[i], w[i + 1], 8 * (skew & 2));
    Vec<T, kVec> r;
#pragma unroll
    for (int i = 0; i < kWords; i++) reinterpret_cast<uint32_t*>(&r)[i] = w[i];
    return r;
  }
};
// As load_vec_if, of a vector that need not start on 16 bytes, from the aligned ones that it spans: kVec - 1 elements behind it can be
// read. kInOrder: as load_vec_in_order.
template <typename T, int kVec, int kSkewWords, bool kInOrder = false> __device__ __forceinline__ Vec<T, kVec> load_skewed_if(const T* p, bool valid) {
  Spanned<T, kVec, kSkewWords> spanned;
  const uint32_t skew = skew_of(p);
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(reinterpret_cast<uintptr_t>(p) - skew);
#pragma unroll
  for (int i = 0; i < spanned.kWords + 4; i += 4) {
    Vec<uint32_t, 4>& v = reinterpret_cast<Vec<uint32_t, 4>&>(spanned.w[i]);
    const bool spans = valid && (i < spanned.kWords || skew);
    if constexpr (kInOrder) v = load_vec_in_order<uint32_t, 4>(from + i, spans, evict_last());
    else v = load_vec_if<uint32_t, 4>(from + i, spans);
  }
  return spanned.at(skew);
}

// A vector of 16 bytes that need not start on 16, or zeros: by words, of which L1 has those of the lanes beside. One that spans an aligned vector and a
// part of the next takes twice the registers.
template <typename T, int kVec> __device__ __forceinline__ Vec<T, kVec> load_by_words_if(const T* p, bool valid, uint64_t policy) {
  Vec<T, kVec> r;
  static_assert(sizeof(r) == 16, "16 bytes");
  if constexpr (sizeof(T) == 8) {
    uint2* const u = reinterpret_cast<uint2*>(&r);
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
                 " @p ld.global.nc.L2::cache_hint.v2.b32 {%0, %1}, [%4], %6; @p ld.global.nc.L2::cache_hint.v2.b32 {%2, %3}, [%4+8], %6; }"
                 : "=&r"(u[0].x), "=&r"(u[0].y), "=&r"(u[1].x), "=&r"(u[1].y) : "l"(p), "r"(uint32_t(valid)), "l"(policy));
  } else {
    uint32_t* const u = reinterpret_cast<uint32_t*>(&r);
    const uint32_t before = sizeof(T) == 2 ? skew_of(p) % 4 : 0;
    const unsigned char* const from = reinterpret_cast<const unsigned char*>(p) - before;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
                 " @p ld.global.nc.L2::cache_hint.b32 %0, [%4], %6; @p ld.global.nc.L2::cache_hint.b32 %1, [%4+4], %6;"
                 " @p ld.global.nc.L2::cache_hint.b32 %2, [%4+8], %6; @p ld.global.nc.L2::cache_hint.b32 %3, [%4+12], %6; }"
                 : "=&r"(u[0]), "=&r"(u[1]), "=&r"(u[2]), "=&r"(u[3]) : "l"(from), "r"(uint32_t(valid)), "l"(policy));
    if constexpr (sizeof(T) == 2) {
      uint32_t behind;
      asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.L2::cache_hint.b32 %0, [%1+16], %3; }"
                   : "=&r"(behind) : "l"(from), "r"(uint32_t(valid && before)), "l"(policy));
#pragma unroll
      for (int i = 0; i < 4; i++) u[i] = __funnelshift_r(u[i], i < 3 ? u[i + 1] : behind, 8 * before);
    }
  }
  return r;
}

// A vector that starts kSkip elements past 16 bytes, as the aligned ones that it spans: no instruction moves what is in them. Loaded in order.
template <typename T, int kVec, int kSkip> struct SkippedVec {
  static constexpr int kVectors = int(sizeof(T)) * kVec / 16 + (kSkip > 0);
  Vec<uint32_t, 4> spanned[kVectors];

  __device__ __forceinline__ static SkippedVec load(const T* p, bool valid) {
    SkippedVec r;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
      r.spanned[i] = load_vec_in_order<uint32_t, 4>(reinterpret_cast<const uint32_t*>(p - kSkip) + 4 * i, valid, evict_last());
    return r;
  }
  __device__ __forceinline__ Acc operator[](int i) const {
    static_assert(sizeof(T) == 2, "half precision");
    const uint32_t w = reinterpret_cast<const uint32_t*>(spanned)[(kSkip + i) / 2];
    return (kSkip + i) % 2 ? Two<T>::high(w) : Two<T>::low(w);
  }
};

// The vector at column c of a weight or bias that may be absent.
template <int kVec> __device__ __forceinline__ Vec<Param, kVec> load_param(const Param* p, int c, float absent, bool valid = true) {
  return p ? load_vec<Param, kVec>(p + c, valid) : filled<Param, kVec>(absent);
}

// The vector at column c of a weight. `offset`: 0, or 1 for a weight that is centred at 0, which is added in the accumulation type: here
// where weights have it, else at each use.
constexpr bool kOffsetOnLoad = sizeof(Param) == sizeof(Acc);
template <int kVec> __device__ __forceinline__ Vec<Param, kVec> with_offset(Vec<Param, kVec> w, Acc offset) {
  if constexpr (kOffsetOnLoad) {
#pragma unroll
    for (int i = 0; i < kVec; i++) w.v[i] += offset;
  }
  return w;
}
__device__ __forceinline__ Acc weight_of(Acc w, Acc offset) { return kOffsetOnLoad ? w : w + offset; }
// An offset that is known to be 0: the addition, of two for an element backward, is a tenth of the work of half precision.
struct NoOffset {};
__device__ __forceinline__ Acc weight_of(Acc w, NoOffset) { return w; }
template <bool kNone> __device__ __forceinline__ auto known_offset(Acc offset) {
  if constexpr (kNone) return NoOffset();
  else return offset;
}
template <int kVec> __device__ __forceinline__ Vec<Param, kVec> load_weight(const Param* p, int c, Acc offset, bool valid = true) {
  return with_offset<kVec>(load_param<kVec>(p, c, 1, valid), offset);
}

__device__ __forceinline__ void prefetch_if(const void* p, bool valid) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p prefetch.global.L2 [%0]; }" ::"l"(p), "r"(uint32_t(valid)));
}

// Stores y or dx. A predicated store keeps vectors that may not be valid in one basic block, where their latencies overlap.
template <typename T, int kVec> __device__ __forceinline__ void store(T* p, const Vec<T, kVec>& r, bool valid) {
  if constexpr (sizeof(r) == 16) {
    const uint4& u = reinterpret_cast<const uint4&>(r);
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(p), "r"(u.x), "r"(u.y),
                 "r"(u.z), "r"(u.w), "r"(uint32_t(valid)));
  } else if constexpr (sizeof(r) == 8 && kVec > 1) {
    const uint2& u = reinterpret_cast<const uint2&>(r);
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(p), "r"(u.x), "r"(u.y), "r"(uint32_t(valid)));
  } else if (valid) {
    *reinterpret_cast<Vec<T, kVec>*>(p) = r;
  }
}

template <typename T, int kVec> __device__ __forceinline__ void store(T* p, const Acc (&f)[kVec], bool valid = true) {
  store(p, Vec<T, kVec>::of(f), valid);
}
template <typename T, int kVec> __device__ __forceinline__ void store(T* p, const Acc (&f)[kVec], bool valid, uint64_t policy) {
  const Vec<T, kVec> r = Vec<T, kVec>::of(f);
  static_assert(sizeof(r) == 16, "16 bytes");
  const uint4& u = reinterpret_cast<const uint4&>(r);
  if (valid)
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(u.x), "r"(u.y), "r"(u.z), "r"(u.w), "l"(policy));
}

// Sums over rows, 16 bytes at a time where vectors are.
template <int kVec> __device__ __forceinline__ void store_acc(Acc* p, const Acc (&f)[kVec]) {
  constexpr int kPart = kVec == 1 ? 1 : 16 / sizeof(Acc);
  static_assert(kVec % kPart == 0, "whole parts");
#pragma unroll
  for (int i = 0; i < kVec; i += kPart) {
    Vec<Acc, kPart> v;
#pragma unroll
    for (int j = 0; j < kPart; j++) v.v[j] = f[i + j];
    *reinterpret_cast<Vec<Acc, kPart>*>(p + i) = v;
  }
}

// From one row of partial sums over rows to the next, which starts on 16 bytes too.
__device__ __forceinline__ int part_step(int cols) {
  constexpr int kStep = 16 / sizeof(Acc);
  return (cols + kStep - 1) / kStep * kStep;
}

// Whole vectors of each of rows that do not start on 16 bytes: less than kWide columns come before them, kWide - 1 or more behind.
__device__ __forceinline__ int shifted_vectors(int cols) { return uint32_t(max(cols - 2 * (kWide - 1), 0)) / kWide; }

// Sums over rows that start in several ways, and that blocks share. Where an owner goes on to rows with more columns before the first vector, the
// first columns of a chunk of 32 vectors, and of those behind the last vector, are another's, who goes on from 0. What was summed of them stays
// here, behind the owner's row of partial sums: kWide places for each chunk, and as many for the columns behind the last vector.
struct Edges {
  static constexpr int kChunk = kWarp * kWide;
  int vectors;

  __device__ __forceinline__ static Edges of(int cols) { return {shifted_vectors(cols)}; }
  __device__ __forceinline__ int behind() const { return (vectors + kWarp - 1) / kWarp * kWide; }
  __device__ __forceinline__ int count() const { return behind() + kWide; }
  // A column's place, or a vector's of columns from there on; or -1.
  __device__ __forceinline__ int place(int column) const {
    const int beyond = column - vectors * kWide;
    if (beyond >= 0) return beyond < kWide ? behind() + beyond : -1;
    return column % kChunk < kWide ? column / kChunk * kWide + column % kChunk : -1;
  }
};

// ---- launches -------------------------------------------------------------------------------------------------------

// Lets the next kernel on the stream be launched as soon as all blocks of this one are running, if it was queued to allow that; it waits
// for this one's results with wait_for_previous.
__device__ __forceinline__ void launch_next() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- reductions -----------------------------------------------------------------------------------------------------

// Sum over aligned groups of `lanes` lanes (a power of 2); all 32 lanes must call it. No shared memory.
__device__ __forceinline__ Acc warp_sum(Acc v, int lanes = kWarp) {
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1)
    if (o < lanes) v += __shfl_xor_sync(kFull, v, o);
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

// Of several values at once: their shuffles overlap.
template <int kValues> __device__ __forceinline__ void warp_sums(Acc (&v)[kValues], int lanes = kWarp) {
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1)
    if (o < lanes)
#pragma unroll
      for (int i = 0; i < kValues; i++) v[i] += __shfl_xor_sync(kFull, v[i], o);
}
template <int kValues> __device__ __forceinline__ void warp_sums(Pair (&p)[kValues], int lanes = kWarp) {
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1)
    if (o < lanes)
#pragma unroll
      for (int i = 0; i < kValues; i++) p[i] = p[i] + Pair{__shfl_xor_sync(kFull, p[i].a, o), __shfl_xor_sync(kFull, p[i].b, o)};
}

// mean and the sum of squared deviations of `count` values; merges by Chan et al. (1979).
struct Moments {
  Acc mean, m2;
};

// Of all pieces that the warp's lanes hold, kPer each: (mean - center, m2) of `counts` values. Differences from a center that is one of
// the means are exact or nearly so where mean >> std, and rounding to the mean happens once. All lanes get the same bits.
template <int kPer>
__device__ __forceinline__ Moments merge_moments(Acc center, const Pair (&piece)[kPer], const Acc (&counts)[kPer], Acc inv_count) {
  Acc rest = 0, m2 = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) rest += counts[i] > 0 ? piece[i].a * counts[i] : Acc(0);
  rest = warp_sum(rest) * inv_count;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    const Acc d = piece[i].a - rest;
    m2 += counts[i] > 0 ? piece[i].b + d * d * counts[i] : Acc(0);
  }
  return {center + rest, warp_sum(m2)};
}
// Of pieces (mean, m2).
template <int kPer> __device__ __forceinline__ Moments merge_moments(const Pair (&piece)[kPer], const Acc (&counts)[kPer], Acc inv_count) {
  const Acc center = __shfl_sync(kFull, piece[0].a, 0);
  Pair about[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) about[i] = {piece[i].a - center, piece[i].b};
  return merge_moments(center, about, counts, inv_count);
}

// From the sums of (x - center) and (x - center)^2: (mean - center, m2). What is left of the mean after `center` corrects both, so that
// mean >> std costs no accuracy although `center` was summed in the accumulation type.
__device__ __forceinline__ Pair about_center(Pair sums, Acc inv_count, bool remove_mean) {
  if (!remove_mean) return {0, sums.b};
  const Acc rest = sums.a * inv_count, m2 = sums.b - sums.a * rest;
  // A NaN must reach the output: not fmax.
  return {rest, m2 < 0 ? Acc(0) : m2};
}

// ---- asynchronous copies and mbarriers ------------------------------------------------------------------------------

// Shared memory by address: an address in a register is worked out once, a variable's again at each use.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

template <typename T> __device__ __forceinline__ T load_shared(uint32_t a) {
  T r;
  if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(reinterpret_cast<uint16_t&>(r)) : "r"(a) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(r)) : "r"(a) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2& u = reinterpret_cast<uint2&>(r);
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(u.x), "=r"(u.y) : "r"(a) : "memory");
  } else {
    static_assert(sizeof(T) % 16 == 0, "parts of 16");
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 16); i++) {
      uint4& u = reinterpret_cast<uint4*>(&r)[i];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "r"(a + 16 * i) : "memory");
    }
  }
  return r;
}
template <typename T> __device__ __forceinline__ void store_shared(uint32_t a, const T& v, bool by_this_lane) {
  if constexpr (sizeof(T) == 2) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.u16 [%0], %1; }" ::"r"(a), "h"(reinterpret_cast<const uint16_t&>(v)),
                 "r"(uint32_t(by_this_lane))
                 : "memory");
  } else if constexpr (sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 16); i++) {
      const uint4& u = reinterpret_cast<const uint4*>(&v)[i];
      asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.shared.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"r"(a + 16 * i), "r"(u.x), "r"(u.y),
                   "r"(u.z), "r"(u.w), "r"(uint32_t(by_this_lane))
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); i++)
      asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.b32 [%0], %1; }" ::"r"(a + 4 * i),
                   "r"(reinterpret_cast<const uint32_t*>(&v)[i]), "r"(uint32_t(by_this_lane))
                   : "memory");
  }
}

// Copies kBytes through L1, of which L2 keeps as the policy says.
template <int kBytes> __device__ __forceinline__ void copy_async_by_l1(uint32_t to, const void* from, uint64_t policy) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "l"(policy) : "memory");
}
// The same, or writes zeros and reads nothing.
template <int kBytes> __device__ __forceinline__ void copy_async_by_l1(uint32_t to, const void* from, bool valid, uint64_t policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3, %4;" ::"r"(to), "l"(from), "n"(kBytes), "r"(valid ? kBytes : 0), "l"(policy)
               : "memory");
}
// As these, past L1 if it is 16 bytes and not `by_l1`. Predicated: a branch would part the copies from the arithmetic that hides them.
template <int kBytes> __device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid, bool by_l1, uint64_t policy) {
  if constexpr (kBytes == 16)
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %4, 0; @p cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3; "
        "@!p cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3; }" ::"r"(to), "l"(from), "r"(valid ? 16 : 0), "l"(policy),
        "r"(uint32_t(by_l1))
        : "memory");
  else copy_async_by_l1<kBytes>(to, from, valid, policy);
}
template <int kBytes> __device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool by_l1, uint64_t policy) {
  if constexpr (kBytes == 16)
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %3, 0; @p cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 16, %2; "
        "@!p cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2; }" ::"r"(to), "l"(from), "l"(policy), "r"(uint32_t(by_l1))
        : "memory");
  else copy_async_by_l1<kBytes>(to, from, policy);
}
// Of the launch, in bytes.
__device__ __forceinline__ uint32_t dynamic_shared() {
  uint32_t bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster, and to asynchronous copies.
__device__ __forceinline__ void barrier_init_fence() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive(uint32_t b, bool by_this_lane) {
  asm volatile("{ .reg .pred p; .reg .b64 t; setp.ne.u32 p, %1, 0; @p mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(b),
               "r"(uint32_t(by_this_lane))
               : "memory");
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define WAIT_OP "mbarrier.try_wait.parity"
#else
#define WAIT_OP "mbarrier.test_wait.parity"
#endif
__device__ __forceinline__ void barrier_wait(uint32_t b, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; " WAIT_OP ".shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(b), "r"(parity) : "memory");
  } while (!done);
}
#undef WAIT_OP

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
__device__ __forceinline__ uint32_t address_in(uint32_t rank, uint32_t p) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(p), "r"(rank));
  return r;
}
__device__ __forceinline__ void barrier_expect(uint32_t b, uint32_t bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(b), "r"(bytes) : "memory");
}
// For a barrier that other blocks of the cluster complete. Its wider scope discards the L1 cache: not where barrier_wait will do.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t b, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(b), "r"(parity) : "memory");
  } while (!done);
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
