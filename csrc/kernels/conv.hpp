// Convolutions and matrix products, in two steps. conv_load reads strips of the sources, applies norm and Swish, and
// transforms them into items. conv_store multiplies the items with panels of weights, applies the inverse transform,
// adds bias, embedding and residual, and stores the result and its statistics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.hpp"
#include "kernels/gemm.hpp"
#include "kernels/sources.hpp"
#include "kernels/vec.hpp"
#include "kernels/winograd.hpp"

namespace fastdiff {
namespace {

// Loads one vector of channels of a strip's Winograd tiles. pixels: [rows, columns, lanes] of read_pixels.
template <class F, class T>
void load_tiles(const ConvArgs& a, int c, const float* pixels, int columns, T* loaded, int64_t stride) {
  const int tiles = ceil_div(a.map.width, F::out), rows = ceil_div(std::min(strip, a.map.height), F::out);
  for (int ty = 0; ty < rows; ty++)
    transform_input<F>(pixels + ty * columns * F::out * lanes, columns, tiles,
                       loaded + static_cast<int64_t>(ty * tiles) * a.depth() + c, a.depth(), stride);
}

// Loads one vector of channels of a strip's pixels for a direct convolution: item [kernel, kernel, channels] is the
// neighbourhood of a pixel of the result.
template <class T>
void load_taps(const ConvArgs& a, int c, const float* pixels, int columns, T* loaded) {
  const int channels = a.src.all_channels(), depth = a.depth(), rows = std::min(strip, a.map.height);
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < a.map.width; x++) {
      T* item = loaded + static_cast<int64_t>(y * a.map.width + x) * depth + c;
      for (int ky = 0; ky < a.kernel; ky++)
        for (int kx = 0; kx < a.kernel; kx++)
          store(item + (ky * a.kernel + kx) * channels,
                load(pixels + ((y * a.stride + ky) * columns + x * a.stride + kx) * lanes));
    }
}

// Loads strips for a 1 x 1 convolution, whose items are the pixels themselves.
template <class T, bool normed>
void load_pixels(const ConvArgs& a, Range strips, T* loaded) {
  const int per_row = a.map.strips(), depth = a.depth();
  for (int s = strips.begin; s < strips.end; s++, loaded += static_cast<int64_t>(a.items()) * depth) {
    const int row = s / per_row, y0 = s % per_row * strip;
    const int pixels = std::min(strip, a.map.height - y0) * a.map.width;
    for (int part = 0, from = 0; part < a.src.count; from += a.src.channels[part++]) {
      const int channels = a.src.channels[part];
      const float* data = a.src.data[part] + (static_cast<int64_t>(row) * a.map.height + y0) * a.map.width * channels;
      const float* scale = normed ? a.src.scale + static_cast<int64_t>(row) * depth + from : nullptr;
      const float* shift = normed ? a.src.shift + static_cast<int64_t>(row) * depth + from : nullptr;
      for (int i = 0; i < pixels; i++)
        for (int c = 0; c < channels; c += lanes) {
          Vec v = load(data + static_cast<int64_t>(i) * channels + c);
          if (normed) {
            v = v * load(scale + c) + load(shift + c);
            if (a.src.silu) v = silu(v);
          }
          store(loaded + static_cast<int64_t>(i) * depth + from + c, v);
        }
    }
  }
}

// Loads strips for a 1 x 1 convolution behind a LayerNorm: the items are the normalised pixels.
//
//     y = (x - mean) / sqrt(var + eps) * gamma + beta
//
// The mean is computed a second time from differences to the first one, so that a large mean costs no precision.
template <class T>
void load_layer_norm(const ConvArgs& a, Range strips, T* loaded) {
  const int per_row = a.map.strips(), channels = a.src.channels[0], count = a.src.norm_channels;
  const int whole = count / lanes * lanes;
  for (int s = strips.begin; s < strips.end; s++, loaded += static_cast<int64_t>(a.items()) * channels) {
    const int row = s / per_row, y0 = s % per_row * strip;
    const int pixels = std::min(strip, a.map.height - y0) * a.map.width;
    const float* x = a.src.data[0] + (static_cast<int64_t>(row) * a.map.height + y0) * a.map.width * channels;
    for (int i = 0; i < pixels; i++, x += channels) {
      Vec sum = splat(0), first = splat(0), second = splat(0);
      for (int c = 0; c < channels; c += lanes) sum += load(x + c);  // the padding is zeros
      const float centre = total(sum) / count;
      for (int c = 0; c < whole; c += lanes) {
        const Vec d = load(x + c) - centre;
        first += d;
        second += d * d;
      }
      for (int c = whole; c < count; c++) {
        const float d = x[c] - centre;
        first[0] += d;
        second[0] += d * d;
      }
      const float rest = total(first) / count;
      const float scale = 1.0f / std::sqrt(total(second) / count - rest * rest + a.src.eps);
      for (int c = 0; c < channels; c += lanes)
        store(loaded + static_cast<int64_t>(i) * channels + c,
              (load(x + c) - centre - rest) * scale * load(a.src.gamma + c) + load(a.src.beta + c));
    }
  }
}

// The part of a map whose strips lie in a block of strips.
struct Part {
  int row;         // of the batch
  Range strips;    // in the block
  int64_t pixels;  // padded pixels of the block before those of this map, where ConvArgs::windows
};

// Returns the map, or part of one, that has strip s of a block.
Part part_of(const ConvArgs& a, Range block, int s) {
  const int per_row = a.map.strips(), row = s / per_row;
  const Range strips{std::max(block.begin, row * per_row), std::min(block.end, (row + 1) * per_row)};
  return {row, strips, a.padded_before(strips.begin - block.begin, row - block.begin / per_row)};
}

// Loads the padded pixels of strips for a direct convolution whose windows share them. The rows of pixels that two strips
// share belong to the first of them.
template <bool normed>
void load_padded(const ConvArgs& a, Range block, Range strips, BF16* loaded) {
  const int channels = a.src.all_channels(), columns = a.columns(), shared = a.kernel - a.stride;
  const int H = a.src.map.height << a.upsample, W = a.src.map.width << a.upsample;
  const auto wrapped = [&](int at, int size) { return a.circular ? (at + size) % size : at; };
  for (int s = strips.begin; s < strips.end; s++) {
    const Part part = part_of(a, block, s);
    const int first = part.strips.begin % a.map.strips() * strip * a.stride - a.padding;  // row of the map
    const int before = (s - part.strips.begin) * strip * a.stride;
    const int end = before + std::min(strip, a.map.height - s % a.map.strips() * strip) * a.stride + shared;
    for (int r = before + (s > part.strips.begin ? shared : 0); r < end; r++) {
      BF16* line = loaded + (part.pixels + static_cast<int64_t>(r) * columns) * channels;
      const int y = wrapped(first + r, H);
      if (y < 0 || y >= H) {
        std::memset(line, 0, sizeof(BF16) * columns * channels);
        continue;
      }
      for (int i = 0; i < columns; i++, line += channels) {
        const int x = wrapped(i - a.padding, W);
        if (x < 0 || x >= W) {
          std::memset(line, 0, sizeof(BF16) * channels);
          continue;
        }
        if (a.upsample && x % 2 == 1 && i > 0) {  // the same source pixel again
          std::memcpy(line, line - channels, sizeof(BF16) * channels);
          continue;
        }
        const int64_t pixel =
            (static_cast<int64_t>(part.row) * a.src.map.height + (y >> a.upsample)) * a.src.map.width +
            (x >> a.upsample);
        const float* scale = normed ? a.src.scale + static_cast<int64_t>(part.row) * channels : nullptr;
        const float* shift = normed ? a.src.shift + static_cast<int64_t>(part.row) * channels : nullptr;
        for (int source = 0, at = 0; source < a.src.count; source++) {
          const float* data = a.src.data[source] + pixel * a.src.channels[source];
          for (int c = 0; c < a.src.channels[source]; c += lanes, at += lanes) {
            Vec v = load(data + c);
            if (normed) {
              v = v * load(scale + at) + load(shift + at);
              if (a.src.silu) v = silu(v);
            }
            store(line + at, v);
          }
        }
      }
    }
  }
}

// Loads the given strips of a block as the method of the convolution asks for.
template <class T>
void load_strips(const ConvArgs& a, Range block, Range strips, T* loaded, float* space) {
  const int per_row = a.map.strips(), offset = (strips.begin - block.begin) * a.items();
  const int64_t stride = a.load_stride(block.size());
  if (a.kernel == 1 && a.stride == 1 && !a.upsample) {
    const auto load = a.src.gamma != nullptr   ? load_layer_norm<T>
                      : a.src.scale != nullptr ? load_pixels<T, true>
                                               : load_pixels<T, false>;
    return load(a, strips, loaded + static_cast<int64_t>(offset) * a.depth());
  }
  for (int s = strips.begin; s < strips.end;) {
    // Strips that are neighbours in a map share the pixel rows at their edges, so several are read at a time.
    const int n = std::min({a.run(), strips.end - s, per_row - s % per_row});
    const int y0 = s % per_row * strip * a.stride - a.padding;
    for (int c = 0; c < a.src.all_channels(); c += lanes) {
      read_pixels(a.src, a.upsample, a.circular, s / per_row, y0, a.rows(n), -a.padding, a.columns(), c, space);
      for (int i = 0; i < n; i++) {
        const float* pixels = space + static_cast<int64_t>(i) * strip * a.stride * a.columns() * lanes;
        T* first = loaded + static_cast<int64_t>(offset + (s + i - strips.begin) * a.items()) * a.depth();
        switch (a.method) {
          case Method::winograd4: load_tiles<Winograd4>(a, c, pixels, a.columns(), first, stride); break;
          case Method::winograd2: load_tiles<Winograd2>(a, c, pixels, a.columns(), first, stride); break;
          case Method::direct: load_taps(a, c, pixels, a.columns(), first); break;
        }
      }
    }
    s += n;
  }
}

void conv_load(const ConvArgs& a, Range block, Range strips, void* loaded, float* space) {
  if (a.in_place()) return;
  if (a.windows)
    return (a.src.scale != nullptr ? load_padded<true> : load_padded<false>)(a, block, strips,
                                                                             static_cast<BF16*>(loaded));
  if (a.bf16)
    load_strips(a, block, strips, static_cast<BF16*>(loaded), space);
  else
    load_strips(a, block, strips, static_cast<float*>(loaded), space);
}

// Finishes one vector of output channels of a strip: stores (y + bias + residual) * inverse_divide, where `relu` max(that,
// 0), and computes the statistics of what is stored, merging groups of pixels into them (Chan, Golub & LeVeque 1979).
struct Finish {
  static constexpr int most = 16;  // pixels between two calls of measure()
  const ConvArgs* args;
  int row, channel;
  Vec bias, mean, squares;
  int count, held;
  Vec values[most];

