// The binding's CUDA side: the tensors' device, its current stream, the launch, and its error.
#if defined(MOMENTUM_EXT_WITH_CUDA)

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <stdexcept>

#include "../cuda/backend.h"
#include "../rules/rules.h"
#include "device.h"
#include "device_values.h"

namespace momentum_ext::binding {
namespace {

void check(cudaError_t error, int16_t device, const std::string& doing) {
  check_cuda(error, device, "FusedMomentum.step", doing);
}

}  // namespace

// ---- first steps under a GradScaler -------------------------------------------------------------

uint32_t FirstSteps::new_cohort(int16_t device) {
  if (!has_new_cohort_) {
    has_new_cohort_ = true;
    ++newest_;
  }
  if (words_.find(device) == words_.end()) {
    const auto on_device =
        at::device(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))).dtype(at::kInt);
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    void* pinned = nullptr;
    check(cudaHostAlloc(&pinned, sizeof(uint32_t), cudaHostAllocPortable), device,
          "allocating pinned memory");
    *static_cast<uint32_t*>(pinned) = 0;
    words_[device] = {at::zeros({1}, on_device), std::shared_ptr<void>(pinned, cudaFreeHost)};
  }
  return newest_;
}

void FirstSteps::add(const at::Tensor& buffer, uint32_t cohort, int16_t device) {
  records_.insert_or_assign(
      buffer.unsafeGetTensorImpl(),
      Record{c10::weak_intrusive_ptr<c10::TensorImpl>(buffer.getIntrusivePtr()), cohort, device});
}

uint32_t FirstSteps::cohort_of(const at::Tensor& buffer) const {
  const auto found = records_.find(buffer.unsafeGetTensorImpl());
  const bool known = found != records_.end() && buffer.device().index() == found->second.device;
  return known ? found->second.cohort : 0;
}

uint32_t FirstSteps::still_open_slow(uint32_t cohort, int16_t device) {
  if (*static_cast<volatile uint32_t*>(settled_on_host(device)) < cohort) return cohort;
  for (auto each = records_.begin(); each != records_.end();) {
    const Record& record = each->second;
    const bool settled = record.device == device && record.cohort <= cohort;
    each = settled || record.buffer.expired() ? records_.erase(each) : std::next(each);
  }
  return 0;
}

std::unordered_map<uint32_t, uint32_t> FirstSteps::separate(
    const std::unordered_set<const c10::TensorImpl*>& present) {
  std::unordered_map<uint32_t, uint32_t> renumbered;
  std::unordered_map<int16_t, uint32_t> settled;
  for (auto each = records_.begin(); each != records_.end();) {
    Record& record = each->second;
    if (present.count(each->first) != 0) {
      ++each;
      continue;
    }
    if (settled.find(record.device) == settled.end()) {
      if (is_capturing(record.device)) {
        throw std::runtime_error(
            "step() is being captured into a CUDA graph while the first step of a tensor without a "
            "gradient is open, because it overflowed; run one step with all gradients first");
      }
      const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(record.device));
      check(cudaDeviceSynchronize(), record.device, "waiting for the device");
      settled[record.device] =
          static_cast<uint32_t>(words_.at(record.device).on_device.item<int>());
    }
    if (record.buffer.expired() || record.cohort <= settled[record.device]) {
      each = records_.erase(each);
      continue;
    }
    const auto [number, is_new] = renumbered.try_emplace(record.cohort, newest_ + 1);
    if (is_new) ++newest_;
    record.cohort = number->second;
    ++each;
  }
  return renumbered;
}

std::vector<at::Tensor> FirstSteps::unstarted() {
  std::vector<at::Tensor> buffers;
  for (const auto& [device, words] : words_) {
    if (records_.empty()) break;
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    check(cudaDeviceSynchronize(), device, "waiting for the device");
    const auto settled = static_cast<uint32_t>(words.on_device.item<int>());
    for (const auto& [address, record] : records_) {
      if (record.device != device || record.cohort <= settled) continue;
      if (auto buffer = record.buffer.lock()) buffers.emplace_back(std::move(buffer));
    }
  }
  return buffers;
}

uint32_t* FirstSteps::settled(int16_t device) {
  return static_cast<uint32_t*>(words_.at(device).on_device.mutable_data_ptr());
}
uint32_t* FirstSteps::settled_on_host(int16_t device) {
  return static_cast<uint32_t*>(words_.at(device).on_host.get());
}

// ---- how many steps there have been --------------------------------------------------------------

