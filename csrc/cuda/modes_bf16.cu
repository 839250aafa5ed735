// The low-precision kernel for the modes of bf16 parameters.
#include "low_precision.cuh"

namespace momentum_ext::cuda {

template <typename Rule>
cudaError_t launch_bf16_mode(const Launching<Rule>& launching) {
  constexpr int kFirst = kNumModesOfFp32<Rule>;
  constexpr int kMine = kNumModes<Rule> - kFirst;
  if constexpr (kMine == 0) {
    return cudaErrorInvalidValue;  // kind_of() knows of none
  } else {
    return choose<kMine>(launching.kind - kFirstMode - kFirst, [&]<int k>() {
      return launch_kind<LowPrecisionKind<Rule, float, false, OneMode<Rule, kFirst + k>>>(
          launching);
    });
  }
}
#define MOMENTUM_EXT_LAUNCH_BF16(Rule) \
  template cudaError_t launch_bf16_mode(const Launching<Rule>& launching);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_LAUNCH_BF16)

}  // namespace momentum_ext::cuda
