// fastdiff._native, the Python module of the engine. Buffers are arrays, which Python allocates.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <tuple>
#include <vector>

#include "bind_checksum.hpp"
#include "bind_engine.hpp"
#include "bind_pack.hpp"
#include "bind_update.hpp"
#include "gil.hpp"
#include "isa.hpp"

namespace nb = nanobind;
using namespace fastdiff;

namespace {

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

// Measures GFLOP/s of one thread: of products in the cache, of multiply-adds on registers, and of dot products of bfloat16
// on registers, which is 0 where there are none.
std::tuple<double, double, double> rates(const std::string& isa) {
  const Kernels& kernels = choose_kernels(isa);
  constexpr int items = 24, depth = 64, repeats = 200, rounds = 20000;
  const std::vector<float> a(items * depth, 0.5f), b(depth * panel, 0.25f);
  std::vector<float> c(items * panel);
  const double product = gflops(2.0 * items * depth * panel * repeats, [&] {
    for (int i = 0; i < repeats; i++)
      kernels.multiply(items, panel, depth, a.data(), depth, b.data(), c.data(), panel, false, depth);
  });
  volatile float kept = 0;
  const double peak =
      gflops(2.0 * kernels.lanes * kernels.fma_chains * rounds, [&] { kept = kept + kernels.fma(rounds); });
  const double dot = kernels.dot == nullptr ? 0.0
                                            : gflops(static_cast<double>(kernels.dot_operations) * rounds / 16,
                                                     [&] { kept = kept + kernels.dot(rounds / 16); });
  return {product, peak, dot};
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
  m.def(
      "slice", [](const std::string& isa, bool bf16) { return choose_kernels(isa).columns(bf16); }, nb::arg("isa"),
      nb::arg("bf16") = false, "Return the number of columns of a panel of weights that are stored together.");
  m.def("bf16_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels())
      if (kernels->bf16) names.emplace_back(kernels->name);
    return names;
  });
  m.def("emulated_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : emulated_kernels()) names.emplace_back(kernels->name);
    return names;
  });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
  });

  bind_update(m);
  bind_engine(m);
  bind_checksum(m);
  bind_pack(m);
  m.def("rates", &rates, nb::arg("isa") = "", nb::call_guard<WithoutGil>(),
        "Measure GFLOP/s of one thread: (products of the inner kernel on data in the cache, multiply-adds on "
        "registers, dot products of bfloat16 on registers or 0).");
}
