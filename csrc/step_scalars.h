// What a step on a CUDA device reads from its memory, because the host does not know it.
#pragma once

#include "formats/dtype.h"

namespace momentum_ext {

// A hyperparameter in a device's memory.
struct DeviceNumber {
  const void* data = nullptr;  // nullptr: the number is known on the host
  Dtype dtype = Dtype::kFloat32;
  uint8_t zeros[7] = {};  // launch tables compare groups as words
};

// A tensor that counts its own steps in a device's memory, where the host does not know the counters: a
// kernel before those of the step advances them and derives what depends on them, in double.
constexpr int kMaxCounters = 2;  // of a tensor, as many as a rule may have
constexpr int kMaxDerived = 4;   // numbers
struct CountedOnDevice {
  void* counters[kMaxCounters];
  double* derived;
  uint64_t is_double;  // bit k: counter k is in fp64, else in fp32
};

// What torch.amp.GradScaler hands over, the coefficient of a clipping, the weight of an average.
// nullptr where there is none.
//
// The host does not know whether a step that it launches will overflow and so be left out. A tensor
// whose first step is launched like this therefore belongs to a cohort: cohorts are numbered from 1
// in the order of their first launches, and the device keeps the number of the newest one that has
// truly been updated. A tensor of a later cohort has yet to have its first step, one of an earlier
// cohort has had it: a step without all tensors of its cohorts puts the missing ones into new ones.
struct StepScalars {
  const float* found_inf = nullptr;     // not 0: the launch changes nothing
  const float* grad_scale = nullptr;    // gradients have been multiplied by it
  uint32_t* settled = nullptr;          // the newest cohort that has been updated
  uint32_t* settled_on_host = nullptr;  // a copy in pinned memory that the host may look at
  uint32_t newest_cohort = 0;           // among this step's tensors; 0: nothing to record
  const double* grad_factor = nullptr;  // in place of grad_scale: what to multiply gradients with
  const double* average_weight = nullptr;   // in place of the table's
  const uint32_t* rounding_step = nullptr;  // as the table's; nullptr: nothing is rounded at random
};

}  // namespace momentum_ext
