// The norm's kernels for emulated_cuda.cpp.
#include "../../csrc/cuda/norm.cu"
