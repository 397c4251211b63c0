// The operators that have CUDA kernels. Compiled for _C_cuda and, as operators of their own namespace on CPU tensors,
// for the module in which the tests emulate the kernels.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "binding/int4_kernels.h"
#include "binding/int8_kernels.h"
#include "binding/row_kernels.h"
#include "binding/schemas.h"

#if defined(QOPS_EMULATED)

STABLE_TORCH_LIBRARY(qops_emu, m) { qops::binding::define_schemas(m); }
STABLE_TORCH_LIBRARY_IMPL(qops_emu, CPU, m) {
  qops::binding::define_int4_kernels(m);
  qops::binding::define_int8_kernels(m);
  qops::binding::define_row_kernels(m);
}

#else

STABLE_TORCH_LIBRARY_IMPL(qops, CUDA, m) {
  qops::binding::define_int4_kernels(m);
  qops::binding::define_int8_kernels(m);
  qops::binding::define_row_kernels(m);
}

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "archs", QOPS_CUDA_ARCHS, "nvcc", QOPS_CUDA_VERSION, "left_out",
                       QOPS_CUDA_LEFT_OUT);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with, and for which GPUs."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }

#endif
