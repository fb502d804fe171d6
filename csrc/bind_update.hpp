// Python functions for the update, guidance and noise by themselves. Tests compare them with fastdiff/core/update.py
// and fastdiff/core/noise.py.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <climits>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_arrays.hpp"
#include "gil.hpp"
#include "isa.hpp"
#include "kernels.hpp"

namespace fastdiff {

namespace nb = nanobind;

// Returns the images `begin` to `end` - 1; end -1 stands for all of them.
inline Range image_range(int begin, int end, int images) {
  if (end == -1) end = images;
  if (begin < 0 || begin > end || end > images)
    throw std::invalid_argument("images " + std::to_string(begin) + " to " + std::to_string(end) + " of a batch of " +
                                std::to_string(images));
  return {begin, end};
}

// Returns the numbers in `list`, which ascend and are below `count`; all of them where it is None.
inline std::vector<int64_t> chosen(const Array<const int64_t>& list, int64_t count, const std::string& name) {
  if (!list.is_valid()) {
    std::vector<int64_t> all(count);
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  require(list.ndim() == 1, name + " is " + describe(shape_of(list)) + ", one dimension is needed");
  check_memory(list, name);
  std::vector<int64_t> numbers(list.data(), list.data() + list.size());
  int64_t last = -1;
  for (const int64_t i : numbers) {
    require(i > last && i < count,
            name + " has " + std::to_string(i) + ": ascending numbers below " + std::to_string(count) + " are needed");
    last = i;
  }
  return numbers;
}

// Each image's place in a bank of tables, copied, so that the indices that were checked are those that are used.
struct Places {
  int64_t tables;
  Bank bank;
  std::vector<int64_t> table, row;

  Places(const Array<const float>& values, const Array<const int64_t>& tables_of, const Array<const int64_t>& rows_of,
         int64_t images) {
    check_shape(tables_of, {images}, "table");
    check_shape(rows_of, {images}, "row");
    require(values.ndim() == 3 && values.shape(2) == column_count,
            "bank is not [tables, rows, " + std::to_string(column_count) + "]");
    check_memory(values, "bank");
    tables = static_cast<int64_t>(values.shape(0));
    bank = {values.data(), static_cast<int64_t>(values.shape(1))};
    table.assign(tables_of.data(), tables_of.data() + images);
    row.assign(rows_of.data(), rows_of.data() + images);
    for (int64_t i = 0; i < images; ++i)
      require(table[i] >= 0 && table[i] < tables && row[i] >= 0 && row[i] < bank.rows,
              "image " + std::to_string(i) + " is at row " + std::to_string(row[i]) + " of table " +
                  std::to_string(table[i]) + ", which the bank does not have");
  }
};

// Returns the shape of an array of images, [images, channels, height, width], whose sizes fit an int.
template <class A>
std::vector<int64_t> image_shape(const A& array, const std::string& name) {
  const std::vector<int64_t> shape = shape_of(array);
  require(shape.size() == 4, name + " is " + describe(shape) + ", four dimensions are needed");
  require(shape[0] <= INT_MAX / 2 && shape[1] <= INT_MAX / 2, name + " is " + describe(shape) + ": too many images");
  check_memory(array, name);
  return shape;
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
         ConstFloats z, ConstFloats x0_scale, Floats xs, Floats m1, Floats m2, Floats m3, Integers images, int begin,
         int end, const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        const std::vector<int64_t> shape = image_shape(x, "x");
        const int64_t B = shape[0], C = shape[1], H = shape[2], W = shape[3];
        const bool learned = shape_of(out) == std::vector<int64_t>{B, 2 * C, H, W};
        check_shape(out, {B, learned ? 2 * C : C, H, W}, "out");
        check_shape(seed, {B}, "seed");
        check_shape(index, {B}, "index");
        check_shape(z, shape, "z");
        check_shape(x0_scale, {B}, "x0_scale");
        check_shape(xs, shape, "xs");
        check_shape(m1, shape, "m1");
        check_shape(m2, shape, "m2");
        check_shape(m3, shape, "m3");
        const Places places(bank, table, row, B);
        const std::vector<int64_t> zeros(B), taking = chosen(images, B, "images");
        UpdateArgs args;
        args.bank = places.bank;
        args.taking = {taking.data(), static_cast<int>(taking.size())};
        args.table = places.table.data();
        args.row = places.row.data();
        args.seed = seed.is_valid() ? seed.data() : zeros.data();
        args.index = index.is_valid() ? index.data() : zeros.data();
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
        for (const int64_t i : taking) {
          const Coefficients k = args.bank(args.table[i], args.row[i]);
          if (k.s != 0.0f && !args.z && !(seed.is_valid() && index.is_valid()))
            throw std::invalid_argument("image " + std::to_string(i) + " needs noise: give z, or seed and index");
          if (k.sv != 0.0f && args.out_channels == args.channels)
            throw std::invalid_argument("image " + std::to_string(i) + " needs a learned variance, in " +
                                        std::to_string(2 * C) + " channels of out");
        }
        const Range which = image_range(begin, end, args.taking.count);
        const WithoutGil without_gil;
        kernels.update(args, which);
      },
      "x"_a.noconvert(), "out"_a.noconvert(), "bank"_a.noconvert(), "table"_a.noconvert(), "row"_a.noconvert(),
      nb::kw_only(), "seed"_a.noconvert().none() = nb::none(), "index"_a.noconvert().none() = nb::none(),
      "z"_a.noconvert().none() = nb::none(), "x0_scale"_a.noconvert().none() = nb::none(),
      "xs"_a.noconvert().none() = nb::none(), "m1"_a.noconvert().none() = nb::none(),
      "m2"_a.noconvert().none() = nb::none(), "m3"_a.noconvert().none() = nb::none(),
      "images"_a.noconvert().none() = nb::none(), "begin"_a = 0, "end"_a = -1, "isa"_a = "",
      "Apply one row of the table, in place and without row += 1, to the given images, or all where they are None; of "
      "these to numbers begin to end - 1 (fastdiff.core.update.update).");

