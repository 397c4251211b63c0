// The operators with their CPU kernels, and the module that Python imports.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "binding/int4_kernels.h"
#include "binding/int8_kernels.h"
#include "binding/row_kernels.h"
#include "binding/schemas.h"

STABLE_TORCH_LIBRARY(qops, m) { qops::binding::define_schemas(m); }

STABLE_TORCH_LIBRARY_IMPL(qops, CPU, m) {
  m.impl("int8_weight_only_gemm", TORCH_BOX(&qops::binding::int8_weight_only_gemm));
  m.impl("int8_weight_only_gemm.out", TORCH_BOX(&qops::binding::int8_weight_only_gemm_out));
  qops::binding::define_int4_kernels(m);
  qops::binding::define_int8_kernels(m);
  qops::binding::define_row_kernels(m);
}

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s,s:z}", "version", QOPS_VERSION, "compiler", QOPS_COMPILER,
                       "built_with_torch", QOPS_BUILT_WITH_TORCH, "cuda_missing", QOPS_CUDA_MISSING, "isa",
                       qops::cpu::isa_level(), "isa_available", qops::cpu::isa_levels_available(), "isa_error",
                       qops::cpu::isa_error());
}

PyObject* poison_outputs(PyObject*, PyObject* on) {
  qops::binding::poison_outputs(PyObject_IsTrue(on) == 1);
  return Py_BuildValue("");
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with and which ISA level it chose."},
    {"poison_outputs", poison_outputs, METH_O, "For tests: whether new tensors are filled with NaN."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
