// The engine as a Python class. It owns a reference to every array whose address it uses, derives every size from the
// arrays themselves, and checks that they fit each other before an operation is added and before a step is run.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind_arrays.hpp"
#include "bind_update.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "isa.hpp"

namespace fastdiff {

// By which number a row finds its vector: its own, that of its timestep, or that of its label, a class or a text.
enum class By { row, timestep, label };

// A vector for each row, from number `offset` of a row of `values` on.
struct BoundVectors {
  Operand values;  // [vectors, numbers]
  By by;
  int64_t offset;
};

// A GroupNorm, or where there are no groups a LayerNorm of one source, which needs no statistics.
struct BoundNorm {
  std::vector<Operand> statistics;  // [rows, strips, 2, padded channels] of each source
  std::vector<int> channels;        // of each source, without padding
  int groups;
  float eps;
  Operand gamma, beta;  // [channels of all sources, or more]
  std::optional<BoundVectors> modulation;
};

// Feature maps [rows, height, width, padded channels].
struct Maps {
  float* data;
  int height, width, channels;
  Map map() const { return {height, width}; }
};

class BoundEngine {
 public:
  using Floats = Array<float>;
  using ConstFloats = Array<const float>;
  using Integers = Array<int64_t>;
  using ConstIntegers = Array<const int64_t>;

  // x: [rows, channels, height, width]; out: [rows, height, width, padded out_channels]; class_image: [rows, height,
  // width, channels]. run() takes each row's timestep and label, which are [rows], from those arrays.
  BoundEngine(const std::string& isa, int threads, nb::handle x, nb::handle out, int out_channels, nb::handle timestep,
              nb::handle label, nb::handle class_image)
      : x_(operand<float>(x, 4, "x")),
        rows_(rows_of(x_)),
        kernels_(choose_kernels(isa)),
        engine_(kernels_, threads, rows_) {
    use(x_);
    const Maps maps = this->maps(out, "out");
    require(
        out_channels >= 1 && out_channels <= most && padded(out_channels) == maps.channels && maps.height == x_.at(2) &&
            maps.width == x_.at(3),
        "out is not [rows, height, width, channels] of x with " + std::to_string(out_channels) + " channels, padded");
    out_ = maps.data;
    out_channels_ = out_channels;
    timestep_ = use(operand<const int64_t>(timestep, 1, "timestep"));
    label_ = use(operand<const int64_t>(label, 1, "label"));
    require(timestep_.at(0) == rows_ && label_.at(0) == rows_, "timestep and label need a number for each row");
    if (!class_image.is_none()) {
      class_image_ = use(operand<float>(class_image, 4, "class_image"));
      require(class_image_.shape == std::vector<int64_t>{rows_, x_.at(2), x_.at(3), x_.at(1)},
              "class_image is " + describe(class_image_.shape) + ": [rows, height, width, channels] of x is needed");
    }
    timesteps_now_.resize(rows_);
    labels_now_.resize(rows_);
  }

  void input(bool center, int combine, nb::handle dst) {
    require(combine >= 0 && combine <= 3, "combine: from 0 to 3 is needed");
    require(combine == 0 || !class_image_.shape.empty(), "combine needs a class_image");
    const int channels = static_cast<int>(x_.at(1));
    const Maps to = maps(dst, "dst");
    fits(to, static_cast<int>(x_.at(2)), static_cast<int>(x_.at(3)), padded(channels * (combine == 3 ? 2 : 1)), "dst");
    RowVectors image;
    if (combine != 0) image = {class_image_.floats(), nullptr, x_.at(1) * x_.at(2) * x_.at(3)};
    add(InputArgs{x_.floats(), image, rows_, channels, to.map(), center, combine, to.data});
  }

  void embed(const BoundVectors& time, const BoundVectors& classes, int features, nb::handle dst) {
    require(features >= 1 && features <= most, "features: from 1 to 2^24 is needed");
    const Maps to = maps(dst, "dst");
    fits(to, 1, 1, padded(features), "dst");
    const RowVectors first = vectors(time, features, "time"), second = vectors(classes, features, "classes");
    add(EmbedArgs{first, second, features, to.data});
  }

