// Counter-based noise: Philox4x32-10 and the normals made of its words. The reference is fastdiff/core/noise.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/blocks.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

typedef uint32_t VecU __attribute__((vector_size(FASTDIFF_LANES * 4)));
typedef uint64_t VecU64 __attribute__((vector_size(FASTDIFF_LANES * 4)));

// The last three words of the counter, and the key, of one image's noise at one row of its table.
struct Stream {
  uint32_t c1, c2, c3, k0, k1;
};

inline Stream stream_of(int64_t seed, int64_t index, int64_t row, int stream) {
  const uint64_t s = static_cast<uint64_t>(seed), i = static_cast<uint64_t>(index);
  return {static_cast<uint32_t>(row) | static_cast<uint32_t>(stream) << 24, static_cast<uint32_t>(i),
          static_cast<uint32_t>(i >> 32), static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)};
}

constexpr int counters = lanes / 2;  // per vector: each 32-bit word has a lane of 64 bits, which holds a full product

// Words w0..w3 of `counters` counters.
struct Words {
  VecU64 w0, w1, w2, w3;
};

inline VecU64 splat64(uint64_t x) { return x - VecU64{}; }

// Returns m c for lanes c < 2^32. GCC does not see that the upper halves are zero, and for AVX2, which has no 64-bit
// product, it would emit three products of 32 bits.
inline VecU64 multiply(VecU64 c, uint32_t m) {
#if defined(__AVX2__) && FASTDIFF_LANES == 8 && !defined(__clang__)
  return (VecU64)__builtin_ia32_pmuludq256((VecI)c, (VecI)splat64(m));
#else
  return c * splat64(m);
#endif
}

