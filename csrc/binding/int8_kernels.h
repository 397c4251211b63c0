// The operators on 8-bit weights and activations that every device has, each with a layout of its own, and the check of
// that layout: the kernels of one module. Library: what STABLE_TORCH_LIBRARY_IMPL gives, whose type has no public name.
#pragma once

#include "binding/ops.h"

namespace qops::binding {

template <class Library>
void define_int8_kernels(Library& m) {
  m.impl("check_layout", TORCH_BOX(&check_layout));
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm));
  m.impl("int8_gemm.out", TORCH_BOX(&int8_gemm_out));
  m.impl("int8_gemm.fused", TORCH_BOX(&int8_gemm_fused));
  m.impl("int8_gemm.fused_out", TORCH_BOX(&int8_gemm_fused_out));
  m.impl("int8_pack", TORCH_BOX(&int8_pack));
  m.impl("int8_unpack", TORCH_BOX(&int8_unpack));
}

}  // namespace qops::binding
