// Reads a parameter group's hyperparameters, and notices at the price of a few pointer comparisons
// that nothing changed.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../rules/sgd.h"
#include "../table.h"
#include "formulation.h"
#include "storage.h"

namespace momentum_ext::binding {

namespace py = pybind11;

// How the buffers of a group's tensors are written.
Formulation read_buffer_formulation(PyObject* group, size_t index);

// A group's lr, of whatever kind it is.
double read_lr(PyObject* group, size_t index);

class GroupReader {
 public:
  // The "params", borrowed, of a dict whose keys and numbers are those that were read last; nullptr
  // when anything differs.
  PyObject* compare(PyObject* group) const noexcept;

  // Reads everything anew; returns the dict's "params", borrowed. `index` names the group in
  // errors.
  PyObject* parse(PyObject* group, size_t index, Hyperparams<Sgd>& hyperparams);

  // Rounds the coefficients of what was parsed, with what gradients are multiplied with.
  void scale(double grad_factor, Hyperparams<Sgd>& hyperparams) const;

  // True when a hyperparameter is of a kind that only torch can read, such as an lr that requires
  // grad.
  bool needs_torch() const { return needs_torch_; }

  // How the group wants its momentum written, and how the buffers of the group are written.
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
  };

  std::vector<Item> items_;
  bool immutable_ = false;  // all values are numbers; a tensor's value may change in place
  bool needs_torch_ = false;
  bool lr_is_zero_ = false;
  Formulation formulation_ = Formulation::kTorch;
  Formulation buffer_formulation_ = Formulation::kTorch;
  Storage storage_;
  bool maximize_ = false;
};

}  // namespace momentum_ext::binding
