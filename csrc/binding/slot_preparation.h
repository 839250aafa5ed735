// Preparing a step's slots: a quick look at each, then those that have changed.
#pragma once

#include "operands.h"
#include "state_format.h"
#include "step_vectors.h"

namespace momentum_ext::binding {

// Holds on to what a slot updates while other code may run: Python's, or another thread's.
void keep_alive(StepVectors& vectors, const Plan& plan, size_t i);

class SlotPreparation {
 public:
  SlotPreparation(Plan& plan, const StepOptions& options, StepVectors& vectors)
      : plan_(plan), options_(options), vectors_(vectors) {}

  // One pass, because a tensor's fields lie in a dozen cache lines: what is as the plan says gets its
  // version bumped at once and its place among the elements. The others are vectors.changed.
  void look_at_all();

  // Those: new and changed tensors, first steps, errors. Returns whether some state is converted to
  // another formulation.
  bool prepare_changed();

  // Raises where a step is captured whose tensors' steps the host counts. In counters.cpp.
  void check_capture() const;

 private:
  template <bool kIsDTensor>
  bool is_as_planned(size_t i, int num_states, const GroupReader& reader);
  void lay_out(size_t i);
  bool redistributes() const;
  void redistribute_grads();
  void start_anew(size_t i);
  void prepare(size_t i);
  at::Tensor listed_grad(size_t i) const;
  at::Tensor find_grad(size_t i);
  uint32_t cohort_of_first_step(const Slot& slot);
  void fill_in(size_t i, const Operands& operands, bool is_first_step, uint32_t cohort);
  void remember_specs(size_t i);
  void put(size_t i, PyObject* key, const at::Tensor& tensor, uint32_t cohort);
  // In counters.cpp, for rules that have some.
  bool has_planned_counters(size_t i, PyObject* const* values);
  void prepare_counters(size_t i, bool is_first_step);
  bool counts_on_device(const Slot& slot) const;
  void choose_row(size_t i);
  [[noreturn]] void refuse_capture(size_t i, int counter) const;

  Plan& plan_;
  const StepOptions& options_;
  StepVectors& vectors_;
  bool converts_ = false;
};

}  // namespace momentum_ext::binding
