#include "low_precision.h"

#include <algorithm>
#include <stdexcept>

#include "operands.h"

namespace momentum_ext::binding {
namespace {

bool rounds_at_random(const TensorEntry& entry, const Hyperparams<Sgd>& h) {
  if (entry.low_precision == nullptr || !h.stochastic_rounding) return false;
  const bool has_master = entry.low_precision->master_kind != Master::kNone;
  return (itemsize(entry.param_dtype) == 2 && !has_master) ||
         (h.has_momentum && itemsize(entry.state_dtype[0]) <= 2);
}

c10::TensorImpl* impl_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.unsafeGetTensorImpl() : nullptr;
}

}  // namespace

void attach_companions(Plan& plan, size_t i, const at::Tensor& param, const StartingState& start) {
  Slot& slot = plan.slots[i];
  const bool is_random = plan.hyperparams_of(slot).stochastic_rounding;
  plan.companion_tensors[i] = {impl_of(start.master), impl_of(start.scale)};
  if (!start.master.defined() && !start.scale.defined() && !is_random) return;
  const bool is_split = param.scalar_type() == at::kBFloat16;
  const StateKeys& keys = state_keys();
  slot.companions = std::make_unique<Companions>();
  slot.companions->master = {is_split ? keys.remainder : keys.master, start.master};
  slot.companions->scale = {keys.scale, start.scale};
  slot.has_companions = true;
  plan.has_low_precision = true;
  LowPrecision& low = plan.low_precision[i];
  low.master = start.master.defined() ? mutable_data_of(start.master) : nullptr;
  low.scale[0] =
      start.scale.defined() ? static_cast<float*>(mutable_data_of(start.scale)) : nullptr;
  low.tensor = static_cast<uint32_t>(i);
  low.master_kind = !start.master.defined() ? Master::kNone
                    : is_split              ? Master::kRemainder
                                            : Master::kCopy;
  plan.entries[i].low_precision = &low;
}

bool find_companions(Plan& plan, size_t i) noexcept {
  const Slot& slot = plan.slots[i];
  const auto find = [&](const Companion& companion, c10::TensorImpl*& tensor) {
    if (companion.key == nullptr) return true;
    tensor = companion.find(slot.state_dict, slot.keys, slot.device);
    return tensor != nullptr;
  };
  return find(slot.companions->master, plan.companion_tensors[i].master) &&
         find(slot.companions->scale, plan.companion_tensors[i].scale);
}

void refuse_random_capture(const Plan& plan, const std::vector<DeviceShare>& shares) {
  const bool may_be_random =
      std::any_of(plan.hyperparams.begin(), plan.hyperparams.end(),
                  [](const Hyperparams<Sgd>& each) { return each.stochastic_rounding; });
  for (const DeviceShare& share : shares) {
    if (!may_be_random || !is_capturing(share.device)) continue;
    for (size_t i = 0; i < plan.slots.size(); ++i) {
      const TensorEntry& entry = plan.entries[i];
      if (entry.numel == 0 || entry.device != share.device) continue;
      if (!rounds_at_random(entry, plan.hyperparams_of(plan.slots[i]))) continue;
      throw std::runtime_error(
          plan.slots[i].name() +
          ": stochastic_rounding, and step() is being captured into a CUDA graph, whose replays "
          "would each use the same random numbers; keep step() out of the graph, or set "
          "stochastic_rounding=False");
    }
  }
}

}  // namespace momentum_ext::binding