// Computes Philox4x32-10 (Salmon et al. 2011): ten rounds of the following, adding (W0, W1) to the key after each.
//
//     (hi0, lo0) = M0 c0;  (hi1, lo1) = M1 c2
//     c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
inline Words philox(const Stream& stream, VecU64 c0) {
  constexpr uint64_t low = 0xFFFFFFFF;
  VecU64 c1 = splat64(stream.c1), c2 = splat64(stream.c2), c3 = splat64(stream.c3);
  uint32_t k0 = stream.k0, k1 = stream.k1;
  for (int round = 0; round < 10; ++round) {
    const VecU64 p0 = multiply(c0, 0xD2511F53), p1 = multiply(c2, 0xCD9E8D57);
    c0 = (p1 >> 32) ^ c1 ^ splat64(k0);
    c1 = p1 & low;
    c2 = (p0 >> 32) ^ c3 ^ splat64(k1);
    c3 = p0 & low;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// Returns the counters first, first + 1, ...
inline VecU64 count_from(int64_t first) {
  VecU64 c = splat64(static_cast<uint64_t>(first));
  for (int i = 0; i < counters; ++i) c[i] += i;
  return c;
}

// Returns u = ((w >> 9) + 1/2) 2^-23 without rounding: 1 + (w >> 9) 2^-23 is assembled from bits, and 1 - 2^-24 is
// subtracted.
inline Vec uniform(VecU w) { return (Vec)((w >> 9) | 0x3F800000u) - 0.999999940395355224609375f; }

// Returns ln u within 1 ulp for normal numbers u. With u = 2^e m, m from sqrt(1/2) to sqrt(2), and f = m - 1:
//
//     ln u = e ln 2 + f + f^2 (f P(f) - 1/2)
inline Vec log(Vec u) {
  const VecI e = ((VecI)u - 0x3F3504F3) >> 23;
  const Vec f = (Vec)((VecI)u - (e << 23)) - 1.0f;
  const Vec n = __builtin_convertvector(e, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec q = p * f - 0.5f;
  return n * 0.693359375f + ((f + n * -2.12194440e-4f) + f * f * q);
}

inline Vec sqrt(Vec x) {
  float r[lanes];
  store(r, x);
  for (float& value : r) value = __builtin_sqrtf(value);
  return load(r);
}

struct Pair {
  Vec first, second;
};

// Returns (cos, sin)(2 pi v) within 1.3 ulp for v in [0, 1]. v = q/4 + b with |b| <= 1/8 is exact, unlike 2 pi v.
//
//     sin(2 pi b) = b (2 pi + b^2 S(b^2));  cos(2 pi b) = 1 + b^2 C(b^2);  a quarter turn: (cos, sin) -> (-sin, cos)
inline Pair cos_sin_turns(Vec v) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = v * 4.0f + magic;
  const VecI q = (VecI)shifted;
  const Vec b = v - (shifted - magic) * 0.25f;
  const Vec square = b * b;
  Vec s = splat(41.5895421487f);
  s = s * square - 76.7012858949f;
  s = s * square + 81.6052349923f;
  s = s * square - 41.3417022334f;
  s = b * (6.28318548f + (s * square - 1.74845553e-7f));
  Vec c = splat(59.4241059818f);
  c = c * square - 85.4488200897f;
  c = c * square + 64.9393690514f;
  c = c * square - 19.73920879f;
  c = c * square + 1.0f;
  const VecI odd = (q & 1) != 0;
  const VecI cos_sign = ((q + 1) & 2) << 30, sin_sign = (q & 2) << 30;
  return {(Vec)((VecI)(odd ? s : c) ^ cos_sign), (Vec)((VecI)(odd ? c : s) ^ sin_sign)};
}

// Returns the two normals sqrt(-2 ln u) (cos, sin)(2 pi v) (Box & Muller 1958).
inline Pair box_muller(Vec u, Vec v) {
  const Vec r = sqrt(-2.0f * log(u));
  const Pair turn = cos_sin_turns(v);
  return {r * turn.first, r * turn.second};
}

// Writes n normals, from counter `first` on, to z, which has room for n rounded up to a multiple of 2 * lanes.
void normals(const Stream& stream, int64_t first, int n, float* z) {
  for (int i = 0; i < n; i += 2 * lanes) {
    const Words w = philox(stream, count_from(first + i / 4));
    // Lanes 2j and 2j + 1 belong to counter j: the vectors are z0, z2, z0, z2, ... and z1, z3, z1, z3, ...
    const Pair pair = box_muller(uniform((VecU)(w.w0 | w.w2 << 32)), uniform((VecU)(w.w1 | w.w3 << 32)));
    float even[lanes], odd[lanes];
    store(even, pair.first);
    store(odd, pair.second);
    for (int j = 0; j < lanes; ++j) {
      z[i + 2 * j] = even[j];
      z[i + 2 * j + 1] = odd[j];
    }
  }
}

// Writes n words, from counter `first` on, to dst.
void words(const Stream& stream, int64_t first, int64_t n, uint32_t* dst) {
  for (int64_t i = 0; i < n; i += 4 * counters) {
    const Words w = philox(stream, count_from(first + i / 4));
    for (int64_t j = i; j < std::min<int64_t>(n, i + 4 * counters); ++j) {
      const VecU64& word = j % 4 == 0 ? w.w0 : j % 4 == 1 ? w.w1 : j % 4 == 2 ? w.w2 : w.w3;
      dst[j] = static_cast<uint32_t>(word[(j - i) / 4]);
    }
  }
}

// Computes the words, the normals or both of the given images, as NoiseArgs asks.
void noise(const NoiseArgs& args, Range images) {
  alignas(64) float z[chunk];
  for (int i = images.begin; i < images.end; ++i) {
    const Stream stream = stream_of(args.seed[i], args.index[i], args.row[i], args.stream);
    if (args.words) words(stream, args.first, args.size, args.words + i * args.size);
    for (int64_t begin = 0; args.z && begin < args.size; begin += chunk) {
      const int n = static_cast<int>(std::min<int64_t>(chunk, args.size - begin));
      normals(stream, args.first + begin / 4, n, z);
      std::memcpy(args.z + i * args.size + begin, z, n * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace fastdiff
