// The plain table of tensors that a step works on: what the binding fills and a backend reads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "hyperparams.h"

namespace momentum_ext {

// One dimension of a tensor whose parameter, gradient and buffer do not share one dense layout.
// Strides in elements.
struct StridedDim {
  int64_t size;
  int64_t param_stride;
  int64_t grad_stride;
  int64_t buffer_stride;
};

// Dimensions from the outermost to the innermost. Element i of the table's range is element i in
// that order.
struct StridedLayout {
  const StridedDim* dims;
  int ndim;
};

struct TensorEntry {
  void* param;
  const void* grad;
  void* momentum_buffer;        // nullptr when the group has no momentum
  const StridedLayout* layout;  // nullptr when all three share one dense layout
  int64_t numel;
  uint32_t group;  // index into TensorTable::groups
  Dtype param_dtype;
  Dtype grad_dtype;
  Dtype buffer_dtype;
  bool is_first_step;
  int16_t device;  // kCpu, or the index of a CUDA device
  // Not 0: whether this tensor has had its first step is written on its device (cuda/step.h).
  uint32_t cohort;
};

constexpr int16_t kCpu = -1;

struct TensorTable {
  const TensorEntry* entries;
  const int64_t* first_element;  // prefix sum of numel: num_entries + 1 values
  int64_t num_entries;
  const Hyperparams* groups;
};

// The entry that holds element `position` of the concatenated range [first_element[0],
// first_element[num_entries]).
MOMENTUM_EXT_INLINE int64_t locate_entry(const TensorTable& table, int64_t position) {
  int64_t low = 0;
  int64_t high = table.num_entries;  // first_element[low] <= position < first_element[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (table.first_element[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace momentum_ext
