// Slots whose state is stored in fewer bits, or in more, than torch.optim.SGD would: what they
// need, what must be converted for it, and the errors.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <stdexcept>

#include "quantization.h"
#include "state_access.h"
#include "step_plan.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

std::string describe(const at::Tensor& tensor) {
  std::string shape;
  for (const int64_t size : tensor.sizes())
    shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  return std::string(c10::toString(tensor.scalar_type())) + " [" + shape + "] on " +
         tensor.device().str();
}

bool is_16_bit(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

bool rounds_at_random(const TensorEntry& entry, const Hyperparams& h) {
  if (entry.low_precision == nullptr || !h.stochastic_rounding) return false;
  const bool has_master = entry.low_precision->master_kind != Master::kNone;
  return (itemsize(entry.param_dtype) == 2 && !has_master) ||
         (h.has_momentum && itemsize(entry.buffer_dtype) <= 2);
}

}  // namespace

// False for what torch.optim.SGD would have, too.
bool StepPlan::has_low_precision(const Slot& slot, const at::Tensor& buffer) const {
  if (!readers_[slot.group].storage().is_default() || !slot.storage.is_default()) return true;
  if (buffer.defined() && is_8_bit(buffer.scalar_type())) return true;
  return find_state(slot, remainder_key_) != nullptr || find_state(slot, master_key_) != nullptr;
}

// What slot i needs; `buffer` becomes the one to use. Raises, and writes nothing.
StepPlan::LowPrecisionState StepPlan::plan_low_precision(size_t i, const at::Tensor& param,
                                                         at::Tensor& buffer) const {
  const at::NoGradGuard no_grad;
  const Slot& slot = slots_[i];
  const Storage& wanted = readers_[slot.group].storage();
  if (param.is_complex() && wanted.momentum_dtype.has_value()) {
    throw py::value_error(name_of(slot) +
                          ": it is complex, and momentum_dtype is for real parameters; put it into "
                          "a group with momentum_dtype=None");
  }
  LowPrecisionState state;
  const std::optional<int16_t> device = kernel_device(param);
  if (!device.has_value() || !kernel_dtype(param.scalar_type())) return state;
  if (hyperparams_[slot.group].has_momentum) plan_buffer(slot, param, buffer, state);
  plan_master(slot, param, state);
  if (!state.changes.empty() && *device != kCpu && is_capturing(*device)) {
    throw std::runtime_error(
        name_of(slot) +
        ": its state is not stored yet as momentum_dtype and master_weights say, and step() is "
        "being captured into a CUDA graph, whose replays would each convert it; run one step "
        "before the capture");
  }
  return state;
}

// The scales of a buffer of 8 bits.
at::Tensor StepPlan::find_scale(const Slot& slot, const at::Tensor& buffer) const {
  const at::Tensor* const scale = find_state(slot, scale_key_);
  const int64_t count = num_scales(buffer.numel());
  const std::string remedy =
      "; delete \"momentum_buffer\" from the optimizer's state to start from no momentum";
  if (scale == nullptr) {
    throw std::runtime_error("momentum_buffer of " + name_of(slot) + ": it is " +
                             std::string(c10::toString(buffer.scalar_type())) +
                             " and there is no \"momentum_scale\" beside it" + remedy);
  }
  if (scale->scalar_type() != at::kFloat || scale->dim() != 1 || scale->size(0) != count ||
      !scale->is_contiguous() || kernel_device(*scale) != kernel_device(buffer)) {
    throw std::runtime_error("momentum_scale of " + name_of(slot) + ": expected Float [" +
                             std::to_string(count) + "] on " + buffer.device().str() + ", got " +
                             describe(*scale) + remedy);
  }
  return *scale;
}

