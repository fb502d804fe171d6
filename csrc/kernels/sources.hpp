// Reads the sources of an operation: concatenation, norm and Swish, nearest-neighbour doubling and padding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// Reads one vector of channels, from channel `c` of the concatenated sources on, of `rows` x `columns` pixels whose
// first is (y0, x0), into out [rows, columns, lanes]. Pixels outside the map are zeros, or where `circular` those of its
// other side; then all columns of the map must be read.
template <bool normed, bool upsample>
void read_block(const Sources& s, bool circular, int row, int y0, int rows, int x0, int columns, int c, float* out) {
  const int part = c < s.channels[0] ? 0 : 1;
  const int channels = s.channels[part];
  const float* data = s.data[part] + (part ? c - s.channels[0] : c);
  const int H = s.map.height << upsample, W = s.map.width << upsample;
  Vec scale{}, shift{};
  if (normed) {
    const int64_t at = static_cast<int64_t>(row) * s.all_channels() + c;
    scale = load(s.scale + at);
    shift = load(s.shift + at);
  }
  const int first = std::max(0, -x0), last = std::min(columns, W - x0);
  for (int r = 0; r < rows; r++) {
    float* line = out + static_cast<int64_t>(r) * columns * lanes;
    const int y = circular ? (y0 + r + H) % H : y0 + r;
    if (y < 0 || y >= H) {
      std::memset(line, 0, sizeof(float) * columns * lanes);
      continue;
    }
    const float* pixels = data + (static_cast<int64_t>(row) * s.map.height + (y >> upsample)) * s.map.width * channels;
    for (int x = 0; x < first; x++) store(line + x * lanes, splat(0));
    for (int x = std::max(last, 0); x < columns; x++) store(line + x * lanes, splat(0));
    for (int x = first; x < last;) {
      const float* pixel = pixels + static_cast<int64_t>((x + x0) >> upsample) * channels;
      __builtin_prefetch(pixel + lanes, 0, 2);
      Vec v = load(pixel);
      if (normed) {
        v = v * scale + shift;
        if (s.silu) v = silu(v);
      }
      store(line + x * lanes, v);
      x++;
      if (upsample && ((x + x0) & 1) && x < last) {  // the same source pixel again
        store(line + x * lanes, v);
        x++;
      }
    }
    if (!circular) continue;
    const auto wrap = [&](int x) { store(line + x * lanes, load(line + ((x + x0 + W) % W - x0) * lanes)); };
    for (int x = 0; x < first; x++) wrap(x);
    for (int x = last; x < columns; x++) wrap(x);
  }
}

// Calls the instance of read_block that fits the sources; the arguments are its.
void read_pixels(const Sources& s, bool upsample, bool circular, int row, int y0, int rows, int x0, int columns, int c,
                 float* out) {
  const auto read = s.scale != nullptr ? (upsample ? read_block<true, true> : read_block<true, false>)
                                       : (upsample ? read_block<false, true> : read_block<false, false>);
  read(s, circular, row, y0, rows, x0, columns, c, out);
}

}  // namespace
}  // namespace fastdiff