  void conv(const std::vector<nb::object>& src, int kernel, int stride, int padding, bool circular, bool upsample,
            Method method, const std::optional<BoundNorm>& norm, bool silu, bool geglu, bool relu, bool bf16,
            nb::handle weights, nb::handle bias, const std::optional<BoundVectors>& emb, int emb_channels,
            nb::handle residual, float divide, nb::handle dst, nb::handle statistics) {
    ConvOp op{};
    ConvArgs& a = op.conv;
    a.src = sources(src, silu);
    const Maps to = maps(dst, "dst");
    a.map = to.map();
    a.outputs = to.channels;
    a.dst = to.data;
    require((kernel == 1 && padding == 0) || (kernel == 3 && (padding == 0 || padding == 1)),
            "a kernel of 1 without padding, or of 3 with a padding of 0 or 1, is needed");
    require(!circular || padding == 1, "circular: a padding of 1 is needed");
    require(stride == 1 || stride == 2, "stride: 1 or 2 is needed");
    require(method == Method::direct || (kernel == 3 && stride == 1), "Winograd's method needs kernel 3 and stride 1");
    // The zeros after the last row and column are as many as before the first, or one more.
    const auto size = [&](int from, int after) {
      return (from * (1 + upsample) + padding + after - kernel) / stride + 1;
    };
    const auto covers = [&](int after) {
      return size(a.src.map.height, after) == to.height && size(a.src.map.width, after) == to.width;
    };
    require(covers(padding) || (kernel == 3 && covers(1)), "dst does not have the size of the convolution's result");
    a.kernel = kernel;
    a.stride = stride;
    a.padding = padding;
    a.circular = circular;
    a.upsample = upsample;
    a.method = method;
    a.geglu = geglu;
    a.relu = relu;
    a.bf16 = bf16;
    require(!geglu || (kernel == 1 && stride == 1 && !upsample && !emb && residual.is_none() && statistics.is_none() &&
                       divide == 1.0f && !relu),
            "geglu: a product without emb, residual, divide, statistics and relu is needed");
    require(divide > 0.0f, "divide: a positive number is needed");
    a.weights = packed(weights, a);
    a.bias = vector(bias, geglu ? static_cast<int64_t>(a.panels()) * panel : a.outputs, "bias");
    a.emb_channels = emb_channels;
    require(emb_channels >= 0 && emb_channels <= a.outputs, "emb_channels: more than dst has");
    if (emb) a.emb = vectors(*emb, emb_channels, "emb");
    if (!residual.is_none()) {
      const Maps from = maps(residual, "residual");
      a.residual_shift = from.height != to.height || from.width != to.width;
      const int scale = 1 + a.residual_shift;
      require(scale * from.height == to.height && scale * from.width == to.width && from.channels == a.outputs,
              "residual does not have the shape of dst, or half its height and width");
      a.residual = from.data;
    }
    a.inverse_divide = 1.0f / divide;
    if (!statistics.is_none()) a.statistics = this->statistics(statistics, to.map(), a.outputs, "statistics");
    if (norm && norm->groups == 0) {
      require(kernel == 1 && stride == 1 && !upsample && !silu, "a LayerNorm is before a product, without silu");
      layer_norm(*norm, a.src);
    } else {
      op.norm = norm_of(norm, a.src);
    }
    add(op);
  }

  void pool(const std::vector<nb::object>& src, const std::optional<BoundNorm>& norm, bool silu, nb::handle dst) {
    PoolOp op{};
    op.pool.src = sources(src, silu);
    const Maps to = maps(dst, "dst");
    require(op.pool.src.map.height == 2 * to.height && op.pool.src.map.width == 2 * to.width &&
                op.pool.src.all_channels() == to.channels,
            "dst does not have half the height and width, and all channels, of src");
    op.pool.map = to.map();
    op.pool.dst = to.data;
    op.norm = norm_of(norm, op.pool.src);
    add(op);
  }

