// What a step puts into the optimizer's state, and takes back when it fails.
#include <torch/csrc/autograd/python_variable.h>

#include "step_plan.h"

namespace momentum_ext::binding {

// Notes a change of slot i's state; an undefined tensor: the key goes.
void StepPlan::put(size_t i, PyObject* key, const at::Tensor& tensor, uint32_t cohort) {
  const auto object = [](PyObject* borrowed) {
    return py::reinterpret_borrow<py::object>(borrowed);
  };
  new_state_.push_back({tensor, key, object(param_objects_[i]), object(slots_[i].state_dict),
                        py::object(), cohort, slots_[i].device});
}

// Through the dict's own __setitem__ (an OrderedDict keeps more than its items), which may run
// Python code and raise: then what was inserted is taken back, so that no step can find state that
// was never computed.
void StepPlan::insert_new_state() {
  for (size_t k = 0; k < new_state_.size(); ++k) {
    NewState& made = new_state_[k];
    try {
      const auto key = py::reinterpret_borrow<py::object>(made.key);
      const bool has_dict = made.state_dict || PyDict_Contains(state_.ptr(), made.param.ptr()) == 1;
      if (!has_dict) state_[made.param] = py::dict();
      const py::dict target = made.state_dict ? py::reinterpret_borrow<py::dict>(made.state_dict)
                                              : py::dict(state_[made.param]);
      if (target.contains(key)) made.replaced = target[key];
      if (made.tensor.defined()) {
        target[key] = py::reinterpret_steal<py::object>(THPVariable_Wrap(made.tensor));
      } else if (made.replaced && PyObject_DelItem(target.ptr(), key.ptr()) != 0) {
        throw py::error_already_set();
      }
    } catch (...) {
      take_back_new_state(k + 1);
      throw;
    }
  }
}

void StepPlan::take_back_new_state(size_t count) noexcept {
  const py::error_scope keep_the_error;
  for (size_t k = count; k-- > 0;) {
    const NewState& made = new_state_[k];
    int failed = 0;
    if (!made.state_dict) {
      failed = PyObject_DelItem(state_.ptr(), made.param.ptr());
    } else if (made.replaced) {
      failed = PyObject_SetItem(made.state_dict.ptr(), made.key, made.replaced.ptr());
    } else {
      failed = PyObject_DelItem(made.state_dict.ptr(), made.key);
    }
    if (failed != 0) PyErr_Clear();  // it was not there yet
  }
}

}  // namespace momentum_ext::binding
