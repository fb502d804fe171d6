// Matrix products with packed panels: c [items, panel] = a [items, depth] b [depth, panel]. Operands are float, or
// bfloat16, in which case b is packed as [depth / 2, panel, 2]. Sums are float.
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
constexpr int block_depth = 512;  // rows of b between two passes over c: 128 KB, which leaves room in L2

// Adds a[i, k] b[k, j] to sum[i][j], for one k.
template <int items, int vectors>
inline void multiply_step(Vec (&sum)[items][vectors], const float* a, int64_t lda, const float* b) {
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
inline void multiply_step(Vec (&sum)[items][vectors], const BF16* a, int64_t lda, const BF16* b) {
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

// Number of values of k that one multiply_step consumes.
template <class T>
constexpr int step_depth = 1;
template <>
constexpr int step_depth<BF16> = 2;

// Computes c [items, vectors * lanes] = a b, or adds to it (`accumulate`).
//
// Every step prefetches two things. The first is `lines` cache lines, beginning with line number `line`, of the rows of
// b that follow these and that the next call reads: weights are used once per pass and are rarely closer than the L3
// cache. The second is the items of a that follow these, so that they reach the L1 cache in time.
template <int items, int vectors, int lines, class T>
inline void multiply_block(int depth, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool accumulate,
                           int line = 0) {
  constexpr int step = step_depth<T>, line_size = 64 / sizeof(T);
  Vec sum[items][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < items; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] = accumulate ? load(c + i * ldc + j * lanes) : Vec{};
  const T* ahead = b + static_cast<int64_t>(depth) * panel + line * line_size;
  for (int k = 0; k < depth; k += step) {
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) __builtin_prefetch(ahead + k * panel + l * line_size, 0, 2);
    __builtin_prefetch(a + items * lda + k * items, 0, 3);
    multiply_step(sum, a + k, lda, b + static_cast<int64_t>(k) * panel);
  }
#pragma GCC unroll 8
  for (int i = 0; i < items; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) store(c + i * ldc + j * lanes, sum[i][j]);
}

template <int vectors, class T>
void multiply_rows(int items, int depth, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool accumulate) {
  constexpr int lines = vectors * lanes * step_depth<T> * sizeof(T) / 64;
  const bool spread =
      items >=
      lines * block_items;  // prefetch one line per step in each of the first blocks, else all lines in the first block
  int i = 0;
  if (!spread && items >= block_items) {
    multiply_block<block_items, vectors, lines>(depth, a, lda, b, c, ldc, accumulate);
    i = block_items;
  }
  for (; spread && i < lines * block_items; i += block_items)
    multiply_block<block_items, vectors, 1>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate, i / block_items);
  for (; i + block_items <= items; i += block_items)
    multiply_block<block_items, vectors, 0>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
  a += i * lda;
  c += i * ldc;
  const auto rest = [&]<int n>() {
    if (i == 0)
      multiply_block<n, vectors, lines>(depth, a, lda, b, c, ldc, accumulate);
    else
      multiply_block<n, vectors, 0>(depth, a, lda, b, c, ldc, accumulate);
  };
  switch (items - i) {
    case 1: return rest.template operator()<1>();
    case 2: return rest.template operator()<2>();
    case 3: return rest.template operator()<3>();
    case 4: return rest.template operator()<4>();
    case 5: return rest.template operator()<5>();
  }
}

// Computes the first `width` columns of c [items, panel] = a [items, depth] b [depth, panel], or adds them to c
// (`onto`). lda and ldc: distance between the rows of a and of c. Every sum runs over k in order, whatever `items` is,
// so the bits of an item do not depend on its neighbours.
template <class T>
__attribute__((noinline)) void multiply(int items, int width, int depth, const T* a, int64_t lda, const T* b, float* c,
                                        int64_t ldc, bool onto = false) {
  for (int k = 0; k < depth; k += block_depth, onto = true) {
    const int part = std::min(block_depth, depth - k);
    for (int j = 0; j < width; j += block_vectors * lanes) {
      const T* rows = b + static_cast<int64_t>(k) * panel + j * step_depth<T>;
      switch (std::min(block_vectors, (width - j + lanes - 1) / lanes)) {
        case 1: multiply_rows<1>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
        case 2: multiply_rows<2>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
        case 3: multiply_rows<std::min(block_vectors, 3)>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
        case 4: multiply_rows<std::min(block_vectors, 4)>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
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
