// This file is compiled without instruction-set flags, as it must run on every processor of the architecture.
#include "isa.hpp"

#include <stdexcept>

namespace fastdiff {

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2;
#ifndef FASTDIFF_QUICK
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kernels_neon;
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> result;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
#ifndef FASTDIFF_QUICK
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) result.push_back(&kernels_avx512bf16);
    result.push_back(&kernels_avx512);
  }
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.push_back(&kernels_avx2);
#elif defined(__aarch64__) || defined(_M_ARM64)
  result.push_back(&kernels_neon);
#endif
  return result;
}

const Kernels& choose_kernels(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : available_kernels()) {
    if (name.empty() || name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not available here; available: " + (names.empty() ? "none" : names));
}

}  // namespace fastdiff
