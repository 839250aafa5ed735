// The loop for x86-64 with AVX-512 (F, BW, DQ, VL), FMA and F16C.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace momentum_ext::cpu {
namespace avx512 {
namespace {
using FmaPolicy = FusedMultiplyAdd;

#include "half_f16c.h"
#include "loops.h"
}  // namespace
}  // namespace avx512

const Loops* const kAvx512 = &avx512::kLoops;
}  // namespace momentum_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
const momentum_ext::cpu::Loops* const momentum_ext::cpu::kAvx512 = nullptr;
#endif
