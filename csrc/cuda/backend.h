// What the CUDA backend offers. No torch here: raw pointers, a device and a stream.
#pragma once

#include <cuda_runtime.h>

#include "../rules/clip.h"
#include "../rules/sgd.h"
#include "../step_scalars.h"
#include "../table.h"

namespace momentum_ext::cuda {

// Updates every tensor of the table that lies on `device`, which must be the current one, in as few
// launches as possible: one for each combination of dtypes, as long as its tensors and groups fit
// into a kernel's parameter (see launch_table.h). With one_by_one, each tensor has its own launch,
// in the table's order. Uploads nothing, allocates nothing, waits for nothing.
template <typename Rule>
cudaError_t step(const StepTable<Rule>& table, int device, const StepScalars& scalars,
                 bool one_by_one, cudaStream_t stream);

// Before a step: advances the counters of tensors that have them on the device, unless found_inf says
// that the step is left out, and derives the numbers that the step's kernels read.
template <typename Rule>
cudaError_t count_on_device(const NumbersOf<Rule>& numbers, const CountedOnDevice* tensors,
                            int64_t count, int device, const float* found_inf, cudaStream_t stream);

// As cpu::count_updates(), of what lies on the device, in a launch for each tensor.
cudaError_t count_updates(const StepTable<Sgd>& table, int device, const StepScalars& scalars,
                          cudaStream_t stream);

// Before a step that keeps averages and whose overflow, or whose place in the count, only the
// device knows: the number of updates so far is on the device, and the weight for this one is
// written beside it.
cudaError_t count_average(const float* found_inf, double decay, bool warms_up, double* weight,
                          double* count, cudaStream_t stream);

// After the last launch of a step: adds 1 to the number in the device's memory that StepScalars had
// as its rounding_step.
cudaError_t count_step(uint32_t* steps, cudaStream_t stream);

// ---- the norm of all gradients, and what follows from it ----------------------------------------

// Memory of the device that a list's norms need: zeros before the first use, and then one pass or
// conclusion after the other.
constexpr int kMaxNormBlocks = 1 << 14;
constexpr int kNormSums = 3;
struct NormWorkspace {
  double norm;  // of the gradients as they are
  uint32_t num_finished;
  double sums[kNormSums * kMaxNormBlocks];
};

// What to make of the norm. Everything lies in the device's memory; nullptr: not wanted, or 1.
struct Conclusion {
  const double* factor = nullptr;     // what the step was to multiply gradients with until now
  const float* inv_scale = nullptr;   // what it is to multiply with besides: this number,
  const float* grad_scale = nullptr;  // and the inverse of this one
  double* new_factor = nullptr;       // all of them together, and the clipping
  float* found_inf = nullptr;         // 1 where the norm is not finite, else 0
  void* norm = nullptr;               // of the gradients times these factors, in norm_dtype
  Dtype norm_dtype = Dtype::kFloat32;
  bool clips = false;  // to max_norm
  double max_norm = 0;
};

// Reads every gradient of the table once, in a launch for each 2,042 tensors (250 where driver or
// device know only small parameters), and draws the conclusion in the last. The entries have grad,
// numel and grad_dtype, and no layout. The same list gives the same bits on every run and device,
// wherever its memory lies. A NaN anywhere makes the norm NaN. Uploads nothing, allocates nothing,
// waits for nothing.
cudaError_t norm(Norm kind, const TensorTable& table, int device, NormWorkspace* workspace,
                 const Conclusion& conclusion, cudaStream_t stream,
                 int max_blocks = kMaxNormBlocks);

// Draws a conclusion from the norm that was computed last.
cudaError_t conclude(const NormWorkspace* workspace, const Conclusion& conclusion,
                     cudaStream_t stream);

}  // namespace momentum_ext::cuda
