#include "averages.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <stdexcept>
#include <string>

#include "operands.h"

namespace momentum_ext::binding {
namespace {

// The tensor that is there. Raises for one that is not its parameter's.
const at::Tensor* find_average(Slot& slot, PyObject* listed, const at::Tensor& param) {
  const at::Tensor* average = find_tensor(slot.state_dict, state_keys().average);
  if (average == nullptr) return nullptr;
  const auto name = [&] { return "ema of " + slot.name(); };
  PyObject* const object = object_of(*average);
  average = &resolve_state(listed, *average, name);
  if (slot.specs != nullptr) {
    slot.specs->average = py::reinterpret_borrow<py::object>(shard_of(object).spec);
  }
  if (average->sizes() != param.sizes() || average->scalar_type() != param.scalar_type() ||
      average->device() != param.device()) {
    throw std::runtime_error(name() +
                             ": its shape, dtype or device is not that of its parameter; move it "
                             "with its parameter, or delete it from the optimizer's state to "
                             "start a new average");
  }
  if (!kernel_device(*average).has_value() ||
      !lies_in_storage(*average->unsafeGetTensorImpl(), byte_range(*average).end)) {
    check_memory(*average, name);
  }
  return average;
}

at::Tensor new_average(const Slot& slot, const at::Tensor& param) {
  if (slot.device != kCpu && is_capturing(slot.device)) {
    throw std::runtime_error(slot.name() +
                             ": it has no average yet, and step() is being captured into a "
                             "CUDA graph, whose replays would each start it anew; run one step "
                             "before the capture");
  }
  return at::empty_like(param, {}, at::MemoryFormat::Preserve).copy_(param);
}

// Whether the kernels can keep this average.
bool has_kernel(const Plan& plan, size_t i, const at::Tensor& param, const at::Tensor& average) {
  const TensorEntry& entry = plan.entries[i];
  const bool is_walked = entry.device != kCpu || entry.layout == nullptr;
  // A parameter that is listed twice is averaged once, after both updates.
  return plan.tensors[i].param != nullptr && is_walked && !plan.slots[i].is_repeated_later &&
         lies_like(average, param);
}

// Sets the average that the kernels kept in an earlier step, where it is as it was.
bool find_known_average(Plan& plan, size_t i) noexcept {
  const Slot& slot = plan.slots[i];
  if (slot.average == nullptr || plan.tensors[i].param == nullptr) return false;
  const PyObject* const spec = slot.specs != nullptr ? slot.specs->average.ptr() : nullptr;
  c10::TensorImpl* const average =
      slot.average->find(slot.state_dict, spec, slot.keys, slot.device);
  if (average == nullptr) return false;
  plan.entries[i].average = slot.average->data;
  plan.tensors[i].average = average;
  return true;
}

}  // namespace

void StepAverages::attach(Plan& plan, Averaging averaging, bool in_order, StateChanges& changes) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    plan.entries[i].average = nullptr;
    plan.tensors[i].average = nullptr;
    Slot& slot = plan.slots[i];
    if (averaging == Averaging::kNone || !THPVariable_Check(plan.param_objects[i]) ||
        slot.is_repeated) {
      continue;
    }
    if (averaging == Averaging::kUpdate && !in_order && find_known_average(plan, i)) continue;
    const at::Tensor& param = plan.param(i);
    const bool has_grad = plan.listed(i).unsafeGetTensorImpl()->grad().defined();
    if (!param.is_floating_point() && !param.is_complex() && has_grad) {
      throw std::runtime_error(slot.name() +
                               ": ema_decay keeps averages of floating-point "
                               "and complex parameters, got " +
                               std::string(c10::toString(param.scalar_type())) +
                               "; give it an optimizer of its own without ema_decay");
    }
    const at::Tensor* const found = find_average(slot, plan.param_objects[i], param);
    // What has never had a gradient has never moved: it is its own average.
    if (found == nullptr && !has_grad) continue;
    at::Tensor made;
    if (found == nullptr) {
      made = new_average(slot, param);
      changes.put({py::reinterpret_borrow<py::object>(plan.param_objects[i]),
                   py::reinterpret_borrow<py::object>(slot.state_dict), state_keys().average,
                   made});
    }
    const at::Tensor& average = found != nullptr ? *found : made;
    if (averaging == Averaging::kStart) continue;
    // In order, a later slot may yet write to this one's memory.
    if (in_order || !has_kernel(plan, i, param, average)) {
      if (average.layout() == at::kStrided && overlaps_itself(average)) {
        throw std::runtime_error(
            "ema of " + slot.name() +
            ": several of its elements share one place in memory, so it cannot "
            "be updated in place; clone() it first");
      }
      by_torch_.push_back(i);
    } else if (plan.entries[i].numel != 0) {
      slot.average = std::make_unique<Companion>(state_keys().average, average);
      plan.entries[i].average = slot.average->data;
      plan.tensors[i].average = average.unsafeGetTensorImpl();
    }
  }
}

void StepAverages::update_by_torch(const Plan& plan, const py::object& state, double weight) const {
  const at::NoGradGuard no_grad;
  for (const size_t i : by_torch_) {
    const at::Tensor& param = plan.param(i);
    const auto state_dict = py::reinterpret_borrow<py::object>(
        state[py::reinterpret_borrow<py::object>(plan.param_objects[i])]);
    PyObject* const held = find_item(state_dict.ptr(), state_keys().average);
    if (held == nullptr || !THPVariable_Check(held)) continue;
    const at::Tensor& average = resolve(held);
    if (weight == 1) {
      average.copy_(param);
    } else {
      average.lerp_(param, weight);
    }
  }
}

}  // namespace momentum_ext::binding
