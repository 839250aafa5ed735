// The kernels of low-precision state for emulated_cuda.cpp.
#include "../../csrc/cuda/low_precision.cu"
