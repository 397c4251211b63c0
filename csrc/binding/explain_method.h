// qops.explain() as each module has it.
#pragma once

#include "binding/python.h"

#include <exception>
#include <string>

#include "binding/plan.h"

namespace qops::binding {

inline constexpr const char* kExplainDoc = "explain(op, arguments): the plan of a call; arguments: lines name=value.";

inline PyObject* explain_method(PyObject*, PyObject* arguments) {
  const char *op = nullptr, *lines = nullptr;
  if (!PyArg_ParseTuple(arguments, "ss", &op, &lines)) return nullptr;
  try {
    return PyUnicode_FromString(explain(op, lines).c_str());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace qops::binding
