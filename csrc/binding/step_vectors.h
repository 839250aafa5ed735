// What a step is given and what it works with.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "averages.h"
#include "plan.h"
#include "state_changes.h"

namespace momentum_ext::binding {

// What has to be known before a step is prepared.
struct StepOptions {
  bool all_by_torch = false;     // differentiable=True, or operators are watched
  bool may_be_left_out = false;  // by the device, for an overflow that the host does not know
  Averaging averaging = Averaging::kNone;
  py::object grads{};  // parameters with the tensors that stand in for their gradients, or null
};

// A plan lends them to its step, so that they keep their capacity and a step allocates nothing once
// warm.
struct StepVectors {
  std::vector<size_t> changed;           // slots that are not as the plan says
  std::vector<size_t> shared_grads;      // slots whose gradient's storage has other owners
  std::vector<DeviceShare> shares;       // one for each CUDA device that has tensors in this step
  std::vector<CountedOnDevice> counted;  // on one of them
  std::vector<size_t> fallback;
  std::vector<at::Tensor> redistributed_grads;  // empty, or one for each slot
  std::vector<at::Tensor> resolved_grads;
  StateChanges changes;
  StepAverages averages;
  std::vector<TensorEntry> cpu_entries;  // only where CPU and CUDA tensors are mixed
  std::vector<int64_t> cpu_first_element;
  std::vector<std::pair<c10::intrusive_ptr<c10::TensorImpl>, c10::Storage>> kept_alive;

  void clear() {
    changed.clear();
    shared_grads.clear();
    shares.clear();
    fallback.clear();
    redistributed_grads.clear();
    resolved_grads.clear();
    changes.clear();
    averages.clear();
    cpu_entries.clear();
    kept_alive.clear();
  }
};

}  // namespace momentum_ext::binding
