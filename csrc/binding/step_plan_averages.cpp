// Averages of the parameters, kept in the step's own pass where parameter and average lie alike
// (and, on the CPU, are walked as flat arrays), and by torch after it everywhere else.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "state_access.h"
#include "step_plan.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

// Whether a new tensor like this one has its strides.
bool keeps_layout(const at::Tensor& param) {
  return param.layout() == at::kStrided && param.is_non_overlapping_and_dense();
}

}  // namespace

// After all slots were prepared. Writes nothing.
void StepPlan::attach_averages() {
  const double weight = options_.average_weight.value_or(0);
  for (size_t i = 0; i < slots_.size(); ++i) {
    entries_[i].average = nullptr;
    tensors_[i].average = nullptr;
    if (!options_.average_weight.has_value() || !THPVariable_Check(param_objects_[i]) ||
        is_repeated(i)) {
      continue;
    }
    const at::Tensor& param = THPVariable_Unpack(param_objects_[i]);
    if (!param.is_floating_point() && !param.is_complex() &&
        param.unsafeGetTensorImpl()->grad().defined()) {
      throw std::runtime_error(name_of(slots_[i]) +
                               ": ema_decay keeps averages of floating-point "
                               "and complex parameters, got " +
                               std::string(c10::toString(param.scalar_type())) +
                               "; give it an optimizer of its own without ema_decay");
    }
    const at::Tensor* const average = find_state(slots_[i], average_key_);
    if (average == nullptr) {
      // What has never had a gradient has never moved: it is its own average.
      if (!param.unsafeGetTensorImpl()->grad().defined()) continue;
      if (slots_[i].device != kCpu && is_capturing(slots_[i].device)) {
        throw std::runtime_error(name_of(slots_[i]) +
                                 ": it has no average yet, and step() is being captured into a "
                                 "CUDA graph, whose replays would each start it anew; run one step "
                                 "before the capture");
      }
      without_average_.push_back(i);
      if (weight == 0) continue;
      if (!can_attach(i, param, param) || !keeps_layout(param)) averaged_by_torch_.push_back(i);
      continue;
    }
    if (average->sizes() != param.sizes() || average->scalar_type() != param.scalar_type() ||
        average->device() != param.device()) {
      throw std::runtime_error("ema of " + name_of(slots_[i]) +
                               ": its shape, dtype or device is not that of its parameter; move it "
                               "with its parameter, or delete it from the optimizer's state to "
                               "start a new average");
    }
    if (!kernel_device(*average).has_value() ||
        !lies_in_storage(*average->unsafeGetTensorImpl(), byte_range(*average).end)) {
      check_memory(*average, "ema of " + name_of(slots_[i]));
    }
    if (weight == 0) continue;
    if (can_attach(i, param, *average)) {
      attach(i, *average);
    } else {
      averaged_by_torch_.push_back(i);
    }
  }
}

// Whether the kernels can keep this average.
bool StepPlan::can_attach(size_t i, const at::Tensor& param, const at::Tensor& average) const {
  if (in_order_) return false;  // a later slot may yet write to this one's memory
  // A parameter that is listed twice is averaged once, after both updates.
  const bool once = std::none_of(repeated_.begin(), repeated_.end(),
                                 [i](const auto& pair) { return pair.second == i; });
  const bool is_walked = entries_[i].device != kCpu || entries_[i].layout == nullptr;
  return once && tensors_[i].param != nullptr && is_walked && lies_like(average, param);
}

void StepPlan::attach(size_t i, const at::Tensor& average) {
  if (entries_[i].numel == 0) return;  // there is nothing to keep
  entries_[i].average = mutable_data_of(*average.unsafeGetTensorImpl(), average.element_size());
  tensors_[i].average = average.unsafeGetTensorImpl();
}

// Before the update: an average starts at what the parameter was.
void StepPlan::make_averages() {
  const at::NoGradGuard no_grad;
  for (const size_t i : without_average_) {
    const at::Tensor& param = THPVariable_Unpack(param_objects_[i]);
    const at::Tensor average = at::empty_like(param, {}, at::MemoryFormat::Preserve).copy_(param);
    const auto param_object = py::reinterpret_borrow<py::object>(param_objects_[i]);
    const auto key = py::reinterpret_borrow<py::object>(average_key_);
    if (!py::reinterpret_borrow<py::dict>(state_).contains(param_object)) {
      state_[param_object] = py::dict();
    }
    state_[param_object][key] = py::reinterpret_steal<py::object>(THPVariable_Wrap(average));
    if (options_.average_weight == 0 || !can_attach(i, param, average) || !keeps_layout(param)) {
      continue;  // torch's, or none
    }
    attach(i, average);
    kept_alive_.emplace_back(average.getIntrusivePtr(), average.storage());
  }
  without_average_.clear();
}

void StepPlan::update_averages_by_torch() {
  const at::NoGradGuard no_grad;
  for (const size_t i : averaged_by_torch_) {
    const at::Tensor& param = THPVariable_Unpack(param_objects_[i]);
    const auto state_dict = py::reinterpret_borrow<py::object>(
        state_[py::reinterpret_borrow<py::object>(param_objects_[i])]);
    const at::Tensor* const average = find_tensor(state_dict.ptr(), average_key_);
    if (average == nullptr) continue;
    if (*options_.average_weight == 1) {
      average->copy_(param);
    } else {
      average->lerp_(param, *options_.average_weight);
    }
  }
}

}  // namespace momentum_ext::binding
