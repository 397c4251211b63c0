// Chooses the ISA level once, at load, and forwards every cpu:: kernel to its table.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernel_table.h"

namespace qops::cpu {
namespace {

struct Level {
  const char* name;
  const KernelTable* kernels;
  bool runs_here;
};

// __builtin_cpu_supports reads cpuid and XCR0, so a level that the kernel or hypervisor masks is not taken.
#if defined(QOPS_HAS_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif
#if defined(QOPS_HAS_AMX)
// Linux gives the tiles' 8 KiB of state to a process that asks for them, in all of its threads. It refuses where a
// thread has a signal stack too small for them; a sandbox may refuse as well.
bool has_amx() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return has_avx512() && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The kernels of AVX-512 but for the products.
const KernelTable* amx_kernels() {
  static const KernelTable table = [] {
    KernelTable kernels = avx512::kKernels;
    kernels.int4_gemm = &amx::int4_gemm;
    kernels.int4_int8_gemm = &amx::int4_int8_gemm;
    kernels.int8_gemm = &amx::int8_gemm;
    kernels.int8_weight_only_gemm = &amx::int8_weight_only_gemm;
    return kernels;
  }();
  return &table;
}
#endif

struct Dispatch {
  const Level* chosen;
  std::string available;
  std::string error;
};

Dispatch choose() {
  // Best first.
  static const Level levels[] = {
#if defined(QOPS_HAS_AMX)
      {"amx", amx_kernels(), has_amx()},
#endif
#if defined(QOPS_HAS_AVX512)
      {"avx512", &avx512::kKernels, has_avx512()},
#endif
#if defined(QOPS_HAS_AVX2)
      {"avx2", &avx2::kKernels, has_avx2()},
#endif
      {"scalar", &scalar::kKernels, true},
  };
  Dispatch result{nullptr, "", ""};
  for (const Level& level : levels) {
    if (!level.runs_here) continue;
    if (result.chosen == nullptr) result.chosen = &level;
    result.available = result.available.empty() ? level.name : level.name + (" " + result.available);
  }
  const char* forced = std::getenv("QOPS_ISA");
  if (forced == nullptr || *forced == '\0') return result;
  for (const Level& level : levels) {
    if (level.runs_here && std::strcmp(level.name, forced) == 0) {
      result.chosen = &level;
      return result;
    }
  }
  result.error = std::string("QOPS_ISA must be one of: ") + result.available + "; got " + forced;
  return result;
}

const Dispatch& dispatch() {
  static const Dispatch result = choose();
  return result;
}

}  // namespace

const char* isa_level() { return dispatch().chosen->name; }
const char* isa_levels_available() { return dispatch().available.c_str(); }
const char* isa_error() { return dispatch().error.empty() ? nullptr : dispatch().error.c_str(); }

#define QOPS_FORWARD(name, Params) \
  Status name(const Params& params, const ThreadPool& pool) { return dispatch().chosen->kernels->name(params, pool); }
QOPS_FOR_EACH_CPU_KERNEL(QOPS_FORWARD)
#undef QOPS_FORWARD

}  // namespace qops::cpu
