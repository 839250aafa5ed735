// Momentum buffers whose group names another formulation than the one they were computed in.
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "step_plan_turn.h"

namespace momentum_ext::binding {

void StepPlan::adopt_formulations(const py::list& param_groups) {
  const Turn turn(*this);
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::dict group = param_groups[g];
    const Formulation formulation = read_formulation(group.ptr(), g);
    const Storage storage = read_storage(group.ptr(), g);
    for (const py::handle param : group["params"]) stored_as_[param.ptr()] = {formulation, storage};
  }
}

void StepPlan::convert(const py::list& param_groups, const py::dict& state) {
  const Turn turn(*this);
  if (is_prepared_) return;  // in the middle of a step, which will do it
  try {
    clear_step();
    state_ = state;
    const bool same_groups = read_groups(param_groups, 1.0);
    if (!same_groups || !read_state(state_.ptr())) rebuild(state_.ptr());
    for (size_t i = 0; i < slots_.size(); ++i) plan_conversion(i);
    convert_prepared();
    // What was loaded counts as stored in its group's way, so that the option can be taken back.
    for (Slot& slot : slots_) {
      if (slot.path == Path::kUnknown) slot.storage = readers_[slot.group].storage();
    }
    clear_step();
  } catch (...) {
    clear_step();
    throw;
  }
}

// Notes what must be done to slot i's buffer, if anything; raises where nothing exact can be done.
void StepPlan::plan_conversion(size_t i) {
  Slot& slot = slots_[i];
  const Formulation wanted = readers_[slot.group].formulation();
  if (slot.formulation == wanted) return;
  const at::Tensor* const buffer = find_buffer(slot);
  if (buffer == nullptr) {
    slot.formulation = wanted;
    return;
  }
  const std::string edit = "param_groups[" + std::to_string(slot.group) +
                           "]['formulation'] changed from '" + to_string(slot.formulation) +
                           "' to '" + to_string(wanted) + "'";
  if (wanted == Formulation::kEma || slot.formulation == Formulation::kEma) {
    throw py::value_error(edit +
                          ": there is no exact conversion of the momentum buffers (only torch <-> "
                          "classical); undo it, or delete the optimizer's state to start from no "
                          "momentum");
  }
  if (!readers_[slot.group].in_train_mode()) {
    throw py::value_error(edit +
                          " while optimizer.eval() holds the iterate; call optimizer.train() "
                          "first (of a checkpoint: before it is saved)");
  }
  const double lr = read_lr(groups_[slot.group], slot.group);
  if (lr == 0) {
    throw py::value_error(edit +
                          ": the momentum buffers are converted at the current lr, which is 0; "
                          "set lr first");
  }
  at::Tensor factor_of = *buffer;  // what the buffer's values are multiples of
  if (is_8_bit(buffer->scalar_type())) factor_of = find_scale(slot, *buffer);
  conversions_.push_back({is_repeated(i) ? at::Tensor() : factor_of, lr, i});
}

// True for a parameter that an earlier slot has too.
bool StepPlan::is_repeated(size_t i) const {
  return std::any_of(repeated_.begin(), repeated_.end(),
                     [i](const auto& pair) { return pair.first == i; });
}

void StepPlan::begin_torch_step() {
  make_averages();
  convert_prepared();
}

void StepPlan::convert_prepared() {
  const at::NoGradGuard no_grad;
  while (!conversions_.empty()) {
    Conversion& conversion = conversions_.back();
    Slot& slot = slots_[conversion.slot];
    const Formulation wanted = readers_[slot.group].formulation();
    if (slot.formulation != wanted) {
      if (!conversion.buffer.defined()) {
        // The same parameter once more.
      } else if (wanted == Formulation::kClassical) {
        conversion.buffer.mul_(conversion.lr);
      } else {
        conversion.buffer.div_(conversion.lr);
      }
      slot.formulation = wanted;
    }
    conversions_.pop_back();
  }
}

}  // namespace momentum_ext::binding
