// Momentum buffers in blocks of 8 or 4 bits by torch's operators, out of place: for conversions,
// which are rare. The kernels' own text, with the same bits, is ../formats/block8.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace momentum_ext::binding {

// Whether these are the codes' scales, as they are now or as version 0.1.0 had them.
bool is_scale(const at::Tensor& scale, const at::Tensor& codes);
bool is_old_scale(const at::Tensor& scale, const at::Tensor& codes);

// `value` in a dtype of blocks, laid out as empty_state_like(param), and its scales.
std::pair<at::Tensor, at::Tensor> quantize(const at::Tensor& value, at::ScalarType dtype,
                                           const at::Tensor& param);

// In fp32, of the parameter's sizes, laid out as `quantized`, whose elements lie without gaps.
at::Tensor dequantize(const at::Tensor& quantized, const at::Tensor& scale, c10::IntArrayRef sizes);

}  // namespace momentum_ext::binding
