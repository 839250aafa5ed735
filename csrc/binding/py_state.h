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

// The items of n keys, which mostly stand in this order: one way through the dict. False where one is
// missing.
inline bool find_items(PyObject* dict, PyObject* const* keys, int n, PyObject** values) noexcept {
  if (n == 1) return (values[0] = find_item(dict, keys[0])) != nullptr;
  if (dict == nullptr || !PyDict_Check(dict)) return n == 0;
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  int found = 0;
  int next = 0;
  for (int k = 0; k < n; ++k) values[k] = nullptr;
  while (found < n && PyDict_Next(dict, &position, &key, &value)) {
    for (int tried = 0; tried < n; ++tried) {
      const int k = next;
      next = next + 1 == n ? 0 : next + 1;
      if (key != keys[k]) continue;
      values[k] = value;
      ++found;
      break;
    }
  }
  for (int k = 0; k < n && found < n; ++k) {
    if (values[k] != nullptr) continue;
    values[k] = find_item_by_name(dict, keys[k]);
    if (values[k] == nullptr) return false;
    ++found;
  }
  return true;
}

// The tensor at dict[key]; nullptr when there is none. Needs the GIL.
inline const at::Tensor* find_tensor(PyObject* dict, PyObject* key) {
  if (dict == nullptr || !PyDict_Check(dict)) return nullptr;
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value != nullptr && THPVariable_Check(value) ? &THPVariable_Unpack(value) : nullptr;
}

}  // namespace momentum_ext::binding
