// The low-precision kernel for tensors of any dtypes, flat and strided.
#include "low_precision.cuh"

namespace momentum_ext::cuda {

template <typename Rule>
cudaError_t launch_any_mode(const Launching<Rule>& launching) {
  switch (launching.kind) {
    case kLowPrecisionFlat:
      return launch_kind<LowPrecisionKind<Rule, float, false>>(launching);
    case kLowPrecisionStrided32:
      return launch_kind<LowPrecisionKind<Rule, float, true>>(launching);
    default:
      return launch_kind<LowPrecisionKind<Rule, double, true>>(launching);
  }
}
#define MOMENTUM_EXT_LAUNCH_ANY(Rule) \
  template cudaError_t launch_any_mode(const Launching<Rule>& launching);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_LAUNCH_ANY)

}  // namespace momentum_ext::cuda
