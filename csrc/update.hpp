// What the sampler's update, guidance and noise read and write; kernels/update.hpp computes them.
//
// x, xs, m1..m3 and z are [images, channels, H, W] in float32, in place; every image stands at its own row of its own
// table. Image i does not depend on the images around it, nor on how they are shared among threads.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdiff {

// The columns of a table: COLUMNS in fastdiff/solvers/table.py, which says what they mean, in the same order.
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

// The tables of a batch. Every table ends in an identity row, where its finished images idle; shorter ones repeat it.
struct Bank {
  const float* values = nullptr;  // [tables, rows, columns]
  int64_t rows = 0;               // of the longest table, the identity row included

  Coefficients operator()(int64_t table, int64_t row) const {
    Coefficients k;
    std::memcpy(&k, values + (table * rows + row) * column_count, sizeof k);
    return k;
  }
};

// row += 1, up to the identity row of the image's table; lengths: [tables], without the identity row.
inline void advance(int64_t* row, const int64_t* table, const int64_t* lengths, int images) {
  for (int i = 0; i < images; ++i)
    if (row[i] < lengths[table[i]]) ++row[i];
}

// The weight of guidance, 1 + g (guidance - 1). Volatile, so that the product is rounded, as the reference's is, and
// not fused with the addition.
inline float guidance_weight(float g, float guidance) {
  const volatile float step = g * (guidance - 1.0f);
  return 1.0f + step;
}

// An operand whose coefficient is zero is not read: its pointer may be null, its memory left over. A null operand
// counts as one without a coefficient; push needs m1, save needs xs, and they do nothing without. sv needs out_channels
// = 2 channels, and is left out where there are fewer: the caller checks.
struct UpdateArgs {
  Bank bank;
  const int64_t* table = nullptr;  // [images]
  const int64_t* row = nullptr;    // [images]; advance() comes after the update
  const int64_t* seed = nullptr;   // [images], as two's complement; with index, read for Philox noise only
  const int64_t* index = nullptr;  // [images], their global numbers
  int channels = 0;                // of x
  int out_channels = 0;            // of out: channels, or twice as many where the second half is v
  int64_t pixels = 0;              // H W
  float* x = nullptr;
  float* xs = nullptr;
  float* m1 = nullptr;
  float* m2 = nullptr;
  float* m3 = nullptr;
  const float* out = nullptr;       // [images, out_channels, H, W]
  const float* z = nullptr;         // the caller's noise; null: Philox
  const float* x0_scale = nullptr;  // [images], of kx x + ko out before the bound; null: 1
};

// From what the network wrote to the `out` of UpdateArgs: planes of channels, guided.
struct GuideArgs {
  Bank bank;
  const int64_t* table = nullptr;
  const int64_t* row = nullptr;
  const float* guidance = nullptr;  // [images]; 1 is off
  float rescale = 0.0f;
  int images = 0;       // of the whole batch
  bool guided = false;  // row images + i of net is image i without its label; bank, ... guidance are read only then
  int channels = 0;     // that are guided; those past them (v) are the conditional row's
  int out_channels = 0;
  int padded = 0;              // channels in a pixel of net
  int64_t pixels = 0;          // H W
  const float* net = nullptr;  // [images or 2 images, H, W, padded]
  float* out = nullptr;        // [images, out_channels, H, W]
};

// Noise by itself: of the counters first, first + 1, ... of each image, four numbers each (fastdiff/noise.py).
struct NoiseArgs {
  const int64_t* seed = nullptr;   // [images]
  const int64_t* index = nullptr;  // [images]
  const int64_t* row = nullptr;    // [images], below 2^24
  int stream = 0;                  // below 2^8
  int64_t first = 0;
  int64_t size = 0;           // numbers of an image
  uint32_t* words = nullptr;  // [images, size]; null: not wanted
  float* z = nullptr;         // [images, size]; null: not wanted
};

}  // namespace fastdiff
