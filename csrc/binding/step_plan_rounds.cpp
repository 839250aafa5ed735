// Parameters that share memory: torch's for-loop updates one after the other, and so must we where
// the order shows.
#include <algorithm>

#include "step_plan.h"

namespace momentum_ext::binding {

// Gives each tensor a round that comes after those of all earlier tensors whose memory it touches:
// torch's for-loop updates one after the other, and so must we where the order shows.
void StepPlan::assign_rounds() {
  struct Range {
    ByteRange bytes;
    size_t slot;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.round = 0;
    if (slot.path != Path::kContiguous && slot.path != Path::kLayout) continue;
    const auto add = [&](void* data, caffe2::TypeMeta dtype,
                         const c10::impl::SizesAndStrides* shape) {
      const auto itemsize = static_cast<int64_t>(dtype.itemsize());
      const int64_t bytes = shape != nullptr ? num_bytes(*shape, itemsize) : slot.numel * itemsize;
      if (bytes > 0) ranges.push_back({{data, bytes}, i});
    };
    Shapes* const shapes = slot.shapes.get();
    add(slot.param_data, slot.param_dtype, shapes ? &shapes->param : nullptr);
    if (slot.has_buffer)
      add(slot.buffer_data, slot.buffer_dtype, shapes ? &shapes->buffer : nullptr);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.bytes.begin < b.bytes.begin; });

  std::vector<std::pair<size_t, size_t>> conflicts;  // later slot, earlier slot
  std::vector<Range> open;  // ranges that reach past the current one's begin
  for (const Range& range : ranges) {
    std::erase_if(open, [&](const Range& other) { return other.bytes.end <= range.bytes.begin; });
    for (const Range& other : open) {
      if (other.slot != range.slot)
        conflicts.push_back(std::minmax(other.slot, range.slot, std::greater<>()));
    }
    open.push_back(range);
  }
  std::sort(conflicts.begin(), conflicts.end());
  num_rounds_ = 1;
  for (const auto& [later, earlier] : conflicts) {
    slots_[later].round = std::max(slots_[later].round, slots_[earlier].round + 1);
    num_rounds_ = std::max(num_rounds_, slots_[later].round + 1);
  }
  ranges_changed_ = false;
}

void StepPlan::sort_into_rounds() {
  std::vector<size_t> order(slots_.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return slots_[a].round < slots_[b].round; });
  sorted_entries_.resize(slots_.size());
  for (size_t k = 0; k < order.size(); ++k) {
    sorted_entries_[k] = entries_[order[k]];
    first_element_[k + 1] = first_element_[k] + sorted_entries_[k].numel;
    if (k > 0 && slots_[order[k]].round != slots_[order[k - 1]].round) round_end_.push_back(k);
  }
  round_end_.push_back(slots_.size());
}

TensorTable StepPlan::table_of_round(size_t begin, size_t end) const {
  const TensorEntry* const entries = num_rounds_ == 1 ? entries_.data() : sorted_entries_.data();
  return {entries + begin, first_element_.data() + begin, static_cast<int64_t>(end - begin),
          hyperparams_.data()};
}

}  // namespace momentum_ext::binding
