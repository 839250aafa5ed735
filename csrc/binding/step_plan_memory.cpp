// Parameters that share memory: torch's for-loop updates one tensor after the other, and where the
// order shows, so must we. Shared memory is told by address ranges, which may call some tensors
// overlapping that only lie interleaved; those are then updated in order too, on one thread, which
// is slower and right.
#include <algorithm>

#include "step_plan.h"

namespace momentum_ext::binding {

// Collects the memory of all parameters and buffers, by address.
void StepPlan::find_shared_memory() {
  ranges_.clear();
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.path != Path::kContiguous && slot.path != Path::kLayout) continue;
    const Shapes* const shapes = slot.shapes.get();
    const auto add = [&](const void* data, int64_t itemsize,
                         const c10::impl::SizesAndStrides* shape) {
      const int64_t bytes = shape != nullptr ? num_bytes(*shape, itemsize) : slot.numel * itemsize;
      if (bytes > 0) ranges_.push_back({{data, bytes}, i});
    };
    add(slot.param_data, slot.param_itemsize, shapes ? &shapes->param : nullptr);
    if (slot.has_buffer) {
      add(slot.buffer_data, slot.buffer_itemsize, shapes ? &shapes->buffer : nullptr);
    }
    if (slot.known == nullptr) continue;
    for (const Known* const known : {&slot.known->master, &slot.known->scale}) {
      if (known->key != nullptr) {
        add(known->data, static_cast<int64_t>(known->dtype.itemsize()), &known->shape);
      }
    }
  }
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.bytes.begin < b.bytes.begin; });
  ranges_meet_ = false;
  for (size_t k = 1; k < ranges_.size(); ++k) {
    ranges_meet_ = ranges_meet_ || ranges_[k].bytes.begin < ranges_[k - 1].bytes.end;
  }
  ranges_changed_ = false;
}

// Only gradients whose storage has other owners can lie in another slot's parameter or buffer. The
// ranges are disjoint here: were they not, the tensors would be updated in order already.
bool StepPlan::some_grad_meets_another_slot() const {
  for (const size_t i : shared_grads_) {
    if (entries_[i].numel == 0) continue;
    const Slot& slot = slots_[i];
    const Shapes* const shapes = slot.shapes.get();
    const ByteRange grad(entries_[i].grad, shapes != nullptr
                                               ? num_bytes(shapes->grad, slot.grad_itemsize)
                                               : slot.numel * slot.grad_itemsize);
    auto after = std::lower_bound(
        ranges_.begin(), ranges_.end(), grad.end,
        [](const Range& range, const char* address) { return range.bytes.begin < address; });
    while (after != ranges_.begin() && (--after)->bytes.end > grad.begin) {
      if (after->slot != i) return true;
    }
  }
  return false;
}

}  // namespace momentum_ext::binding