  // Begins a strip of a row of the batch.
  void begin(const ConvArgs& a, int row_of_batch, int first_channel) {
    args = &a;
    row = row_of_batch;
    channel = first_channel;
    bias = load(a.bias + channel);
    if (a.emb.base != nullptr) bias += load_some(a.emb(row) + channel, a.emb_channels - channel);
    mean = squares = splat(0);
    count = held = 0;
  }

  // Finishes one pixel.
  inline void pixel(int y, int x, Vec v) {
    const ConvArgs& a = *args;
    v += bias;
    if (a.residual != nullptr) {
      const int h = a.map.height >> a.residual_shift, w = a.map.width >> a.residual_shift;
      v += load(a.residual +
                ((static_cast<int64_t>(row) * h + (y >> a.residual_shift)) * w + (x >> a.residual_shift)) * a.outputs +
                channel);
    }
    v *= a.inverse_divide;
    if (a.relu) v = relu(v);
    store(a.dst + ((static_cast<int64_t>(row) * a.map.height + y) * a.map.width + x) * a.outputs + channel, v);
    values[held++] = v;
  }

  // Finishes n pixels of a row, at most `most`, from their products: the same as pixel() and measure().
  inline void pixels(int y, int left, int n, const float* products) {
    const ConvArgs& a = *args;
    const auto finish = [&]<bool residual>(const float* r) {
      float* to = a.dst + ((static_cast<int64_t>(row) * a.map.height + y) * a.map.width + left) * a.outputs + channel;
      const Vec b = bias;
      const float factor = a.inverse_divide;
      for (int i = 0; i < n; i++, to += a.outputs, r += residual ? a.outputs : 0) {
        Vec v = load(products + static_cast<int64_t>(i) * panel) + b;
        if constexpr (residual) v += load(r);
        v *= factor;
        if (a.relu) v = relu(v);
        store(to, v);
        values[i] = v;
      }
    };
    if (a.residual == nullptr) {
      finish.template operator()<false>(nullptr);
    } else if (a.residual_shift == 0) {
      finish.template operator()<true>(
          a.residual + ((static_cast<int64_t>(row) * a.map.height + y) * a.map.width + left) * a.outputs + channel);
    } else {
      for (int i = 0; i < n; i++) pixel(y, left + i, load(products + static_cast<int64_t>(i) * panel));
    }
    held = n;
    measure();
  }

