// SPDX-License-Identifier: Apache-2.0
// Vectors of WIDTH floats by the compilers' own vector types (GCC, Clang), and the two products.
// Vectors run along the queries: keys and values are broadcast from where they lie, and softmax
// needs no step across a vector.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef WIDTH
#error "WIDTH, the floats in a vector, comes from build.json"
#endif

namespace ISA {

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Int __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Half __attribute__((vector_size(WIDTH * 2)));

constexpr float LOG2_E = 1.44269504088896341f;
constexpr double LN_2 = 0.69314718055994531;
constexpr float MINUS_INF = -__builtin_inff();

INLINE Vec splat(float x) { return x - Vec{}; }  // both compilers: one broadcast
INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Interleave a and b: a0 b0 a1 b1 ..., the lower and the upper half.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Lanes<I...> Type;
};
template <int... I>
INLINE void interleave(Vec& a, Vec& b, Lanes<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const Vec low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * WIDTH)...);
  b = __builtin_shufflevector(a, b, (WIDTH / 2 + I / 2 + I % 2 * WIDTH)...);
#else
  const Vec low = __builtin_shuffle(a, b, Int{(I / 2 + I % 2 * WIDTH)...});
  b = __builtin_shuffle(a, b, Int{(WIDTH / 2 + I / 2 + I % 2 * WIDTH)...});
#endif
  a = low;
}

// Transpose WIDTH x WIDTH numbers: each round interleaves row i with row i + WIDTH / 2.
INLINE void transpose(Vec* x) {
  UNROLL for (int round = 1; round < WIDTH; round *= 2) {
    Vec y[WIDTH];
    UNROLL for (int i = 0; i < WIDTH / 2; i++) {
      y[2 * i] = x[i], y[2 * i + 1] = x[i + WIDTH / 2];
      interleave(y[2 * i], y[2 * i + 1], typename Count<WIDTH>::Type());
    }
    UNROLL for (int i = 0; i < WIDTH; i++) x[i] = y[i];
  }
}

// 2^x for x < 128, relative error 1.7e-7, 1 at 0; exactly 0 below 2^-100, and for -inf. The polynomial
// has the least largest relative error of its degree on [-1/2, 1/2] with p(0) = 1.
INLINE Vec exp2(Vec x) {
  const Vec round = splat(12582912.0f);  // 1.5 * 2^23: what is added loses its fraction
  const Vec t = x + round;
  const Vec f = x - (t - round);
  Vec p = splat(1.326472720e-3f);
  p = p * f + splat(9.671512640e-3f);
  p = p * f + splat(5.550733743e-2f);
  p = p * f + splat(2.402224209e-1f);
  p = p * f + splat(6.931469776e-1f);
  p = p * f + splat(1.0f);
  const Bits scaled = (Bits)p + ((Bits)t << 23);  // the low bits of t are the whole part of x
  return (Vec)(scaled & (Bits)(x > splat(-100.0f)));
}

// sum[R][QV vectors] += R numbers, each times QV vectors.
template <int R, int QV, typename Number>
INLINE void add_products(Vec (&sum)[R][QV], Number number, const float* vectors) {
  Vec wide[R <= QV ? R : QV];  // the fewer of the two kinds stay in registers
  if constexpr (R <= QV) {
    UNROLL for (int i = 0; i < R; i++) wide[i] = splat(number(i));
    UNROLL for (int j = 0; j < QV; j++) {
      const Vec vector = load(vectors + j * WIDTH);
      UNROLL for (int i = 0; i < R; i++) sum[i][j] += wide[i] * vector;
    }
  } else {
    UNROLL for (int j = 0; j < QV; j++) wide[j] = load(vectors + j * WIDTH);
    UNROLL for (int i = 0; i < R; i++) {
      const Vec one = splat(number(i));
      UNROLL for (int j = 0; j < QV; j++) sum[i][j] += one * wide[j];
    }
  }
}

// scores[R][QV vectors] = R keys . queries, over head_dim; queries are [head_dim][QV vectors].
// Runs of up to RUN products are summed by themselves first: one sum of 128 would round twice as much.
constexpr int RUN = 64;
template <int R, int QV>
INLINE void multiply_keys(const float* const* keys, const float* queries, int64_t head_dim,
                          float* scores, Vec* most) {
  constexpr int N = QV * WIDTH;
  const int64_t runs = (head_dim + RUN - 1) / RUN;
  for (int64_t run = 0; run < runs; run++) {
    const int64_t stop = head_dim * (run + 1) / runs;
    Vec sum[R][QV] = {};
    for (int64_t e = head_dim * run / runs; e < stop; e++)
      add_products<R, QV>(sum, [&](int i) { return keys[i][e]; }, queries + e * N);
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < QV; j++) {
      float* const to = scores + i * N + j * WIDTH;
      if (run) sum[i][j] += load(to);
      store(to, sum[i][j]);
      if (run == runs - 1) most[j] = maximum(most[j], sum[i][j]);
    }
  }
}

// output[R][QV vectors] = output * fade + sum over keys of values[key][R] * weights[key][...].
// A chunk is summed by itself first: thousands of keys added one by one would round 3 to 4 times as much.
template <int R, int QV>
INLINE void multiply_values(const float* values, const int64_t* which, int count, const float* weights,
                            const Vec* fade, float* output) {
  constexpr int N = QV * WIDTH;
  Vec sum[R][QV] = {};
  for (int n = 0; n < count; n++) {
    const float* row = values + which[n];
    add_products<R, QV>(sum, [&](int i) { return row[i]; }, weights + n * N);
  }
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < QV; j++)
    store(output + i * N + j * WIDTH, load(output + i * N + j * WIDTH) * fade[j] + sum[i][j]);
}

}  // namespace ISA
