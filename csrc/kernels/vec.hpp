// Vec, a vector of as many floats as the instruction set has lanes, and the elementary functions on it.
//
// Every kernels_<isa>.cpp compiles the headers of this folder anew, for its instruction set. Their contents lie in an
// unnamed namespace, so that the linker keeps these copies apart.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Floats per vector. kernels_<isa>.cpp sets it; the default is for tools that read a header on its own.
#ifndef FASTDIFF_LANES
#if defined(__AVX512F__)
#define FASTDIFF_LANES 16
#elif defined(__AVX2__)
#define FASTDIFF_LANES 8
#else
#define FASTDIFF_LANES 4
#endif
#endif

namespace fastdiff {
namespace {

constexpr int lanes = FASTDIFF_LANES;
typedef float Vec __attribute__((vector_size(FASTDIFF_LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(FASTDIFF_LANES * 4)));
typedef uint32_t VecU __attribute__((vector_size(FASTDIFF_LANES * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// Loads the first `count` numbers and fills the remaining lanes with zeros.
inline Vec load_some(const float* p, int count) {
  if (count >= lanes) return load(p);
  Vec v{};
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
}
inline Vec splat(float x) { return x - Vec{}; }  // x - 0 is x for every x, -0 included

// Returns the sum of all lanes.
inline float total(Vec v) {
  float sum = 0;
  for (int l = 0; l < lanes; l++) sum += v[l];
  return sum;
}

// The bits of a bfloat16. Products take float operands, or BF16 where the instruction set can multiply those.
struct BF16 {
  uint16_t bits;
};
#ifndef __AVX512BF16__
// Returns the bits of the nearest bfloat16 numbers, of two equally near the even one. As by VCVTNEPS2BF16, denormal
// numbers become zeros, and NaN stays NaN.
inline VecI nearest_bf16(Vec v) {
  const VecI bits = (VecI)v, sign = (bits >> 31 & 1) << 15, upper = bits >> 16 & 0xffff;
  const VecI rounded = (VecI)((VecU)bits + 0x7fff + (VecU)(upper & 1)) >> 16 & 0xffff;
  const VecI number = (bits & 0x7f800000) == 0 ? sign : rounded;
  return v == v ? number : upper | 0x40;
}
#endif
inline void store(BF16* p, Vec v) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &rounded, sizeof rounded);
#else
  const VecI rounded = nearest_bf16(v);
  for (int l = 0; l < lanes; l++) p[l].bits = static_cast<uint16_t>(rounded[l]);
#endif
}

// Stores even[0], odd[0], even[1], odd[1], ... as bfloat16.
inline void store_pairs(BF16* p, Vec even, Vec odd) {
#ifdef __AVX512BF16__
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  const VecI pairs = nearest_bf16(even) | nearest_bf16(odd) << 16;
  std::memcpy(p, &pairs, sizeof pairs);
#endif
}

// Returns the integer nearest to t, for |t| < 2^22, and sets `code` to that integer in the form that power() takes.
inline Vec nearest(Vec t, Vec& code) {
#ifdef __AVX512F__
  return code = (Vec)_mm512_roundscale_ps((__m512)t, 8);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  code = t + magic;
  return code - magic;
#endif
}

// Returns 2^n 2^f for |f| <= 1/2 with a relative error below 2e-7. `code` represents n, as nearest() sets it.
inline Vec power(Vec f, Vec code) {
  Vec p = splat(1.535336188e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)code);
#else
  return (Vec)((VecI)p + ((VecI)code << 23));
#endif
}

constexpr float log2_e = 1.44269504f;

// Returns e^x with a relative error below 3e-7. x is clamped to [-87, 88]; NaN gives NaN.
inline Vec exp(Vec x) {
  Vec clamped = x < -87.0f ? splat(-87.0f) : x, code;
  clamped = clamped > 88.0f ? splat(88.0f) : clamped;
  const Vec n = nearest(clamped * log2_e, code);
  const Vec r = clamped - n * 0.693359375f - n * -2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  const Vec e = power(r * log2_e, code);
  return x == x ? e : x;  // power() may turn the bits of a NaN into a number
}

// Returns x sigmoid(x) = x / (1 + 2^(-x log2 e)). Rounding the exponent changes the exponential by a factor of about
// 1 + |x| 2^-24, which is negligible: for x > 0 the exponential is small beside 1, and for x << 0 the result is near 0.
inline Vec silu(Vec x) {
  Vec t = x * -log2_e, code;
#ifndef __AVX512F__
  t = t < -126.0f ? splat(-126.0f) : t;
  t = t > 126.0f ? splat(126.0f) : t;
#endif
  const Vec n = nearest(t, code);
  const Vec y = x / (1.0f + power(t - n, code));
  return x == x ? y : x;
}

// Returns max(x, 0); NaN gives NaN.
inline Vec relu(Vec x) { return x < 0.0f ? splat(0.0f) : x; }

// Returns x Phi(x), the exact gelu: Phi(x) = erfc(-x / sqrt(2)) / 2 is the normal distribution. The approximation of erfc
// has a relative error below 1.2e-7 (Press et al., Numerical Recipes, erfcc).
inline Vec gelu(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.707106781f, t = 1.0f / (1.0f + 0.5f * z);
  Vec p = splat(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vec tail = 0.5f * t * exp(p - z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

}  // namespace
}  // namespace fastdiff
