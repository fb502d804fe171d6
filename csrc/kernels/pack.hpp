// Weights of a convolution in the layout of ConvArgs::weights: transformed for Winograd, padded, in panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/gemm.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// The transform G of Winograd's algorithm for n points, of which the last is infinity: row j is [1, p_j, p_j^2] / prod_k
// (p_j - p_k) over the other points p_k, and the last row is [0, 0, 1] (kernels/winograd.hpp).
template <int n>
struct WeightTransform {
  double rows[n][3];
  explicit WeightTransform(const double (&points)[n - 1]) {
    for (int j = 0; j < n - 1; j++) {
      double product = 1;
      for (int k = 0; k < n - 1; k++)
        if (k != j) product *= points[j] - points[k];
      for (int power = 0; power < 3; power++)
        rows[j][power] = (power == 0 ? 1 : power == 1 ? points[j] : points[j] * points[j]) / product;
    }
    for (int power = 0; power < 3; power++) rows[n - 1][power] = power == 2;
  }
};

// Transforms the weights of an input channel, taps [3, 3, panel], to G taps G^T [n, n, panel].
template <int n>
void transform_weights(const WeightTransform<n>& g, const float (&taps)[9][panel], float (*to)[panel]) {
  for (int i = 0; i < n; i++) {
    double row[3][panel];
    for (int x = 0; x < 3; x++)
      for (int o = 0; o < panel; o++)
        row[x][o] = g.rows[i][0] * taps[x][o] + g.rows[i][1] * taps[3 + x][o] + g.rows[i][2] * taps[6 + x][o];
    for (int j = 0; j < n; j++)
      for (int o = 0; o < panel; o++)
        to[i * n + j][o] =
            static_cast<float>(row[0][o] * g.rows[j][0] + row[1][o] * g.rows[j][1] + row[2][o] * g.rows[j][2]);
  }
}

// Packs the weights of tasks: task = panel * groups + group of padded input channels.
void pack(const PackArgs& a, Range tasks) {
  static const WeightTransform<4> g2({0, 1, -1});
  static const WeightTransform<6> g4({0, 0.75, -0.75, 1.5, -1.5});
  constexpr int paired = together<BF16>;
  const int taps = a.kernel * a.kernel;
  for (int task = tasks.begin; task < tasks.end; task++) {
    const int first = task / a.groups() * panel, outputs = std::min(panel, a.outputs - first);
    for (int c = task % a.groups() * group; c < (task % a.groups() + 1) * group; c += 2) {
      float both[2][36][panel];
      for (int half = 0; half < 2; half++) {
        float from[9][panel] = {};
        if (const int channel = a.channel[c + half]; channel >= 0)
          for (int o = 0; o < outputs; o++) {
            const float* w = a.weights + (static_cast<int64_t>(first + o) * a.channels + channel) * taps;
            for (int t = 0; t < taps; t++) from[t][o] = w[t];
          }
        switch (a.method) {
          case Method::direct: std::memcpy(both[half], from, sizeof from); break;
          case Method::winograd2: transform_weights(g2, from, both[half]); break;
          case Method::winograd4: transform_weights(g4, from, both[half]); break;
        }
      }
      // What a position has is a panel of `depth` rows; a direct convolution has one, whose rows are [taps, channels].
      const bool direct = a.method == Method::direct;
      const int64_t depth = static_cast<int64_t>(direct ? a.rows() : 1) * a.padded_channels;
      for (int i = 0; i < a.rows(); i++) {
        const int64_t begin =
            static_cast<int64_t>(first / panel) * a.rows() * a.padded_channels + (direct ? 0 : i * depth);
        const int64_t row = (direct ? static_cast<int64_t>(i) * a.padded_channels : 0) + c;
        if (a.bf16)
          for (int o = 0; o < panel; o += lanes)
            store_pairs(static_cast<BF16*>(a.to) + begin * panel + (o / paired * depth + row) * paired + o % paired * 2,
                        load(both[0][i] + o), load(both[1][i] + o));
        else
          for (int o = 0; o < panel; o += slice)
            for (int half = 0; half < 2; half++)
              std::memcpy(static_cast<float*>(a.to) + begin * panel + (o * depth + (row + half) * slice),
                          both[half][i] + o, slice * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace fastdiff
