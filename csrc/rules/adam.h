// Adam and AdamW: one element's update.
//
//   g = grad_coef * grad                         unscaled and negated where asked for; else exactly grad
//   g = fma(weight_decay, p, g)                  L2 weight decay (Adam)
//   or p = weight_decay * p                      decoupled (AdamW): this coefficient is 1 - lr * weight_decay
//   m = lerp(m, g, 1 - beta1)                    exp_avg
//   v = fma((1 - beta2) * g, g, beta2 * v)       exp_avg_sq
//   w = max(w, v)                                max_exp_avg_sq, with amsgrad; else w = v
//   p = p + step * m / (sqrt(w) / root + eps)
//
// with step = -lr / (1 - beta1^t) and root = sqrt(1 - beta2^t) in the tensor's t-th step: the biases
// of averages that start from zeros. In fp32 and fp64 these are the bits of torch.optim.Adam's
// for-loop, whose order and roundings they follow.
//
// Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015. Loshchilov and Hutter,
// "Decoupled Weight Decay Regularization", ICLR 2019. Reddi, Kale and Kumar, "On the Convergence of
// Adam and Beyond", ICLR 2018.
#pragma once

#include <cmath>

#include "math.h"
#include "moments.h"

namespace momentum_ext {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr int kMaxStates = 3;
  static constexpr const char* kStateKeys[kMaxStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr const char* kScaleKeys[kMaxStates] = {"exp_avg_scale", "exp_avg_sq_scale",
                                                         "max_exp_avg_sq_scale"};
  static constexpr bool kIsNonNegative[kMaxStates] = {false, true, true};

  // Numbers in a tensor's state that change in each of its steps, and where they start from.
  static constexpr int kCounters = 1;
  static constexpr const char* kCounterKeys[kCounters] = {"step"};
  static constexpr double kCounterStarts[kCounters] = {0};

  struct Options {
    WeightDecay weight_decay = WeightDecay::kNone;
    bool amsgrad = false;

    static constexpr int kBits = 3;
    MOMENTUM_EXT_INLINE uint32_t bits() const {
      return static_cast<uint32_t>(weight_decay) | uint32_t{amsgrad} << 2;
    }
    static MOMENTUM_EXT_INLINE Options of_bits(uint32_t bits) {
      return {static_cast<WeightDecay>(bits & 3), (bits & 4) != 0};
    }
  };

  template <typename opmath_t>
  struct Coefficients {
    opmath_t grad_coef;     // 1, or -1 for maximize; times 1 / grad_scale and the clip coefficient
    opmath_t weight_decay;  // decoupled: 1 - lr * weight_decay
    opmath_t lerp;          // see lerp_step()
    opmath_t beta2;
    opmath_t weight2;  // 1 - beta2
    opmath_t root;
    opmath_t eps;
    opmath_t step;
  };

  using OnDevice = DerivedOnDevice;
  static MOMENTUM_EXT_INLINE void keep_derived(const Coefficients<double>& c, double* derived) {
    derived[0] = c.weight_decay;
    derived[1] = c.step;
    derived[2] = c.root;
  }

  using Numbers = MomentNumbers;

  template <typename Reader>
  static bool read(Reader& group, Options& options, Numbers& numbers, OnDevice&) {
    bool fused;
    group.optional_flag("fused", fused);
    group.optional_flag("amsgrad", options.amsgrad);
    return numbers.read(group, options.weight_decay, /*may_count_on_device=*/fused);
  }

  // The counters after a step, before they are rounded to their tensors' dtypes.
  static MOMENTUM_EXT_INLINE void count(const Numbers&, const bool* /*is_double*/,
                                        double* counters) {
    counters[0] += 1;
  }

  // Of the step that has led to these counters.
  static MOMENTUM_EXT_INLINE void prepare(const Numbers& n, const double* counters,
                                          Coefficients<double>& c) {
    const double bias1 = 1 - std::pow(n.beta1, counters[0]);
    const double bias2 = 1 - std::pow(n.beta2, counters[0]);
    n.prepare(c);
    c.step = -(n.lr / bias1);
    if (n.lr_is_float) c.step = -(static_cast<float>(n.lr) / static_cast<float>(bias1));
    c.root = std::pow(bias2, 0.5);
  }

  static Coefficients<float> rounded(const Coefficients<double>& c) {
    return {static_cast<float>(c.grad_coef),
            static_cast<float>(c.weight_decay),
            lerp_step<float>(lerp_weight(c.lerp)),
            static_cast<float>(c.beta2),
            static_cast<float>(c.weight2),
            static_cast<float>(c.root),
            static_cast<float>(c.eps),
            static_cast<float>(c.step)};
  }

  // States are zeros before a tensor's first step, which is like all others.
  static MOMENTUM_EXT_INLINE int num_states(const Options& options) {
    return options.amsgrad ? 3 : 2;
  }
  static MOMENTUM_EXT_INLINE int num_reads(const Options& options, bool) {
    return num_states(options);
  }

  template <WeightDecay kWeightDecay_, bool kAmsgrad_>
  struct Variant {
    static constexpr WeightDecay kWeightDecay = kWeightDecay_;
    static constexpr bool kAmsgrad = kAmsgrad_;
    static constexpr int kStates = kAmsgrad ? 3 : 2;
    static constexpr int kReads = kStates;
  };

  // Numbered as Sgd's: those without weight decay last.
  static constexpr int kVariants = 6;
  static constexpr int kMergedVariants = 4;

  static MOMENTUM_EXT_INLINE int variant_of(const Options& options, bool) {
    if (options.weight_decay == WeightDecay::kNone) return kMergedVariants + options.amsgrad;
    return 2 * options.amsgrad + (options.weight_decay == WeightDecay::kL2 ? 1 : 0);
  }

  MOMENTUM_EXT_CALLS_BACK
  template <int kCount = kVariants, typename Visit>
  static MOMENTUM_EXT_INLINE constexpr decltype(auto) visit_variant(int number,
                                                                    const Visit& visit) {
    return choose<kCount>(number, [&visit]<int k>() -> decltype(auto) {
      constexpr bool kHasDecay = k < kMergedVariants;
      constexpr WeightDecay kDecay = !kHasDecay   ? WeightDecay::kNone
                                     : k % 2 == 1 ? WeightDecay::kL2
                                                  : WeightDecay::kDecoupled;
      return visit(Variant<kDecay, (kHasDecay ? k / 2 : k - kMergedVariants) == 1>());
    });
  }

  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE void merge(Options& options, Coefficients<opmath_t>& c) {
    merge_no_decay(options, c);
  }

  template <typename opmath_t, typename Read>
  static MOMENTUM_EXT_INLINE void read_on_device(const OnDevice& numbers, const Read&, Options&,
                                                 Coefficients<opmath_t>& c) {
    if (numbers.derived == nullptr) return;
    c.weight_decay = static_cast<opmath_t>(numbers.derived[0]);
    c.step = static_cast<opmath_t>(numbers.derived[1]);
    c.root = static_cast<opmath_t>(numbers.derived[2]);
  }

  template <typename Arithmetic, typename Variant, typename opmath_t>
  static MOMENTUM_EXT_INLINE void update(Variant, const Coefficients<opmath_t>& c, opmath_t grad,
                                         opmath_t& param, opmath_t* state) {
    update_moments<Arithmetic, Variant::kWeightDecay>(c, grad, param, state);
    if constexpr (Variant::kAmsgrad) {  // a NaN stays
      state[2] = state[1] > state[2] || state[1] != state[1] ? state[1] : state[2];
    }
    const opmath_t deviation = square_root(state[Variant::kStates - 1]);
    const opmath_t denominator = Arithmetic::divide_by_number(deviation, c.root) + c.eps;
    param = Arithmetic::add_quotient(c.step, state[0], denominator, param);
  }
};

}  // namespace momentum_ext
