// The loop for 64-bit Arm, which always has NEON, fma and the conversion of fp16.
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace momentum_ext::cpu {
namespace neon {
namespace {
using FmaPolicy = FusedMultiplyAdd;

void half_to_float(const Float16* source, int64_t n, float* tile) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const uint16x4_t half = vld1_u16(&source[i].bits);
    vst1q_f32(tile + i, vcvt_f32_f16(vreinterpret_f16_u16(half)));
  }
  for (; i < n; ++i) tile[i] = load(source[i]);
}

void float_to_half(const float* tile, int64_t n, Float16* target) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    vst1_u16(&target[i].bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(tile + i))));
  }
  for (; i < n; ++i) store(target[i], tile[i]);
}

// 64-bit lanes, of which the lower halves are multiplied.
using WideVector = uint64_t __attribute__((vector_size(16)));
WideVector multiply_lower_halves(WideVector a, WideVector b) {
  return (WideVector)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}

Double8 add_product(Double8 sum, Double8 a, Double8 b) { return sum + a * b; }

#include "loops.h"
}  // namespace
}  // namespace neon

const Loops* const kNeon = &neon::kLoops;
}  // namespace momentum_ext::cpu

#else
const momentum_ext::cpu::Loops* const momentum_ext::cpu::kNeon = nullptr;
#endif
