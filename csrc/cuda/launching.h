// What the launchers share.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace momentum_ext::cuda {

// Whether a kernel's parameter may have 32,764 bytes: a question to driver and device.
inline bool has_large_parameters(int device) {
  constexpr int kMaxDevices = 64;
  constexpr int kDriverForCuda121 = 12010;
  static std::atomic<int8_t> known[kMaxDevices];  // 0: not asked yet
  if (device < kMaxDevices && known[device] != 0) return known[device] > 0;
  int driver = 0;
  int major = 0;
  const bool large =
      cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kDriverForCuda121 &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      major >= 7;
  if (device < kMaxDevices) known[device] = large ? 1 : -1;
  return large;
}

}  // namespace momentum_ext::cuda
