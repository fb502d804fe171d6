// Python functions for the update, guidance and noise by themselves. Tests compare them with fastdiff/core/update.py
// and fastdiff/core/noise.py.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "gil.hpp"
#include "isa.hpp"
#include "kernels.hpp"

namespace fastdiff {

namespace nb = nanobind;

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

// Returns the images `begin` to `end` - 1; end -1 stands for all of them.
inline Range image_range(int begin, int end, int images) {
  if (end == -1) end = images;
  if (begin < 0 || begin > end || end > images)
    throw std::invalid_argument("images " + std::to_string(begin) + " to " + std::to_string(end) + " of a batch of " +
                                std::to_string(images));
  return {begin, end};
}

template <class A>
bool has_shape(const A& array, std::initializer_list<size_t> shape) {
  if (array.ndim() != shape.size()) return false;
  size_t i = 0;
  for (const size_t size : shape)
    if (array.shape(i++) != size) return false;
  return true;
}

template <class A>
void check_shape(const A& array, std::initializer_list<size_t> shape, const char* name) {
  if (array.is_valid() && !has_shape(array, shape))
    throw std::invalid_argument(std::string(name) + " has a shape that does not fit the others");
}

// Returns the bank after checking that it has the table and the row of every image.
inline Bank checked_bank(const Array<const float>& values, const Array<const int64_t>& table,
                         const Array<const int64_t>& row, size_t images) {
  check_shape(table, {images}, "table");
  check_shape(row, {images}, "row");
  if (values.ndim() != 3 || values.shape(2) != column_count)
    throw std::invalid_argument("bank is not [tables, rows, " + std::to_string(column_count) + "]");
  for (size_t i = 0; i < images; ++i) {
    const int64_t t = table.data()[i], r = row.data()[i];
    if (t < 0 || t >= static_cast<int64_t>(values.shape(0)) || r < 0 || r >= static_cast<int64_t>(values.shape(1)))
      throw std::invalid_argument("image " + std::to_string(i) + " is at row " + std::to_string(r) + " of table " +
                                  std::to_string(t) + ", which the bank does not have");
  }
  return {values.data(), static_cast<int64_t>(values.shape(1))};
}

template <class T>
T* data_or_null(const Array<T>& array) {
  return array.is_valid() ? array.data() : nullptr;
}

inline void bind_update(nb::module_& m) {
  using namespace nb::literals;
  using Floats = Array<float>;
  using ConstFloats = Array<const float>;
  using Integers = Array<const int64_t>;

  m.def(
      "columns",
      [] {
        nb::list names;
        for (const char* name : column_names) names.append(name);
        return names;
      },
      "List the columns of a table, in the order in which the kernels read them.");

  m.def(
      "update",
      [](Floats x, ConstFloats out, ConstFloats bank, Integers table, Integers row, Integers seed, Integers index,
         ConstFloats z, ConstFloats x0_scale, Floats xs, Floats m1, Floats m2, Floats m3, int begin, int end,
         const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        if (x.ndim() != 4) throw std::invalid_argument("x is not [images, channels, height, width]");
        const size_t B = x.shape(0), C = x.shape(1), H = x.shape(2), W = x.shape(3);
        if (!has_shape(out, {B, C, H, W})) check_shape(out, {B, 2 * C, H, W}, "out");
        check_shape(seed, {B}, "seed");
        check_shape(index, {B}, "index");
        check_shape(z, {B, C, H, W}, "z");
        check_shape(x0_scale, {B}, "x0_scale");
        check_shape(xs, {B, C, H, W}, "xs");
        check_shape(m1, {B, C, H, W}, "m1");
        check_shape(m2, {B, C, H, W}, "m2");
        check_shape(m3, {B, C, H, W}, "m3");
        UpdateArgs args;
        args.bank = checked_bank(bank, table, row, B);
        args.table = table.data();
        args.row = row.data();
        args.seed = data_or_null(seed);
        args.index = data_or_null(index);
        args.channels = static_cast<int>(C);
        args.out_channels = static_cast<int>(out.shape(1));
        args.pixels = static_cast<int64_t>(H * W);
        args.x = x.data();
        args.xs = data_or_null(xs);
        args.m1 = data_or_null(m1);
        args.m2 = data_or_null(m2);
        args.m3 = data_or_null(m3);
        args.out = out.data();
        args.z = data_or_null(z);
        args.x0_scale = data_or_null(x0_scale);
        for (size_t i = 0; i < B; ++i) {
          const Coefficients k = args.bank(args.table[i], args.row[i]);
          if (k.s != 0.0f && !args.z && !(args.seed && args.index))
            throw std::invalid_argument("image " + std::to_string(i) + " needs noise: give z, or seed and index");
          if (k.sv != 0.0f && args.out_channels == args.channels)
            throw std::invalid_argument("image " + std::to_string(i) + " needs a learned variance, in " +
                                        std::to_string(2 * C) + " channels of out");
        }
        const Range images = image_range(begin, end, static_cast<int>(B));
        const WithoutGil without_gil;
        kernels.update(args, images);
      },
      "x"_a.noconvert(), "out"_a.noconvert(), "bank"_a.noconvert(), "table"_a.noconvert(), "row"_a.noconvert(),
      nb::kw_only(), "seed"_a.noconvert().none() = nb::none(), "index"_a.noconvert().none() = nb::none(),
      "z"_a.noconvert().none() = nb::none(), "x0_scale"_a.noconvert().none() = nb::none(),
      "xs"_a.noconvert().none() = nb::none(), "m1"_a.noconvert().none() = nb::none(),
      "m2"_a.noconvert().none() = nb::none(), "m3"_a.noconvert().none() = nb::none(), "begin"_a = 0, "end"_a = -1,
      "isa"_a = "",
      "Apply one row of the table to images begin to end - 1 (default: all) in place, without row += 1 "
      "(fastdiff.core.update.update).");

  m.def(
      "guide",
      [](Floats out, ConstFloats net, ConstFloats bank, Integers table, Integers row, ConstFloats guidance,
         int channels, float rescale, int begin, int end, const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        if (out.ndim() != 4) throw std::invalid_argument("out is not [images, channels, height, width]");
        const size_t B = out.shape(0), C = out.shape(1), H = out.shape(2), W = out.shape(3);
        const bool guided = guidance.is_valid();
        if (net.ndim() != 4 || net.shape(3) < C)
          throw std::invalid_argument("net is not [rows, height, width, padded channels]");
        check_shape(net, {guided ? 2 * B : B, H, W, net.shape(3)}, "net");
        check_shape(guidance, {B}, "guidance");
        if (channels < 1 || channels > static_cast<int>(C))
          throw std::invalid_argument(std::to_string(channels) + " channels of " + std::to_string(C) + " are guided");
        GuideArgs args;
        args.bank = checked_bank(bank, table, row, B);
        args.table = table.data();
        args.row = row.data();
        args.guidance = data_or_null(guidance);
        args.rescale = rescale;
        args.images = static_cast<int>(B);
        args.guided = guided;
        args.channels = channels;
        args.out_channels = static_cast<int>(C);
        args.padded = static_cast<int>(net.shape(3));
        args.pixels = static_cast<int64_t>(H * W);
        args.net = net.data();
        args.out = out.data();
        const Range images = image_range(begin, end, args.images);
        const WithoutGil without_gil;
        kernels.guide(args, images);
      },
      "out"_a.noconvert(), "net"_a.noconvert(), "bank"_a.noconvert(), "table"_a.noconvert(), "row"_a.noconvert(),
      "guidance"_a.noconvert().none(), nb::kw_only(), "channels"_a, "rescale"_a = 0.0f, "begin"_a = 0, "end"_a = -1,
      "isa"_a = "",
      "Guide the network's NHWC output and write it as planes of channels (fastdiff.core.update.guide). guidance None: "
      "net "
      "has no unconditional rows.");

  m.def(
      "advance",
      [](Array<int64_t> row, Integers table, Integers lengths) {
        check_shape(row, {table.size()}, "row");
        for (size_t i = 0; i < table.size(); ++i)
          if (table.data()[i] < 0 || table.data()[i] >= static_cast<int64_t>(lengths.size()))
            throw std::invalid_argument("there is no table " + std::to_string(table.data()[i]));
        advance(row.data(), table.data(), lengths.data(), static_cast<int>(table.size()));
      },
      "row"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(),
      "Add 1 to row in place; a finished image stays at the identity row of its table.");

  m.def(
      "philox",
      [](Array<uint32_t> words, Array<const uint32_t> counter, Array<const uint32_t> key, const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        const size_t n = words.shape(0);
        check_shape(words, {n, 4}, "words");
        check_shape(counter, {n, 4}, "counter");
        check_shape(key, {n, 2}, "key");
        const WithoutGil without_gil;
        for (size_t i = 0; i < n; ++i) {
          const uint32_t *c = counter.data() + 4 * i, *k = key.data() + 2 * i;
          const int64_t row = c[1] & 0xFFFFFF;
          const int64_t index = static_cast<int64_t>(c[2] | static_cast<uint64_t>(c[3]) << 32);
          const int64_t seed = static_cast<int64_t>(k[0] | static_cast<uint64_t>(k[1]) << 32);
          NoiseArgs args;
          args.seed = &seed;
          args.index = &index;
          args.row = &row;
          args.stream = static_cast<int>(c[1] >> 24);
          args.first = c[0];
          args.size = 4;
          args.words = words.data() + 4 * i;
          kernels.noise(args, {0, 1});
        }
      },
      "words"_a.noconvert(), "counter"_a.noconvert(), "key"_a.noconvert(), nb::kw_only(), "isa"_a = "",
      "Compute Philox4x32-10 of n counters [n, 4] with keys [n, 2] into words [n, 4], all uint32.");

  m.def(
      "normals",
      [](Floats z, Integers seed, Integers index, Integers row, int stream, int64_t first, Array<uint32_t> words,
         const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        const size_t B = z.shape(0);
        check_shape(seed, {B}, "seed");
        check_shape(index, {B}, "index");
        check_shape(row, {B}, "row");
        NoiseArgs args;
        args.seed = seed.data();
        args.index = index.data();
        args.row = row.data();
        args.stream = stream;
        args.first = first;
        args.size = B ? static_cast<int64_t>(z.size() / B) : 0;
        args.words = data_or_null(words);
        args.z = z.data();
        if (words.is_valid() && words.size() != z.size())
          throw std::invalid_argument("words has a shape that does not fit the others");
        const WithoutGil without_gil;
        kernels.noise(args, {0, static_cast<int>(B)});
      },
      "z"_a.noconvert(), "seed"_a.noconvert(), "index"_a.noconvert(), "row"_a.noconvert(), nb::kw_only(), "stream"_a,
      "first"_a = 0, "words"_a.noconvert().none() = nb::none(), "isa"_a = "",
      "Write standard normals to z [images, ...], as fastdiff.core.noise.normal, from counter `first` on, and the "
      "words "
      "they are made of to words.");
}

}  // namespace fastdiff
