// The state that a slot starts its next step from: in the formulation and the format that its group
// wants. What it is now, its dtypes, its keys and the group's "buffer_formulation" say. Nothing here
// writes: a step puts the changes into the state, a look returns them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "plan.h"
#include "state_changes.h"

namespace momentum_ext::binding {

// A slot of a plan, and what the step is going to change in the state.
struct SlotState {
  const Plan& plan;
  size_t i;
  const StateChanges* changes;  // of a step; nullptr: a look

  const Slot& slot() const { return plan.slots[i]; }
  const GroupReader& reader() const { return plan.reader(slot()); }

  // The tensor at opt.state[p][key]; nullptr when there is none. What an earlier slot of the same
  // parameter is going to put there in this step counts.
  const at::Tensor* find(PyObject* key) const;

  // The same for state k; nullptr when it is None. Raises for what is no tensor.
  const at::Tensor* find_state(int k) const;

  // Raises for a state without this key beside others.
  [[noreturn]] void refuse_missing(PyObject* key) const;
  // The same for states of a rule with counters, of which some are there.
  void refuse_parts(int num_states, const at::Tensor* const* found) const;

  // "momentum_buffer of param_groups[0]['params'][3]".
  std::string name_of(Operand operand) const;
  std::string name_of(PyObject* key) const;
};

struct StartingState {
  at::Tensor states[kMaxStates];  // undefined: there is none
  at::Tensor scales[kMaxStates];  // of states of 8 bits
  at::Tensor master;
  // What must be put into the state for that; an undefined tensor: the key goes.
  std::vector<std::pair<PyObject*, at::Tensor>> changes;
};

// From the states that were found; nullptr: none. Raises where there is no exact conversion, and
// for state that is not whole.
StartingState starting_state(const SlotState& state, const at::Tensor& param, int num_states,
                             const at::Tensor* const* found);

// What the next step would make of the state before it updates: a list of (parameter, key, tensor or
// None for a key that goes), and the indices of the groups whose buffers are then in their group's
// formulation. A parameter that came from another group, whose buffer is not in the formulation
// that "buffer_formulation" says, is among them; with `moved_only` these are all.
py::tuple pending_changes(Plan& plan, const py::list& param_groups, const py::dict& state,
                          bool moved_only);

}  // namespace momentum_ext::binding
