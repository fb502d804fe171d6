// What the engine asks of an instruction set: arguments and entry points of every kernel.
//
// Activations are NHWC in float32. In memory every pixel has its channels padded with zeros to a multiple of `group`,
// and every kernel writes those zeros, so that none has to handle the rest of a vector. A row is one evaluation of the
// network. Work is counted in strips: `strip` pixel rows of one row's output, numbered through all rows.
#pragma once

#include <cstdint>

#include "update.hpp"

namespace fastdiff {

constexpr int group = 16;  // channels are padded to a multiple of this
constexpr int panel = 64;  // output channels multiplied at a time
constexpr int strip = 4;   // pixel rows that a unit of work makes

static inline int padded(int channels) { return (channels + group - 1) / group * group; }
static inline int even(int n) { return n + n % 2; }
static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
  int size() const { return end - begin; }
};

// The part of `range` that worker `i` of `n` does.
static inline Range share(Range range, int i, int n) {
  const int64_t size = range.size();
  return {range.begin + static_cast<int>(size * i / n), range.begin + static_cast<int>(size * (i + 1) / n)};
}

struct Map {
  int height, width;
  int strips() const { return ceil_div(height, strip); }
};

// One vector per row: base + index[row] * stride, or base + row * stride where there is no index.
struct RowVectors {
  const float* base = nullptr;
  const int64_t* index = nullptr;
  int64_t stride = 0;
  const float* operator()(int row) const { return base + (index ? index[row] : row) * stride; }
};

// The sources of an operation, concatenated, and the norm that is applied while they are read.
struct Sources {
  int count = 0;
  const float* data[2] = {};
  int channels[2] = {};          // padded
  Map map;                       // of each source
  const float* scale = nullptr;  // [rows, all channels]: norm(x) = x * scale + shift; null: no norm
  const float* shift = nullptr;
  bool silu = false;
  int all_channels() const { return channels[0] + channels[1]; }
};

struct NormArgs {
  int count;
  const float* statistics[2];  // [rows, strips, 2, padded channels]: mean, sum of squared deviations
  int channels[2];             // as they are, not padded
  Map map;
  int groups;
  float eps;
  const float* gamma;  // [channels]
  const float* beta;
  RowVectors modulation;  // [scale, shift] of a row; base null: none
  float* scale;           // out: [rows, padded channels of all sources]
  float* shift;
};

enum class Method { direct, winograd2, winograd4 };

struct ConvArgs {
  Sources src;
  Map map;        // of the result
  int kernel;     // 1 or 3
  int stride;     // 1 or 2
  int padding;    // before the first row and column
  bool upsample;  // the sources are doubled (nearest)
  Method method;
  bool bf16;            // products of bfloat16: load rounds, and the weights are such
  const void* weights;  // [panels, positions, depth, panel], zero-padded; of bfloat16 [.., depth / 2, panel, 2]
  const float* bias;    // [padded outputs]
  int outputs;          // padded
  RowVectors emb;       // added to the bias of a row, not padded; base null: none
  int emb_channels;
  const float* residual;
  int residual_shift;  // 1: of half the size, doubled (nearest)
  float inverse_divide;
  float* dst;
  float* statistics;  // null: not wanted

