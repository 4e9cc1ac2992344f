// What kernels take, what a thread holds of a row, and what it computes of it: `Slice` forward, `Columns` backward.
#pragma once
#include "common.cuh"

// What the kernels with LN_ADD take besides, and do: see add.cuh. The others do nothing there.
#ifdef LN_ADD
#include "add.cuh"
#define FORWARD_ADD_ARGUMENTS                                                                                          \
  , X *__restrict__ sum /* [rows, cols] */, const X *__restrict__ residual /* [rows, cols] */, DROPOUT_ARGUMENTS
#define FORWARD_ADD_PASS , ForwardAdd{sum, residual, DROPOUT}
#define BACKWARD_ADD_ARGUMENTS                                                                                         \
  , X *__restrict__ dresidual /* [rows, cols] */, const X *__restrict__ dsum /* [rows, cols] */, DROPOUT_ARGUMENTS
#define BACKWARD_ADD_PASS , BackwardAdd{dresidual, dsum, DROPOUT}
struct ForwardAdd {
  X* sum;
  const X* residual;
  Dropout dropout;
};
struct BackwardAdd {
  X* dresidual;
  const X* dsum;
  Dropout dropout;
};
#else
#define FORWARD_ADD_ARGUMENTS
#define FORWARD_ADD_PASS , {}
#define BACKWARD_ADD_ARGUMENTS
#define BACKWARD_ADD_PASS , {}
struct ForwardAdd {};
struct BackwardAdd {};
#endif

// Whether x and dy need not start on 16 bytes, nor as y and dx do.
#ifdef LN_SKEWED
constexpr bool kSkewed = true;
#else
constexpr bool kSkewed = false;
#endif

// What every kernel of a pass takes, but those of split.cu, and what it passes on.
#define FORWARD_BASE                                                                                                   \
  X *__restrict__ y /* [rows, cols] */, Acc *__restrict__ mean /* [rows] */, Acc *__restrict__ rstd /* [rows] */,       \
      const X *__restrict__ x /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                       \
      const Param *__restrict__ bias /* [cols] */, int64_t rows, int cols, Acc eps, int remove_mean, Acc weight_offset
#define FORWARD_ARGUMENTS FORWARD_BASE FORWARD_ADD_ARGUMENTS
#define FORWARD_TAKES FORWARD_BASE, const ForwardAdd &added
#define FORWARD_PASS y, mean, rstd, x, weight, bias, rows, cols, eps, remove_mean, weight_offset FORWARD_ADD_PASS
#define BACKWARD_BASE                                                                                                  \
  X *__restrict__ dx /* [rows, cols] */, Acc *__restrict__ dweight_part /* [owners, cols], rows part_step, and any Edges, apart */,          \
      Acc *__restrict__ dbias_part /* as dweight_part */,                       const X *__restrict__ x /* [rows, cols] */,                   \
      const X *__restrict__ dy /* [rows, cols] */, const Param *__restrict__ weight /* [cols] */,                      \
      const Acc *__restrict__ mean /* [rows] */, const Acc *__restrict__ rstd /* [rows] */, int64_t rows, int cols,    \
      int remove_mean, Acc weight_offset
#define BACKWARD_ARGUMENTS BACKWARD_BASE BACKWARD_ADD_ARGUMENTS
#define BACKWARD_TAKES BACKWARD_BASE, const BackwardAdd &added
#define BACKWARD_PASS dx, dweight_part, dbias_part, x, dy, weight, mean, rstd, rows, cols, remove_mean, weight_offset BACKWARD_ADD_PASS

// Gives xhat of a row; 0 exactly where x is the mean, as x * rstd - mean * rstd would not be.
struct alignas(sizeof(Acc) * 2) Normalizer {
  Acc mean, rstd;
  __device__ __forceinline__ Acc xhat(Acc x) const { return (x - mean) * rstd; }
  // The same where zeros may stand for columns that are not there: mean * rstd overflows in rows of equal values alone, and their xhat
  // is 0. An infinite rstd is NaN.
  __device__ __forceinline__ Normalizer of_padded() const { return {mean, rstd * Acc(isfinite(mean * rstd))}; }
};

// A value that is no outlier unless two of three are.
__device__ __forceinline__ Acc median(Acc a, Acc b, Acc c) { return max(min(a, b), min(max(a, b), c)); }

