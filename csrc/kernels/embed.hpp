// The embedding of timestep and class.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// Computes dst [rows, padded features] = silu(time + class) of the given rows.
void embed(RowVectors time, RowVectors classes, int features, float* dst, Range rows) {
  for (int row = rows.begin; row < rows.end; row++)
    for (int c = 0; c < padded(features); c += lanes) {
      Vec v = splat(0);
      for (int l = 0; l < lanes && c + l < features; l++) v[l] = time(row)[c + l] + classes(row)[c + l];
      store(dst + static_cast<int64_t>(row) * padded(features) + c, silu(v));
    }
}

}  // namespace
}  // namespace fastdiff