  // src: (queries, keys and values side by side); or (queries, what keys and values are); or, where each row has those of
  // its label's text, (queries). text: [labels, keys, keys and values side by side].
  void attention(const std::vector<nb::object>& src, int heads, int head_dim, nb::handle text,
                 const std::optional<BoundNorm>& norm, bool bf16, nb::handle dst) {
    AttentionOp op{};
    AttentionArgs& a = op.attention;
    require(src.size() == 1 || src.size() == 2, "one or two sources are needed");
    require(heads >= 1 && heads <= most && head_dim >= 1 && head_dim <= most, "heads, head_dim: from 1 to 2^24");
    const int64_t inner = static_cast<int64_t>(heads) * head_dim;
    const Maps to = maps(dst, "dst"), queries = maps(src[0], "src"), keys = maps(src.back(), "src");
    fits(queries, to.height, to.width, queries.channels, "src");
    fits(keys, to.height, to.width, keys.channels, "src");
    require(inner <= to.channels && padded(static_cast<int>(inner)) == to.channels, "dst: heads * head_dim is needed");
    a.queries = queries.data;
    a.query_stride = queries.channels;
    a.key_stride = keys.channels;
    a.pixels = a.keys_count = to.height * to.width;
    const auto from = [](const float* base, int64_t offset) { return base == nullptr ? nullptr : base + offset; };
    const int64_t apart = static_cast<int64_t>(a.pixels) * a.key_stride;
    require(src.size() == 2 || !norm, "a norm needs two sources");
    if (!text.is_none()) {
      require(src.size() == 1 && inner <= queries.channels, "src: queries of heads * head_dim channels are needed");
      const Operand bank = operand<const float>(text, 3, "text");
      require(bank.at(2) == 2 * inner && bank.at(1) <= most / 64,
              "text is " + describe(bank.shape) + ": [labels, keys, 2 * heads * head_dim] is needed");
      use(bank);
      a.keys_count = static_cast<int>(bank.at(1));
      a.key_stride = static_cast<int>(2 * inner);
      a.keys = {bank.floats(), indices(By::label, bank.at(0)), bank.at(1) * bank.at(2)};
      a.values = {from(bank.floats(), inner), a.keys.index, a.keys.stride};
    } else if (src.size() == 1) {
      require(3 * inner <= keys.channels, "src: 3 * heads * head_dim channels are needed");
      a.keys = {from(keys.data, inner), nullptr, apart};
      a.values = {from(keys.data, 2 * inner), nullptr, apart};
    } else {
      require(heads == 1 && inner <= queries.channels && padded(head_dim) == keys.channels,
              "two sources need one head that is as wide as they are");
      a.keys = a.values = {keys.data, nullptr, apart};
    }
    a.heads = heads;
    a.head_dim = head_dim;
    a.bf16 = bf16;
    a.dst = to.data;
    require(static_cast<int64_t>(rows_) * heads * a.blocks() <= INT_MAX, "too many rows, heads and pixels");
    if (norm) {
      Sources read;
      read.count = 1;
      read.channels[0] = keys.channels;
      read.map = keys.map();
      op.norm = norm_of(norm, read);
    }
    add(op);
  }

  void run(int first, int last) {
    seal();
    const WithoutGil without_gil;
    engine_.run(first, last, [this] { take_rows(); });
  }

  std::vector<int64_t> profile(int first, int last) {
    seal();
    const WithoutGil without_gil;
    return engine_.profile(first, last, [this] { take_rows(); });
  }

