#include "counters.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>

#include <stdexcept>
#include <string>

#include "slot_preparation.h"
#include "tensor_access.h"

namespace momentum_ext::binding {

uint32_t CounterRows::find_elsewhere(size_t group, const Counters& before) {
  size_t unused = rows_.size();
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (is_row_of(rows_[r], group, before)) return static_cast<uint32_t>(r);
    if (!rows_[r].is_used && unused == rows_.size()) unused = r;
  }
  if (unused == rows_.size()) rows_.emplace_back();
  rows_[unused].group = CounterRow::kNoGroup;
  return static_cast<uint32_t>(unused);
}

double* DerivedNumbers::of_slot(int16_t device, size_t slot, size_t num_slots) {
  const auto wanted = static_cast<int64_t>(num_slots) * kMaxDerived;
  at::Tensor& memory = memory_[device];
  if (!memory.defined() || memory.numel() < wanted) {
    if (memory.defined()) outgrown_.push_back(memory);
    const at::Device cuda(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    memory = at::empty({wanted}, at::device(cuda).dtype(at::kDouble));
  }
  return memory.mutable_data_ptr<double>() + slot * kMaxDerived;
}

bool is_counter(const at::Tensor& tensor, int16_t device) {
  return kernel_device(tensor) == device && tensor.numel() == 1 &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

// ---- of a slot ----------------------------------------------------------------------------------

namespace {

bool is_double(const c10::TensorImpl& tensor) {
  return tensor.dtype() == caffe2::TypeMeta::Make<double>();
}

// Torch has a step on the device in fp32; ours has any counter there in the dtype that it comes in.
at::Tensor make_counter(double value, at::ScalarType dtype, int16_t device) {
  if (device == kCpu) return at::scalar_tensor(value, dtype);
  const at::Device cuda(at::kCUDA, static_cast<c10::DeviceIndex>(device));
  return at::full({}, value, at::device(cuda).dtype(dtype));
}

}  // namespace

// Whether a slot's counters that are on the host are to go to its device.
bool SlotPreparation::counts_on_device(const Slot& slot) const {
  return slot.device != kCpu &&
         (options_.may_be_left_out || plan_.rule->counts_on_device(slot.group));
}

// False where some are no longer what the kernels or their host read.
bool SlotPreparation::has_planned_counters(size_t i, PyObject* const* values) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  if (slot.is_repeated) return false;  // they depend on an earlier slot
  const bool is_on_device = plan.counters[i].derived != nullptr;
  if (!is_on_device && counts_on_device(slot)) return false;
  const int16_t device = is_on_device ? slot.device : kCpu;
  for (int k = 0; k < plan.rule->num_counters; ++k) {
    if (!THPVariable_CheckTypeExact(Py_TYPE(values[k]))) return false;
    c10::TensorImpl* const tensor = THPVariable_Unpack(values[k]).unsafeGetTensorImpl();
    const bool is_known =
        tensor->key_set() == plain_keys(device) && tensor->numel() == 1 &&
        (!is_on_device || tensor->device().index() == device) &&
        (tensor->dtype() == caffe2::TypeMeta::Make<float>() || is_double(*tensor));
    if (!is_known || is_lazy_copy(*tensor)) return false;
    const void* const data = const_data_of(*tensor, static_cast<int64_t>(tensor->itemsize()));
    if (data == nullptr) return false;
    plan.counters[i].each[k] = tensor;
    plan.counters[i].data[k] = const_cast<void*>(data);
  }
  choose_row(i);
  return true;
}

// Of a slot whose entry is filled in.
void SlotPreparation::prepare_counters(size_t i, bool is_first_step) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  const RuleGroups& rule = *plan.rule;
  const SlotState state{plan, i, &vectors_.changes};
  const at::ScalarType made =
      at::typeMetaToScalarType(at::get_default_dtype()) == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor tensors[kMaxCounters];
  PyObject* values[kMaxCounters] = {};
  bool is_planned[kMaxCounters] = {};
  bool is_on_device = counts_on_device(slot);
  for (int k = 0; k < rule.num_counters; ++k) {
    PyObject* const key = rule.counter_keys[k];
    const StateChanges::Change* const planned =
        slot.is_repeated ? vectors_.changes.find(plan.param_objects[i], key) : nullptr;
    values[k] = slot.state_dict != nullptr && !is_first_step
                    ? PyDict_GetItemWithError(slot.state_dict, key)
                    : nullptr;
    if (planned != nullptr) {
      tensors[k] = planned->tensor;
      is_planned[k] = true;
    } else if (values[k] != nullptr && THPVariable_Check(values[k])) {
      tensors[k] = THPVariable_Unpack(values[k]);
    } else if (values[k] == nullptr && !is_first_step) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      state.refuse_missing(key);
    }
    // One that is there stays there.
    is_on_device = is_on_device || (slot.device != kCpu && tensors[k].defined() &&
                                    is_counter(tensors[k], slot.device));
  }
  const int16_t device = is_on_device ? slot.device : kCpu;
  for (int k = 0; k < rule.num_counters; ++k) {
    if (!tensors[k].defined() || !is_counter(tensors[k], device)) {
      if (slot.device != kCpu && is_capturing(slot.device)) refuse_capture(i, k);
      double value = rule.counter_starts.values[k];
      at::ScalarType dtype = made;
      if (tensors[k].defined() && is_counter(tensors[k], kCpu)) {
        dtype = tensors[k].scalar_type();
        value = tensors[k].item().toDouble();
      } else if (values[k] != nullptr) {  // a number of old checkpoints, or a tensor elsewhere
        const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(values[k]));
        if (!number) {
          PyErr_Clear();
          throw py::type_error(state.name_of(rule.counter_keys[k]) + ": expected a number, got " +
                               std::string(py::repr(values[k])));
        }
        value = PyFloat_AS_DOUBLE(number.ptr());
      }
      tensors[k] = make_counter(value, dtype, device);
      is_planned[k] = false;
    }
    plan.counters[i].each[k] = tensors[k].unsafeGetTensorImpl();
    plan.counters[i].data[k] = tensors[k].mutable_data_ptr();
    const bool is_there = is_planned[k] || (values[k] != nullptr && THPVariable_Check(values[k]) &&
                                            THPVariable_Unpack(values[k]).is_same(tensors[k]));
    if (is_there) continue;
    vectors_.changes.put({py::reinterpret_borrow<py::object>(plan.param_objects[i]),
                          py::reinterpret_borrow<py::object>(slot.state_dict), rule.counter_keys[k],
                          tensors[k], 0,
                          /*lies_like_param=*/false});
  }
  plan.counters[i].derived =
      is_on_device ? plan.derived.of_slot(slot.device, i, plan.slots.size()) : nullptr;
  choose_row(i);
}

