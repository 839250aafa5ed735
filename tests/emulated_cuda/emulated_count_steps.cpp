// The kernel that counts steps for emulated_cuda.cpp.
#include "../../csrc/cuda/count_steps.cu"
