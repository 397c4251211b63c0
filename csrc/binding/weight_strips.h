// Sizes of packed 4-bit weights on the device of these bindings.
#pragma once

#include "binding/device.h"
#include "int4_layout.h"

namespace qops::binding {

#if defined(QOPS_CUDA)
inline constexpr bool kGpuLayout = true;
#else
inline constexpr bool kGpuLayout = false;
#endif

inline int64_t strips_of(int64_t n) { return int4::strips(n); }

// Columns that a strip holds for K of them.
constexpr int64_t stored_columns(int64_t k) { return kGpuLayout ? int4::blocks(k) * int4::kBlockColumns : k; }

// GPU kernels read 16 bytes at a time; whole strips of a packed weight always begin so.
inline void check_alignment(const Checker& check, const Tensor& packed, const char* arg) {
  if (!kGpuLayout) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  if (address % int4::kLaneBytes != 0) {
    check.refuse(arg, "begin at a multiple of 16 bytes", "an address " + std::to_string(address % 16) + " past one");
  }
}

}  // namespace qops::binding
