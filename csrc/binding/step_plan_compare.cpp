// Comparing the optimizer with the plan: what is as it was needs no more than a look.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "state_access.h"
#include "step_plan.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

void check_is_list(PyObject* params, size_t group) {
  if (PyList_Check(params) || PyTuple_Check(params)) return;
  throw py::type_error("param_groups[" + std::to_string(group) +
                       "]['params']: expected a list of tensors, got " + Py_TYPE(params)->tp_name);
}

}  // namespace

// Reads hyperparameters and parameter lists; false when the lists are not those of the plan.
bool StepPlan::read_groups(const py::list& param_groups, double inv_grad_scale) {
  const size_t num_groups = param_groups.size();
  if (readers_.size() != num_groups) {
    readers_.clear();
    readers_.resize(num_groups);
    hyperparams_.resize(num_groups);
  }
  groups_.resize(num_groups);
  params_.resize(num_groups);
  bool same = first_slot_.size() == num_groups + 1;
  for (size_t g = 0; g < num_groups; ++g) {
    groups_[g] = PyList_GET_ITEM(param_groups.ptr(), g);
    params_[g] = PyDict_Check(groups_[g]) ? readers_[g].compare(groups_[g]) : nullptr;
    if (params_[g] == nullptr) params_[g] = parse_group(g);
    check_is_list(params_[g], g);
    readers_[g].scale(inv_grad_scale, hyperparams_[g]);
    same = same && is_same_list(g);
  }
  return same;
}

PyObject* StepPlan::parse_group(size_t g) {
  PyObject* const group = groups_[g];
  if (!PyDict_Check(group)) {
    throw py::type_error("param_groups[" + std::to_string(g) + "]: expected a dict, got " +
                         Py_TYPE(group)->tp_name);
  }
  GroupReader& reader = readers_[g];
  const Storage storage = reader.storage();
  PyObject* const params = reader.parse(group, g, hyperparams_[g]);
  // What the group wants of its tensors is no longer what they were examined for.
  const size_t end = g + 1 < first_slot_.size() ? first_slot_[g + 1] : 0;
  for (size_t i = g < first_slot_.size() ? first_slot_[g] : 0; i < end; ++i) {
    if (!(storage == reader.storage())) slots_[i].path = Path::kUnknown;
  }
  return params;
}

// True when a group's list has the plan's parameters.
bool StepPlan::is_same_list(size_t g) const {
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(params_[g]));
  return count == first_slot_[g + 1] - first_slot_[g] &&
         std::equal(param_objects_.begin() + static_cast<ptrdiff_t>(first_slot_[g]),
                    param_objects_.begin() + static_cast<ptrdiff_t>(first_slot_[g + 1]),
                    PySequence_Fast_ITEMS(params_[g]));
}

// Finds each parameter's state dict; false when the state's keys are not those of the plan, in the
// same order.
bool StepPlan::read_state(PyObject* state) {
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  size_t n = 0;
  for (; PyDict_Next(state, &position, &key, &value); ++n) {
    if (n == state_keys_.size() || key != state_keys_[n].first) return false;
    if (const ptrdiff_t slot = state_keys_[n].second; slot >= 0) slots_[slot].state_dict = value;
  }
  if (n != state_keys_.size()) return false;
  for (const auto& [slot, first] : repeated_) slots_[slot].state_dict = slots_[first].state_dict;
  return true;
}

void StepPlan::rebuild(PyObject* state) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    formulation_of_[param_objects_[i]] = slots_[i].formulation;
  }
  slots_.clear();
  param_objects_.clear();
  first_slot_.assign(1, 0);
  repeated_.clear();
  ranges_changed_ = true;
  std::unordered_map<PyObject*, size_t> slot_of;
  for (size_t g = 0; g < params_.size(); ++g) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(params_[g]);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const param = PySequence_Fast_GET_ITEM(params_[g], i);
      Slot slot;
      slot.group = static_cast<uint32_t>(g);
      slot.index = static_cast<uint32_t>(i);
      const auto known = formulation_of_.find(param);
      slot.formulation =
          known != formulation_of_.end() ? known->second : readers_[g].buffer_formulation();
      const auto [first, is_new] = slot_of.try_emplace(param, slots_.size());
      if (!is_new) repeated_.emplace_back(slots_.size(), first->second);
      slots_.push_back(std::move(slot));
      param_objects_.push_back(param);
    }
    first_slot_.push_back(slots_.size());
  }
  status_.assign(slots_.size(), Status::kNeedsCare);
  tensors_.assign(slots_.size(), {});
  entries_.assign(slots_.size(), {});
  low_precision_.assign(slots_.size(), {});
  more_tensors_.assign(slots_.size(), {});
  any_low_precision_ = false;
  first_element_.assign(slots_.size() + 1, 0);
  state_keys_.clear();
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    const auto found = slot_of.find(key);
    state_keys_.emplace_back(key,
                             found == slot_of.end() ? -1 : static_cast<ptrdiff_t>(found->second));
  }
  read_state(state);
  // A parameter that is in no group now keeps its formulation for when it comes back. As long as
  // the state holds it, no other tensor has its address.
  std::unordered_map<PyObject*, Formulation> away;
  for (const auto& [param, slot] : state_keys_) {
    const auto known = formulation_of_.find(param);
    if (slot < 0 && known != formulation_of_.end()) away.insert(*known);
  }
  formulation_of_ = std::move(away);
}

