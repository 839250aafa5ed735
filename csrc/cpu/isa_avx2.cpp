// The loop for x86-64 with AVX2, FMA and F16C.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace momentum_ext::cpu {
namespace avx2 {
namespace {
using FmaPolicy = FusedMultiplyAdd;

// 64-bit lanes, of which the lower halves are multiplied.
using WideVector = uint64_t __attribute__((vector_size(32)));
WideVector multiply_lower_halves(WideVector a, WideVector b) {
  return (WideVector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

Double8 add_product(Double8 sum, Double8 a, Double8 b) { return sum + a * b; }

#include "half_f16c.h"
#include "loops.h"
}  // namespace
}  // namespace avx2

const Loops* const kAvx2 = &avx2::kLoops;
}  // namespace momentum_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
const momentum_ext::cpu::Loops* const momentum_ext::cpu::kAvx2 = nullptr;
#endif
