// The low-precision kernel for the modes of fp32 parameters.
#include "low_precision.cuh"

namespace momentum_ext::cuda {

template <typename Rule>
cudaError_t launch_fp32_mode(const Launching<Rule>& launching) {
  constexpr int kFirst = 0;
  constexpr int kMine = kNumModesOfFp32<Rule>;
  if constexpr (kMine == 0) {
    return cudaErrorInvalidValue;  // kind_of() knows of none
  } else {
    return choose<kMine>(launching.kind - kFirstMode - kFirst, [&]<int k>() {
      return launch_kind<LowPrecisionKind<Rule, float, false, OneMode<Rule, kFirst + k>>>(
          launching);
    });
  }
}
#define MOMENTUM_EXT_LAUNCH_FP32(Rule) \
  template cudaError_t launch_fp32_mode(const Launching<Rule>& launching);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_LAUNCH_FP32)

}  // namespace momentum_ext::cuda
