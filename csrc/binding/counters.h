// The numbers in a tensor's state that change in each of its steps ("step", in Adam), and the rows of a
// table's groups that follow from them: tensors of one group may be in different steps of their own.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <unordered_map>
#include <vector>

#include "../step_scalars.h"

namespace momentum_ext::binding {

// Their values, and which are stored in fp64; the others are in fp32.
struct Counters {
  double values[kMaxCounters] = {};
  bool is_double[kMaxCounters] = {};
  double* derived =
      nullptr;  // of counters on a device: see CountedOnDevice; their values are not known

  friend bool operator==(const Counters&, const Counters&) = default;
};

// A group's hyperparameters for the tensors whose counters are the same. A row is only a cache: it holds
// for any tensor of its group with these counters.
struct CounterRow {
  static constexpr size_t kNoGroup = ~size_t{0};
  size_t group = kNoGroup;
  Counters before;
  Counters after;        // this step
  bool is_used = false;  // in this step
};

class CounterRows {
 public:
  void begin_step() {
    for (CounterRow& row : rows_) row.is_used = false;
  }

  // The row for a tensor of this group, which may be at `hint`. advance(before): the counters after.
  template <typename Advance>
  uint32_t find(uint32_t hint, size_t group, const Counters& before, const Advance& advance) {
    if (hint >= rows_.size() || !is_row_of(rows_[hint], group, before)) {
      // One of a tensor's own that has been forgotten is filled in where it is: there are many.
      const bool is_own = before.derived != nullptr && hint < rows_.size() &&
                          rows_[hint].before.derived == before.derived && !rows_[hint].is_used;
      if (is_own) {
        rows_[hint].group = CounterRow::kNoGroup;
      } else {
        hint = find_elsewhere(group, before);
      }
      if (rows_[hint].group == CounterRow::kNoGroup) {
        rows_[hint].group = group;
        rows_[hint].before = before;
        rows_[hint].after = advance(before);
      }
    }
    rows_[hint].is_used = true;
    return hint;
  }

  // The tensors of the rows in use are one step further.
  template <typename Advance>
  void end_step(const Advance& advance) {
    for (CounterRow& row : rows_) {
      if (!row.is_used) continue;
      row.before = row.after;
      row.after = advance(row.group, row.before);
    }
  }

  // What the counters of a group follow from has changed.
  template <typename Advance>
  void advance_anew(size_t group, const Advance& advance) {
    for (CounterRow& row : rows_) {
      if (row.group == group) row.after = advance(row.before);
    }
  }
  void clear() { rows_.clear(); }

  const std::vector<CounterRow>& all() const { return rows_; }

 private:
  static bool is_row_of(const CounterRow& row, size_t group, const Counters& before) {
    return row.group == group && row.before == before;
  }
  // One that is empty where there is none.
  uint32_t find_elsewhere(size_t group, const Counters& before);

  std::vector<CounterRow> rows_;
};

// Memory for what a device derives of its counters, for each slot of a plan. It stays, as a captured
// graph may write there.
class DerivedNumbers {
 public:
  double* of_slot(int16_t device, size_t slot, size_t num_slots);

 private:
  std::unordered_map<int16_t, at::Tensor> memory_;
  std::vector<at::Tensor> outgrown_;
};

// A counter of a tensor's state that the host reads, or kernels on this device: one number in fp32 or
// fp64.
bool is_counter(const at::Tensor& tensor, int16_t device);

inline double read_counter(const void* data, bool is_double) {
  return is_double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
}
inline void write_counter(void* data, bool is_double, double value) {
  if (is_double) {
    *static_cast<double*>(data) = value;
  } else {
    *static_cast<float*>(data) = static_cast<float>(value);
  }
}

}  // namespace momentum_ext::binding