  // Runs one step of a batch in one call: the network, guidance and, where `advance_rows`, the update and row += 1. Only
  // the `images` take it, all where it is None; `guided` are the numbers, in that list, of those that are evaluated with
  // the null label too.
  void step(Floats x, Integers row, ConstIntegers table, ConstIntegers entry, ConstIntegers images,
            ConstIntegers guided, ConstIntegers label, int64_t null_label, ConstIntegers null, ConstFloats class_image,
            ConstFloats null_image, Floats net, Floats out, ConstFloats bank, ConstFloats guidance, ConstFloats rescale,
            bool advance_rows, ConstIntegers lengths, ConstIntegers seed, ConstIntegers index, Floats xs, Floats m1,
            Floats m2, Floats m3) {
    require(x.ndim() == 4 && x.size() > 0, "x is not [images, channels, height, width]");
    const std::vector<int64_t> shape = shape_of(x);
    const int64_t B = shape[0], C = shape[1], H = shape[2], W = shape[3];
    require(C == x_.at(1) && H == x_.at(2) && W == x_.at(3),
            "x is " + describe(shape) + "; the network was prepared for [images, " + std::to_string(x_.at(1)) + ", " +
                std::to_string(x_.at(2)) + ", " + std::to_string(x_.at(3)) + "]");
    require(B <= INT_MAX / 2, "too many images");
    if (advance_rows)
      require(out_channels_ == C || out_channels_ == 2 * C,
              "the network gives " + std::to_string(out_channels_) + " channels; " + std::to_string(C) +
                  " are needed, or " + std::to_string(2 * C) + " where the variance is learned");
    // From here on, indices are those that were checked, whatever another thread writes into the arrays.
    std::vector<int64_t> image_of_row = chosen(images, B, "images");
    const int64_t taking = static_cast<int64_t>(image_of_row.size());
    const std::vector<int64_t> paired = guided.is_valid() ? chosen(guided, taking, "guided") : std::vector<int64_t>{};
    require(paired.empty() || guidance.is_valid(), "images are guided, but guidance is None");
    std::vector<int> pair(taking, -1);
    for (const int64_t i : paired) {
      pair[i] = static_cast<int>(image_of_row.size());
      image_of_row.push_back(image_of_row[i]);
    }
    const int64_t rows = static_cast<int64_t>(image_of_row.size());
    check_shape(x, shape, "x");
    check_shape(net, {rows, H, W, padded(out_channels_)}, "net");
    check_shape(out, {B, out_channels_, H, W}, "out");
    check_shape(guidance, {B}, "guidance");
    check_shape(rescale, {B}, "rescale");
    check_shape(label, {B}, "label");
    check_shape(null, {B}, "null");
    check_shape(class_image, {B, H, W, C}, "class_image");
    check_shape(null_image, {H, W, C}, "null_image");
    check_shape(seed, {B}, "seed");
    check_shape(index, {B}, "index");
    check_shape(xs, shape, "xs");
    check_shape(m1, shape, "m1");
    check_shape(m2, shape, "m2");
    check_shape(m3, shape, "m3");
    const Places places(bank, table, ConstIntegers(row), B);
    check_shape(entry, {places.tables, places.bank.rows}, "entry");
    check_shape(lengths, {places.tables}, "lengths");
    require(label.is_valid() || !uses(By::label), "the network has classes, but label is None");
    const bool shows_class = !class_image_.shape.empty();
    require(!shows_class || (class_image.is_valid() && (paired.empty() || null_image.is_valid())),
            "the network has a class image, but it is None");
    std::vector<int64_t> timesteps(rows), labels(label.is_valid() ? rows : 0);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t i = image_of_row[r];
      timesteps[r] = checked(entry.data()[places.table[i] * places.bank.rows + places.row[i]], By::timestep);
      if (label.is_valid()) {
        const int64_t unconditional = null.is_valid() ? null.data()[i] : null_label;
        labels[r] = checked(r < taking ? label.data()[i] : unconditional, By::label);
      }
    }

    const NetworkInputs inputs{x_.floats(), timesteps_now_.data(), labels_now_.data(), class_image_.floats(), out_};
    Batch batch{};
    batch.rows = static_cast<int>(rows);
    batch.conditional = static_cast<int>(taking);
    batch.image_of_row = image_of_row.data();
    batch.timestep = timesteps.data();
    batch.label = labels.empty() ? nullptr : labels.data();
    batch.image_size = C * H * W;
    batch.out_size = H * W * padded(out_channels_);
    batch.x = x.data();
    batch.class_image = shows_class ? class_image.data() : nullptr;
    batch.null_image = data_or_null(null_image);
    batch.net = net.data();

    GuideArgs guide;
    guide.bank = places.bank;
    guide.table = places.table.data();
    guide.row = places.row.data();
    guide.guidance = data_or_null(guidance);
    guide.rescale = data_or_null(rescale);
    guide.taking = {image_of_row.data(), batch.conditional};
    guide.pair = pair.data();
    guide.out_channels = out_channels_;
    guide.channels = std::min(static_cast<int>(C), out_channels_);
    guide.padded = padded(out_channels_);
    guide.pixels = H * W;
    guide.net = net.data();
    guide.out = out.data();

    UpdateArgs update;
    update.bank = places.bank;
    update.taking = guide.taking;
    update.table = guide.table;
    update.row = guide.row;
    update.seed = seed.data();
    update.index = index.data();
    update.channels = static_cast<int>(C);
    update.out_channels = out_channels_;
    update.pixels = guide.pixels;
    update.x = x.data();
    update.xs = data_or_null(xs);
    update.m1 = data_or_null(m1);
    update.m2 = data_or_null(m2);
    update.m3 = data_or_null(m3);
    update.out = out.data();

