// What update_report() counts: see Sgd::update_again() and UpdateCounts.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "device.h"

namespace momentum_ext::binding {

namespace py = pybind11;

// Of each parameter, in the order of the groups' lists; what there is not is not given.
struct CountedLists {
  using Tensors = std::vector<std::optional<at::Tensor>>;
  std::vector<at::Tensor> params;
  Tensors grads;
  Tensors momentum_buffers;
  Tensors scales;
  Tensors masters;
};

// A row of UpdateCounts for each parameter. -1 in those that the kernels are not made for, and where
// a tensor is missing that the last step's direction depends on. `groups` are dicts as in
// param_groups. Writes to none of the tensors; waits for CUDA devices.
at::Tensor count_updates(const py::list& groups, const CountedLists& lists,
                         const GradFactors& factors);

}  // namespace momentum_ext::binding
