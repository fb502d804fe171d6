// The checksum of many arrays as a Python function, which several threads share.
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

inline uint64_t checksum_of(const std::vector<nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>>& arrays, int threads,
                            const std::string& isa) {
  // A part of an array that a thread processes at a time, and its first word's number among all words.
  struct Part {
    const uint8_t* bytes;
    int64_t size, first;
  };
  constexpr int64_t part = 1 << 20;
  const Kernels& kernels = choose_kernels(isa);
  std::vector<Part> parts;
  int64_t words = 0;
  for (const auto& array : arrays) {
    const int64_t size = static_cast<int64_t>(array.nbytes());
    const auto* bytes = static_cast<const uint8_t*>(array.data());
    require(size == 0 || bytes != nullptr, "an array has no memory");
    for (int64_t at = 0; at < size; at += part)
      parts.push_back({bytes + at, std::min(part, size - at), words + at / 8});
    words += (size + 7) / 8;
  }
  const WithoutGil without_gil;
  std::atomic<uint64_t> sum{0};
  // A thread takes about as long to start as four parts take to read.
  share_work(static_cast<int>(parts.size()), 4, threads, [&](Range range) {
    const Part& one = parts[range.begin];
    sum += kernels.checksum(one.bytes, one.size, one.first);
  });
  return sum;
}

inline void bind_checksum(nb::module_& m) {
  using namespace nb::literals;
  m.def("checksum", &checksum_of, "arrays"_a.noconvert(), nb::kw_only(), "threads"_a = 1, "isa"_a = "",
        "Compute the checksum of arrays of any type, one after the other (fastdiff.backends.network.checksum).");
}

}  // namespace fastdiff
