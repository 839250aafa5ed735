// The kernels of update_report() for emulated_cuda.cpp.
#include "../../csrc/cuda/count_updates.cu"
