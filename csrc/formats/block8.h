// Blocks of 8 or 4 bits: kScaleBlock elements in a row share a scale of 16 bits (block-wise quantization:
// Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022; a companded map in
// blocks of 32: Ortiz et al., "FlashOptim", 2026).
//
// A code stands for a number, its level, and a stored value is level times scale; of Root8 it is the
// square of that, and the root of a square is the number again. The block's largest value has the code of the largest level, kTop, so that the scale is largest / kTop. It
// has 8 bits of exponent and 8 of mantissa: an fp32 without its sign and its last 15 bits. kTop times
// a scale is exact, so values that are decoded encode to the same codes and scale again.
#pragma once

#include "dtype.h"

namespace momentum_ext {

// Code c stands for c * (kSquare * |c| + kLinear): what is small in its block has the finer steps.
// kAbout are the coefficients, from that of the square of a square on, of about_code().
// y * (0.405 + 0.595 * |y|) for y = c / 127, in integers.
struct Int8 {
  int8_t bits;
  static constexpr float kSquare = 3;
  static constexpr float kLinear = 259;
  static constexpr int kLargestCode = 127;
  static constexpr float kTop = kLargestCode * (kSquare * kLargestCode + kLinear);
  static constexpr float kSmallestScale = 0x1.9cp-117f;  // 2^-100 / kTop, rounded down
  static constexpr float kLargestScale = 0x1.9cp+111f;   // the largest whose kTop-fold is finite
  static constexpr float kAbout[] = {-0x1.e1ea9ap-59f, 0x1.7e766cp-41f, -0x1.dc2f8ap-25f,
                                     0x1.b376c8p-9f, 0x1.e18524p-2f};
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
  static constexpr float kAbout[] = {-0x1.ac1e32p-27f, 0x1.20ad7ep-18f, -0x1.56af5cp-11f,
                                     0x1.8ba992p-4f, 0x1.787924p-8f};
};
// The root of a value that is never negative: the mean of squares, which adaptive rules divide by its
// root. y * (0.602 + 0.398 * y) for y = c / 255. What is not 0 has at least code 1, because a step
// that is divided by 0 would be wild. A negative value is stored as its magnitude.
struct Root8 {
  uint8_t bits;
  static constexpr float kSquare = 1;
  static constexpr float kLinear = 385;
  static constexpr int kLargestCode = 255;
  static constexpr float kTop = kLargestCode * (kSquare * kLargestCode + kLinear);
  static constexpr float kSmallestScale = 0x1.9bp-81f;  // 2^-63 / kTop: of a value of 2^-126
  static constexpr float kLargestScale = 0x1.9bp+46f;   // of the largest square that is finite
  static constexpr float kAbout[] = {-0x1.144282p-63f, 0x1.f73bdp-45f, -0x1.984c0ap-27f,
                                     0x1.4a5054p-9f, 0x1.7326eep-3f};
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
MOMENTUM_EXT_INLINE float absolute(float value) {
  return float_from_bits(bits_of(value) & 0x7fffffffu);
}

template <typename scalar_t>
constexpr bool kIsRoot = std::is_same_v<scalar_t, Root8>;

// What is scaled and has a code: the value, or its root; and the way back.
template <typename scalar_t>
MOMENTUM_EXT_INLINE float rooted(float value) {
  if constexpr (kIsRoot<scalar_t>) return square_root(absolute(value));
  return value;
}
template <typename scalar_t>
MOMENTUM_EXT_INLINE float unrooted(float value) {
  if constexpr (kIsRoot<scalar_t>) return value * value;
  return value;
}

// An Inf or NaN makes the whole block NaN, so that an overflow is seen. A block below 2^-100
// becomes zero: its inverse could overflow. Of Root8, one below 2^-126: fp32 itself has fewer bits
// there.
template <typename scalar_t>
MOMENTUM_EXT_INLINE BlockScale checked_scale(uint32_t largest_bits, float rounded) {
  const float scale = rounded > scalar_t::kLargestScale ? scalar_t::kLargestScale : rounded;
  // Masks, and no branch around the division: compilers make vectors of these.
  const uint32_t is_finite = largest_bits < 0x7f800000u ? ~0u : 0;
  const uint32_t is_stored = scale < scalar_t::kSmallestScale ? 0 : is_finite;
  const uint32_t bits = (bits_of(scale) & is_stored) | (0x7fc00000u & ~is_finite);
  return {static_cast<ScaleBits>(bits >> kCutOff), float_from_bits(bits_of(1 / scale) & is_stored)};
}
}  // namespace detail

// From the bits of the largest magnitude in the block, which as integers are in the magnitudes'
// order. The scale is rounded to nearest.
template <typename scalar_t>
MOMENTUM_EXT_INLINE BlockScale block_scale(uint32_t largest_bits) {
  const float largest = detail::rooted<scalar_t>(detail::float_from_bits(largest_bits));
  const float exact = largest / scalar_t::kTop;
  const uint32_t sum = detail::bits_of(exact) + (1u << (kCutOff - 1));
  return detail::checked_scale<scalar_t>(largest_bits, detail::float_from_bits(sum & kScaleMask));
}

MOMENTUM_EXT_INLINE float clamped(float value, float largest) {
  const float below = value > largest ? largest : value;
  return below < -largest ? -largest : below;
}

// Where a code's arithmetic takes an Fma (math.h), it is exact: the bits are the same with any.

namespace detail {
template <typename Fma, typename scalar_t>
MOMENTUM_EXT_INLINE float level(float code) {
  return code * Fma::apply(scalar_t::kSquare, absolute(code), scalar_t::kLinear);
}

// The code, with a fraction, whose level is `magnitude`, to within 0.472: a polynomial, which is
// shorter than a root.
template <typename Fma, typename scalar_t>
MOMENTUM_EXT_INLINE float about_code(float magnitude) {
  constexpr float k5 = scalar_t::kAbout[0];  // nvcc knows no array of the host
  constexpr float k4 = scalar_t::kAbout[1];
  constexpr float k3 = scalar_t::kAbout[2];
  constexpr float k2 = scalar_t::kAbout[3];
  constexpr float k1 = scalar_t::kAbout[4];
  float code = Fma::apply(magnitude, k5, k4);
  code = Fma::apply(magnitude, code, k3);
  code = Fma::apply(magnitude, code, k2);
  return Fma::apply(magnitude, code, k1);
}

template <typename scalar_t>
using IfCompanded = std::enable_if_t<(scalar_t::kLargestCode > 0), int>;

// -1 where the sign bit is set, else 0: what a comparison says, without the processor's units for
// comparisons, of which it has few.
MOMENTUM_EXT_INLINE int32_t sign_of(float value) {
  return static_cast<int32_t>(bits_of(value)) >> 31;
}
MOMENTUM_EXT_INLINE int32_t with_sign_of(float value, int32_t magnitude) {
  return (magnitude ^ sign_of(value)) - sign_of(value);
}

// From the code of a magnitude.
template <typename scalar_t>
MOMENTUM_EXT_INLINE int32_t finished(int32_t code, float value) {
  if constexpr (!kIsRoot<scalar_t>) return with_sign_of(value, code);
  const int32_t least = -sign_of(0.0f - value);  // 0 for 0, else 1
  return code > least ? code : least;
}
}  // namespace detail

template <typename Fma = FusedMultiplyAdd, typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE float load(scalar_t value) {
  return detail::level<Fma, scalar_t>(static_cast<float>(static_cast<int32_t>(value.bits)));
}

// encode() gives a value's bits in 32: a loop that narrows afterwards has the widest vectors.

// The nearest code, ties to the smaller magnitude: so many as there are midpoints below. Midpoint c,
// between codes c and c + 1, is kSquare * c * c + kGap * c + kGap / 2. A guess is the code or the one
// below, and the comparison tells which; so all devices find the same.
template <typename Fma = FusedMultiplyAdd, typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE int32_t encode(scalar_t, float value) {
  constexpr float kGap = scalar_t::kSquare + scalar_t::kLinear;
  const float magnitude = detail::absolute(value);
  const auto low = static_cast<int32_t>(detail::about_code<Fma, scalar_t>(magnitude));
  const auto code = static_cast<float>(low);
  const float midpoint = Fma::apply(code, Fma::apply(scalar_t::kSquare, code, kGap), kGap / 2);
  return detail::finished<scalar_t>(low - detail::sign_of(midpoint - magnitude), value);
}

template <typename Fma = FusedMultiplyAdd>
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

template <typename Fma = FusedMultiplyAdd>
MOMENTUM_EXT_INLINE int32_t encode(Float8E4M3, float value) {
  const uint32_t magnitude = detail::bits_of(clamped(value, Float8E4M3::kTop)) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t subnormal =
      detail::bits_of(detail::float_from_bits(magnitude) + 0x1p14f) - 0x46800000u;
  return detail::assemble(value, magnitude, normal, subnormal);
}

template <typename scalar_t, detail::IfCompanded<scalar_t> = 0>
MOMENTUM_EXT_INLINE void store(scalar_t& out, float value) {
  out.bits = static_cast<decltype(out.bits)>(encode(out, value));
}
MOMENTUM_EXT_INLINE void store(Float8E4M3& out, float value) {
  out.bits = static_cast<uint8_t>(encode(out, value));
}

// A value in units of its block's scale, and the value that a code stands for.
template <typename scalar_t>
MOMENTUM_EXT_INLINE float in_units(float value, float inverse) {
  return detail::rooted<scalar_t>(value) * inverse;
}
template <typename Fma = FusedMultiplyAdd, typename scalar_t>
MOMENTUM_EXT_INLINE float value_of(scalar_t code, float scale) {
  return detail::unrooted<scalar_t>(load<Fma>(code) * scale);
}

// Calls visit(scalar_t()) with the type of a dtype that has blocks.
MOMENTUM_EXT_CALLS_BACK
template <typename Visit>
MOMENTUM_EXT_INLINE decltype(auto) visit_blocks(Dtype dtype, const Visit& visit) {
  if (dtype == Dtype::kInt4) return visit(Int4());
  if (dtype == Dtype::kUInt8Root) return visit(Root8());
  return dtype == Dtype::kInt8 ? visit(Int8()) : visit(Float8E4M3());
}

}  // namespace momentum_ext
