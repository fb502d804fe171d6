// Arrays that come from Python. Everything that the engine is given passes through here, so that no argument, whatever it
// is, makes the engine read or write outside a buffer.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace fastdiff {

namespace nb = nanobind;

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

inline std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

template <class A>
std::vector<int64_t> shape_of(const A& array) {
  std::vector<int64_t> shape;
  for (size_t i = 0; i < array.ndim(); i++) shape.push_back(static_cast<int64_t>(array.shape(i)));
  return shape;
}

// Checks that the array's numbers are where its shape says: a tensor whose storage was freed has none. Numbers that are
// not aligned, as in a view of a file, would be read correctly on some processors only.
template <class A>
void check_memory(const A& array, const std::string& name) {
  const auto address = reinterpret_cast<uintptr_t>(array.data());
  require(array.size() == 0 || address != 0, name + " has no memory");
  require(address % array.itemsize() == 0, name + " is not aligned");
}

// Checks an array that is given; one that is None is not valid.
template <class A>
void check_shape(const A& array, const std::vector<int64_t>& shape, const std::string& name) {
  if (!array.is_valid()) return;
  require(shape_of(array) == shape, name + " is " + describe(shape_of(array)) + ", " + describe(shape) + " is needed");
  check_memory(array, name);
}

template <class T>
T* data_or_null(const Array<T>& array) {
  return array.is_valid() ? array.data() : nullptr;
}

// An operand of the engine: an array, or a tuple, its shape alone. An engine of shapes has sizes and cannot run.
struct Operand {
  std::vector<int64_t> shape;
  void* data = nullptr;
  nb::ndarray<> owner;  // keeps the memory

  int64_t at(size_t i) const { return shape[i]; }
  float* floats() const { return static_cast<float*>(data); }
};

// The largest size along a dimension; with it, no product of a few sizes exceeds 64 bits.
constexpr int64_t most = 1 << 24;

// Reads an operand of `dimensions` dimensions, none of them empty, with numbers of type T.
template <class T>
Operand operand(nb::handle given, size_t dimensions, const std::string& name) {
  Operand result;
  if (nb::isinstance<nb::tuple>(given)) {
    for (nb::handle item : nb::borrow<nb::tuple>(given)) {
      int64_t size = 0;
      if (!nb::try_cast(nb::borrow(item), size, false))
        throw nb::type_error((name + ": a shape of whole numbers").c_str());
      result.shape.push_back(size);
    }
  } else {
    Array<T> array;
    if (!nb::try_cast(nb::borrow(given), array, false) || !array.is_valid())
      throw nb::type_error((name + " is not a contiguous array in this process's memory, of the right type").c_str());
    check_memory(array, name);
    result.shape = shape_of(array);
    result.data = const_cast<std::remove_const_t<T>*>(array.data());
    result.owner = nb::ndarray<>(array);
  }
  require(result.shape.size() == dimensions,
          name + " is " + describe(result.shape) + ": it needs " + std::to_string(dimensions) + " dimensions");
  for (const int64_t size : result.shape)
    require(size >= 1 && size <= most, name + " is " + describe(result.shape) + ": its sizes must be from 1 to 2^24");
  return result;
}

// Returns the operand "weights" or "to", packed weights of the shape that ConvArgs describes; bfloat16 comes as int16.
template <class F, class B>
Operand packed_weights(nb::handle given, const std::string& name, const Kernels& kernels, int64_t panels,
                       int64_t positions, int64_t depth, bool bf16) {
  const int64_t columns = kernels.columns(bf16);
  const std::vector<int64_t> shape =
      bf16 ? std::vector<int64_t>{panels, positions, panel / columns, depth / 2, columns, 2}
           : std::vector<int64_t>{panels, positions, panel / columns, depth, columns};
  Operand weights = bf16 ? operand<B>(given, 6, name) : operand<F>(given, 5, name);
  require(weights.shape == shape, name + " is " + describe(weights.shape) + ", " + describe(shape) + " is needed");
  return weights;
}

}  // namespace fastdiff
