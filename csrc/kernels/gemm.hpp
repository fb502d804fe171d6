// Matrix products with packed panels: c [items, panel] = a [items, depth] b [depth, panel]. Operands are float, or
// bfloat16. Sums are float.
//
// b is stored as [panel / slice, depth, slice]: the columns that are computed at a time lie together, so that their rows
// are read one after the other.
// In bfloat16, b is [panel / slice, depth / 2, slice, 2], whose slice is `together<BF16>`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/tiles.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// The block of accumulators is the widest that fits into the vector registers together with a row of b and a broadcast
// element of a: 6 x 4 vectors where there are 32 registers, 6 x 2 where there are 16.
constexpr int block_items = 6;
constexpr int block_vectors = lanes == 8 ? 2 : 4;
constexpr int slice = block_vectors * lanes;
constexpr int block_depth = 512;  // rows of b between two passes over c: 128 KB, which leaves room in L2

// Number of values of k that one multiply_step consumes.
template <class T>
constexpr int step_depth = 1;
template <>
constexpr int step_depth<BF16> = 2;

// Columns of b that are stored together: with tiles, those of two, so that what a product reads has no gaps.
template <class T>
constexpr int together = slice;
template <>
constexpr int together<BF16> = FASTDIFF_AMX ? tile_columns : panel;

// Adds a[i, k] b[k, j] to sum[i][j], for one k.
template <int items, int vectors>
[[gnu::always_inline]] inline void multiply_step(Vec (&sum)[items][vectors], const float* a, int64_t lda,
                                                 const float* b) {
  Vec row[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; j++) row[j] = load(b + j * lanes);
#pragma GCC unroll 8
  for (int i = 0; i < items; i++) {
    const Vec x = splat(a[i * lda]);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] += x * row[j];
  }
}

// The same for two k, whose bfloat16 operands are adjacent in a and in b.
template <int items, int vectors>
[[gnu::always_inline]] inline void multiply_step(Vec (&sum)[items][vectors], const BF16* a, int64_t lda,
                                                 const BF16* b) {
#ifdef __AVX512BF16__
  __m512bh row[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; j++) row[j] = (__m512bh)_mm512_loadu_si512(b + j * 2 * lanes);
#pragma GCC unroll 8
  for (int i = 0; i < items; i++) {
    int32_t pair;
    std::memcpy(&pair, a + i * lda, sizeof pair);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] = (Vec)_mm512_dpbf16_ps((__m512)sum[i][j], x, row[j]);
  }
#else
  (void)sum, (void)a, (void)lda, (void)b;
#endif
}

// Computes c [items, vectors * lanes] = a b, or adds to it (`accumulate`).
//
// Each of the first `fetched` values of k prefetches `lines` cache lines of `ahead`, rows of weights that a later call
// reads: they are used once per pass and are rarely closer than the L3 cache. Except with AVX2, every step also
// prefetches the items of a that follow these, so that they reach the L1 cache in time.
template <int items, int vectors, int lines, class T>
[[gnu::always_inline]] inline void multiply_block(int depth, const T* a, int64_t lda, const T* b, float* c, int64_t ldc,
                                                  bool accumulate, const T* ahead, int fetched) {
  constexpr int step = step_depth<T>, line_size = 64 / sizeof(T);
  Vec sum[items][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < items; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] = accumulate ? load(c + i * ldc + j * lanes) : Vec{};
  const auto advance = [&](int k) {
    if (lanes != 8) __builtin_prefetch(a + items * lda + k * items, 0, 3);
    multiply_step(sum, a + k, lda, b + static_cast<int64_t>(k) * together<T>);
  };
  int k = 0;
  for (; k < fetched; k += step) {
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) __builtin_prefetch(ahead + k * together<T> + l * line_size, 0, 2);
    advance(k);
  }
  for (; k < depth; k += step) advance(k);
#pragma GCC unroll 8
  for (int i = 0; i < items; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) store(c + i * ldc + j * lanes, sum[i][j]);
}

