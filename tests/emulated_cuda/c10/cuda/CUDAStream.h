// Stands in for torch's header; see ../../emulated_cuda.cpp.
#pragma once

#include <cuda_runtime.h>

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda
