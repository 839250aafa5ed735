// From tensors to the table: what a step may be given, and a tensor's entry.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>

#include "layout.h"
#include "tensor_access.h"

namespace momentum_ext::binding {

// The name of one of a parameter's tensors in errors.
using NameOf = std::function<std::string(Operand)>;

// Raises for what no step could update: another shape than the parameter's, several elements at one
// place, inference tensors, memory that is not there. Nested tensors pass: torch will say what is
// wrong with one.
void check_operands(const Operands& operands, const NameOf& name_of);

// True for what the kernels are made for: plain tensors on one device, of the kernels' dtypes,
// which do not overlap each other. A gradient may be its own parameter.
bool has_kernel(const Operands& operands);

// What the kernels read of such operands; with a nullptr they share one dense layout.
TensorEntry entry_of(const Operands& operands, const OwnedLayout* layout);

// The kernels' dtype of a state, which may be stored in blocks.
Dtype state_dtype(const at::Tensor& state, bool non_negative = false);

// True where the CUDA kernels do not walk so many dimensions.
inline bool has_too_many_dims(const OwnedLayout* layout, int16_t device) {
  return device != kCpu && layout != nullptr && layout->layout.ndim > kMaxStridedDimsCuda;
}

// The first element of a tensor that is written.
inline void* mutable_data_of(const at::Tensor& tensor) {
  return mutable_data_of(*tensor.unsafeGetTensorImpl(),
                         static_cast<int64_t>(tensor.element_size()));
}

}  // namespace momentum_ext::binding
