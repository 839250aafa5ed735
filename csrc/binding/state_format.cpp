#include "state_format.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "operands.h"
#include "quantization.h"

namespace momentum_ext::binding {
namespace {

std::string name_of_key(PyObject* key) { return PyUnicode_AsUTF8(key); }

std::string describe(const at::Tensor& tensor) {
  std::string shape;
  for (const int64_t size : tensor.sizes()) {
    shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  }
  return std::string(c10::toString(tensor.scalar_type())) + " [" + shape + "] on " +
         tensor.device().str();
}

// A buffer's values in another formulation. Raises where there is no exact way.
at::Tensor converted(const SlotState& state, const at::Tensor& value, Formulation wanted) {
  const Slot& slot = state.slot();
  const std::string edit = "param_groups[" + std::to_string(slot.group) +
                           "]['formulation'] changed from '" + to_string(slot.formulation) +
                           "' to '" + to_string(wanted) + "'";
  if (wanted == Formulation::kEma || slot.formulation == Formulation::kEma) {
    throw py::value_error(edit +
                          ": there is no exact conversion of the momentum buffers (only torch <-> "
                          "classical); undo it, or delete the optimizer's state to start from no "
                          "momentum");
  }
  const double lr = read_lr(state.plan.groups[slot.group], slot.group);
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

// The scales of a state k in blocks.
at::Tensor find_scale(const SlotState& state, int k, const at::Tensor& buffer) {
  PyObject* const key = state.plan.rule->scale_keys[k];
  const at::Tensor* const scale = state.find(key);
  const std::string remedy = "; delete \"" + name_of_key(state.plan.rule->state_keys[k]) +
                             "\" from the optimizer's state to start from no momentum";
  if (scale == nullptr) {
    throw std::runtime_error(state.name_of(operand_of_state(k)) + ": it is " +
                             std::string(c10::toString(buffer.scalar_type())) +
                             " and there is no \"" + name_of_key(key) + "\" beside it" + remedy);
  }
  const auto name = [&] { return state.name_of(key); };
  const bool non_negative = state.plan.rule->state_is_non_negative[k];
  const bool is_old = is_old_scale(*scale, buffer) && !non_negative;
  if ((!is_scale(*scale, buffer, non_negative) && !is_old) || !scale->is_contiguous() ||
      kernel_device(*scale) != kernel_device(buffer)) {
    const at::Tensor wanted =
        at::empty(scale_sizes(buffer, non_negative), buffer.options().dtype(at::kByte));
    throw std::runtime_error(name() + ": expected " + describe(wanted) + ", got " +
                             describe(*scale) + remedy);
  }
  check_memory(*scale, name);
  return *scale;
}

// False for scales of version 0.1.0, and at an odd address.
bool is_read_by_kernels(const at::Tensor& scale) {
  const auto address = reinterpret_cast<uintptr_t>(scale.const_data_ptr());
  return scale.scalar_type() == at::kByte && address % alignof(ScaleBits) == 0;
}

// A state for a first step, where it is not as torch makes it.
void make_state(const SlotState& state, StartingState& start, int k, const at::Tensor& param,
                at::ScalarType dtype) {
  const bool non_negative = state.plan.rule->state_is_non_negative[k];
  start.states[k] = empty_state_like(param, dtype, non_negative);
  if (!has_blocks(dtype)) return;
  start.scales[k] =
      at::empty(scale_sizes(start.states[k], non_negative), param.options().dtype(at::kByte));
  start.changes.emplace_back(state.plan.rule->scale_keys[k], start.scales[k]);
}

// A state that the kernels take, in the group's formulation and format.
void convert_state(const SlotState& state, StartingState& start, int k, const at::Tensor& param,
                   at::ScalarType dtype, bool converts) {
  at::Tensor& value = start.states[k];
  at::Tensor& scale = start.scales[k];
  PyObject* const scale_key = state.plan.rule->scale_keys[k];
  const Formulation formulation = state.reader().formulation();
  const bool non_negative = state.plan.rule->state_is_non_negative[k];
  const bool had_blocks = has_blocks(value.scalar_type());
  if (had_blocks) scale = find_scale(state, k, value);
  const bool keeps_format =
      value.scalar_type() == dtype &&
      (!had_blocks || (lies_beside(value, param, non_negative) && is_read_by_kernels(scale)));
  if (keeps_format && !converts) return;
  if (had_blocks && !value.is_non_overlapping_and_dense()) {
    throw std::runtime_error(state.name_of(operand_of_state(k)) +
                             ": its elements do not lie without gaps, so its blocks cannot "
                             "be told; delete it from the optimizer's state to start from no "
                             "momentum");
  }
  at::Tensor exact = had_blocks ? dequantize(value, scale, param.sizes(), non_negative) : value;
  if (converts) exact = converted(state, exact, formulation);
  scale = at::Tensor();
  if (has_blocks(dtype)) {
    std::tie(value, scale) = quantize(exact, dtype, param, non_negative);
    start.changes.emplace_back(scale_key, scale);
  } else {
    value = keeps_format ? exact.to(dtype) : empty_state_like(param, dtype).copy_(exact);
    if (had_blocks) start.changes.emplace_back(scale_key, at::Tensor());
  }
  start.changes.emplace_back(state.plan.rule->state_keys[k], value);
}

void start_state(const SlotState& state, StartingState& start, int k, const at::Tensor& param) {
  const Slot& slot = state.slot();
  at::Tensor& value = start.states[k];
  const Storage& wanted = state.reader().storage();
  if (param.is_complex() && wanted.state_dtype[k].has_value()) {
    throw py::value_error(slot.name() +
                          ": it is complex, and momentum_dtype and state_dtype are for real "
                          "parameters; put it into a group without");
  }
  const bool is_plain = kernel_device(param).has_value() && kernel_dtype(param.scalar_type());
  const bool non_negative = state.plan.rule->state_is_non_negative[k];
  const auto asked = wanted.state_dtype[k];
  if (non_negative && (asked == kPacked || asked == at::kHalf || asked == at::kFloat8_e4m3fn)) {
    throw py::value_error(state.name_of(operand_of_state(k)) +
                          ": int4, float16 and float8_e4m3fn would store small values as 0, whose "
                          "steps would be wild; use int8, bfloat16 or float32");
  }
  const at::ScalarType dtype = wanted.dtype_of_state(k, param, non_negative);
  if (!value.defined()) {
    if (is_plain && dtype != param.scalar_type()) make_state(state, start, k, param, dtype);
    return;
  }
  check_memory(value, [&] { return state.name_of(operand_of_state(k)); });
  const bool converts = state.plan.wants_conversion(slot) && !slot.is_repeated;
  const bool is_quantized = is_plain && has_blocks(value.scalar_type());
  const bool is_ours = is_plain && kernel_device(value) == kernel_device(param) &&
                       has_sizes_beside(value, param, non_negative) &&
                       (is_quantized || kernel_dtype(value.scalar_type()).has_value()) &&
                       value.is_complex() == param.is_complex();
  if (is_ours) return convert_state(state, start, k, param, dtype, converts);
  // check_operands() has a word for what is wrong, and torch's path for its format.
  if (!converts || is_quantized) return;
  value = converted(state, value, state.reader().formulation()).to(value.scalar_type());
  start.changes.emplace_back(state.plan.rule->state_keys[k], value);
}

// A remainder that goes with the parameter as it is, in 16 bits or in 8, to nearest.
at::Tensor converted_remainder(const at::Tensor& remainder, at::ScalarType dtype) {
  if (dtype == at::kShort) return remainder.to(at::kShort).mul(256);
  return remainder.to(at::kInt).add(128).div(256, "floor").clamp(-128, 127).to(at::kChar);
}

void start_master(const SlotState& state, StartingState& start, const at::Tensor& param) {
  const StateKeys& keys = state_keys();
  const Slot& slot = state.slot();
  const bool is_wanted = state.reader().storage().has_master(param);
  const bool is_split = param.scalar_type() == at::kBFloat16;
  PyObject* const key = is_split ? keys.remainder : keys.master;
  for (PyObject* const other : {keys.remainder, keys.master}) {
    if ((is_wanted && other == key) || state.find(other) == nullptr) continue;
    start.changes.emplace_back(other, at::Tensor());
  }
  if (!is_wanted) return;
  const bool has_24_bits = state.reader().storage().master_bits == 24;
  if (has_24_bits && !is_split) {
    throw py::value_error(slot.name() +
                          ": it is fp16, and master_weights=24 is for bf16 parameters; use "
                          "master_weights=True");
  }
  const at::ScalarType dtype = !is_split ? at::kFloat : has_24_bits ? at::kChar : at::kShort;
  const at::Tensor* const found = state.find(key);
  if (found == nullptr) {
    check_memory(param, [&] { return slot.name(); });
    start.master = empty_state_like(param, dtype);
    is_split ? start.master.zero_() : start.master.copy_(param.detach());
    start.changes.emplace_back(key, start.master);
    return;
  }
  const auto name = [&] {
    return std::string(is_split ? "param_remainder" : "master_param") + " of " + slot.name();
  };
  const at::ScalarType found_dtype = found->scalar_type();
  const bool converts =
      is_split && found_dtype != dtype && (found_dtype == at::kShort || found_dtype == at::kChar);
  if ((found_dtype != dtype && !converts) || found->sizes() != param.sizes() ||
      kernel_device(*found) != kernel_device(param)) {
    throw std::runtime_error(name() + ": expected " + std::string(c10::toString(dtype)) +
                             " of its parameter's shape and on its device, got " +
                             describe(*found) +
                             "; delete it from the optimizer's state to go on from the parameter");
  }
  check_memory(*found, name);
  start.master = converts ? converted_remainder(*found, dtype) : *found;
  if (lies_beside(start.master, param) && !converts) return;
  start.master = empty_state_like(param, dtype).copy_(start.master);
  start.changes.emplace_back(key, start.master);
}

// State 0, and its scales, in the formulation that the group says it is in.
std::vector<std::pair<PyObject*, at::Tensor>> as_stored(const SlotState& state,
                                                        const at::Tensor& found,
                                                        const at::Tensor& param) {
  const at::NoGradGuard no_grad;
  const RuleGroups& rule = *state.plan.rule;
  const Formulation formulation = state.reader().buffer_formulation();
  const at::ScalarType dtype = found.scalar_type();
  check_memory(found, [&] { return state.name_of(operand_of_state(0)); });
  if (!has_blocks(dtype)) {
    return {{rule.state_keys[0], converted(state, found, formulation).to(dtype)}};
  }
  const bool non_negative = rule.state_is_non_negative[0];
  const at::Tensor exact =
      dequantize(found, find_scale(state, 0, found), param.sizes(), non_negative);
  const auto [codes, scale] =
      quantize(converted(state, exact, formulation), dtype, param, non_negative);
  return {{rule.state_keys[0], codes}, {rule.scale_keys[0], scale}};
}

}  // namespace

std::string SlotState::name_of(PyObject* key) const {
  return name_of_key(key) + " of " + slot().name();
}

void SlotState::refuse_missing(PyObject* key) const {
  throw py::key_error("state of " + slot().name() + ": it has no \"" + name_of_key(key) +
                      "\"; load a whole checkpoint, or delete the parameter's state to start anew");
}

void SlotState::refuse_parts(int num_states, const at::Tensor* const* found) const {
  bool has_some = false;
  for (int k = 0; k < num_states; ++k) has_some = has_some || found[k] != nullptr;
  for (int k = 0; k < plan.rule->num_counters; ++k) {
    has_some = has_some || find_item(slot().state_dict, plan.rule->counter_keys[k]) != nullptr;
  }
  for (int k = 0; k < num_states && has_some; ++k) {
    if (found[k] == nullptr) refuse_missing(plan.rule->state_keys[k]);
  }
}

std::string SlotState::name_of(Operand operand) const {
  if (operand == kParam) return slot().name();
  if (operand == kGrad) return "gradient of " + slot().name();
  return name_of(plan.rule->state_keys[operand - kState]);
}

const at::Tensor* SlotState::find(PyObject* key) const {
  if (changes != nullptr && slot().is_repeated) {
    if (const auto* const change = changes->find(plan.param_objects[i], key); change != nullptr) {
      return change->tensor.defined() ? &change->tensor : nullptr;
    }
  }
  const at::Tensor* const found = find_tensor(slot().state_dict, key);
  const auto* const scale_keys = plan.rule->scale_keys;
  const bool is_scale =
      std::find(scale_keys, scale_keys + kMaxStates, key) != scale_keys + kMaxStates;
  // What lies otherwise than the parameter is plain: of the local shard.
  const auto* const state_keys = plan.rule->state_keys;
  const auto k = std::find(state_keys, state_keys + kMaxStates, key) - state_keys;
  const bool non_negative = k < kMaxStates && plan.rule->state_is_non_negative[k];
  if (found == nullptr || is_scale || is_packed(*found, plan.param(i), non_negative)) return found;
  return &resolve_state(plan.param_objects[i], *found, [&] { return name_of(key); });
}

const at::Tensor* SlotState::find_state(int k) const {
  PyObject* const dict = slot().state_dict;
  PyObject* const key = plan.rule->state_keys[k];
  // torch's SGD looks for the buffers of all parameters before it makes one; Adam makes state at once.
  const bool is_made = plan.rule->num_counters != 0 && slot().is_repeated && changes != nullptr &&
                       changes->find(plan.param_objects[i], key) != nullptr;
  if (is_made) return find(key);
  if (dict == nullptr) return nullptr;
  if (!PyDict_Check(dict)) {
    throw py::type_error("state of " + slot().name() + ": expected a dict, got " +
                         Py_TYPE(dict)->tp_name);
  }
  PyObject* const found = PyDict_GetItemWithError(dict, key);
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (found == nullptr || found == Py_None) return nullptr;
  if (!THPVariable_Check(found)) {
    throw py::type_error("state of " + slot().name() + ": expected a tensor as \"" +
                         name_of_key(key) + "\", got " + Py_TYPE(found)->tp_name +
                         "; delete the entry to start from no momentum");
  }
  return find(key);
}

StartingState starting_state(const SlotState& state, const at::Tensor& param, int num_states,
                             const at::Tensor* const* found) {
  const at::NoGradGuard no_grad;
  StartingState start;
  for (int k = 0; k < num_states; ++k) {
    if (found[k] != nullptr) start.states[k] = *found[k];
    start_state(state, start, k, param);
  }
  const std::optional<int16_t> device = kernel_device(param);
  if (device.has_value() && kernel_dtype(param.scalar_type())) start_master(state, start, param);
  if (!start.changes.empty() && device.value_or(kCpu) != kCpu && is_capturing(*device)) {
    throw std::runtime_error(
        state.slot().name() +
        ": its state is not stored yet as its group says (formulation, state_dtype, "
        "master_weights), and step() is being captured into a CUDA graph, whose replays would each "
        "convert it; run one step before the capture");
  }
  return start;
}

py::tuple pending_changes(Plan& plan, const py::list& param_groups, const py::dict& state,
                          bool moved_only) {
  const StepLock lock(plan.mutex);
  py::list changes;
  py::list converted_groups;
  plan.compare(param_groups, state);
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    const SlotState slot_state{plan, i, nullptr};
    const Slot& slot = slot_state.slot();
    if (slot.state_dict == nullptr || !THPVariable_Check(plan.param_objects[i]) ||
        slot.is_repeated) {
      continue;
    }
    const auto add = [&](PyObject* key, const at::Tensor& tensor) {
      changes.append(py::make_tuple(
          py::reinterpret_borrow<py::object>(plan.param_objects[i]),
          py::reinterpret_borrow<py::object>(key),
          tensor.defined()
              ? as_state_of(plan.param_objects[i], tensor, plan.rule->lies_like_param(key, tensor))
              : py::object(py::none())));
    };
    const int num_states = moved_only ? 0 : plan.num_states(slot);
    const at::Tensor* found[kMaxStates] = {};
    for (int k = 0; k < plan.rule->max_states; ++k) found[k] = slot_state.find_state(k);
    if (num_states == 0 && found[0] != nullptr &&
        slot.formulation != slot_state.reader().buffer_formulation()) {
      for (const auto& [key, tensor] : as_stored(slot_state, *found[0], plan.param(i))) {
        add(key, tensor);
      }
    }
    if (moved_only) continue;
    const StartingState start = starting_state(slot_state, plan.param(i), num_states, found);
    for (const auto& [key, tensor] : start.changes) {
      const bool is_first_step = (found[0] == nullptr || num_states == 0) && tensor.defined();
      if (!is_first_step) add(key, tensor);  // else the first step makes it
    }
  }
  for (size_t g = 0; g < plan.readers.size(); ++g) {
    if (plan.rule->num_states(g) != 0 && !moved_only) converted_groups.append(g);
  }
  return py::make_tuple(changes, converted_groups);
}

}  // namespace momentum_ext::binding
