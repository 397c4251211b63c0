// The operators on 4-bit weights, which every device has, each with a layout of its own: the kernels of one module.
// Library: what STABLE_TORCH_LIBRARY_IMPL gives, whose type has no public name.
#pragma once

#include "binding/ops.h"

namespace qops::binding {

template <class Library>
void define_int4_kernels(Library& m) {
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
  m.impl("int4_gemm", TORCH_BOX(&int4_gemm));
  m.impl("int4_gemm.out", TORCH_BOX(&int4_gemm_out));
  m.impl("int4_gemm.fused", TORCH_BOX(&int4_gemm_fused));
  m.impl("int4_gemm.fused_out", TORCH_BOX(&int4_gemm_fused_out));
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
}

}  // namespace qops::binding
