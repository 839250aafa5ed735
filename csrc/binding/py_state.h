// A parameter's state, opt.state[p]: the keys that are no rule's, and how its tensors are read. It is a dict that anyone
// may have edited.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

namespace momentum_ext::binding {

namespace py = pybind11;

// Interned, so that a key is mostly found by its address.
struct StateKeys {
  PyObject* average = PyUnicode_InternFromString("ema");
  PyObject* remainder = PyUnicode_InternFromString("param_remainder");
  PyObject* master = PyUnicode_InternFromString("master_param");
};
inline const StateKeys& state_keys() {
  static const StateKeys keys;
  return keys;
}

// The key of a loaded state need not be the interned string.
[[gnu::noinline, gnu::cold]] inline PyObject* find_item_by_name(PyObject* dict,
                                                                PyObject* interned_key) noexcept {
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  const char* const name = PyUnicode_AsUTF8(interned_key);  // ASCII: a pointer into the string
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (PyUnicode_Check(key) && !PyUnicode_CHECK_INTERNED(key) &&
        PyUnicode_CompareWithASCIIString(key, name) == 0) {
      return value;
    }
  }
  return nullptr;
}

// An item of a dict; nullptr when there is none. PyDict_Next is faster than a lookup where a dict
// has few items.
inline PyObject* find_item(PyObject* dict, PyObject* interned_key) noexcept {
  if (dict == nullptr || !PyDict_Check(dict)) return nullptr;
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (key == interned_key) return value;
  }
  return find_item_by_name(dict, interned_key);
}

// The tensor at dict[key]; nullptr when there is none. Needs the GIL.
inline const at::Tensor* find_tensor(PyObject* dict, PyObject* key) {
  if (dict == nullptr || !PyDict_Check(dict)) return nullptr;
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value != nullptr && THPVariable_Check(value) ? &THPVariable_Unpack(value) : nullptr;
}

}  // namespace momentum_ext::binding
