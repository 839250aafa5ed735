// One tensor of the plan: its examination, and the errors.
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
  const at::Tensor& param = THPVariable_Unpack(param_objects_[i]);
  const at::Tensor grad = find_grad(i, param);
  const bool has_momentum = hyperparams_[slot.group].has_momentum;
  const at::Tensor* const found = has_momentum ? find_buffer(slot) : nullptr;
  const bool wants_conversion = has_momentum && this->wants_conversion(i);
  converts_ = converts_ || wants_conversion;
  if (!grad.defined() && !(wants_conversion && found != nullptr)) return;

  const bool is_first_step = has_momentum && found == nullptr;
  at::Tensor buffer = found == nullptr ? at::Tensor() : *found;
  const PlannedState planned = plan_state(i, param, buffer);
  if (grad.defined()) examine(slot, param, grad, buffer);
  // Torch makes its own state on a first step.
  if (slot.path == Path::kTorch && found == nullptr) return for_torch_.push_back(i);
  uint32_t cohort = found == nullptr ? 0 : first_steps_.cohort_of(*found);
  if (is_first_step) {
    slot.path = Path::kUnknown;
    if (slot.device != kCpu) {
      if (is_capturing(slot.device)) {
        throw std::runtime_error(
            name_of(slot) +
            ": it has no momentum_buffer yet, and step() is being captured into a CUDA graph, "
            "whose replays would each be its first step; run one step before the capture");
      }
      if (options_.scaler.found_inf.defined()) cohort = first_steps_.new_cohort(slot.device);
    }
    if (!buffer.defined()) buffer = at::empty_like(param, {}, at::MemoryFormat::Preserve);
    if (cohort != 0) {  // a step that overflows leaves the new buffer as it is
      buffer.zero_();
      if (planned.scale.defined()) planned.scale.zero_();
    }
    examine(slot, param, grad, buffer);
    if (slot.path == Path::kTorch) return for_torch_.push_back(i);
    put(i, buffer_key_, buffer, cohort);
  }
  // A converted buffer is as old as the one that it comes from.
  for (const auto& [key, tensor] : planned.changes) {
    put(i, key, tensor, key == buffer_key_ ? cohort : 0);
  }
  if (!grad.defined()) return;
  if (slot.path == Path::kTorch) return for_torch_.push_back(i);
  finish_slot(i, param, grad, buffer);
  entries_[i].is_first_step = is_first_step;
  entries_[i].cohort = cohort;
  attach_low_precision(i, param, planned);
}

// The gradient to use; undefined: there is none.
at::Tensor StepPlan::find_grad(size_t i, const at::Tensor& param) {
  if (options_.grads) {
    PyObject* const stand_in = PyDict_GetItemWithError(options_.grads.ptr(), param_objects_[i]);
    if (stand_in == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (stand_in != nullptr) {
      resolved_grads_.push_back(THPVariable_Unpack(stand_in));
      return resolved_grads_.back();
    }
  }
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  if (!grad.defined() || !(grad.is_neg() || grad.is_conj())) return grad;
  // Torch negates and conjugates lazily, by a bit; the kernels need the values. A rare case, and
  // a copy.
  resolved_grads_.push_back(grad.resolve_conj().resolve_neg());
  return resolved_grads_.back();
}

// What the kernels read of a slot that was examined.
void StepPlan::finish_slot(size_t i, const at::Tensor& param, const at::Tensor& grad,
                           const at::Tensor& buffer) {
  const Slot& slot = slots_[i];
  tensors_[i] = {param.unsafeGetTensorImpl(), grad.unsafeGetTensorImpl(),
                 buffer.defined() ? buffer.unsafeGetTensorImpl() : nullptr};
  TensorEntry& entry = entries_[i];
  entry.param = slot.param_data;
  entry.grad = const_data_of(*grad.unsafeGetTensorImpl(), slot.grad_itemsize);
  entry.state[0] = slot.buffer_data;
  if (slot.shapes != nullptr && slot.shapes->layout != nullptr) {
    entry.layout = &slot.shapes->layout->layout;
  }
  entry.numel = slot.num_reals;
  entry.group = slot.group;
  entry.param_dtype = slot.param_kernel_dtype;
  entry.grad_dtype = slot.grad_kernel_dtype;
  entry.state_dtype[0] = slot.buffer_kernel_dtype;
  entry.device = slot.device;
  if (has_shared_storage(*grad.unsafeGetTensorImpl())) shared_grads_.push_back(i);
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
  check_memory(param, name_of(slot));
  check_memory(grad, "gradient of " + name_of(slot));
  if (buffer.defined()) check_memory(buffer, "momentum_buffer of " + name_of(slot));
  const auto shares_memory = [](const at::Tensor& a, const at::Tensor& b) {
    return byte_range(a).overlaps(byte_range(b));
  };
  if (options_.all_for_torch || readers_[slot.group].needs_torch() || !all_plain || !all_dtypes) {
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
