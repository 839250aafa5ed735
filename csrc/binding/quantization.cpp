#include "quantization.h"

#include <ATen/Functions.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../formats/block8.h"
#include "state_layout.h"

namespace momentum_ext::binding {
namespace {

constexpr int64_t kOldScaleBlock = 256;  // of version 0.1.0: value = code * scale, in fp32

// As rows of one block each, the last filled up with zeros.
at::Tensor as_blocks(const at::Tensor& flat, int64_t block) {
  const int64_t padding = (block - flat.numel() % block) % block;
  return at::constant_pad_nd(flat, {0, padding}).view({-1, block});
}

at::Tensor as_flat(const at::Tensor& dense) { return dense.as_strided({dense.numel()}, {1}); }

// checked_scale() of block8.h, rounded to nearest; and 1 / scale, which is 0 for a block of zeros.
template <typename scalar_t>
std::pair<at::Tensor, at::Tensor> scales_of(const at::Tensor& largest) {
  const at::Tensor exact = largest.div(at::full_like(largest, scalar_t::kTop));
  const at::Tensor bits = exact.view(at::kInt).add(1 << (kCutOff - 1));
  at::Tensor scale = bits.bitwise_and(static_cast<int64_t>(kScaleMask) - (int64_t{1} << 32))
                         .view(at::kFloat)
                         .clamp_max(scalar_t::kLargestScale);
  const at::Tensor is_finite = largest.isfinite();
  scale.masked_fill_(scale.lt(scalar_t::kSmallestScale), 0);
  const at::Tensor inverse = scale.reciprocal().masked_fill(scale.eq(0), 0);
  scale.masked_fill_(is_finite.logical_not(), std::numeric_limits<float>::quiet_NaN());
  return {scale, inverse.masked_fill(is_finite.logical_not(), 0)};
}

// As bytes, two for each scale, of the shape that they have beside these codes.
at::Tensor as_bytes(const at::Tensor& scale, const at::Tensor& codes, bool non_negative) {
  return scale.view(at::kInt)
      .bitwise_right_shift(kCutOff)
      .to(at::kShort)
      .view(at::kByte)
      .reshape(scale_sizes(codes, non_negative));
}

// rooted() and unrooted() of block8.h.
template <typename scalar_t>
at::Tensor roots_of(const at::Tensor& values) {
  return detail::kIsRoot<scalar_t> ? values.abs().sqrt() : values;
}
template <typename scalar_t>
at::Tensor values_of(const at::Tensor& roots) {
  return detail::kIsRoot<scalar_t> ? roots.mul(roots) : roots;
}

// In units of the scale.
template <typename scalar_t>
at::Tensor levels_of(const at::Tensor& codes) {
  const at::Tensor code = codes.to(at::kFloat);
  if constexpr (std::is_same_v<scalar_t, Float8E4M3>) {
    return code;
  } else {
    return code.mul(code.abs().mul(scalar_t::kSquare).add(scalar_t::kLinear));
  }
}

// One code for each of `units`; of a companded format as many as there are midpoints below, see
// encode() in block8.h.
template <typename scalar_t>
at::Tensor nearest_codes(const at::Tensor& units) {
  if constexpr (std::is_same_v<scalar_t, Float8E4M3>) {
    return units.to(at::kFloat8_e4m3fn);
  } else {
    const at::Tensor codes = at::arange(scalar_t::kLargestCode + 1, units.options());
    const at::Tensor levels = levels_of<scalar_t>(codes);
    const at::Tensor midpoints = levels.slice(0, 1).add(levels.slice(0, 0, -1)).div(2);
    const at::Tensor found = at::bucketize(units.abs(), midpoints, /*out_int32=*/true);
    if constexpr (detail::kIsRoot<scalar_t>) {  // what is not 0 has a code that is not 0
      return at::maximum(found, units.gt(0).to(found.scalar_type())).to(kRoots);
    }
    return found.mul(units.sign()).to(at::kChar);
  }
}

// Two codes of 4 bits in each byte, the first in its lower half.
at::Tensor packed(const at::Tensor& codes) {
  const at::Tensor pairs = as_blocks(codes, 2).bitwise_and(15);
  return pairs.select(1, 1).mul(16).add(pairs.select(1, 0)).to(kPacked);
}
at::Tensor unpacked(const at::Tensor& bytes) {
  const at::Tensor halves = at::stack({bytes.bitwise_and(15), bytes.bitwise_right_shift(4)}, 1);
  return halves.view({-1}).to(at::kChar).bitwise_xor(8).sub(8);  // with their signs
}

}  // namespace

bool is_scale(const at::Tensor& scale, const at::Tensor& codes, bool non_negative) {
  return scale.scalar_type() == at::kByte && scale.sizes() == scale_sizes(codes, non_negative);
}

bool is_old_scale(const at::Tensor& scale, const at::Tensor& codes) {
  return scale.scalar_type() == at::kFloat && scale.dim() == 1 &&
         scale.size(0) == (codes.numel() + kOldScaleBlock - 1) / kOldScaleBlock;
}

std::pair<at::Tensor, at::Tensor> quantize(const at::Tensor& value, at::ScalarType dtype,
                                           const at::Tensor& param, bool non_negative) {
  const at::Tensor dense = empty_state_like(param, at::kFloat).copy_(value);
  const at::Tensor blocks = as_blocks(as_flat(dense), kScaleBlock);
  return visit_blocks(dtype_of_blocks(dtype, non_negative), [&](auto type) {
    using scalar_t = decltype(type);
    const at::Tensor scaled = roots_of<scalar_t>(blocks);
    const auto [scale, inverse] = scales_of<scalar_t>(scaled.abs().amax({1}));
    const at::Tensor units = scaled.mul(inverse.unsqueeze(1))
                                 .masked_fill(inverse.eq(0).unsqueeze(1), 0)
                                 .clamp(-scalar_t::kTop, scalar_t::kTop);
    const at::Tensor codes = nearest_codes<scalar_t>(units).view({-1}).slice(0, 0, value.numel());
    at::Tensor quantized = empty_state_like(param, dtype, non_negative);
    as_flat(quantized).copy_(packs(dtype, non_negative) ? packed(codes) : codes);
    return std::pair(quantized, as_bytes(scale, quantized, non_negative));
  });
}

at::Tensor dequantize(const at::Tensor& quantized, const at::Tensor& scale, c10::IntArrayRef sizes,
                      bool non_negative) {
  const bool is_old = is_old_scale(scale, quantized) && !non_negative;
  if (!is_old && !is_scale(scale, quantized, non_negative)) {
    throw std::invalid_argument("momentum_scale: expected two bytes for each 32 elements of its " +
                                std::to_string(c10::multiply_integers(sizes)) + ", got " +
                                c10::toString(scale.scalar_type()) + " of " +
                                std::to_string(scale.numel()) + " elements");
  }
  const bool is_packed = packs(quantized.scalar_type(), non_negative);
  if (is_packed && !is_packed_of(quantized, sizes)) {
    throw std::invalid_argument(
        "momentum_buffer: its codes of 4 bits were made beside a parameter of another shape; "
        "delete "
        "it from the optimizer's state to start from no momentum");
  }
  at::Tensor value = is_packed ? empty_unpacked(quantized, sizes)
                               : at::empty_like(quantized, quantized.options().dtype(at::kFloat),
                                                at::MemoryFormat::Preserve);
  const at::Tensor codes = is_packed ? unpacked(as_flat(quantized)) : as_flat(quantized);
  const at::Tensor decoded =
      is_old ? as_blocks(codes.to(at::kFloat), kOldScaleBlock).mul(scale.unsqueeze(1))
             : visit_blocks(dtype_of_blocks(quantized.scalar_type(), non_negative), [&](auto type) {
                 using scalar_t = decltype(type);
                 return values_of<scalar_t>(as_blocks(levels_of<scalar_t>(codes), kScaleBlock)
                                                .mul(scale.clone()
                                                         .view(at::kShort)
                                                         .to(at::kInt)
                                                         .bitwise_left_shift(kCutOff)
                                                         .bitwise_and(0x7fffffff)
                                                         .view(at::kFloat)
                                                         .view({-1, 1})));
               });
  as_flat(value).copy_(decoded.view({-1}).slice(0, 0, value.numel()));
  return value;
}

}  // namespace momentum_ext::binding
