#include "slot_preparation.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <stdexcept>

#include "low_precision.h"
#include "operands.h"

namespace momentum_ext::binding {
namespace {

// Those that are not there yet, as torch makes them. A step that overflows leaves new state as it
// is: then it is zeros.
void make_states(StartingState& start, const at::Tensor& param, int num_states, bool zero) {
  for (int k = 0; k < num_states; ++k) {
    if (!start.states[k].defined()) {
      start.states[k] = at::empty_like(param, {}, at::MemoryFormat::Preserve);
    }
    if (!zero) continue;
    start.states[k].zero_();
    if (start.scales[k].defined()) start.scales[k].zero_();
  }
}

// A gradient's shard, where it lies as the parameter or as the gradient before it; else nullptr.
c10::TensorImpl* local_grad(const at::Tensor& grad, const Specs& specs) {
  PyObject* const object = object_of(grad);
  if (object == nullptr) return nullptr;
  c10::TensorImpl* const local = local_impl(object, specs.param.ptr());
  return local != nullptr || !specs.grad ? local : local_impl(object, specs.grad.ptr());
}

// The spec of what is a DTensor; null for anything else.
py::object spec_of(PyObject* tensor) {
  return py::reinterpret_borrow<py::object>(shard_of(tensor).spec);
}

}  // namespace

void keep_alive(StepVectors& vectors, const Plan& plan, size_t i) {
  const auto keep = [&vectors](c10::TensorImpl* tensor) {
    if (tensor == nullptr) return;
    vectors.kept_alive.emplace_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor),
                                    tensor->unsafe_storage());
  };
  const Plan::Tensors& tensors = plan.tensors[i];
  if (tensors.param == nullptr) return;
  keep(tensors.param);
  keep(tensors.grad);
  for (c10::TensorImpl* const state : tensors.states) keep(state);
  if (plan.rule->num_counters != 0) {
    for (c10::TensorImpl* const counter : plan.counters[i].each) keep(counter);
  }
  keep(tensors.average);
  if (!plan.has_low_precision) return;
  keep(plan.companion_tensors[i].master);
  for (c10::TensorImpl* const scale : plan.companion_tensors[i].scales) keep(scale);
}

void SlotPreparation::look_at_all() {
  Plan& plan = plan_;
  for (size_t g = 0; g < plan.readers.size(); ++g) {
    const GroupReader& reader = plan.readers[g];
    const int num_states = plan.rule->num_states(g);
    const bool all_changed = options_.all_by_torch || options_.grads || reader.needs_torch();
    for (size_t i = plan.first_slot[g]; i < plan.first_slot[g + 1]; ++i) {
      const bool is_same = !all_changed && (plan.slots[i].specs == nullptr
                                                ? is_as_planned<false>(i, num_states, reader)
                                                : is_as_planned<true>(i, num_states, reader));
      if (!is_same) vectors_.changed.push_back(i);
      lay_out(i);
    }
  }
}

