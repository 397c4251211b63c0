// What Python sees of the module besides its operators: the emulator's options.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <string>

#include "emulator/emu.h"

namespace {

// configure(seed, policy, left_out, arch=90, multiprocessors=132): of all launches from now on.
PyObject* configure(PyObject*, PyObject* arguments) {
  unsigned long long seed = 0;
  int policy = 0;
  const char* left_out = nullptr;
  int arch = emu::Options().arch, multiprocessors = emu::Options().multiprocessors;
  if (!PyArg_ParseTuple(arguments, "Kis|ii", &seed, &policy, &left_out, &arch, &multiprocessors)) return nullptr;
  emu::options().seed = seed;
  emu::options().policy = static_cast<emu::Policy>(policy);
  emu::options().left_out = left_out;
  emu::options().arch = arch;
  emu::options().multiprocessors = multiprocessors;
  Py_RETURN_NONE;
}

PyObject* synchronisations(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const emu::Synchronisation& found : emu::synchronisations()) {
    PyObject* text = PyUnicode_FromString(emu::to_text(found.at).c_str());
    PyList_Append(list, text);
    Py_DECREF(text);
  }
  return list;
}

PyObject* copied_bytes(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(emu::copied_bytes()); }

PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, "configure(seed, policy, left_out, arch=90, multiprocessors=132)"},
    {"copied_bytes", copied_bytes, METH_NOARGS, "Bytes that cp.async has read from global memory so far."},
    {"synchronisations", synchronisations, METH_NOARGS, "Places of synchronisation that launches have come past."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "qops_emulated", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_qops_emulated() { return PyModule_Create(&module); }
