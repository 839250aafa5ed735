// Norms of gradients, and what follows from one: the factor that gradients are multiplied with.
#pragma once

#include "math.h"

namespace momentum_ext {

// What is summed over a list of gradients.
enum class Norm : uint8_t { kSumOfSquares, kSumOfAbs, kMax };

// sum + x * x. It is exact before the addition if x came from a float, and then has the same bits
// with fma and without.
MOMENTUM_EXT_INLINE double add_square(double sum, double x) {
  return FusedMultiplyAdd::apply(x, x, sum);
}

// The larger one. A NaN stays, and so does one that comes.
MOMENTUM_EXT_INLINE double larger(double x, double y) { return y <= x || x != x ? x : y; }

MOMENTUM_EXT_INLINE bool is_finite(double x) { return x - x == 0; }

// What gradients are clipped by: at most 1. A NaN stays. torch divides by multiplying with the
// reciprocal.
template <typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t clip_coefficient(opmath_t max_norm, opmath_t norm) {
  const opmath_t coefficient = 1 / (norm + static_cast<opmath_t>(1e-6)) * max_norm;
  return coefficient > 1 ? opmath_t{1} : coefficient;
}

// What undoes torch.amp.GradScaler's scale: a float, as it computes it.
MOMENTUM_EXT_INLINE float inverse_of_scale(float scale) { return 1.0f / scale; }

}  // namespace momentum_ext
