#include "group_reader.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

namespace momentum_ext::binding {
namespace {

enum Key { kParams, kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize, kNumKeys };
constexpr const char* kNames[kNumKeys] = {"params",       "lr",       "momentum", "dampening",
                                          "weight_decay", "nesterov", "maximize"};

PyObject* interned(Key key) {
  static PyObject* const* const strings = [] {
    static PyObject* made[kNumKeys];
    for (int i = 0; i < kNumKeys; ++i) made[i] = PyUnicode_InternFromString(kNames[i]);
    return made;
  }();
  return strings[key];
}

std::string where(size_t group, Key key) {
  return "param_groups[" + std::to_string(group) + "]['" + kNames[key] + "']";
}

PyObject* get(PyObject* group, size_t index, Key key) {
  PyObject* value = PyDict_GetItemWithError(group, interned(key));
  if (value == nullptr) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    throw py::key_error(where(index, key) + " is missing; every group needs it");
  }
  return value;
}

// A number, or a tensor of one element.
double as_number(PyObject* value, size_t index, Key key, bool* requires_grad) {
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.numel() != 1) {
      throw py::value_error(where(index, key) +
                            ": expected a number or a tensor of one element, got " +
                            std::to_string(tensor.numel()) + " elements");
    }
    if (tensor.requires_grad()) {
      *requires_grad = true;
      return 1.0;  // torch reads it
    }
    return tensor.item().toDouble();
  }
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::type_error(where(index, key) +
                         ": expected a number or a tensor of one element, got " +
                         Py_TYPE(value)->tp_name);
  }
  return number;
}

bool as_bool(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

bool is_immutable_number(PyObject* value) {
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value);
}

// Which of ours a dict's key is; kNumKeys when it is none. Keys of a loaded state_dict need not be
// interned.
Key identify(PyObject* key) {
  for (int i = 0; i < kNumKeys; ++i) {
    if (key == interned(static_cast<Key>(i))) return static_cast<Key>(i);
  }
  if (!PyUnicode_Check(key) || PyUnicode_CHECK_INTERNED(key)) return kNumKeys;
  for (int i = 0; i < kNumKeys; ++i) {
    if (PyUnicode_CompareWithASCIIString(key, kNames[i]) == 0) return static_cast<Key>(i);
  }
  return kNumKeys;
}

}  // namespace

PyObject* GroupReader::read(PyObject* group, size_t index, double inv_grad_scale,
                            Hyperparams& hyperparams) {
  PyObject* params = immutable_ ? compare(group) : nullptr;
  const bool unchanged = params != nullptr;
  if (!unchanged) params = parse(group, index, hyperparams);
  if (!unchanged || inv_grad_scale != inv_grad_scale_) {
    inv_grad_scale_ = inv_grad_scale;
    hyperparams.f64.grad_coef = maximize_ ? -inv_grad_scale : inv_grad_scale;
    round_to_float(hyperparams);
  }
  return params;
}

// The "params" of a dict whose keys and numbers are those that were read last; nullptr when
// anything differs.
PyObject* GroupReader::compare(PyObject* group) const {
  PyObject* params = nullptr;
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(group, &position, &key, &value); ++i) {
    if (i == items_.size() || key != items_[i].key.ptr()) return nullptr;
    const Item& item = items_[i];
    if (item.is_params) {
      params = value;
    } else if (item.value && value != item.value.ptr()) {
      return nullptr;
    }
  }
  return i == items_.size() ? params : nullptr;
}

PyObject* GroupReader::parse(PyObject* group, size_t index, Hyperparams& hyperparams) {
  PyObject* const params = get(group, index, kParams);
  immutable_ = false;
  bool requires_grad = false;
  const auto number = [&](Key key) {
    return as_number(get(group, index, key), index, key, &requires_grad);
  };
  const double lr = number(kLr);
  const double momentum = number(kMomentum);
  const double dampening = number(kDampening);
  const double weight_decay = number(kWeightDecay);
  Hyperparams h;
  h.nesterov = as_bool(get(group, index, kNesterov));
  maximize_ = as_bool(get(group, index, kMaximize));
  h.has_momentum = momentum != 0;
  h.weight_decay = weight_decay != 0 ? WeightDecay::kL2 : WeightDecay::kNone;
  h.f64 = {/*grad_coef=*/1.0,
           weight_decay,
           momentum,
           /*alpha=*/1 - dampening,
           /*first_alpha=*/1.0,
           /*nesterov_alpha=*/1.0,
           /*step=*/lr};
  hyperparams = h;
  needs_torch_ = requires_grad;

  items_.clear();
  immutable_ = true;
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  while (PyDict_Next(group, &position, &key, &value)) {
    const Key which = identify(key);
    Item item{py::reinterpret_borrow<py::object>(key), py::object(), which == kParams};
    if (which != kParams && which != kNumKeys) {
      item.value = py::reinterpret_borrow<py::object>(value);
      immutable_ = immutable_ && is_immutable_number(value);
    }
    items_.push_back(std::move(item));
  }
  return params;
}

}  // namespace momentum_ext::binding
