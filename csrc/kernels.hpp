// The interface between the engine and an instruction set: arguments and entry points of every kernel.
//
// Activations are NHWC in float32. In memory the channels of every pixel are padded with zeros to a multiple of
// `group`. Every kernel writes those zeros, so that none has to handle partial vectors of channels. A row is one
// evaluation of the network. The unit of work is a strip: `strip` rows of pixels of one row's result. Strips are
// numbered across all rows.
#pragma once

#include <cstdint>

#include "update.hpp"

namespace fastdiff {

constexpr int group = 16;  // channels are padded to a multiple of this
constexpr int panel = 64;  // output channels in a packed panel of weights
constexpr int strip = 4;   // rows of pixels in a unit of work

static inline int padded(int channels) { return (channels + group - 1) / group * group; }
static inline int even(int n) { return n + n % 2; }
static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
  int size() const { return end - begin; }
};

// Returns the part of `range` that worker `i` of `n` processes.
static inline Range share(Range range, int i, int n) {
  const int64_t size = range.size();
  return {range.begin + static_cast<int>(size * i / n), range.begin + static_cast<int>(size * (i + 1) / n)};
}

// The size of a feature map.
struct Map {
  int height, width;
  int strips() const { return ceil_div(height, strip); }
};

// A vector for each row: base + index[row] * stride, or base + row * stride where index is null.
struct RowVectors {
  const float* base = nullptr;
  const int64_t* index = nullptr;
  int64_t stride = 0;
  const float* operator()(int row) const { return base + (index ? index[row] : row) * stride; }
};

// The sources of an operation, which are concatenated, and the norm that is applied while they are read.
struct Sources {
  int count = 0;
  const float* data[2] = {};
  int channels[2] = {};          // padded
  Map map;                       // size of each source
  const float* scale = nullptr;  // [rows, all channels]: norm(x) = x * scale + shift; null: there is no norm
  const float* shift = nullptr;
  bool silu = false;
  // A LayerNorm of the only source, in place of scale and shift: each pixel is normalised over its channels.
  const float* gamma = nullptr;  // [padded channels], as is beta; null: there is none
  const float* beta = nullptr;
  float eps = 0;
  int norm_channels = 0;  // without padding
  int all_channels() const { return channels[0] + channels[1]; }
};

// Arguments of a GroupNorm over one or two sources.
struct NormArgs {
  int count;                   // sources; 0: there is no norm
  const float* statistics[2];  // [rows, strips, 2, padded channels]: mean, sum of squared deviations
  int channels[2];             // without padding
  Map map;
  int groups;
  float eps;
  const float* gamma;  // [channels]
  const float* beta;
  RowVectors modulation;  // a row's [scale, shift]; base null: none
  float* scale;           // result: [rows, padded channels of all sources], as is shift
  float* shift;
};

// How a convolution is computed: F(2, 3) and F(4, 3) are described in kernels/winograd.hpp.
enum class Method { direct, winograd2, winograd4 };

// Arguments of a convolution or matrix product: dst = (W * norm(src) + bias + emb + residual) * inverse_divide.
//
// Where `geglu`, a product without emb, residual, division and statistics has a gate for each output h, and dst = h *
// gelu(gate). Half of each panel's columns are outputs, the others are the gates of these. Where `relu`, dst is max(that,
// 0), and inverse_divide is positive.
struct ConvArgs {
  Sources src;
  Map map;        // size of the result
  int kernel;     // 1 or 3
  int stride;     // 1 or 2
  int padding;    // pixels before the first row and column
  bool circular;  // the padding repeats the other side of the map; otherwise it is zeros
  bool upsample;  // the sources are doubled in size (nearest neighbour) before the convolution
  Method method;
  bool geglu;
  bool relu;
  bool bf16;            // operands are bfloat16: conv_load rounds the sources, and weights hold bfloat16
  bool windows;         // direct 3x3: items are windows of the padded pixels that are loaded, which share them
  const void* weights;  // [panels, positions, panel / slice, depth, slice]; bfloat16: [.., depth / 2, slice, 2]
  const float* bias;    // [padded outputs]; where geglu [panels, panel]
  int outputs;          // channels of dst, padded
  RowVectors emb;       // added to the bias of a row; base null: none
  int emb_channels;     // not padded
  const float* residual;
  int residual_shift;  // 1: the residual has half the size, and is doubled (nearest neighbour)
  float inverse_divide;
  float* dst;
  float* statistics;  // [rows, strips, 2, outputs] as in NormArgs, or null

