// clang-format off
// The update of one element: the only place where a formula of the update stands.
//
//   g = grad_coef * grad                       unscaled and negated where asked for; else exactly grad
//   g = fma(weight_decay, p, g)                L2 weight decay
//   p = weight_decay * p                       decoupled: weight_decay holds 1 - lr * weight_decay
//   b = fma(alpha, g, round(momentum * b))     on a tensor's first step: b = first_alpha * g
//   d = fma(momentum, b, nesterov_alpha * g)   Nesterov; else d = b, and without momentum d = g
//   p = fma(-step, d, p)
//
// With alpha = 1 - dampening, first_alpha = nesterov_alpha = 1 and step = lr this is torch.optim.SGD, to
// the bit. Other formulations are other numbers, chosen on the host; the kernels never know which one
// runs. (nesterov_alpha is a number of its own because torch does not dampen the gradient that Nesterov
// adds.)
//
// Compile with contraction off (-ffp-contract=off): every rounding is then the one written here, so that
// the result depends neither on the compiler, nor on the vector width, nor on where in a vector an element
// falls.
// clang-format on
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOMENTUM_EXT_INLINE __host__ __device__ __forceinline__
#else
#define MOMENTUM_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace momentum_ext {

enum class WeightDecay : uint8_t { kNone, kL2, kDecoupled };
enum class Momentum : uint8_t { kNone, kFirstStep, kLaterStep };

// What the formulas need, rounded once from double to the type they are computed in.
template <typename opmath_t>
struct Coefficients {
  opmath_t grad_coef;     // (maximize ? -1 : 1) / grad_scale
  opmath_t weight_decay;  // decoupled: 1 - lr * weight_decay
  opmath_t momentum;
  opmath_t alpha;
  opmath_t first_alpha;
  opmath_t nesterov_alpha;
  opmath_t step;
};

// How a * b + c is rounded. Hardware without fma rounds twice, and so does torch on it.
struct FusedMultiplyAdd {
  static MOMENTUM_EXT_INLINE float apply(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  static MOMENTUM_EXT_INLINE double apply(double a, double b, double c) {
    return __builtin_fma(a, b, c);
  }
};
struct SeparateMultiplyAdd {
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t apply(opmath_t a, opmath_t b, opmath_t c) {
    return a * b + c;
  }
};

// Decoupled weight decay, with factor 1 - lr * weight_decay.
template <typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t decayed(opmath_t factor, opmath_t param) {
  return factor * param;
}

template <typename Fma, WeightDecay kWeightDecay, Momentum kMomentum, bool kNesterov,
          typename opmath_t>
MOMENTUM_EXT_INLINE void update_element(const Coefficients<opmath_t>& c, opmath_t grad,
                                        opmath_t& param, opmath_t& buffer) {
  opmath_t g = c.grad_coef * grad;
  if constexpr (kWeightDecay == WeightDecay::kL2) {
    g = Fma::apply(c.weight_decay, param, g);
  } else if constexpr (kWeightDecay == WeightDecay::kDecoupled) {
    param = decayed(c.weight_decay, param);
  }
  opmath_t direction = g;
  if constexpr (kMomentum != Momentum::kNone) {
    if constexpr (kMomentum == Momentum::kFirstStep) {
      buffer = c.first_alpha * g;
    } else {
      buffer = Fma::apply(c.alpha, g, c.momentum * buffer);
    }
    direction = buffer;
    if constexpr (kNesterov) {
      direction = Fma::apply(c.momentum, buffer, c.nesterov_alpha * g);
    }
  }
  param = Fma::apply(-c.step, direction, param);
}

// An exponential moving average of the parameters, average = average + weight * (p - average), as
// torch's lerp writes it: from the nearer end.
template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t average_of(opmath_t weight, opmath_t average, opmath_t param) {
  const bool is_small = weight < opmath_t{0.5};
  return Fma::apply(is_small ? weight : weight - 1, param - average, is_small ? average : param);
}

// The new parameter's weight in its average, after `count` updates: 1 at first, when the average
// starts as a copy. With warm-up the decay is at most (1 + count) / (10 + count).
MOMENTUM_EXT_INLINE double average_weight(double decay, bool warms_up, double count) {
  if (count == 0) return 1;
  const double most = (1 + count) / (10 + count);
  return 1 - (warms_up && most < decay ? most : decay);
}

// A term of a 2-norm. Of a float the square is exact, so that it is rounded once with fma or
// without.
MOMENTUM_EXT_INLINE double add_square(double sum, double x) {
  return FusedMultiplyAdd::apply(x, x, sum);
}

// What clipping to max_norm multiplies gradients of this norm with, as torch computes it. NaN
// stays.
template <typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t clip_coefficient(opmath_t max_norm, opmath_t norm) {
  const opmath_t coefficient = 1 / (norm + static_cast<opmath_t>(1e-6)) * max_norm;
  return coefficient > 1 ? opmath_t{1} : coefficient;
}

// Nesterov's two points. With nesterov the parameters are trained at the look-ahead point
// y = p - distance * b, where the gradient is taken; p is the iterate of the textbook. `distance`
// is momentum * step, in the formulation's units.
template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t iterate_of(opmath_t distance, opmath_t lookahead, opmath_t buffer) {
  return Fma::apply(distance, buffer, lookahead);
}
template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t lookahead_of(opmath_t distance, opmath_t iterate, opmath_t buffer) {
  return Fma::apply(-distance, buffer, iterate);
}

}  // namespace momentum_ext
