// The checksum of many arrays as a Python function, which several threads share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "bind_arrays.hpp"
#include "gil.hpp"
#include "isa.hpp"

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
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> sum{0};
  const auto work = [&] {
    uint64_t mine = 0;
    for (size_t i; (i = next.fetch_add(1)) < parts.size();)
      mine += kernels.checksum(parts[i].bytes, parts[i].size, parts[i].first);
    sum += mine;
  };
  // A thread takes about as long to start as a few parts take to read.
  const int64_t useful = std::min<int64_t>(threads, static_cast<int64_t>(parts.size()) / 4);
  std::vector<std::thread> others;
  try {
    while (static_cast<int64_t>(others.size()) + 1 < useful) others.emplace_back(work);
  } catch (const std::system_error&) {  // no further thread can be started: those that run do all
  }
  work();
  for (std::thread& thread : others) thread.join();
  return sum;
}

inline void bind_checksum(nb::module_& m) {
  using namespace nb::literals;
  m.def("checksum", &checksum_of, "arrays"_a.noconvert(), nb::kw_only(), "threads"_a = 1, "isa"_a = "",
        "Compute the checksum of arrays of any type, one after the other (fastdiff.backends.network.checksum).");
}

}  // namespace fastdiff
