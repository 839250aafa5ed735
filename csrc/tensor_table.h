// The plain table of tensors that a step works on: what the binding fills and a backend reads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "hyperparams.h"

namespace momentum_ext {

// The tensors of an entry that may lie differently.
enum Operand : int { kParam, kGrad, kBuffer, kNumOperands };

// One dimension of a tensor whose parameter, gradient and buffer do not share one dense layout.
struct StridedDim {
  int64_t size;
  int64_t strides[kNumOperands];  // in elements
};

// Dimensions from the outermost to the innermost of the parameter. Element i of the table's range
// is element i in that order.
//
// Whoever goes through memory in that order, or in another operand's, uses one element of each
// cache line of the others before the line is gone. So a walk goes in blocks of rows x columns:
// columns along the innermost dimension, rows along `across`, and from block to block along
// `third`, so that all operands' lines are used up while they are in the nearest cache.
struct StridedLayout {
  const StridedDim* dims;
  int ndim;
  int across = -1;  // -1: there is none, the innermost dimension alone fills the lines
  int third = -1;

  StridedLayout() : dims(nullptr), ndim(0) {}
  StridedLayout(const StridedDim* dims_, int ndim_) : dims(dims_), ndim(ndim_) {
    for (const bool alike : {false, true}) {  // those that lie like the parameter come last
      for (const Operand operand : {kBuffer, kGrad, kParam}) {
        if ((innermost(operand, 0) == ndim - 1) == alike) fill_lines(operand);
      }
    }
  }

 private:
  static constexpr int64_t kLineElements = 16;

  // Takes the dimensions that a line of this operand's memory has.
  void fill_lines(Operand operand) {
    int64_t reach = 1;  // elements in a row that the dimensions so far have
    int64_t above = 0;  // the strides that were had, and those of 0, which fill no line
    while (reach < kLineElements) {
      const int d = innermost(operand, above);
      if (d < 0) return;
      if (d != ndim - 1 && d != across && third < 0) (across < 0 ? across : third) = d;
      reach *= dims[d].size;
      above = dims[d].strides[operand];
    }
  }

  // The dimension with the smallest stride above this one; -1: none.
  int innermost(Operand operand, int64_t above) const {
    int found = -1;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t stride = dims[d].strides[operand];
      if (stride > above && (found < 0 || stride < dims[found].strides[operand])) found = d;
    }
    return found;
  }
};

// Where the exact value of a 16-bit parameter is kept.
enum class Master : uint8_t {
  kNone,       // the parameter is all there is
  kRemainder,  // int16: what rounding to bf16 has cut off, see split() in low_precision.h
  kCopy,       // fp32
};

// What low-precision state needs besides the three tensors. Its arrays are dense, in the order in
// which the parameter is walked: its own order in memory.
struct LowPrecision {
  void* master;
  float* scale;     // of an 8-bit momentum buffer: one for each kScaleBlock elements
  uint32_t tensor;  // its place among the optimizer's parameters, for random numbers
  Master master_kind;
};

constexpr int16_t kCpu = -1;

struct TensorEntry {
  void* param;
  const void* grad;
  void* momentum_buffer;        // nullptr when the group has no momentum
  void* average;                // of the parameter, in its dtype and layout; nullptr: none is kept
  const StridedLayout* layout;  // nullptr when all three share one dense layout
  const LowPrecision* low_precision;  // nullptr: values are stored as they are, rounded to nearest
  int64_t numel;
  uint32_t group;  // index into TensorTable::groups
  Dtype param_dtype;
  Dtype grad_dtype;
  Dtype buffer_dtype;
  bool is_first_step;
  int16_t device = kCpu;  // or the index of a CUDA device
  uint32_t
      cohort;  // not 0: whether this tensor has had its first step is known on its device alone
};

// What a step on a CUDA device reads from its memory, because the host does not know it: what
// torch.amp.GradScaler hands over, the coefficient of a clipping, the weight of an average. nullptr
// where there is none.
//
// The host does not know whether a step that it launches will overflow and so be left out. A tensor
// whose first step is launched like this therefore belongs to a cohort: cohorts are numbered from 1
// in the order of their first launches, and the device keeps the number of the newest one that has
// truly been updated. A tensor of a later cohort has yet to have its first step, one of an earlier
// cohort has had it: a step without all tensors of its cohorts puts the missing ones into new ones.
struct Overflow {
  const float* found_inf = nullptr;     // not 0: the launch changes nothing
  const float* grad_scale = nullptr;    // gradients have been multiplied by it
  uint32_t* settled = nullptr;          // the newest cohort that has been updated
  uint32_t* settled_on_host = nullptr;  // a copy in pinned memory that the host may look at
  uint32_t newest_cohort = 0;           // among this step's tensors; 0: nothing to record
  const double* grad_factor = nullptr;  // in place of grad_scale: what to multiply gradients with
  const double* average_weight = nullptr;  // in place of the table's
};

// Dimensions that a strided tensor on a CUDA device may have, after those that run on into each
// other were joined.
constexpr int kMaxStridedDimsCuda = 8;

struct TensorTable {
  const TensorEntry* entries;
  const int64_t* first_element;  // prefix sum of numel: num_entries + 1 values
  int64_t num_entries;
  const Hyperparams* groups;
  double average_weight =
      0;  // of the new parameter in its average; 1: the average becomes the parameter
  uint32_t rounding_step = 0;  // how many steps there have been, for random numbers
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
