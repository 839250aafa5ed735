// Steps on CUDA devices: the part of the binding that knows devices and streams. In a build without
// CUDA kernels no tensor ever has a device, and device_none.cpp stands in for device_cuda.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "../rules/sgd.h"
#include "../table.h"

namespace momentum_ext::binding {

#if defined(MOMENTUM_EXT_WITH_CUDA)
inline constexpr bool kHasCudaKernels = true;
#else
inline constexpr bool kHasCudaKernels = false;
#endif

// The averages' weight and count of updates where the device keeps them: float64 tensors of one
// element; undefined: the host does.
struct DeviceAverage {
  at::Tensor weight;
  at::Tensor count;
  double decay = 0;
  bool warms_up = false;
};

// Numbers on a CUDA device that a step reads without waiting for them, tensors of one element;
// undefined: not given. The first two are torch.amp.GradScaler's, in float32.
struct ScalerTensors {
  at::Tensor found_inf;
  at::Tensor grad_scale;
  at::Tensor grad_factor;  // float64, in place of grad_scale: what to multiply gradients with
  DeviceAverage average;
  bool any() const {
    return found_inf.defined() || grad_scale.defined() || grad_factor.defined() ||
           average.count.defined();
  }
};

// What a step has multiplied gradients with: by the host's number and, where given, the device's.
struct GradFactors {
  double on_host = 1;
  at::Tensor grad_scale;
  at::Tensor grad_factor;
};

// What one CUDA device has to do in a step.
struct DeviceShare {
  int16_t device = kCpu;
  uint32_t newest_cohort = 0;
  const uint32_t* rounding_step = nullptr;  // in the device's memory: see RoundingSteps

  void add(const TensorEntry& entry) {
    if (entry.cohort > newest_cohort) newest_cohort = entry.cohort;
  }
};

inline DeviceShare& share_of(std::vector<DeviceShare>& shares, int16_t device) {
  for (DeviceShare& share : shares) {
    if (share.device == device) return share;
  }
  shares.push_back({device});
  return shares.back();
}

// Which tensors began under a GradScaler, so that only their device knows whether their first step
// was left out (see StepScalars). The host looks at the pinned copy of the device's
// answer now and then, without waiting; once a cohort is known to be settled it costs nothing more.
class FirstSteps {
 public:
  // The number for tensors that begin in this step on this device.
  uint32_t new_cohort(int16_t device);
  void begin_step() { has_new_cohort_ = false; }

  // Remembers a buffer that was launched for the first time.
  void add(const at::Tensor& buffer, uint32_t cohort, int16_t device);

  // The cohort of a buffer; 0 when it is not known to be open.
  uint32_t cohort_of(const at::Tensor& buffer) const;

  // `cohort`, or 0 when the host has learned that it is settled.
  uint32_t still_open(uint32_t cohort, int16_t device) {
    return cohort == 0 ? 0 : still_open_slow(cohort, device);
  }

  // Before a step that may settle a cohort without all of the tensors that are still open: those
  // that are absent get cohorts of their own, unless they are settled already, which is worth
  // waiting for the devices: it takes an overflow of a first step and a gradient that is missing in
  // the next. Returns the new number of each old one.
  std::unordered_map<uint32_t, uint32_t> separate(
      const std::unordered_set<const c10::TensorImpl*>& present);

  // The buffers that have yet to be updated. Waits for the devices.
  std::vector<at::Tensor> unstarted();

  // For the launch.
  uint32_t* settled(int16_t device);
  uint32_t* settled_on_host(int16_t device);

 private:
  struct Record {
    c10::weak_intrusive_ptr<c10::TensorImpl> buffer;
    uint32_t cohort;
    int16_t device;
  };
  struct Words {
    at::Tensor on_device;
    std::shared_ptr<void> on_host;  // pinned
  };
  uint32_t still_open_slow(uint32_t cohort, int16_t device);

  [[maybe_unused]] uint32_t newest_ = 0;  // not in a build without CUDA
  bool has_new_cohort_ = false;
  // The keys stay unique: a weak reference keeps its address taken.
  std::unordered_map<const c10::TensorImpl*, Record> records_;
  std::unordered_map<int16_t, Words> words_;
};

// How many steps have trained, which random numbers depend on, in the memory of each device whose
// kernels round at random: a captured graph counts its replays. The host counts its own steps, and
// knows of no replay.
class RoundingSteps {
 public:
  // Where the device counts; if it `starts`, from this count on. nullptr: it does not. Raises where it
  // would start while a graph is captured.
  const uint32_t* on(int16_t device, bool starts, uint32_t count);

  // After the last launch of a step, on each device.
  void add_one();

  // The largest; std::nullopt: no device counts. Waits for the devices.
  std::optional<uint32_t> read() const;

 private:
  std::unordered_map<int16_t, at::Tensor> counts_;
};

// True while the device's current stream is being captured into a graph.
bool is_capturing(int16_t device);

// Launches the share's update on its device's current stream. Throws std::runtime_error.
template <typename Rule>
void launch(const StepTable<Rule>& table, const DeviceShare& share, const ScalerTensors& scaler,
            FirstSteps& first_steps, bool one_by_one);

// Before the launches of a step: advances counters that are on a device, and derives numbers of them.
template <typename Rule>
void count_on_device(const NumbersOf<Rule>& numbers, const std::vector<CountedOnDevice>& tensors,
                     int16_t device, const at::Tensor& found_inf);

// Counts on a device, see cpu::count_updates(). Throws std::runtime_error.
void count_updates(const StepTable<Sgd>& table, int16_t device, const GradFactors& factors);

// Before the launches of a step: counts it and works out the averages' weight, on the device.
void count_average(const ScalerTensors& scaler);

// For show_config().
std::string cuda_build_info();

}  // namespace momentum_ext::binding
