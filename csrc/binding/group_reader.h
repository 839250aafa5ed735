// Reads a parameter group, and notices at the price of a few pointer comparisons that nothing
// changed. What a rule's hyperparameters are, the rule says (Rule::read()); the options that every
// rule has are read here.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <string>
#include <vector>

#include "../rules/sgd.h"
#include "formulation.h"
#include "storage.h"

namespace momentum_ext::binding {

namespace py = pybind11;

// The formulation that the buffers of a group's tensors are in.
Formulation read_buffer_formulation(PyObject* group, size_t index);

// A group's lr, of whatever kind it is.
double read_lr(PyObject* group, size_t index);

// Reads hyperparameters from one group's dict, by name, and notes which they were.
class HyperparamReader {
 public:
  // What a number may be besides a Python float or int: where torch reads a tensor's value as it
  // is, a floating-point tensor of one element.
  enum MayBe { kNumber, kScalarTensor, kOneElementTensor };

  HyperparamReader(PyObject* group, size_t index, Formulation formulation);

  // A number; in a CUDA device's memory too where there is a place for that and all parameters are
  // on the device: `value` is then 1. Anything else, from a bool to a tensor that requires grad,
  // needs torch: it gives it its meaning or its error.
  // is_float: whether it is an fp32 tensor.
  void number(const char* name, double& value, MayBe may_be, DeviceNumber* on_device = nullptr,
              bool* is_float = nullptr);
  void pair(const char* name, double& first, double& second);  // of Python numbers
  void flag(const char* name, bool& value);
  void optional_flag(const char* name, bool& value);  // false where the key is missing
  PyObject* object(const char* name);                 // nullptr where the key is missing

  Formulation formulation() const { return formulation_; }

  // True when a hyperparameter is of a kind that only torch can read.
  bool needs_torch() const { return needs_torch_; }
  void leave_to_torch() { needs_torch_ = true; }

  // True where all parameters are on CUDA devices that have kernels.
  bool is_on_device() const;

  // "param_groups[0]['lr']".
  std::string where(const char* name) const;

  // Raise ValueError.
  [[noreturn]] void refuse(const char* name, const std::string& why) const;
  [[noreturn]] void refuse_with_formulation(const char* name, double value) const;

 private:
  friend class GroupReader;
  PyObject* get(const char* name);

  PyObject* group_;
  size_t index_;
  Formulation formulation_;
  PyObject* params_;
  bool needs_torch_ = false;
  bool lr_is_zero_ = false;
  std::vector<PyObject*> keys_;  // interned
};

// A rule's names of its states, and which are never negative.
struct StateNames {
  const char* const* names;
  const bool* are_non_negative;
  int count;
};

// Groups without low-precision state have none of the keys that this reads.
Storage read_storage(HyperparamReader& reader, StateNames states);

class GroupReader {
 public:
  // The "params", borrowed, of a dict whose keys and numbers are those that were read last; nullptr
  // when anything differs.
  PyObject* compare(PyObject* group) const noexcept;

  // Reads everything anew, the rule's hyperparameters by `read`; returns the dict's "params",
  // borrowed. `index` names the group in errors.
  PyObject* parse(PyObject* group, size_t index, StateNames states,
                  const std::function<void(HyperparamReader&)>& read);

  bool needs_torch() const { return needs_torch_; }

  // The formulation that the group wants, and the one that its buffers are in.
  Formulation formulation() const { return formulation_; }
  Formulation buffer_formulation() const { return buffer_formulation_; }

  // How the group wants its state stored.
  const Storage& storage() const { return storage_; }

  // True for an lr of 0 that the host knows.
  bool lr_is_zero() const { return lr_is_zero_; }

  // Writes into the dict that the buffers are now as the group wants them.
  void note_converted(PyObject* group);

 private:
  // One item of the dict as it was last read. The value of a hyperparameter is kept alive: as long
  // as it lives, no other number can stand at its address, so the same address is the same number.
  struct Item {
    py::object key;
    py::object value;  // null for what is not a hyperparameter
    bool is_params;
    py::object copy{};  // of a value that is a dict
  };
  void keep_items(PyObject* group, const std::vector<PyObject*>& read_keys);

  std::vector<Item> items_;
  bool immutable_ = false;  // all values are numbers; a tensor's value may change in place
  bool needs_torch_ = false;
  bool lr_is_zero_ = false;
  Formulation formulation_ = Formulation::kTorch;
  Formulation buffer_formulation_ = Formulation::kTorch;
  Storage storage_;
};

}  // namespace momentum_ext::binding
