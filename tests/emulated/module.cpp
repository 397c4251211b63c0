// What Python sees of the module besides its operators: the emulator's options.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <string>
#include <vector>

#include "binding/checks.h"
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

PyObject* list_of(const std::vector<std::string>& texts) {
  PyObject* list = PyList_New(0);
  for (const std::string& text : texts) {
    PyObject* item = PyUnicode_FromString(text.c_str());
    PyList_Append(list, item);
    Py_DECREF(item);
  }
  return list;
}

PyObject* synchronisations(PyObject*, PyObject*) {
  std::vector<std::string> places;
  for (const emu::Synchronisation& found : emu::synchronisations()) places.push_back(emu::to_text(found.at));
  return list_of(places);
}

PyObject* take_trace(PyObject*, PyObject*) {
  if constexpr (emu::kTraced) return list_of(emu::take_trace());
  return PyList_New(0);
}

PyObject* races_seen(PyObject*, PyObject*) {
  if constexpr (emu::kTraced) return PyLong_FromSize_t(emu::races_seen());
  return PyLong_FromLong(0);
}

PyObject* poison_outputs(PyObject*, PyObject* on) {
  qops::binding::poison_outputs(PyObject_IsTrue(on) == 1);
  return Py_BuildValue("");
}

PyObject* copied_bytes(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(emu::copied_bytes()); }

PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, "configure(seed, policy, left_out, arch=90, multiprocessors=132)"},
    {"poison_outputs", poison_outputs, METH_O, "As that of qops._C, for this module's own bindings."},
    {"copied_bytes", copied_bytes, METH_NOARGS, "Bytes that cp.async has read from global memory so far."},
    {"take_trace", take_trace, METH_NOARGS, "Lines of emu::take_trace(), of a build with the tracer."},
    {"races_seen", races_seen, METH_NOARGS, "How many of them are races."},
    {"synchronisations", synchronisations, METH_NOARGS, "Places of synchronisation that launches have come past."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "qops_emulated", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_qops_emulated() { return PyModule_Create(&module); }