    seal();
    const WithoutGil without_gil;
    if (!advance_rows) return engine_.forward(inputs, batch, guide);
    engine_.step(inputs, batch, guide, update);
    advance(row.data(), places.table.data(), lengths.data(), guide.taking);
  }

  int64_t space() const { return engine_.space(); }
  int size() const { return engine_.size(); }

 private:
  // Lets no operation be added from now on: it could need what was not checked.
  void seal() {
    require(runs_, "the engine was given shapes instead of arrays, so it cannot run");
    sealed_ = true;
  }

  static int rows_of(const Operand& x) {
    const int64_t pixels = (x.at(2) + strip) * (x.at(3) + strip);
    require(x.at(0) * pixels <= INT_MAX / 8, "x is " + describe(x.shape) + ": too many rows and pixels");
    return static_cast<int>(x.at(0));
  }

  template <class Op>
  void add(const Op& op) {
    require(!sealed_, "the engine has run, so no operation can be added");
    engine_.add(op);
  }

  // Keeps the operand's memory for as long as the engine lives.
  const Operand& use(const Operand& given) {
    if (given.data == nullptr)
      runs_ = false;
    else
      kept_.push_back(given.owner);
    return given;
  }

  Maps maps(nb::handle given, const std::string& name) {
    const Operand array = operand<float>(given, 4, name);
    const int64_t pixels = (array.at(1) + strip) * (array.at(2) + strip);
    // Kernels count pixels, strips and their statistics with int.
    require(array.at(0) == rows_ && array.at(3) % group == 0 && rows_ * pixels <= INT_MAX / 8 &&
                array.at(3) * (array.at(1) + strip) <= INT_MAX / 8 && array.at(2) <= INT_MAX / (64 * group),
            name + " is " + describe(array.shape) + ": [" + std::to_string(rows_) +
                ", height, width, channels padded to a multiple of " + std::to_string(group) + "] is needed");
    use(array);
    return {array.floats(), static_cast<int>(array.at(1)), static_cast<int>(array.at(2)),
            static_cast<int>(array.at(3))};
  }

  static void fits(const Maps& maps, int height, int width, int channels, const std::string& name) {
    require(maps.height == height && maps.width == width && maps.channels == channels,
            name + " is " + describe({maps.height, maps.width, maps.channels}) + ", " +
                describe({height, width, channels}) + " is needed");
  }

  Sources sources(const std::vector<nb::object>& src, bool silu) {
    require(src.size() == 1 || src.size() == 2, "one or two sources are needed");
    Sources s;
    s.count = static_cast<int>(src.size());
    for (int i = 0; i < s.count; i++) {
      const Maps from = maps(src[i], "src");
      if (i == 0) s.map = from.map();
      fits(from, s.map.height, s.map.width, from.channels, "src");
      s.data[i] = from.data;
      s.channels[i] = from.channels;
    }
    s.silu = silu;
    return s;
  }

  // Returns the packed weights, whose shape ConvArgs describes; bfloat16 comes as int16.
  const void* packed(nb::handle given, const ConvArgs& a) {
    return use(packed_weights<const float, const int16_t>(given, "weights", kernels_, a.panels(), a.positions(),
                                                          a.depth(), a.bf16))
        .data;
  }

  // Returns a vector of at least `size` numbers.
  const float* vector(nb::handle given, int64_t size, const std::string& name) {
    return vector(operand<const float>(given, 1, name), size, name);
  }
  const float* vector(const Operand& given, int64_t size, const std::string& name) {
    require(given.at(0) >= size,
            name + " has " + std::to_string(given.at(0)) + " numbers, " + std::to_string(size) + " are needed");
    return use(given).floats();
  }

  RowVectors vectors(const BoundVectors& v, int64_t size, const std::string& name) {
    const int64_t count = v.values.at(0), stride = v.values.at(1);
    require(v.offset >= 0 && v.offset <= stride && size <= stride - v.offset,
            name + ": " + std::to_string(size) + " numbers from " + std::to_string(v.offset) + " on, of vectors of " +
                std::to_string(stride));
    use(v.values);
    const float* base = v.values.data == nullptr ? nullptr : v.values.floats() + v.offset;
    if (v.by == By::row) {
      require(count == rows_ || count == 1, name + ": a vector for each row, or one for all, is needed");
      return {base, nullptr, count == 1 ? 0 : stride};
    }
    return {base, indices(v.by, count), stride};
  }

