// Memory that several tensors of a step share. Torch's for-loop updates one tensor after the other; where the order
// shows, so must we. Shared memory is told by address ranges. Tensors that only lie interleaved may count as overlapping;
// they are then updated in order too, on one thread, which is slower and right.
#pragma once

#include <vector>

#include "layout.h"

namespace momentum_ext::binding {

// What a step writes, each range with the number of its tensor.
class WrittenMemory {
 public:
  void clear() { ranges_.clear(); }
  void add(ByteRange bytes, size_t owner) {
    if (bytes.begin != bytes.end) ranges_.push_back({bytes, owner});
  }

  // Once all are there: sorts them, and finds whether two of them meet.
  void close();
  bool meets_itself() const { return meets_itself_; }

  // True when these bytes, which `owner` reads, are written for another tensor. Only where the ranges do not meet.
  bool meets_another(ByteRange bytes, size_t owner) const;

 private:
  struct Range {
    ByteRange bytes;
    size_t owner;
  };
  std::vector<Range> ranges_;  // by address
  bool meets_itself_ = false;
};

}  // namespace momentum_ext::binding
