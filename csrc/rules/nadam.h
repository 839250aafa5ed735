// NAdam, Nesterov's momentum in Adam: one element's update.
//
//   g = grad_coef * grad                         unscaled and negated where asked for; else exactly grad
//   g = fma(weight_decay, p, g)                  L2 weight decay
//   or p = weight_decay * p                      decoupled: this coefficient is 1 - lr * weight_decay
//   m = lerp(m, g, 1 - beta1)                    exp_avg
//   v = fma((1 - beta2) * g, g, beta2 * v)       exp_avg_sq
//   d = sqrt(v / bias) + eps
//   p = p + grad_step * g / d + step * m / d
//
// with mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2), bias = 1 - beta2^t, and
// grad_step = -lr * (1 - mu_t) / (1 - mu_1 ... mu_t), step = -lr * mu_(t+1) / (1 - mu_1 ... mu_(t+1))
// in the tensor's t-th step. In fp32 and fp64 these are the bits of torch.optim.NAdam's for-loop.
//
// Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop.
#pragma once

#include <cmath>

#include "math.h"
#include "moments.h"

namespace momentum_ext {

struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr int kMaxStates = 2;
  static constexpr const char* kStateKeys[kMaxStates] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* kScaleKeys[kMaxStates] = {"exp_avg_scale", "exp_avg_sq_scale"};
  static constexpr bool kIsNonNegative[kMaxStates] = {false, true};
  static constexpr int kCounters = 2;
  static constexpr const char* kCounterKeys[kCounters] = {"step", "mu_product"};
  static constexpr double kCounterStarts[kCounters] = {0, 1};

  struct Options {
    WeightDecay weight_decay = WeightDecay::kNone;

    static constexpr int kBits = 2;
    MOMENTUM_EXT_INLINE uint32_t bits() const { return static_cast<uint32_t>(weight_decay); }
    static MOMENTUM_EXT_INLINE Options of_bits(uint32_t bits) {
      return {static_cast<WeightDecay>(bits & 3)};
    }
  };

  template <typename opmath_t>
  struct Coefficients {
    opmath_t grad_coef;     // 1, or -1 for maximize; times 1 / grad_scale and the clip coefficient
    opmath_t weight_decay;  // decoupled: 1 - lr * weight_decay
    opmath_t lerp;          // see lerp_step()
    opmath_t beta2;
    opmath_t weight2;  // 1 - beta2
    opmath_t bias;
    opmath_t eps;
    opmath_t grad_step;
    opmath_t step;
  };

  using OnDevice = DerivedOnDevice;
  static MOMENTUM_EXT_INLINE void keep_derived(const Coefficients<double>& c, double* derived) {
    derived[0] = c.weight_decay;
    derived[1] = c.bias;
    derived[2] = c.grad_step;
    derived[3] = c.step;
  }

  struct Numbers : MomentNumbers {
    double momentum_decay = 0;

    MOMENTUM_EXT_INLINE double mu(double step) const {
      return beta1 * (1.0 - 0.5 * std::pow(0.96, step * momentum_decay));
    }
  };

  template <typename Reader>
  static bool read(Reader& group, Options& options, Numbers& numbers, OnDevice&) {
    group.number("momentum_decay", numbers.momentum_decay, Reader::kNumber);
    return numbers.read(group, options.weight_decay,
                        /*may_count_on_device=*/false);
  }

  // A product of two fp32 numbers is exact before it is rounded, as torch's is.
  static MOMENTUM_EXT_INLINE void count(const Numbers& n, const bool* is_double, double* counters) {
    counters[0] += 1;
    const double mu = n.mu(is_double[0] ? counters[0] : static_cast<float>(counters[0]));
    counters[1] *= is_double[1] ? mu : static_cast<float>(mu);
  }

  static MOMENTUM_EXT_INLINE void prepare(const Numbers& n, const double* counters,
                                          Coefficients<double>& c) {
    const double step = counters[0];
    const double mu = n.mu(step);
    const double next_mu = n.mu(step + 1);
    const double left = 1.0 - counters[1];
    const double next_left = 1.0 - counters[1] * next_mu;
    n.prepare(c);
    c.grad_step = -n.lr * (1.0 - mu) / left;
    c.step = -n.lr * next_mu / next_left;
    if (n.lr_is_float) {
      const auto lr = static_cast<float>(n.lr);
      c.grad_step = -lr * static_cast<float>(1.0 - mu) / static_cast<float>(left);
      c.step = -lr * static_cast<float>(next_mu) / static_cast<float>(next_left);
    }
    c.bias = 1 - std::pow(n.beta2, step);
  }

  static Coefficients<float> rounded(const Coefficients<double>& c) {
    return {static_cast<float>(c.grad_coef),
            static_cast<float>(c.weight_decay),
            lerp_step<float>(lerp_weight(c.lerp)),
            static_cast<float>(c.beta2),
            static_cast<float>(c.weight2),
            static_cast<float>(c.bias),
            static_cast<float>(c.eps),
            static_cast<float>(c.grad_step),
            static_cast<float>(c.step)};
  }

  // States are zeros before a tensor's first step, which is like all others.
  static MOMENTUM_EXT_INLINE int num_states(const Options&) { return 2; }
  static MOMENTUM_EXT_INLINE int num_reads(const Options&, bool) { return 2; }

  template <WeightDecay kWeightDecay_>
  struct Variant {
    static constexpr WeightDecay kWeightDecay = kWeightDecay_;
    static constexpr int kStates = 2;
    static constexpr int kReads = 2;
  };

  // Numbered as Sgd's: the one without weight decay last.
  static constexpr int kVariants = 3;
  static constexpr int kMergedVariants = 2;

  static MOMENTUM_EXT_INLINE int variant_of(const Options& options, bool) {
    return options.weight_decay == WeightDecay::kNone ? 2
           : options.weight_decay == WeightDecay::kL2 ? 1
                                                      : 0;
  }

  MOMENTUM_EXT_CALLS_BACK
  template <int kCount = kVariants, typename Visit>
  static MOMENTUM_EXT_INLINE constexpr decltype(auto) visit_variant(int number,
                                                                    const Visit& visit) {
    return choose<kCount>(number, [&visit]<int k>() -> decltype(auto) {
      return visit(Variant<k == 0   ? WeightDecay::kDecoupled
                           : k == 1 ? WeightDecay::kL2
                                    : WeightDecay::kNone>());
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
    c.bias = static_cast<opmath_t>(numbers.derived[1]);
    c.grad_step = static_cast<opmath_t>(numbers.derived[2]);
    c.step = static_cast<opmath_t>(numbers.derived[3]);
  }

  template <typename Arithmetic, typename Variant, typename opmath_t>
  static MOMENTUM_EXT_INLINE void update(Variant, const Coefficients<opmath_t>& c, opmath_t grad,
                                         opmath_t& param, opmath_t* state) {
    const opmath_t g = update_moments<Arithmetic, Variant::kWeightDecay>(c, grad, param, state);
    const opmath_t denominator =
        square_root(Arithmetic::divide_by_number(state[1], c.bias)) + c.eps;
    param = Arithmetic::add_quotient(c.grad_step, g, denominator, param);
    param = Arithmetic::add_quotient(c.step, state[0], denominator, param);
  }
};

}  // namespace momentum_ext
