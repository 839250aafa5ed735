// A step that is ready to run. Constructed: everything is checked and allocated, and nothing is
// written that a user can see. run(): the update. Destroyed without: discarded, and all is as it
// was.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "averages.h"
#include "plan.h"
#include "state_changes.h"
#include "state_format.h"

namespace momentum_ext::binding {

struct StepVectors {
  std::vector<size_t> changed;       // slots that are not as the plan says
  std::vector<size_t> shared_grads;  // slots whose gradient's storage has other owners
  std::vector<DeviceShare> shares;   // one for each CUDA device that has tensors in this step
  std::vector<size_t> for_torch;
  std::vector<at::Tensor> resolved_grads;
  StateChanges changes;
  StepAverages averages;
  std::vector<TensorEntry> cpu_entries;  // only where CPU and CUDA tensors are mixed
  std::vector<int64_t> cpu_first_element;
  std::vector<std::pair<c10::intrusive_ptr<c10::TensorImpl>, c10::Storage>> kept_alive;

  void clear();
};

class PreparedStep {
 public:
  // What has to be known before the step is prepared.
  struct Options {
    bool all_by_torch = false;     // differentiable=True
    bool may_be_left_out = false;  // by the device, for an overflow that the host does not know
    Averaging averaging = Averaging::kNone;
    py::object grads{};  // parameters with the tensors that stand in for their gradients, or null
  };
  // What has not: what gradients are multiplied with, the weight of the parameters in their
  // averages, and numbers on a CUDA device, for a step that is_on_devices().
  struct Numbers {
    double grad_factor = 1;
    double average_weight = 0;
    ScalerTensors on_device{};
  };

  PreparedStep(Plan& plan, const py::list& param_groups, const py::dict& state, Options options);
  PreparedStep(PreparedStep&&) noexcept = default;
  ~PreparedStep() { discard(); }

  // The (group, index in group) of the tensors that the kernels are not made for. The caller calls
  // begin(), updates those by torch and calls run().
  py::list for_torch() const;
  bool needs_torch() const { return !vectors_->for_torch.empty(); }

  // True where kernels on CUDA devices do all of it, so that the host need not know the numbers.
  // With a count of the averages on one device it must be the only one.
  bool is_on_devices(const std::optional<at::Tensor>& average_count) const;

  // For a step that Python holds.
  void keep_plan() { kept_plan_ = plan_->shared_from_this(); }

  // The first writes: new state.
  void begin();
  void run(const Numbers& numbers);
  void discard() noexcept;

 private:
  void look_at_slots(const Options& options);
  bool is_as_planned(size_t i, int num_states, const GroupReader& reader);
  void lay_out(size_t i);
  void restore_versions() noexcept;
  void prepare_slot(size_t i, const Options& options);
  at::Tensor find_grad(size_t i, const Options& options);
  uint32_t cohort_of_first_step(const Slot& slot, const Options& options);
  void fill_in(size_t i, const Operands& operands, bool is_first_step, uint32_t cohort);
  void put(size_t i, PyObject* key, const at::Tensor& tensor, uint32_t cohort);
  bool some_grad_meets_another_slot() const;
  void bump_versions();
  void update_cpu(const StepNumbers& numbers);
  void keep_alive();

  std::shared_ptr<Plan> kept_plan_;
  Plan* plan_;
  StepLock lock_;
  std::unique_ptr<StepVectors> vectors_;  // null: it has run, was discarded or moved
  py::object state_;                      // opt.state
  bool versions_are_bumped_ = false;      // of the slots that are as the plan says
  bool converts_ = false;                 // some slot's formulation is not its group's
  bool may_be_left_out_;
  bool in_order_ = false;  // tensors share memory: one after the other, as torch's for-loop
};

// For a profiler: the bytes that a prepared step must move, but for what torch updates. Parameter, gradient and
// state are read, parameter and state written, an average, a master and the scales of 8-bit states read and written.
int64_t bytes_to_move(const Plan& plan, const StepAverages& averages);

// FusedMomentum.step(): prepares and runs it. None, or where torch has a part in it the step that
// is prepared.
py::object step(Plan& plan, const py::list& param_groups, const py::dict& state, bool all_by_torch);

}  // namespace momentum_ext::binding