  // Products at every position of the transform: 1, 16 or 36.
  int positions() const { return method == Method::direct ? 1 : method == Method::winograd2 ? 16 : 36; }
  // Pixels on a tile's side.
  int tile() const { return method == Method::winograd4 ? 4 : method == Method::winograd2 ? 2 : 1; }
  // Summands of a product.
  int depth() const { return src.all_channels() * (method == Method::direct ? kernel * kernel : 1); }
  int panels() const { return ceil_div(outputs, panel); }
  // Items (tiles, or pixels where direct) of a strip; the last strip of a map may use fewer.
  int items() const { return ceil_div(map.height < strip ? map.height : strip, tile()) * ceil_div(map.width, tile()); }
  // Numbers between two positions. Odd multiples of a cache line, or all positions would share one cache set.
  int64_t load_stride(int items) const { return static_cast<int64_t>(items) * depth() + (bf16 ? 2 : 1) * group; }
  int64_t product_stride(int items) const { return static_cast<int64_t>(items) * panel + group; }
  int64_t load_size(int items) const { return positions() * load_stride(items) / (bf16 ? 2 : 1); }  // in floats
  int64_t product_size(int items) const { return positions() * product_stride(items); }
  // A product of the sources as they lie in memory: nothing is loaded.
  bool in_place() const {
    return method == Method::direct && kernel == 1 && stride == 1 && src.scale == nullptr && !upsample && !bf16;
  }
  // Pixels that n strips of one map read. Tiles may reach beyond the map; what they make there is dropped.
  int columns() const { return stride * (ceil_div(map.width, tile()) * tile() - 1) + kernel; }
  int rows(int n) const {
    const int height = map.height < strip ? map.height : n * strip;
    return stride * (ceil_div(height, tile()) * tile() - 1) + kernel;
  }
  // Strips that are read together: as many as leave their pixels, one group of channels of them, in the first-level
  // cache.
  int run() const {
    int n = 1;
    while (n < 8 && static_cast<int64_t>(rows(n + 1)) * columns() * group <= 8 * 1024) n++;
    return n;
  }
  // Numbers of the working space in which one group of channels is read.
  int64_t space() const { return static_cast<int64_t>(rows(run())) * columns() * group; }
};

struct PoolArgs {
  Sources src;
  Map map;
  float* dst;
  int64_t space() const { return static_cast<int64_t>(2 * strip) * 2 * map.width * group; }
};

// Keys and values are normalised while they are read where there is a scale, which needs one head as wide as its source.
struct AttentionArgs {
  const float* queries;  // [rows, pixels, query_stride], heads side by side
  const float* keys;     // [rows, pixels, key_stride]
  const float* values;
  int query_stride, key_stride;
  const float* scale;  // [rows, padded(head_dim)], or null
  const float* shift;
  int pixels, heads, head_dim;
  bool bf16;   // products of bfloat16
  float* dst;  // [rows, pixels, padded(heads * head_dim)]

  static constexpr int block = 48;  // queries at a time
  int blocks() const { return ceil_div(pixels, block); }
  int64_t space() const {
    const int64_t keys = ceil_div(pixels, panel) * panel, width = ceil_div(head_dim, panel) * panel;
    return keys * even(head_dim) + width * even(pixels) + block * (2 * keys + width + padded(head_dim));
  }
};

struct InputArgs {
  const float* x;          // [images, channels, H, W]; row r reads image r mod images
  RowVectors class_image;  // a row's [H, W, channels], as it is; base null: none
  int images, channels;
  Map map;
  bool center;
  int combine;  // 0 nothing, 1 add, 2 multiply, 3 concatenate
  float* dst;   // [rows, H, W, padded]
};

struct Kernels {
  const char* name;
  int lanes;
  bool bf16;  // whether it multiplies bfloat16
  // Every kernel works on a part of the operation. `space` is the caller's, args.space() numbers.
  // For rows `rows`: statistics -> scale and shift.
  void (*norm)(const NormArgs&, Range rows);
  // Read, normalise and transform strips into `loaded` [positions, items, depth], whose first item is `offset` and
  // which has room for `items`.
  void (*conv_load)(const ConvArgs&, Range strips, void* loaded, int offset, int items, float* space);
  // Multiply what was loaded with panels of weights, and finish. `products`: product_size(items) numbers.
  void (*conv_store)(const ConvArgs&, Range strips, Range panels, const void* loaded, int items, float* products);
  void (*pool)(const PoolArgs&, Range strips, float* space);
  // For blocks of queries, numbered through rows, heads and blocks.
  void (*attention)(const AttentionArgs&, Range units, float* space);
  void (*input)(const InputArgs&, Range strips);
  void (*embed)(RowVectors time, RowVectors classes, int features, float* dst, Range rows);
  // A product by itself, and multiply-adds without any memory, fma_chains vectors of them a round: for measurements.
  void (*multiply)(int items, int width, int depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                   bool onto);
  float (*fma)(int64_t rounds);
  int fma_chains;
  void (*update)(const UpdateArgs&, Range images);
  void (*guide)(const GuideArgs&, Range images);
  void (*noise)(const NoiseArgs&, Range images);
};

}  // namespace fastdiff
