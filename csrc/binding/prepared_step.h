// A step that is ready to run. The constructor checks what the kernels update, and allocates its
// new state. It writes no value; only version counters go up. run() updates. A step that is
// discarded or destroyed before run() takes new state and version counts back. What torch has
// written after begin() stays.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "step_vectors.h"

namespace momentum_ext::binding {

class PreparedStep {
 public:
  // What a step need not know before it runs: what gradients are multiplied with, the weight of the
  // parameters in their averages, and numbers on a CUDA device, for a step that is_on_devices().
  struct Numbers {
    double grad_factor = 1;
    double average_weight = 0;
    ScalerTensors on_device{};
  };

  PreparedStep(Plan& plan, const py::list& param_groups, const py::dict& state,
               StepOptions options);
  PreparedStep(PreparedStep&&) noexcept = default;
  ~PreparedStep() { discard(); }

  // All but keep_plan() and discard() raise once the step has run or was discarded; begin() and
  // run() also while it writes.

  // The (group, index in group) of the tensors that torch updates: those the kernels are not made
  // for, or all (differentiable, operators that are watched). The caller calls begin(), lets torch
  // update them and calls run().
  py::list fallback() const;
  bool needs_torch() const { return !vectors().fallback.empty(); }

  // True where kernels on CUDA devices do all of it, so that the host need not know the numbers.
  // With a count of the averages on one device it must be the only one.
  bool is_on_devices(const std::optional<at::Tensor>& average_count) const;

  // For a step that Python holds: the plan lives as long as it.
  void keep_plan() { kept_plan_ = plan_->shared_from_this(); }

  // The first writes: new state.
  void begin();
  void run(const Numbers& numbers);

  // Ends a step that has not run and unlocks the plan. Call it, do not wait for the destructor: an
  // exception's traceback may keep this object alive. Does nothing while the step writes.
  void discard() noexcept;

 private:
  class Writing;

  StepVectors& vectors() const;
  void insert_state();
  void finish() noexcept;
  void restore_versions() noexcept;
  c10::TensorImpl* counter_of(size_t i, PyObject* key, c10::TensorImpl* state) const;
  bool some_grad_meets_another_slot() const;
  void bump_versions();
  void update_cpu(const StepNumbers& numbers);
  void count_on_devices(const at::Tensor& found_inf);
  void keep_alive();

  std::shared_ptr<Plan> kept_plan_;
  Plan* plan_;
  std::optional<StepLock> lock_;
  std::unique_ptr<StepVectors> vectors_;  // null: it has run, was discarded or moved
  py::object state_;                      // opt.state
  bool versions_are_bumped_ = false;      // of the slots that are as the plan says
  bool converts_ = false;                 // some slot's formulation is not its group's
  bool is_writing_ = false;
  bool keeps_all_ = false;  // of its tensors alive
  bool may_be_left_out_;
  bool in_order_ = false;  // tensors share memory: one after the other, as torch's for-loop
};

// For a profiler: the bytes that a prepared step must move, but for what torch updates. Parameter,
// gradient and state are read, parameter and state written; an average, a master and the scales of
// 8-bit states are read and written.
int64_t bytes_to_move(const Plan& plan, const StepAverages& averages);

// FusedMomentum.step(): prepares a step. Where the kernels do all of it, runs it and returns None;
// where torch has a part, returns the PreparedStep, not yet run. all_by_torch: see StepOptions.
py::object step(Plan& plan, const py::list& param_groups, const py::dict& state, bool all_by_torch);

}  // namespace momentum_ext::binding
