// What the CUDA parts of the binding share: errors, and values where a device can read them.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace momentum_ext::binding {

inline void check_cuda(cudaError_t error, int16_t device, const std::string& who,
                       const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been reported; what follows may work
  throw std::runtime_error(who + " on cuda:" + std::to_string(device) + ": " + doing +
                           " failed with " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// The tensor's value where the device can read it; the copy, if one is needed, waits on the device.
template <typename T>
const T* value_on(int16_t device, at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  if (tensor.device().index() != device) {
    tensor = tensor.to(
        tensor.options().device(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))),
        /*non_blocking=*/true);
  }
  return tensor.const_data_ptr<T>();
}

}  // namespace momentum_ext::binding
