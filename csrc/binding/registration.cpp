// The operators with their CPU kernels, and the module that Python imports.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "binding/ops.h"
#include "binding/schemas.h"

STABLE_TORCH_LIBRARY(qops, m) { qops::binding::define_schemas(m); }

STABLE_TORCH_LIBRARY_IMPL(qops, CPU, m) {
  m.impl("int4_gemm", TORCH_BOX(&qops::binding::int4_gemm));
  m.impl("int4_gemm.out", TORCH_BOX(&qops::binding::int4_gemm_out));
  m.impl("int4_pack", TORCH_BOX(&qops::binding::int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&qops::binding::int4_unpack));
  m.impl("int8_gemm", TORCH_BOX(&qops::binding::int8_gemm));
  m.impl("int8_gemm.out", TORCH_BOX(&qops::binding::int8_gemm_out));
  m.impl("int8_pack", TORCH_BOX(&qops::binding::int8_pack));
  m.impl("int8_unpack", TORCH_BOX(&qops::binding::int8_unpack));
  m.impl("int8_weight_only_gemm", TORCH_BOX(&qops::binding::int8_weight_only_gemm));
  m.impl("int8_weight_only_gemm.out", TORCH_BOX(&qops::binding::int8_weight_only_gemm_out));
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

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:z}", "version", QOPS_VERSION, "compiler", QOPS_COMPILER,
                       "built_with_torch", QOPS_BUILT_WITH_TORCH, "isa", qops::cpu::isa_level(), "isa_available",
                       qops::cpu::isa_levels_available(), "isa_error", qops::cpu::isa_error());
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with and which ISA level it chose."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
