#include "group_reader.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>

#include "device.h"
#include "layout.h"

namespace momentum_ext::binding {
namespace {

constexpr const char* kParams = "params";
constexpr const char* kFormulation = "formulation";
constexpr const char* kBufferFormulation = "buffer_formulation";

// Of a string literal. Keys of a loaded state_dict need not be interned.
PyObject* interned(const char* name) {
  static std::unordered_map<const char*, PyObject*> strings;
  PyObject*& string = strings[name];
  if (string == nullptr) string = PyUnicode_InternFromString(name);
  return string;
}

std::string where(size_t group, const char* key) {
  return "param_groups[" + std::to_string(group) + "]['" + key + "']";
}

// nullptr when the key is missing.
PyObject* find(PyObject* group, const char* key) {
  PyObject* value = PyDict_GetItemWithError(group, interned(key));
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

PyObject* get(PyObject* group, size_t index, const char* key) {
  PyObject* value = find(group, key);
  if (value == nullptr) {
    throw py::key_error(where(index, key) + " is missing; every group needs it");
  }
  return value;
}

// The values that the kernels take: a Python float or int, and where torch reads a tensor's value
// as it is (lr, weight_decay) a floating-point tensor of one element. std::nullopt for anything
// else, from a bool to a tensor that requires grad: torch gives it its meaning or its error.
std::optional<double> as_number(PyObject* value, bool may_be_tensor, bool any_shape) {
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (PyLong_CheckExact(value)) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) return std::nullopt;  // torch has no number for it either, and says so
    return static_cast<double>(number);
  }
  if (!may_be_tensor || !THPVariable_Check(value)) return std::nullopt;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  const bool readable = (is_plain_cpu(tensor) || tensor.is_cuda()) && !tensor.requires_grad() &&
                        !tensor.is_complex() && kernel_dtype(tensor.scalar_type()).has_value();
  if (!readable || tensor.numel() != 1 || (tensor.dim() != 0 && !any_shape)) return std::nullopt;
  return tensor.item().toDouble();
}

// A number that the kernels read from the device's memory when they run, so that nobody waits for
// it and a captured graph sees it change: a CUDA tensor of one element beside parameters that are
// all on its device. std::nullopt for anything else.
std::optional<DeviceNumber> as_device_number(PyObject* value, PyObject* params, bool any_shape) {
  if (!THPVariable_Check(value)) return std::nullopt;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  if (!tensor.is_cuda() || tensor.requires_grad() || tensor.numel() != 1 || tensor.is_complex() ||
      (tensor.dim() != 0 && !any_shape) || !kernel_dtype(tensor.scalar_type()) ||
      kernel_device(tensor) != tensor.device().index() || !PyList_Check(params)) {
    return std::nullopt;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    PyObject* const param = PyList_GET_ITEM(params, i);
    if (!THPVariable_Check(param) || THPVariable_Unpack(param).device() != tensor.device()) {
      return std::nullopt;
    }
  }
  return DeviceNumber{tensor.const_data_ptr(), *kernel_dtype(tensor.scalar_type())};
}

bool as_bool(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

bool is_immutable(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!is_immutable(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value) || THPDtype_Check(value) || value == Py_None;
}

// A dict of what cannot change in place.
bool is_dict_of_immutables(PyObject* value) {
  if (!PyDict_CheckExact(value)) return false;
  PyObject* key;
  PyObject* each;
  Py_ssize_t position = 0;
  while (PyDict_Next(value, &position, &key, &each)) {
    if (!is_immutable(key) || !is_immutable(each)) return false;
  }
  return true;
}

// The same objects in the same order.
bool has_same_items(PyObject* dict, PyObject* other) noexcept {
  if (PyDict_GET_SIZE(dict) != PyDict_GET_SIZE(other)) return false;
  PyObject *key, *value, *other_key, *other_value;
  Py_ssize_t position = 0;
  Py_ssize_t other_position = 0;
  while (PyDict_Next(dict, &position, &key, &value) &&
         PyDict_Next(other, &other_position, &other_key, &other_value)) {
    if (key != other_key || value != other_value) return false;
  }
  return true;
}

// Groups that torch.optim.SGD has made have no such key.
Formulation read_formulation(PyObject* group, size_t index, const char* key) {
  PyObject* const value = find(group, key);
  if (value == nullptr) return Formulation::kTorch;
  const char* const name = PyUnicode_Check(value) ? PyUnicode_AsUTF8(value) : nullptr;
  PyErr_Clear();  // of a string that has no UTF-8
  const std::optional<Formulation> found = name == nullptr ? std::nullopt : formulation_named(name);
  if (!found.has_value()) {
    throw py::value_error(where(index, key) + ": expected 'torch', 'classical' or 'ema', got " +
                          std::string(py::repr(value)));
  }
  return *found;
}

}  // namespace

HyperparamReader::HyperparamReader(PyObject* group, size_t index, Formulation formulation)
    : group_(group),
      index_(index),
      formulation_(formulation),
      params_(momentum_ext::binding::get(group, index, kParams)),
      keys_{interned(kFormulation), interned(kBufferFormulation)} {}

std::string HyperparamReader::where(const char* name) const {
  return momentum_ext::binding::where(index_, name);
}

PyObject* HyperparamReader::object(const char* name) {
  keys_.push_back(interned(name));
  return find(group_, name);
}

PyObject* HyperparamReader::get(const char* name) {
  keys_.push_back(interned(name));
  return momentum_ext::binding::get(group_, index_, name);
}

void HyperparamReader::number(const char* name, double& value, MayBe may_be,
                              DeviceNumber* on_device, bool* is_float) {
  PyObject* const object = get(name);
  const bool any_shape = may_be == kOneElementTensor;
  const std::optional<DeviceNumber> found_on_device =
      on_device != nullptr ? as_device_number(object, params_, any_shape) : std::nullopt;
  value = 1;  // stands for what the host does not know
  if (found_on_device.has_value()) {
    *on_device = *found_on_device;
    return;
  }
  const std::optional<double> found = as_number(object, may_be != kNumber, any_shape);
  if (!found.has_value()) {
    needs_torch_ = true;
    return;
  }
  value = *found;
  if (is_float != nullptr && THPVariable_Check(object)) {
    const at::ScalarType dtype = THPVariable_Unpack(object).scalar_type();
    *is_float = dtype == at::kFloat;
    if (dtype != at::kFloat && dtype != at::kDouble) needs_torch_ = true;
  }
  if (name == std::string_view("lr")) lr_is_zero_ = value == 0;
}

bool HyperparamReader::is_on_device() const {
  if (!kHasCudaKernels || !PyList_Check(params_)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params_); ++i) {
    PyObject* const param = PyList_GET_ITEM(params_, i);
    if (!THPVariable_Check(param) || !THPVariable_Unpack(param).is_cuda()) return false;
  }
  return true;
}

