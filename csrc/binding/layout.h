// What the kernels may be given: dtypes, layouts, and memory that does not overlap.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../table.h"

namespace momentum_ext::binding {

// A StridedLayout together with the memory it points to.
struct OwnedLayout {
  std::vector<StridedDim> dims;
  StridedLayout layout{};
};

// The kernels' dtype for a real or complex dtype of torch; a complex element is two real ones.
// std::nullopt: not one of ours.
std::optional<Dtype> kernel_dtype(at::ScalarType dtype);

// True for an ordinary dense CPU tensor: strided, no tensor subclass that intercepts operators, no
// pending negation or conjugation, not wrapped by a function transform.
bool is_plain_cpu(const at::Tensor& tensor);

// The same for tensors that this build has kernels for: kCpu, or the index of the CUDA device;
// std::nullopt for any other tensor.
std::optional<int16_t> kernel_device(const at::Tensor& tensor);

// The dispatch keys of such a tensor on this device, unless it was made in inference mode.
c10::DispatchKeySet plain_keys(int16_t device);

// True while a mode watches or replaces torch's operators: FakeTensorMode, make_fx, functionalize,
// torch.func's transforms, MemTracker. What a kernel writes would escape it, so torch's own
// operators must do the work.
bool operators_are_watched();

constexpr Operand operand_of_state(int k) { return static_cast<Operand>(kState + k); }

// A parameter with its gradient and its state, as one step updates them.
struct Operands {
  at::Tensor param;
  at::Tensor grad;
  at::Tensor states[kMaxStates];
  int num_states = 0;                      // those that are there
  const bool* are_non_negative = nullptr;  // which states; nullptr: none

  bool is_non_negative(int k) const { return are_non_negative != nullptr && are_non_negative[k]; }
};

// How to walk these tensors, which have the same sizes, together, in the parameter's order in
// memory; nullptr when they share one dense layout and can be walked as flat arrays. A state in
// blocks lies in the order of the walk.
std::unique_ptr<OwnedLayout> common_layout(const Operands& operands);

// True when all of them are contiguous, and no state is packed.
bool are_contiguous(const Operands& operands);

// True when the gradient is its own parameter: each element is read before it is written.
bool is_own_grad(const at::Tensor& param, const at::Tensor& grad);

// True when the average can be walked together with its parameter, whatever the order.
bool lies_like(const at::Tensor& average, const at::Tensor& param);

// Raises where a strided tensor's storage was freed, or is too small for it.
void check_memory(const at::Tensor& tensor, const std::function<std::string()>& name);

// True when two elements of the tensor share a place in memory.
bool overlaps_itself(const at::Tensor& tensor);

// Bytes in memory, from the first to past the last.
struct ByteRange {
  const char* begin;
  const char* end;

  ByteRange(const void* data, int64_t num_bytes)
      : begin(static_cast<const char*>(data)), end(begin + num_bytes) {}
  bool overlaps(const ByteRange& other) const { return begin < other.end && other.begin < end; }
};
ByteRange byte_range(const at::Tensor& tensor);

// A tensor's sizes and strides, to keep and to compare with.
c10::impl::SizesAndStrides shape_of(const at::Tensor& tensor);
bool same_shape(const c10::impl::SizesAndStrides& shape, const c10::TensorImpl& tensor);
int64_t num_bytes(c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t itemsize);
inline int64_t num_bytes(const c10::impl::SizesAndStrides& shape, int64_t itemsize) {
  return num_bytes(shape.sizes_arrayref(), shape.strides_arrayref(), itemsize);
}

}  // namespace momentum_ext::binding
