// Stands in for torch's header; see ../../emulated_cuda.cpp.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime.h>

namespace c10::cuda {
class CUDAGuard {
 public:
  explicit CUDAGuard(c10::DeviceIndex device) : before_(emulated::current_device) {
    emulated::current_device = device;
  }
  ~CUDAGuard() { emulated::current_device = before_; }

 private:
  int before_;
};
}  // namespace c10::cuda
