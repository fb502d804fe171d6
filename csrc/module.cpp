// fastdiff._native, the Python module of the engine. Operations get their buffers as addresses;
// fastdiff/backends/native/ owns the memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "bind_update.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "isa.hpp"

namespace nb = nanobind;
using namespace fastdiff;

namespace {

// Sets a field of two addresses or numbers from a list of one or two.
template <class T, class Value>
void set_pair(Value (&pair)[2], const std::vector<T>& values) {
  if (values.size() < 1 || values.size() > 2) throw std::invalid_argument("one or two sources are needed");
  for (size_t i = 0; i < 2; i++) {
    if constexpr (std::is_pointer_v<Value>)
      pair[i] = i < values.size() ? reinterpret_cast<Value>(values[i]) : nullptr;
    else
      pair[i] = i < values.size() ? values[i] : 0;
  }
}

RowVectors row_vectors(uintptr_t base, uintptr_t index, int64_t stride) {
  return {reinterpret_cast<const float*>(base), reinterpret_cast<const int64_t*>(index), stride};
}

Sources sources(const std::vector<uintptr_t>& data, const std::vector<int>& channels, int height, int width,
                bool silu) {
  Sources s;
  s.count = static_cast<int>(data.size());
  set_pair(s.data, data);
  set_pair(s.channels, channels);
  s.map = {height, width};
  s.silu = silu;
  return s;
}

using Floats = Array<float>;
using ConstFloats = Array<const float>;
using Integers = Array<int64_t>;
using ConstIntegers = Array<const int64_t>;

// Runs one step of a batch in one call: the network, guidance and, where `advance_rows`, the update and row += 1. in_*:
// the buffers of the program (NetworkInputs); the others belong to the batch.
void step(Engine& engine, Floats in_x, Integers in_timestep, Integers in_label, Floats in_class_image,
          ConstFloats in_out, Floats x, Integers row, ConstIntegers table, ConstIntegers entry, ConstIntegers label,
          ConstFloats class_image, Floats net, Floats out, ConstFloats bank, ConstFloats guidance, float rescale,
          bool advance_rows, ConstIntegers lengths, ConstIntegers seed, ConstIntegers index, Floats xs, Floats m1,
          Floats m2, Floats m3) {
  if (x.ndim() != 4 || out.ndim() != 4 || net.ndim() != 4 || entry.ndim() != 2 || in_out.ndim() != 4)
    throw std::invalid_argument("x, out, net and in_out have four dimensions, entry two");
  const size_t B = x.shape(0), C = x.shape(1), H = x.shape(2), W = x.shape(3);
  const size_t rows = guidance.is_valid() ? 2 * B : B;
  check_shape(net, {rows, H, W, in_out.shape(3)}, "net");
  check_shape(out, {B, out.shape(1), H, W}, "out");
  check_shape(in_x, {in_out.shape(0), C, H, W}, "in_x");
  check_shape(guidance, {B}, "guidance");
  check_shape(label, {rows}, "label");
  check_shape(class_image, {rows, H, W, C}, "class_image");
  check_shape(seed, {B}, "seed");
  check_shape(index, {B}, "index");
  for (const Floats* buffer : {&xs, &m1, &m2, &m3}) check_shape(*buffer, {B, C, H, W}, "a buffer of the update");
  const Bank tables = checked_bank(bank, table, ConstIntegers(row), B);
  if (entry.shape(0) != bank.shape(0) || entry.shape(1) != bank.shape(1))
    throw std::invalid_argument("entry is not [tables, rows]");

  const NetworkInputs inputs{in_x.data(), in_timestep.data(), in_label.data(), data_or_null(in_class_image),
                             in_out.data()};
  Batch batch{};
  batch.images = static_cast<int>(B);
  batch.guided = guidance.is_valid();
  batch.image_size = static_cast<int64_t>(C * H * W);
  batch.out_size = static_cast<int64_t>(H * W * in_out.shape(3));
  batch.x = x.data();
  batch.table = table.data();
  batch.row = row.data();
  batch.entry = entry.data();
  batch.entry_rows = static_cast<int64_t>(entry.shape(1));
  batch.label = data_or_null(label);
  batch.class_image = data_or_null(class_image);
  batch.net = net.data();

  GuideArgs guide;
  guide.bank = tables;
  guide.table = table.data();
  guide.row = row.data();
  guide.guidance = data_or_null(guidance);
  guide.rescale = rescale;
  guide.images = batch.images;
  guide.guided = batch.guided;
  guide.out_channels = static_cast<int>(out.shape(1));
  guide.channels = std::min(static_cast<int>(C), guide.out_channels);
  guide.padded = static_cast<int>(in_out.shape(3));
  guide.pixels = static_cast<int64_t>(H * W);
  guide.net = net.data();
  guide.out = out.data();

  UpdateArgs update;
  update.bank = tables;
  update.table = table.data();
  update.row = row.data();
  update.seed = seed.data();
  update.index = index.data();
  update.channels = static_cast<int>(C);
  update.out_channels = guide.out_channels;
  update.pixels = guide.pixels;
  update.x = x.data();
  update.xs = data_or_null(xs);
  update.m1 = data_or_null(m1);
  update.m2 = data_or_null(m2);
  update.m3 = data_or_null(m3);
  update.out = out.data();

  const WithoutGil without_gil;
  if (!advance_rows) return engine.forward(inputs, batch, guide);
  engine.step(inputs, batch, guide, update);
  advance(row.data(), table.data(), lengths.data(), batch.images);
}

// Returns the highest rate, in GFLOP/s, of a few short runs that do `flop` operations each.
template <class Work>
double gflops(double flop, Work work) {
  double best = 0;
  for (int i = 0; i < 20; i++) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, flop / time.count() / 1e9);
  }
  return best;
}

