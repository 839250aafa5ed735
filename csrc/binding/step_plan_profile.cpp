// What a profiler sees of a step.
#include "quantization.h"
#include "step_plan.h"

namespace momentum_ext::binding {

// The bytes that the prepared step must move: parameter, gradient and momentum buffer read (in a
// tensor's first step there is no buffer to read), parameter and buffer written, an average read
// and written, a master too, and the scales of 8-bit buffers. Tensors that torch updates are not
// counted.
int64_t StepPlan::bytes_to_move() const {
  int64_t bytes = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (tensors_[i].param == nullptr) continue;
    const TensorEntry& entry = entries_[i];
    int64_t per_element = 2 * itemsize(entry.param_dtype) + itemsize(entry.grad_dtype);
    if (entry.state[0] != nullptr) {
      per_element += (entry.is_first_step ? 1 : 2) * itemsize(entry.state_dtype[0]);
    }
    if (entry.average != nullptr) per_element += 2 * itemsize(entry.param_dtype);
    if (const LowPrecision* const low = entry.low_precision; low != nullptr) {
      if (low->master_kind != Master::kNone) {
        per_element += low->master_kind == Master::kRemainder ? 4 : 8;
      }
      if (low->scale[0] != nullptr)
        bytes += (entry.is_first_step ? 4 : 8) * num_scales(entry.numel);
    }
    bytes += per_element * entry.numel;
  }
  for (const auto* const slots : {&averaged_by_torch_, &without_average_}) {
    for (const size_t i : *slots) {
      if (tensors_[i].param == nullptr) continue;
      bytes += 2 * itemsize(entries_[i].param_dtype) * entries_[i].numel;
    }
  }
  return bytes;
}

void StepPlan::begin_range(std::optional<at::RecordFunction>& range) const {
  range.emplace(at::RecordScope::USER_SCOPE);
  if (!range->isActive()) return;
  range->before("FusedMomentum.step: " + std::to_string(bytes_to_move()) + " bytes");
}

}  // namespace momentum_ext::binding
