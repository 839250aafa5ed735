// Which kernel takes which tensors of a step.
#pragma once

#include "backend.h"
#include "launch_table.h"

namespace momentum_ext::cuda {

// The dtypes of flat tensors that have a kernel of their own, those that training makes: one dtype;
// low-precision gradients; states in fp32.
struct Dtypes {
  Dtype param, grad, state;
};
constexpr Dtypes kFlatDtypes[] = {
    {Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32},
    {Dtype::kFloat64, Dtype::kFloat64, Dtype::kFloat64},
    {Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kBFloat16},
    {Dtype::kFloat16, Dtype::kFloat16, Dtype::kFloat16},
    {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat32},
    {Dtype::kFloat32, Dtype::kFloat16, Dtype::kFloat32},
    {Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kFloat32},
    {Dtype::kFloat16, Dtype::kFloat16, Dtype::kFloat32},
};
constexpr int kNumFlat = static_cast<int>(sizeof(kFlatDtypes) / sizeof(Dtypes));

// Kernels by number: the flat ones by their dtypes; once more, for tensors whose average is kept;
// and these. Tensors with low-precision state, and flat ones of other dtypes, share a kernel that
// learns their dtypes when it runs.
enum Kind : int {
  kStrided32 = 2 * kNumFlat,
  kStrided64,
  kLowPrecisionFlat,
  kLowPrecisionStrided32,
  kLowPrecisionStrided64,  // flat ones too
  kNumKinds
};

template <typename Rule>
int kind_of(const TensorEntry& entry) {
  const Dtype p = entry.param_dtype;
  const Dtype g = entry.grad_dtype;
  const bool has_state = entry.state[0] != nullptr;
  const Dtype s = has_state ? entry.state_dtype[0] : p;
  bool in_double = p == Dtype::kFloat64 || g == Dtype::kFloat64 || s == Dtype::kFloat64;
  bool alike = true;  // the states
  for (int k = 1; k < Rule::kMaxStates; ++k) {
    if (entry.state[k] == nullptr) break;
    alike = alike && entry.state_dtype[k] == s;
    in_double = in_double || entry.state_dtype[k] == Dtype::kFloat64;
  }
  if (entry.low_precision != nullptr) {
    return in_double                 ? kLowPrecisionStrided64
           : entry.layout == nullptr ? kLowPrecisionFlat
                                     : kLowPrecisionStrided32;
  }
  if (entry.layout == nullptr) {
    for (int k = 0; k < kNumFlat && alike; ++k) {
      const Dtypes& mine = kFlatDtypes[k];
      const bool is_mine = p == mine.param && g == mine.grad && (s == mine.state || !has_state);
      if (is_mine) return entry.average != nullptr ? kNumFlat + k : k;
    }
    if (!in_double) return kLowPrecisionFlat;
  }
  return in_double ? kStrided64 : kStrided32;
}

// What a launch needs beside the tensors of its kind, of which the table has `count`.
template <typename Rule>
struct Launching {
  const StepTable<Rule>& table;
  int device;
  const StepScalars& scalars;
  bool has_device_numbers;
  cudaStream_t stream;
  int kind;
  int64_t count;
};

// Of the last three kinds.
template <typename Rule>
cudaError_t launch_low_precision(const Launching<Rule>& launching);

}  // namespace momentum_ext::cuda
