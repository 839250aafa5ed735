// What a profiler sees of a step.
#include "prepared_step.h"
#include "state_layout.h"

namespace momentum_ext::binding {

int64_t bytes_to_move(const Plan& plan, const StepAverages& averages) {
  int64_t bytes = 0;
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    if (plan.tensors[i].param == nullptr) continue;
    const TensorEntry& entry = plan.entries[i];
    int64_t per_element = 2 * itemsize(entry.param_dtype) + itemsize(entry.grad_dtype);
    for (int k = 0; k < plan.slots[i].num_states; ++k) {
      // In a tensor's first step there is no state to read.
      bytes += (entry.is_first_step ? 1 : 2) * num_bytes(entry.state_dtype[k], entry.numel);
    }
    if (entry.average != nullptr) per_element += 2 * itemsize(entry.param_dtype);
    if (const LowPrecision* const low = entry.low_precision; low != nullptr) {
      const Master master = low->master_kind;
      per_element += master == Master::kNone            ? 0
                     : master == Master::kByteRemainder ? 2
                     : master == Master::kRemainder     ? 4
                                                        : 8;
      for (const ScaleBits* const scale : low->scale) {
        if (scale != nullptr) bytes += (entry.is_first_step ? 2 : 4) * num_scales(entry.numel);
      }
    }
    bytes += per_element * entry.numel;
  }
  for (const size_t i : averages.by_torch()) {
    if (plan.tensors[i].param == nullptr) continue;
    bytes += 2 * itemsize(plan.entries[i].param_dtype) * plan.entries[i].numel;
  }
  return bytes;
}

}  // namespace momentum_ext::binding
