#include "state_layout.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>

#include "../formats/block8.h"

namespace momentum_ext::binding {
namespace {

using Sizes = std::vector<int64_t>;

// Dimensions of more than one element, outermost first, as layout.cpp walks them.
Sizes dims_in_memory_order(const at::Tensor& tensor) {
  Sizes dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.push_back(d);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });
  return dims;
}

// Of a tensor of these sizes without gaps, in that order.
Sizes dense_strides(const Sizes& sizes, const Sizes& dims) {
  Sizes strides(sizes.size(), 1);
  int64_t stride = 1;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    strides[static_cast<size_t>(*d)] = stride;
    stride *= sizes[static_cast<size_t>(*d)];
  }
  return strides;
}

struct Shape {
  Sizes sizes;
  Sizes strides;
};

Shape shape_of_state(const at::Tensor& param, bool is_packed) {
  Sizes sizes = param.sizes().vec();
  const Sizes dims = dims_in_memory_order(param);
  if (is_packed) {
    if (dims.empty() || param.size(dims.back()) % 2 != 0) return {{(param.numel() + 1) / 2}, {1}};
    sizes[static_cast<size_t>(dims.back())] /= 2;
  }
  return {sizes, dense_strides(sizes, dims)};
}

bool is_in_one_dim(const at::Tensor& packed, int64_t numel) {
  return packed.dim() == 1 && packed.size(0) == (numel + 1) / 2;
}

// The innermost one of codes whose order is that of a tensor of these sizes; -1: they are not its.
int64_t halved_dim(const at::Tensor& packed, c10::IntArrayRef sizes) {
  int64_t found = -1;
  if (sizes.size() != static_cast<size_t>(packed.dim())) return found;
  for (int64_t d = 0; d < packed.dim(); ++d) {
    const int64_t size = sizes[static_cast<size_t>(d)];
    if (packed.size(d) == size) continue;
    const bool is_innermost = packed.stride(d) == 1 || packed.size(d) == 1;
    if (found >= 0 || 2 * packed.size(d) != size || !is_innermost) return -1;
    found = d;
  }
  return found;
}

}  // namespace

at::Tensor empty_state_like(const at::Tensor& param, at::ScalarType dtype, bool non_negative) {
  const auto options = param.options().dtype(dtype).requires_grad(false);
  const bool is_packed = packs(dtype, non_negative);
  if (!is_packed && param.is_non_overlapping_and_dense()) {
    return at::empty_like(param, options, at::MemoryFormat::Preserve);
  }
  const Shape shape = shape_of_state(param, is_packed);
  return at::empty_strided(shape.sizes, shape.strides, options);
}

bool lies_beside(const at::Tensor& state, const at::Tensor& param, bool non_negative) {
  const Shape shape = shape_of_state(param, packs(state.scalar_type(), non_negative));
  if (state.sizes() != shape.sizes) return false;
  for (size_t d = 0; d < shape.sizes.size() && state.numel() != 0; ++d) {
    const int64_t stride = state.stride(static_cast<int64_t>(d));
    if (shape.sizes[d] != 1 && stride != shape.strides[d]) return false;
  }
  return true;
}

bool can_pack(const at::Tensor& param) {
  const Sizes dims = dims_in_memory_order(param);
  return dims.empty() || param.size(dims.back()) % 2 == 0 ||
         std::is_sorted(dims.begin(), dims.end());
}

bool is_packed_of(const at::Tensor& packed, c10::IntArrayRef sizes) {
  const int64_t numel = c10::multiply_integers(sizes);
  if (numel == 0) return packed.numel() == 0;
  return is_in_one_dim(packed, numel) || halved_dim(packed, sizes) >= 0;
}

at::Tensor empty_unpacked(const at::Tensor& packed, c10::IntArrayRef sizes) {
  const auto options = packed.options().dtype(at::kFloat);
  if (is_in_one_dim(packed, c10::multiply_integers(sizes)) || packed.numel() == 0) {
    return at::empty(sizes, options);
  }
  const int64_t halved = halved_dim(packed, sizes);
  Sizes dims = dims_in_memory_order(packed);
  dims.erase(std::remove(dims.begin(), dims.end(), halved), dims.end());
  dims.push_back(halved);
  return at::empty_strided(sizes, dense_strides(sizes.vec(), dims), options);
}

bool has_sizes_beside(const at::Tensor& state, const at::Tensor& param, bool non_negative) {
  return is_packed(state, param, non_negative) ? is_packed_of(state, param.sizes())
                                               : state.sizes() == param.sizes();
}

int64_t num_scales(int64_t numel) { return (numel + kScaleBlock - 1) / kScaleBlock; }

std::vector<int64_t> scale_sizes(const at::Tensor& codes, bool non_negative) {
  const int64_t block = packs(codes.scalar_type(), non_negative) ? kScaleBlock / 2 : kScaleBlock;
  if (codes.dim() < 2 || codes.size(-1) % block != 0 || !codes.is_contiguous()) {
    return {(codes.numel() + block - 1) / block, 2};
  }
  Sizes sizes = codes.sizes().vec();
  sizes.back() /= block;
  sizes.push_back(2);
  return sizes;
}

}  // namespace momentum_ext::binding
