// A plan's parameter groups as its rule's kernels read them. All that the binding has compiled for
// each rule stands behind this.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../table.h"
#include "counters.h"
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
  // The keys of the first states, and then of the counters.
  PyObject* const* keys_of(int num_states) const { return state_and_counter_keys[num_states]; }
  PyObject* state_and_counter_keys[kMaxStates + 1][kMaxStates + kMaxCounters] = {};
  int num_counters = 0;
  PyObject* counter_keys[kMaxCounters] = {};
  Counters counter_starts;

  // Whether state with this key has its parameter's elements: no scales, no packed codes.
  bool lies_like_param(PyObject* key, const at::Tensor& tensor) const;

  virtual void resize(size_t count) = 0;

  // Reads group g anew; its "params", borrowed.
  virtual PyObject* parse(GroupReader& reader, PyObject* group, size_t g) = 0;

  // What all gradients are multiplied with; 1 at first.
  virtual void scale(double grad_factor) = 0;

  // Of group g's tensors.
  virtual int num_states(size_t g) const = 0;

  // The index of a group's hyperparameters in the kernels' table, for tensors with these counters;
  // `hint`: the one of the tensor's last step. Without counters it is the group's own.
  virtual uint32_t row_of(uint32_t hint, size_t g, const Counters& before) = 0;
  virtual const Counters& counters_after(uint32_t row) const = 0;
  // Whether group g wants the counters of tensors on CUDA devices to be there, too.
  virtual bool counts_on_device(size_t g) const = 0;
  // Advances counters of group g's tensors on a device, unless the step is left out.
  virtual void count_on_device(size_t g, const std::vector<CountedOnDevice>& tensors,
                               int16_t device, const at::Tensor& found_inf) const = 0;
  virtual void begin_step() = 0;
  virtual void prepare_rows() = 0;  // those in use, for the kernels
  virtual void end_step() = 0;      // which has updated their tensors

  virtual void step_on_cpu(const TensorTable& table, const StepNumbers& numbers,
                           int max_threads) const = 0;
  virtual void launch(const TensorTable& table, const StepNumbers& numbers,
                      const DeviceShare& share, const ScalerTensors& scaler,
                      FirstSteps& first_steps, bool one_by_one) const = 0;
};

// Raises ValueError for a rule that this build does not have.
std::unique_ptr<RuleGroups> make_rule_groups(const std::string& rule);

}  // namespace momentum_ext::binding