  // Returns where operations read the number of each row, of a table of `count` entries.
  const int64_t* indices(By by, int64_t count) {
    int64_t& limit = by == By::timestep ? timesteps_ : labels_;
    limit = std::min(limit, count);
    return by == By::timestep ? timesteps_now_.data() : labels_now_.data();
  }

  float* statistics(nb::handle given, Map map, int channels, const std::string& name) {
    return statistics(operand<float>(given, 4, name), map, channels, name);
  }
  float* statistics(const Operand& given, Map map, int channels, const std::string& name) {
    const std::vector<int64_t> shape = {rows_, map.strips(), 2, channels};
    require(given.shape == shape, name + " is " + describe(given.shape) + ", " + describe(shape) + " is needed");
    return use(given).floats();
  }

  NormArgs norm_of(const std::optional<BoundNorm>& norm, const Sources& src) {
    NormArgs a{};
    if (!norm) return a;
    require(static_cast<int>(norm->channels.size()) == src.count && norm->statistics.size() == norm->channels.size(),
            "the norm needs statistics and channels of every source");
    a.count = src.count;
    a.map = src.map;
    int64_t total = 0;
    for (int s = 0; s < src.count; s++) {
      const int channels = norm->channels[s];
      require(channels >= 1 && channels <= most && padded(channels) == src.channels[s],
              "the norm's channels are not those of the sources");
      a.channels[s] = channels;
      a.statistics[s] = statistics(norm->statistics[s], src.map, src.channels[s], "statistics");
      total += channels;
    }
    require(norm->groups >= 1 && total % norm->groups == 0,
            std::to_string(norm->groups) + " groups of " + std::to_string(total) + " channels");
    a.groups = norm->groups;
    a.eps = norm->eps;
    a.gamma = vector(norm->gamma, total, "gamma");
    a.beta = vector(norm->beta, total, "beta");
    if (norm->modulation) a.modulation = vectors(*norm->modulation, 2 * total, "modulation");
    return a;
  }

  // Has the products of `src` read it through a LayerNorm.
  void layer_norm(const BoundNorm& norm, Sources& src) {
    require(src.count == 1 && norm.statistics.empty() && norm.channels.size() == 1 && !norm.modulation,
            "a LayerNorm needs one source, and neither statistics nor modulation");
    const int channels = norm.channels[0];
    require(channels >= 1 && channels <= most && padded(channels) == src.channels[0],
            "the norm's channels are not those of the source");
    src.norm_channels = channels;
    src.eps = norm.eps;
    src.gamma = vector(norm.gamma, src.channels[0], "gamma");
    src.beta = vector(norm.beta, src.channels[0], "beta");
  }

  bool uses(By by) const { return (by == By::timestep ? timesteps_ : labels_) != INT64_MAX; }

  // Returns the number of a timestep or label after checking that its vector exists.
  int64_t checked(int64_t number, By by) const {
    if (!uses(by)) return 0;
    const int64_t limit = by == By::timestep ? timesteps_ : labels_;
    require(number >= 0 && number < limit, std::string(by == By::timestep ? "timestep " : "label ") +
                                               std::to_string(number) + " of a table of " + std::to_string(limit));
    return number;
  }

  // Takes over each row's timestep and label, for operations that run without a step. Only one thread may do so at a
  // time, and not while operations run.
  void take_rows() {
    for (int i = 0; i < rows_; i++) {
      timesteps_now_[i] = checked(static_cast<const int64_t*>(timestep_.data)[i], By::timestep);
      labels_now_[i] = checked(static_cast<const int64_t*>(label_.data)[i], By::label);
    }
  }

  Operand x_;
  int rows_;
  const Kernels& kernels_;
  Engine engine_;
  Operand timestep_, label_, class_image_;
  float* out_ = nullptr;
  int out_channels_ = 0;
  bool runs_ = true, sealed_ = false;
  int64_t timesteps_ = INT64_MAX, labels_ = INT64_MAX;  // number of vectors; the largest number where none is read
  std::vector<int64_t> timesteps_now_, labels_now_;     // the indices that operations read, which no one else can write
  std::vector<nb::ndarray<>> kept_;
};

