// The packing of weights as a Python function, which several threads share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "bind_arrays.hpp"
#include "gil.hpp"
#include "isa.hpp"
#include "shared_work.hpp"

namespace fastdiff {

inline void pack_weights(const Array<const float>& weights, const std::vector<int64_t>& channels, Method method,
                         nb::handle to, bool bf16, int threads, const std::string& isa) {
  const Kernels& kernels = choose_kernels(isa);
  const std::vector<int64_t> shape = shape_of(weights);
  check_memory(weights, "weights");
  require(shape.size() == 4 && shape[2] == shape[3] && (shape[2] == 1 || shape[2] == 3),
          "weights are " + describe(shape) + ": [N, C, k, k] is needed, where k is 1 or 3");
  require(method == Method::direct || shape[2] == 3, "Winograd's method needs kernel 3");
  for (const int64_t size : shape) require(size >= 1 && size <= most, "weights: their sizes must be from 1 to 2^24");
  for (const int64_t c : channels) require(c >= 1 && c <= most, "channels: from 1 to 2^24 are needed");
  require(std::accumulate(channels.begin(), channels.end(), int64_t{0}) == shape[1],
          "channels: those of all sources, in sum the weights' C, are needed");
  PackArgs a{};
  std::vector<int> channel;  // of each padded channel of the sources
  for (int from = 0; const int64_t c : channels) {
    for (int i = 0; i < padded(static_cast<int>(c)); i++) channel.push_back(i < c ? from + i : -1);
    from += static_cast<int>(c);
  }
  a.weights = weights.data();
  a.outputs = static_cast<int>(shape[0]);
  a.channels = static_cast<int>(shape[1]);
  a.kernel = static_cast<int>(shape[2]);
  a.method = method;
  a.bf16 = bf16;
  a.channel = channel.data();
  a.padded_channels = static_cast<int>(channel.size());
  const int64_t panels = ceil_div(a.outputs, panel), positions = method == Method::direct ? 1 : a.rows();
  const int64_t depth = a.rows() / positions * a.padded_channels;
  const Operand result = packed_weights<float, int16_t>(to, "to", kernels, panels, positions, depth, bf16);
  require(result.data != nullptr, "to is a shape: an array is needed");
  a.to = result.data;
  const WithoutGil without_gil;
  share_work(static_cast<int>(panels) * a.groups(), 16, threads, [&](Range tasks) { kernels.pack(a, tasks); });
}

inline void bind_pack(nb::module_& m) {
  using namespace nb::literals;
  m.def("pack", &pack_weights, "weights"_a.noconvert(), "channels"_a, "method"_a, "to"_a, nb::kw_only(), "bf16"_a,
        "threads"_a = 1, "isa"_a = "",
        "Pack the weights [N, C, k, k] of a convolution into `to` (fastdiff.backends.native.packing.pack).");
}

}  // namespace fastdiff
