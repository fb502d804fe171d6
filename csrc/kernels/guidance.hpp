// Classifier-free guidance (Ho & Salimans 2022), and its rescaling (Lin et al. 2023, arXiv:2305.08891): NHWC output of
// the network -> planes of channels. The reference is `guide` of fastdiff/core/update.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/blocks.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

typedef double VecD __attribute__((vector_size(FASTDIFF_LANES * 4)));

// Copies one channel of n pixels, which are `stride` numbers apart, to dst.
inline void gather(const float* src, int stride, int n, float* dst) {
  for (int i = 0; i < n; ++i) dst[i] = src[static_cast<int64_t>(i) * stride];
}

// Calls body(channel, begin, n) for the blocks of n pixels, from `begin` on, of every channel's plane.
template <class Body>
inline void for_planes(Range channels, int64_t pixels, Body body) {
  for (int channel = channels.begin; channel < channels.end; ++channel)
    for (int64_t begin = 0; begin < pixels; begin += chunk)
      body(channel, begin, static_cast<int>(std::min<int64_t>(chunk, pixels - begin)));
}

// Loads as many floats as a vector has doubles, and converts them.
inline VecD load_double(const float* p) {
  float __attribute__((vector_size(FASTDIFF_LANES * 2))) half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, VecD);
}

// Sums f(x) over n numbers x in double precision. The order of summation depends on n alone.
template <class F>
double sum_of(const float* x, int n, F f) {
  constexpr int width = lanes / 2;
  VecD sums = {};
  int i = 0;
  for (; i + width <= n; i += width) sums = sums + f(load_double(x + i));
  double sum = 0.0;
  for (int j = 0; j < width; ++j) sum += sums[j];
  for (; i < n; ++i) sum += f(static_cast<double>(x[i]));
  return sum;
}

double sum_of(const float* x, int n) {
  return sum_of(x, n, [](auto v) { return v; });
}

double sum_of_squares(const float* x, int n, double mean) {
  return sum_of(x, n, [mean](auto v) { return (v - mean) * (v - mean); });
}

// Computes out = u + w (c - u) of one image and, where there is a rescaling phi, then
//
//     out = phi out std(c) / std(out) + (1 - phi) out,    std over the guided elements of the image
//
// Deviations are relative to a mean computed before them, so a mean much larger than its deviation costs no precision.
void guide_image(const GuideArgs& args, const float* conditional, const float* unconditional, float w, float phi,
                 float* out) {
  alignas(64) float c[chunk], u[chunk];
  const Range guided = {0, args.channels};
  const auto read = [&](const float* row, int channel, int64_t begin, int n, float* dst) {
    gather(row + begin * args.padded + channel, args.padded, n, dst);
  };
  double sum_c = 0.0, sum_out = 0.0;
  for_planes(guided, args.pixels, [&](int channel, int64_t begin, int n) {
    float* dst = out + channel * args.pixels + begin;
    read(conditional, channel, begin, n, c);
    read(unconditional, channel, begin, n, u);
    for_vectors(n, [&](int i, auto part) {
      const Vec without = load(u + i, part);
      store(dst + i, without + w * (load(c + i, part) - without), part);
    });
    if (phi == 0.0f) return;
    sum_c += sum_of(c, n);
    sum_out += sum_of(dst, n);
  });
  if (phi == 0.0f) return;

  const double size = static_cast<double>(args.channels * args.pixels);
  double squares_c = 0.0, squares_out = 0.0;
  for_planes(guided, args.pixels, [&](int channel, int64_t begin, int n) {
    read(conditional, channel, begin, n, c);
    squares_c += sum_of_squares(c, n, sum_c / size);
    squares_out += sum_of_squares(out + channel * args.pixels + begin, n, sum_out / size);
  });
  // phi out ratio + (1 - phi) out as one product. The ratio of sums is that of variances, as their sizes are equal.
  const float ratio = static_cast<float>(std::sqrt(squares_c / squares_out));
  const float factor = phi * ratio + (1.0f - phi);
  for_planes(guided, args.pixels, [&](int channel, int64_t begin, int n) {
    float* dst = out + channel * args.pixels + begin;
    for_vectors(n, [&](int i, auto part) { store(dst + i, factor * load(dst + i, part), part); });
  });
}

// Guides the images that take the step, from number `which.begin` of them on. An image whose weight is 1 gets its
// conditional output bit for bit; its unconditional output is not read.
void guide(const GuideArgs& args, Range which) {
  const int64_t row_size = args.pixels * args.padded;
  for (int i = which.begin; i < which.end; ++i) {
    const int64_t image = args.taking(i);
    const int pair = args.pair ? args.pair[i] : -1;
    const float* conditional = args.net + i * row_size;
    float* out = args.out + image * args.out_channels * args.pixels;
    const float w =
        pair >= 0 ? guidance_weight(args.bank(args.table[image], args.row[image]).g, args.guidance[image]) : 1.0f;
    if (w != 1.0f)
      guide_image(args, conditional, args.net + pair * row_size, w, args.rescale ? args.rescale[image] : 0.0f, out);
    for_planes({w != 1.0f ? args.channels : 0, args.out_channels}, args.pixels, [&](int channel, int64_t begin, int n) {
      gather(conditional + begin * args.padded + channel, args.padded, n, out + channel * args.pixels + begin);
    });
  }
}

}  // namespace
}  // namespace fastdiff
