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

// 64-bit lanes, of which the lower halves are multiplied.
using WideVector = uint64_t __attribute__((vector_size(64)));
WideVector multiply_lower_halves(WideVector a, WideVector b) {
  return (WideVector)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}

#include "half_f16c.h"
#include "norm_fma.h"
//
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
