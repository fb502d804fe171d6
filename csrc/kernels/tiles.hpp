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
// them to c (`onto`). Where `ahead`, prefetches the same columns of the panel of weights that follows this one.
template <bool tall, bool wide, bool ahead>
void multiply_tiles(int items, int depth, const BF16* a, int64_t lda, const BF16* b, float* c, int64_t ldc, bool onto) {
  constexpr int64_t row = panel * 2 * sizeof(BF16);  // of b, which has two values of k
  const int64_t a_row = lda * static_cast<int64_t>(sizeof(BF16)), c_row = ldc * static_cast<int64_t>(sizeof(float));
  const BF16* below = a + 16 * lda;
  float* c_below = c + 16 * ldc;
  for (int k = 0; k < depth;) {
    const int step = std::min(32, depth - k), end = k + (depth - k) / step * step;
    shape_tiles(std::min(items, 16), std::max(items - 16, 0), step);
    if (onto || k > 0) {
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
    for (; k < end; k += step) {
      const BF16* weights = b + static_cast<int64_t>(k) * panel;
      if constexpr (ahead)
        for (int r = 0; r < step / 2; r++) {
          const BF16* next = weights + (static_cast<int64_t>(depth) + 2 * r) * panel;
          __builtin_prefetch(next, 0, 2);
          if constexpr (wide) __builtin_prefetch(next + 32, 0, 2);
        }
      tile_load(4, a + k, a_row);
      tile_load(6, weights, row);
      tile_dot(0, 4, 6);
      if constexpr (wide) {
        tile_load(7, weights + 32, row);
        tile_dot(1, 4, 7);
      }
      if constexpr (tall) {
        tile_load(5, below + k, a_row);
        tile_dot(2, 5, 6);
      }
      if constexpr (tall && wide) tile_dot(3, 5, 7);
    }
    tile_store(0, c, c_row);
    if constexpr (wide) tile_store(1, c + 16, c_row);
    if constexpr (tall) tile_store(2, c_below, c_row);
    if constexpr (tall && wide) tile_store(3, c_below + 16, c_row);
  }
}

template <bool wide>
void multiply_column(int items, int depth, const BF16* a, int64_t lda, const BF16* b, float* c, int64_t ldc,
                     bool onto) {
  for (int i = 0; i < items; i += 32, a += 32 * lda, c += 32 * ldc) {
    const int n = std::min(items - i, 32);
    if (n > 16 && i == 0)
      multiply_tiles<true, wide, true>(n, depth, a, lda, b, c, ldc, onto);
    else if (n > 16)
      multiply_tiles<true, wide, false>(n, depth, a, lda, b, c, ldc, onto);
    else if (i == 0)
      multiply_tiles<false, wide, true>(n, depth, a, lda, b, c, ldc, onto);
    else
      multiply_tiles<false, wide, false>(n, depth, a, lda, b, c, ldc, onto);
  }
}

// Computes what multiply() of kernels/gemm.hpp does, for an even depth. A row of a tile is summed by itself, so an item's
// bits do not depend on its neighbours.
__attribute__((noinline)) void multiply(int items, int width, int depth, const BF16* a, int64_t lda, const BF16* b,
                                        float* c, int64_t ldc, bool onto = false) {
  for (int j = 0; j < width; j += 32) {
    if (width - j > 16)
      multiply_column<true>(items, depth, a, lda, b + j * 2, c + j, ldc, onto);
    else
      multiply_column<false>(items, depth, a, lda, b + j * 2, c + j, ldc, onto);
  }
}

#else

inline void forget_tiles() {}

#endif

}  // namespace
}  // namespace fastdiff
