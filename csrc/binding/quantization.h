// States in blocks of 8 or 4 bits by torch's operators, out of place: for conversions,
// which are rare. The kernels' own text, with the same bits, is ../formats/block8.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace momentum_ext::binding {

// Whether these are the codes' scales, as they are now or as version 0.1.0 had them.
bool is_scale(const at::Tensor& scale, const at::Tensor& codes, bool non_negative = false);
bool is_old_scale(const at::Tensor& scale, const at::Tensor& codes);

// `value` in a dtype of blocks, laid out as empty_state_like(param), and its scales. `non_negative`: of
// a state that never is negative, for which bytes have another meaning.
std::pair<at::Tensor, at::Tensor> quantize(const at::Tensor& value, at::ScalarType dtype,
                                           const at::Tensor& param, bool non_negative = false);

// In fp32, of the parameter's sizes, laid out as `quantized`, whose elements lie without gaps.
at::Tensor dequantize(const at::Tensor& quantized, const at::Tensor& scale, c10::IntArrayRef sizes,
                      bool non_negative = false);

}  // namespace momentum_ext::binding
