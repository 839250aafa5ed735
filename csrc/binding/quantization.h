// Momentum buffers of 8 bits by torch's operators, out of place: for conversions, which are rare.
// The kernels' own text, with the same bits, is ../formats/block8.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace momentum_ext::binding {

// An uninitialised tensor of the parameter's shape whose elements lie without gaps, in the order in
// which the kernels walk the parameter: its own order in memory.
at::Tensor empty_dense_like(const at::Tensor& param, at::ScalarType dtype);

// True when the tensor lies like that.
bool is_dense_like(const at::Tensor& tensor, const at::Tensor& param);

// Blocks of 32 elements of a tensor of this many.
int64_t num_scales(int64_t numel);

// The shape of the scales, of two bytes each, beside these codes. Where blocks are parts of rows,
// they lie as the codes do: [..., columns] and [..., columns / 32, 2].
std::vector<int64_t> scale_sizes(const at::Tensor& codes);

// Whether these are the codes' scales, as they are now or as version 0.1.0 had them.
bool is_scale(const at::Tensor& scale, const at::Tensor& codes);
bool is_old_scale(const at::Tensor& scale, const at::Tensor& codes);

// `value` in int8 or float8_e4m3fn, laid out as empty_dense_like(param), and its scales.
std::pair<at::Tensor, at::Tensor> quantize(const at::Tensor& value, at::ScalarType dtype,
                                           const at::Tensor& param);

// In fp32, laid out as `quantized`, whose elements lie without gaps.
at::Tensor dequantize(const at::Tensor& quantized, const at::Tensor& scale);

}  // namespace momentum_ext::binding