void StepPlan::plan_buffer(const Slot& slot, const at::Tensor& param, at::Tensor& buffer,
                           LowPrecisionState& state) const {
  const Storage& wanted = readers_[slot.group].storage();
  const bool is_new = !buffer.defined();
  const bool was_8_bit = !is_new && is_8_bit(buffer.scalar_type());
  // Without a wish a buffer stays as it was found, unless the wish was taken back or was 8 bits,
  // which a buffer is by wish alone.
  at::ScalarType dtype = param.scalar_type();
  if (wanted.momentum_dtype.has_value()) {
    dtype = *wanted.momentum_dtype;
  } else if (!is_new && !was_8_bit && !slot.storage.momentum_dtype.has_value()) {
    dtype = buffer.scalar_type();
  }
  if (is_new) {
    buffer = empty_dense_like(param, dtype);
    if (is_8_bit(dtype)) {
      state.scale = at::empty({num_scales(param.numel())}, param.options().dtype(at::kFloat));
      state.changes.emplace_back(scale_key_, state.scale);
    }
    return;
  }
  const bool is_plain =
      kernel_device(buffer) == kernel_device(param) && buffer.sizes() == param.sizes() &&
      (was_8_bit || kernel_dtype(buffer.scalar_type()).has_value()) && !buffer.is_complex();
  if (!is_plain) return;  // examine() has a word for it
  if (was_8_bit) state.scale = find_scale(slot, buffer);
  if (buffer.scalar_type() == dtype && (!was_8_bit || is_dense_like(buffer, param))) return;
  if (was_8_bit && !buffer.is_non_overlapping_and_dense()) {
    throw std::runtime_error("momentum_buffer of " + name_of(slot) +
                             ": its elements do not lie without gaps, so its blocks of 256 cannot "
                             "be told; delete it from the optimizer's state to start from no "
                             "momentum");
  }
  const at::Tensor value = was_8_bit ? dequantize(buffer, state.scale) : buffer;
  state.scale = at::Tensor();
  if (is_8_bit(dtype)) {
    std::tie(buffer, state.scale) = quantize(value, dtype, param);
    state.changes.emplace_back(scale_key_, state.scale);
  } else {
    buffer = empty_dense_like(param, dtype).copy_(value);
    if (was_8_bit) state.changes.emplace_back(scale_key_, at::Tensor());
  }
  state.changes.emplace_back(buffer_key_, buffer);
}

void StepPlan::plan_master(const Slot& slot, const at::Tensor& param,
                           LowPrecisionState& state) const {
  const bool is_wanted = readers_[slot.group].storage().master_weights && is_16_bit(param);
  const bool is_split = param.scalar_type() == at::kBFloat16;
  PyObject* const key = is_split ? remainder_key_ : master_key_;
  for (PyObject* const other : {remainder_key_, master_key_}) {
    if ((is_wanted && other == key) || find_state(slot, other) == nullptr) continue;
    state.changes.emplace_back(other, at::Tensor());
  }
  if (!is_wanted) return;
  const at::ScalarType dtype = is_split ? at::kShort : at::kFloat;
  const at::Tensor* const found = find_state(slot, key);
  if (found == nullptr) {
    state.master = empty_dense_like(param, dtype);
    is_split ? state.master.zero_() : state.master.copy_(param.detach());
    state.changes.emplace_back(key, state.master);
    return;
  }
  if (found->scalar_type() != dtype || found->sizes() != param.sizes() ||
      kernel_device(*found) != kernel_device(param) ||
      !lies_in_storage(*found->unsafeGetTensorImpl(), byte_range(*found).end)) {
    throw std::runtime_error(std::string(is_split ? "param_remainder" : "master_param") + " of " +
                             name_of(slot) + ": expected " + std::string(c10::toString(dtype)) +
                             " of its parameter's shape and on its device, got " +
                             describe(*found) +
                             "; delete it from the optimizer's state to go on from the parameter");
  }
  state.master = *found;
  if (is_dense_like(*found, param)) return;
  state.master = empty_dense_like(param, dtype).copy_(*found);
  state.changes.emplace_back(key, state.master);
}

// After examine(): what the kernels read, and what the next step compares.
void StepPlan::attach_low_precision(size_t i, const at::Tensor& param,
                                    const LowPrecisionState& state) {
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
  low.scale = static_cast<float*>(data(state.scale));
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
  const bool needed = state.master.defined() || state.scale.defined() ||
                      hyperparams_[slot.group].stochastic_rounding;
  entries_[i].low_precision = needed ? &low : nullptr;
}

// Once all slots are prepared.
void StepPlan::refuse_random_capture() const {
  const bool may_be_random =
      std::any_of(hyperparams_.begin(), hyperparams_.end(),
                  [](const Hyperparams& each) { return each.stochastic_rounding; });
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
