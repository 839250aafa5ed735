// The norm of gradients on a CUDA device, which the host never learns: it follows there what the
// next step multiplies gradients with, and whether there is an overflow. In a build without CUDA
// kernels nothing here is ever reached.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../rules/clip.h"
#include "../table.h"

namespace momentum_ext::binding {

class DeviceNorm {
 public:
  // Device tensors of one element; undefined: 1.
  struct Factors {
    at::Tensor factor;      // float64: of the next step until now
    at::Tensor inv_scale;   // float32: besides
    at::Tensor grad_scale;  // float32: its inverse, besides
  };
  struct Result {
    at::Tensor factor;  // all of them together, with the coefficient; lives until the next but one
    at::Tensor norm;    // of the gradients times the factors; where there was a max_norm
    at::Tensor found_inf;  // where there was none
  };

  // Reads the gradients of the table in one pass, unless they are given as nullptr: then the norm
  // is that of the last pass. Waits for nothing.
  Result conclude(int16_t device, const TensorTable* grads, Norm kind, const Factors& factors,
                  std::optional<double> max_norm, at::ScalarType norm_dtype);

 private:
  // Allocated once, so that nothing is once warm and captured graphs can keep their addresses.
  at::Tensor workspace_;
  at::Tensor factors_[2];
};

}  // namespace momentum_ext::binding
