// The checksum that notices changed weights. The reference is `checksum` of fastdiff/backends/network.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

typedef uint64_t Vec64 __attribute__((vector_size(FASTDIFF_LANES * 4)));

// Returns a number each bit of which depends on all bits of x; different x give different numbers (the finaliser of
// SplitMix64, Steele, Lea & Flood 2014, with the constants of variant 13).
template <class T>
inline T mix(T x) {
  x = (x ^ (x >> 30)) * uint64_t{0xBF58476D1CE4E5B9};
  x = (x ^ (x >> 27)) * uint64_t{0x94D049BB133111EB};
  return x ^ (x >> 31);
}

// Returns the sum, modulo 2^64, of mix(word i ^ (i + 1) c) over the 64-bit words of n bytes, the last of which is filled
// up with zeros. `first` is the number i of the first word. Sums of parts can be added in any order.
uint64_t checksum(const uint8_t* bytes, int64_t n, int64_t first) {
  constexpr uint64_t c = 0x9E3779B97F4A7C15;
  constexpr int width = lanes / 2, block = 4;  // of words in a vector; vectors at a time, so that products overlap
  uint64_t sum = 0, word = 0;
  int64_t i = 0;
  const int64_t words = n / 8;
  Vec64 key{}, sums[block]{};
  for (int j = 0; j < width; j++) key[j] = c * static_cast<uint64_t>(first + 1 + j);
  for (; i + block * width <= words; i += block * width) {
#pragma GCC unroll 4
    for (int b = 0; b < block; b++) {
      Vec64 v;
      std::memcpy(&v, bytes + 8 * (i + b * width), sizeof v);
      sums[b] += mix<Vec64>(v ^ (key + c * static_cast<uint64_t>(b * width)));
    }
    key += c * static_cast<uint64_t>(block * width);
  }
  for (const Vec64& part : sums)
    for (int j = 0; j < width; j++) sum += part[j];
  for (; 8 * i < n; i++) {
    word = 0;
    std::memcpy(&word, bytes + 8 * i, std::min<int64_t>(8, n - 8 * i));
    sum += mix<uint64_t>(word ^ c * static_cast<uint64_t>(first + i + 1));
  }
  return sum;
}

}  // namespace
}  // namespace fastdiff
