// The coefficients of a GroupNorm, from the statistics that the operations before it computed of their results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// Merges the statistics [strips, 2, stride] of all strips into the mean and the sum of squared deviations of each
// channel (Chan, Golub & LeVeque 1979). Means are summed relative to the first strip's, so that a large mean costs no
// precision.
void merge_strips(const float* statistics, int stride, Map map, float* means, float* squares_out) {
  const int strips = map.strips();
  for (int c = 0; c < stride; c += lanes) {
    const Vec first = load(statistics + c);
    Vec sum = splat(0);
    for (int s = 1; s < strips; s++) {
      const int count = std::min(strip, map.height - s * strip) * map.width;
      sum += (load(statistics + (2 * s) * stride + c) - first) * static_cast<float>(count);
    }
    const Vec mean = first + sum / static_cast<float>(map.height * map.width);
    Vec squares = splat(0);
    for (int s = 0; s < strips; s++) {
      const int count = std::min(strip, map.height - s * strip) * map.width;
      const Vec d = load(statistics + (2 * s) * stride + c) - mean;
      squares += load(statistics + (2 * s + 1) * stride + c) + d * d * static_cast<float>(count);
    }
    store(means + c, mean);
    store(squares_out + c, squares);
  }
}

// Computes a.scale and a.shift of the given rows, such that x * a.scale + a.shift is the modulated norm of x:
//
//     y = (x - mean) / sqrt(var + eps) * gamma + beta,    then y * (1 + m_scale) + m_shift where there is a modulation
void norm(const NormArgs& a, Range rows) {
  const int width = padded(a.channels[0]) + (a.count > 1 ? padded(a.channels[1]) : 0);
  const int total = a.channels[0] + (a.count > 1 ? a.channels[1] : 0);
  const int size = total / a.groups;
  const double pixels = static_cast<double>(a.map.height) * a.map.width;
  // The index of channel c among the padded channels of both sources.
  const auto place = [&a](int c) { return c < a.channels[0] ? c : padded(a.channels[0]) + c - a.channels[0]; };
  for (int row = rows.begin; row < rows.end; row++) {
    float* scale = a.scale + static_cast<int64_t>(row) * width;
    float* shift = a.shift + static_cast<int64_t>(row) * width;
    float *mean = scale, *squares = shift;  // a group's means and squares are read before its results overwrite them
    for (int s = 0, at = 0; s < a.count; s++) {
      const int stride = padded(a.channels[s]);
      merge_strips(a.statistics[s] + static_cast<int64_t>(row) * a.map.strips() * 2 * stride, stride, a.map, mean + at,
                   squares + at);
      at += stride;
    }
    for (int s = 0, at = 0; s < a.count; at += padded(a.channels[s++]))
      for (int c = at + a.channels[s]; c < at + padded(a.channels[s]); c++) scale[c] = shift[c] = 0.0f;
    for (int g = 0; g < a.groups; g++) {
      double centre = 0, sum = 0;
      for (int i = g * size; i < (g + 1) * size; i++) centre += mean[place(i)];
      centre /= size;
      for (int i = g * size; i < (g + 1) * size; i++) {
        const double d = mean[place(i)] - centre;
        sum += squares[place(i)] + pixels * d * d;
      }
      const double rstd = 1.0 / std::sqrt(sum / (pixels * size) + a.eps);
      for (int i = g * size; i < (g + 1) * size; i++) {
        double k = rstd * a.gamma[i], b = a.beta[i] - centre * k;
        if (a.modulation.base != nullptr) {
          const float* modulation = a.modulation(row);
          k *= 1.0 + modulation[i];
          b = b * (1.0 + modulation[i]) + modulation[total + i];
        }
        scale[place(i)] = static_cast<float>(k);
        shift[place(i)] = static_cast<float>(b);
      }
    }
  }
}

}  // namespace
}  // namespace fastdiff
