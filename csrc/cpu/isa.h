// The instruction sets that the loop is compiled for. Each is one file, cpu/isa_<name>.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../formats/master.h"
#include "../formats/philox.h"
#include "../formats/stochastic.h"
#include "../rules/average.h"
#include "../rules/lookahead.h"
#include "../rules/rules.h"
#include "backend.h"

namespace momentum_ext::cpu {

using Double8 = double __attribute__((vector_size(64)));

// Each works on elements [begin, end) of the table's concatenated range.
template <typename Rule>
using RunFn = void (*)(const StepTable<Rule>& table, int64_t begin, int64_t end);

// On blocks [begin, end), of which table.first_element is the prefix sum.
using NormFn = void (*)(const TensorTable& table, int64_t begin, int64_t end, double scale,
                        double* block_norms);

template <typename Rule>
struct StepLoop {
  RunFn<Rule> step;
};

struct OtherLoops {
  RunFn<Sgd> to_iterate;
  RunFn<Sgd> to_lookahead;
  RunFn<Sgd> count;
  NormFn norm[3];  // by Norm
};

#define MOMENTUM_EXT_BASE(Rule) StepLoop<Rule>,
struct Loops : MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_BASE) OtherLoops {};
#undef MOMENTUM_EXT_BASE

// nullptr where the build's target cannot have this instruction set.
extern const Loops* const kAvx512;
extern const Loops* const kAvx2;
extern const Loops* const kNeon;
extern const Loops* const kBaseline;

}  // namespace momentum_ext::cpu

// What the loops need besides the target: the compiler's words for "iterations are independent" and
// for a vector of lanes of two vectors.
#if defined(__clang__)
#define MOMENTUM_EXT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#define MOMENTUM_EXT_SHUFFLE(Vector, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MOMENTUM_EXT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#define MOMENTUM_EXT_SHUFFLE(Vector, a, b, ...) __builtin_shuffle(a, b, Vector{__VA_ARGS__})
#endif