  // Number of positions of the transform, each of which is a matrix product: 1, 16 or 36.
  int positions() const { return method == Method::direct ? 1 : method == Method::winograd2 ? 16 : 36; }
  // Pixels along the side of a tile.
  int tile() const { return method == Method::winograd4 ? 4 : method == Method::winograd2 ? 2 : 1; }
  // Number of summands of a product.
  int depth() const { return src.all_channels() * (method == Method::direct ? kernel * kernel : 1); }
  int per_panel() const { return geglu ? panel / 2 : panel; }  // channels of dst that a panel has
  int panels() const { return ceil_div(outputs, per_panel()); }
  // Rows of pixels in a strip; the last strip of a map may have fewer.
  int strip_rows() const { return map.height < strip ? map.height : strip; }
  // Items (tiles, or pixels where direct) per strip; the last strip of a map may have fewer. Where `windows`, also those
  // between two rows of pixels, which are of no use: they let the items of a map follow each other at equal distances.
  int items() const { return ceil_div(strip_rows(), tile()) * (windows ? columns() : ceil_div(map.width, tile())); }
  // Numbers between two positions. The added `group` keeps positions from mapping to the same cache sets.
  int64_t load_stride(int strips) const {
    if (windows) return padded_before(strips, ceil_div(strips - 1, map.strips()) + 1) * src.all_channels();
    return static_cast<int64_t>(strips) * items() * depth() + (bf16 ? 2 : 1) * group;
  }
  int64_t product_stride(int strips) const { return static_cast<int64_t>(strips) * items() * panel + group; }
  int64_t load_size(int strips) const { return positions() * load_stride(strips) / (bf16 ? 2 : 1); }  // in floats
  int64_t product_size(int strips) const { return positions() * product_stride(strips); }
  // Where `windows`: the maps of a block of strips, whole or in part, lie one after the other. Returns the number of
  // padded pixels before strip n of the block, if `maps` maps begin before it.
  int64_t padded_before(int n, int maps) const {
    return (static_cast<int64_t>(n) * strip_rows() * stride + static_cast<int64_t>(maps) * (kernel - stride)) *
           columns();
  }
  // Whether the sources in memory are the operand of the product, so that nothing needs to be loaded.
  bool in_place() const {
    return method == Method::direct && kernel == 1 && stride == 1 && src.scale == nullptr && src.gamma == nullptr &&
           !upsample && !bf16;
  }
  // Size of the region that n strips of one map read. Tiles may extend beyond the map; those pixels are dropped.
  int columns() const { return stride * (ceil_div(map.width, tile()) * tile() - 1) + kernel; }
  int rows(int n) const {
    const int height = map.height < strip ? map.height : n * strip;
    return stride * (ceil_div(height, tile()) * tile() - 1) + kernel;
  }
  // Number of strips that are read at a time: as many as have their pixels, one group of channels of them, fit into the
  // L1 cache.
  int run() const {
    int n = 1;
    while (n < 8 && static_cast<int64_t>(rows(n + 1)) * columns() * group <= 8 * 1024) n++;
    return n;
  }
  // Numbers of working space that reading one group of channels needs.
  int64_t space() const { return static_cast<int64_t>(rows(run())) * columns() * group; }
};

// Arguments of packing the weights of a convolution.
struct PackArgs {
  const float* weights;  // [outputs, channels, kernel, kernel]
  int outputs, channels, kernel;
  Method method;
  bool bf16;
  const int* channel;   // [padded_channels]: the channel of the weights that is at this place; -1: zeros
  int padded_channels;  // those of all sources, each padded
  void* to;             // as ConvArgs::weights

  int groups() const { return padded_channels / group; }
  // Rows of a channel and a panel: positions of the transform, or taps where direct.
  int rows() const { return method == Method::direct ? kernel * kernel : method == Method::winograd2 ? 16 : 36; }
};

// Arguments of the mean over 2 x 2 pixels.
struct PoolArgs {
  Sources src;
  Map map;  // size of the result
  float* dst;
  int64_t space() const { return static_cast<int64_t>(2 * strip) * 2 * map.width * group; }
};