  // Merges the pixels since the last call, of which there are at most `most`, into the statistics.
  inline void measure() {
    if (args->statistics != nullptr && held > 0) merge(values, held);
    held = 0;
  }

  inline void merge(const Vec* v, int n) {
    Vec sum = v[0];
    for (int i = 1; i < n; i++) sum += v[i];
    const Vec m = sum * (1.0f / n);
    Vec d2 = splat(0);
    for (int i = 0; i < n; i++) d2 += (v[i] - m) * (v[i] - m);
    const float share = static_cast<float>(n) / (count + n);
    const Vec delta = m - mean;
    mean += delta * share;
    squares += d2 + delta * delta * (count * share);
    count += n;
  }

  // Finishes a tile of size x size pixels that lies within the map: the same as pixel() and measure(), without branches
  // per pixel. Prefetches the next vector of channels of these pixels, which is finished after this one of all pixels.
  template <int size>
  inline void tile(int top, int left, Vec* y) {
    const ConvArgs& a = *args;
    const int64_t at = ((static_cast<int64_t>(row) * a.map.height + top) * a.map.width + left) * a.outputs + channel;
    const int64_t line = static_cast<int64_t>(a.map.width) * a.outputs;
    const Vec b = bias;
#pragma GCC unroll 16
    for (int i = 0; i < size * size; i++) y[i] += b;
    if (a.residual != nullptr) {
      const float* r = a.residual + at;
#pragma GCC unroll 16
      for (int i = 0; i < size * size; i++) {
        const float* pixel = r + i / size * line + i % size * a.outputs;
        __builtin_prefetch(pixel + lanes, 0, 2);
        y[i] += load(pixel);
      }
    }
    if (a.relu)  // before the factor, which is positive
#pragma GCC unroll 16
      for (int i = 0; i < size * size; i++) y[i] = relu(y[i]);
    const float factor = a.inverse_divide;
    float* d = a.dst + at;
#pragma GCC unroll 16
    for (int i = 0; i < size * size; i++) {
      float* pixel = d + i / size * line + i % size * a.outputs;
      __builtin_prefetch(pixel + lanes, 1, 2);
      y[i] *= factor;
      store(pixel, y[i]);
    }
    if (a.statistics != nullptr) merge(y, size * size);
  }

