// One tensor of the plan: the quick look, the examination, and the errors.
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "state_access.h"
#include "step_plan.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

template <typename T>
std::string to_string(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

}  // namespace

// Runs on other threads too, while the calling thread holds the GIL.
StepPlan::Status StepPlan::check_slot(size_t i, bool has_momentum,
                                      const GroupReader& reader) noexcept {
  Slot& slot = slots_[i];
  if (slot.formulation != reader.formulation()) return Status::kNeedsCare;
  if (!THPVariable_CheckTypeExact(Py_TYPE(param_objects_[i]))) return Status::kNeedsCare;
  const c10::TensorImpl& param = *THPVariable_Unpack(param_objects_[i]).unsafeGetTensorImpl();
  const at::Tensor& grad_tensor = grad_of(param);
  if (!grad_tensor.defined()) {
    tensors_[i] = {};
    entries_[i].numel = 0;
    return Status::kIdle;
  }
  if (!(slot.storage == reader.storage())) return Status::kNeedsCare;
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
  return has_shared_storage(grad) ? Status::kSharedGrad : Status::kReady;
}

// Everything that a quick look does not settle: new and changed tensors, first steps, errors.
void StepPlan::prepare_slot(size_t i) {
  Slot& slot = slots_[i];
  slot.path = Path::kUnknown;  // whatever happens below, the next step examines it again
  tensors_[i] = {};
  more_tensors_[i] = {};
  entries_[i] = {};
  if (!THPVariable_Check(param_objects_[i])) {
    throw py::type_error(name_of(slot) + ": expected a tensor, got " +
                         Py_TYPE(param_objects_[i])->tp_name);
  }
  plan_conversion(i);
  const at::Tensor& param = THPVariable_Unpack(param_objects_[i]);
  const at::Tensor& grad_field = param.unsafeGetTensorImpl()->grad();
  if (!grad_field.defined()) return;
  // Torch negates and conjugates lazily, by a bit; the kernels need the values. A rare case, and
  // the one copy of a step.
  if (grad_field.is_neg() || grad_field.is_conj()) {
    resolved_grads_.push_back(grad_field.resolve_conj().resolve_neg());
  }
  const at::Tensor grad =
      grad_field.is_neg() || grad_field.is_conj() ? resolved_grads_.back() : grad_field;

  const bool has_momentum = hyperparams_[slot.group].has_momentum;
  const at::Tensor* const found = has_momentum ? find_buffer(slot) : nullptr;
  const bool is_first_step = has_momentum && found == nullptr;
  at::Tensor buffer = found == nullptr ? at::Tensor() : *found;
  LowPrecisionState low_precision;
  const bool is_low_precision = has_low_precision(slot, buffer);
  if (is_low_precision) low_precision = plan_low_precision(i, param, buffer);
  examine(slot, param, grad, buffer);
  const auto put = [&](PyObject* key, const at::Tensor& tensor, uint32_t cohort) {
    const auto object = [](PyObject* borrowed) {
      return py::reinterpret_borrow<py::object>(borrowed);
    };
    new_state_.push_back({tensor, key, object(param_objects_[i]), object(slot.state_dict),
                          py::object(), cohort, slot.device});
  };
  uint32_t cohort = 0;
  if (slot.path != Path::kTorch && is_first_step) {
    slot.path = Path::kUnknown;
    if (slot.device != kCpu) {
      if (is_capturing(slot.device)) {
        throw std::runtime_error(
            name_of(slot) +
            ": it has no momentum_buffer yet, and step() is being captured into a CUDA graph, "
            "whose "
            "replays would each be its first step; run one step before the capture");
      }
      if (scaler_.found_inf.defined()) cohort = first_steps_.new_cohort(slot.device);
    }
    if (!buffer.defined()) buffer = at::empty_like(param, {}, at::MemoryFormat::Preserve);
    if (cohort != 0) {  // a step that overflows leaves the new buffer as it is
      buffer.zero_();
      if (low_precision.scale.defined()) low_precision.scale.zero_();
    }
    examine(slot, param, grad, buffer);
    if (slot.path != Path::kTorch) put(buffer_key_, buffer, cohort);  // torch makes its own
  }
  if (!(slot.storage == readers_[slot.group].storage())) newly_stored_.push_back(i);
  if (slot.path == Path::kTorch) {
    for_torch_.push_back(i);
    return;
  }
  // A converted buffer is as old as the one that it comes from.
  if (found != nullptr) cohort = first_steps_.cohort_of(*found);
  for (const auto& [key, tensor] : low_precision.changes) {
    put(key, tensor, key == buffer_key_ ? cohort : 0);
  }
  tensors_[i] = {param.unsafeGetTensorImpl(), grad.unsafeGetTensorImpl(),
                 buffer.defined() ? buffer.unsafeGetTensorImpl() : nullptr};
  TensorEntry& entry = entries_[i];
  entry.param = slot.param_data;
  entry.grad = const_data_of(*grad.unsafeGetTensorImpl(), slot.grad_itemsize);
  entry.momentum_buffer = slot.buffer_data;
  if (slot.shapes != nullptr && slot.shapes->layout != nullptr) {
    entry.layout = &slot.shapes->layout->layout;
  }
  entry.numel = slot.num_reals;
  entry.group = slot.group;
  entry.param_dtype = slot.param_kernel_dtype;
  entry.grad_dtype = slot.grad_kernel_dtype;
  entry.buffer_dtype = slot.buffer_kernel_dtype;
  entry.is_first_step = is_first_step;
  entry.device = slot.device;
  if (!conversions_.empty() && conversions_.back().slot == i &&
      conversions_.back().buffer.defined()) {
    conversions_.back().buffer = low_precision.scale.defined() ? low_precision.scale : buffer;
  }
  entry.cohort = cohort;
  if (is_low_precision) attach_low_precision(i, param, low_precision);
  if (has_shared_storage(*grad.unsafeGetTensorImpl())) status_[i] = Status::kSharedGrad;
}

