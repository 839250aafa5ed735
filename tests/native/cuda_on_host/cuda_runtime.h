// Stands in for CUDA's own header where the kernels are compiled as C++ and run on the host:
// threads and blocks are loops, a launch is a call. The kernels synchronize nothing and share
// nothing, so the order of their threads does not matter, and a sanitizer sees each of their
// accesses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__ &  // a launch table is not copied for every thread

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_) : x(x_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline thread_local dim3 threadIdx(0), blockIdx(0), blockDim(1), gridDim(1);

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
using cudaStream_t = void*;

namespace emulated {

// The machine that is pretended to be there. Device 1 is older than sm_70.
inline int driver = 13000;
inline cudaError_t launch_error = cudaSuccess;

// What was launched, and which blocks of it are run.
struct Launch {
  unsigned blocks;
  unsigned threads;
  int device;
  size_t parameter_bytes;
};
inline std::vector<Launch> launches;
inline unsigned first_block = 0;
inline bool is_capturing = false;
inline int current_device = 0;

template <typename... Args, size_t... kIndices>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, dim3 block, void** arguments,
                   std::index_sequence<kIndices...>) {
  launches.push_back(
      {grid.x, block.x, current_device, (sizeof(std::remove_reference_t<Args>) + ...)});
  if (launch_error != cudaSuccess) return launch_error;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.x = first_block; blockIdx.x < grid.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
      kernel(*static_cast<std::remove_reference_t<Args>*>(arguments[kIndices])...);
    }
  }
  return cudaSuccess;
}

}  // namespace emulated

template <typename... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t) {
  return emulated::launch(kernel, grid, block, arguments, std::index_sequence_for<Args...>());
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulated::driver;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated failure"; }

constexpr unsigned cudaHostAllocPortable = 1;
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated::is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device == 1 ? 6 : 9;
  return cudaSuccess;
}
