#include "group_reader.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "layout.h"

namespace momentum_ext::binding {
namespace {

enum Key {
  kParams,
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kNesterov,
  kMaximize,
  kDecoupledWeightDecay,
  kFormulation,
  kBufferFormulation,
  kMomentumDtype,
  kMasterWeights,
  kStochasticRounding,
  kRoundingSeed,
  kNumKeys
};
constexpr const char* kNames[kNumKeys] = {"params",
                                          "lr",
                                          "momentum",
                                          "dampening",
                                          "weight_decay",
                                          "nesterov",
                                          "maximize",
                                          "decoupled_weight_decay",
                                          "formulation",
                                          "buffer_formulation",
                                          "momentum_dtype",
                                          "master_weights",
                                          "stochastic_rounding",
                                          "rounding_seed"};

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

// nullptr when the key is missing.
PyObject* find(PyObject* group, Key key) {
  PyObject* value = PyDict_GetItemWithError(group, interned(key));
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

PyObject* get(PyObject* group, size_t index, Key key) {
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

// False when the key is missing.
bool find_bool(PyObject* group, Key key) {
  PyObject* const value = find(group, key);
  return value != nullptr && as_bool(value);
}

bool is_immutable(PyObject* value) {
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value) || THPDtype_Check(value) || value == Py_None;
}

uint64_t read_rounding_seed(PyObject* group, size_t index) {
  PyObject* const seed = find(group, kRoundingSeed);
  if (seed == nullptr) return 0;
  if (!PyLong_Check(seed)) {
    throw py::type_error(where(index, kRoundingSeed) + ": expected an int, got " +
                         std::string(py::repr(seed)));
  }
  return PyLong_AsUnsignedLongLongMask(seed);
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

// Groups without low-precision state have none of these keys.
Storage read_storage(PyObject* group, size_t index) {
  Storage storage;
  PyObject* const dtype = find(group, kMomentumDtype);
  if (dtype != nullptr && dtype != Py_None) {
    constexpr std::pair<const char*, at::ScalarType> kDtypes[] = {
        {"float32", at::kFloat}, {"bfloat16", at::kBFloat16},           {"float16", at::kHalf},
        {"int8", at::kChar},     {"float8_e4m3fn", at::kFloat8_e4m3fn},
    };
    for (const auto& [name, type] : kDtypes) {  // checkpoints have names, an edit may have either
      const bool is_it =
          THPDtype_Check(dtype)
              ? reinterpret_cast<THPDtype*>(dtype)->scalar_type == type
              : PyUnicode_Check(dtype) && PyUnicode_CompareWithASCIIString(dtype, name) == 0;
      if (is_it) storage.momentum_dtype = type;
    }
    if (!storage.momentum_dtype.has_value()) {
      throw py::value_error(where(index, kMomentumDtype) +
                            ": expected None or float32, bfloat16, float16, int8 or float8_e4m3fn, "
                            "as a torch.dtype or its name, got " +
                            std::string(py::repr(dtype)));
    }
  }
  storage.master_weights = find_bool(group, kMasterWeights);
  storage.stochastic_rounding = find_bool(group, kStochasticRounding);
  return storage;
}

// Groups that torch.optim.SGD has made have no such key.
Formulation read_formulation(PyObject* group, size_t index, Key key) {
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
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(get(group, index, kLr)));
  if (!number) throw py::error_already_set();
  return PyFloat_AS_DOUBLE(number.ptr());
}

void GroupReader::scale(double grad_factor, Hyperparams<Sgd>& hyperparams) const {
  hyperparams.f64.grad_coef = maximize_ ? -grad_factor : grad_factor;
  round_to_float(hyperparams);
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
    }
  }
  return i == items_.size() ? params : nullptr;
}

PyObject* GroupReader::parse(PyObject* group, size_t index, Hyperparams<Sgd>& hyperparams) {
  PyObject* const params = get(group, index, kParams);
  immutable_ = false;
  needs_torch_ = false;
  const auto number = [&](Key key, bool may_be_tensor, bool any_shape,
                          DeviceNumber* on_device = nullptr) {
    PyObject* const value = get(group, index, key);
    if (on_device != nullptr) {
      if (const auto found = as_device_number(value, params, any_shape)) {
        *on_device = *found;
        return 1.0;  // stands for what the host does not know
      }
    }
    const std::optional<double> found = as_number(value, may_be_tensor, any_shape);
    needs_torch_ = needs_torch_ || !found.has_value();
    return found.value_or(1.0);
  };
  formulation_ = read_formulation(group, index, kFormulation);
  buffer_formulation_ = read_buffer_formulation(group, index);
  const bool decoupled = find_bool(group, kDecoupledWeightDecay);
  Hyperparams<Sgd> h;
  // The kernels read torch's numbers by themselves; others are made of several, on the host.
  const bool as_torch = formulation_ == Formulation::kTorch && !decoupled;
  const auto device = [&](DeviceNumber& slot) { return as_torch ? &slot : nullptr; };
  const double lr = number(kLr, true, true, device(h.on_device.lr));
  lr_is_zero_ = lr == 0;
  const double momentum = number(kMomentum, false, false, device(h.on_device.momentum));
  const double dampening = number(kDampening, false, false);
  const double weight_decay = number(kWeightDecay, true, false, device(h.on_device.weight_decay));
  if (formulation_ != Formulation::kTorch && dampening != 0 && !needs_torch_) {
    throw py::value_error(where(index, kDampening) + ": formulation '" + to_string(formulation_) +
                          "' has no dampening, got " + std::to_string(dampening) +
                          "; set it to 0 or use formulation 'torch'");
  }
  h.nesterov = as_bool(get(group, index, kNesterov));
  maximize_ = as_bool(get(group, index, kMaximize));
  h.has_momentum = momentum != 0;
  h.f64.momentum = momentum;
  choose_coefficients(formulation_, lr, dampening, h.f64);
  h.f64.weight_decay = weight_decay;
  if (weight_decay == 0) {
    h.weight_decay = WeightDecay::kNone;
  } else if (decoupled) {
    h.weight_decay = WeightDecay::kDecoupled;
    h.f64.weight_decay = 1 - lr * weight_decay;
  } else {
    h.weight_decay = WeightDecay::kL2;
  }
  storage_ = read_storage(group, index);
  h.stochastic_rounding = storage_.stochastic_rounding;
  h.rounding_seed = read_rounding_seed(group, index);
  hyperparams = h;

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
      immutable_ = immutable_ && is_immutable(value);
    }
    items_.push_back(std::move(item));
  }
  return params;
}

}  // namespace momentum_ext::binding
