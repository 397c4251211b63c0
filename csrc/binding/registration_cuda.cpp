// The operators that have CUDA kernels. Compiled for _C_cuda and, as operators of their own namespace on CPU tensors,
// for the module in which the tests emulate the kernels.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "binding/ops.h"
#include "binding/schemas.h"

#if defined(QOPS_EMULATED)
STABLE_TORCH_LIBRARY(qops_emu, m) { qops::binding::define_schemas(m); }
STABLE_TORCH_LIBRARY_IMPL(qops_emu, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(qops, CUDA, m) {
#endif
  m.impl("quantize_int8", TORCH_BOX(&qops::binding::quantize_int8));
  m.impl("quantize_int8.out", TORCH_BOX(&qops::binding::quantize_int8_out));
  m.impl("quantize_int8_asym", TORCH_BOX(&qops::binding::quantize_int8_asym));
  m.impl("quantize_int8_asym.out", TORCH_BOX(&qops::binding::quantize_int8_asym_out));
  m.impl("quantize_int8_static", TORCH_BOX(&qops::binding::quantize_int8_static));
  m.impl("quantize_int8_static.out", TORCH_BOX(&qops::binding::quantize_int8_static_out));
  m.impl("rms_norm", TORCH_BOX(&qops::binding::rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&qops::binding::rms_norm_out));
  m.impl("add_rms_norm", TORCH_BOX(&qops::binding::add_rms_norm));
  m.impl("add_rms_norm.out", TORCH_BOX(&qops::binding::add_rms_norm_out));
  m.impl("rms_norm_int8", TORCH_BOX(&qops::binding::rms_norm_int8));
  m.impl("rms_norm_int8.out", TORCH_BOX(&qops::binding::rms_norm_int8_out));
  m.impl("add_rms_norm_int8", TORCH_BOX(&qops::binding::add_rms_norm_int8));
  m.impl("add_rms_norm_int8.out", TORCH_BOX(&qops::binding::add_rms_norm_int8_out));
  m.impl("rotary", TORCH_BOX(&qops::binding::rotary));
  m.impl("rotary_", TORCH_BOX(&qops::binding::rotary_));
  m.impl("qk_norm_rotary", TORCH_BOX(&qops::binding::qk_norm_rotary));
  m.impl("qk_norm_rotary_", TORCH_BOX(&qops::binding::qk_norm_rotary_));
  m.impl("silu_mul", TORCH_BOX(&qops::binding::silu_mul));
  m.impl("silu_mul.gate_up", TORCH_BOX(&qops::binding::silu_mul_gate_up));
  m.impl("silu_mul.out", TORCH_BOX(&qops::binding::silu_mul_out));
  m.impl("silu_mul.gate_up_out", TORCH_BOX(&qops::binding::silu_mul_gate_up_out));
  m.impl("silu_mul_int8", TORCH_BOX(&qops::binding::silu_mul_int8));
  m.impl("silu_mul_int8.gate_up", TORCH_BOX(&qops::binding::silu_mul_int8_gate_up));
  m.impl("silu_mul_int8.out", TORCH_BOX(&qops::binding::silu_mul_int8_out));
  m.impl("silu_mul_int8.gate_up_out", TORCH_BOX(&qops::binding::silu_mul_int8_gate_up_out));
}

#if !defined(QOPS_EMULATED)
namespace {

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
#endif
