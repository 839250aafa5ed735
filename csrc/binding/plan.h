// The plan: what a step needs to know about every parameter, built once and brought up to date by
// comparing. It is only a cache that makes a PreparedStep cheap to construct.
//
// Nothing about a tensor is assumed to be as it was: each step reads the parameter lists, the
// groups' hyperparameters, the gradients and the optimizer's state again, and compares them with
// the plan. The plan holds no reference to a parameter, gradient or state between steps, so it
// keeps no memory of theirs alive and takes part in no reference cycle. Addresses that it remembers
// are compared, never followed; those that it follows were read from the optimizer in the same
// step.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../table.h"
#include "aliasing.h"
#include "device.h"
#include "group_reader.h"
#include "rule_groups.h"
#include "shards.h"
#include "slot.h"
#include "step_lock.h"

namespace momentum_ext::binding {

// What a step works with and gives back, so that its vectors keep their capacity and a step
// allocates nothing once warm.
struct StepVectors;

class Plan : public std::enable_shared_from_this<Plan> {
 public:
  // `rule`: see make_rule_groups().
  // `name`: the optimizer's, for profilers.
  Plan(const std::string& rule, std::string name);
  ~Plan();

  // Brings the plan up to the optimizer's groups, parameter lists and state.
  void compare(const py::list& param_groups, const py::dict& state);

  // The formulation that all buffers of these groups are in is what their groups say.
  void adopt(const py::list& param_groups);

  // True where a parameter has come from another group and its buffer is not in the formulation
  // that its group says.
  bool has_moved(const py::list& param_groups) const;

  // From now on the buffers are in their groups' formulations.
  void note_converted();

  // After a slot was examined.
  void find_shared_memory();

  // A slot's parameter as it is listed, the tensor that is updated for it, its group, and what
  // stands there.
  const at::Tensor& listed(size_t i) const { return THPVariable_Unpack(param_objects[i]); }
  const at::Tensor& param(size_t i) const { return resolve(param_objects[i]); }
  const GroupReader& reader(const Slot& slot) const { return readers[slot.group]; }
  int num_states(const Slot& slot) const { return rule->num_states(slot.group); }
  bool wants_conversion(const Slot& slot) const {
    return slot.formulation != reader(slot).formulation();
  }

  const std::string name;
  StepMutex mutex;

  // The groups, as they were read in this step.
  std::vector<PyObject*> groups;  // the dicts, borrowed
  std::vector<GroupReader> readers;
  std::unique_ptr<RuleGroups> rule;  // their hyperparameters

  // The parameters' slots, in the order of the groups. A vector of this name's kind has one element
  // for each slot; a slot without a gradient has an entry of no elements.
  std::vector<Slot> slots;
  std::vector<PyObject*> param_objects;  // only compared, until a step has compared them
  std::vector<size_t> first_slot;        // of each group, and the end

  // What the kernels are to work on. A step fills in gradients and what has changed.
  struct Tensors {
    c10::TensorImpl* param = nullptr;  // nullptr: nothing to update
    c10::TensorImpl* grad = nullptr;
    c10::TensorImpl* states[kMaxStates] = {};
    c10::TensorImpl* average = nullptr;
  };
  struct CompanionTensors {
    c10::TensorImpl* master = nullptr;
    c10::TensorImpl* scales[kMaxStates] = {};
  };
  std::vector<Tensors> tensors;
  struct CounterTensors {
    c10::TensorImpl* each[kMaxCounters] = {};
    void* data[kMaxCounters] = {};
    double* derived = nullptr;  // not nullptr: they are on the parameter's device
  };
  std::vector<TensorEntry> entries;
  std::vector<CounterTensors> counters;  // of rules that have some
  DerivedNumbers derived;                // of those on devices
  std::vector<LowPrecision> low_precision;
  std::vector<CompanionTensors> companion_tensors;
  bool has_low_precision = false;  // else nobody looks at the two
  bool has_averages = false;       // some entry may have one
  std::vector<int64_t> first_element;

  // Meshes on which a gradient has lain otherwise than its parameter: their ranks agree in each step
  // from then on which gradients are redistributed.
  py::set redistributing_meshes;

  // The memory of all parameters and states, and whether it has to be collected anew.
  WrittenMemory written;
  bool memory_has_changed = false;

  FirstSteps first_steps;  // on CUDA devices, of tensors that began under a GradScaler

  // How many steps there have been, which random numbers depend on: as the host has counted them, for
  // the CPU, and as devices do.
  uint32_t rounding_step = 0;
  RoundingSteps rounding_steps;
  std::unique_ptr<StepVectors> spare_vectors;

  std::optional<GradFactors> last_factors;  // of the last step, for update_report()

 private:
  bool read_groups(const py::list& param_groups);
  PyObject* parse_group(size_t g);
  bool is_same_list(size_t g) const;
  bool read_state(PyObject* state);
  void rebuild(PyObject* state);

  std::vector<PyObject*> params_;                            // the groups' lists, borrowed
  std::vector<std::pair<PyObject*, ptrdiff_t>> state_keys_;  // in order, each with its slot or -1
  std::vector<std::pair<size_t, size_t>> repeated_;  // a slot, and the first of the same parameter
  // Of parameters that have changed their group or have left it, for the next rebuild.
  std::unordered_map<PyObject*, Formulation> formulation_of_;
};

}  // namespace momentum_ext::binding
