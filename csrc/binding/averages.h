// The averages of a step's parameters, kept in the step's own pass where parameter and average lie
// alike (and, on the CPU, are walked as flat arrays), and by torch after it everywhere else.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "plan.h"
#include "state_changes.h"

namespace momentum_ext::binding {

enum class Averaging : uint8_t {
  kNone,
  kStart,   // only make those that are missing: a step that is no training
  kUpdate,  // at opt.state[p]["ema"]
};

class StepAverages {
 public:
  // After all slots were prepared. Averages that are missing start at what the parameter is now;
  // they go into `changes`. Writes nothing.
  void attach(Plan& plan, Averaging averaging, bool in_order, StateChanges& changes);

  // True where some are left to torch.
  bool need_torch() const { return !by_torch_.empty(); }
  const std::vector<size_t>& by_torch() const { return by_torch_; }

  // After the update.
  void update_by_torch(const Plan& plan, const py::object& state, double weight) const;

  void clear() { by_torch_.clear(); }

 private:
  std::vector<size_t> by_torch_;
};

}  // namespace momentum_ext::binding
