// One table of kernels per ISA level. QOPS_ISA_NS is the level's namespace; CMake sets it per object library.
#pragma once

#include "kernels.h"

namespace qops::cpu {

struct KernelTable {
#define QOPS_POINTER(name, Params) Status (*name)(const Params&, const ThreadPool&);
  QOPS_FOR_EACH_CPU_KERNEL(QOPS_POINTER)
#undef QOPS_POINTER
};

#define QOPS_DECLARE_LEVEL(level)               \
  namespace level {                             \
  extern const KernelTable kKernels;            \
  QOPS_FOR_EACH_CPU_KERNEL(QOPS_DECLARE_KERNEL) \
  }
#define QOPS_DECLARE_KERNEL(name, Params) Status name(const Params& params, const ThreadPool& pool);
QOPS_DECLARE_LEVEL(scalar)
QOPS_DECLARE_LEVEL(avx2)
QOPS_DECLARE_LEVEL(avx512)
QOPS_DECLARE_LEVEL(amx)
#undef QOPS_DECLARE_KERNEL
#undef QOPS_DECLARE_LEVEL

}  // namespace qops::cpu