// A quick look at all slots: are they as the plan says? One pass, because a tensor's fields lie in
// a dozen cache lines: what is ready gets its version bumped at once (restore_versions() takes it
// back) and its place among the elements.
void StepPlan::check_slots() {
  careful_.clear();
  shared_grads_.clear();
  versions_are_bumped_ = true;
  for (size_t g = 0; g < readers_.size(); ++g) {
    const bool has_momentum = hyperparams_[g].has_momentum;
    const bool needs_care = options_.all_for_torch || options_.grads || readers_[g].needs_torch();
    for (size_t i = first_slot_[g]; i < first_slot_[g + 1]; ++i) {
      status_[i] = needs_care ? Status::kNeedsCare : check_slot(i, has_momentum, readers_[g]);
      if (status_[i] == Status::kNeedsCare) careful_.push_back(i);
      lay_out(i);
    }
  }
}

// Counts slot i's elements for the device that has them.
void StepPlan::lay_out(size_t i) {
  TensorEntry& entry = entries_[i];
  int64_t numel_on_cpu = entry.numel;
  if (entry.device != kCpu && numel_on_cpu != 0) {
    numel_on_cpu = 0;
    entry.cohort = first_steps_.still_open(entry.cohort, entry.device);
    share_of(shares_, entry.device).add(entry);
  }
  first_element_[i + 1] = first_element_[i] + numel_on_cpu;
}

// For a step that does not take place.
void StepPlan::restore_versions() noexcept {
  if (!versions_are_bumped_) return;
  versions_are_bumped_ = false;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (status_[i] != Status::kReady) continue;
    for (c10::TensorImpl* const written : {tensors_[i].param, tensors_[i].buffer}) {
      if (written == nullptr || written->is_inference()) continue;
      c10::VariableVersion counter = written->version_counter();
      counter.set_version(static_cast<int64_t>(counter.current_version()) - 1);
    }
  }
}

StepPlan::Status StepPlan::check_slot(size_t i, bool has_momentum, const GroupReader& reader) {
  Slot& slot = slots_[i];
  if (has_momentum && slot.formulation != reader.formulation()) return Status::kNeedsCare;
  if (!THPVariable_CheckTypeExact(Py_TYPE(param_objects_[i]))) return Status::kNeedsCare;
  const c10::TensorImpl& param = *THPVariable_Unpack(param_objects_[i]).unsafeGetTensorImpl();
  const at::Tensor& grad_tensor = grad_of(param);
  if (!grad_tensor.defined()) {
    tensors_[i] = {};
    entries_[i].numel = 0;
    return Status::kIdle;
  }
  const c10::TensorImpl& grad = *grad_tensor.unsafeGetTensorImpl();
  const c10::TensorImpl* buffer = nullptr;
  if (has_momentum) {
    PyObject* const value = find_item(slot.state_dict, buffer_key_);
    if (value == nullptr || !THPVariable_CheckTypeExact(Py_TYPE(value))) return Status::kNeedsCare;
    buffer = THPVariable_Unpack(value).unsafeGetTensorImpl();
  }
  try {
    const bool unchanged = slot.path == Path::kContiguous ? is_unchanged(slot, param, grad, buffer)
                           : slot.path == Path::kLayout
                               ? is_unchanged_layout(slot, param, grad, buffer)
                               : false;
    if (!unchanged) return Status::kNeedsCare;
  } catch (
      ...) {  // torch may refuse to tell a tensor's sizes or memory: the calling thread can raise
    return Status::kNeedsCare;
  }
  tensors_[i] = {const_cast<c10::TensorImpl*>(&param), const_cast<c10::TensorImpl*>(&grad),
                 const_cast<c10::TensorImpl*>(buffer)};
  if (slot.has_known && !find_known(i)) return Status::kNeedsCare;
  TensorEntry& entry = entries_[i];
  entry.grad = const_data_of(grad, slot.grad_itemsize);
  entry.numel = slot.num_reals;
  entry.is_first_step = false;
  if (has_shared_storage(grad)) shared_grads_.push_back(i);
  bump_version(tensors_[i].param);
  bump_version(tensors_[i].buffer);
  return Status::kReady;
}

