#include "grad_records.h"

#include <cstring>
#include <utility>

#include "layout.h"

namespace momentum_ext::binding {
namespace {

using Record = GradRecords::Record;

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

uint32_t current(const c10::VariableVersion& counter) {
  return counter.enabled() ? counter.current_version() : 0;
}

bool was_written(const Record& record, const c10::TensorImpl& grad) {
  if (current(record.counter) != record.version) return true;
  // Such a tensor (p.grad.data) counts its own writes.
  return !is_same_counter(record.counter, grad.version_counter()) &&
         current(grad.version_counter()) != 0;
}

}  // namespace

void GradRecords::add(const c10::TensorImpl& grad, int64_t coefficient, Record record) {
  const Place place = place_of(grad);
  one_coefficient_ = one_coefficient_ && coefficient == 0;
  if (!record.storage.has_value() && place.storage != nullptr) {
    record.storage.emplace(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
        const_cast<c10::StorageImpl*>(place.storage)));
  }
  if (!is_same_counter(record.counter, grad.version_counter())) {
    record.counter = grad.version_counter();
  }
  record.version = current(record.counter);
  record.begin = place.begin;
  record.end = place.end;
  record.coefficient = coefficient;
  records_.push_back(std::move(record));
}

Record GradRecords::take(size_t n, const c10::TensorImpl& grad) {
  const Place place = place_of(grad);
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

bool GradRecords::is_same(size_t n, const c10::TensorImpl& grad) const {
  return n < records_.size() && is_at(records_[n], place_of(grad)) &&
         is_same_counter(records_[n].counter, grad.version_counter()) &&
         current(records_[n].counter) == records_[n].version;
}

const GradRecords::Positions& GradRecords::by_storage() {
  for (size_t n = by_storage_.size(); n < records_.size(); ++n) {
    by_storage_.emplace(storage_of(records_[n]), n);
  }
  return by_storage_;
}

int64_t GradRecords::find(const c10::TensorImpl& grad) {
  const Place place = place_of(grad);
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
