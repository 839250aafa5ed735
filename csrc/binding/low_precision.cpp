#include "low_precision.h"

#include <algorithm>

#include "operands.h"

namespace momentum_ext::binding {
namespace {

bool rounds_at_random(const TensorEntry& entry, int num_states, const Storage& storage) {
  if (entry.low_precision == nullptr) return false;
  const Master master = entry.low_precision->master_kind;
  if (master == Master::kByteRemainder && storage.rounds_masters) return true;
  bool random = itemsize(entry.param_dtype) == 2 && master == Master::kNone;
  for (int k = 0; k < num_states; ++k) random = random || itemsize(entry.state_dtype[k]) <= 2;
  return random && storage.stochastic_rounding;
}

c10::TensorImpl* impl_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.unsafeGetTensorImpl() : nullptr;
}

}  // namespace

Master kind_of_master(at::ScalarType dtype) {
  if (dtype == at::kChar) return Master::kByteRemainder;
  return dtype == at::kShort ? Master::kRemainder : Master::kCopy;
}

void attach_companions(Plan& plan, size_t i, const at::Tensor& param, const StartingState& start) {
  Slot& slot = plan.slots[i];
  Plan::CompanionTensors& tensors = plan.companion_tensors[i];
  const Storage& storage = plan.reader(slot).storage();
  bool has_any = start.master.defined() || storage.stochastic_rounding;
  tensors.master = impl_of(start.master);
  for (int k = 0; k < slot.num_states; ++k) {
    tensors.scales[k] = impl_of(start.scales[k]);
    has_any = has_any || start.scales[k].defined();
  }
  if (!has_any) return;
  const bool is_split = param.scalar_type() == at::kBFloat16;
  slot.companions = std::make_unique<Companions>();
  slot.companions->master = {is_split ? state_keys().remainder : state_keys().master, start.master};
  slot.has_companions = true;
  plan.has_low_precision = true;
  LowPrecision& low = plan.low_precision[i];
  low = {};
  for (int k = 0; k < slot.num_states; ++k) {
    slot.companions->scales[k] = {plan.rule->scale_keys[k], start.scales[k]};
    if (!start.scales[k].defined()) continue;
    low.scale[k] = static_cast<ScaleBits*>(mutable_data_of(start.scales[k]));
  }
  if (start.master.defined()) {
    low.master = mutable_data_of(start.master);
    low.master_kind = kind_of_master(start.master.scalar_type());
  }
  low.param_index = static_cast<uint32_t>(i);
  plan.entries[i].low_precision = &low;
  if (rounds_at_random(plan.entries[i], slot.num_states, storage)) {
    low.place = place_in_whole(plan.param_objects[i], [&slot] { return slot.name(); });
  }
}

bool find_companions(Plan& plan, size_t i) noexcept {
  const Slot& slot = plan.slots[i];
  const auto find = [&](const Companion& companion, const PyObject* spec,
                        c10::TensorImpl*& tensor) {
    if (companion.key == nullptr) return true;
    tensor = companion.find(slot.state_dict, spec, slot.keys, slot.device);
    return tensor != nullptr;
  };
  Plan::CompanionTensors& tensors = plan.companion_tensors[i];
  const PyObject* const spec = slot.specs != nullptr ? slot.specs->master.ptr() : nullptr;
  bool same = find(slot.companions->master, spec, tensors.master);
  for (int k = 0; same && k < slot.num_states; ++k) {
    same = find(slot.companions->scales[k], nullptr, tensors.scales[k]);
  }
  return same;
}

void count_for_rounding(Plan& plan, std::vector<DeviceShare>& shares) {
  const bool may_be_random =
      std::any_of(plan.readers.begin(), plan.readers.end(),
                  [](const GroupReader& reader) { return reader.storage().is_random(); });
  for (DeviceShare& share : shares) {
    share.rounding_step = plan.rounding_steps.on(share.device, may_be_random, plan.rounding_step);
  }
}

}  // namespace momentum_ext::binding
