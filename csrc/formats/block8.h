// 8-bit blocks: kScaleBlock elements with one fp32 scale (Dettmers et al., "8-bit optimizers via
// block-wise quantization", ICLR 2022).
#pragma once

#include "dtype.h"

namespace momentum_ext {

// The largest value of a block is stored as kLargest.
struct Int8 {
  int8_t bits;
  static constexpr float kLargest = 127;
};
struct Float8E4M3 {
  uint8_t bits;
  static constexpr float kLargest = 448;
};

constexpr int64_t kScaleBlock = 256;  // elements

struct BlockScale {
  float scale;    // a stored value times this is the value
  float inverse;  // 0: store zeros
};

// From the bits of the largest magnitude in the block, which as integers are in the magnitudes'
// order. An Inf or NaN makes the whole block NaN, so that an overflow is seen. A block below 2^-100
// becomes zero: its inverse could overflow.
template <typename scalar_t>
MOMENTUM_EXT_INLINE BlockScale block_scale(uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {detail::float_from_bits(0x7fc00000u), 0};
  const float largest = detail::float_from_bits(largest_bits);
  if (largest < 0x1p-100f) return {0, 0};
  return {largest / scalar_t::kLargest, scalar_t::kLargest / largest};
}

MOMENTUM_EXT_INLINE float clamped(float value, float largest) {
  const float below = value > largest ? largest : value;
  return below < -largest ? -largest : below;
}

MOMENTUM_EXT_INLINE float load(Int8 value) { return static_cast<float>(value.bits); }
MOMENTUM_EXT_INLINE void store(Int8& out, float value) {
  constexpr float kMagic = 0x1.8p23f;  // adding it makes the hardware round to an integer
  const uint32_t sum = detail::bits_of(clamped(value, Int8::kLargest) + kMagic);
  out.bits = static_cast<int8_t>(static_cast<int32_t>(sum - 0x4b400000u));
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
MOMENTUM_EXT_INLINE void assemble(Float8E4M3& out, float value, uint32_t magnitude, uint32_t normal,
                                  uint32_t subnormal) {
  const uint32_t rounded = magnitude < 0x3c800000u ? subnormal : normal;  // 2^-6
  const uint32_t finite = rounded > 0x7eu ? 0x7eu : rounded;
  out.bits = static_cast<uint8_t>(finite | (bits_of(value) >> 24 & 0x80u));
}
}  // namespace detail

MOMENTUM_EXT_INLINE void store(Float8E4M3& out, float value) {
  const uint32_t magnitude = detail::bits_of(clamped(value, Float8E4M3::kLargest)) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t subnormal =
      detail::bits_of(detail::float_from_bits(magnitude) + 0x1p14f) - 0x46800000u;
  detail::assemble(out, value, magnitude, normal, subnormal);
}

// Calls visit(scalar_t()) with the type of a dtype of 8 bits.
MOMENTUM_EXT_CALLS_BACK
template <typename Visit>
MOMENTUM_EXT_INLINE decltype(auto) visit_8_bit(Dtype dtype, const Visit& visit) {
  return dtype == Dtype::kInt8 ? visit(Int8()) : visit(Float8E4M3());
}

}  // namespace momentum_ext
