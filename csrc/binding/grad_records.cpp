#include "grad_records.h"

#include <cstring>

#include "layout.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

// Views share their base's counter; a tensor that was made in inference mode has none.
bool is_same_counter(const c10::VariableVersion& a, const c10::VariableVersion& b) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

uint32_t current(const c10::VariableVersion& counter) {
  return counter.enabled() ? counter.current_version() : 0;
}

}  // namespace

void GradRecords::resize(size_t size) {
  if (!by_storage_.empty()) by_storage_.clear();
  records_.erase(records_.begin() + static_cast<ptrdiff_t>(size), records_.end());
  if (size == 0) one_coefficient_ = true;
}

GradRecords::Place GradRecords::place_of(const c10::TensorImpl& grad) {
  if (!grad.has_storage()) return {nullptr, 0, 0};
  const auto itemsize = static_cast<int64_t>(grad.itemsize());
  const int64_t begin = grad.storage_offset() * itemsize;
  const int64_t bytes =
      grad.is_contiguous() ? grad.numel() * itemsize
                           : num_bytes(grad.sizes(), grad.strides(), itemsize);
  return {grad.unsafe_storage().unsafeGetStorageImpl(), begin, begin + bytes};
}

void GradRecords::set(size_t n, const c10::TensorImpl& grad, int64_t coefficient) {
  if (!by_storage_.empty()) by_storage_.clear();
  if (n == 0) one_coefficient_ = true;
  one_coefficient_ = one_coefficient_ && coefficient == 0;
  const Place place = place_of(grad);
  const c10::VariableVersion& counter = grad.version_counter();
  if (n < records_.size() && records_[n].storage._unsafe_get_target() == place.storage &&
      is_same_counter(records_[n].counter, counter)) {  // new references cost more
    Record& record = records_[n];
    record.version = current(counter);
    record.begin = place.begin;
    record.end = place.end;
    record.coefficient = coefficient;
    return;
  }
  auto storage = place.storage == nullptr
                     ? c10::weak_intrusive_ptr<c10::StorageImpl>(
                           c10::intrusive_ptr<c10::StorageImpl>())
                     : c10::weak_intrusive_ptr<c10::StorageImpl>(
                           c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
                               const_cast<c10::StorageImpl*>(place.storage)));
  Record record{std::move(storage), counter,   current(counter),
                place.begin,        place.end, coefficient};
  if (n < records_.size()) {
    records_[n] = std::move(record);
  } else {
    records_.push_back(std::move(record));
  }
}

bool GradRecords::was_written(const Record& record, const c10::TensorImpl& grad) {
  if (current(record.counter) != record.version) return true;
  // Such a tensor (p.grad.data) counts its own writes.
  return !is_same_counter(record.counter, grad.version_counter()) &&
         current(grad.version_counter()) != 0;
}

bool GradRecords::is_same(size_t n, const c10::TensorImpl& grad) const {
  if (n >= records_.size() || !grad.has_storage()) return false;
  const Record& record = records_[n];
  if (record.storage._unsafe_get_target() != grad.unsafe_storage().unsafeGetStorageImpl() ||
      !is_same_counter(record.counter, grad.version_counter()) ||
      current(record.counter) != record.version) {
    return false;
  }
  const Place place = place_of(grad);
  return place.begin == record.begin && place.end == record.end;
}

int64_t GradRecords::find(const c10::TensorImpl& grad) {
  const Place place = place_of(grad);
  if (place.storage == nullptr) return -1;
  for (size_t n = by_storage_.size(); n < records_.size(); ++n) {
    by_storage_.emplace(records_[n].storage._unsafe_get_target(), n);
  }
  int64_t found = -1;
  const auto [first, last] = by_storage_.equal_range(place.storage);
  for (auto each = first; each != last; ++each) {
    const Record& record = records_[each->second];
    if (place.begin >= record.end || record.begin >= place.end) continue;
    const bool is_whole = place.begin == record.begin && place.end == record.end;
    if (is_whole && !was_written(record, grad)) return record.coefficient;
    found = -2 - record.coefficient;
  }
  return found;
}

}  // namespace momentum_ext::binding
