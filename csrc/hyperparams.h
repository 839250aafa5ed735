// The hyperparameters of one parameter group, as a backend wants them: flags that choose a kernel,
// and its coefficients.
#pragma once

#include "dtype.h"

namespace momentum_ext {

// A number in a device's memory, which the kernel reads when it runs.
struct DeviceNumber {
  const void* data = nullptr;  // nullptr: the number is known on the host
  Dtype dtype = Dtype::kFloat32;
};

// Those of a group's hyperparameters that are such numbers. Each replaces a coefficient; a momentum
// there counts as not zero.
struct DeviceHyperparams {
  DeviceNumber lr;
  DeviceNumber weight_decay;
  DeviceNumber momentum;
  bool any() const { return lr.data || weight_decay.data || momentum.data; }
};

struct Hyperparams {
  WeightDecay weight_decay = WeightDecay::kNone;
  bool has_momentum = false;
  bool nesterov = false;
  Coefficients<double> f64{};
  Coefficients<float> f32{};
  DeviceHyperparams on_device;
  bool stochastic_rounding = false;  // of what is stored in 16 or 8 bits
  uint64_t rounding_seed = 0;
};

template <typename opmath_t>
inline const Coefficients<opmath_t>& coefficients(const Hyperparams& h) {
  if constexpr (sizeof(opmath_t) == sizeof(double)) {
    return h.f64;
  } else {
    return h.f32;
  }
}

inline void round_to_float(Hyperparams& h) {
  const Coefficients<double>& d = h.f64;
  h.f32 = {static_cast<float>(d.grad_coef),   static_cast<float>(d.weight_decay),
           static_cast<float>(d.momentum),    static_cast<float>(d.alpha),
           static_cast<float>(d.first_alpha), static_cast<float>(d.nesterov_alpha),
           static_cast<float>(d.step)};
}

}  // namespace momentum_ext
