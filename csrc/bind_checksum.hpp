// The checksums of many arrays as a Python function, which several threads share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "bind_arrays.hpp"
#include "gil.hpp"
#include "isa.hpp"
#include "shared_work.hpp"

namespace fastdiff {

inline std::vector<uint64_t> checksums_of(const std::vector<nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>>& arrays,
                                          int threads, const std::string& isa) {
  // A part of an array that a thread processes at a time, and its first word's number among all words.
  struct Part {
    size_t array;
    const uint8_t* bytes;
    int64_t size, first;
  };
  constexpr int64_t part = 1 << 20;
  const Kernels& kernels = choose_kernels(isa);
  std::vector<Part> parts;
  int64_t words = 0;
  for (size_t i = 0; i < arrays.size(); i++) {
    const int64_t size = static_cast<int64_t>(arrays[i].nbytes());
    const auto* bytes = static_cast<const uint8_t*>(arrays[i].data());
    require(size == 0 || bytes != nullptr, "an array has no memory");
    for (int64_t at = 0; at < size; at += part)
      parts.push_back({i, bytes + at, std::min(part, size - at), words + at / 8});
    words += (size + 7) / 8;
  }
  const WithoutGil without_gil;
  std::vector<std::atomic<uint64_t>> sums(arrays.size());
  // A thread takes about as long to start as four parts take to read.
  share_work(static_cast<int>(parts.size()), 4, threads, [&](Range range) {
    const Part& one = parts[range.begin];
    sums[one.array] += kernels.checksum(one.bytes, one.size, one.first);
  });
  return {sums.begin(), sums.end()};
}

inline void bind_checksum(nb::module_& m) {
  using namespace nb::literals;
  m.def("checksums", &checksums_of, "arrays"_a.noconvert(), nb::kw_only(), "threads"_a = 1, "isa"_a = "",
        "Compute the part that each array has of the checksum of all of them, one after the other "
        "(fastdiff.backends.network.checksum). The arrays may be of any type.");
}

}  // namespace fastdiff
