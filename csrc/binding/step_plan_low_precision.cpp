// Slots with low-precision state: what the kernels read of it, what each step compares, and random
// rounding in a captured graph.
#include <algorithm>
#include <stdexcept>

#include "state_access.h"
#include "step_plan.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

bool rounds_at_random(const TensorEntry& entry, const Hyperparams<Sgd>& h) {
  if (entry.low_precision == nullptr || !h.stochastic_rounding) return false;
  const bool has_master = entry.low_precision->master_kind != Master::kNone;
  return (itemsize(entry.param_dtype) == 2 && !has_master) ||
         (h.has_momentum && itemsize(entry.state_dtype[0]) <= 2);
}

}  // namespace

// After examine(): what the kernels read, and what the next step compares.
void StepPlan::attach_low_precision(size_t i, const at::Tensor& param, const PlannedState& state) {
  const bool is_random = hyperparams_[slots_[i].group].stochastic_rounding;
  if (!state.master.defined() && !state.scale.defined() && !is_random) return;
  Slot& slot = slots_[i];
  const auto data = [](const at::Tensor& tensor) -> void* {
    return tensor.defined() ? mutable_data_of(*tensor.unsafeGetTensorImpl(), tensor.element_size())
                            : nullptr;
  };
  const auto known = [&](PyObject* key, const at::Tensor& tensor) -> Known {
    if (!tensor.defined()) return {};
    return {key, data(tensor), tensor.dtype(), shape_of(tensor)};
  };
  const bool is_split = param.scalar_type() == at::kBFloat16;
  any_low_precision_ = true;
  LowPrecision& low = low_precision_[i];
  low.master = data(state.master);
  low.scale[0] = static_cast<float*>(data(state.scale));
  low.tensor = static_cast<uint32_t>(i);
  low.master_kind = !state.master.defined() ? Master::kNone
                    : is_split              ? Master::kRemainder
                                            : Master::kCopy;
  slot.known = std::make_unique<KnownState>();
  slot.has_known = true;
  slot.known->master = known(is_split ? remainder_key_ : master_key_, state.master);
  slot.known->scale = known(scale_key_, state.scale);
  more_tensors_[i].master = state.master.defined() ? state.master.unsafeGetTensorImpl() : nullptr;
  more_tensors_[i].scale = state.scale.defined() ? state.scale.unsafeGetTensorImpl() : nullptr;
  entries_[i].low_precision = &low;
}

// Once all slots are prepared.
void StepPlan::refuse_random_capture() const {
  const bool may_be_random =
      std::any_of(hyperparams_.begin(), hyperparams_.end(),
                  [](const Hyperparams<Sgd>& each) { return each.stochastic_rounding; });
  for (const DeviceShare& share : shares_) {
    if (!may_be_random || !is_capturing(share.device)) continue;
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (entries_[i].numel == 0 || entries_[i].device != share.device) continue;
      if (!rounds_at_random(entries_[i], hyperparams_[slots_[i].group])) continue;
      throw std::runtime_error(
          name_of(slots_[i]) +
          ": stochastic_rounding, and step() is being captured into a CUDA graph, whose replays "
          "would each use the same random numbers; keep step() out of the graph, or set "
          "stochastic_rounding=False");
    }
  }
}

// In a step's quick look: true when the slot's further tensors are as they were.
bool StepPlan::find_known(size_t i) noexcept {
  const Slot& slot = slots_[i];
  const auto find = [&](const Known& known, c10::TensorImpl*& tensor) {
    if (known.key == nullptr) return true;
    PyObject* const value = find_item(slot.state_dict, known.key);
    if (value == nullptr || !THPVariable_CheckTypeExact(Py_TYPE(value))) return false;
    tensor = THPVariable_Unpack(value).unsafeGetTensorImpl();
    const auto itemsize = static_cast<int64_t>(known.dtype.itemsize());
    try {
      return tensor->key_set() == slot.keys && tensor->dtype() == known.dtype &&
             same_shape(known.shape, *tensor) && !is_lazy_copy(*tensor) &&
             const_data_of(*tensor, itemsize) == known.data &&
             (slot.device == kCpu || tensor->device().index() == slot.device) &&
             lies_in_storage(
                 *tensor, static_cast<const char*>(known.data) + num_bytes(known.shape, itemsize));
    } catch (...) {
      return false;
    }
  };
  return find(slot.known->master, more_tensors_[i].master) &&
         find(slot.known->scale, more_tensors_[i].scale);
}

}  // namespace momentum_ext::binding
