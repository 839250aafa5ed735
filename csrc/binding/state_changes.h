// What a step puts into the optimizer's state before it updates, and takes back when it fails.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace momentum_ext::binding {

namespace py = pybind11;

class StateChanges {
 public:
  struct Change {
    py::object param;
    py::object state_dict;  // null: to be made
    PyObject* key;
    at::Tensor tensor;            // undefined: the key goes
    uint32_t cohort = 0;          // of a new momentum buffer: see FirstSteps
    bool lies_like_param = true;  // else it is plain where the parameter is a DTensor
    py::object replaced{};        // what the state had in its place; null: nothing
  };

  void put(Change change) { changes_.push_back(std::move(change)); }
  void clear() {
    changes_.clear();
    are_inserted_ = false;
  }
  bool empty() const { return changes_.empty(); }
  const std::vector<Change>& all() const { return changes_; }

  // What is going to be at the state of this parameter; nullptr: nothing was put there.
  const Change* find(PyObject* param, PyObject* key) const;

  // Writes them into `state`, once. Raises, and has written nothing, when Python code of a dict's
  // own does.
  void insert(const py::object& state);

  // After insert(): all is as it was.
  void take_back(const py::object& state) noexcept;

 private:
  void take_back(const py::object& state, size_t count) noexcept;

  std::vector<Change> changes_;
  bool are_inserted_ = false;
};

}  // namespace momentum_ext::binding