// Arguments of attention. Where scale is not null, keys and values are normalised while they are read; that needs a
// single head that is as wide as its source.
struct AttentionArgs {
  const float* queries;     // [rows, pixels, query_stride], the heads of a pixel one after the other
  RowVectors keys, values;  // a row's [keys_count, key_stride], of its own pixels or of its text
  int query_stride, key_stride;
  const float* scale;  // [rows, padded(head_dim)], or null
  const float* shift;
  int pixels, keys_count, heads, head_dim;
  bool bf16;   // operands of the products are bfloat16
  float* dst;  // [rows, pixels, padded(heads * head_dim)]

  static constexpr int block = 48;       // queries in a unit of work
  static constexpr int key_block = 512;  // keys that are packed at a time, which bounds the working space
  int blocks() const { return ceil_div(pixels, block); }
  // Number of units for which a block of keys is packed once. Where there is one block, it stays packed for all units.
  int together() const { return keys_count > key_block ? 8 : 1; }
  int64_t space() const {
    const int most = keys_count < key_block ? keys_count : key_block;
    const int64_t keys = ceil_div(most, panel) * panel, width = ceil_div(head_dim, panel) * panel;
    return keys * even(head_dim) + width * even(most) + block * (2 * keys + padded(head_dim)) +
           together() * block * (width + 2);
  }
};

// Arguments of the operation that reads the images.
struct InputArgs {
  const float* x;          // [images, channels, H, W]; row r reads image r % images
  RowVectors class_image;  // a row's [H, W, channels], without padding; base null: none
  int images, channels;
  Map map;
  bool center;  // x is replaced by 2 x - 1
  int combine;  // with the class image m: 0 nothing, 1 x + m, 2 x * (1 + m), 3 concatenate
  float* dst;   // [rows, H, W, padded]
};

// The kernels of one instruction set. Each processes a part of an operation: `rows`, `strips`, `units` or `images`, of
// which update and guide count those that take the step.
// `space` is working memory of args.space() numbers that the caller provides.
struct Kernels {
  const char* name;
  int lanes;
  int slice;       // columns of a panel of floats that are stored together: it is [panel / slice, depth, slice]
  int bf16_slice;  // the same of bfloat16: [panel / slice, depth / 2, slice, 2]
  bool bf16;       // whether it can multiply bfloat16
  bool windows;    // whether it multiplies windows in place, by ConvArgs::windows, in bfloat16
  // Computes scale and shift from statistics.
  void (*norm)(const NormArgs&, Range rows);
  // Reads, normalises and transforms the given strips of a block into `loaded`, which has room for the block: [positions,
  // items, depth], or where ConvArgs::windows padded pixels.
  void (*conv_load)(const ConvArgs&, Range block, Range strips, void* loaded, float* space);
  // Multiplies the loaded items of a block of strips with slices of weights, and finishes them. `products`:
  // product_size() numbers of working memory.
  void (*conv_store)(const ConvArgs&, Range block, Range slices, const void* loaded, float* products);
  void (*pool)(const PoolArgs&, Range strips, float* space);
  // A unit is a block of queries: (row * heads + head) * blocks + block.
  void (*attention)(const AttentionArgs&, Range units, float* space);
  void (*input)(const InputArgs&, Range strips);
  void (*embed)(RowVectors time, RowVectors classes, int features, float* dst, Range rows);
  // For measurements: a product by itself; and multiply-adds on registers alone, fma_chains vectors of them per round.
  void (*multiply)(int items, int width, int depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                   bool onto, int rows);
  float (*fma)(int64_t rounds);
  int fma_chains;
  // The same for dot products of bfloat16, dot_operations of multiplying and adding per round; null where there are none.
  float (*dot)(int64_t rounds);
  int64_t dot_operations;
  void (*update)(const UpdateArgs&, Range images);
  void (*guide)(const GuideArgs&, Range images);
  void (*noise)(const NoiseArgs&, Range images);
  // A task is a group of input channels of a panel: panel * groups + group.
  void (*pack)(const PackArgs&, Range tasks);
  // Returns the checksum of n bytes, whose first word is number `first` of all.
  uint64_t (*checksum)(const uint8_t* bytes, int64_t n, int64_t first);
  int columns(bool of_bf16) const { return of_bf16 ? bf16_slice : slice; }
  // Returns the number of slices that conv_store can process by themselves: panels where they have gates.
  int slices(const ConvArgs& a) const { return a.geglu ? a.panels() : ceil_div(a.outputs, columns(a.bf16)); }
};

}  // namespace fastdiff
