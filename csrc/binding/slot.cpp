#include "slot.h"

#include <string>

#include "shards.h"

namespace momentum_ext::binding {

std::string Slot::name() const {
  return "param_groups[" + std::to_string(group) + "]['params'][" + std::to_string(index) + "]";
}

void Slot::examine(const Operands& operands, const NameOf& name_of, bool by_torch) {
  const auto& [param_tensor, grad, state, count, are_non_negative] = operands;
  static_cast<void>(are_non_negative);
  path = Path::kUnknown;
  shapes.reset();
  companions.reset();
  has_companions = false;
  average = {};
  check_operands(operands, name_of);
  if (by_torch || !has_kernel(operands)) {
    path = Path::kTorch;
    return;
  }
  const auto record = [](const at::Tensor& tensor) -> SlotOperand {
    return {mutable_data_of(tensor), tensor.dtype(), static_cast<uint8_t>(tensor.element_size())};
  };
  device = *kernel_device(param_tensor);
  keys = plain_keys(device);
  numel = param_tensor.numel();
  num_reals = param_tensor.is_complex() ? 2 * numel : numel;
  param = record(param_tensor);
  grad_dtype = grad.dtype();
  grad_itemsize = static_cast<uint8_t>(grad.element_size());
  num_states = static_cast<uint8_t>(count);
  for (int k = 0; k < count; ++k) states[k] = record(state[k]);
  if (are_contiguous(operands)) {
    path = Path::kContiguous;
    return;
  }
  shapes = std::make_unique<Shapes>();
  shapes->param = shape_of(param_tensor);
  shapes->grad = shape_of(grad);
  for (int k = 0; k < count; ++k) shapes->states[k] = shape_of(state[k]);
  shapes->layout = common_layout(operands);
  path = has_too_many_dims(shapes->layout.get(), device) ? Path::kTorch : Path::kLayout;
}

[[gnu::flatten]] bool Slot::is_unchanged(const c10::TensorImpl& param_impl,
                                         const c10::TensorImpl& grad, c10::TensorImpl* const* state,
                                         int count) const {
  if (count != num_states) return false;
  if (path == Path::kContiguous) return has_contiguous(param_impl, grad, state);
  return path == Path::kLayout && has_shapes(param_impl, grad, state);
}

MOMENTUM_EXT_INLINE bool Slot::has_contiguous(const c10::TensorImpl& param_impl,
                                              const c10::TensorImpl& grad,
                                              c10::TensorImpl* const* state) const {
  if (param_impl.key_set() != keys || grad.key_set() != keys) return false;
  if (device != kCpu && grad.device().index() != device) return false;
  if (param_impl.dtype() != param.dtype || grad.dtype() != grad_dtype) return false;
  if (!param_impl.is_contiguous() || !grad.is_contiguous()) return false;
  if (param_impl.numel() != numel || !same_sizes(param_impl, grad)) return false;
  const ByteRange param_bytes(param.data, numel * param.itemsize);
  if (!is_still_at(param_impl, param_bytes.begin, param_bytes.end, param.itemsize)) return false;
  const ByteRange grad_bytes(const_data_of(grad, grad_itemsize), numel * grad_itemsize);
  if (!lies_in_storage(grad, grad_bytes.end) || grad_bytes.overlaps(param_bytes)) return false;
  for (int k = 0; k < num_states; ++k) {
    const c10::TensorImpl& each = *state[k];
    if (each.key_set() != keys || each.dtype() != states[k].dtype) return false;
    if (!each.is_contiguous() || !same_sizes(param_impl, each)) return false;
    const ByteRange bytes(states[k].data, numel * states[k].itemsize);
    if (!is_still_at(each, bytes.begin, bytes.end, states[k].itemsize)) return false;
    if (grad_bytes.overlaps(bytes)) return false;
  }
  return true;
}

bool Slot::has_shapes(const c10::TensorImpl& param_impl, const c10::TensorImpl& grad,
                      c10::TensorImpl* const* state) const {
  const auto same = [&](const c10::TensorImpl& tensor, caffe2::TypeMeta dtype,
                        const c10::impl::SizesAndStrides& shape) {
    return tensor.key_set() == keys && tensor.dtype() == dtype && same_shape(shape, tensor) &&
           (device == kCpu || tensor.device().index() == device);
  };
  if (!same(param_impl, param.dtype, shapes->param) || !same(grad, grad_dtype, shapes->grad)) {
    return false;
  }
  const ByteRange param_bytes = bytes_of_param();
  if (!is_still_at(param_impl, param_bytes.begin, param_bytes.end, param.itemsize)) return false;
  const ByteRange grad_bytes = bytes_of_grad(const_data_of(grad, grad_itemsize));
  if (!lies_in_storage(grad, grad_bytes.end) || grad_bytes.overlaps(param_bytes)) return false;
  for (int k = 0; k < num_states; ++k) {
    const ByteRange bytes = bytes_of_state(k);
    if (!same(*state[k], states[k].dtype, shapes->states[k])) return false;
    if (!is_still_at(*state[k], bytes.begin, bytes.end, states[k].itemsize)) return false;
    if (grad_bytes.overlaps(bytes)) return false;
  }
  return true;
}

ByteRange Slot::bytes_of_param() const {
  return {param.data,
          shapes != nullptr ? num_bytes(shapes->param, param.itemsize) : numel * param.itemsize};
}
ByteRange Slot::bytes_of_grad(const void* data) const {
  return {data, shapes != nullptr ? num_bytes(shapes->grad, grad_itemsize) : numel * grad_itemsize};
}
ByteRange Slot::bytes_of_state(int k) const {
  return {states[k].data, shapes != nullptr ? num_bytes(shapes->states[k], states[k].itemsize)
                                            : numel * states[k].itemsize};
}

Companion::Companion(PyObject* key_, const at::Tensor& tensor) {
  if (!tensor.defined()) return;
  key = key_;
  data = mutable_data_of(tensor);
  dtype = tensor.dtype();
  shape = shape_of(tensor);
}

c10::TensorImpl* Companion::find(PyObject* state_dict, const PyObject* spec,
                                 c10::DispatchKeySet keys, int16_t device) const noexcept {
  PyObject* const value = find_item(state_dict, key);
  c10::TensorImpl* const tensor = value != nullptr ? local_impl(value, spec) : nullptr;
  if (tensor == nullptr) return nullptr;
  const auto itemsize = static_cast<int64_t>(dtype.itemsize());
  try {
    const bool same = tensor->key_set() == keys && tensor->dtype() == dtype &&
                      same_shape(shape, *tensor) && !is_lazy_copy(*tensor) &&
                      const_data_of(*tensor, itemsize) == data &&
                      (device == kCpu || tensor->device().index() == device) &&
                      lies_in_storage(*tensor, ByteRange(data, num_bytes(shape, itemsize)).end);
    return same ? tensor : nullptr;
  } catch (...) {  // torch may refuse to tell a tensor's sizes or memory
    return nullptr;
  }
}

}  // namespace momentum_ext::binding
