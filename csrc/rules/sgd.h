// SGD with momentum: one element's update.
//
//   g = grad_coef * grad                       unscaled and negated where asked for; else exactly grad
//   g = fma(weight_decay, p, g)                L2 weight decay
//   or p = weight_decay * p                    decoupled: this coefficient is 1 - lr * weight_decay
//   b = fma(alpha, g, round(momentum * b))     on a tensor's first step: b = first_alpha * g
//   d = fma(momentum, b, nesterov_alpha * g)   Nesterov; else d = b, and without momentum d = g
//   p = fma(-step, d, p)
//
// With alpha = 1 - dampening, first_alpha = nesterov_alpha = 1 and step = lr this is
// torch.optim.SGD, in fp32 and fp64 to the bit. Other formulations are other numbers, chosen on the
// host; the kernels never know which one runs. (nesterov_alpha is a number of its own because torch
// does not dampen the gradient that Nesterov adds.)
#pragma once

#include "../step_scalars.h"
#include "math.h"

namespace momentum_ext {

// kAgain: the step that has made the buffer.
enum class Momentum : uint8_t { kNone, kFirstStep, kLaterStep, kAgain };

// The ways in which the field writes momentum.
enum class Formulation : uint8_t {
  kTorch,      // b = mu b + (1 - dampening) g, from b = g;   p = p - lr b
  kClassical,  // v = mu v + lr g, from 0;                    p = p - v
  kEma,        // v = mu v + (1 - mu) g, from 0;              p = p - lr v
};

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr int kMaxStates = 1;
  static constexpr const char* kStateKeys[kMaxStates] = {"momentum_buffer"};
  static constexpr const char* kScaleKeys[kMaxStates] = {"momentum_scale"};  // for states of 8 bits
  // States that never are negative: 8 bits have their roots.
  static constexpr bool kIsNonNegative[kMaxStates] = {false};
  static constexpr int kCounters = 0;

  // The options of a parameter group that choose its Variant, see below.
  struct Options {
    WeightDecay weight_decay = WeightDecay::kNone;
    bool has_momentum = false;
    bool nesterov = false;

    static constexpr int kBits = 4;  // as a CUDA launch carries them
    MOMENTUM_EXT_INLINE uint32_t bits() const {
      return static_cast<uint32_t>(weight_decay) | uint32_t{has_momentum} << 2 |
             uint32_t{nesterov} << 3;
    }
    static MOMENTUM_EXT_INLINE Options of_bits(uint32_t bits) {
      return {static_cast<WeightDecay>(bits & 3), (bits & 4) != 0, (bits & 8) != 0};
    }
  };

  // What the formulas need, rounded once from double to the type they are computed in.
  template <typename opmath_t>
  struct Coefficients {
    opmath_t grad_coef;     // 1, or -1 for maximize; times 1 / grad_scale and the clip coefficient
    opmath_t weight_decay;  // decoupled: 1 - lr * weight_decay
    opmath_t momentum;
    opmath_t alpha;
    opmath_t first_alpha;
    opmath_t nesterov_alpha;
    opmath_t step;
  };

  // The hyperparameters of a group that are in a device's memory. A kernel puts each in the place
  // of its coefficient (lr: step). A momentum on a device counts as not zero: the host does not
  // know it.
  struct OnDevice {
    DeviceNumber lr;
    DeviceNumber weight_decay;
    DeviceNumber momentum;
    bool any() const { return lr.data || weight_decay.data || momentum.data; }
  };

  // Fills in alpha, first_alpha, nesterov_alpha and step. Without momentum all formulations are plain
  // gradient descent.
  static void choose_coefficients(Formulation formulation, double lr, double dampening,
                                  Coefficients<double>& c) {
    if (formulation == Formulation::kTorch || c.momentum == 0) {
      c.alpha = 1 - dampening;
      c.first_alpha = c.nesterov_alpha = 1;
      c.step = lr;
    } else if (formulation == Formulation::kClassical) {
      c.alpha = c.first_alpha = c.nesterov_alpha = lr;
      c.step = 1;
    } else {
      c.alpha = c.first_alpha = c.nesterov_alpha = 1 - c.momentum;
      c.step = lr;
    }
  }

