// Which gradients a coefficient was computed from: their memory, and how often it had been written.
#pragma once

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <unordered_map>
#include <vector>

namespace momentum_ext::binding {

class GradRecords {
 public:
  void clear() { resize(0); }
  void resize(size_t size);
  size_t size() const { return records_.size(); }

  // Record n, of at most one more than there are.
  void set(size_t n, const c10::TensorImpl& grad, int64_t coefficient);

  // True when all of them have coefficient 0.
  bool has_one_coefficient() const { return one_coefficient_; }

  // True when the gradient is record n's, and was not written since.
  bool is_same(size_t n, const c10::TensorImpl& grad) const;

  // The index of the coefficient that the gradient's memory has, whatever tensor object it belongs
  // to; -1: none; -2 - index: it was written since, or is not the memory as a whole.
  int64_t find(const c10::TensorImpl& grad);

 private:
  // Where a gradient lies.
  struct Place {
    const c10::StorageImpl* storage;
    int64_t begin;  // bytes from the storage's start
    int64_t end;
  };
  // The weak reference keeps the storage's address from being used again, not its memory.
  struct Record {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    c10::VariableVersion counter;
    uint32_t version;
    int64_t begin;
    int64_t end;
    int64_t coefficient;
  };
  static Place place_of(const c10::TensorImpl& grad);
  static bool was_written(const Record& record, const c10::TensorImpl& grad);

  std::vector<Record> records_;
  std::unordered_multimap<const c10::StorageImpl*, size_t> by_storage_;  // made by find()
  bool one_coefficient_ = true;
};

}  // namespace momentum_ext::binding
