// Arguments of the sampler's kernels: update, guidance and noise (kernels/update.hpp, guidance.hpp, noise.hpp).
//
// x, xs, m1..m3 and z are [images, channels, H, W] in float32, and are updated in place. Every image has its own table
// and its own row of it. An image's result depends neither on the other images nor on how threads share them.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdiff {

// The columns of a table, in the order of COLUMNS in fastdiff/solvers/table.py, which explains them.
#define FASTDIFF_COLUMNS(column)                                                                                       \
  column(t) column(abar) column(abar_next) column(kx) column(ko) column(c) column(hx) column(ho) column(h0) column(ax) \
      column(ao) column(a0) column(a1) column(a2) column(a3) column(as_) column(s) column(sv) column(g) column(save)   \
          column(push) column(stage)

// One row of a table.
struct Coefficients {
#define FASTDIFF_COLUMN(name) float name;
  FASTDIFF_COLUMNS(FASTDIFF_COLUMN)
#undef FASTDIFF_COLUMN
};

#define FASTDIFF_COLUMN(name) #name,
constexpr const char* column_names[] = {FASTDIFF_COLUMNS(FASTDIFF_COLUMN)};
#undef FASTDIFF_COLUMN
constexpr int column_count = sizeof column_names / sizeof *column_names;
static_assert(sizeof(Coefficients) == column_count * sizeof(float));

// The tables of a batch. The last row of a table is the identity, at which finished images remain; tables that are
// shorter than the longest one repeat it.
struct Bank {
  const float* values = nullptr;  // [tables, rows, columns]
  int64_t rows = 0;               // rows of the longest table, including the identity row

  Coefficients operator()(int64_t table, int64_t row) const {
    Coefficients k;
    std::memcpy(&k, values + (table * rows + row) * column_count, sizeof k);
    return k;
  }
};

// The images of a batch that take a step; those left out keep their place and are not read.
struct Taking {
  const int64_t* image = nullptr;  // [count]; null: images 0 to count - 1
  int count = 0;
  int64_t operator()(int i) const { return image ? image[i] : i; }
};

// Advances images by one row, up to the identity row of their tables. lengths: [tables], without the identity row.
inline void advance(int64_t* row, const int64_t* table, const int64_t* lengths, const Taking& images) {
  for (int i = 0; i < images.count; ++i) {
    const int64_t image = images(i);
    if (row[image] < lengths[table[image]]) ++row[image];
  }
}

// Returns the weight of guidance, 1 + g (guidance - 1). The product is volatile so that it is rounded, as in the
// reference, and not fused with the addition.
inline float guidance_weight(float g, float guidance) {
  const volatile float step = g * (guidance - 1.0f);
  return 1.0f + step;
}

// Arguments of an update. An operand whose coefficient is zero is not read: its pointer may be null, or its memory
// uninitialised. A null operand is treated as if its coefficient were zero; push without m1 and save without xs do
// nothing. A learned variance (sv) needs out_channels = 2 channels and is ignored otherwise, so the caller checks that.
struct UpdateArgs {
  Bank bank;
  Taking taking;
  const int64_t* table = nullptr;  // [images]
  const int64_t* row = nullptr;    // [images]; advance() comes after the update
  const int64_t* seed = nullptr;   // [images], 64 bits as a signed integer; read for Philox noise only, as is index
  const int64_t* index = nullptr;  // [images], global index of each image
  int channels = 0;                // channels of x
  int out_channels = 0;            // channels of out: as many, or twice as many, the second half being v
  int64_t pixels = 0;              // H W
  float* x = nullptr;
  float* xs = nullptr;
  float* m1 = nullptr;
  float* m2 = nullptr;
  float* m3 = nullptr;
  const float* out = nullptr;       // [images, out_channels, H, W]
  const float* z = nullptr;         // noise given by the caller; null: Philox noise
  const float* x0_scale = nullptr;  // [images], factor of kx x + ko out before it is clipped; null: 1
};

// Arguments of guidance, which turns the output of the network, NHWC, into the `out` of UpdateArgs.
struct GuideArgs {
  Bank bank;
  const int64_t* table = nullptr;
  const int64_t* row = nullptr;
  const float* guidance = nullptr;  // [images]; 1 is off
  const float* rescale = nullptr;   // [images]; null: 0, which is off
  Taking taking;                    // row i of net is the conditional one of image taking(i)
  const int* pair = nullptr;        // [taking.count]: its unconditional row, or -1: it is not guided; null: none is
  int channels = 0;                 // channels that are guided; the others (v) are copied from the conditional row
  int out_channels = 0;
  int padded = 0;              // channels of a pixel of net, including padding
  int64_t pixels = 0;          // H W
  const float* net = nullptr;  // [rows, H, W, padded]
  float* out = nullptr;        // [images, out_channels, H, W]
};

// Arguments of noise by itself, from the counters first, first + 1, ... of each image, four numbers each
// (fastdiff/core/noise.py).
struct NoiseArgs {
  const int64_t* seed = nullptr;   // [images]
  const int64_t* index = nullptr;  // [images]
  const int64_t* row = nullptr;    // [images], below 2^24
  int stream = 0;                  // below 2^8
  int64_t first = 0;
  int64_t size = 0;           // numbers per image
  uint32_t* words = nullptr;  // [images, size], or null
  float* z = nullptr;         // [images, size], or null
};

}  // namespace fastdiff
