// What the rules share that keep two moments of the gradient, exp_avg and exp_avg_sq: Adam and NAdam.
#pragma once

#include "../step_scalars.h"
#include "math.h"

namespace momentum_ext {

// A group's hyperparameters, from which each step makes its coefficients.
struct MomentNumbers {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  bool lr_is_float = false;  // torch computes with an fp32 tensor in fp32
  bool is_decoupled = false;
  bool counts_on_device = false;  // of tensors on a device
  DeviceNumber lr_on_device;      // there, in the place of lr

  // Returns maximize.
  template <typename Reader>
  bool read(Reader& group, WeightDecay& decay, bool may_count_on_device) {
    bool maximize, capturable;
    group.optional_flag("capturable", capturable);
    if (capturable && !group.is_on_device()) group.leave_to_torch();
    counts_on_device = capturable || may_count_on_device;
    group.number("lr", lr, Reader::kOneElementTensor, counts_on_device ? &lr_on_device : nullptr,
                 &lr_is_float);
    group.pair("betas", beta1, beta2);
    if (!(beta1 >= 0 && beta1 <= 1)) group.leave_to_torch();  // by an edit
    group.number("eps", eps, Reader::kNumber);
    group.number("weight_decay", weight_decay, Reader::kNumber);
    group.optional_flag("decoupled_weight_decay", is_decoupled);
    group.optional_flag("maximize", maximize);
    decay = weight_decay == 0 ? WeightDecay::kNone
            : is_decoupled    ? WeightDecay::kDecoupled
                              : WeightDecay::kL2;
    return maximize;
  }

  MOMENTUM_EXT_INLINE void read_on_device() {
    if (lr_on_device.data == nullptr) return;
    lr_is_float = lr_on_device.dtype != Dtype::kFloat64;
    lr = visit_dtype<double>(lr_on_device.dtype, [this](auto type) -> double {
      return load(*static_cast<const decltype(type)*>(lr_on_device.data));
    });
  }

  // The coefficients that do not depend on counters.
  template <typename Coefficients>
  MOMENTUM_EXT_INLINE void prepare(Coefficients& c) const {
    c.weight_decay = weight_decay;
    if (is_decoupled) c.weight_decay = 1 - lr * weight_decay;
    if (is_decoupled && lr_is_float) {
      c.weight_decay = 1 - static_cast<float>(lr) * static_cast<float>(weight_decay);
    }
    c.lerp = lerp_step<double>(1 - beta1);
    c.beta2 = beta2;
    c.weight2 = 1 - beta2;
    c.eps = eps;
  }
};

// Where the counters are on a device, what is derived of them: see CountedOnDevice.
struct DerivedOnDevice {
  const double* derived = nullptr;
  bool any() const { return derived != nullptr; }
};

// Decays, and brings both moments up to date; returns the gradient that they have taken in.
template <typename Arithmetic, WeightDecay kDecay, typename Coefficients, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t update_moments(const Coefficients& c, opmath_t grad, opmath_t& param,
                                            opmath_t* state) {
  opmath_t g = c.grad_coef * grad;
  if constexpr (kDecay == WeightDecay::kDecoupled) param = c.weight_decay * param;
  if constexpr (kDecay == WeightDecay::kL2) g = Arithmetic::apply(c.weight_decay, param, g);
  state[0] = lerp<Arithmetic>(c.lerp, state[0], g);
  state[1] = Arithmetic::apply(c.weight2 * g, g, c.beta2 * state[1]);
  return g;
}

}  // namespace momentum_ext
