// The dtypes of parameters, gradients and states, how their values are loaded and stored, and the
// visitor that makes a type of a dtype.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../rules/math.h"

namespace momentum_ext {

// Those of 8 and 4 bits are for states alone, in blocks, see block8.h.
enum class Dtype : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kInt8,
  kFloat8E4M3,
  kInt4,
  kUInt8Root
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MOMENTUM_EXT_INLINE constexpr bool has_blocks(Dtype dtype) { return dtype >= Dtype::kInt8; }

// In bytes; two int4 share one.
constexpr int64_t itemsize(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : has_blocks(dtype) ? 1 : 2;
}
constexpr int64_t num_bytes(Dtype dtype, int64_t numel) {
  return dtype == Dtype::kInt4 ? (numel + 1) / 2 : numel * itemsize(dtype);
}

template <Dtype dtype>
using Scalar = std::conditional_t<
    dtype == Dtype::kFloat32, float,
    std::conditional_t<dtype == Dtype::kFloat64, double,
                       std::conditional_t<dtype == Dtype::kBFloat16, BFloat16, Float16>>>;

// The type in which an element of type scalar_t is computed.
template <typename scalar_t>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};

namespace detail {
MOMENTUM_EXT_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
MOMENTUM_EXT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
}  // namespace detail

// Loading widens and is exact.
MOMENTUM_EXT_INLINE float load(float value) { return value; }
MOMENTUM_EXT_INLINE double load(double value) { return value; }
MOMENTUM_EXT_INLINE float load(BFloat16 value) {
  return detail::float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}
MOMENTUM_EXT_INLINE float load(Float16 value) {
#if defined(__CUDA_ARCH__)
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(value.bits));
  return widened;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf, NaN
    return detail::float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  const float absolute = magnitude < 0x400u  // subnormal: a multiple of 2^-24
                             ? static_cast<float>(magnitude) * 0x1p-24f
                             : detail::float_from_bits((magnitude << 13) + 0x38000000u);
  return detail::float_from_bits(sign | detail::bits_of(absolute));
#endif
}

// Storing rounds once, to nearest, ties to even. A NaN stays a NaN. GPUs have instructions for this
// that give the same bits for all but a NaN.
MOMENTUM_EXT_INLINE void store(float& out, float value) { out = value; }
MOMENTUM_EXT_INLINE void store(double& out, double value) { out = value; }
MOMENTUM_EXT_INLINE void store(BFloat16& out, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = detail::bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}
MOMENTUM_EXT_INLINE void store(Float16& out, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = detail::bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to Inf
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal
    // Adding 0.5 makes the hardware round at bit 2^-24.
    result = detail::bits_of(detail::float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | result);
#endif
}

// Calls visit(scalar_t()) with the type of a dtype of 16 bits or more that is computed in opmath_t or
// in less. The only place that asks a dtype which type it is, but for visit_blocks() in block8.h.
MOMENTUM_EXT_CALLS_BACK
template <typename opmath_t, typename Visit>
MOMENTUM_EXT_INLINE decltype(auto) visit_dtype(Dtype dtype, const Visit& visit) {
  if (dtype == Dtype::kFloat32) return visit(float());
  if constexpr (sizeof(opmath_t) == sizeof(double)) {
    if (dtype == Dtype::kFloat64) return visit(double());
  }
  return dtype == Dtype::kBFloat16 ? visit(BFloat16()) : visit(Float16());
}

}  // namespace momentum_ext
