#include "aliasing.h"

#include <algorithm>

namespace momentum_ext::binding {

void WrittenMemory::close() {
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.bytes.begin < b.bytes.begin; });
  meets_itself_ = false;
  for (size_t k = 1; k < ranges_.size(); ++k) {
    meets_itself_ = meets_itself_ || ranges_[k].bytes.begin < ranges_[k - 1].bytes.end;
  }
}

bool WrittenMemory::meets_another(ByteRange bytes, size_t owner) const {
  auto after = std::lower_bound(
      ranges_.begin(), ranges_.end(), bytes.end,
      [](const Range& range, const char* address) { return range.bytes.begin < address; });
  while (after != ranges_.begin() && (--after)->bytes.end > bytes.begin) {
    if (after->owner != owner) return true;
  }
  return false;
}

}  // namespace momentum_ext::binding