// kPer vectors of a row, a thread's own; those past the row are zero, and no sum counts them. No branches: they would keep loads and
// arithmetic of different vectors apart. kInOrder: as load_vec_in_order, so that what the program asks for before is on its way by the first use.
template <int kVec, int kPer, bool kInOrder = false> struct Slice {
  static constexpr int kVectors = kPer;
  // The distance of rows that a thread may hold together.
  static constexpr int kApart = 1, kMostOuter = 0;
  Vec<X, kVec> v[kPer];

  // Vector k of thread t of `threads` starts at column (k * threads + t) * kVec.
  __device__ __forceinline__ void load(const X* row, int t, int threads, int cols, uint64_t policy, uint32_t = 0) {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kVec;
      if constexpr (kInOrder) v[k] = load_vec_in_order<X, kVec>(row + c, c < cols, policy);
      else v[k] = load_vec_if<X, kVec>(row + c, c < cols, policy);
    }
  }
  // x, which was loaded, becomes the sum with the residual, and the sum is stored. `at` is where the row starts in its tensor.
  __device__ __forceinline__ void add(const ForwardAdd& added, int64_t at, int t, int threads, int cols) {
#ifdef LN_ADD
    Slice residual;
    residual.load(added.residual + at, t, threads, cols, evict_last());
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int c = (k * threads + t) * kVec;
      add_residual(v[k], residual.v[k], added.dropout, at + c);
      store(added.sum + at + c, v[k], c < cols);
    }
#endif
  }
  // Of each thread's first 16 bytes, or first element, and how many columns these are.
  static constexpr int kFirst = kVec > 1 ? kWide / kVec : 1;
  __device__ __forceinline__ Acc sum_of_first() const {
    Acc s = 0;
#pragma unroll
    for (int k = 0; k < kFirst; k++)
#pragma unroll
      for (int i = 0; i < kVec; i++) s += v[k][i];
    return s;
  }
  __device__ __forceinline__ int columns_of_first(int threads, int cols) const { return min(cols, threads * kVec * kFirst); }
  // The sums of (x - center) and (x - center)^2.
  __device__ __forceinline__ Pair sums(Acc center, int t, int threads, int cols) const {
    Pair s = {0, 0};
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const Acc from = (k * threads + t) * kVec < cols ? center : Acc(0);
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        const Acc d = v[k][i] - from;
        s.a += d;
        s.b += d * d;
      }
    }
    return s;
  }
};

// The same of a row that need not start on 16 bytes: whole vectors of memory, each followed by kVec - 1 elements of the row, and before and
// behind them less than 3 * kVec elements, of which a thread has one. Weight and bias, which start elsewhere, are loaded freely, or in order
// (load_vec_in_order), or in order by code of its own for each element that they may start at.
enum class WeightLoads { kFree, kInOrder, kEachSkip };
template <int kVec, int kPer, WeightLoads kLoads> struct ShiftedSlice {
  static constexpr int kVectors = kPer;
  // Those that start equally far from 16 bytes.
  static constexpr int kApart = kVec, kMostOuter = 3 * (kVec - 1);
  Slice<kVec, kPer> inner;
  Slice<1, 1> outer;
  // Elements before the first vector, and in vectors.
  int head, body;

  // Where a thread's element stands before it moves past the vectors.
  __device__ __forceinline__ int skip(int t) const { return t < head ? 0 : body; }
  // `skew`: by how many bytes the tensor starts past 16; vectors are those of a tensor that starts on them.
  __device__ __forceinline__ void load(const X* row, int t, int threads, int cols, uint64_t policy, uint32_t skew = 0) {
    const uint32_t row_skew = kSkewed ? (skew_of(row) - skew) % 16 : skew_of(row);
    head = min((kVec - int(row_skew / sizeof(X))) % kVec, cols);
    body = max(cols - head - (kVec - 1), 0) / kVec * kVec;
    if constexpr (kSkewed) {
#pragma unroll
      for (int k = 0; k < kPer; k++) {
        const int c = (k * threads + t) * kVec;
        inner.v[k] = load_by_words_if<X, kVec>(row + head + c, c < body, policy);
      }
    } else {
      inner.load(row + head, t, threads, body, policy);
    }
    outer.load(row + skip(t), t, threads, cols - body, policy);
  }
  __device__ __forceinline__ void add(const ForwardAdd&, int64_t, int, int, int) {}
  __device__ __forceinline__ Acc sum_of_first() const { return inner.sum_of_first() + outer.sum_of_first(); }
  __device__ __forceinline__ int columns_of_first(int threads, int cols) const { return inner.columns_of_first(threads, body) + cols - body; }
  __device__ __forceinline__ Pair sums(Acc center, int t, int threads, int cols) const {
    return inner.sums(center, t, threads, body) + outer.sums(center, t, threads, cols - body);
  }
};

