// The instances of that kernel for some modes.
#include "../../csrc/cuda/modes_bf16.cu"
#include "../../csrc/cuda/modes_fp32.cu"
