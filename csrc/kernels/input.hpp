// The first operation of a network: planes of the image and of the class image -> NHWC.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.hpp"

namespace fastdiff {
namespace {

// Computes strips of dst [rows, H, W, padded channels], as InputArgs describes it.
void input(const InputArgs& a, Range strips) {
  const int64_t plane = static_cast<int64_t>(a.map.height) * a.map.width;
  const int width = padded(a.channels * (a.combine == 3 ? 2 : 1)), per_row = a.map.strips();
  for (int s = strips.begin; s < strips.end; s++) {
    const int row = s / per_row, y0 = s % per_row * strip;
    const float* x = a.x + static_cast<int64_t>(row % a.images) * a.channels * plane;
    const float* m = a.class_image.base == nullptr ? nullptr : a.class_image(row);
    const int64_t last = std::min<int64_t>(y0 + strip, a.map.height) * a.map.width;
    for (int64_t p = static_cast<int64_t>(y0) * a.map.width; p < last; p++) {
      float* pixel = a.dst + (row * plane + p) * width;
      int c = 0;
      for (; c < a.channels; c++) {
        float v = x[c * plane + p];
        if (a.center) v = 2.0f * v - 1.0f;
        if (a.combine == 1) v += m[p * a.channels + c];
        if (a.combine == 2) v *= 1.0f + m[p * a.channels + c];
        pixel[c] = v;
      }
      if (a.combine == 3)
        for (int k = 0; k < a.channels; k++) pixel[c++] = m[p * a.channels + k];
      for (; c < width; c++) pixel[c] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace fastdiff
