// Loops over blocks of floats that are no whole number of vectors, for noise, guidance and the update.
//
// An image is processed in blocks that stay in the L1 cache. The bits of a number do not depend on its position: the
// last, partial vector goes through the same arithmetic as the others.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

constexpr int chunk = 1024;  // numbers in a block, a multiple of 2 * lanes as normals() needs

struct Whole {};  // stands for the count of numbers in a full vector

inline Vec load(const float* p, Whole) { return load(p); }
inline void store(float* p, Vec v, Whole) { store(p, v); }

inline Vec load(const float* p, int count) {
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store(float* p, Vec v, int count) { std::memcpy(p, &v, count * sizeof(float)); }

// Calls body(i, count) for the vectors that cover n floats; i is the first number of a vector and count is Whole, or an
// int for the last vector where it is partial.
template <class Body>
inline void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + lanes <= n; i += lanes) body(i, Whole{});
  if (i < n) body(i, n - i);
}

}  // namespace
}  // namespace fastdiff