// dx of a row: (g - a - xhat * b) * rstd with g = dy * weight and the row's means a of g and b of g * xhat.
struct alignas(sizeof(Acc) * 4) Scales {
  Acc slope, offset, rstd, mean;
  // `sums` over the row: of g and of g * xhat.
  __device__ __forceinline__ static Scales of(Pair sums, Normalizer row, Acc inv_cols, bool remove_mean) {
    const Acc b = sums.b * inv_cols, a = remove_mean ? sums.a * inv_cols : Acc(0);
    return {-row.rstd * b, -a, row.rstd, row.mean};
  }
  __device__ __forceinline__ Acc dx(Acc x, Acc dy, Acc weight) const { return (dy * weight + offset + (x - mean) * slope) * rstd; }
};

// What a thread keeps of its columns over all its rows. Columns past the last are zero in x, dy and weight.
template <int kVec, int kPer> struct Columns {
  Vec<Param, kVec> weight[kPer];
  Acc dweight[kPer][kVec], dbias[kPer][kVec];

  __device__ __forceinline__ void start(int k, const Vec<Param, kVec>& w) {
    weight[k] = w;
#pragma unroll
    for (int i = 0; i < kVec; i++) dweight[k][i] = dbias[k][i] = 0;
  }
  // Adds vector k of a row to the sums over rows, and its part of the row's own sums to `sums`.
  template <typename Offset>
  __device__ __forceinline__ void add(int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, const Normalizer& row, Offset weight_offset, Pair& sums) {
    weight[k].keep();
    // Two short chains of additions for one long one, where registers allow.
    constexpr bool kSplit = sizeof(X) == 2;
    Pair s = kSplit ? Pair{0, 0} : sums;
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      const Acc xhat = row.xhat(x[i]), d = dy[i], g = d * weight_of(weight[k][i], weight_offset);
      s.a += g;
      s.b += g * xhat;
      dbias[k][i] += d;
      dweight[k][i] += d * xhat;
    }
    sums = kSplit ? sums + s : s;
  }
  template <typename Offset>
  __device__ __forceinline__ void gradient(int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, const Scales& s, Offset weight_offset, Acc (&f)[kVec]) {
    weight[k].keep();
    gradient_of(weight[k], x, dy, s, weight_offset, f);
  }
  template <typename Offset>
  __device__ __forceinline__ static void gradient_of(const Vec<Param, kVec>& weight, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, const Scales& s,
                                                     Offset weight_offset, Acc (&f)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i++) f[i] = s.dx(x[i], dy[i], weight_of(weight[i], weight_offset));
  }
  __device__ __forceinline__ void store_dx(X* dx, int k, const Vec<X, kVec>& x, const Vec<X, kVec>& dy, const Scales& s, Acc weight_offset, bool valid) {
    Acc f[kVec];
    gradient(k, x, dy, s, weight_offset, f);
    store<X, kVec>(dx, f, valid);
  }
};

// The gradient that arrives at the sum of x and a residual, in the vectors of a row of which a thread writes dx; nothing elsewhere.
template <int kVec, int kPer> struct Arriving {
#ifdef LN_ADD
  Vec<X, kVec> v[kPer];
  __device__ __forceinline__ void load(const BackwardAdd& added, int k, int64_t at, bool valid) {
    v[k] = load_vec<X, kVec>(added.dsum + at, valid && added.dsum);
  }
  __device__ __forceinline__ void finish(const BackwardAdd& added, int k, Acc (&f)[kVec], int64_t at, bool valid) {
    add_gradient(f, v[k], added.dresidual, added.dropout, at, valid);
  }
#else
  __device__ __forceinline__ void load(const BackwardAdd&, int, int64_t, bool) {}
  __device__ __forceinline__ void finish(const BackwardAdd&, int, Acc (&)[kVec], int64_t, bool) {}
#endif
};

// Adds up the dweight or dbias that `owners` of a block left in shared memory, in order, in rows that are part_step apart.
__device__ __forceinline__ void add_owners(Acc* out, const Acc* sums, int owners, int cols, int t, int threads) {
  constexpr int kStep = 16 / sizeof(Acc);
  for (int c = t * kStep; c < cols; c += threads * kStep) {
    Acc f[kStep];
#pragma unroll
    for (int i = 0; i < kStep; i++) f[i] = 0;
    for (int o = 0; o < owners; o++) {
      const Vec<Acc, kStep> v = *reinterpret_cast<const Vec<Acc, kStep>*>(sums + o * part_step(cols) + c);
#pragma unroll
      for (int i = 0; i < kStep; i++) f[i] += v[i];
    }
    if (c + kStep <= cols) {
      *reinterpret_cast<Vec<Acc, kStep>*>(out + c) = Vec<Acc, kStep>::of(f);
    } else {
      // What is behind the last column may be another's.
#pragma unroll
      for (int i = 0; i < kStep; i++)
        if (c + i < cols) out[c + i] = f[i];
    }
  }
}
