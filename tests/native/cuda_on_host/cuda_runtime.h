// Stands in for CUDA's own header where the kernels are compiled as C++ and run on the host:
// threads and blocks are loops, a launch is a call, and a sanitizer sees each of the kernels'
// accesses. Blocks share nothing but what they write to memory, so their order does not matter;
// how the threads of a block meet is in block_of_threads.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "block_of_threads.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
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
inline bool last_block_first = false;
inline bool is_capturing = false;
inline int current_device = 0;

// What was launched while capturing, which can be launched once more.
inline std::vector<std::function<void()>> graph;

template <typename... Args, size_t... kIndices>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, dim3 block, void** arguments,
                   std::index_sequence<kIndices...> indices) {
  launches.push_back(
      {grid.x, block.x, current_device, (sizeof(std::remove_reference_t<Args>) + ...)});
  if (launch_error != cudaSuccess) return launch_error;
  if (is_capturing) {
    using Copies = std::tuple<std::remove_cvref_t<Args>...>;
    graph.push_back([=, copies = std::make_shared<Copies>(
                            *static_cast<std::remove_cvref_t<Args>*>(arguments[kIndices])...)] {
      void* copied[] = {&std::get<kIndices>(*copies)...};
      launch(kernel, grid, block, copied, indices);
    });
  }
  gridDim = grid;
  blockDim = block;
  for (unsigned b = first_block; b < grid.x; ++b) {
    blockIdx.x = last_block_first ? first_block + grid.x - 1 - b : b;
    emulated::block.run(
        block.x, [](unsigned thread) { threadIdx.x = thread; },
        [&] { kernel(*static_cast<std::remove_reference_t<Args>*>(arguments[kIndices])...); });
  }
  return cudaSuccess;
}

}  // namespace emulated

template <typename... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t) {
  return emulated::launch(kernel, grid, block, arguments, std::index_sequence_for<Args...>());
}

// ---- what a kernel may call ---------------------------------------------------------------------

inline void __syncthreads() { emulated::block.meet(); }
inline void __syncwarp(unsigned mask = ~0u) { emulated::block.meet_in_warp(mask); }
inline void __threadfence() {}

// Lanes are counted in parts of the warp of `width`, and none reads beyond its own part.
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned me = emulated::block.lane();
  const auto part = static_cast<unsigned>(width);
  return emulated::block.exchange(mask, value,
                                  me / part * part + static_cast<unsigned>(lane) % part);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned me = emulated::block.lane();
  const unsigned from = me ^ static_cast<unsigned>(bits);
  const auto part = static_cast<unsigned>(width);
  return emulated::block.exchange(mask, value, from / part == me / part ? from : me);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned me = emulated::block.lane();
  const auto part = static_cast<unsigned>(width);
  const unsigned from = me + distance;
  return emulated::block.exchange(mask, value, from / part == me / part ? from : me);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned me = emulated::block.lane();
  const auto part = static_cast<unsigned>(width);
  return emulated::block.exchange(mask, value, me % part >= distance ? me - distance : me);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < emulated::kWarp; ++lane) {
    const int vote = emulated::block.exchange(mask, predicate, lane);
    if ((mask >> lane & 1) != 0 && vote != 0) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

// Blocks run one after the other, threads change places only where they meet.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address += value;
  return before;
}

// ---- what the host may call ---------------------------------------------------------------------

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