  m.def(
      "guide",
      [](Floats out, ConstFloats net, ConstFloats bank, Integers table, Integers row, ConstFloats guidance,
         int channels, float rescale, int begin, int end, const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        const std::vector<int64_t> shape = image_shape(out, "out");
        const int64_t B = shape[0], C = shape[1], H = shape[2], W = shape[3];
        const bool guided = guidance.is_valid();
        const std::vector<int64_t> given = shape_of(net);
        require(given.size() == 4 && given[3] >= C && given[3] <= INT_MAX / 2,
                "net is not [rows, height, width, padded channels]");
        check_shape(net, {guided ? 2 * B : B, H, W, given[3]}, "net");
        check_shape(guidance, {B}, "guidance");
        require(channels >= 1 && channels <= C,
                std::to_string(channels) + " channels of " + std::to_string(C) + " are guided");
        const Places places(bank, table, row, B);
        GuideArgs args;
        args.bank = places.bank;
        args.table = places.table.data();
        args.row = places.row.data();
        const std::vector<float> phi(B, rescale);
        std::vector<int> pair(B);
        std::iota(pair.begin(), pair.end(), static_cast<int>(B));
        args.guidance = data_or_null(guidance);
        args.rescale = phi.data();
        args.taking.count = static_cast<int>(B);
        args.pair = guided ? pair.data() : nullptr;
        args.channels = channels;
        args.out_channels = static_cast<int>(C);
        args.padded = static_cast<int>(given[3]);
        args.pixels = static_cast<int64_t>(H * W);
        args.net = net.data();
        args.out = out.data();
        const Range images = image_range(begin, end, args.taking.count);
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
        const int64_t images = static_cast<int64_t>(table.size());
        check_shape(row, {images}, "row");
        check_shape(table, {images}, "table");
        check_memory(lengths, "lengths");
        require(images <= INT_MAX, "too many images");
        const std::vector<int64_t> tables(table.data(), table.data() + images);
        for (const int64_t t : tables)
          require(t >= 0 && t < static_cast<int64_t>(lengths.size()), "there is no table " + std::to_string(t));
        advance(row.data(), tables.data(), lengths.data(), {nullptr, static_cast<int>(images)});
      },
      "row"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(),
      "Add 1 to row in place; a finished image stays at the identity row of its table.");

  m.def(
      "philox",
      [](Array<uint32_t> words, Array<const uint32_t> counter, Array<const uint32_t> key, const std::string& isa) {
        const Kernels& kernels = choose_kernels(isa);
        require(words.ndim() == 2, "words is not [n, 4]");
        const int64_t n = static_cast<int64_t>(words.shape(0));
        check_shape(words, {n, 4}, "words");
        check_shape(counter, {n, 4}, "counter");
        check_shape(key, {n, 2}, "key");
        const WithoutGil without_gil;
        for (int64_t i = 0; i < n; ++i) {
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
        const std::vector<int64_t> shape = shape_of(z);
        require(!shape.empty() && shape[0] <= INT_MAX, "z is not [images, ...]");
        const int64_t B = shape[0];
        require(stream >= 0 && stream < 1 << 8, "stream: from 0 to 255 is needed");
        require(first >= 0 && first < int64_t{1} << 32, "first: from 0 to 2^32 - 1 is needed");
        check_memory(z, "z");
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
        require(!words.is_valid() || words.size() == z.size(), "words has not as many numbers as z");
        if (words.is_valid()) check_memory(words, "words");
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