// Measures one thread: (GFLOP/s of products in the cache, GFLOP/s of multiply-adds on registers).
std::pair<double, double> rates(const std::string& isa) {
  const Kernels& kernels = choose_kernels(isa);
  constexpr int items = 24, depth = 64, repeats = 200, rounds = 20000;
  const std::vector<float> a(items * depth, 0.5f), b(depth * panel, 0.25f);
  std::vector<float> c(items * panel);
  const double product = gflops(2.0 * items * depth * panel * repeats, [&] {
    for (int i = 0; i < repeats; i++)
      kernels.multiply(items, panel, depth, a.data(), depth, b.data(), c.data(), panel, false);
  });
  volatile float kept = 0;
  const double peak =
      gflops(2.0 * kernels.lanes * kernels.fma_chains * rounds, [&] { kept = kept + kernels.fma(rounds); });
  return {product, peak};
}

void raise_backend_error(const std::string& message) {
  const nb::object type = nb::module_::import_("fastdiff.errors").attr("BackendError");
  PyErr_SetString(type.ptr(), message.c_str());
}

}  // namespace

NB_MODULE(_native, m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const ResourceError& e) {
      raise_backend_error(std::string(e.what()) +
                          ". Free memory, raise the limits of the process (ulimit -u, ulimit -v, those of its "
                          "container), or make the sampler anew after torch.set_num_threads(1)");
    } catch (const std::bad_alloc&) {
      raise_backend_error(
          "there is no memory left for the native engine; ask for smaller images or a smaller "
          "batch_size");
    }
  });
  nb::set_leak_warnings(false);  // daemon threads have engines when the interpreter ends
  m.attr("STRIP") = strip;
  m.attr("GROUP") = group;
  m.attr("PANEL") = panel;
  m.def("bf16_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels())
      if (kernels->bf16) names.emplace_back(kernels->name);
    return names;
  });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
  });

  bind_update(m);
  m.def("rates", &rates, nb::arg("isa") = "", nb::call_guard<WithoutGil>(),
        "Measure GFLOP/s of one thread: (products of the inner kernel on data in the cache, multiply-adds on "
        "registers).");

  nb::enum_<Method>(m, "Method")
      .value("direct", Method::direct)
      .value("winograd2", Method::winograd2)
      .value("winograd4", Method::winograd4);

  nb::class_<RowVectors>(m, "RowVectors")
      .def(
          "__init__",
          [](RowVectors* self, uintptr_t base, uintptr_t index, int64_t stride) {
            new (self) RowVectors(row_vectors(base, index, stride));
          },
          nb::arg("base"), nb::arg("index") = 0, nb::arg("stride"));

  nb::class_<NormArgs>(m, "Norm").def(
      "__init__",
      [](NormArgs* self, const std::vector<uintptr_t>& statistics, const std::vector<int>& channels, int height,
         int width, int groups, float eps, uintptr_t gamma, uintptr_t beta, std::optional<RowVectors> modulation) {
        NormArgs a{};
        a.count = static_cast<int>(statistics.size());
        set_pair(a.statistics, statistics);
        set_pair(a.channels, channels);
        a.map = {height, width};
        a.groups = groups;
        a.eps = eps;
        a.gamma = reinterpret_cast<const float*>(gamma);
        a.beta = reinterpret_cast<const float*>(beta);
        a.modulation = modulation.value_or(RowVectors{});
        new (self) NormArgs(a);
      },
      nb::kw_only(), nb::arg("statistics"), nb::arg("channels"), nb::arg("height"), nb::arg("width"), nb::arg("groups"),
      nb::arg("eps"), nb::arg("gamma"), nb::arg("beta"), nb::arg("modulation") = nb::none());

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, const std::string& isa, int threads, int rows) {
            new (self) Engine(choose_kernels(isa), threads, rows);
          },
          nb::arg("isa"), nb::arg("threads"), nb::arg("rows"))
      .def(
          "input",
          [](Engine& e, uintptr_t x, std::optional<RowVectors> class_image, int images, int channels, int height,
             int width, bool center, int combine, uintptr_t dst) {
            e.add(InputArgs{reinterpret_cast<const float*>(x),
                            class_image.value_or(RowVectors{}),
                            images,
                            channels,
                            {height, width},
                            center,
                            combine,
                            reinterpret_cast<float*>(dst)});
          },
          nb::kw_only(), nb::arg("x"), nb::arg("class_image").none(), nb::arg("images"), nb::arg("channels"),
          nb::arg("height"), nb::arg("width"), nb::arg("center"), nb::arg("combine"), nb::arg("dst"))
      .def(
          "embed",
          [](Engine& e, const RowVectors& time, const RowVectors& classes, int features, uintptr_t dst) {
            e.add(EmbedArgs{time, classes, features, reinterpret_cast<float*>(dst)});
          },
          nb::kw_only(), nb::arg("time"), nb::arg("classes"), nb::arg("features"), nb::arg("dst"))
      .def(
          "conv",
          [](Engine& e, const std::vector<uintptr_t>& src, const std::vector<int>& channels, int src_height,
             int src_width, int height, int width, int kernel, int stride, int padding, bool upsample, Method method,
             std::optional<NormArgs> norm, bool silu, bool bf16, uintptr_t weights, uintptr_t bias, int outputs,
             std::optional<RowVectors> emb, int emb_channels, uintptr_t residual, int residual_shift, float divide,
             uintptr_t dst, uintptr_t statistics) {
            ConvArgs a{};
            a.src = sources(src, channels, src_height, src_width, silu);
            a.map = {height, width};
            a.kernel = kernel;
            a.stride = stride;
            a.padding = padding;
            a.upsample = upsample;
            a.method = method;
            a.bf16 = bf16;
            a.weights = reinterpret_cast<const void*>(weights);
            a.bias = reinterpret_cast<const float*>(bias);
            a.outputs = outputs;
            a.emb = emb.value_or(RowVectors{});
            a.emb_channels = emb_channels;
            a.residual = reinterpret_cast<const float*>(residual);
            a.residual_shift = residual_shift;
            a.inverse_divide = 1.0f / divide;
            a.dst = reinterpret_cast<float*>(dst);
            a.statistics = reinterpret_cast<float*>(statistics);
            e.add(ConvOp{a, norm.value_or(NormArgs{})});
          },
          nb::kw_only(), nb::arg("src"), nb::arg("channels"), nb::arg("src_height"), nb::arg("src_width"),
          nb::arg("height"), nb::arg("width"), nb::arg("kernel"), nb::arg("stride"), nb::arg("padding"),
          nb::arg("upsample"), nb::arg("method"), nb::arg("norm").none(), nb::arg("silu"), nb::arg("bf16"),
          nb::arg("weights"), nb::arg("bias"), nb::arg("outputs"), nb::arg("emb").none(), nb::arg("emb_channels"),
          nb::arg("residual"), nb::arg("residual_shift"), nb::arg("divide"), nb::arg("dst"), nb::arg("statistics"))
      .def(
          "pool",
          [](Engine& e, const std::vector<uintptr_t>& src, const std::vector<int>& channels, int height, int width,
             std::optional<NormArgs> norm, bool silu, uintptr_t dst) {
            PoolArgs a{};
            a.src = sources(src, channels, 2 * height, 2 * width, silu);
            a.map = {height, width};
            a.dst = reinterpret_cast<float*>(dst);
            e.add(PoolOp{a, norm.value_or(NormArgs{})});
          },
          nb::kw_only(), nb::arg("src"), nb::arg("channels"), nb::arg("height"), nb::arg("width"),
          nb::arg("norm").none(), nb::arg("silu"), nb::arg("dst"))
      .def(
          "attention",
          [](Engine& e, uintptr_t queries, int query_stride, uintptr_t keys, uintptr_t values, int key_stride,
             std::optional<NormArgs> norm, int pixels, int heads, int head_dim, bool bf16, uintptr_t dst) {
            AttentionArgs a{};
            a.queries = reinterpret_cast<const float*>(queries);
            a.keys = reinterpret_cast<const float*>(keys);
            a.values = reinterpret_cast<const float*>(values);
            a.query_stride = query_stride;
            a.key_stride = key_stride;
            a.pixels = pixels;
            a.heads = heads;
            a.head_dim = head_dim;
            a.bf16 = bf16;
            a.dst = reinterpret_cast<float*>(dst);
            e.add(AttentionOp{a, norm.value_or(NormArgs{})});
          },
          nb::kw_only(), nb::arg("queries"), nb::arg("query_stride"), nb::arg("keys"), nb::arg("values"),
          nb::arg("key_stride"), nb::arg("norm").none(), nb::arg("pixels"), nb::arg("heads"), nb::arg("head_dim"),
          nb::arg("bf16"), nb::arg("dst"))
      .def("step", &step, nb::kw_only(), nb::arg("in_x").noconvert(), nb::arg("in_timestep").noconvert(),
           nb::arg("in_label").noconvert(), nb::arg("in_class_image").noconvert().none(), nb::arg("in_out").noconvert(),
           nb::arg("x").noconvert(), nb::arg("row").noconvert(), nb::arg("table").noconvert(),
           nb::arg("entry").noconvert(), nb::arg("label").noconvert().none(), nb::arg("class_image").noconvert().none(),
           nb::arg("net").noconvert(), nb::arg("out").noconvert(), nb::arg("bank").noconvert(),
           nb::arg("guidance").noconvert().none(), nb::arg("rescale"), nb::arg("advance_rows"),
           nb::arg("lengths").noconvert(), nb::arg("seed").noconvert(), nb::arg("index").noconvert(),
           nb::arg("xs").noconvert().none(), nb::arg("m1").noconvert().none(), nb::arg("m2").noconvert().none(),
           nb::arg("m3").noconvert().none())
      .def("run", &Engine::run, nb::arg("first"), nb::arg("last"), nb::call_guard<WithoutGil>())
      .def("profile", &Engine::profile, nb::arg("first"), nb::arg("last"), nb::call_guard<WithoutGil>())
      .def_prop_ro("space", &Engine::space)
      .def("__len__", &Engine::size);
}
