// The module with the CUDA kernels, as Python sees it.
#include "binding/python.h"

#include "binding/explain_method.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "archs", QOPS_CUDA_ARCHS, "nvcc", QOPS_CUDA_VERSION, "left_out",
                       QOPS_CUDA_LEFT_OUT);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with, and for which GPUs."},
    {"explain", qops::binding::explain_method, METH_VARARGS, qops::binding::kExplainDoc},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