const uint32_t* RoundingSteps::on(int16_t device, bool starts, uint32_t count) {
  auto found = counts_.find(device);
  if (found == counts_.end()) {
    if (!starts) return nullptr;
    if (is_capturing(device)) {
      throw std::runtime_error(
          "step() is being captured into a CUDA graph and the count of steps that random rounding "
          "depends on is not on the device yet; run one step before the capture");
    }
    const at::Device cuda(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    const auto number = static_cast<int32_t>(read().value_or(count));  // another's has its replays
    found = counts_.emplace(device, at::full({}, number, at::device(cuda).dtype(at::kInt))).first;
  }
  return static_cast<const uint32_t*>(found->second.const_data_ptr());
}

void RoundingSteps::add_one() {
  for (const auto& [device, count] : counts_) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    check(cuda::count_step(static_cast<uint32_t*>(count.mutable_data_ptr()),
                           c10::cuda::getCurrentCUDAStream()),
          device, "counting the step");
  }
}

std::optional<uint32_t> RoundingSteps::read() const {
  std::optional<uint32_t> largest;
  for (const auto& [device, count] : counts_) {
    largest = std::max(largest.value_or(0), static_cast<uint32_t>(count.item<int32_t>()));
  }
  return largest;
}

// ---- launching ----------------------------------------------------------------------------------

bool is_capturing(int16_t device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(), &status), device,
        "asking whether a graph is being captured");
  return status != cudaStreamCaptureStatusNone;
}

template <typename Rule>
void launch(const StepTable<Rule>& table, const DeviceShare& share, const ScalerTensors& scaler,
            FirstSteps& first_steps, bool one_by_one) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(share.device));
  ScalerTensors here = scaler;
  StepScalars scalars;
  scalars.found_inf = value_on<float>(share.device, here.found_inf);
  scalars.grad_scale = value_on<float>(share.device, here.grad_scale);
  scalars.grad_factor = value_on<double>(share.device, here.grad_factor);
  scalars.average_weight = value_on<double>(share.device, here.average.weight);
  scalars.newest_cohort = share.newest_cohort;
  scalars.rounding_step = share.rounding_step;
  if (share.newest_cohort != 0) {
    scalars.settled = first_steps.settled(share.device);
    scalars.settled_on_host = first_steps.settled_on_host(share.device);
  }
  check(
      cuda::step<Rule>(table, share.device, scalars, one_by_one, c10::cuda::getCurrentCUDAStream()),
      share.device, "launching the update");
}

#define MOMENTUM_EXT_INSTANTIATE(Rule)                                                   \
  template void launch(const StepTable<Rule>&, const DeviceShare&, const ScalerTensors&, \
                       FirstSteps&, bool);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_INSTANTIATE)

template <typename Rule>
void count_on_device(const NumbersOf<Rule>& numbers, const std::vector<CountedOnDevice>& tensors,
                     int16_t device, const at::Tensor& found_inf) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  at::Tensor here = found_inf;
  check(cuda::count_on_device<Rule>(numbers, tensors.data(), static_cast<int64_t>(tensors.size()),
                                    device, value_on<float>(device, here),
                                    c10::cuda::getCurrentCUDAStream()),
        device, "counting the tensors' steps");
}

#define MOMENTUM_EXT_COUNT(Rule)                                                                   \
  template void count_on_device<Rule>(const NumbersOf<Rule>&, const std::vector<CountedOnDevice>&, \
                                      int16_t, const at::Tensor&);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_COUNT)

void count_average(const ScalerTensors& scaler) {
  const DeviceAverage& average = scaler.average;
  const auto device = static_cast<int16_t>(average.count.device().index());
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  at::Tensor found_inf = scaler.found_inf;
  check(cuda::count_average(value_on<float>(device, found_inf), average.decay, average.warms_up,
                            average.weight.mutable_data_ptr<double>(),
                            average.count.mutable_data_ptr<double>(),
                            c10::cuda::getCurrentCUDAStream()),
        device, "counting the update of the averages");
}

void count_updates(const StepTable<Sgd>& table, int16_t device, const GradFactors& factors) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  GradFactors here = factors;
  StepScalars scalars;
  scalars.grad_scale = value_on<float>(device, here.grad_scale);
  scalars.grad_factor = value_on<double>(device, here.grad_factor);
  check_cuda(cuda::count_updates(table, device, scalars, c10::cuda::getCurrentCUDAStream()), device,
             "FusedMomentum.update_report", "launching the count");
}

std::string cuda_build_info() {
  return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10);
}

}  // namespace momentum_ext::binding

#endif
