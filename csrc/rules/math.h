// What every rule is written in: functions for host and device, and how a * b + c is rounded.
//
// Compile with contraction off (-ffp-contract=off, --fmad=false): every rounding is then one that a
// rule has written, and the result depends neither on the compiler, nor on the vector width, nor on
// where in a vector an element falls.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MOMENTUM_EXT_INLINE __host__ __device__ __forceinline__
#else
#define MOMENTUM_EXT_INLINE inline __attribute__((always_inline))
#endif

// Before a function that calls a function it is given: on host or device, whichever that is for.
#if defined(__CUDACC__)
#define MOMENTUM_EXT_CALLS_BACK _Pragma("nv_exec_check_disable")
#else
#define MOMENTUM_EXT_CALLS_BACK
#endif

namespace momentum_ext {

enum class WeightDecay : uint8_t { kNone, kL2, kDecoupled };

// "No decay" becomes decoupled decay with a coefficient of 1: fewer variants for a multiplication.
template <typename Options, typename Coefficients>
MOMENTUM_EXT_INLINE void merge_no_decay(Options& options, Coefficients& c) {
  if (options.weight_decay != WeightDecay::kNone) return;
  options.weight_decay = WeightDecay::kDecoupled;
  c.weight_decay = 1;
}

// Correctly rounded on every device.
MOMENTUM_EXT_INLINE float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}
MOMENTUM_EXT_INLINE double square_root(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

// How torch's loop divides on the CPU.
struct CpuDivision {
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t divide_by_number(opmath_t value, opmath_t number) {
    return value / number;
  }
  // torch's addcdiv
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t add_quotient(opmath_t factor, opmath_t a, opmath_t b,
                                                   opmath_t sum) {
    return sum + factor * a / b;
  }
};

struct FusedMultiplyAdd : CpuDivision {
  static MOMENTUM_EXT_INLINE float apply(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  static MOMENTUM_EXT_INLINE double apply(double a, double b, double c) {
    return __builtin_fma(a, b, c);
  }
};

// Hardware without fma rounds twice, and so does torch on it.
struct SeparateMultiplyAdd : CpuDivision {
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t apply(opmath_t a, opmath_t b, opmath_t c) {
    return a * b + c;
  }
};

// torch's loop on CUDA: a number of the host divides by its reciprocal, and nvcc contracts addcdiv.
// (Read in torch's source; unchecked on a GPU.)
struct CudaArithmetic : FusedMultiplyAdd {
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t divide_by_number(opmath_t value, opmath_t number) {
    return value * (1 / number);
  }
  template <typename opmath_t>
  static MOMENTUM_EXT_INLINE opmath_t add_quotient(opmath_t factor, opmath_t a, opmath_t b,
                                                   opmath_t sum) {
    return apply(factor, a / b, sum);
  }
};

// By integers: nvcc asks for the sign of a float in double.
MOMENTUM_EXT_INLINE bool has_sign_bit(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits < 0;
}
MOMENTUM_EXT_INLINE bool has_sign_bit(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits < 0;
}

// torch's lerp, which starts from the nearer end: `step` tells by its sign bit which that is. (A
// weight and a flag would take CUDA kernels a register more than they have.)
template <typename Fma, typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t lerp(opmath_t step, opmath_t from, opmath_t to) {
  const bool from_start = !has_sign_bit(step);
  return Fma::apply(step, to - from, from_start ? from : to);
}
// Of a weight of `to` from 0 to 1, which is rounded to opmath_t; and the weight again.
template <typename opmath_t>
MOMENTUM_EXT_INLINE opmath_t lerp_step(double weight) {
  const auto rounded = static_cast<opmath_t>(weight);
  if (rounded < opmath_t{0.5}) return rounded;
  return rounded == 1 ? opmath_t{-0.0} : rounded - 1;
}
MOMENTUM_EXT_INLINE double lerp_weight(double step) { return has_sign_bit(step) ? step + 1 : step; }

// Calls f.operator()<k>() for each k below n.
MOMENTUM_EXT_CALLS_BACK
template <int n, int k = 0, typename F>
MOMENTUM_EXT_INLINE void repeat(const F& f) {
  if constexpr (k < n) {
    f.template operator()<k>();
    repeat<n, k + 1>(f);
  }
}

// Returns f.operator()<k>() for the k below n that `number` is. By a switch: of a chain of questions
// ptxas makes code with more registers.
MOMENTUM_EXT_CALLS_BACK
template <int n, typename F>
MOMENTUM_EXT_INLINE constexpr decltype(auto) choose(int number, const F& f) {
  static_assert(n <= 16);
  // clang-format off
#define MOMENTUM_EXT_CASE(k) case k: if constexpr (k < n) return f.template operator()<(k)>(); break;
#define MOMENTUM_EXT_CASES(a, b, c, d, e) MOMENTUM_EXT_CASE(a) MOMENTUM_EXT_CASE(b) MOMENTUM_EXT_CASE(c) MOMENTUM_EXT_CASE(d) MOMENTUM_EXT_CASE(e)
  switch (number) {
    MOMENTUM_EXT_CASES(1, 2, 3, 4, 5) MOMENTUM_EXT_CASES(6, 7, 8, 9, 10) MOMENTUM_EXT_CASES(11, 12, 13, 14, 15)
    default: break;
  }
#undef MOMENTUM_EXT_CASES
#undef MOMENTUM_EXT_CASE
  // clang-format on
  return f.template operator()<0>();
}

}  // namespace momentum_ext
