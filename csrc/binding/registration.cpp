// The schemas of the operators, and the module that Python imports. Each binding registers its own functions.
#include "binding/python.h"  // before all others

#include "binding/checks.h"
#include "binding/explain_method.h"
#include "binding/schemas.h"

STABLE_TORCH_LIBRARY(qops, m) { qops::binding::define_schemas(m); }

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s,s:z,s:z}", "version", QOPS_VERSION, "compiler", QOPS_COMPILER,
                       "built_with_torch", QOPS_BUILT_WITH_TORCH, "cuda_missing", QOPS_CUDA_MISSING, "isa",
                       qops::cpu::isa_level(), "isa_available", qops::cpu::isa_levels_available(), "isa_error",
                       qops::cpu::isa_error(), "log_error", qops::binding::log_error());
}

PyObject* poison_outputs(PyObject*, PyObject* on) {
  qops::binding::poison_outputs(PyObject_IsTrue(on) == 1);
  return Py_BuildValue("");
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with and which ISA level it chose."},
    {"explain", qops::binding::explain_method, METH_VARARGS, qops::binding::kExplainDoc},
    {"poison_outputs", poison_outputs, METH_O, "For tests: whether new tensors are filled with NaN."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
