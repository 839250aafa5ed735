// How a parameter group wants its tensors' state stored, beside what torch.optim.SGD would do.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "../dtype.h"

namespace momentum_ext::binding {

struct Storage {
  std::optional<at::ScalarType> momentum_dtype;  // none: as torch, or as it is found
  bool master_weights = false;
  bool stochastic_rounding = false;

  bool is_default() const {
    return !momentum_dtype.has_value() && !master_weights && !stochastic_rounding;
  }
  friend bool operator==(const Storage&, const Storage&) = default;
};

constexpr bool is_8_bit(at::ScalarType dtype) {
  return dtype == at::kChar || dtype == at::kFloat8_e4m3fn;
}
constexpr Dtype quantized_dtype(at::ScalarType dtype) {
  return dtype == at::kChar ? Dtype::kInt8 : Dtype::kFloat8E4M3;
}

}  // namespace momentum_ext::binding
