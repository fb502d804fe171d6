// Means of 2 x 2 pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.hpp"
#include "kernels/sources.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// Computes strips of dst, each pixel of which is the mean of 2 x 2 pixels of the normalised sources. space: working
// space of a.space() numbers.
void pool(const PoolArgs& a, Range strips, float* space) {
  const int channels = a.src.all_channels(), per_row = a.map.strips();
  for (int s = strips.begin; s < strips.end; s++) {
    const int row = s / per_row, y0 = s % per_row * strip, rows = std::min(strip, a.map.height - y0);
    for (int c = 0; c < channels; c += lanes) {
      read_pixels(a.src, false, false, row, 2 * y0, 2 * rows, 0, 2 * a.map.width, c, space);
      for (int y = 0; y < rows; y++)
        for (int x = 0; x < a.map.width; x++) {
          const float* p = space + (4 * y * a.map.width + 2 * x) * lanes;
          const float* q = p + 2 * a.map.width * lanes;
          const Vec sum = (load(p) + load(p + lanes)) + (load(q) + load(q + lanes));
          store(a.dst + ((static_cast<int64_t>(row) * a.map.height + y0 + y) * a.map.width + x) * channels + c,
                sum * 0.25f);
        }
    }
  }
}

}  // namespace
}  // namespace fastdiff
