#include "state_changes.h"

#include "shards.h"

namespace momentum_ext::binding {

const StateChanges::Change* StateChanges::find(PyObject* param, PyObject* key) const {
  for (auto change = changes_.rbegin(); change != changes_.rend(); ++change) {
    if (change->key == key && change->param.ptr() == param) return &*change;
  }
  return nullptr;
}

// Through the dict's own __setitem__ (an OrderedDict keeps more than its items), which may run
// Python code and raise: then what was inserted is taken back, so that no step can find state that
// was never computed.
void StateChanges::insert(const py::object& state) {
  if (are_inserted_) return;
  for (size_t k = 0; k < changes_.size(); ++k) {
    Change& change = changes_[k];
    try {
      const auto key = py::reinterpret_borrow<py::object>(change.key);
      const bool has_dict =
          change.state_dict || PyDict_Contains(state.ptr(), change.param.ptr()) == 1;
      if (!has_dict) state[change.param] = py::dict();
      const py::dict target = change.state_dict
                                  ? py::reinterpret_borrow<py::dict>(change.state_dict)
                                  : py::dict(state[change.param]);
      if (target.contains(key)) change.replaced = target[key];
      if (change.tensor.defined()) {
        target[key] = as_state_of(change.param.ptr(), change.tensor, change.lies_like_param);
      } else if (change.replaced && PyObject_DelItem(target.ptr(), key.ptr()) != 0) {
        throw py::error_already_set();
      }
    } catch (...) {
      take_back(state, k + 1);
      throw;
    }
  }
  are_inserted_ = true;
}

void StateChanges::take_back(const py::object& state) noexcept {
  if (are_inserted_) take_back(state, changes_.size());
}

void StateChanges::take_back(const py::object& state, size_t count) noexcept {
  const py::error_scope keep_the_error;
  are_inserted_ = false;
  for (size_t k = count; k-- > 0;) {
    const Change& change = changes_[k];
    int failed = 0;
    if (!change.state_dict) {
      failed = PyObject_DelItem(state.ptr(), change.param.ptr());
    } else if (change.replaced) {
      failed = PyObject_SetItem(change.state_dict.ptr(), change.key, change.replaced.ptr());
    } else {
      failed = PyObject_DelItem(change.state_dict.ptr(), change.key);
    }
    if (failed != 0) PyErr_Clear();  // it was not there yet
  }
}

}  // namespace momentum_ext::binding