  // Stores the statistics of the strip.
  void done(int strip_index) {
    const ConvArgs& a = *args;
    if (a.statistics == nullptr) return;
    float* to = a.statistics + static_cast<int64_t>(strip_index) * 2 * a.outputs + channel;
    store(to, mean);
    store(to + a.outputs, squares);
  }
};

// Finishes one vector of channels of a strip from its Winograd products. y0: the strip's first row of pixels.
template <class F>
__attribute__((noinline)) void store_tiles(const ConvArgs& a, Finish& finish, int y0, const float* products,
                                           int64_t stride) {
  const int tiles = ceil_div(a.map.width, F::out), rows = ceil_div(std::min(strip, a.map.height), F::out);
  for (int ty = 0; ty < rows; ty++)
    for (int tx = 0; tx < tiles; tx++) {
      Vec y[F::out * F::out];
      transform_output<F>(products + static_cast<int64_t>(ty * tiles + tx) * panel, stride, y);
      const int top = y0 + ty * F::out, left = tx * F::out;
      if (top + F::out <= a.map.height && left + F::out <= a.map.width && a.residual_shift == 0) {
        finish.tile<F::out>(top, left, y);
        continue;
      }
      for (int i = 0; i < F::out && top + i < a.map.height; i++)
        for (int j = 0; j < F::out && left + j < a.map.width; j++) finish.pixel(top + i, left + j, y[i * F::out + j]);
      finish.measure();
    }
}

// The same for the vectors of channels `from` to `end` of a panel of a direct convolution, whose products are pixels;
// those of a row of pixels are `row_items` after those of the row before it.
__attribute__((noinline)) void store_pixels(const ConvArgs& a, int s, int p, int from, int end, const float* products,
                                            int row_items) {
  const int row = s / a.map.strips(), y0 = s % a.map.strips() * strip;
  Finish finish[panel / lanes];
  for (int j = from; j < end; j += lanes) finish[j / lanes].begin(a, row, p * panel + j);
  for (int y = y0; y < std::min(y0 + strip, a.map.height); y++, products += static_cast<int64_t>(row_items) * panel)
    for (int x = 0; x < a.map.width; x += Finish::most) {
      const int n = std::min(Finish::most, a.map.width - x);
      for (int j = from; j < end; j += lanes)
        finish[j / lanes].pixels(y, x, n, products + static_cast<int64_t>(x) * panel + j);
    }
  for (int j = from; j < end; j += lanes) finish[j / lanes].done(s);
}

// Finishes vector j of the outputs of panel p, and of their gates, for a strip.
__attribute__((noinline)) void store_gated(const ConvArgs& a, int row, int y0, int p, int j, const float* products) {
  constexpr int gates = panel / 2;
  const Vec bias = load(a.bias + static_cast<int64_t>(p) * panel + j);
  const Vec gate_bias = load(a.bias + static_cast<int64_t>(p) * panel + gates + j);
  const int pixels = std::min(strip, a.map.height - y0) * a.map.width;
  float* to = a.dst + (static_cast<int64_t>(row) * a.map.height + y0) * a.map.width * a.outputs + p * gates + j;
  for (int i = 0; i < pixels; i++, products += panel, to += a.outputs)
    store(to, (load(products) + bias) * gelu(load(products + gates) + gate_bias));
}

// Counts the pixels of all maps before strip s.
int64_t pixels_before(const ConvArgs& a, int s) {
  const int per_row = a.map.strips();
  return (static_cast<int64_t>(s / per_row) * a.map.height + s % per_row * strip) * a.map.width;
}

// Multiplies the items of a block of strips with columns of a panel of weights at every position of the transform.
template <class T>
void multiply_positions(const ConvArgs& a, Range block, int width, const void* loaded, const void* panels,
                        int64_t first_weight, float* products) {
  const T* items = static_cast<const T*>(loaded);
  const T* weights = static_cast<const T*>(panels) + first_weight;
  for (int position = 0; position < a.positions(); position++)
    multiply(block.size() * a.items(), width, a.depth(), items + position * a.load_stride(block.size()), a.depth(),
             weights + static_cast<int64_t>(position) * a.depth() * panel,
             products + position * a.product_stride(block.size()), panel);
}

// The same where the pixels of the sources are the items, and nothing was loaded.
void multiply_pixels(const ConvArgs& a, Range block, int width, int64_t first_weight, float* products) {
  const float* weights = static_cast<const float*>(a.weights) + first_weight;
  const int64_t begin = pixels_before(a, block.begin);
  const int pixels = static_cast<int>(pixels_before(a, block.end) - begin);
  for (int part = 0, row = 0; part < a.src.count; row += a.src.channels[part++])
    multiply(pixels, width, a.src.channels[part], a.src.data[part] + begin * a.src.channels[part], a.src.channels[part],
             weights + static_cast<int64_t>(row) * slice, products, panel, part > 0, a.depth());
}

// The same where the items are windows of padded pixels: the three pixels of a row of a window lie together.
void multiply_windows(const ConvArgs& a, Range block, int width, const BF16* loaded, const BF16* weights,
                      float* products) {
  const int channels = a.src.all_channels(), columns = a.columns();
  for (int s = block.begin; s < block.end;) {
    const Part part = part_of(a, block, s);
    const int end = part.strips.end % a.map.strips() == 0 ? a.map.height : part.strips.end % a.map.strips() * strip;
    const int height = end - part.strips.begin % a.map.strips() * strip;
    multiply_parts((height - 1) * columns + a.map.width, width, a.kernel, static_cast<int64_t>(columns) * channels,
                   a.kernel * channels, loaded + part.pixels * channels, static_cast<int64_t>(a.stride) * channels,
                   weights, products + static_cast<int64_t>(s - block.begin) * a.items() * panel, panel, false);
    s = part.strips.end;
  }
}

void conv_store(const ConvArgs& a, Range block, Range slices, const void* loaded, float* products) {
  forget_tiles();
  const int per_row = a.map.strips(), columns = a.geglu ? panel : a.bf16 ? together<BF16> : slice;
  for (int i = slices.begin; i < slices.end;) {
    const int p = i * columns / panel, from = i * columns % panel;
    const int n = std::min(slices.end - i, (panel - from) / columns);  // slices of this panel
    const int end = std::min({a.per_panel(), a.outputs - p * a.per_panel(), from + n * columns});
    const int width = a.geglu ? panel / 2 + end : end - from;
    const int64_t first_weight = (static_cast<int64_t>(p) * a.positions() * panel + from) * a.depth();
    if (a.in_place())
      multiply_pixels(a, block, width, first_weight, products + from);
    else if (a.windows)
      multiply_windows(a, block, width, static_cast<const BF16*>(loaded),
                       static_cast<const BF16*>(a.weights) + first_weight, products + from);
    else if (a.bf16)
      multiply_positions<BF16>(a, block, width, loaded, a.weights, first_weight, products + from);
    else
      multiply_positions<float>(a, block, width, loaded, a.weights, first_weight, products + from);
    for (int s = block.begin; s < block.end; s++) {
      const int64_t item = a.in_place() ? pixels_before(a, s) - pixels_before(a, block.begin)
                                        : static_cast<int64_t>(s - block.begin) * a.items();
      const float* first = products + item * panel;
      const int row = s / per_row, y0 = s % per_row * strip;
      if (a.method == Method::direct && !a.geglu) {
        store_pixels(a, s, p, from, end, first, a.windows ? a.columns() : a.map.width);
        continue;
      }
      for (int j = from; j < end; j += lanes) {
        if (a.geglu) {
          store_gated(a, row, y0, p, j, first + j);
          continue;
        }
        Finish finish;
        finish.begin(a, row, p * panel + j);
        if (a.method == Method::winograd4)
          store_tiles<Winograd4>(a, finish, y0, first + j, a.product_stride(block.size()));
        else
          store_tiles<Winograd2>(a, finish, y0, first + j, a.product_stride(block.size()));
        finish.done(s);
      }
    }
    i += n;
  }
}

}  // namespace
}  // namespace fastdiff
