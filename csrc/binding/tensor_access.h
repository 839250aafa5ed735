// Reading a tensor's fields without a call: on the step's path each call costs as much as a tensor
// may.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "../rules/math.h"

namespace momentum_ext::binding {

// p.grad; an undefined tensor when there is none.
MOMENTUM_EXT_INLINE const at::Tensor& grad_of(const c10::TensorImpl& param) {
  static const at::Tensor none;
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(param.autograd_meta());
  return meta == nullptr ? none : meta->grad_;
}

// Autograd must know that a tensor has changed. Inference tensors have no version to bump.
MOMENTUM_EXT_INLINE void bump_version(c10::TensorImpl* written) {
  if (written != nullptr && !written->is_inference()) written->bump_version();
}

// The address of a plain tensor's first element. nullptr when it has no memory (it is empty, or
// its storage was freed).
MOMENTUM_EXT_INLINE const void* const_data_of(const c10::TensorImpl& tensor, int64_t itemsize) {
  const void* const data = tensor.unsafe_storage().unsafeGetStorageImpl()->data();
  return data == nullptr ? nullptr
                         : static_cast<const char*>(data) + tensor.storage_offset() * itemsize;
}

// True when the memory is a lazy copy that a write must first make real.
MOMENTUM_EXT_INLINE bool is_lazy_copy(const c10::TensorImpl& tensor) {
  const c10::StorageImpl& storage = *tensor.unsafe_storage().unsafeGetStorageImpl();
  return storage.data_ptr().get_deleter() == &c10::impl::cow::cow_deleter;
}

// The same address for writing: a lazily copied tensor gets memory of its own.
MOMENTUM_EXT_INLINE void* mutable_data_of(const c10::TensorImpl& tensor, int64_t itemsize) {
  void* const data = tensor.unsafe_storage().unsafeGetStorageImpl()->mutable_data();
  return data == nullptr ? nullptr : static_cast<char*>(data) + tensor.storage_offset() * itemsize;
}

// False when the tensor's memory ends before `end`, because its storage was freed or resized.
MOMENTUM_EXT_INLINE bool lies_in_storage(const c10::TensorImpl& tensor, const char* end) {
  const c10::StorageImpl& storage = *tensor.unsafe_storage().unsafeGetStorageImpl();
  const auto* const begin = static_cast<const char*>(storage.data());
  return tensor.numel() == 0 ||
         (begin != nullptr && end <= begin + static_cast<int64_t>(storage.nbytes()));
}

// True when the tensor still has all the memory [begin, end) that it had, as its own.
MOMENTUM_EXT_INLINE bool is_still_at(const c10::TensorImpl& tensor, const char* begin,
                                     const char* end, int64_t itemsize) {
  const c10::StorageImpl& storage = *tensor.unsafe_storage().unsafeGetStorageImpl();
  const auto* const base = static_cast<const char*>(storage.data());
  if (base == nullptr) return begin == nullptr && begin == end;
  return base + tensor.storage_offset() * itemsize == begin &&
         end <= base + static_cast<int64_t>(storage.nbytes()) && !is_lazy_copy(tensor);
}

// True when other tensors use the same memory.
MOMENTUM_EXT_INLINE bool has_shared_storage(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().use_count() != 1;
}

MOMENTUM_EXT_INLINE bool same_sizes(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const c10::IntArrayRef a_sizes = a.sizes();
  const c10::IntArrayRef b_sizes = b.sizes();
  if (a_sizes.size() != b_sizes.size()) return false;
  for (size_t d = 0; d < a_sizes.size(); ++d) {
    if (a_sizes[d] != b_sizes[d]) return false;
  }
  return true;
}

}  // namespace momentum_ext::binding
