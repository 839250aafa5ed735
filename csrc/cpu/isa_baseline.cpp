// The loop for any x86-64, and for machines that have no file of their own here. No fma: torch has
// none there either, so the result is that of torch at ATEN_CPU_CAPABILITY=default.
#include "isa.h"

#if !defined(__aarch64__)
namespace momentum_ext::cpu {
namespace baseline {
namespace {
using FmaPolicy = SeparateMultiplyAdd;

void half_to_float(const Float16* source, int64_t n, float* tile) {
  for (int64_t i = 0; i < n; ++i) tile[i] = load(source[i]);
}

void float_to_half(const float* tile, int64_t n, Float16* target) {
  for (int64_t i = 0; i < n; ++i) store(target[i], tile[i]);
}

// 64-bit lanes, of which the lower halves are multiplied.
using WideVector = uint64_t __attribute__((vector_size(16)));
WideVector multiply_lower_halves(WideVector a, WideVector b) {
  constexpr uint64_t kLowerHalf = 0xffffffffu;
  return (a & kLowerHalf) * (b & kLowerHalf);
}

Double8 add_product(Double8 sum, Double8 a, Double8 b) { return sum + a * b; }

#include "loops.h"
}  // namespace
}  // namespace baseline

const Loops* const kBaseline = &baseline::kLoops;
}  // namespace momentum_ext::cpu

#else
const momentum_ext::cpu::Loops* const momentum_ext::cpu::kBaseline = nullptr;
#endif
