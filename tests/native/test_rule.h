// A rule that the product does not have, with up to three states, as a rule more would be written:
// Adam, with what changes its formulas. The tests run it through the kernels' unchanged files.
#pragma once

#include "../../csrc/rules/math.h"
#include "../../csrc/step_scalars.h"

namespace momentum_ext {

struct TestRule {
  static constexpr int kMaxStates = 3;
  static constexpr const char* kStateKeys[kMaxStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  struct Options {
    bool has_max = false;  // of the second moment: a third state
    bool decays = false;

    static constexpr int kBits = 2;
    MOMENTUM_EXT_INLINE uint32_t bits() const { return uint32_t{has_max} | uint32_t{decays} << 1; }
    static MOMENTUM_EXT_INLINE Options of_bits(uint32_t bits) {
      return {(bits & 1) != 0, (bits & 2) != 0};
    }
  };

  template <typename opmath_t>
  struct Coefficients {
    opmath_t grad_coef, decay, weight1, beta2, weight2, root2, eps, step;
  };
  struct OnDevice {
    DeviceNumber step;
    bool any() const { return step.data != nullptr; }
  };
  MOMENTUM_EXT_CALLS_BACK
  template <typename opmath_t, typename Read>
  static MOMENTUM_EXT_INLINE void read_on_device(const OnDevice& numbers, const Read& read,
                                                 Options&, Coefficients<opmath_t>& c) {
    if (numbers.step.data != nullptr) c.step = read(numbers.step);
  }
  static Coefficients<float> rounded(const Coefficients<double>& c) {
    return {static_cast<float>(c.grad_coef), static_cast<float>(c.decay),
            static_cast<float>(c.weight1),   static_cast<float>(c.beta2),
            static_cast<float>(c.weight2),   static_cast<float>(c.root2),
            static_cast<float>(c.eps),       static_cast<float>(c.step)};
  }

  // The first step reads no state: they are zeros.
  static MOMENTUM_EXT_INLINE int num_states(const Options& options) {
    return options.has_max ? 3 : 2;
  }
  static MOMENTUM_EXT_INLINE int num_reads(const Options& options, bool is_first_step) {
    return is_first_step ? 0 : num_states(options);
  }

  template <bool kIsFirst_, bool kHasMax_, bool kDecays_>
  struct Variant {
    static constexpr bool kIsFirst = kIsFirst_, kHasMax = kHasMax_, kDecays = kDecays_;
    static constexpr int kStates = kHasMax ? 3 : 2;
    static constexpr int kReads = kIsFirst ? 0 : kStates;
  };
  static constexpr int kVariants = 8;
  static constexpr int kMergedVariants = kVariants;
  static MOMENTUM_EXT_INLINE int variant_of(const Options& options, bool is_first_step) {
    return (is_first_step ? 1 : 0) + (options.has_max ? 2 : 0) + (options.decays ? 4 : 0);
  }
  MOMENTUM_EXT_CALLS_BACK
  template <int kCount = kVariants, typename Visit>
  static MOMENTUM_EXT_INLINE constexpr decltype(auto) visit_variant(int number,
                                                                    const Visit& visit) {
    return choose<kCount>(number, [&visit]<int k>() -> decltype(auto) {
      return visit(Variant<(k & 1) != 0, (k & 2) != 0, (k & 4) != 0>());
    });
  }
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE void merge(Options&, Coefficients<opmath_t>&) {}

  static MOMENTUM_EXT_INLINE float root(float x) { return __builtin_sqrtf(x); }
  static MOMENTUM_EXT_INLINE double root(double x) { return __builtin_sqrt(x); }

  template <typename Fma, typename Variant, typename opmath_t>
  static MOMENTUM_EXT_INLINE void update(Variant, const Coefficients<opmath_t>& c, opmath_t grad,
                                         opmath_t& param, opmath_t* state) {
    const opmath_t g = c.grad_coef * grad;
    if constexpr (Variant::kDecays) param = c.decay * param;
    const opmath_t first = Variant::kIsFirst ? opmath_t{0} : state[0];
    const opmath_t second = Variant::kIsFirst ? opmath_t{0} : state[1];
    state[0] = Fma::apply(c.weight1, g - first, first);
    state[1] = Fma::apply(c.weight2 * g, g, c.beta2 * second);
    opmath_t largest = state[1];
    if constexpr (Variant::kHasMax) {
      const opmath_t before = Variant::kIsFirst ? opmath_t{0} : state[2];
      largest = largest <= before ? before : largest;
      state[2] = largest;
    }
    param = Fma::apply(c.step, state[0] / (root(largest) / c.root2 + c.eps), param);
  }
};

}  // namespace momentum_ext
