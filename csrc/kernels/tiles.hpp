// Products of bfloat16 by the tile registers of AMX, or by an emulation of them that every processor can run.
//
// A tile is a matrix of up to 16 rows of 64 bytes. FASTDIFF_AMX is 1 for the instructions, 2 for the emulation, which is
// for tests: it gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/vec.hpp"

#ifndef FASTDIFF_AMX
#define FASTDIFF_AMX 0
#endif

namespace fastdiff {
namespace {

constexpr int tile_columns = 32;  // of weights that are stored together, [depth / 2, tile_columns, 2]: two tiles

// The operand of the instruction ldtilecfg.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};    // of each tile
};

#if FASTDIFF_AMX == 1

// GCC's intrinsics of these do not say what memory they read.
#define tile_configure(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#define tile_zero(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define tile_load(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(stride) : "memory")
#define tile_store(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(stride) : "memory")
#define tile_dot(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)

#elif FASTDIFF_AMX == 2

static_assert(lanes == 16, "a row of a tile is a vector");

struct EmulatedTiles {
  TileShapes shapes;
  Vec data[8][16];
};
thread_local EmulatedTiles tiles;

// Every instruction that uses a tile without a shape is an error of the processor.
inline void check_tile(int tile) {
  if (tiles.shapes.rows[tile] == 0) __builtin_trap();
}

inline void tile_configure(const TileShapes* shapes) {
  tiles.shapes = *shapes;
  std::memset(tiles.data, 0, sizeof tiles.data);
}

inline void tile_zero(int tile) {
  check_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void tile_load(int tile, const void* from, int64_t stride) {
  tile_zero(tile);  // rows and columns beyond the shape are zeros
  for (int r = 0; r < tiles.shapes.rows[tile]; r++)
    std::memcpy(&tiles.data[tile][r], static_cast<const char*>(from) + r * stride, tiles.shapes.bytes[tile]);
}

inline void tile_store(int tile, void* to, int64_t stride) {
  check_tile(tile);
  for (int r = 0; r < tiles.shapes.rows[tile]; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, &tiles.data[tile][r], tiles.shapes.bytes[tile]);
}

// Replaces denormal numbers by zeros of their sign.
inline Vec without_denormals(Vec v) {
  const VecI bits = (VecI)v;
  return (Vec)((bits & 0x7f800000) == 0 ? bits & INT32_MIN : bits);
}

// Computes sum += a b as TDPBF16PS does (Intel 64 and IA-32 Software Developer's Manual, volume 2): the products of even
// k and those of odd k are summed apart, in order, by fused multiply-adds; then both sums are added, and that to `sum`.
// Denormal numbers count as zeros, and every result that is one becomes zero.
inline void tile_dot(int sum, int a, int b) {
  for (int tile : {sum, a, b}) check_tile(tile);
  for (int m = 0; m < tiles.shapes.rows[sum]; m++) {
    Vec even = splat(0), odd = splat(0);
    for (int k = 0; k < tiles.shapes.bytes[a] / 4; k++) {
      const int32_t pair = ((VecI)tiles.data[a][m])[k];
      const VecI zeros{}, x = zeros + pair, y = (VecI)tiles.data[b][k];
      const auto low = [](VecI v) { return without_denormals((Vec)(v << 16)); };
      const auto high = [](VecI v) { return without_denormals((Vec)(v & static_cast<int32_t>(0xffff0000))); };
      even = without_denormals(low(x) * low(y) + even);
      odd = without_denormals(high(x) * high(y) + odd);
    }
    Vec& row = tiles.data[sum][m];
    row = without_denormals(without_denormals(row) + without_denormals(even + odd));
  }
}

#endif

#if FASTDIFF_AMX

// The shapes that this thread's tiles have. Other code of the thread may use the tiles between two operations.
thread_local uint32_t shaped = 0;
inline void forget_tiles() { shaped = 0; }

// Shapes the tiles for blocks of sums of `first` and `second` items: 0 to 3 are the sums [items, 16], 4 and 5 items
// [items, depth], 6 and 7 weights [depth / 2, 16, 2].
inline void shape_tiles(int first, int second, int depth) {
  const uint32_t wanted = static_cast<uint32_t>(first << 16 | second << 8 | depth);
  if (shaped == wanted) return;
  TileShapes shapes;
  const auto shape = [&](int tile, int rows, int bytes) {
    shapes.rows[tile] = static_cast<uint8_t>(rows);
    shapes.bytes[tile] = static_cast<uint16_t>(rows > 0 ? bytes : 0);
  };
  for (int column : {0, 1}) {
    shape(column, first, 64);
    shape(2 + column, second, 64);
    shape(6 + column, depth / 2, 64);
  }
  shape(4, first, 2 * depth);
  shape(5, second, 2 * depth);
  tile_configure(&shapes);
  shaped = wanted;
}

// Computes 16 columns of c [items, ..] = a b, or where `wide` 32, of up to 16 items, or where `tall` up to 32; or adds
// them to c (`onto`). Each step prefetches `fetched` cache lines of `ahead`, weights that a later call reads: they are used
// once per pass and are rarely closer than the L3 cache.
//
// Each row of a is `parts` parts of `depth` numbers, `apart` numbers from one to the next. Their last numbers, where
// depth is no multiple of 32, are summed after all others, since tiles of another shape lose their contents. The
// operands of a step are loaded during the one before, each when its last product is under way.
template <bool tall, bool wide>
void multiply_tiles(int items, int parts, int64_t apart, int depth, const BF16* a, int64_t lda, const BF16* b, float* c,
                    int64_t ldc, bool onto, const BF16* ahead, int fetched) {
  constexpr int line = 64 / sizeof(BF16);
  constexpr int64_t row = tile_columns * 2 * sizeof(BF16);  // of b, which has two values of k
  const int64_t a_row = lda * static_cast<int64_t>(sizeof(BF16)), c_row = ldc * static_cast<int64_t>(sizeof(float));
  const int64_t below = 16 * lda;
  float* c_below = c + 16 * ldc;
  for (int from = 0; from < depth;) {
    const int step = std::min(32, depth - from), end = from + (depth - from) / step * step;
    shape_tiles(std::min(items, 16), std::max(items - 16, 0), step);
    if (onto || from > 0) {
      tile_load(0, c, c_row);
      if constexpr (wide) tile_load(1, c + 16, c_row);
      if constexpr (tall) tile_load(2, c_below, c_row);
      if constexpr (tall && wide) tile_load(3, c_below + 16, c_row);
    } else {
      tile_zero(0);
      if constexpr (wide) tile_zero(1);
      if constexpr (tall) tile_zero(2);
      if constexpr (tall && wide) tile_zero(3);
    }
    const BF16 *rows = a + from, *weights = b + static_cast<int64_t>(from) * tile_columns;
    tile_load(4, rows, a_row);
    tile_load(6, weights, row);
    if constexpr (tall) tile_load(5, rows + below, a_row);
    if constexpr (wide) tile_load(7, weights + 32, row);
    for (int part = 0, k = from;;) {
      for (int l = 0; l < fetched; l++, ahead += line) __builtin_prefetch(ahead, 0, 2);
      k += step;
      if (k == end) {
        k = from;
        part++;
      }
      const bool more = part < parts;
      rows = a + part * apart + k;
      weights = b + (static_cast<int64_t>(part) * depth + k) * tile_columns;
      tile_dot(0, 4, 6);
      if constexpr (wide) tile_dot(1, 4, 7);
      if (more) tile_load(4, rows, a_row);
      if constexpr (tall && wide) tile_dot(3, 5, 7);
      if constexpr (wide)
        if (more) tile_load(7, weights + 32, row);
      if constexpr (tall) {
        tile_dot(2, 5, 6);
        if (more) tile_load(5, rows + below, a_row);
      }
      if (!more) break;
      tile_load(6, weights, row);
    }
    tile_store(0, c, c_row);
    if constexpr (wide) tile_store(1, c + 16, c_row);
    if constexpr (tall) tile_store(2, c_below, c_row);
    if constexpr (tall && wide) tile_store(3, c_below + 16, c_row);
    from = end;
  }
}

template <bool wide>
void multiply_column(int items, int parts, int64_t apart, int depth, const BF16* a, int64_t lda, const BF16* b,
                     float* c, int64_t ldc, bool onto) {
  // Each block of items prefetches its share of the columns that follow these in memory.
  const int blocks = ceil_div(items, 32), steps = parts * ceil_div(depth, 32);
  const int64_t size = static_cast<int64_t>(parts) * depth * tile_columns;
  const int fetched = ceil_div(static_cast<int>(size * sizeof(BF16) / 64), steps * blocks);
  const BF16* ahead = b + size;
  for (int i = 0; i < items; i += 32, a += 32 * lda, c += 32 * ldc) {
    const int n = std::min(items - i, 32);
    const auto multiply = n > 16 ? multiply_tiles<true, wide> : multiply_tiles<false, wide>;
    multiply(n, parts, apart, depth, a, lda, b, c, ldc, onto, ahead, fetched);
    ahead += static_cast<int64_t>(steps) * fetched * (64 / sizeof(BF16));
  }
}

// Computes the first `width` columns of c [items, panel] = a b, or adds them to c, for items of several parts as
// multiply_tiles() has them. b is [panel / 32, parts, depth / 2, 32, 2].
__attribute__((noinline)) void multiply_parts(int items, int width, int parts, int64_t apart, int depth, const BF16* a,
                                              int64_t lda, const BF16* b, float* c, int64_t ldc, bool onto) {
  for (int j = 0; j < width; j += tile_columns) {
    const auto multiply = width - j > 16 ? multiply_column<true> : multiply_column<false>;
    multiply(items, parts, apart, depth, a, lda, b + static_cast<int64_t>(j) * parts * depth, c + j, ldc, onto);
  }
}

// Computes what multiply() of kernels/gemm.hpp does, for an even depth. A row of a tile is summed by itself, so an item's
// bits do not depend on its neighbours.
void multiply(int items, int width, int depth, const BF16* a, int64_t lda, const BF16* b, float* c, int64_t ldc,
              bool onto = false) {
  multiply_parts(items, width, 1, 0, depth, a, lda, b, c, ldc, onto);
}

#else

inline void forget_tiles() {}
void multiply_parts(int, int, int, int64_t, int, const BF16*, int64_t, const BF16*, float*, int64_t, bool) {
  __builtin_trap();  // Kernels::windows is false
}

#endif

}  // namespace
}  // namespace fastdiff