template <int vectors, class T>
void multiply_rows(int items, int depth, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool accumulate) {
  constexpr int step = step_depth<T>, line_size = 64 / sizeof(T);
  constexpr int lines = vectors * lanes * step / line_size;       // of a row of b
  const T* next = b + static_cast<int64_t>(depth) * together<T>;  // the rows that follow these in memory
  const int blocks = ceil_div(items, block_items);
  const int share = ceil_div(depth, step * blocks) * step;
  // Computes the items from number i on, and prefetches. Of rows of several lines, each of the first blocks prefetches
  // one line, or the first block all lines if there are too few blocks; of rows of one line, each prefetches some rows.
  const auto block = [&]<int n>(int i) {
    const T* items_of = a + i * lda;
    float* result = c + i * ldc;
    if (lines <= 1) {
      const int row = i / block_items * share;
      return multiply_block<n, vectors, 1>(depth, items_of, lda, b, result, ldc, accumulate,
                                           next + static_cast<int64_t>(row) * together<T>,
                                           std::min(share, depth - row));
    }
    if (i == 0 && items < lines * block_items)
      return multiply_block<n, vectors, lines>(depth, items_of, lda, b, result, ldc, accumulate, next, depth);
    const int line = i / block_items;
    multiply_block<n, vectors, 1>(depth, items_of, lda, b, result, ldc, accumulate, next + line * line_size,
                                  line < lines && items >= lines * block_items ? depth : 0);
  };
  int i = 0;
  for (; i + block_items <= items; i += block_items) block.template operator()<block_items>(i);
  switch (items - i) {
    case 1: return block.template operator()<1>(i);
    case 2: return block.template operator()<2>(i);
    case 3: return block.template operator()<3>(i);
    case 4: return block.template operator()<4>(i);
    case 5: return block.template operator()<5>(i);
  }
}

// Computes the first `width` columns of c [items, panel] = a [items, depth] b [depth, panel], or adds them to c
// (`onto`). lda and ldc: distance between the rows of a and of c. b is the first of `depth` rows of a panel that has
// `rows` of them; 0: as many. Every sum runs over k in order, whatever `items` is, so the bits of an item do not depend
// on its neighbours.
template <class T>
__attribute__((noinline)) void multiply(int items, int width, int depth, const T* a, int64_t lda, const T* b, float* c,
                                        int64_t ldc, bool onto = false, int rows = 0) {
  static_assert(block_vectors * lanes <= together<T> && panel % together<T> == 0);
  if (rows == 0) rows = depth;
  for (int k = 0; k < depth; k += block_depth, onto = true) {
    const int part = std::min(block_depth, depth - k);
    for (int j = 0; j < width; j += block_vectors * lanes) {
      const T* from =
          b + static_cast<int64_t>(j / together<T> * rows + k) * together<T> + j % together<T> * step_depth<T>;
      switch (std::min(block_vectors, (width - j + lanes - 1) / lanes)) {
        case 1: multiply_rows<1>(items, part, a + k, lda, from, c + j, ldc, onto); break;
        case 2: multiply_rows<2>(items, part, a + k, lda, from, c + j, ldc, onto); break;
        case 3: multiply_rows<std::min(block_vectors, 3)>(items, part, a + k, lda, from, c + j, ldc, onto); break;
        case 4: multiply_rows<std::min(block_vectors, 4)>(items, part, a + k, lda, from, c + j, ldc, onto); break;
      }
    }
  }
}

// Runs `rounds` rounds of fma_chains independent multiply-adds on registers, enough of them to hide their latency: the
// processor's peak rate, for measurements. Each multiply-add is 2 * lanes operations. The result depends on all of
// them, so that the compiler keeps them.
constexpr int fma_chains = block_items * block_vectors;
float fma(int64_t rounds) {
  Vec sum[fma_chains];
  for (int i = 0; i < fma_chains; i++) sum[i] = splat(static_cast<float>(i));  // equal chains would be merged into one
  Vec x = splat(0.999f), y = splat(1e-3f);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
    for (int i = 0; i < fma_chains; i++) sum[i] = sum[i] * x + y;
  }
  Vec total{};
  for (int i = 0; i < fma_chains; i++) total += sum[i];
  return total[0];
}

// The same for dot products of bfloat16, each round of dot_operations; not where there are none.
#if FASTDIFF_AMX
constexpr int64_t dot_operations = 4 * 16 * 16 * 32 * 2;
float dot(int64_t rounds) {
  forget_tiles();
  shape_tiles(16, 16, 32);
  for (int64_t r = 0; r < rounds; r++) {
    tile_dot(0, 4, 6);
    tile_dot(1, 4, 7);
    tile_dot(2, 5, 6);
    tile_dot(3, 5, 7);
  }
  return 0.0f;
}
#elif defined(__AVX512BF16__)
constexpr int64_t dot_operations = fma_chains * lanes * 4;
float dot(int64_t rounds) {
  __m512 sum[fma_chains];
  for (int i = 0; i < fma_chains; i++) sum[i] = (__m512)splat(static_cast<float>(i));
  const __m512bh x = (__m512bh)splat(0.999f), y = (__m512bh)splat(1e-3f);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
    for (int i = 0; i < fma_chains; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
  }
  Vec total{};
  for (int i = 0; i < fma_chains; i++) total += (Vec)sum[i];
  return total[0];
}
#else
constexpr int64_t dot_operations = 0;
constexpr float (*dot)(int64_t rounds) = nullptr;
#endif

}  // namespace
}  // namespace fastdiff
