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

// Loads strips as the method of the convolution asks for. The first item becomes number `offset` of `items` in
// `loaded`.
template <class T>
void load_strips(const ConvArgs& a, Range strips, T* loaded, int offset, int items, float* space) {
  const int per_row = a.map.strips();
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
          case Method::winograd4: load_tiles<Winograd4>(a, c, pixels, a.columns(), first, a.load_stride(items)); break;
          case Method::winograd2: load_tiles<Winograd2>(a, c, pixels, a.columns(), first, a.load_stride(items)); break;
          case Method::direct: load_taps(a, c, pixels, a.columns(), first); break;
        }
      }
    }
    s += n;
  }
}

void conv_load(const ConvArgs& a, Range strips, void* loaded, int offset, int items, float* space) {
  if (a.in_place()) return;
  if (a.bf16)
    load_strips(a, strips, static_cast<BF16*>(loaded), offset, items, space);
  else
    load_strips(a, strips, static_cast<float*>(loaded), offset, items, space);
}

// Finishes one vector of output channels of a strip: stores (y + bias + residual) * inverse_divide, where `relu` max(that,
// 0), and computes the statistics of what is stored, merging groups of pixels into them (Chan, Golub & LeVeque 1979).
struct Finish {
  const ConvArgs& a;
  int row, channel;
  Vec bias, mean{}, squares{};
  int count = 0;
  Vec values[16];
  int held = 0;

  Finish(const ConvArgs& a, int row, int channel) : a(a), row(row), channel(channel), bias(load(a.bias + channel)) {
    if (a.emb.base != nullptr) bias += load_some(a.emb(row) + channel, a.emb_channels - channel);
  }

  // Finishes one pixel.
  inline void pixel(int y, int x, Vec v) {
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

  // Merges the pixels since the last call, of which there are at most 16, into the statistics.
  inline void measure() {
    if (a.statistics != nullptr && held > 0) merge(values, held);
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

// The same for a direct convolution, whose products are pixels.
__attribute__((noinline)) void store_pixels(const ConvArgs& a, Finish& finish, int y0, const float* products) {
  for (int y = 0; y < strip && y0 + y < a.map.height; y++)
    for (int x = 0; x < a.map.width; x++) {
      finish.pixel(y0 + y, x, load(products + static_cast<int64_t>(y * a.map.width + x) * panel));
      if (finish.held == 16 || x + 1 == a.map.width) finish.measure();
    }
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

// Multiplies `used` items with a panel of weights at every position of the transform.
template <class T>
void multiply_positions(const ConvArgs& a, int used, int width, const T* loaded, int items, const T* weights,
                        float* products) {
  for (int position = 0; position < a.positions(); position++)
    multiply(used, width, a.depth(), loaded + position * a.load_stride(items), a.depth(),
             weights + static_cast<int64_t>(position) * a.depth() * panel,
             products + position * a.product_stride(items), panel);
}

void conv_store(const ConvArgs& a, Range strips, Range slices, const void* loaded, int items, float* products) {
  forget_tiles();
  const int per_row = a.map.strips(), depth = a.depth(), columns = a.whole_panels() ? panel : slice;
  const int64_t stride = a.product_stride(items), begin = pixels_before(a, strips.begin);
  for (int i = slices.begin; i < slices.end;) {
    const int p = i * columns / panel, from = i * columns % panel;
    const int n = std::min(slices.end - i, (panel - from) / columns);  // slices of this panel
    const int end = std::min({a.per_panel(), a.outputs - p * a.per_panel(), from + n * columns});
    const int width = a.geglu ? panel / 2 + end : end - from;
    const int64_t first_weight = (static_cast<int64_t>(p) * a.positions() * panel + from) * depth;
    const int used = strips.size() * a.items();
    if (a.in_place()) {  // the pixels of the sources are the items, and nothing was loaded
      const float* weights = static_cast<const float*>(a.weights) + first_weight;
      const int pixels = static_cast<int>(pixels_before(a, strips.end) - begin);
      for (int part = 0, row = 0; part < a.src.count; row += a.src.channels[part++])
        multiply(pixels, width, a.src.channels[part], a.src.data[part] + begin * a.src.channels[part],
                 a.src.channels[part], weights + static_cast<int64_t>(row) * slice, products + from, panel, part > 0,
                 depth);
    } else if (a.bf16) {
      multiply_positions(a, used, width, static_cast<const BF16*>(loaded), items,
                         static_cast<const BF16*>(a.weights) + first_weight, products + from);
    } else {
      multiply_positions(a, used, width, static_cast<const float*>(loaded), items,
                         static_cast<const float*>(a.weights) + first_weight, products + from);
    }
    for (int s = strips.begin; s < strips.end; s++)
      for (int j = from; j < end; j += lanes) {
        const int64_t item =
            a.in_place() ? pixels_before(a, s) - begin : static_cast<int64_t>(s - strips.begin) * a.items();
        const float* first = products + item * panel + j;
        const int y0 = s % per_row * strip;
        if (a.geglu) {
          store_gated(a, s / per_row, y0, p, j, first);
          continue;
        }
        Finish finish(a, s / per_row, p * panel + j);
        switch (a.method) {
          case Method::winograd4: store_tiles<Winograd4>(a, finish, y0, first, stride); break;
          case Method::winograd2: store_tiles<Winograd2>(a, finish, y0, first, stride); break;
          case Method::direct: store_pixels(a, finish, y0, first); break;
        }
        finish.done(s);
      }
    i += n;
  }
}

}  // namespace
}  // namespace fastdiff
