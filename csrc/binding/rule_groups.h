// A plan's parameter groups as its rule's kernels read them. All that the binding has compiled for
// each rule stands behind this.
#pragma once

#include <memory>
#include <string>

#include "../table.h"
#include "device.h"
#include "group_reader.h"

namespace momentum_ext::binding {

// What a step hands to the kernels beside the tensors.
struct StepNumbers {
  double average_weight = 0;   // of the new parameter in its average
  uint32_t rounding_step = 0;  // how many steps there have been, for random numbers
};

class RuleGroups {
 public:
  virtual ~RuleGroups() = default;

  // Interned keys of a parameter's state.
  int max_states = 0;
  PyObject* state_keys[kMaxStates] = {};
  PyObject* scale_keys[kMaxStates] = {};  // of a state's scales, where it has 8 bits
  bool state_is_non_negative[kMaxStates] = {};

  virtual void resize(size_t count) = 0;

  // Reads group g anew; its "params", borrowed.
  virtual PyObject* parse(GroupReader& reader, PyObject* group, size_t g) = 0;

  // What all gradients are multiplied with; 1 at first.
  virtual void scale(double grad_factor) = 0;

  // Of group g's tensors.
  virtual int num_states(size_t g) const = 0;

  virtual void step_on_cpu(const TensorTable& table, const StepNumbers& numbers,
                           int max_threads) const = 0;
  virtual void launch(const TensorTable& table, const StepNumbers& numbers,
                      const DeviceShare& share, const ScalerTensors& scaler,
                      FirstSteps& first_steps, bool one_by_one) const = 0;
};

// Raises ValueError for a rule that this build does not have.
std::unique_ptr<RuleGroups> make_rule_groups(const std::string& rule);

}  // namespace momentum_ext::binding