// Everything that the slot's path was chosen for still holds. The gradient's address alone may
// differ.
[[gnu::flatten]] bool StepPlan::is_unchanged(const Slot& slot, const c10::TensorImpl& param,
                                             const c10::TensorImpl& grad,
                                             const c10::TensorImpl* buffer) const {
  if (slot.path != Path::kContiguous || slot.has_buffer != (buffer != nullptr)) return false;
  if (param.key_set() != slot.keys || grad.key_set() != slot.keys) return false;
  if (slot.device != kCpu && grad.device().index() != slot.device) return false;
  if (param.dtype() != slot.param_dtype || grad.dtype() != slot.grad_dtype) return false;
  if (!param.is_contiguous() || !grad.is_contiguous()) return false;
  if (param.numel() != slot.numel || !same_sizes(param, grad)) return false;
  const ByteRange param_bytes(slot.param_data, slot.numel * slot.param_itemsize);
  if (!is_still_at(param, param_bytes.begin, param_bytes.end, slot.param_itemsize)) return false;
  const ByteRange grad_bytes(const_data_of(grad, slot.grad_itemsize),
                             slot.numel * slot.grad_itemsize);
  if (!lies_in_storage(grad, grad_bytes.end) || grad_bytes.overlaps(param_bytes)) return false;
  if (buffer == nullptr) return true;
  if (buffer->key_set() != slot.keys || buffer->dtype() != slot.buffer_dtype) return false;
  if (!buffer->is_contiguous() || !same_sizes(param, *buffer)) return false;
  const ByteRange buffer_bytes(slot.buffer_data, slot.numel * slot.buffer_itemsize);
  return is_still_at(*buffer, buffer_bytes.begin, buffer_bytes.end, slot.buffer_itemsize) &&
         !grad_bytes.overlaps(buffer_bytes);
}

bool StepPlan::is_unchanged_layout(const Slot& slot, const c10::TensorImpl& param,
                                   const c10::TensorImpl& grad,
                                   const c10::TensorImpl* buffer) const {
  const Shapes& shapes = *slot.shapes;
  const auto same = [&](const c10::TensorImpl& tensor, caffe2::TypeMeta dtype,
                        const c10::impl::SizesAndStrides& shape) {
    return tensor.key_set() == slot.keys && tensor.dtype() == dtype && same_shape(shape, tensor) &&
           (slot.device == kCpu || tensor.device().index() == slot.device);
  };
  const auto bytes = [](const void* data, caffe2::TypeMeta dtype,
                        const c10::impl::SizesAndStrides& shape) {
    return ByteRange(data, num_bytes(shape, static_cast<int64_t>(dtype.itemsize())));
  };
  if (slot.has_buffer != (buffer != nullptr)) return false;
  if (!same(param, slot.param_dtype, shapes.param) || !same(grad, slot.grad_dtype, shapes.grad)) {
    return false;
  }
  const ByteRange param_bytes = bytes(slot.param_data, slot.param_dtype, shapes.param);
  if (!is_still_at(param, param_bytes.begin, param_bytes.end, slot.param_itemsize)) return false;
  const ByteRange grad_bytes =
      bytes(const_data_of(grad, slot.grad_itemsize), slot.grad_dtype, shapes.grad);
  if (!lies_in_storage(grad, grad_bytes.end) || grad_bytes.overlaps(param_bytes)) return false;
  if (buffer == nullptr) return true;
  const ByteRange buffer_bytes = bytes(slot.buffer_data, slot.buffer_dtype, shapes.buffer);
  return same(*buffer, slot.buffer_dtype, shapes.buffer) &&
         is_still_at(*buffer, buffer_bytes.begin, buffer_bytes.end, slot.buffer_itemsize) &&
         !grad_bytes.overlaps(buffer_bytes);
}

}  // namespace momentum_ext::binding
