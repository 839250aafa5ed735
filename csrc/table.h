// The table of tensors that a step works on, without torch's types: what the binding fills and a
// backend reads.
#pragma once

#include <cstdint>

#include "formats/block8.h"
#include "formats/master.h"
#include "formats/philox.h"

namespace momentum_ext {

constexpr int kMaxStates = 3;  // of a tensor, as many as a rule may have

// The tensors of a TensorEntry, each of which may have a layout of its own. State k is operand
// kState + k. (An average has its parameter's layout.)
enum Operand : int { kParam, kGrad, kState, kNumOperands = kState + kMaxStates };

// One dimension of an entry whose operands do not share one dense layout.
struct StridedDim {
  int64_t size;
  int64_t strides[kNumOperands];  // in elements; 0 for a missing state
};

// Dimensions from the outermost to the innermost of the parameter. A range [begin, end) of an
// entry counts elements in that order; a walk in blocks takes as many blocks as fall to the range.
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
      for (int operand = kNumOperands - 1; operand >= 0; --operand) {
        if ((innermost(operand, 0) == ndim - 1) == alike) fill_lines(operand);
      }
    }
  }

 private:
  static constexpr int64_t kLineElements = 16;

  // Takes the dimensions that a line of this operand's memory spans.
  void fill_lines(int operand) {
    int64_t reach = 1;  // elements in a row that the dimensions so far span
    int64_t above = 0;  // strides up to this are taken; those of 0 fill no line
    while (reach < kLineElements) {
      const int d = innermost(operand, above);
      if (d < 0) return;
      if (d != ndim - 1 && d != across && third < 0) (across < 0 ? across : third) = d;
      reach *= dims[d].size;
      above = dims[d].strides[operand];
    }
  }

  // The dimension with the smallest stride above this one; -1: none.
  int innermost(int operand, int64_t above) const {
    int found = -1;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t stride = dims[d].strides[operand];
      if (stride > above && (found < 0 || stride < dims[found].strides[operand])) found = d;
    }
    return found;
  }
};

// What low-precision state needs besides its operands. Its arrays are dense, in the order of the
// parameter's elements in memory.
struct LowPrecision {
  void* master;
  ScaleBits* scale[kMaxStates];  // of an 8-bit state: one for each kScaleBlock elements
  PlaceInWhole place;            // for random numbers
  uint32_t param_index;          // among the optimizer's parameters, for random numbers
  Master master_kind;
};

constexpr int16_t kCpu = -1;

// Where an entry's operands, or pieces of them, lie.
struct OperandPointers {
  void* param;
  const void* grad;
  void* state[kMaxStates];  // nullptr where the rule's variant has none
};

struct TensorEntry : OperandPointers {
  void* average;                // of the parameter, in its dtype and layout; nullptr: none is kept
  const StridedLayout* layout;  // nullptr when all operands share one dense layout
  const LowPrecision* low_precision;  // nullptr: no master, no scales, and stores round to nearest
  int64_t numel;
  uint32_t group;  // index into StepTable::groups
  Dtype param_dtype;
  Dtype grad_dtype;
  Dtype state_dtype[kMaxStates];
  bool is_first_step;
  int16_t device = kCpu;  // or the index of a CUDA device
  uint32_t cohort;        // not 0: only the device knows if it has had its first step: StepScalars
};
// Whoever walks a table of thousands of small tensors waits for its cache lines.
static_assert(sizeof(TensorEntry) == 88);

// Dimensions that a strided tensor on a CUDA device may have, after those that run on into each
// other were joined.
constexpr int kMaxStridedDimsCuda = 8;

// What a group's coefficients follow from besides counters, in rules that have some.
template <typename Rule>
struct NumbersOf {};
template <typename Rule>
  requires(Rule::kCounters > 0)
struct NumbersOf<Rule> : Rule::Numbers {};

// A parameter group, as a backend wants it: what chooses a kernel, and numbers for it.
template <typename Rule>
struct Hyperparams : Rule::Options {
  typename Rule::template Coefficients<double> f64{};
  typename Rule::template Coefficients<float> f32{};
  typename Rule::OnDevice on_device;
  bool stochastic_rounding = false;  // of what is stored in 16 or 8 bits
  bool rounds_masters = false;       // by chance: masters of 24 bits
  uint64_t rounding_seed = 0;
};

template <typename opmath_t, typename Rule>
MOMENTUM_EXT_INLINE const auto& coefficients(const Hyperparams<Rule>& h) {
  if constexpr (sizeof(opmath_t) == sizeof(double)) {
    return h.f64;
  } else {
    return h.f32;
  }
}

template <typename Rule>
inline void round_to_float(Hyperparams<Rule>& h) {
  h.f32 = Rule::rounded(h.f64);
}

struct TensorTable {
  const TensorEntry* entries;
  const int64_t* first_element;  // prefix sum of numel: num_entries + 1 values
  int64_t num_entries;
};

// The tensors of a step, and what is to be done with them.
template <typename Rule>
struct StepTable : TensorTable {
  const Hyperparams<Rule>* groups;
  double average_weight = 0;   // of the new parameter in its average
  uint32_t rounding_step = 0;  // how many steps have trained, for the CPU's random numbers
};

// Of the updates that the last step has made of a tensor's elements.
struct UpdateCounts {
  int64_t updates = 0;  // that were not zero
  int64_t below = 0;    // of these, what storage would lose, rounded to nearest
  int64_t lost = 0;     // and what arithmetic has lost, before anything is stored

  MOMENTUM_EXT_INLINE void add(bool is_update, bool is_same_stored, bool is_same) {
    updates += is_update ? 1 : 0;
    below += is_update && is_same_stored ? 1 : 0;
    lost += is_update && is_same ? 1 : 0;
  }
  // Threads that share a tensor add to the same counts.
  void add_from_thread(const UpdateCounts& other) {
    __atomic_fetch_add(&updates, other.updates, __ATOMIC_RELAXED);
    __atomic_fetch_add(&below, other.below, __ATOMIC_RELAXED);
    __atomic_fetch_add(&lost, other.lost, __ATOMIC_RELAXED);
  }
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
