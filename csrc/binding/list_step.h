// A step over lists of tensors that somebody else has collected: what a compiled graph calls. It
// keeps nothing from one step to the next, so it has no plan, and checks everything each time.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device.h"
#include "group_reader.h"
#include "operands.h"
#include "rule_groups.h"

namespace momentum_ext::binding {

class ListStep {
 public:
  // What a step reads and writes of each parameter, in the order of the groups' lists. A buffer is
  // there where the group has momentum; an average where one is kept in this pass.
  struct Lists {
    std::vector<at::Tensor> params;
    std::vector<at::Tensor> grads;
    std::vector<std::optional<at::Tensor>> momentum_buffers;
    std::vector<std::optional<at::Tensor>> averages;
    std::vector<bool> is_first_step;
  };

  // Checks everything and writes nothing. `groups` are dicts as in param_groups.
  ListStep(const py::list& groups, Lists lists, double inv_grad_scale, double average_weight);

  // The (group, index in group) of the tensors that the kernels are not made for: the caller
  // updates them by torch, then calls run(), or drops the step on an error.
  py::list fallback() const;

  // Updates all others.
  void run();

 private:
  void check(size_t i, const Operands& operands) const;
  void add(size_t i, TensorEntry entry);
  bool shares_memory() const;
  void average_by_torch() const;

  Lists lists_;
  double average_weight_;
  std::unique_ptr<RuleGroups> rule_;
  std::vector<TensorEntry> entries_;  // of those that the kernels update
  std::vector<size_t> updated_;       // their places in the lists
  std::vector<DeviceShare> shares_;
  std::vector<std::unique_ptr<OwnedLayout>> layouts_;
  std::vector<size_t> averaged_by_torch_;
  std::vector<std::pair<size_t, size_t>> fallback_;
};

}  // namespace momentum_ext::binding