// False for a slot that needs more than a look. Without a gradient there is nothing to do.
// (Compiled twice: a plain tensor does not pay for the comparison of specs.)
template <bool kIsDTensor>
bool SlotPreparation::is_as_planned(size_t i, int num_states, const GroupReader& reader) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  PyObject* const param_object = plan.param_objects[i];
  if (num_states != 0 && slot.formulation != reader.formulation()) return false;
  const Specs* const specs = slot.specs.get();
  c10::TensorImpl* const param =
      local_impl(param_object, kIsDTensor ? specs->param.ptr() : nullptr);
  if (param == nullptr) return false;
  c10::TensorImpl* const listed = THPVariable_Unpack(param_object).unsafeGetTensorImpl();
  const at::Tensor& grad_tensor = grad_of(*listed);
  if (!grad_tensor.defined()) {
    plan.tensors[i] = {};
    plan.entries[i].numel = 0;
    return true;
  }
  Plan::Tensors found{param, grad_tensor.unsafeGetTensorImpl()};
  if (kIsDTensor) {
    found.grad = local_grad(grad_tensor, *specs);
    if (found.grad == nullptr) return false;
  }
  const RuleGroups& rule = *plan.rule;
  PyObject* values[kMaxStates + kMaxCounters];
  if (!find_items(slot.state_dict, rule.keys_of(num_states), num_states + rule.num_counters,
                  values)) {
    return false;
  }
  c10::TensorImpl* counters[kMaxStates] = {};  // a DTensor counts what is written to its shard
  for (int k = 0; k < num_states; ++k) {
    found.states[k] = local_impl(values[k], kIsDTensor ? specs->states[k].ptr() : nullptr);
    if (found.states[k] == nullptr) return false;
    if (kIsDTensor) counters[k] = THPVariable_Unpack(values[k]).unsafeGetTensorImpl();
  }
  try {
    if (!slot.is_unchanged(*param, *found.grad, found.states, num_states)) return false;
  } catch (...) {  // torch may refuse to tell a tensor's sizes or memory: preparing it will raise
    return false;
  }
  if (slot.has_companions && !find_companions(plan, i)) return false;
  if (rule.num_counters != 0 && !has_planned_counters(i, values + num_states)) return false;
  plan.tensors[i] = found;
  TensorEntry& entry = plan.entries[i];
  entry.grad = const_data_of(*found.grad, slot.grad_itemsize);
  entry.numel = slot.num_reals;
  entry.is_first_step = false;
  if (has_shared_storage(*found.grad)) vectors_.shared_grads.push_back(i);
  bump_version(listed);
  for (int k = 0; k < num_states; ++k) bump_version(kIsDTensor ? counters[k] : found.states[k]);
  return true;
}

// Counts slot i's elements for the device that has them.
MOMENTUM_EXT_INLINE void SlotPreparation::lay_out(size_t i) {
  TensorEntry& entry = plan_.entries[i];
  int64_t numel_on_cpu = entry.numel;
  if (entry.device != kCpu && numel_on_cpu != 0) {
    numel_on_cpu = 0;
    entry.cohort = plan_.first_steps.still_open(entry.cohort, entry.device);
    share_of(vectors_.shares, entry.device).add(entry);
  }
  plan_.first_element[i + 1] = plan_.first_element[i] + numel_on_cpu;
}

bool SlotPreparation::prepare_changed() {
  const bool redistributes = this->redistributes();
  if (vectors_.changed.empty() && !redistributes) return false;
  // What is asked of a DTensor is Python code, and redistributing its gradient waits for other ranks.
  const bool calls_python =
      redistributes ||
      std::any_of(vectors_.changed.begin(), vectors_.changed.end(), [this](size_t i) {
        return THPVariable_Check(plan_.param_objects[i]) && &plan_.param(i) != &plan_.listed(i);
      });
  auto next = vectors_.changed.begin();  // in order; what these had in an earlier step may be gone
  for (size_t i = 0; calls_python && i < plan_.slots.size(); ++i) {
    if (next != vectors_.changed.end() && *next == i) {
      ++next;
    } else {
      keep_alive(vectors_, plan_, i);
    }
  }
  if (redistributes) redistribute_grads();
  for (const size_t i : vectors_.changed) {
    prepare(i);
    if (calls_python) keep_alive(vectors_, plan_, i);
  }
  vectors_.shares.clear();
  for (size_t i = 0; i < plan_.slots.size(); ++i) lay_out(i);
  return converts_;
}

// Whether a gradient lies otherwise than its parameter, or did so in a step before.
bool SlotPreparation::redistributes() const {
  return !plan_.redistributing_meshes.empty() ||
         std::any_of(vectors_.changed.begin(), vectors_.changed.end(), [this](size_t i) {
           if (!THPVariable_Check(plan_.param_objects[i])) return false;
           const at::Tensor grad = listed_grad(i);
           return grad.defined() && lies_otherwise(plan_.param_objects[i], grad);
         });
}

