// In place of device_cuda.cpp, in a build without CUDA kernels: nothing here is ever reached.
#if !defined(MOMENTUM_EXT_WITH_CUDA)

#include "../rules/rules.h"
#include "device.h"
#include "device_norm.h"

namespace momentum_ext::binding {

uint32_t FirstSteps::new_cohort(int16_t) { return 0; }
void FirstSteps::add(const at::Tensor&, uint32_t, int16_t) {}
uint32_t FirstSteps::cohort_of(const at::Tensor&) const { return 0; }
uint32_t FirstSteps::still_open_slow(uint32_t, int16_t) { return 0; }
std::unordered_map<uint32_t, uint32_t> FirstSteps::separate(
    const std::unordered_set<const c10::TensorImpl*>&) {
  return {};
}
std::vector<at::Tensor> FirstSteps::unstarted() { return {}; }
uint32_t* FirstSteps::settled(int16_t) { return nullptr; }
uint32_t* FirstSteps::settled_on_host(int16_t) { return nullptr; }
const uint32_t* RoundingSteps::on(int16_t, bool, uint32_t) { return nullptr; }
void RoundingSteps::add_one() {}
std::optional<uint32_t> RoundingSteps::read() const { return std::nullopt; }
bool is_capturing(int16_t) { return false; }
void count_average(const ScalerTensors&) {}
void count_updates(const StepTable<Sgd>&, int16_t, const GradFactors&) {}
DeviceNorm::Result DeviceNorm::conclude(int16_t, const TensorTable*, Norm, const Factors&,
                                        std::optional<double>, at::ScalarType) {
  return {};
}
template <typename Rule>
void launch(const StepTable<Rule>&, const DeviceShare&, const ScalerTensors&, FirstSteps&, bool) {}
#define MOMENTUM_EXT_INSTANTIATE(Rule)                                                   \
  template void launch(const StepTable<Rule>&, const DeviceShare&, const ScalerTensors&, \
                       FirstSteps&, bool);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_INSTANTIATE)
template <typename Rule>
void count_on_device(const NumbersOf<Rule>&, const std::vector<CountedOnDevice>&, int16_t,
                     const at::Tensor&) {}
#define MOMENTUM_EXT_COUNT(Rule)                                                                   \
  template void count_on_device<Rule>(const NumbersOf<Rule>&, const std::vector<CountedOnDevice>&, \
                                      int16_t, const at::Tensor&);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_COUNT)
std::string cuda_build_info() { return "none"; }

}  // namespace momentum_ext::binding

#endif
