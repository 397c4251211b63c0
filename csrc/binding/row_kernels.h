// The operators on rows, which every device has: the kernels of one module. Library: what STABLE_TORCH_LIBRARY_IMPL
// gives, whose type has no public name.
#pragma once

#include "binding/ops.h"

namespace qops::binding {

template <class Library>
void define_row_kernels(Library& m) {
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("quantize_int8.out", TORCH_BOX(&quantize_int8_out));
  m.impl("quantize_int8_asym", TORCH_BOX(&quantize_int8_asym));
  m.impl("quantize_int8_asym.out", TORCH_BOX(&quantize_int8_asym_out));
  m.impl("quantize_int8_static", TORCH_BOX(&quantize_int8_static));
  m.impl("quantize_int8_static.out", TORCH_BOX(&quantize_int8_static_out));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&rms_norm_out));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm.out", TORCH_BOX(&add_rms_norm_out));
  m.impl("rms_norm_int8", TORCH_BOX(&rms_norm_int8));
  m.impl("rms_norm_int8.out", TORCH_BOX(&rms_norm_int8_out));
  m.impl("add_rms_norm_int8", TORCH_BOX(&add_rms_norm_int8));
  m.impl("add_rms_norm_int8.out", TORCH_BOX(&add_rms_norm_int8_out));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_", TORCH_BOX(&rotary_));
  m.impl("qk_norm_rotary", TORCH_BOX(&qk_norm_rotary));
  m.impl("qk_norm_rotary_", TORCH_BOX(&qk_norm_rotary_));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul.gate_up", TORCH_BOX(&silu_mul_gate_up));
  m.impl("silu_mul.out", TORCH_BOX(&silu_mul_out));
  m.impl("silu_mul.gate_up_out", TORCH_BOX(&silu_mul_gate_up_out));
  m.impl("silu_mul_int8", TORCH_BOX(&silu_mul_int8));
  m.impl("silu_mul_int8.gate_up", TORCH_BOX(&silu_mul_int8_gate_up));
  m.impl("silu_mul_int8.out", TORCH_BOX(&silu_mul_int8_out));
  m.impl("silu_mul_int8.gate_up_out", TORCH_BOX(&silu_mul_int8_gate_up_out));
}

}  // namespace qops::binding