  // Reads a parameter group's hyperparameters; returns maximize.
  template <typename Reader>
  static bool read(Reader& group, Options& options, Coefficients<double>& c, OnDevice& on_device) {
    double lr, dampening;
    bool decoupled, maximize;
    group.optional_flag("decoupled_weight_decay", decoupled);
    // A kernel can read a number from the device only where it is a coefficient by itself: in
    // torch's formulation without decoupled decay. Elsewhere the host makes one of several.
    const bool as_torch = group.formulation() == Formulation::kTorch && !decoupled;
    const auto device = [&](DeviceNumber& number) { return as_torch ? &number : nullptr; };
    group.number("lr", lr, Reader::kOneElementTensor, device(on_device.lr));
    group.number("momentum", c.momentum, Reader::kNumber, device(on_device.momentum));
    group.number("dampening", dampening, Reader::kNumber);
    group.number("weight_decay", c.weight_decay, Reader::kScalarTensor,
                 device(on_device.weight_decay));
    group.flag("nesterov", options.nesterov);
    group.flag("maximize", maximize);
    if (group.formulation() != Formulation::kTorch && dampening != 0 && !group.needs_torch()) {
      group.refuse_with_formulation("dampening", dampening);
    }
    options.has_momentum = c.momentum != 0;
    options.weight_decay = c.weight_decay == 0 ? WeightDecay::kNone
                           : decoupled         ? WeightDecay::kDecoupled
                                               : WeightDecay::kL2;
    if (options.weight_decay == WeightDecay::kDecoupled) c.weight_decay = 1 - lr * c.weight_decay;
    choose_coefficients(group.formulation(), lr, dampening, c);
    return maximize;
  }

  // Puts what lies on the device into its coefficients. read(number): the number, in opmath_t.
  MOMENTUM_EXT_CALLS_BACK
  template <typename opmath_t, typename Read>
  static MOMENTUM_EXT_INLINE void read_on_device(const OnDevice& numbers, const Read& read,
                                                 Options& options, Coefficients<opmath_t>& c) {
    if (numbers.lr.data != nullptr) c.step = read(numbers.lr);
    if (numbers.momentum.data != nullptr) c.momentum = read(numbers.momentum);
    if (numbers.weight_decay.data != nullptr) {
      c.weight_decay = read(numbers.weight_decay);
      options.weight_decay = c.weight_decay != 0 ? WeightDecay::kL2 : WeightDecay::kNone;
    }
  }

  static Coefficients<float> rounded(const Coefficients<double>& c) {
    return {static_cast<float>(c.grad_coef),   static_cast<float>(c.weight_decay),
            static_cast<float>(c.momentum),    static_cast<float>(c.alpha),
            static_cast<float>(c.first_alpha), static_cast<float>(c.nesterov_alpha),
            static_cast<float>(c.step)};
  }

  // How many states an update has, and how many of them it reads.
  static MOMENTUM_EXT_INLINE int num_states(const Options& options) {
    return options.has_momentum ? 1 : 0;
  }
  static MOMENTUM_EXT_INLINE int num_reads(const Options& options, bool is_first_step) {
    return options.has_momentum && !is_first_step ? 1 : 0;
  }

  // One of the forms in which update() is compiled: a kernel for each, without branches inside.
  template <WeightDecay kWeightDecay_, Momentum kMomentum_, bool kNesterov_>
  struct Variant {
    static constexpr WeightDecay kWeightDecay = kWeightDecay_;
    static constexpr Momentum kMomentum = kMomentum_;
    static constexpr bool kNesterov = kNesterov_;
    static constexpr int kStates = kMomentum == Momentum::kNone ? 0 : 1;
    static constexpr int kReads = kMomentum == Momentum::kLaterStep ? 1 : 0;
  };

  // Variants are numbered, those without weight decay last. A backend that prefers a
  // multiplication to more variants compiles the first kMergedVariants alone: merge() turns "no
  // decay" into decoupled decay with a coefficient of 1.
  static constexpr int kVariants = 15;
  static constexpr int kMergedVariants = 10;