// The tensor at opt.state[p]["momentum_buffer"]; nullptr when there is none or it is None.
const at::Tensor* StepPlan::find_buffer(const Slot& slot) const {
  if (slot.state_dict == nullptr) return nullptr;
  if (!PyDict_Check(slot.state_dict)) {
    throw py::type_error("state of " + name_of(slot) + ": expected a dict, got " +
                         Py_TYPE(slot.state_dict)->tp_name);
  }
  PyObject* const buffer = PyDict_GetItemWithError(slot.state_dict, buffer_key_);
  if (buffer == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (buffer == nullptr || buffer == Py_None) return nullptr;
  if (!THPVariable_Check(buffer)) {
    throw py::type_error("state of " + name_of(slot) +
                         ": expected a tensor as \"momentum_buffer\", got " +
                         Py_TYPE(buffer)->tp_name + "; delete the entry to start from no momentum");
  }
  const NewState* const planned = find_planned(slot, buffer_key_);
  return planned != nullptr ? &planned->tensor : &THPVariable_Unpack(buffer);
}

// The tensor at opt.state[p][key]; nullptr when there is none.
const at::Tensor* StepPlan::find_state(const Slot& slot, PyObject* key) const {
  if (const NewState* const planned = find_planned(slot, key); planned != nullptr) {
    return planned->tensor.defined() ? &planned->tensor : nullptr;
  }
  return find_tensor(slot.state_dict, key);
}

// What an earlier slot of the same parameter is going to put there in this step; nullptr: nothing.
const StepPlan::NewState* StepPlan::find_planned(const Slot& slot, PyObject* key) const {
  const auto i = static_cast<size_t>(&slot - slots_.data());
  if (new_state_.empty() || !is_repeated(i)) return nullptr;
  for (auto made = new_state_.rbegin(); made != new_state_.rend(); ++made) {
    if (made->key == key && made->param.ptr() == param_objects_[i]) return &*made;
  }
  return nullptr;
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
  if (is_lazy_copy(param) || const_data_of(param, slot.param_itemsize) != slot.param_data) {
    return false;
  }
  const void* const grad_data = const_data_of(grad, slot.grad_itemsize);
  const ByteRange grad_bytes(grad_data, slot.numel * slot.grad_itemsize);
  if (!lies_in_storage(grad, grad_bytes.end)) return false;
  if (grad_bytes.overlaps({slot.param_data, slot.numel * slot.param_itemsize})) return false;
  if (buffer == nullptr) return true;
  if (buffer->key_set() != slot.keys || buffer->dtype() != slot.buffer_dtype) return false;
  if (!buffer->is_contiguous() || !same_sizes(param, *buffer)) return false;
  return !is_lazy_copy(*buffer) &&
         const_data_of(*buffer, slot.buffer_itemsize) == slot.buffer_data &&
         !grad_bytes.overlaps({slot.buffer_data, slot.numel * slot.buffer_itemsize});
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
  if (is_lazy_copy(param) || const_data_of(param, slot.param_itemsize) != slot.param_data) {
    return false;
  }
  const void* const grad_data = const_data_of(grad, slot.grad_itemsize);
  const ByteRange grad_bytes = bytes(grad_data, slot.grad_dtype, shapes.grad);
  if (!lies_in_storage(grad, grad_bytes.end)) return false;
  if (grad_bytes.overlaps(bytes(slot.param_data, slot.param_dtype, shapes.param))) return false;
  if (buffer == nullptr) return true;
  return same(*buffer, slot.buffer_dtype, shapes.buffer) && !is_lazy_copy(*buffer) &&
         const_data_of(*buffer, slot.buffer_itemsize) == slot.buffer_data &&
         !grad_bytes.overlaps(bytes(slot.buffer_data, slot.buffer_dtype, shapes.buffer));
}

// Chooses the path of a tensor that is new or changed, or raises.
void StepPlan::examine(Slot& slot, const at::Tensor& param, const at::Tensor& grad,
                       const at::Tensor& buffer) {
  slot.path = Path::kUnknown;
  slot.shapes.reset();
  slot.known.reset();
  slot.has_known = false;
  ranges_changed_ = true;
  const auto check_written = [&](const at::Tensor& tensor, const std::string& name) {
    if (tensor.is_inference() && !c10::InferenceMode::is_enabled()) {
      throw std::runtime_error(
          name +
          ": an inference tensor cannot be updated outside torch.inference_mode(); clone() it "
          "outside inference mode first");
    }
    if (tensor.layout() == at::kStrided && overlaps_itself(tensor)) {
      throw std::runtime_error(
          name + ": several of its elements share one place in memory (shape " +
          to_string(tensor.sizes()) + ", strides " + to_string(tensor.strides()) +
          "), so it cannot be updated in place; clone() it first");
    }
  };
  const auto check_sizes = [&](const at::Tensor& tensor, const std::string& name,
                               const char* remedy) {
    if (tensor.sizes() != param.sizes()) {
      throw std::runtime_error(name + ": expected the shape of its parameter, " +
                               to_string(param.sizes()) + ", got " + to_string(tensor.sizes()) +
                               "; " + remedy);
    }
  };
  // Nested tensors have no sizes to ask for; what is wrong with one, torch will say.
  const bool all_have_sizes =
      !param.is_nested() && !grad.is_nested() && !(buffer.defined() && buffer.is_nested());
  if (!all_have_sizes) {
    slot.path = Path::kTorch;
    return;
  }
  check_written(param, name_of(slot));
  check_sizes(grad, "gradient of " + name_of(slot), "set it to None or recompute it");
  if (buffer.defined()) {
    check_written(buffer, "momentum_buffer of " + name_of(slot));
    check_sizes(buffer, "momentum_buffer of " + name_of(slot),
                "delete it from the optimizer's state to start from no momentum");
  }

  const std::optional<int16_t> device = kernel_device(param);
  const bool all_plain = device.has_value() && kernel_device(grad) == device &&
                         (!buffer.defined() || kernel_device(buffer) == device);
  const auto has_kernel = [&](const at::Tensor& tensor) {
    if (!kernel_dtype(tensor.scalar_type())) return false;
    return param.is_complex() ? tensor.scalar_type() == param.scalar_type() : !tensor.is_complex();
  };
  const bool is_quantized = buffer.defined() && is_8_bit(buffer.scalar_type());
  const bool all_dtypes = has_kernel(param) && has_kernel(grad) &&
                          (!buffer.defined() || is_quantized || has_kernel(buffer));
  const auto shares_memory = [](const at::Tensor& a, const at::Tensor& b) {
    return byte_range(a).overlaps(byte_range(b));
  };
  if (all_for_torch_ || readers_[slot.group].needs_torch() || !all_plain || !all_dtypes) {
    slot.path = Path::kTorch;
    return;
  }
  // A gradient may be its own parameter (each element is read before it is written), but overlap in
  // no other way.
  if ((shares_memory(param, grad) && !is_own_grad(param, grad)) ||
      (buffer.defined() && (shares_memory(buffer, grad) || shares_memory(buffer, param)))) {
    slot.path = Path::kTorch;
    return;
  }

  const auto check_memory = [&](const at::Tensor& tensor, const std::string& name) {
    const int64_t needed = num_bytes(shape_of(tensor), tensor.element_size()) +
                           tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
    if (tensor.numel() != 0 && static_cast<int64_t>(tensor.storage().nbytes()) < needed) {
      throw std::runtime_error(name + ": its storage has " +
                               std::to_string(tensor.storage().nbytes()) + " bytes and it needs " +
                               std::to_string(needed) + "; it was freed or resized");
    }
  };
  check_memory(param, name_of(slot));
  check_memory(grad, "gradient of " + name_of(slot));
  if (buffer.defined()) check_memory(buffer, "momentum_buffer of " + name_of(slot));

  slot.device = *device;
  slot.keys = plain_keys(slot.device);
  slot.numel = param.numel();
  slot.num_reals = param.is_complex() ? 2 * slot.numel : slot.numel;
  slot.has_buffer = buffer.defined();
  slot.param_itemsize = static_cast<uint8_t>(param.element_size());
  slot.grad_itemsize = static_cast<uint8_t>(grad.element_size());
  slot.param_dtype = param.dtype();
  slot.grad_dtype = grad.dtype();
  slot.param_kernel_dtype = *kernel_dtype(param.scalar_type());
  slot.grad_kernel_dtype = *kernel_dtype(grad.scalar_type());
  if (buffer.defined()) {
    slot.buffer_itemsize = static_cast<uint8_t>(buffer.element_size());
    slot.buffer_dtype = buffer.dtype();
    slot.buffer_kernel_dtype =
        is_quantized ? quantized_dtype(buffer.scalar_type()) : *kernel_dtype(buffer.scalar_type());
  }
  slot.param_data = mutable_data_of(*param.unsafeGetTensorImpl(), slot.param_itemsize);
  slot.buffer_data = buffer.defined()
                         ? mutable_data_of(*buffer.unsafeGetTensorImpl(), slot.buffer_itemsize)
                         : nullptr;
  if (param.is_contiguous() && grad.is_contiguous() &&
      (!buffer.defined() || buffer.is_contiguous())) {
    slot.path = Path::kContiguous;
    return;
  }
  slot.shapes = std::make_unique<Shapes>();
  slot.shapes->param = shape_of(param);
  slot.shapes->grad = shape_of(grad);
  if (buffer.defined()) slot.shapes->buffer = shape_of(buffer);
  // A buffer of 8 bits lies in the order of the walk.
  slot.shapes->layout = common_layout(param, grad, is_quantized ? at::Tensor() : buffer);
  const bool too_many_dims = slot.device != kCpu && slot.shapes->layout != nullptr &&
                             slot.shapes->layout->layout.ndim > kMaxStridedDimsCuda;
  slot.path = too_many_dims ? Path::kTorch : Path::kLayout;
}

std::string StepPlan::name_of(const Slot& slot) const {
  return "param_groups[" + std::to_string(slot.group) + "]['params'][" +
         std::to_string(slot.index) + "]";
}

}  // namespace momentum_ext::binding
