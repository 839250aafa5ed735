#include "grad_records.h"

#include <cstring>
#include <utility>

#include "layout.h"

namespace momentum_ext::binding {
namespace {

using Record = GradRecords::Record;
using Gradient = GradRecords::Gradient;

struct Place {
  const c10::StorageImpl* storage;  // nullptr: not a tensor with memory of its own
  int64_t begin;
  int64_t end;
};

Place place_of(const c10::TensorImpl& grad) {
  if (!grad.has_storage()) return {nullptr, 0, 0};
  const auto itemsize = static_cast<int64_t>(grad.itemsize());
  const int64_t begin = grad.storage_offset() * itemsize;
  const int64_t bytes = grad.is_contiguous() ? grad.numel() * itemsize
                                             : num_bytes(grad.sizes(), grad.strides(), itemsize);
  return {grad.unsafe_storage().unsafeGetStorageImpl(), begin, begin + bytes};
}

const c10::StorageImpl* storage_of(const Record& record) {
  return record.storage.has_value() ? record.storage->_unsafe_get_target() : nullptr;
}

bool is_at(const Record& record, const Place& place) {
  return place.storage != nullptr && storage_of(record) == place.storage &&
         record.begin == place.begin && record.end == place.end;
}

// Views share their base's counter; a tensor that was made in inference mode has none.
bool is_same_counter(const c10::VariableVersion& a, const c10::VariableVersion& b) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

// True for a tensor that begins at the record's place, has as many elements and counts the same
// writes.
bool begins_at_record(const Record& record, const c10::TensorImpl& grad) {
  return grad.has_storage() && storage_of(record) == grad.unsafe_storage().unsafeGetStorageImpl() &&
         is_same_counter(record.counter, grad.version_counter()) &&
         record.offset == grad.storage_offset() && record.numel == grad.numel();
}

uint32_t current(const c10::VariableVersion& counter) {
  return counter.enabled() ? counter.current_version() : 0;
}

// Counted by a tensor that may not be the one that the record's counter is of. Such a one
// (p.grad.data, a new DTensor around the same shard) counts its own writes.
bool has_counted(const c10::VariableVersion& counter, uint32_t version,
                 const c10::VariableVersion& now) {
  return current(counter) != version || (!is_same_counter(counter, now) && current(now) != 0);
}

bool is_wrapped(const Gradient& grad) { return &grad.listed != &grad.memory; }

bool was_written(const Record& record, const Gradient& grad) {
  return has_counted(record.counter, record.version, grad.memory.version_counter()) ||
         (is_wrapped(grad) &&
          has_counted(record.wrapper, record.wrapper_version, grad.listed.version_counter()));
}

// Of a record whose counter is the memory's.
void note_versions(Record& record, const Gradient& grad) {
  record.version = current(record.counter);
  const c10::VariableVersion& wrapper = grad.listed.version_counter();
  if (is_wrapped(grad) && !is_same_counter(record.wrapper, wrapper)) record.wrapper = wrapper;
  record.wrapper_version = current(record.wrapper);
}

}  // namespace

void GradRecords::add(const Gradient& gradient, int64_t coefficient, Record record) {
  const c10::TensorImpl& grad = gradient.memory;
  const Place place = place_of(grad);
  one_coefficient_ = one_coefficient_ && coefficient == 0;
  if (!record.storage.has_value() && place.storage != nullptr) {
    record.storage.emplace(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
        const_cast<c10::StorageImpl*>(place.storage)));
  }
  if (!is_same_counter(record.counter, grad.version_counter())) {
    record.counter = grad.version_counter();
  }
  note_versions(record, gradient);
  record.offset = grad.storage_offset();
  record.numel = grad.numel();
  record.begin = place.begin;
  record.end = place.end;
  record.coefficient = coefficient;
  records_.push_back(std::move(record));
}

void GradRecords::put(size_t n, const Gradient& grad) {
  if (n < records_.size() && begins_at_record(records_[n], grad.memory) &&
      is_at(records_[n], place_of(grad.memory))) {  // the same memory: new references cost more
    note_versions(records_[n], grad);
    records_[n].coefficient = 0;
    return;
  }
  resize(n);
  add(grad, 0, {});
}

void GradRecords::resize(size_t n) {
  records_.erase(records_.begin() + static_cast<ptrdiff_t>(n), records_.end());
  by_storage_.clear();
  one_coefficient_ = true;
}

Record GradRecords::take(size_t n, const Gradient& grad) {
  const Place place = place_of(grad.memory);
  if (records_.empty() || place.storage == nullptr) return {};
  if (n < records_.size() && is_at(records_[n], place)) return std::exchange(records_[n], {});
  const auto [first, last] = by_storage().equal_range(place.storage);
  for (auto each = first; each != last; ++each) {
    if (is_at(records_[each->second], place)) return std::exchange(records_[each->second], {});
  }
  return {};
}

void GradRecords::add_others(GradRecords others, int64_t shift) {
  for (Record& record : others.records_) {
    if (!record.storage.has_value() || record.storage->expired()) continue;
    record.coefficient += shift;
    one_coefficient_ = false;
    records_.push_back(std::move(record));
  }
}

// Looks at as few cache lines as it can: each step asks for each gradient.
bool GradRecords::is_same(size_t n, const Gradient& grad) const {
  return n < records_.size() && begins_at_record(records_[n], grad.memory) &&
         current(records_[n].counter) == records_[n].version &&
         (!is_wrapped(grad) || !was_written(records_[n], grad));
}

const GradRecords::Positions& GradRecords::by_storage() {
  for (size_t n = by_storage_.size(); n < records_.size(); ++n) {
    by_storage_.emplace(storage_of(records_[n]), n);
  }
  return by_storage_;
}

int64_t GradRecords::find(const Gradient& grad) {
  const Place place = place_of(grad.memory);
  if (place.storage == nullptr) return -1;
  int64_t found = -1;
  const auto [first, last] = by_storage().equal_range(place.storage);
  for (auto each = first; each != last; ++each) {
    const Record& record = records_[each->second];
    const bool is_whole = is_at(record, place);
    if (!is_whole && (place.begin >= record.end || record.begin >= place.end)) continue;
    if (is_whole && !was_written(record, grad)) return record.coefficient;
    found = -2 - record.coefficient;
  }
  return found;
}

}  // namespace momentum_ext::binding