void HyperparamReader::pair(const char* name, double& first, double& second) {
  PyObject* const object = get(name);
  const bool is_pair =
      (PyTuple_Check(object) || PyList_Check(object)) && PySequence_Fast_GET_SIZE(object) == 2;
  if (!is_pair) refuse(name, "expected a pair of numbers, got " + std::string(py::repr(object)));
  double* const values[] = {&first, &second};
  for (int k = 0; k < 2; ++k) {
    const std::optional<double> found =
        as_number(PySequence_Fast_GET_ITEM(object, k), false, false);
    if (!found.has_value()) needs_torch_ = true;
    *values[k] = found.value_or(0);
  }
}

void HyperparamReader::flag(const char* name, bool& value) { value = as_bool(get(name)); }

void HyperparamReader::optional_flag(const char* name, bool& value) {
  PyObject* const found = object(name);
  value = found != nullptr && as_bool(found);
}

void HyperparamReader::refuse(const char* name, const std::string& why) const {
  throw py::value_error(where(name) + ": " + why);
}

void HyperparamReader::refuse_with_formulation(const char* name, double value) const {
  refuse(name, std::string("formulation '") + to_string(formulation_) + "' has no " + name +
                   ", got " + std::to_string(value) + "; set it to 0 or use formulation 'torch'");
}

void GroupReader::note_converted(PyObject* group) {
  buffer_formulation_ = formulation_;
  immutable_ = false;  // the dict has changed
  PyObject* const key = interned(kBufferFormulation);
  if (formulation_ == Formulation::kTorch) {
    if (PyDict_Contains(group, key) == 1) PyDict_DelItem(group, key);
    return;
  }
  const py::str name(to_string(formulation_));
  if (PyDict_SetItem(group, key, name.ptr()) != 0) throw py::error_already_set();
}

Formulation read_buffer_formulation(PyObject* group, size_t index) {
  return read_formulation(group, index, kBufferFormulation);
}

double read_lr(PyObject* group, size_t index) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(get(group, index, "lr")));
  if (!number) throw py::error_already_set();
  return PyFloat_AS_DOUBLE(number.ptr());
}

PyObject* GroupReader::compare(PyObject* group) const noexcept {
  if (!immutable_) return nullptr;
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
    } else if (item.copy && !has_same_items(value, item.copy.ptr())) {
      return nullptr;
    }
  }
  return i == items_.size() ? params : nullptr;
}

PyObject* GroupReader::parse(PyObject* group, size_t index, StateNames states,
                             const std::function<void(HyperparamReader&)>& read) {
  immutable_ = false;
  needs_torch_ = false;
  formulation_ = read_formulation(group, index, kFormulation);
  buffer_formulation_ = read_buffer_formulation(group, index);
  HyperparamReader reader(group, index, formulation_);
  storage_ = read_storage(reader, states);
  read(reader);
  needs_torch_ = reader.needs_torch_;
  lr_is_zero_ = reader.lr_is_zero_;
  keep_items(group, reader.keys_);
  return reader.params_;
}

void GroupReader::keep_items(PyObject* group, const std::vector<PyObject*>& read_keys) {
  const auto is_read = [&](PyObject* key) {
    return std::any_of(read_keys.begin(), read_keys.end(), [key](PyObject* each) {
      return key == each || (!PyUnicode_CHECK_INTERNED(key) && PyUnicode_Compare(key, each) == 0);
    });
  };
  items_.clear();
  immutable_ = true;
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  while (PyDict_Next(group, &position, &key, &value)) {
    const bool is_string = PyUnicode_Check(key);
    const bool is_params = is_string && (key == interned(kParams) ||
                                         PyUnicode_CompareWithASCIIString(key, kParams) == 0);
    Item item{py::reinterpret_borrow<py::object>(key), py::object(), is_params};
    if (is_string && is_read(key)) {
      item.value = py::reinterpret_borrow<py::object>(value);
      if (is_dict_of_immutables(value)) {
        item.copy = py::reinterpret_steal<py::object>(PyDict_Copy(value));
      } else {
        immutable_ = immutable_ && is_immutable(value);
      }
    }
    items_.push_back(std::move(item));
  }
}

}  // namespace momentum_ext::binding
