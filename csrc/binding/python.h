// What a module has of Python. A program without Python loads it for its operators alone (exported models): there, the
// loader leaves weak names open, which nobody uses.
#pragma once

#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#pragma weak PyArg_ParseTuple
#pragma weak PyErr_SetString
#pragma weak PyExc_RuntimeError
#pragma weak PyExc_ValueError
#pragma weak PyModule_Create2
#pragma weak PyObject_IsTrue
#pragma weak PyUnicode_FromString
#pragma weak Py_BuildValue
