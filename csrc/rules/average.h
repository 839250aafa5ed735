// An exponential moving average of the parameters.
#pragma once

#include "math.h"

namespace momentum_ext {

// The new parameter's weight in its average after `count` updates. It is 1 before the first one:
// the average starts as a copy. With warm-up the decay is at most (1 + count) / (10 + count).
MOMENTUM_EXT_INLINE double average_weight(double decay, bool warms_up, double count) {
  if (count == 0) return 1;
  const double most = (1 + count) / (10 + count);
  return 1 - (warms_up && most < decay ? most : decay);
}

// True where the average becomes the parameter: there may be nothing yet to average with.
template <typename opmath_t>
MOMENTUM_EXT_INLINE bool is_copy(opmath_t weight) {
  return weight == 1;
}

// average + weight * (param - average), as torch's lerp writes it: from the nearer end.
template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t interpolate(opmath_t weight, opmath_t average, opmath_t param) {
  const bool is_small = weight < opmath_t{0.5};
  return Fma::apply(is_small ? weight : weight - 1, param - average, is_small ? average : param);
}

template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t new_average(opmath_t weight, opmath_t average, opmath_t param) {
  return is_copy(weight) ? param : interpolate<Fma>(weight, average, param);
}

}  // namespace momentum_ext
