// What the CUDA backend offers. No torch here: raw pointers, a device and a stream.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_table.h"

namespace momentum_ext::cuda {

// What torch.amp.GradScaler hands to a step, as it lies on the device; all nullptr without it.
//
// The host does not know whether a step that it launches will overflow and so be left out. A tensor
// whose first step is launched like this therefore belongs to a cohort: cohorts are numbered from 1
// in the order of their first launches, and the device keeps the number of the newest one that has
// truly been updated. A tensor of a later cohort has yet to have its first step.
struct Overflow {
  const float* found_inf = nullptr;   // not 0: the launch changes nothing
  const float* grad_scale = nullptr;  // gradients have been multiplied by it
  uint32_t* settled = nullptr;        // the newest cohort that has been updated
  uint32_t* settled_on_host = nullptr;  // a copy in pinned memory that the host reads now and then
  uint32_t newest_cohort = 0;  // among this step's tensors; 0: nothing to record
};

// Dimensions that a strided tensor may have after those that run on into each other were joined.
constexpr int kMaxStridedDims = 8;

// Updates every tensor of the table that lies on `device`, which must be the current one, in as few
// launches as possible: one for each combination of dtypes, as long as its tensors and groups fit
// into a kernel's parameter (see launch_table.h). With one_by_one, each tensor has its own launch,
// in the table's order. Uploads nothing, allocates nothing, waits for nothing.
cudaError_t step(const TensorTable& table, int device, const Overflow& overflow, bool one_by_one,
                 cudaStream_t stream);

}  // namespace momentum_ext::cuda
