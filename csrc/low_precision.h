// Values kept in fewer bits than they are computed in, beyond the plain rounding of dtype.h:
//
//   split                the exact fp32 value of a bf16 parameter: the parameter and 16 bits more
//   stochastic rounding  up or down, with probabilities that make the mean right
//   8-bit blocks         kScaleBlock elements with one fp32 scale (Dettmers et al., "8-bit
//   optimizers
//                        via block-wise quantization", ICLR 2022)
//
// One element each, for every backend, so that all of them store the same bits.
#pragma once

#include "dtype.h"

namespace momentum_ext {

// ---- split --------------------------------------------------------------------------------------

// To nearest, ties away from zero. With ties to even, 65,537 values would share one even upper
// half, which 16 bits cannot tell apart.
MOMENTUM_EXT_INLINE void split(float value, BFloat16& param, int16_t& remainder) {
  uint32_t bits = detail::bits_of(value);
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
  param.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  remainder = static_cast<int16_t>(static_cast<uint16_t>(bits));
}
// A zero with a negative remainder and an infinity with a positive one are none of ours: someone
// else has written the parameter, and adding would turn it into a NaN.
MOMENTUM_EXT_INLINE float join(BFloat16 param, int16_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(param.bits) << 16;
  const uint32_t magnitude = upper & 0x7fffffffu;
  const auto rest = static_cast<int32_t>(remainder);
  const bool is_foreign = magnitude == 0 ? rest < 0 : magnitude == 0x7f800000u && rest > 0;
  return detail::float_from_bits(upper + static_cast<uint32_t>(is_foreign ? 0 : rest));
}

// ---- 8-bit blocks -------------------------------------------------------------------------------

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

// ---- stochastic rounding ------------------------------------------------------------------------

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

// ---- random bits --------------------------------------------------------------------------------

// Where the random bits of a tensor's elements come from: nothing but what is written here, so that
// threads, launches and devices do not matter.
struct RandomKey {
  uint64_t seed;
  uint32_t tensor;  // its place among the optimizer's parameters
  uint32_t step;
};

constexpr int kRandomsPerBlock = 8;

// A parameter and its momentum buffer are rounded with the same 16 bits, the buffer with their
// bytes exchanged: each is uniform by itself, which is all that an unbiased rounding needs, and to
// draw them costs more than the rest of the update.
MOMENTUM_EXT_INLINE uint32_t random_of_buffer(uint32_t random) {
  return (random >> 8 | random << 8) & 0xffffu;
}

// The rounds of Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011; the fewest rounds that pass BigCrush there) for one counter in uint64_t or several in a
// vector of them. The lower half of each is a word of the counter, and then of the result; what is
// in the upper half does not matter. `multiply` makes the 64 bits of the product of two lower
// halves.
template <typename Lanes, typename Multiply>
MOMENTUM_EXT_INLINE void philox(uint64_t seed, Lanes& c0, Lanes& c1, Lanes& c2, Lanes& c3,
                                const Multiply& multiply) {
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (int round = 0; round < 7; ++round) {
    Lanes product0, product1;
    multiply(c0, uint64_t{0xD2511F53u}, product0);
    multiply(c2, uint64_t{0xCD9E8D57u}, product1);
    c0 = (product1 >> 32) ^ c1 ^ uint64_t{key0};
    c2 = (product0 >> 32) ^ c3 ^ uint64_t{key1};
    c1 = product1;
    c3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// 128 random bits for elements [8 * block, 8 * block + 8) of a tensor, 16 for each, the lower half
// of words[0] first.
MOMENTUM_EXT_INLINE void random_block(const RandomKey& key, uint64_t block, uint32_t (&words)[4]) {
  uint64_t c0 = block;
  uint64_t c1 = key.tensor;
  uint64_t c2 = key.step;
  uint64_t c3 = block >> 32;
  philox(key.seed, c0, c1, c2, c3, [](uint64_t a, uint64_t b, uint64_t& product) {
    product = uint64_t{static_cast<uint32_t>(a)} * b;
  });
  words[0] = static_cast<uint32_t>(c0);
  words[1] = static_cast<uint32_t>(c1);
  words[2] = static_cast<uint32_t>(c2);
  words[3] = static_cast<uint32_t>(c3);
}

}  // namespace momentum_ext
