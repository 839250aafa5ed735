// Blocks of 8 or 4 bits: kScaleBlock elements in a row share a scale of 16 bits (block-wise quantization:
// Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022; a companded map in
// blocks of 32: Ortiz et al., "FlashOptim", 2026).
//
// A code stands for a number, its level, and a stored value is level times scale. The block's
// largest value has the code of the largest level, kTop, so that the scale is largest / kTop. It
// has 8 bits of exponent and 8 of mantissa: an fp32 without its sign and its last 15 bits. kTop times
// a scale is exact, so values that are decoded encode to the same codes and scale again.
#pragma once

#include "dtype.h"

namespace momentum_ext {

// Code c stands for c * (kSquare * |c| + kLinear): what is small in its block has the finer steps.
// y * (0.405 + 0.595 * |y|) for y = c / 127, in integers.
struct Int8 {
  int8_t bits;
  static constexpr float kSquare = 3;
  static constexpr float kLinear = 259;
  static constexpr int kLargestCode = 127;
  static constexpr float kTop = kLargestCode * (kSquare * kLargestCode + kLinear);
  static constexpr float kSmallestScale = 0x1.9cp-117f;  // 2^-100 / kTop, rounded down
  static constexpr float kLargestScale = 0x1.9cp+111f;   // the largest whose kTop-fold is finite
};
// y * (0.59 + 0.41 * |y|) for y = c / 7. Elements 2i and 2i + 1 of a tensor have the lower and the
// upper half of byte i.
struct Int4 {
  int8_t bits;
  static constexpr float kSquare = 1;
  static constexpr float kLinear = 10;
  static constexpr int kLargestCode = 7;
  static constexpr float kTop = kLargestCode * (kSquare * kLargestCode + kLinear);
  static constexpr float kSmallestScale = 0x1.13p-107f;
  static constexpr float kLargestScale = 0x1.13p+121f;
};
struct Float8E4M3 {
  uint8_t bits;
  static constexpr float kTop = 448;
  static constexpr float kSmallestScale = 0x1.24p-109f;
  static constexpr float kLargestScale = 0x1.24p+119f;
};

constexpr int64_t kScaleBlock = 32;  // elements

using ScaleBits = uint16_t;
constexpr int kCutOff = 15;  // bits of an fp32 that a scale does not have
constexpr uint32_t kScaleMask = ~((1u << kCutOff) - 1);

MOMENTUM_EXT_INLINE float load_scale(ScaleBits bits) {
  return detail::float_from_bits(static_cast<uint32_t>(bits) << kCutOff);
}

struct BlockScale {
  ScaleBits bits;
  float inverse;  // 0: store zeros
};

namespace detail {
// An Inf or NaN makes the whole block NaN, so that an overflow is seen. A block below 2^-100
// becomes zero: its inverse could overflow.
template <typename scalar_t>
MOMENTUM_EXT_INLINE BlockScale checked_scale(uint32_t largest_bits, float rounded) {
  const float scale = rounded > scalar_t::kLargestScale ? scalar_t::kLargestScale : rounded;
  const bool is_finite = largest_bits < 0x7f800000u;
  const bool is_zero = scale < scalar_t::kSmallestScale;
  const uint32_t bits = is_zero ? 0 : bits_of(scale) >> kCutOff;
  const float inverse = 1 / scale;  // without a branch: for vectors
  return {static_cast<ScaleBits>(is_finite ? bits : 0x7fc00000u >> kCutOff),
          (is_finite & !is_zero) ? inverse : 0};
}
}  // namespace detail

// From the bits of the largest magnitude in the block, which as integers are in the magnitudes'
// order. The scale is rounded to nearest.
template <typename scalar_t>
MOMENTUM_EXT_INLINE BlockScale block_scale(uint32_t largest_bits) {
  const float exact = detail::float_from_bits(largest_bits) / scalar_t::kTop;
  const uint32_t sum = detail::bits_of(exact) + (1u << (kCutOff - 1));
  return detail::checked_scale<scalar_t>(largest_bits, detail::float_from_bits(sum & kScaleMask));
}

MOMENTUM_EXT_INLINE float clamped(float value, float largest) {
  const float below = value > largest ? largest : value;
  return below < -largest ? -largest : below;
}

namespace detail {
// Its last bits do not matter.
MOMENTUM_EXT_INLINE float about_sqrt(float value) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return __builtin_sqrtf(value);
#endif
}

MOMENTUM_EXT_INLINE float absolute(float value) {
  return float_from_bits(bits_of(value) & 0x7fffffffu);
}

template <typename scalar_t>
MOMENTUM_EXT_INLINE float level(float code) {
  return code * (scalar_t::kSquare * absolute(code) + scalar_t::kLinear);
}

template <typename scalar_t>
using IfCompanded = std::enable_if_t<(scalar_t::kLargestCode > 0), int>;
}  // namespace detail

