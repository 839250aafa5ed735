// The fp32 value of a 16-bit parameter, kept beside it: 16 bits more, 8 bits more, or a copy. Who
// writes the parameter between two steps is believed, wherever the two no longer fit together.
#pragma once

#include "dtype.h"

namespace momentum_ext {

enum class Master : uint8_t {
  kNone,           // the parameter is all there is
  kRemainder,      // int16: what rounding to bf16 has cut off, see split()
  kCopy,           // fp32, of an fp16 parameter
  kByteRemainder,  // int8: the upper half of such a remainder
};

// The parameter is rounded to nearest, ties away from zero. With ties to even, 65,537 values would
// share one even upper half, which 16 bits cannot tell apart.
//
// Where the upper half of the remainder alone is kept, `addend` rounds to it: 128, half of what is
// dropped, to nearest, ties away from zero; 8 random bits by chance, with the right mean.
constexpr uint32_t kHalfOfByte = 128;
MOMENTUM_EXT_INLINE void split(float value, uint32_t addend, BFloat16& param, int16_t& remainder) {
  uint32_t bits = detail::bits_of(value);
  bits = value != value ? 0x7fc00000u : bits;
  bits += addend;
  param.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  remainder = static_cast<int16_t>(static_cast<uint16_t>(bits));
}

// split() never makes a zero with a negative remainder nor an infinity with a positive one: someone
// else has written such a parameter, which adding turns into a NaN.
MOMENTUM_EXT_INLINE float join(BFloat16 param, int16_t remainder) {
  const float upper = load(param);
  const float value =
      detail::float_from_bits(detail::bits_of(upper) + static_cast<uint32_t>(int32_t{remainder}));
  const bool is_overwritten = (value != value) & (upper == upper);
  return is_overwritten ? upper : value;
}

// What a master of 24 bits keeps of a value, rounded to nearest.
MOMENTUM_EXT_INLINE float rounded_to_24_bits(float value) {
  BFloat16 param;
  int16_t remainder;
  split(value, kHalfOfByte, param, remainder);
  return join(param, static_cast<int16_t>(remainder & ~0xff));
}

// The exact value of an fp16 parameter whose copy, rounded to fp16, is `rounded`. `widened` is the
// parameter as a float.
MOMENTUM_EXT_INLINE float exact_value(Float16 param, float widened, float copy, Float16 rounded) {
  const bool both_nan = widened != widened && copy != copy;
  return rounded.bits == param.bits || both_nan ? copy : widened;
}

}  // namespace momentum_ext
