// How a parameter group wants its tensors' state stored, beside what torch.optim.SGD would do.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../formats/dtype.h"

namespace momentum_ext::binding {

struct Storage {
  std::optional<at::ScalarType> momentum_dtype;  // none: see dtype_of_buffer()
  int master_bits = 0;                           // 24 or 32; 0: no master is kept
  bool stochastic_rounding = false;
  bool rounds_masters = false;  // by chance: of 24 bits
  uint64_t rounding_seed = 0;

  // A parameter whose exact value is kept beside it.
  bool has_master(const at::Tensor& param) const {
    return master_bits != 0 &&
           (param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf);
  }

  // That of the momentum buffer: fp32 beside a master, else the parameter's own.
  at::ScalarType dtype_of_buffer(const at::Tensor& param) const {
    return momentum_dtype.value_or(has_master(param) ? at::kFloat : param.scalar_type());
  }

  bool is_random() const { return stochastic_rounding || rounds_masters; }

  friend bool operator==(const Storage&, const Storage&) = default;
};

constexpr bool is_8_bit(at::ScalarType dtype) {
  return dtype == at::kChar || dtype == at::kFloat8_e4m3fn;
}
constexpr Dtype quantized_dtype(at::ScalarType dtype) {
  return dtype == at::kChar ? Dtype::kInt8 : Dtype::kFloat8E4M3;
}

}  // namespace momentum_ext::binding