template <typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE float load(scalar_t value) {
  return detail::level<scalar_t>(static_cast<float>(static_cast<int32_t>(value.bits)));
}

// encode() gives a value's bits in 32: a loop that narrows afterwards has the widest vectors.

// The nearest code, ties to the smaller magnitude: so many as there are midpoints below. Midpoint c,
// between codes c and c + 1, is kSquare * c * c + kGap * c + kGap / 2. Its inverse, by a root, tells
// the code to within half of one, and the comparison which it is; so all devices find the same.
template <typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE int32_t encode(scalar_t, float value) {
  constexpr float kSquare = scalar_t::kSquare;
  constexpr float kGap = scalar_t::kSquare + scalar_t::kLinear;
  constexpr float kCenter = kGap / (2 * kSquare);
  const float magnitude = detail::absolute(value);
  const float root = detail::about_sqrt(magnitude * (1 / kSquare) + (kCenter * kCenter - kCenter));
  const auto low = static_cast<int32_t>(root + (0.5f - kCenter));
  const auto code = static_cast<float>(low);
  const int32_t nearest = low + (magnitude > code * (kSquare * code + kGap) + kGap / 2 ? 1 : 0);
  return value < 0 ? -nearest : nearest;
}

MOMENTUM_EXT_INLINE float load(Float8E4M3 value) {
  const auto bits = static_cast<uint32_t>(value.bits);
  const uint32_t magnitude = bits & 0x7fu;
  const float normal = detail::float_from_bits((magnitude << 20) + 0x3c000000u);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  const float absolute = magnitude < 8u ? subnormal : normal;
  const float finite = magnitude == 0x7fu ? detail::float_from_bits(0x7fc00000u) : absolute;
  return detail::float_from_bits(detail::bits_of(finite) | (bits & 0x80u) << 24);
}

namespace detail {
// `normal` and `subnormal` are the magnitude rounded as if it were one or the other.
MOMENTUM_EXT_INLINE int32_t assemble(float value, uint32_t magnitude, uint32_t normal,
                                     uint32_t subnormal) {
  const uint32_t rounded = magnitude < 0x3c800000u ? subnormal : normal;  // 2^-6
  const uint32_t finite = rounded > 0x7eu ? 0x7eu : rounded;
  return static_cast<int32_t>(finite | (bits_of(value) >> 24 & 0x80u));
}
}  // namespace detail

MOMENTUM_EXT_INLINE int32_t encode(Float8E4M3, float value) {
  const uint32_t magnitude = detail::bits_of(clamped(value, Float8E4M3::kTop)) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t subnormal =
      detail::bits_of(detail::float_from_bits(magnitude) + 0x1p14f) - 0x46800000u;
  return detail::assemble(value, magnitude, normal, subnormal);
}

template <typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE void store(scalar_t& out, float value) {
  out.bits = static_cast<int8_t>(encode(out, value));
}
MOMENTUM_EXT_INLINE void store(Float8E4M3& out, float value) {
  out.bits = static_cast<uint8_t>(encode(out, value));
}

// Calls visit(scalar_t()) with the type of a dtype that has blocks.
MOMENTUM_EXT_CALLS_BACK
template <typename Visit>
MOMENTUM_EXT_INLINE decltype(auto) visit_blocks(Dtype dtype, const Visit& visit) {
  if (dtype == Dtype::kInt4) return visit(Int4());
  return dtype == Dtype::kInt8 ? visit(Int8()) : visit(Float8E4M3());
}

}  // namespace momentum_ext