  static MOMENTUM_EXT_INLINE int variant_of(const Options& options, bool is_first_step) {
    const int momentum = options.has_momentum ? (is_first_step ? 1 : 3) + options.nesterov : 0;
    if (options.weight_decay == WeightDecay::kNone) return kMergedVariants + momentum;
    return 2 * momentum + (options.weight_decay == WeightDecay::kL2 ? 1 : 0);
  }

  // Returns visit(Variant<...>()) for the variant of this number, which is below kCount.
  MOMENTUM_EXT_CALLS_BACK
  template <int kCount = kVariants, typename Visit>
  static MOMENTUM_EXT_INLINE constexpr decltype(auto) visit_variant(int number,
                                                                    const Visit& visit) {
    return choose<kCount>(number, [&visit]<int k>() -> decltype(auto) {
      constexpr bool kHasDecay = k < kMergedVariants;
      constexpr int kIndex = kHasDecay ? k / 2 : k - kMergedVariants;
      constexpr WeightDecay kDecay = !kHasDecay   ? WeightDecay::kNone
                                     : k % 2 == 1 ? WeightDecay::kL2
                                                  : WeightDecay::kDecoupled;
      constexpr Momentum kMomentum = kIndex == 0  ? Momentum::kNone
                                     : kIndex < 3 ? Momentum::kFirstStep
                                                  : Momentum::kLaterStep;
      return visit(Variant<kDecay, kMomentum, kIndex == 2 || kIndex == 4>());
    });
  }

  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE void merge(Options& options, Coefficients<opmath_t>& c) {
    merge_no_decay(options, c);
  }

  template <typename Fma, typename Variant, typename opmath_t>
  static MOMENTUM_EXT_INLINE void update(Variant variant, const Coefficients<opmath_t>& c,
                                         opmath_t grad, opmath_t& param, opmath_t* state) {
    const opmath_t direction = advance<Fma>(variant, c, grad, param, state);
    if constexpr (Variant::kWeightDecay == WeightDecay::kDecoupled) param = c.weight_decay * param;
    param = Fma::apply(-c.step, direction, param);
  }

  // Takes the step once more that has made the state, from where the parameter is now; false where
  // it is no step at all. Where the last step has left the parameter as it was, this one does, too.
  template <typename Fma, typename Last, typename opmath_t>
  static MOMENTUM_EXT_INLINE bool update_again(Last, const Coefficients<opmath_t>& c, opmath_t grad,
                                               opmath_t& param, opmath_t state) {
    constexpr auto kMomentum =
        Last::kMomentum == Momentum::kNone ? Momentum::kNone : Momentum::kAgain;
    using Again = Variant<Last::kWeightDecay, kMomentum, Last::kNesterov>;
    const opmath_t before = param;
    const opmath_t direction = advance<Fma>(Again(), c, grad, param, &state);
    update<Fma>(Again(), c, grad, param, &state);
    return (c.step != 0 && direction != 0) || param != before;
  }

 private:
  // The states go on; returns the step's direction.
  template <typename Fma, typename Variant, typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t advance(Variant, const Coefficients<opmath_t>& c,
                                              opmath_t grad, opmath_t param, opmath_t* state) {
    opmath_t g = c.grad_coef * grad;
    if constexpr (Variant::kWeightDecay == WeightDecay::kL2) {
      g = Fma::apply(c.weight_decay, param, g);
    }
    opmath_t direction = g;
    if constexpr (Variant::kMomentum != Momentum::kNone) {
      opmath_t& buffer = state[0];
      if constexpr (Variant::kMomentum == Momentum::kFirstStep) {
        buffer = c.first_alpha * g;
      } else if constexpr (Variant::kMomentum == Momentum::kLaterStep) {
        buffer = Fma::apply(c.alpha, g, c.momentum * buffer);
      }
      direction = buffer;
      if constexpr (Variant::kNesterov) {
        direction = Fma::apply(c.momentum, buffer, c.nesterov_alpha * g);
      }
    }
    return direction;
  }
};

}  // namespace momentum_ext