// All of them before anything is checked that can raise on this rank alone.
void SlotPreparation::redistribute_grads() {
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < plan_.slots.size(); ++i) {
    const bool is_tensor = THPVariable_Check(plan_.param_objects[i]);
    grads.push_back(is_tensor ? listed_grad(i) : at::Tensor());
  }
  const auto name = [this](size_t i) { return SlotState{plan_, i, nullptr}.name_of(kGrad); };
  vectors_.redistributed_grads = redistribute(plan_.param_objects, grads, name,
                                              plan_.redistributing_meshes, plan_.rounding_step);
}

// Whatever happens later, the next step examines the slot again.
void SlotPreparation::start_anew(size_t i) {
  Slot& slot = plan_.slots[i];
  slot.path = Path::kUnknown;
  slot.specs.reset();
  plan_.tensors[i] = {};
  plan_.companion_tensors[i] = {};
  plan_.entries[i] = {};
  if (plan_.rule->num_counters != 0) plan_.counters[i] = {};
  if (THPVariable_Check(plan_.param_objects[i])) return;
  throw py::type_error(slot.name() + ": expected a tensor, got " +
                       Py_TYPE(plan_.param_objects[i])->tp_name);
}

void SlotPreparation::prepare(size_t i) {
  Plan& plan = plan_;
  Slot& slot = plan.slots[i];
  start_anew(i);
  const at::Tensor& param = plan.param(i);
  const at::Tensor grad = find_grad(i);
  const int num_states = plan.num_states(slot);
  const SlotState state{plan, i, &vectors_.changes};
  const at::Tensor* found[kMaxStates] = {};
  for (int k = 0; k < num_states; ++k) found[k] = state.find_state(k);
  const bool has_state = found[0] != nullptr;
  const bool wants_conversion = num_states != 0 && plan.wants_conversion(slot);
  converts_ = converts_ || wants_conversion;
  if (!grad.defined() && !(wants_conversion && has_state)) return;

  StartingState start = starting_state(state, param, num_states, found);
  Operands operands;
  const auto examine = [&] {
    operands = {param, grad, {}, 0, plan.rule->state_is_non_negative};
    for (; operands.num_states < num_states; ++operands.num_states) {
      const at::Tensor& each = start.states[operands.num_states];
      if (!each.defined()) break;
      operands.states[operands.num_states] = each;
    }
    plan.memory_has_changed = true;
    slot.examine(
        operands,
        [&](Operand operand) { return state.name_of(operand) + where_is(plan.param_objects[i]); },
        options_.all_by_torch || state.reader().needs_torch());
  };
  if (grad.defined()) examine();
  // Torch makes its own state on a first step.
  if (slot.path == Path::kTorch && !has_state) return vectors_.fallback.push_back(i);
  const bool has_counters = plan.rule->num_counters != 0;  // its states start from zeros
  const bool is_first_step = num_states != 0 && !has_state;
  if (has_counters) state.refuse_parts(num_states, found);
  uint32_t cohort = has_state ? plan.first_steps.cohort_of(*found[0]) : 0;
  if (is_first_step) {
    slot.path = Path::kUnknown;
    cohort = cohort_of_first_step(slot);
    if (has_counters) cohort = 0;  // its first step is like all others
    make_states(start, param, num_states, /*zero=*/has_counters || cohort != 0);
    examine();
    if (slot.path == Path::kTorch) return vectors_.fallback.push_back(i);
    for (int k = 0; k < num_states; ++k) put(i, plan.rule->state_keys[k], start.states[k], cohort);
  }
  // A converted state is as old as the one that it comes from.
  for (const auto& [key, tensor] : start.changes) {
    put(i, key, tensor, key == plan.rule->state_keys[0] ? cohort : 0);
  }
  if (!grad.defined()) return;
  if (slot.path == Path::kTorch) return vectors_.fallback.push_back(i);
  fill_in(i, operands, is_first_step && !has_counters, cohort);
  if (has_counters) prepare_counters(i, is_first_step);
  attach_companions(plan, i, param, start);
  remember_specs(i);
}