inline void bind_engine(nb::module_& m) {
  using namespace nb::literals;
  nb::enum_<Method>(m, "Method")
      .value("direct", Method::direct)
      .value("winograd2", Method::winograd2)
      .value("winograd4", Method::winograd4);

  nb::enum_<By>(m, "By").value("row", By::row).value("timestep", By::timestep).value("label", By::label);

  nb::class_<BoundVectors>(m, "RowVectors")
      .def(
          "__init__",
          [](BoundVectors* self, nb::handle values, By by, int64_t offset) {
            new (self) BoundVectors{operand<const float>(values, 2, "values"), by, offset};
          },
          "values"_a, "by"_a, "offset"_a = 0);

  nb::class_<BoundNorm>(m, "Norm").def(
      "__init__",
      [](BoundNorm* self, const std::vector<nb::object>& statistics, std::vector<int> channels, int groups, float eps,
         nb::handle gamma, nb::handle beta, std::optional<BoundVectors> modulation) {
        std::vector<Operand> read;
        for (const nb::object& s : statistics) read.push_back(operand<float>(s, 4, "statistics"));
        new (self) BoundNorm{std::move(read),
                             std::move(channels),
                             groups,
                             eps,
                             operand<const float>(gamma, 1, "gamma"),
                             operand<const float>(beta, 1, "beta"),
                             std::move(modulation)};
      },
      nb::kw_only(), "statistics"_a, "channels"_a, "groups"_a, "eps"_a, "gamma"_a, "beta"_a,
      "modulation"_a = nb::none());

  nb::class_<BoundEngine>(m, "Engine")
      .def(nb::init<const std::string&, int, nb::handle, nb::handle, int, nb::handle, nb::handle, nb::handle>(),
           "isa"_a, "threads"_a, nb::kw_only(), "x"_a, "out"_a, "out_channels"_a, "timestep"_a, "label"_a,
           "class_image"_a.none() = nb::none())
      .def("input", &BoundEngine::input, nb::kw_only(), "center"_a, "combine"_a, "dst"_a)
      .def("embed", &BoundEngine::embed, nb::kw_only(), "time"_a, "classes"_a, "features"_a, "dst"_a)
      .def("conv", &BoundEngine::conv, nb::kw_only(), "src"_a, "kernel"_a, "stride"_a, "padding"_a, "circular"_a,
           "upsample"_a, "method"_a, "norm"_a.none(), "silu"_a, "geglu"_a, "relu"_a, "bf16"_a, "weights"_a, "bias"_a,
           "emb"_a.none(), "emb_channels"_a, "residual"_a.none(), "divide"_a, "dst"_a, "statistics"_a.none())
      .def("pool", &BoundEngine::pool, nb::kw_only(), "src"_a, "norm"_a.none(), "silu"_a, "dst"_a)
      .def("attention", &BoundEngine::attention, nb::kw_only(), "src"_a, "heads"_a, "head_dim"_a, "text"_a.none(),
           "norm"_a.none(), "bf16"_a, "dst"_a)
      .def("step", &BoundEngine::step, nb::kw_only(), "x"_a.noconvert(), "row"_a.noconvert(), "table"_a.noconvert(),
           "entry"_a.noconvert(), "images"_a.noconvert().none(), "guided"_a.noconvert().none(),
           "label"_a.noconvert().none(), "null_label"_a, "null"_a.noconvert().none(),
           "class_image"_a.noconvert().none(), "null_image"_a.noconvert().none(), "net"_a.noconvert(),
           "out"_a.noconvert(), "bank"_a.noconvert(), "guidance"_a.noconvert().none(), "rescale"_a.noconvert().none(),
           "advance_rows"_a, "lengths"_a.noconvert(), "seed"_a.noconvert(), "index"_a.noconvert(),
           "xs"_a.noconvert().none(), "m1"_a.noconvert().none(), "m2"_a.noconvert().none(), "m3"_a.noconvert().none())
      .def("run", &BoundEngine::run, "first"_a, "last"_a)
      .def("profile", &BoundEngine::profile, "first"_a, "last"_a)
      .def_prop_ro("space", &BoundEngine::space)
      .def("__len__", &BoundEngine::size);
}

}  // namespace fastdiff
