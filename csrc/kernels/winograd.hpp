// Winograd's minimal filtering for 3 x 3 kernels (Lavin & Gray 2016, arXiv:1509.09308): y = A^T [(G g G^T) . (B^T d B)]
// A.
//
// With interpolation points p_j and M(x) = prod (x - p_j), row j of B^T holds the coefficients of M(x) / (x - p_j), and
// the last row those of M(x). A^T[i][j] = p_j^i, and the last column of A^T is (0, .., 0, 1). G is applied when weights
// are packed (kernels/pack.hpp).
#pragma once

#include <cstdint>

#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// F(2, 3): points 0, 1, -1, inf.
struct Winograd2 {
  static constexpr int in = 4, out = 2;
  static inline void input(const Vec* d, Vec* t) {
    t[0] = d[2] - d[0];
    t[1] = d[2] + d[1];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  static inline void output(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

// F(4, 3): points 0, a, -a, b, -b, inf. a = 3/4 and b = 3/2 cause smaller rounding errors than the usual 1 and 2.
struct Winograd4 {
  static constexpr int in = 6, out = 4;
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;
  static inline void input(const Vec* d, Vec* t) {
    t[0] = a2 * b2 * d[0] - (a2 + b2) * d[2] + d[4];
    const Vec even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    const Vec even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = a2 * b2 * d[1] - (a2 + b2) * d[3] + d[5];
  }
  static inline void output(const Vec* m, Vec* y) {
    const Vec sum_a = m[1] + m[2], sum_b = m[3] + m[4], diff_a = m[1] - m[2], diff_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = a * diff_a + b * diff_b;
    y[2] = a2 * sum_a + b2 * sum_b;
    y[3] = a * a2 * diff_a + b * b2 * diff_b + m[5];
  }
};

// Computes column x of B^T d from one column of pixels; pixels: [in, columns, lanes].
template <class F>
inline void transform_column(const float* pixels, int columns, Vec (&half)[F::in][F::in], int x) {
  Vec d[F::in], t[F::in];
#pragma GCC unroll 6
  for (int y = 0; y < F::in; y++) d[y] = load(pixels + y * columns * lanes);
  F::input(d, t);
#pragma GCC unroll 6
  for (int y = 0; y < F::in; y++) half[y][x] = t[y];
}

// Computes B^T d B of `tiles` adjacent tiles. pixels: those of the first tile; columns: pixels in a row of them. The
// number at position i of tile t is stored at loaded + t * depth + i * stride.
//
// Neighbouring tiles share two columns. Winograd2 keeps their transform, as its 16 numbers stay in registers. Winograd4
// computes it again: its 36 numbers do not fit into registers, and moving them through memory takes as long.
template <class F, class T>
inline void transform_input(const float* pixels, int columns, int tiles, T* loaded, int64_t depth, int64_t stride) {
  constexpr bool keep = F::in == 4;
  constexpr int shared = F::in - F::out;
  Vec half[F::in][F::in];
  if (keep)
#pragma GCC unroll 6
    for (int x = 0; x < shared; x++) transform_column<F>(pixels + x * lanes, columns, half, F::out + x);
  for (int tile = 0; tile < tiles; tile++, pixels += F::out * lanes, loaded += depth) {
    if (keep)
#pragma GCC unroll 6
      for (int y = 0; y < F::in; y++)
#pragma GCC unroll 6
        for (int x = 0; x < shared; x++) half[y][x] = half[y][F::out + x];
#pragma GCC unroll 6
    for (int x = keep ? shared : 0; x < F::in; x++) transform_column<F>(pixels + x * lanes, columns, half, x);
#pragma GCC unroll 6
    for (int y = 0; y < F::in; y++) {
      Vec t[F::in];
      F::input(half[y], t);
#pragma GCC unroll 6
      for (int x = 0; x < F::in; x++) store(loaded + (y * F::in + x) * stride, t[x]);
    }
  }
}

// Computes the pixels y [out, out] of a tile from its products: A^T m A. The product at position i is at
// products + i * stride.
template <class F>
inline void transform_output(const float* products, int64_t stride, Vec* y) {
  Vec half[F::out][F::in];
#pragma GCC unroll 6
  for (int j = 0; j < F::in; j++) {
    Vec m[F::in], t[F::out];
#pragma GCC unroll 6
    for (int i = 0; i < F::in; i++) m[i] = load(products + (i * F::in + j) * stride);
    F::output(m, t);
#pragma GCC unroll 6
    for (int i = 0; i < F::out; i++) half[i][j] = t[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < F::out; i++) F::output(half[i], y + i * F::out);
}

}  // namespace
}  // namespace fastdiff
