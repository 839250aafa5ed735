// The instruction sets that the loop is compiled for. Each is one file, cpu/isa_<name>.cpp.
#pragma once

#include <cstdint>

#include "../tensor_table.h"

namespace momentum_ext::cpu {

using RunFn = void (*)(const TensorTable& table, int64_t begin, int64_t end);

// nullptr where the build's target cannot have this instruction set.
extern const RunFn kRunAvx512;
extern const RunFn kRunAvx2;
extern const RunFn kRunNeon;
extern const RunFn kRunBaseline;

}  // namespace momentum_ext::cpu

// What loop.h needs besides the target: the compiler's word for "iterations are independent".
#if defined(__clang__)
#define MOMENTUM_EXT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define MOMENTUM_EXT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif
