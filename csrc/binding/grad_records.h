// Which gradients a coefficient was computed from: their memory, and how often it had been written.
#pragma once

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <optional>
#include <unordered_map>
#include <vector>

namespace momentum_ext::binding {

class GradRecords {
 public:
  // The weak reference keeps the storage's address from being used again, not its memory.
  struct Record {
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;
    c10::VariableVersion counter;
    uint32_t version = 0;
    c10::VariableVersion wrapper;  // of the DTensor whose shard it is, which counts by itself
    uint32_t wrapper_version = 0;
    int64_t offset = 0;  // elements from the storage's start
    int64_t numel = 0;
    int64_t begin = 0;  // bytes from the storage's start
    int64_t end = 0;
    int64_t coefficient = 0;
  };

  // A gradient as it is listed, and its memory: itself, or the local shard of a DTensor.
  struct Gradient {
    const c10::TensorImpl& listed;
    const c10::TensorImpl& memory;
  };

  size_t size() const { return records_.size(); }

  // Remembers a gradient as it is now; the record that it had saves making new references.
  void add(const Gradient& grad, int64_t coefficient, Record before);

  // Record n becomes that of this gradient, as it is now, with coefficient 0; then the records end
  // after n of them.
  void put(size_t n, const Gradient& grad);
  void resize(size_t n);

  // Takes out the record of the gradient's memory, which is most likely record n; or an empty one.
  Record take(size_t n, const Gradient& grad);

  // Remembers what is left of `others` and still in memory.
  void add_others(GradRecords others, int64_t shift);

  // True when all of them have coefficient 0.
  bool has_one_coefficient() const { return one_coefficient_; }

  // True when the gradient, of its parameter's shape, is record n's, and was not written since.
  bool is_same(size_t n, const Gradient& grad) const;

  // The index of the coefficient that the gradient's memory has, whatever tensor object it belongs
  // to; -1: none; -2 - index: it was written since, or is not the memory as a whole.
  int64_t find(const Gradient& grad);

 private:
  using Positions = std::unordered_multimap<const c10::StorageImpl*, size_t>;
  const Positions& by_storage();

  std::vector<Record> records_;
  Positions by_storage_;  // made when it is asked for
  bool one_coefficient_ = true;
};

}  // namespace momentum_ext::binding
