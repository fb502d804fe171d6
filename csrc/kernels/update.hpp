// The update: applies one row of its table to every image. The reference is fastdiff/core/update.py.
//
// An image is updated block by block. Each sum is one loop over the operands whose coefficient is not zero, so that the
// loop has no branches and no other operand is read from memory.
//
// A sum never adds two products directly: the compiler would choose which of the two it fuses with the addition,
// perhaps differently in each copy of a loop, and the bits of the result would depend on that.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/blocks.hpp"
#include "kernels/noise.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// The terms k * operand of a sum, without those whose coefficient is zero.
struct Terms {
  static constexpr int most = 8;
  int count = 0;
  float k[most];
  const float* operand[most];

  void add(float coefficient, const float* p) {
    if (coefficient == 0.0f || !p) return;
    k[count] = coefficient;
    operand[count++] = p;
  }
};

// The value of an empty sum, as in the reference: x + -0.0 is x for every x. It is volatile because the compiler would
// otherwise drop the addition, and the first two products would be added directly.
const volatile float nothing = -0.0f;

// Computes the sum of `count` terms, n numbers each, into dst.
template <int count>
void combine(const Terms& terms, int n, float* dst) {
  const Terms local = terms;  // writing to dst cannot change a local copy, so it may stay in registers
  const Vec none = splat(nothing);
  for_vectors(n, [&](int i, auto part) {
    Vec sum = none;
    for (int j = 0; j < count; ++j) sum = sum + local.k[j] * load(local.operand[j] + i, part);
    store(dst + i, sum, part);
  });
}

// Computes the sum of the terms, n numbers each, into dst, which may be one of the operands.
void combine(const Terms& terms, int n, float* dst) {
  switch (terms.count) {
    case 0: combine<0>(terms, n, dst); return;
    case 1: combine<1>(terms, n, dst); return;
    case 2: combine<2>(terms, n, dst); return;
    case 3: combine<3>(terms, n, dst); return;
    case 4: combine<4>(terms, n, dst); return;
    case 5: combine<5>(terms, n, dst); return;
    case 6: combine<6>(terms, n, dst); return;
    case 7: combine<7>(terms, n, dst); return;
    default: combine<8>(terms, n, dst); return;
  }
}

// Replaces x by max(min(x, c), -c). Comparisons with NaN are false, so NaN stays NaN.
void clip(float* x, int n, float c) {
  for_vectors(n, [&](int i, auto part) {
    Vec v = load(x + i, part);
    v = v > c ? splat(c) : v;
    v = v < -c ? splat(-c) : v;
    store(x + i, v, part);
  });
}

// Computes dst = exp(sv v) z. exp() is clamped, and too early for float's range, so exp(sv v / 2) is squared: where
// that is clamped, its square over- or underflows anyway. The comparison keeps NaN, which exp() may not.
void scale_noise(float sv, const float* v, const float* z, int n, float* dst) {
  for_vectors(n, [&](int i, auto part) {
    const Vec exponent = sv * load(v + i, part);
    const Vec root = exp(0.5f * exponent);
    const Vec scale = exponent == exponent ? root * root : exponent;
    store(dst + i, scale * load(z + i, part), part);
  });
}

// Pointers to the same block in the arrays of one image; null where there is no such array.
struct Slice {
  float *x, *xs, *m1, *m2, *m3;
  const float *out, *v, *z;
};

inline void copy(float* dst, const float* src, int n) { std::memcpy(dst, src, n * sizeof(float)); }

// Returns whether the row leaves x as it is and saves nothing, so that no memory needs to be read.
inline bool idles(const Coefficients& k) {
  return k.ax == 1.0f && k.ao == 0.0f && k.a0 == 0.0f && k.a1 == 0.0f && k.a2 == 0.0f && k.a3 == 0.0f &&
         k.as_ == 0.0f && k.s == 0.0f && k.push == 0.0f && k.save == 0.0f;
}

// Applies the row k to a block of n numbers.
void update_block(const Coefficients& k, const Slice& at, int n) {
  alignas(64) float x0[chunk], h[chunk], next[chunk];
  // x0 = clip(kx x + ko out, -c, c)
  if (k.h0 != 0.0f || k.a0 != 0.0f) {
    Terms terms;
    terms.add(k.kx, at.x);
    terms.add(k.ko, at.out);
    combine(terms, n, x0);
    if (!std::isinf(k.c)) clip(x0, n, k.c);
  }
  // h = hx x + ho out + h0 x0
  const bool push = k.push != 0.0f && at.m1;
  if (push) {
    Terms terms;
    terms.add(k.hx, at.x);
    terms.add(k.ho, at.out);
    terms.add(k.h0, x0);
    combine(terms, n, h);
  }
  // x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
  Terms terms;
  terms.add(k.ax, at.x);
  terms.add(k.ao, at.out);
  terms.add(k.a0, x0);
  terms.add(k.a1, at.m1);
  terms.add(k.a2, at.m2);
  terms.add(k.a3, at.m3);
  terms.add(k.as_, at.xs);
  terms.add(k.s, at.z);
  const bool save = k.save != 0.0f && at.xs;
  combine(terms, n, save ? next : at.x);
  // save: xs = x        push: m3, m2, m1 = m2, m1, h
  if (save) {
    copy(at.xs, at.x, n);
    copy(at.x, next, n);
  }
  if (push) {
    if (at.m2 && at.m3) copy(at.m3, at.m2, n);
    if (at.m2) copy(at.m2, at.m1, n);
    copy(at.m1, h, n);
  }
}

// Applies the row k to an image.
void update_image(const UpdateArgs& args, const Coefficients& k, int64_t image) {
  alignas(64) float z[chunk];
  const int64_t size = args.channels * args.pixels;
  const bool learned = k.sv != 0.0f && args.out_channels > args.channels;
  const bool drawn = k.s != 0.0f && !args.z;
  const Stream stream =
      drawn ? stream_of(args.seed[image], args.index[image], args.row[image], /*stream: UPDATE*/ 0) : Stream{};
  for (int64_t begin = 0; begin < size; begin += chunk) {
    const int n = static_cast<int>(std::min<int64_t>(chunk, size - begin));
    const auto at = [&](auto* p) { return p ? p + image * size + begin : nullptr; };
    const float* out = args.out ? args.out + image * args.out_channels * args.pixels + begin : nullptr;
    const float* v = learned ? out + size : nullptr;
    Slice slice = {at(args.x), at(args.xs), at(args.m1), at(args.m2), at(args.m3), out, v, at(args.z)};
    if (k.s != 0.0f) {
      if (drawn) {
        normals(stream, begin / 4, n, z);
        slice.z = z;
      }
      if (learned) {
        scale_noise(k.sv, slice.v, slice.z, n, z);
        slice.z = z;
      }
    }
    update_block(k, slice, n);
  }
}

// Applies to images that take the step, from number `which.begin` of them on, the row of their tables, without advancing
// them.
void update(const UpdateArgs& args, Range which) {
  for (int i = which.begin; i < which.end; ++i) {
    const int64_t image = args.taking(i);
    Coefficients k = args.bank(args.table[image], args.row[image]);
    if (args.x0_scale) {
      k.kx *= args.x0_scale[image];
      k.ko *= args.x0_scale[image];
    }
    if (!idles(k)) update_image(args, k, image);
  }
}

}  // namespace
}  // namespace fastdiff
