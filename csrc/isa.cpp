// This file is compiled without instruction-set flags, as it must run on every processor of the architecture.
#include "isa.hpp"

#include <stdexcept>

#ifdef FASTDIFF_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff {

#ifdef FASTDIFF_HAS_EMULATED
extern const Kernels kernels_amx_emulated;
#endif
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2;
#ifndef FASTDIFF_QUICK
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif
#ifdef FASTDIFF_HAS_AMX
extern const Kernels kernels_amx;

// Returns whether the processor has the tile registers of AMX and products of bfloat16 on them, and the system lets this
// process use them, which is asked once: their state is so large that Linux reserves it for processes that ask.
static bool may_use_tiles() {
  static const bool may = [] {
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bf16) != 0 && (d & tile) != 0 &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return may;
}
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
    if (__builtin_cpu_supports("avx512bf16")) {
#ifdef FASTDIFF_HAS_AMX
      if (may_use_tiles()) result.push_back(&kernels_amx);
#endif
      result.push_back(&kernels_avx512bf16);
    }
    result.push_back(&kernels_avx512);
  }
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.push_back(&kernels_avx2);
#elif defined(__aarch64__) || defined(_M_ARM64)
  result.push_back(&kernels_neon);
#endif
  return result;
}

std::vector<const Kernels*> emulated_kernels() {
#ifdef FASTDIFF_HAS_EMULATED
  return {&kernels_amx_emulated};
#else
  return {};
#endif
}

const Kernels& choose_kernels(const std::string& name) {
  for (const Kernels* kernels : emulated_kernels())
    if (name == kernels->name) return *kernels;
  std::string names;
  for (const Kernels* kernels : available_kernels()) {
    if (name.empty() || name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not available here; available: " + (names.empty() ? "none" : names));
}

}  // namespace fastdiff
