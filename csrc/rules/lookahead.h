// Nesterov's two points. With nesterov the parameters are trained at the look-ahead point
// y = p - distance * b, where the gradient is taken; p is the iterate of the textbook. `distance`
// is momentum * step, in the formulation's units.
#pragma once

#include "math.h"

namespace momentum_ext {

template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t iterate_of(opmath_t distance, opmath_t lookahead, opmath_t buffer) {
  return Fma::apply(distance, buffer, lookahead);
}

template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t lookahead_of(opmath_t distance, opmath_t iterate, opmath_t buffer) {
  return Fma::apply(-distance, buffer, iterate);
}

// The way back, for a parameter that was moved from `lookahead` to `moved_to`. Where it is still
// there, the very bits that it came from; what was changed in between moves by the same distance.
template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t return_to_lookahead(opmath_t distance, opmath_t lookahead,
                                                 opmath_t moved_to, opmath_t param,
                                                 opmath_t buffer) {
  const bool is_there = moved_to == param || (moved_to != moved_to && param != param);
  return is_there ? lookahead : lookahead_of<Fma>(distance, param, buffer);
}

}  // namespace momentum_ext
