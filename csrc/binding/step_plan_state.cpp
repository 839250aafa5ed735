// What a slot's state must become before the step: in the formulation and the format that its group
// wants. What it is now, its dtypes, its keys and the group's "buffer_formulation" say.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <stdexcept>

#include "quantization.h"
#include "state_access.h"
#include "step_plan_turn.h"
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

}  // namespace

// What the next step would make of the state.
py::tuple StepPlan::pending_changes(const py::list& param_groups, const py::dict& state,
                                    bool moved_only) {
  const Turn turn(*this);
  py::list changes;
  py::list converted;
  if (is_prepared_) return py::make_tuple(changes, converted);  // in the middle of a step
  try {
    clear_step();
    compare(param_groups, state);
    for (size_t i = 0; i < slots_.size(); ++i) {
      const Slot& slot = slots_[i];
      if (slot.state_dict == nullptr || !THPVariable_Check(param_objects_[i]) || is_repeated(i)) {
        continue;
      }
      const at::Tensor& param = THPVariable_Unpack(param_objects_[i]);
      const auto add = [&](PyObject* key, const at::Tensor& tensor) {
        changes.append(py::make_tuple(
            py::reinterpret_borrow<py::object>(param_objects_[i]),
            py::reinterpret_borrow<py::object>(key),
            tensor.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor))
                             : py::object(py::none())));
      };
      const bool has_momentum = hyperparams_[slot.group].has_momentum && !moved_only;
      if (!has_momentum && find_buffer(slot) != nullptr &&
          slot.formulation != readers_[slot.group].buffer_formulation()) {
        const auto [key, tensor] = as_stored(slot);
        add(key, tensor);
      }
      if (moved_only) continue;
      const at::Tensor* const found = has_momentum ? find_buffer(slot) : nullptr;
      at::Tensor buffer = found == nullptr ? at::Tensor() : *found;
      for (const auto& [key, tensor] : plan_state(i, param, buffer).changes) {
        if (found == nullptr && tensor.defined()) continue;  // the first step makes it
        add(key, tensor);
      }
    }
    for (size_t g = 0; g < readers_.size(); ++g) {
      if (hyperparams_[g].has_momentum && !moved_only) converted.append(g);
    }
  } catch (...) {
    clear_step();
    throw;
  }
  clear_step();
  return py::make_tuple(changes, converted);
}

void StepPlan::adopt(const py::list& param_groups) {
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::dict group = param_groups[g];
    const Formulation formulation = read_buffer_formulation(group.ptr(), g);
    for (const py::handle param : group["params"]) formulation_of_[param.ptr()] = formulation;
  }
}

bool StepPlan::has_moved(const py::list& param_groups) const {
  std::unordered_map<PyObject*, Formulation> known = formulation_of_;
  for (size_t i = 0; i < slots_.size(); ++i) known[param_objects_[i]] = slots_[i].formulation;
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::dict group = param_groups[g];
    const Formulation stored = read_buffer_formulation(group.ptr(), g);
    for (const py::handle param : group["params"]) {
      const auto found = known.find(param.ptr());
      if (found != known.end() && found->second != stored) return true;
    }
  }
  return false;
}

// True for a parameter that an earlier slot has too.
bool StepPlan::is_repeated(size_t i) const {
  return std::any_of(repeated_.begin(), repeated_.end(),
                     [i](const auto& pair) { return pair.first == i; });
}

bool StepPlan::wants_conversion(size_t i) const {
  return slots_[i].formulation != readers_[slots_[i].group].formulation();
}

// What stands for a buffer, itself or its scales, written as the group says that it is.
std::pair<PyObject*, at::Tensor> StepPlan::as_stored(const Slot& slot) const {
  const at::NoGradGuard no_grad;
  const at::Tensor& buffer = *find_buffer(slot);
  const bool has_scale = is_8_bit(buffer.scalar_type());
  const at::Tensor value = has_scale ? find_scale(slot, buffer) : buffer;
  check_memory(value, "momentum_buffer of " + name_of(slot));
  const Formulation stored = readers_[slot.group].buffer_formulation();
  return {has_scale ? scale_key_ : buffer_key_,
          converted(slot, value, stored).to(value.scalar_type())};
}

// A buffer's values, or an 8-bit buffer's scales, in another formulation. Raises where there is no
// exact way.
at::Tensor StepPlan::converted(const Slot& slot, const at::Tensor& value,
                               Formulation wanted) const {
  const std::string edit = "param_groups[" + std::to_string(slot.group) +
                           "]['formulation'] changed from '" + to_string(slot.formulation) +
                           "' to '" + to_string(wanted) + "'";
  if (wanted == Formulation::kEma || slot.formulation == Formulation::kEma) {
    throw py::value_error(edit +
                          ": there is no exact conversion of the momentum buffers (only torch <-> "
                          "classical); undo it, or delete the optimizer's state to start from no "
                          "momentum");
  }
  const double lr = read_lr(groups_[slot.group], slot.group);
  if (lr == 0) {
    throw py::value_error(edit +
                          ": the momentum buffers are converted at the current lr, which is 0; "
                          "set lr first");
  }
  // A 16-bit number times lr would be a product with lr rounded to 16 bits.
  const bool is_16_bit = value.scalar_type() == at::kBFloat16 || value.scalar_type() == at::kHalf;
  const at::Tensor exact = is_16_bit ? value.to(at::kFloat) : value;
  return wanted == Formulation::kClassical ? exact.mul(lr) : exact.div(lr);
}

