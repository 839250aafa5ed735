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

// By the place between two levels, or between the squares of two levels. A guess is the code of the
// level below or the one above it. What Root8 would store as 0 has code 1: there alone the mean is
// too large.
template <typename Fma = FusedMultiplyAdd, typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE int32_t encode_stochastic(scalar_t, float value, uint32_t random) {
  constexpr float kSquare = scalar_t::kSquare;
  constexpr float kLinear = scalar_t::kLinear;
  const float magnitude = detail::absolute(value);
  const auto above_level = [&](float code) {
    return Fma::apply(-code, Fma::apply(kSquare, code, kLinear), magnitude);
  };
  const auto high = static_cast<int32_t>(detail::about_code<Fma, scalar_t>(magnitude) + 0.5f);
  const int32_t floor = high + detail::sign_of(above_level(static_cast<float>(high)));
  const auto code = static_cast<float>(floor);
  // Times 2^-16, for a fraction of 16 bits.
  const float gap = Fma::apply(2 * kSquare * 0x1p-16f, code, (kSquare + kLinear) * 0x1p-16f);
  const auto part = static_cast<float>(static_cast<int32_t>(random)) + 0.5f;
  float above = above_level(code);
  float range = gap;
  if constexpr (detail::kIsRoot<scalar_t>) {  // a difference of squares is difference times sum
    const float below = detail::level<Fma, scalar_t>(code);
    above = (magnitude - below) * (magnitude + below);
    range = gap * Fma::apply(0x1p16f, gap, 2 * below);
  }
  return detail::finished<scalar_t>(floor - detail::sign_of(part * range - above), value);
}
template <typename Fma = FusedMultiplyAdd>
MOMENTUM_EXT_INLINE int32_t encode_stochastic(Float8E4M3, float value, uint32_t random) {
  const uint32_t magnitude = detail::bits_of(clamped(value, Float8E4M3::kTop)) & 0x7fffffffu;
  const float fraction = static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f;
  const uint32_t normal = (magnitude - 0x3c000000u + (random << 4)) >> 20;
  const float absolute = detail::float_from_bits(magnitude);
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(absolute * 0x1p9f + fraction));
  return detail::assemble(value, magnitude, normal, subnormal);
}
template <typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE void store_stochastic(scalar_t& out, float value, uint32_t random) {
  out.bits = static_cast<decltype(out.bits)>(encode_stochastic(out, value, random));
}
MOMENTUM_EXT_INLINE void store_stochastic(Float8E4M3& out, float value, uint32_t random) {
  out.bits = static_cast<uint8_t>(encode_stochastic(out, value, random));
}

// The scale of a block whose values are rounded at random. It is rounded at random, too, so that the
// largest value always has the largest code. Where it is rounded down, values between its kTop-fold
// (the knee) and the largest are stored as the knee; where up, they are stretched, so that their
// means are right.
struct RandomBlockScale : BlockScale {
  float knee;
  float stretch;
};

// `random` has 16 random bits that are independent of each element's own.
template <typename scalar_t>
MOMENTUM_EXT_INLINE RandomBlockScale block_scale_stochastic(uint32_t largest_bits,
                                                            uint32_t random) {
  const float largest = detail::float_from_bits(largest_bits);
  const uint32_t bits = detail::bits_of(detail::rooted<scalar_t>(largest) / scalar_t::kTop);
  const float down = detail::float_from_bits(bits & kScaleMask);
  const float knee = detail::unrooted<scalar_t>(scalar_t::kTop * down);
  float rounded = detail::float_from_bits((bits + (random & ~kScaleMask)) & kScaleMask);
  if constexpr (detail::kIsRoot<scalar_t>) {  // by the place between two squares
    const float up = detail::float_from_bits((bits & kScaleMask) + (1u << kCutOff));
    const float gap = detail::unrooted<scalar_t>(scalar_t::kTop * up) - knee;
    const auto part = static_cast<float>(static_cast<int32_t>(random & ~kScaleMask)) + 0.5f;
    rounded = part * 0x1p-15f * gap < largest - knee ? up : down;
  }
  BlockScale scale = detail::checked_scale<scalar_t>(largest_bits, rounded);
  // Not less than the exact inverse: the largest value must reach kTop. A root is rounded once more.
  constexpr uint32_t kMore = detail::kIsRoot<scalar_t> ? 2 : 1;
  scale.inverse =
      scale.inverse == 0 ? 0 : detail::float_from_bits(detail::bits_of(scale.inverse) + kMore);
  const float top = detail::unrooted<scalar_t>(scalar_t::kTop * load_scale(scale.bits));
  return {scale, knee, top > knee ? (top - knee) / (largest - knee) : 0};
}

// A value as encode_stochastic() takes it.
template <typename scalar_t>
MOMENTUM_EXT_INLINE float scaled(float value, const RandomBlockScale& scale) {
  const float magnitude = detail::absolute(value);
  const float below = magnitude > scale.knee ? scale.knee : magnitude;
  const float units =
      in_units<scalar_t>(below + (magnitude - below) * scale.stretch, scale.inverse);
  const float reached = units > scalar_t::kTop ? scalar_t::kTop : units;
  if constexpr (detail::kIsRoot<scalar_t>) return reached;
  return detail::float_from_bits(detail::bits_of(reached) | (detail::bits_of(value) & 0x80000000u));
}

// Those for a block's scale, from those of its first two elements.
MOMENTUM_EXT_INLINE uint32_t random_of_scale(uint32_t first, uint32_t second) {
  return first ^ second;
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
