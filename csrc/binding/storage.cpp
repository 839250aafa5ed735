// Reading how a group wants its state stored.
#include "storage.h"

#include <torch/csrc/Dtype.h>

#include <string>
#include <utility>

#include "group_reader.h"

namespace momentum_ext::binding {
namespace {

constexpr const char* kRoundingSeed = "rounding_seed";

bool as_bool(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

// nullptr when the key is missing.
PyObject* find_item(PyObject* dict, const char* key) {
  const py::str name(key);
  PyObject* const value = PyDict_GetItemWithError(dict, name.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

uint64_t read_rounding_seed(HyperparamReader& reader) {
  PyObject* const seed = reader.object(kRoundingSeed);
  if (seed == nullptr) return 0;
  if (!PyLong_Check(seed)) {
    throw py::type_error(reader.where(kRoundingSeed) + ": expected an int, got " +
                         std::string(py::repr(seed)));
  }
  return PyLong_AsUnsignedLongLongMask(seed);
}

// 0, 24 or 32.
int read_master_bits(HyperparamReader& reader) {
  PyObject* const found = reader.object("master_weights");
  if (found == nullptr || found == Py_None || found == Py_False) return 0;
  if (found == Py_True) return 32;
  const long bits = PyLong_Check(found) ? PyLong_AsLong(found) : -1;
  PyErr_Clear();  // of an int that is no long
  if (bits == 24 || bits == 32) return static_cast<int>(bits);
  reader.refuse("master_weights", "expected a bool, 24 or 32, got " + std::string(py::repr(found)));
  return 0;
}

// Checkpoints have names, an edit may have either.
std::optional<at::ScalarType> read_state_dtype(HyperparamReader& reader, const char* key,
                                               PyObject* dtype) {
  if (dtype == nullptr || dtype == Py_None) return std::nullopt;
  constexpr std::pair<const char*, at::ScalarType> kDtypes[] = {
      {"float32", at::kFloat},
      {"bfloat16", at::kBFloat16},
      {"float16", at::kHalf},
      {"int8", at::kChar},
      {"float8_e4m3fn", at::kFloat8_e4m3fn},
      {"int4", at::ScalarType::Int4},
  };
  for (const auto& [name, type] : kDtypes) {
    const bool is_it =
        THPDtype_Check(dtype)
            ? reinterpret_cast<THPDtype*>(dtype)->scalar_type == type
            : PyUnicode_Check(dtype) && PyUnicode_CompareWithASCIIString(dtype, name) == 0;
    if (is_it) return type == at::ScalarType::Int4 ? kPacked : type;
  }
  reader.refuse(key,
                "expected None or float32, bfloat16, float16, int8, float8_e4m3fn or int4, as a "
                "torch.dtype or its name, got " +
                    std::string(py::repr(dtype)));
}

// "state_dtype": one for all states, or a dict by their keys. Of momentum also "momentum_dtype".
void read_state_dtypes(HyperparamReader& reader, StateNames states, Storage& storage) {
  constexpr const char* kKey = "state_dtype";
  PyObject* const found = reader.object(kKey);
  const bool is_dict = found != nullptr && PyDict_Check(found);
  Py_ssize_t known = 0;
  for (int k = 0; k < states.count; ++k) {
    PyObject* const mine = is_dict ? find_item(found, states.names[k]) : found;
    known += is_dict && mine != nullptr ? 1 : 0;
    storage.state_dtype[k] = read_state_dtype(reader, kKey, mine);
  }
  if (is_dict && PyDict_GET_SIZE(found) != known) {
    reader.refuse(kKey, "it names a state that there is not, got " + std::string(py::repr(found)));
  }
  if (states.count > 1) return;
  constexpr const char* kMomentumKey = "momentum_dtype";
  const auto of_momentum = read_state_dtype(reader, kMomentumKey, reader.object(kMomentumKey));
  if (!of_momentum.has_value()) return;
  if (storage.state_dtype[0].value_or(*of_momentum) != *of_momentum) {
    reader.refuse(kMomentumKey, "state_dtype says otherwise; set one of the two");
  }
  storage.state_dtype[0] = of_momentum;
}

// A second moment falls by a thousandth in a step: rounded to nearest it would never.
bool has_low_second_moments(const Storage& storage, StateNames states) {
  for (int k = 0; k < states.count; ++k) {
    const auto dtype = storage.state_dtype[k];
    if (states.are_non_negative[k] && dtype.has_value() && *dtype != at::kFloat) return true;
  }
  return false;
}

}  // namespace

Storage read_storage(HyperparamReader& reader, StateNames states) {
  Storage storage;
  read_state_dtypes(reader, states, storage);
  storage.master_bits = read_master_bits(reader);
  PyObject* const stochastic = reader.object("stochastic_rounding");
  const bool is_default = stochastic == nullptr || stochastic == Py_None;
  storage.stochastic_rounding =
      is_default ? has_low_second_moments(storage, states) : as_bool(stochastic);
  storage.rounds_masters = storage.master_bits == 24 && (is_default || storage.stochastic_rounding);
  storage.rounding_seed = read_rounding_seed(reader);
  return storage;
}

}  // namespace momentum_ext::binding