// What slot i needs; `buffer`, undefined if there is none, becomes the one to use. Raises, and
// writes nothing.
StepPlan::PlannedState StepPlan::plan_state(size_t i, const at::Tensor& param,
                                            at::Tensor& buffer) const {
  const at::NoGradGuard no_grad;
  const Slot& slot = slots_[i];
  PlannedState state;
  if (hyperparams_[slot.group].has_momentum) plan_buffer(i, param, buffer, state);
  const std::optional<int16_t> device = kernel_device(param);
  if (device.has_value() && kernel_dtype(param.scalar_type())) plan_master(slot, param, state);
  if (!state.changes.empty() && device.value_or(kCpu) != kCpu && is_capturing(*device)) {
    throw std::runtime_error(
        name_of(slot) +
        ": its state is not stored yet as its group says (formulation, momentum_dtype, "
        "master_weights), and step() is being captured into a CUDA graph, whose replays would each "
        "convert it; run one step before the capture");
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
  check_memory(*scale, "momentum_scale of " + name_of(slot));
  return *scale;
}

void StepPlan::plan_buffer(size_t i, const at::Tensor& param, at::Tensor& buffer,
                           PlannedState& state) const {
  const Slot& slot = slots_[i];
  const Storage& wanted = readers_[slot.group].storage();
  if (param.is_complex() && wanted.momentum_dtype.has_value()) {
    throw py::value_error(name_of(slot) +
                          ": it is complex, and momentum_dtype is for real parameters; put it into "
                          "a group with momentum_dtype=None");
  }
  const bool is_plain = kernel_device(param).has_value() && kernel_dtype(param.scalar_type());
  const at::ScalarType dtype = wanted.dtype_of_buffer(param);
  if (!buffer.defined()) {
    if (!is_plain || dtype == param.scalar_type()) return;  // as torch makes it
    buffer = empty_dense_like(param, dtype);
    if (is_8_bit(dtype)) {
      state.scale = at::empty({num_scales(param.numel())}, param.options().dtype(at::kFloat));
      state.changes.emplace_back(scale_key_, state.scale);
    }
    return;
  }
  check_memory(buffer, "momentum_buffer of " + name_of(slot));
  const Formulation formulation = readers_[slot.group].formulation();
  const bool converts = wants_conversion(i) && !is_repeated(i);
  const bool was_8_bit = is_8_bit(buffer.scalar_type());
  const bool is_ours = is_plain && kernel_device(buffer) == kernel_device(param) &&
                       buffer.sizes() == param.sizes() &&
                       (was_8_bit || kernel_dtype(buffer.scalar_type()).has_value()) &&
                       buffer.is_complex() == param.is_complex();
  if (!is_ours) {  // examine() has a word for what is wrong, and torch's path for its format
    if (!converts || was_8_bit) return;
    buffer = converted(slot, buffer, formulation).to(buffer.scalar_type());
    state.changes.emplace_back(buffer_key_, buffer);
    return;
  }
  if (was_8_bit) state.scale = find_scale(slot, buffer);
  const bool keeps_format =
      buffer.scalar_type() == dtype && (!was_8_bit || is_dense_like(buffer, param));
  if (keeps_format && !converts) return;
  if (keeps_format && was_8_bit) {
    state.scale = converted(slot, state.scale, formulation);
    state.changes.emplace_back(scale_key_, state.scale);
    return;
  }
  if (was_8_bit && !buffer.is_non_overlapping_and_dense()) {
    throw std::runtime_error("momentum_buffer of " + name_of(slot) +
                             ": its elements do not lie without gaps, so its blocks of 256 cannot "
                             "be told; delete it from the optimizer's state to start from no "
                             "momentum");
  }
  at::Tensor value = was_8_bit ? dequantize(buffer, state.scale) : buffer;
  if (converts) value = converted(slot, value, formulation);
  state.scale = at::Tensor();
  if (is_8_bit(dtype)) {
    std::tie(buffer, state.scale) = quantize(value, dtype, param);
    state.changes.emplace_back(scale_key_, state.scale);
  } else {
    buffer = keeps_format ? value.to(dtype) : empty_dense_like(param, dtype).copy_(value);
    if (was_8_bit) state.changes.emplace_back(scale_key_, at::Tensor());
  }
  state.changes.emplace_back(buffer_key_, buffer);
}

void StepPlan::plan_master(const Slot& slot, const at::Tensor& param, PlannedState& state) const {
  const bool is_wanted = readers_[slot.group].storage().has_master(param);
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
    check_memory(param, name_of(slot));
    state.master = empty_dense_like(param, dtype);
    is_split ? state.master.zero_() : state.master.copy_(param.detach());
    state.changes.emplace_back(key, state.master);
    return;
  }
  const std::string name =
      std::string(is_split ? "param_remainder" : "master_param") + " of " + name_of(slot);
  if (found->scalar_type() != dtype || found->sizes() != param.sizes() ||
      kernel_device(*found) != kernel_device(param)) {
    throw std::runtime_error(name + ": expected " + std::string(c10::toString(dtype)) +
                             " of its parameter's shape and on its device, got " +
                             describe(*found) +
                             "; delete it from the optimizer's state to go on from the parameter");
  }
  check_memory(*found, name);
  state.master = *found;
  if (is_dense_like(*found, param)) return;
  state.master = empty_dense_like(param, dtype).copy_(*found);
  state.changes.emplace_back(key, state.master);
}

}  // namespace momentum_ext::binding
