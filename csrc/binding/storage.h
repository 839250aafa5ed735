// How a parameter group wants its tensors' state stored, beside what torch.optim.SGD would do.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../table.h"
#include "state_layout.h"

namespace momentum_ext::binding {

struct Storage {
  std::optional<at::ScalarType> state_dtype[kMaxStates];  // none: see dtype_of_state()
  int master_bits = 0;                                    // 24 or 32; 0: no master is kept
  bool stochastic_rounding = false;
  bool rounds_masters = false;  // by chance: of 24 bits
  uint64_t rounding_seed = 0;

  // A parameter whose exact value is kept beside it.
  bool has_master(const at::Tensor& param) const {
    return master_bits != 0 &&
           (param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf);
  }

  // That of state k: fp32 beside a master, else the parameter's own. Of one that is never negative
  // 8 bits have its roots, and 4 bits are refused before.
  at::ScalarType dtype_of_state(int k, const at::Tensor& param, bool non_negative) const {
    const auto usual = has_master(param) ? at::kFloat : param.scalar_type();
    const at::ScalarType dtype = state_dtype[k].value_or(usual);
    if (non_negative) return dtype == at::kChar ? kRoots : dtype;
    return dtype == kPacked && !can_pack(param) ? at::kChar : dtype;
  }

  bool is_random() const { return stochastic_rounding || rounds_masters; }

  friend bool operator==(const Storage&, const Storage&) = default;
};

}  // namespace momentum_ext::binding
