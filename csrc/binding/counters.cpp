#include "counters.h"

#include <ATen/ops/scalar_tensor.h>

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

void CounterRows::forget(size_t group) {
  for (CounterRow& row : rows_) {
    if (row.group == group) row.group = CounterRow::kNoGroup;
  }
}

bool is_counter(const at::Tensor& tensor) {
  return is_plain_cpu(tensor) && tensor.numel() == 1 &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

// ---- of a slot ----------------------------------------------------------------------------------

namespace {

bool is_double(const c10::TensorImpl& tensor) {
  return tensor.dtype() == caffe2::TypeMeta::Make<double>();
}

}  // namespace

// False where some are no longer what the kernels' host reads.
bool SlotPreparation::has_planned_counters(size_t i, PyObject* const* values) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  if (slot.is_repeated) return false;  // they depend on an earlier slot
  for (int k = 0; k < plan.rule->num_counters; ++k) {
    if (!THPVariable_CheckTypeExact(Py_TYPE(values[k]))) return false;
    c10::TensorImpl* const tensor = THPVariable_Unpack(values[k]).unsafeGetTensorImpl();
    const bool is_known =
        tensor->key_set() == plain_keys(kCpu) && tensor->numel() == 1 &&
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
  for (int k = 0; k < rule.num_counters; ++k) {
    PyObject* const key = rule.counter_keys[k];
    const StateChanges::Change* const planned =
        slot.is_repeated ? vectors_.changes.find(plan.param_objects[i], key) : nullptr;
    PyObject* const value = slot.state_dict != nullptr && !is_first_step
                                ? PyDict_GetItemWithError(slot.state_dict, key)
                                : nullptr;
    if (planned != nullptr) {
      tensors[k] = planned->tensor;
    } else if (is_first_step) {
      tensors[k] = at::scalar_tensor(rule.counter_starts.values[k], made);
    } else if (value == nullptr) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      state.refuse_missing(key);
    } else if (THPVariable_Check(value) && is_counter(THPVariable_Unpack(value))) {
      tensors[k] = THPVariable_Unpack(value);
    } else {  // a Python number of old checkpoints, or a tensor that lies elsewhere
      const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(value));
      if (!number) throw py::error_already_set();
      tensors[k] = at::scalar_tensor(PyFloat_AS_DOUBLE(number.ptr()), made);
    }
    plan.counters[i].each[k] = tensors[k].unsafeGetTensorImpl();
    plan.counters[i].data[k] = tensors[k].mutable_data_ptr();
    const bool is_there = planned != nullptr || (value != nullptr && THPVariable_Check(value) &&
                                                 THPVariable_Unpack(value).is_same(tensors[k]));
    if (is_there) continue;
    vectors_.changes.put({py::reinterpret_borrow<py::object>(plan.param_objects[i]),
                          py::reinterpret_borrow<py::object>(slot.state_dict), key, tensors[k], 0,
                          /*lies_like_param=*/false});
  }
  choose_row(i);
}

// By what the counters are before the slot's update: after the last earlier one of the same parameter.
void SlotPreparation::choose_row(size_t i) {
  Plan& plan = plan_;
  const Slot& slot = plan.slots[i];
  TensorEntry& entry = plan.entries[i];
  const Plan::CounterTensors& tensors = plan.counters[i];
  Counters before;
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
