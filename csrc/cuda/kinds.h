// Which kernel takes which tensors of a step.
#pragma once

#include "backend.h"
#include "launching.h"

namespace momentum_ext::cuda {

// The combinations that training makes: one dtype; low-precision gradients; a buffer in fp32. Each
// flat one once more, for tensors whose average is kept. Tensors with low-precision state, and flat
// ones of other combinations, share a kernel that learns their dtypes when it runs.
enum KindIndex : int8_t {
  kF32,
  kF64,
  kBf16,
  kF16,
  kF32Bf16,
  kF32F16,
  kBf16F32,
  kF16F32,
  kAveraged,  // kF32 to kF16F32 again
  kStrided32 = 2 * kAveraged,
  kStrided64,
  kLowPrecisionFlat,
  kLowPrecisionStrided32,
  kLowPrecisionStrided64,  // flat ones too
  kNumKinds
};

// Of a tensor whose average is not kept.
inline KindIndex plain_kind_of(const TensorEntry& entry) {
  const bool has_buffer = entry.state[0] != nullptr;
  const Dtype p = entry.param_dtype;
  const Dtype g = entry.grad_dtype;
  const Dtype b = has_buffer ? entry.state_dtype[0] : p;
  const bool in_double = p == Dtype::kFloat64 || g == Dtype::kFloat64 || b == Dtype::kFloat64;
  if (entry.low_precision != nullptr) {
    return in_double                 ? kLowPrecisionStrided64
           : entry.layout == nullptr ? kLowPrecisionFlat
                                     : kLowPrecisionStrided32;
  }
  if (entry.layout == nullptr) {
    if (p == g && p == b) {
      return p == Dtype::kFloat32    ? kF32
             : p == Dtype::kFloat64  ? kF64
             : p == Dtype::kBFloat16 ? kBf16
                                     : kF16;
    }
    if (p == Dtype::kFloat32 && b == p && g == Dtype::kBFloat16) return kF32Bf16;
    if (p == Dtype::kFloat32 && b == p && g == Dtype::kFloat16) return kF32F16;
    if (p == Dtype::kBFloat16 && g == p && b == Dtype::kFloat32) return kBf16F32;
    if (p == Dtype::kFloat16 && g == p && b == Dtype::kFloat32) return kF16F32;
    if (!in_double) return kLowPrecisionFlat;
  }
  return in_double ? kStrided64 : kStrided32;
}

inline KindIndex kind_of(const TensorEntry& entry) {
  const KindIndex kind = plain_kind_of(entry);
  const bool averaged = entry.average != nullptr && kind < kAveraged;
  return averaged ? static_cast<KindIndex>(kind + kAveraged) : kind;
}

inline bool lies_on(const TensorEntry& entry, int device) {
  return entry.device == device && entry.numel != 0;
}

// What a launch needs beside the tensors of its kind, of which the table has `count`.
struct Launching {
  const StepTable<Sgd>& table;
  int device;
  const StepScalars& scalars;
  bool has_device_numbers;
  cudaStream_t stream;
  KindIndex kind;
  int64_t count;
};

// Of the last three kinds.
cudaError_t launch_low_precision(const Launching& launching);

}  // namespace momentum_ext::cuda
