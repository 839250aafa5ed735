// Stochastic rounding: up or down, with probabilities that make the mean right.
#pragma once

#include "block8.h"

namespace momentum_ext {

// `random` has 16 random bits. What is dropped is added to them; a carry rounds up.
MOMENTUM_EXT_INLINE void store_finite_stochastic(BFloat16& out, float value, uint32_t random) {
  out.bits = static_cast<uint16_t>((detail::bits_of(value) + random) >> 16);
}
MOMENTUM_EXT_INLINE void store_stochastic(BFloat16& out, float value, uint32_t random) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (bits + (magnitude == 0x7f800000u ? 0u : random)) >> 16;
  out.bits = static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fc0u : rounded);
}
MOMENTUM_EXT_INLINE void store_stochastic(Float16& out, float value, uint32_t random) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float fraction = static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f;
  const uint32_t normal = (magnitude - 0x38000000u + (random >> 3)) >> 13;
  const bool is_small = magnitude < 0x38800000u;  // 2^-14: below it, multiples of 2^-24
  const float small = is_small ? detail::float_from_bits(magnitude) : 0;
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p24f + fraction));
  const uint32_t rounded = is_small ? subnormal : normal;
  const uint32_t finite = magnitude >= 0x47800000u || rounded > 0x7c00u ? 0x7c00u : rounded;
  out.bits =
      static_cast<uint16_t>((magnitude > 0x7f800000u ? 0x7e00u : finite) | (bits >> 16 & 0x8000u));
}
MOMENTUM_EXT_INLINE void store_stochastic(Int8& out, float value, uint32_t random) {
  const float fraction = (static_cast<float>(static_cast<int32_t>(random)) + 0.5f) * 0x1p-16f;
  const float sum = clamped(value, Int8::kLargest) + fraction;
  const auto truncated = static_cast<int32_t>(sum);
  const int32_t floor = truncated - (static_cast<float>(truncated) > sum ? 1 : 0);
  out.bits = static_cast<int8_t>(floor > 127 ? 127 : floor);
}
MOMENTUM_EXT_INLINE void store_stochastic(Float8E4M3& out, float value, uint32_t random) {
  const uint32_t magnitude = detail::bits_of(clamped(value, Float8E4M3::kLargest)) & 0x7fffffffu;
  const float fraction = static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f;
  const uint32_t normal = (magnitude - 0x3c000000u + (random << 4)) >> 20;
  const float absolute = detail::float_from_bits(magnitude);
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(absolute * 0x1p9f + fraction));
  detail::assemble(out, value, magnitude, normal, subnormal);
}

// A parameter and its states are rounded with the same 16 bits, those of a state rotated by a number
// of its own: each is uniform by itself, which is all that an unbiased rounding needs, and to draw
// them costs more than the rest of the update.
template <int kState>
MOMENTUM_EXT_INLINE uint32_t random_of_state(uint32_t random) {
  constexpr int kBits[] = {8, 4, 12};
  return (random >> kBits[kState] | random << (16 - kBits[kState])) & 0xffffu;
}

}  // namespace momentum_ext
