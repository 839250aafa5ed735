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
at::Tensor as_blocks(const at::Tensor& flat) {
  const int64_t padding = num_scales(flat.numel()) * kScaleBlock - flat.numel();
  return at::constant_pad_nd(flat, {0, padding}).view({-1, kScaleBlock});
}

at::Tensor as_flat(const at::Tensor& dense) { return dense.as_strided({dense.numel()}, {1}); }

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

std::pair<at::Tensor, at::Tensor> quantize(const at::Tensor& value, at::ScalarType dtype,
                                           const at::Tensor& param) {
  const at::Tensor dense = empty_dense_like(param, at::kFloat).copy_(value);
  const at::Tensor blocks = as_blocks(as_flat(dense));
  const float largest_stored = dtype == at::kChar ? Int8::kLargest : Float8E4M3::kLargest;
  const at::Tensor largest = blocks.abs().amax({1});
  const at::Tensor is_zero = largest.lt(0x1p-100);
  const at::Tensor is_finite = largest.isfinite();
  const at::Tensor scale = at::where(is_finite, largest.div(at::full_like(largest, largest_stored)),
                                     std::numeric_limits<float>::quiet_NaN())
                               .masked_fill(is_zero, 0)
                               .to(at::kFloat);
  const at::Tensor inverse = at::full_like(largest, largest_stored).div(largest);
  const at::Tensor scaled =
      blocks.mul(inverse.unsqueeze(1))
          .masked_fill(is_zero.logical_or(is_finite.logical_not()).unsqueeze(1), 0)
          .clamp(-largest_stored, largest_stored);
  const at::Tensor stored = dtype == at::kChar ? scaled.round().to(dtype) : scaled.to(dtype);
  at::Tensor quantized = empty_dense_like(param, dtype);
  as_flat(quantized).copy_(stored.view({-1}).slice(0, 0, value.numel()));
  return {quantized, scale};
}

at::Tensor dequantize(const at::Tensor& quantized, const at::Tensor& scale) {
  if (scale.dim() != 1 || scale.size(0) != num_scales(quantized.numel())) {
    throw std::invalid_argument("momentum_scale: expected one value for each 256 elements of its " +
                                std::to_string(quantized.numel()) + ", got " +
                                std::to_string(scale.numel()));
  }
  at::Tensor value =
      at::empty_like(quantized, quantized.options().dtype(at::kFloat), at::MemoryFormat::Preserve);
  const at::Tensor blocks = as_blocks(as_flat(quantized).to(at::kFloat));
  as_flat(value).copy_(blocks.mul(scale.unsqueeze(1)).view({-1}).slice(0, 0, value.numel()));
  return value;
}

}  // namespace momentum_ext::binding
