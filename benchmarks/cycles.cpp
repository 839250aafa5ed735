// Cycles for each element of one step in each mode, on tensors that lie in the nearest cache, on one
// thread, with each instruction set of this machine. A cycle is what an addition takes that waits
// for the one before.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

#include "../csrc/cpu/backend.h"

namespace {

using namespace momentum_ext;

constexpr int64_t kElements = 2048;
constexpr int kSteps = 32;  // timed together

constexpr Dtype kFp32 = Dtype::kFloat32;
constexpr Dtype kBf16 = Dtype::kBFloat16;
constexpr Dtype kInt8 = Dtype::kInt8;
constexpr Dtype kFp8 = Dtype::kFloat8E4M3;

struct Mode {
  const char* name;
  Dtype param;
  Dtype momentum;
  Master master = Master::kNone;
  bool stochastic = false;
};

constexpr Mode kModes[] = {
    {"fp32", kFp32, kFp32},
    {"bf16", kBf16, kBf16},
    {"bf16, stochastic", kBf16, kBf16, Master::kNone, true},
    {"bf16 momentum", kFp32, kBf16},
    {"bf16 momentum, stochastic", kFp32, kBf16, Master::kNone, true},
    {"fp16 momentum", kFp32, Dtype::kFloat16},
    {"fp16 momentum, stochastic", kFp32, Dtype::kFloat16, Master::kNone, true},
    {"int8 momentum", kFp32, kInt8},
    {"int8 momentum, stochastic", kFp32, kInt8, Master::kNone, true},
    {"fp8 momentum", kFp32, kFp8},
    {"fp8 momentum, stochastic", kFp32, kFp8, Master::kNone, true},
    {"bf16, master of 32 bits", kBf16, kBf16, Master::kRemainder},
    {"bf16, master of 24 bits", kBf16, kBf16, Master::kByteRemainder},
    {"bf16, master of 24 bits, stochastic", kBf16, kBf16, Master::kByteRemainder, true},
    {"master of 24 bits, int8 momentum", kBf16, kInt8, Master::kByteRemainder},
    {"the same, stochastic", kBf16, kInt8, Master::kByteRemainder, true},
};

class Step {
 public:
  explicit Step(const Mode& mode) {
    fill(mode.param, param_, 1);
    fill(mode.param, grad_, 1e-2f);
    entry_.param = param_;
    entry_.grad = grad_;
    entry_.state[0] = momentum_;
    entry_.numel = kElements;
    entry_.param_dtype = entry_.grad_dtype = mode.param;
    entry_.state_dtype[0] = mode.momentum;
    low_.master = master_;
    low_.master_kind = mode.master;
    low_.scale[0] = scales_;
    const bool is_plain = mode.master == Master::kNone && !has_blocks(mode.momentum);
    if (!is_plain || mode.stochastic) entry_.low_precision = &low_;
    hyperparams_.f64 = {.grad_coef = 1,
                        .weight_decay = 1e-4,
                        .momentum = 0.9,
                        .alpha = 1,
                        .first_alpha = 1,
                        .nesterov_alpha = 1,
                        .step = 1e-3};
    round_to_float(hyperparams_);
    hyperparams_.has_momentum = true;
    hyperparams_.weight_decay = WeightDecay::kL2;
    hyperparams_.stochastic_rounding = hyperparams_.rounds_masters = mode.stochastic;
    table_.entries = &entry_;
    table_.first_element = first_element_;
    table_.num_entries = 1;
    table_.groups = &hyperparams_;
  }

  void run() {
    ++table_.rounding_step;
    cpu::step(table_, 1);
  }

 private:
  static void fill(Dtype dtype, char* at, float largest) {
    uint32_t random = 1;
    for (int64_t i = 0; i < kElements; ++i) {
      random = random * 1664525u + 1013904223u;
      const float value = largest * (static_cast<float>(random >> 8) * 0x1p-23f - 1);
      if (dtype == kFp32) {
        store(reinterpret_cast<float*>(at)[i], value);
      } else {
        store(reinterpret_cast<BFloat16*>(at)[i], value);
      }
    }
  }

  alignas(64) char param_[kElements * sizeof(float)];
  alignas(64) char grad_[kElements * sizeof(float)];
  alignas(64) char momentum_[kElements * sizeof(float)] = {};
  alignas(64) char master_[kElements * sizeof(int16_t)] = {};
  ScaleBits scales_[kElements / kScaleBlock] = {};
  int64_t first_element_[2] = {0, kElements};
  LowPrecision low_{};
  TensorEntry entry_{};
  Hyperparams<Sgd> hyperparams_;
  StepTable<Sgd> table_{};
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double seconds_of_a_cycle() {
  constexpr int kAdditions = 20000;
  uint64_t sum = 0;
  const double begin = now();
  for (int i = 0; i < kAdditions; i += 10) {
#pragma GCC unroll 10
    for (int k = 0; k < 10; ++k) {
      sum += static_cast<uint64_t>(i);
      asm volatile("" : "+r"(sum));
    }
  }
  return (now() - begin) / kAdditions;
}

double seconds_of(Step& step) {
  const double begin = now();
  for (int i = 0; i < kSteps; ++i) step.run();
  return (now() - begin) / kSteps;
}

}  // namespace

// The argument: how many rounds, of which the fastest counts.
int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 60;
  const std::vector<std::string> isas = cpu::isas();
  std::vector<double> fastest(std::size(kModes) * isas.size(), 1);
  double cycle = 1;
  for (int round = 0; round < rounds; ++round) {
    double* least = fastest.data();
    for (const Mode& mode : kModes) {
      for (const std::string& isa : isas) {
        cpu::set_isa(isa);
        Step step(mode);
        seconds_of(step);
        *least = std::min(*least, seconds_of(step));
        ++least;
        cycle = std::min(cycle, seconds_of_a_cycle());
      }
    }
  }
  std::printf("%-36s", "cycles for each element");
  for (const std::string& isa : isas) std::printf("%10s", isa.c_str());
  const double* least = fastest.data();
  for (const Mode& mode : kModes) {
    std::printf("\n%-36s", mode.name);
    for (size_t k = 0; k < isas.size(); ++k) std::printf("%10.2f", *least++ / cycle / kElements);
  }
  std::printf("\n");
  return 0;
}
