// What every rule is written in: functions for host and device, and how a * b + c is rounded.
//
// Compile with contraction off (-ffp-contract=off, --fmad=false): every rounding is then one that a
// rule has written, and the result depends neither on the compiler, nor on the vector width, nor on
// where in a vector an element falls.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOMENTUM_EXT_INLINE __host__ __device__ __forceinline__
#else
#define MOMENTUM_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace momentum_ext {

struct FusedMultiplyAdd {
  static MOMENTUM_EXT_INLINE float apply(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  static MOMENTUM_EXT_INLINE double apply(double a, double b, double c) {
    return __builtin_fma(a, b, c);
  }
};

// Hardware without fma rounds twice, and so does torch on it.
struct SeparateMultiplyAdd {
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t apply(opmath_t a, opmath_t b, opmath_t c) {
    return a * b + c;
  }
};

}  // namespace momentum_ext