// Of what stands in the optimizer now; what is not there yet, the next step looks at anew.
void SlotPreparation::remember_specs(size_t i) {
  const Plan& plan = plan_;
  Slot& slot = plan_.slots[i];
  PyObject* const param = plan.param_objects[i];
  if (!spec_of(param)) return;
  slot.specs = std::make_unique<Specs>();
  slot.specs->param = spec_of(param);
  // Another placement stays another one, though a later gradient may have the same spec object.
  const at::Tensor& grad = grad_of(*plan.listed(i).unsafeGetTensorImpl());
  if (grad.defined() && is_placed_like(param, grad)) slot.specs->grad = spec_of(object_of(grad));
  for (int k = 0; k < slot.num_states; ++k) {
    slot.specs->states[k] = spec_of(find_item(slot.state_dict, plan.rule->state_keys[k]));
  }
  if (!slot.has_companions || slot.companions->master.key == nullptr) return;
  slot.specs->master = spec_of(find_item(slot.state_dict, slot.companions->master.key));
}

// What the kernels read of a slot that was examined.
void SlotPreparation::fill_in(size_t i, const Operands& operands, bool is_first_step,
                              uint32_t cohort) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  TensorEntry& entry = plan.entries[i];
  entry = entry_of(operands, slot.shapes != nullptr ? slot.shapes->layout.get() : nullptr);
  entry.group = slot.group;
  entry.is_first_step = is_first_step;
  entry.cohort = cohort;
  plan.tensors[i] = {operands.param.unsafeGetTensorImpl(), operands.grad.unsafeGetTensorImpl()};
  for (int k = 0; k < operands.num_states; ++k) {
    plan.tensors[i].states[k] = operands.states[k].unsafeGetTensorImpl();
  }
  if (has_shared_storage(*plan.tensors[i].grad)) vectors_.shared_grads.push_back(i);
}

// What is a parameter's gradient in this step, as it lies; undefined: there is none.
at::Tensor SlotPreparation::listed_grad(size_t i) const {
  if (options_.grads) {
    PyObject* const stand_in =
        PyDict_GetItemWithError(options_.grads.ptr(), plan_.param_objects[i]);
    if (stand_in == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (stand_in != nullptr) return THPVariable_Unpack(stand_in);
  }
  return grad_of(*plan_.listed(i).unsafeGetTensorImpl());
}

// The gradient to use; undefined: there is none.
at::Tensor SlotPreparation::find_grad(size_t i) {
  const std::vector<at::Tensor>& redistributed = vectors_.redistributed_grads;
  at::Tensor grad = !redistributed.empty() ? redistributed[i] : at::Tensor();
  if (!grad.defined()) {
    grad = listed_grad(i);
    if (!grad.defined()) return grad;
    grad = resolve_grad(plan_.param_objects[i], grad,
                        [&] { return SlotState{plan_, i, nullptr}.name_of(kGrad); });
  }
  // Torch negates and conjugates lazily, by a bit; the kernels need the values. A rare case, and
  // a copy.
  if (grad.is_neg() || grad.is_conj()) grad = grad.resolve_conj().resolve_neg();
  return vectors_.resolved_grads.emplace_back(std::move(grad));  // which nobody else may keep
}

// 0 where the host knows that the tensor's first step takes place.
uint32_t SlotPreparation::cohort_of_first_step(const Slot& slot) {
  if (slot.device == kCpu) return 0;
  if (is_capturing(slot.device)) {
    throw std::runtime_error(
        slot.name() +
        ": it has no state yet, and step() is being captured into a CUDA graph, "
        "whose replays would each be its first step; run one step before the capture");
  }
  return options_.may_be_left_out ? plan_.first_steps.new_cohort(slot.device) : 0;
}

void SlotPreparation::put(size_t i, PyObject* key, const at::Tensor& tensor, uint32_t cohort) {
  vectors_.changes.put({py::reinterpret_borrow<py::object>(plan_.param_objects[i]),
                        py::reinterpret_borrow<py::object>(plan_.slots[i].state_dict), key, tensor,
                        cohort, plan_.rule->lies_like_param(key, tensor)});
}

}  // namespace momentum_ext::binding