void SlotPreparation::refuse_capture(size_t i, int counter) const {
  const std::string name = SlotState{plan_, i, nullptr}.name_of(kParam);
  const std::string key = py::str(plan_.rule->counter_keys[counter]);
  throw std::runtime_error(
      name + ": step() is being captured into a CUDA graph, and the tensor's '" + key +
      "' is not on its device, so that each replay would be the same step; set capturable=True and "
      "run one step before the capture");
}

// A step that is captured counts on devices alone.
void SlotPreparation::check_capture() const {
  if (plan_.rule->num_counters == 0) return;
  for (const DeviceShare& share : vectors_.shares) {
    for (size_t i = 0; i < plan_.slots.size(); ++i) {
      if (plan_.tensors[i].param == nullptr || plan_.slots[i].device != share.device ||
          plan_.counters[i].derived != nullptr) {
        continue;
      }
      if (is_capturing(share.device)) refuse_capture(i, 0);
      break;
    }
  }
}

// By what the counters are before the slot's update: after the last earlier one of the same parameter.
void SlotPreparation::choose_row(size_t i) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  TensorEntry& entry = plan.entries[i];
  const Plan::CounterTensors& tensors = plan.counters[i];
  Counters before;
  if (tensors.derived != nullptr) {  // a row of its own
    for (double& each : before.values) each = 1;
    before.derived = tensors.derived;
    entry.group = plan.rule->row_of(entry.group, slot.group, before);
    return;
  }
  for (int k = 0; k < plan.rule->num_counters; ++k) {
    before.is_double[k] = is_double(*tensors.each[k]);
    before.values[k] = read_counter(tensors.data[k], before.is_double[k]);
  }
  for (size_t earlier = i; slot.is_repeated && earlier-- > 0;) {
    if (plan.param_objects[earlier] != plan.param_objects[i]) continue;
    if (plan.tensors[earlier].param != nullptr) {
      before = plan.rule->counters_after(plan.entries[earlier].group);
    }
    break;
  }
  entry.group = plan.rule->row_of(entry.group, slot.group, before);
}

}  // namespace momentum_ext::binding
