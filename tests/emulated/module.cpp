// The schemas of the operators, and what Python sees of the module besides: the emulator's options.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "binding/explain_method.h"
#include "binding/schemas.h"
#include "emulator/runtime.h"
#include "gpu_torch.h"

STABLE_TORCH_LIBRARY(qops_emu, m) { qops::binding::define_schemas(m); }

namespace {

// Work of tests goes to a stream, unless they say otherwise: one that goes elsewhere shows in each of them.
constexpr unsigned kStream = 1;

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
  emu::options().stream = kStream;
  Py_RETURN_NONE;
}

// place_tensors(arch, multiprocessors): of all calls from now on, on a GPU that need not be the current one;
// place_tensors(): on the current one again.
PyObject* place_tensors(PyObject*, PyObject* arguments) {
  int arch = 0, multiprocessors = 0;
  if (!PyArg_ParseTuple(arguments, "|ii", &arch, &multiprocessors)) return nullptr;
  if (arch == 0) {
    emulated::place_tensors(-1);
    Py_RETURN_NONE;
  }
  const int current = emu::current_gpu();
  emu::options().arch = arch;
  emu::options().multiprocessors = multiprocessors;
  const int gpu = emu::current_gpu();
  emu::set_current_gpu(current);
  emulated::place_tensors(gpu);
  return PyLong_FromLong(gpu);
}

// place_elsewhere(address): a tensor whose elements begin there is on the next GPU; 0: none is.
PyObject* place_elsewhere(PyObject*, PyObject* address) {
  emulated::place_elsewhere(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred() != nullptr) return nullptr;
  Py_RETURN_NONE;
}

PyObject* current_gpu(PyObject*, PyObject*) { return PyLong_FromLong(emu::current_gpu()); }

// set_runtime(stream, captures=False, refused="", records=False, runs=True): as emu::Options.
PyObject* set_runtime(PyObject*, PyObject* arguments) {
  int stream = 0, captures = 0, records = 0, runs = 1;
  const char* refused = "";
  if (!PyArg_ParseTuple(arguments, "i|pspp", &stream, &captures, &refused, &records, &runs)) return nullptr;
  emu::options().stream = static_cast<unsigned>(stream);
  emu::options().captures = captures != 0;
  emu::options().refused = refused;
  emu::options().records = records != 0;
  emu::options().runs = runs != 0;
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

PyObject* take_calls(PyObject*, PyObject*) { return list_of(emu::take_calls()); }

PyObject* copied_bytes(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(emu::copied_bytes()); }

PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, "configure(seed, policy, left_out, arch=90, multiprocessors=132)"},
    {"place_tensors", place_tensors, METH_VARARGS, "place_tensors([arch, multiprocessors]) -> number of the GPU"},
    {"place_elsewhere", place_elsewhere, METH_O,
     "place_elsewhere(address): the tensor there is on the next GPU; 0: none is"},
    {"explain", qops::binding::explain_method, METH_VARARGS, qops::binding::kExplainDoc},
    {"current_gpu", current_gpu, METH_NOARGS, "Its number."},
    {"set_runtime", set_runtime, METH_VARARGS,
     "set_runtime(stream, captures=False, refused='', records=False, runs=True)"},
    {"take_calls", take_calls, METH_NOARGS, "What CUDA's runtime was asked, in order, while it recorded."},
    {"copied_bytes", copied_bytes, METH_NOARGS, "Bytes that cp.async has read from global memory so far."},
    {"take_trace", take_trace, METH_NOARGS, "Lines of emu::take_trace(), of a build with the tracer."},
    {"races_seen", races_seen, METH_NOARGS, "How many of them are races."},
    {"synchronisations", synchronisations, METH_NOARGS, "Places of synchronisation that launches have come past."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "qops_emulated", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_qops_emulated() { return PyModule_Create(&module); }
