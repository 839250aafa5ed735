#include "quantization.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../formats/block8.h"

namespace momentum_ext::binding {
namespace {

constexpr int64_t kOldScaleBlock = 256;  // of version 0.1.0: value = code * scale, in fp32

// Dimensions of more than one element, outermost first, as layout.cpp walks them.
std::vector<int64_t> dims_in_memory_order(const at::Tensor& tensor) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.push_back(d);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });
  return dims;
}

std::vector<int64_t> dense_strides(const at::Tensor& param) {
  std::vector<int64_t> strides(static_cast<size_t>(param.dim()), 1);
  const std::vector<int64_t> dims = dims_in_memory_order(param);
  int64_t stride = 1;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    strides[static_cast<size_t>(*d)] = stride;
    stride *= param.size(*d);
  }
  return strides;
}

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
at::Tensor as_bytes(const at::Tensor& scale, const at::Tensor& codes) {
  return scale.view(at::kInt)
      .bitwise_right_shift(kCutOff)
      .to(at::kShort)
      .view(at::kByte)
      .reshape(scale_sizes(codes));
}

// In units of the scale.
at::Tensor levels_of(const at::Tensor& codes) {
  const at::Tensor code = codes.to(at::kFloat);
  if (codes.scalar_type() != at::kChar) return code;
  return code.mul(code.abs().mul(Int8::kSquare).add(Int8::kLinear));
}

// One code for each of `units`, as many as there are midpoints below; see encode() in block8.h.
at::Tensor nearest_codes(const at::Tensor& units) {
  const at::Tensor levels =
      levels_of(at::arange(Int8::kLargestCode + 1, units.options().dtype(at::kChar)));
  const at::Tensor midpoints = levels.slice(0, 1).add(levels.slice(0, 0, -1)).div(2);
  return at::bucketize(units.abs(), midpoints, /*out_int32=*/true).mul(units.sign()).to(at::kChar);
}

}  // namespace

at::Tensor empty_dense_like(const at::Tensor& param, at::ScalarType dtype) {
  const auto options = param.options().dtype(dtype).requires_grad(false);
  if (param.is_non_overlapping_and_dense()) {
    return at::empty_like(param, options, at::MemoryFormat::Preserve);
  }
  return at::empty_strided(param.sizes(), dense_strides(param), options);
}

bool is_dense_like(const at::Tensor& tensor, const at::Tensor& param) {
  if (tensor.sizes() != param.sizes()) return false;
  const std::vector<int64_t> strides = dense_strides(param);
  for (int64_t d = 0; d < param.dim() && param.numel() != 0; ++d) {
    if (param.size(d) != 1 && tensor.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

int64_t num_scales(int64_t numel) { return (numel + kScaleBlock - 1) / kScaleBlock; }

std::vector<int64_t> scale_sizes(const at::Tensor& codes) {
  if (codes.dim() < 2 || codes.size(-1) % kScaleBlock != 0 || !codes.is_contiguous()) {
    return {num_scales(codes.numel()), 2};
  }
  std::vector<int64_t> sizes = codes.sizes().vec();
  sizes.back() /= kScaleBlock;
  sizes.push_back(2);
  return sizes;
}

bool is_scale(const at::Tensor& scale, const at::Tensor& codes) {
  return scale.scalar_type() == at::kByte && scale.sizes() == scale_sizes(codes);
}

bool is_old_scale(const at::Tensor& scale, const at::Tensor& codes) {
  return scale.scalar_type() == at::kFloat && scale.dim() == 1 &&
         scale.size(0) == (codes.numel() + kOldScaleBlock - 1) / kOldScaleBlock;
}

std::pair<at::Tensor, at::Tensor> quantize(const at::Tensor& value, at::ScalarType dtype,
                                           const at::Tensor& param) {
  const at::Tensor dense = empty_dense_like(param, at::kFloat).copy_(value);
  const at::Tensor blocks = as_blocks(as_flat(dense), kScaleBlock);
  const at::Tensor largest = blocks.abs().amax({1});
  const auto [scale, inverse] =
      dtype == at::kChar ? scales_of<Int8>(largest) : scales_of<Float8E4M3>(largest);
  const at::Tensor units = blocks.mul(inverse.unsqueeze(1))
                               .masked_fill(inverse.eq(0).unsqueeze(1), 0)
                               .clamp(-Int8::kTop, Int8::kTop);
  const at::Tensor codes =
      dtype == at::kChar ? nearest_codes(units)
                         : units.clamp(-Float8E4M3::kTop, Float8E4M3::kTop).to(at::kFloat8_e4m3fn);
  at::Tensor quantized = empty_dense_like(param, dtype);
  as_flat(quantized).copy_(codes.view({-1}).slice(0, 0, value.numel()));
  return {quantized, as_bytes(scale, quantized)};
}

at::Tensor dequantize(const at::Tensor& quantized, const at::Tensor& scale) {
  const bool is_old = is_old_scale(scale, quantized);
  if (!is_old && !is_scale(scale, quantized)) {
    throw std::invalid_argument("momentum_scale: expected two bytes for each 32 elements of its " +
                                std::to_string(quantized.numel()) + ", got " +
                                c10::toString(scale.scalar_type()) + " of " +
                                std::to_string(scale.numel()) + " elements");
  }
  at::Tensor value =
      at::empty_like(quantized, quantized.options().dtype(at::kFloat), at::MemoryFormat::Preserve);
  const at::Tensor flat = as_flat(quantized);
  const at::Tensor decoded =
      is_old ? as_blocks(flat.to(at::kFloat), kOldScaleBlock).mul(scale.unsqueeze(1))
             : as_blocks(levels_of(flat), kScaleBlock)
                   .mul(scale.clone()
                            .view(at::kShort)
                            .to(at::kInt)
                            .bitwise_left_shift(kCutOff)
                            .bitwise_and(0x7fffffff)
                            .view(at::kFloat)
                            .view({-1, 1}));
  as_flat(value).copy_(decoded.view({-1}).slice(0, 0, value.numel()));
  return value;
}

}  // namespace momentum_ext::binding
