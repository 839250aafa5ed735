// What the CUDA backend offers. No torch here: raw pointers, a device and a stream.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_table.h"

namespace momentum_ext::cuda {

// Updates every tensor of the table that lies on `device`, which must be the current one, in as few
// launches as possible: one for each combination of dtypes, as long as its tensors and groups fit
// into a kernel's parameter (see launch_table.h). With one_by_one, each tensor has its own launch,
// in the table's order. Uploads nothing, allocates nothing, waits for nothing.
cudaError_t step(const TensorTable& table, int device, const Overflow& overflow, bool one_by_one,
                 cudaStream_t stream);

// Before a step that keeps averages and whose overflow, or whose place in the count, only the
// device knows: the number of updates so far is on the device, and the weight for this one is
// written beside it.
cudaError_t count_average(const float* found_inf, double decay, bool warms_up, double* weight,
                          double* count, cudaStream_t stream);

}  // namespace momentum_ext::cuda
