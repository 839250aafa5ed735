// How a state lies in memory beside its parameter: in the order in which the kernels walk that, its
// own order in memory. Codes of 4 bits are packed, two in a byte, and states in blocks have scales.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../formats/dtype.h"

namespace momentum_ext::binding {

// States of bytes, as torch sees them: codes of 4 bits, two in each; of a state that is never negative
// the codes of its roots, one in each. Whether it ever is negative, its rule says.
constexpr at::ScalarType kPacked = at::kByte;
constexpr at::ScalarType kRoots = at::kByte;

// Dtypes of states that are stored in blocks.
constexpr bool has_blocks(at::ScalarType dtype) {
  return dtype == at::kChar || dtype == at::kFloat8_e4m3fn || dtype == kPacked;
}
constexpr bool packs(at::ScalarType dtype, bool non_negative) {
  return dtype == kPacked && !non_negative;
}
constexpr Dtype dtype_of_blocks(at::ScalarType dtype, bool non_negative) {
  if (packs(dtype, non_negative)) return Dtype::kInt4;
  if (dtype == kRoots) return Dtype::kUInt8Root;
  return dtype == at::kChar ? Dtype::kInt8 : Dtype::kFloat8E4M3;
}

// Whether this is a state of 4 bits: a parameter of bytes, which torch takes, has a buffer of bytes.
inline bool is_packed(const at::Tensor& state, const at::Tensor& param, bool non_negative) {
  return packs(state.scalar_type(), non_negative) && param.scalar_type() != kPacked;
}

// An uninitialised tensor for a state of this dtype: of the parameter's shape, its elements without
// gaps. A packed one has half as many in the dimension that is innermost in memory, or, where that is
// odd, one dimension with half of all.
at::Tensor empty_state_like(const at::Tensor& param, at::ScalarType dtype,
                            bool non_negative = false);

// True when a state lies like that; true when it may have lain like that while the parameter had
// another layout.
bool lies_beside(const at::Tensor& state, const at::Tensor& param, bool non_negative = false);
bool has_sizes_beside(const at::Tensor& state, const at::Tensor& param, bool non_negative);

// False for a parameter whose order in memory a packed state could not tell: one with an odd
// innermost dimension that is not row after row.
bool can_pack(const at::Tensor& param);

// Whether a packed state can have been made beside a tensor of these sizes; and where it was, what
// takes its values, in the order of its codes.
bool is_packed_of(const at::Tensor& packed, c10::IntArrayRef sizes);
at::Tensor empty_unpacked(const at::Tensor& packed, c10::IntArrayRef sizes);

// Blocks of 32 elements of a tensor of this many.
int64_t num_scales(int64_t numel);

// The shape of the scales, of two bytes each, beside these codes. Where blocks are parts of rows,
// they lie as the codes do: [..., columns] and [..., columns / 32, 2].
std::vector<int64_t> scale_sizes(const at::Tensor& codes, bool non_negative = false);

}  // namespace momentum_ext::binding
