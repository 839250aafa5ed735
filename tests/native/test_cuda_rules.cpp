// A rule more needs no change of a kernel: a rule of three states (test_rule.h) through the CPU's
// loops of every instruction set, against a plain loop, and through the CUDA kernels, against the
// CPU. To the bit, in every format. Built and run by tests/test_native.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "checks.h"
#include "test_rule.h"

// The instruction sets' own files once more, under other names: their loops are templates.
#if defined(__x86_64__)
#define kAvx512 kTestAvx512
#include "../../csrc/cpu/isa_avx512.cpp"
//
#define kAvx2 kTestAvx2
#include "../../csrc/cpu/isa_avx2.cpp"
#endif
#if defined(__aarch64__)
#define kNeon kTestNeon
#include "../../csrc/cpu/isa_neon.cpp"
#else
#define kBaseline kTestBaseline
#include "../../csrc/cpu/isa_baseline.cpp"
#endif
//
#include "../../csrc/cuda/low_precision.cu"
#include "../../csrc/cuda/modes_bf16.cu"
#include "../../csrc/cuda/modes_fp32.cu"
#include "../../csrc/cuda/step.cu"

using namespace momentum_ext;

namespace {

using Step = cpu::RunFn<TestRule>;
using Groups = std::vector<Hyperparams<TestRule>>;

// None where the target cannot have this instruction set.
std::vector<Step> steps_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return {cpu::avx512::run_step<TestRule>};
  if (isa == "avx2") return {cpu::avx2::run_step<TestRule>};
#endif
#if defined(__aarch64__)
  if (isa == "neon") return {cpu::neon::run_step<TestRule>};
#else
  if (isa == "baseline") return {cpu::baseline::run_step<TestRule>};
#endif
  return {};
}

constexpr int kOperands = kState + TestRule::kMaxStates;

// ---- tensors ------------------------------------------------------------------------------------

struct Mix {
  Dtype param, grad;
  Dtype state[3];
  Master master = Master::kNone;

  Dtype dtype(int operand) const {
    return operand == kParam ? param : operand == kGrad ? grad : state[operand - kState];
  }
  bool is_plain() const {
    bool plain = master == Master::kNone;
    for (const Dtype each : state) plain = plain && !has_blocks(each);
    return plain;
  }
};

// A tensor with all that belongs to it. A copy is another tensor with the same values.
struct Tensor {
  Mix mix;
  int64_t numel = 0;
  uint32_t group = 0;
  bool is_first_step = false;
  bool has_average = false;
  std::vector<StridedDim> dims;
  std::vector<int64_t> offsets[kOperands];  // of each element
  std::vector<char> memory[kOperands], master, average;
  std::vector<ScaleBits> scales[3];
  StridedLayout layout{};
  LowPrecision low{};

  void* at(int operand, int64_t i) {
    const int64_t offset = offsets[operand][static_cast<size_t>(i)];
    return memory[operand].data() + offset * itemsize(mix.dtype(operand));
  }

  TensorEntry entry(const Groups& groups, int16_t device, bool has_low_precision) {
    TensorEntry made{};
    layout = {dims.data(), static_cast<int>(dims.size())};
    made.param = memory[kParam].data();
    made.grad = memory[kGrad].data();
    for (int k = 0; k < TestRule::num_states(groups[group]); ++k) {
      made.state[k] = memory[kState + k].data();
    }
    for (int k = 0; k < 3; ++k) {
      made.state_dtype[k] = mix.state[k];
      low.scale[k] = scales[k].data();
    }
    low.master = master.data();
    low.param_index = 17 + group;
    low.master_kind = mix.master;
    made.average = has_average ? average.data() : nullptr;
    made.layout = dims.empty() ? nullptr : &layout;
    made.low_precision = has_low_precision ? &low : nullptr;
    made.numel = numel;
    made.group = group;
    made.param_dtype = mix.param;
    made.grad_dtype = mix.grad;
    made.is_first_step = is_first_step;
    made.device = device;
    return made;
  }
};

// States are squares: never negative.
void fill(Tensor& tensor, int operand, int64_t size) {
  const Dtype dtype = tensor.mix.dtype(operand);
  std::vector<char>& memory = tensor.memory[operand];
  memory.resize(static_cast<size_t>(size * itemsize(dtype)));
  for (int64_t i = 0; i < size; ++i) {
    char* const to = memory.data() + i * itemsize(dtype);
    const double value = operand < kState ? normal() : normal() * normal() / 8;
    if (has_blocks(dtype)) {
      *to = static_cast<char>(generator() % 100);
    } else {
      put(dtype, to, operand > kState ? std::fabs(value) : value);
    }
  }
}

Tensor flat(const Mix& mix, int64_t numel, uint32_t group, bool first) {
  Tensor made;
  made.mix = mix;
  made.numel = numel;
  made.group = group;
  made.is_first_step = first;
  for (int o = 0; o < kOperands; ++o) {
    for (int64_t i = 0; i < numel; ++i) made.offsets[o].push_back(i);
    fill(made, o, numel);
  }
  const int64_t size = mix.master == Master::kRemainder ? 2 : 4;
  made.master.resize(static_cast<size_t>(size * numel));
  for (int64_t i = 0; i < numel; ++i) {
    if (mix.master == Master::kCopy) {
      const float value = load(read_as<Float16>(made.at(kParam, i))) * 1.0001f;
      std::memcpy(made.master.data() + 4 * i, &value, 4);
    } else if (mix.master == Master::kRemainder) {
      made.master[static_cast<size_t>(2 * i)] = static_cast<char>(generator());
    }
  }
  for (std::vector<ScaleBits>& each : made.scales) {
    for (int64_t i = 0; i < numel; i += kScaleBlock) {
      const float scale = (0.01f + float(i) / 1e6f) / 640;
      each.push_back(static_cast<ScaleBits>(detail::bits_of(scale) >> kCutOff));
    }
  }
  return made;
}

// rows x columns: each operand transposed or not, in an order of its own.
Tensor strided(const Mix& mix, int64_t rows, int64_t columns, uint32_t group, bool first) {
  Tensor made = flat(mix, rows * columns, group, first);
  made.dims = {{rows, {}}, {columns, {}}};
  for (int o = 0; o < kOperands; ++o) {
    const bool transposed = o % 2 == 1 && !has_blocks(mix.dtype(o));
    made.dims[0].strides[o] = transposed ? 1 : columns;
    made.dims[1].strides[o] = transposed ? rows : 1;
    for (int64_t i = 0; i < made.numel; ++i) {
      made.offsets[o][static_cast<size_t>(i)] =
          i / columns * made.dims[0].strides[o] + i % columns * made.dims[1].strides[o];
    }
  }
  return made;
}

// ---- the rule, written down once more -----------------------------------------------------------

template <typename T>
void plain_element(const Hyperparams<TestRule>& h, bool first, bool has_fma, double grad,
                   double& param, double* state) {
  const auto& c = coefficients<T>(h);
  const auto fma = [&](T x, T y, T z) -> T { return has_fma ? std::fma(x, y, z) : x * y + z; };
  T p = static_cast<T>(param);
  const T g = c.grad_coef * static_cast<T>(grad);
  T s[3];
  for (int k = 0; k < 3; ++k) s[k] = first ? T{0} : static_cast<T>(state[k]);
  if (h.decays) p = c.decay * p;
  s[0] = fma(c.weight1, g - s[0], s[0]);
  s[1] = fma(c.weight2 * g, g, c.beta2 * s[1]);
  if (!(s[1] <= s[2])) s[2] = s[1];
  const T largest = h.has_max ? s[2] : s[1];
  p = fma(c.step, s[0] / (std::sqrt(largest) / c.root2 + c.eps), p);
  param = p;
  for (int k = 0; k < TestRule::num_states(h); ++k) state[k] = s[k];
}

void plain_step(Tensor& tensor, const Groups& groups, bool has_fma) {
  const Hyperparams<TestRule>& h = groups[tensor.group];
  const int num_states = TestRule::num_states(h);
  bool in_double = false;
  for (int o = 0; o < kState + num_states; ++o) {
    in_double = in_double || tensor.mix.dtype(o) == Dtype::kFloat64;
  }
  for (int64_t i = 0; i < tensor.numel; ++i) {
    double p = get(tensor.mix.param, tensor.at(kParam, i));
    const double g = get(tensor.mix.grad, tensor.at(kGrad, i));
    double s[3] = {};
    for (int k = 0; k < num_states; ++k) s[k] = get(tensor.mix.state[k], tensor.at(kState + k, i));
    (in_double ? plain_element<double> : plain_element<float>)(h, tensor.is_first_step, has_fma, g,
                                                               p, s);
    put(tensor.mix.param, tensor.at(kParam, i), p);
    for (int k = 0; k < num_states; ++k) put(tensor.mix.state[k], tensor.at(kState + k, i), s[k]);
  }
}

// ---- running ------------------------------------------------------------------------------------

constexpr double kAverageWeight = 0.25;

void cpu_step(Step step, std::vector<Tensor>& list, const Groups& groups, bool low_precision) {
  std::vector<TensorEntry> entries;
  std::vector<int64_t> first_element{0};
  for (Tensor& each : list) {
    entries.push_back(each.entry(groups, kCpu, low_precision));
    first_element.push_back(first_element.back() + each.numel);
  }
  const StepTable<TestRule> table{
      {entries.data(), first_element.data(), static_cast<int64_t>(entries.size())},
      groups.data(),
      kAverageWeight,
      77};
  for (int64_t from = 0; from < first_element.back();) {  // as threads would divide it
    const int64_t to =
        std::min(first_element.back(), from + static_cast<int64_t>(generator() % 3000));
    step(table, from, to);
    from = to;
  }
}

void cuda_step(std::vector<Tensor>& list, const Groups& groups, bool low_precision) {
  std::vector<TensorEntry> entries;
  for (Tensor& each : list) entries.push_back(each.entry(groups, 0, low_precision));
  const StepTable<TestRule> table{{entries.data(), nullptr, static_cast<int64_t>(entries.size())},
                                  groups.data(),
                                  kAverageWeight,
                                  77};
  StepScalars scalars;
  scalars.rounding_step = &table.rounding_step;  // a device counts its own steps
  expect(cuda::step<TestRule>(table, 0, scalars, false, nullptr) == cudaSuccess, "launched");
}

void check_same(const std::vector<Tensor>& some, const std::vector<Tensor>& others,
                const std::string& name) {
  for (size_t t = 0; t < some.size(); ++t) {
    const Tensor& a = some[t];
    const Tensor& b = others[t];
    bool same = a.master == b.master && a.average == b.average;
    for (int o = 0; o < kOperands; ++o) same = same && a.memory[o] == b.memory[o];
    for (int k = 0; k < 3; ++k) same = same && a.scales[k] == b.scales[k];
    expect(same, name + ", tensor " + std::to_string(t) + ", group " + std::to_string(a.group) +
                     ", " + std::to_string(a.numel) + " elements");
  }
}

Groups all_groups(bool stochastic) {
  Groups all;
  for (const bool has_max : {false, true}) {
    for (const bool decays : {false, true}) {
      Hyperparams<TestRule> h;
      h.has_max = has_max;
      h.decays = decays;
      h.f64 = {decays ? -0.5 : 1.0, 0.999, 0.1, 0.95, 0.05, 0.7, 1e-6, -0.02};
      round_to_float(h);
      h.stochastic_rounding = stochastic;
      h.rounding_seed = 0x123456789abcdefull + all.size();
      all.push_back(h);
    }
  }
  return all;
}

std::vector<Tensor> all_tensors(const Mix& mix, const Groups& groups, bool has_average) {
  std::vector<Tensor> list;
  for (uint32_t group = 0; group < groups.size(); ++group) {
    for (const int64_t numel : {1, 7, 17, 255, 257, 1000, 5000}) {
      list.push_back(flat(mix, numel, group, numel % 5 == 2));
      list.back().has_average = has_average;
      list.back().average = list.back().memory[kParam];
    }
    list.push_back(strided(mix, 33, 65, group, false));
    list.push_back(strided(mix, 5, 3, group, true));
  }
  return list;
}

std::vector<Mix> all_mixes() {
  constexpr Dtype f32 = Dtype::kFloat32, f64 = Dtype::kFloat64, bf16 = Dtype::kBFloat16,
                  f16 = Dtype::kFloat16, i8 = Dtype::kInt8, f8 = Dtype::kFloat8E4M3;
  return {{f32, f32, {f32, f32, f32}},
          {f64, f64, {f64, f64, f64}},
          {bf16, bf16, {bf16, bf16, bf16}},
          {f16, f16, {f16, f16, f16}},
          {bf16, bf16, {f32, f32, f32}},
          {f32, bf16, {f32, f32, f32}},
          {f32, f16, {bf16, f32, f16}},
          {f32, f32, {f64, f32, bf16}},
          {f32, f32, {i8, f32, bf16}},
          {bf16, bf16, {i8, f8, i8}, Master::kRemainder},
          {f16, bf16, {bf16, f8, f32}, Master::kCopy}};
}

}  // namespace

int main() {
  for (const Mix& mix : all_mixes()) {
    for (const bool low_precision : {false, true}) {
      if (!low_precision && !mix.is_plain()) continue;
      const Groups groups = all_groups(/*stochastic=*/low_precision);
      const std::vector<Tensor> start = all_tensors(mix, groups, /*has_average=*/low_precision);
      std::vector<Tensor> with_fma;
      for (const std::string& isa : cpu::isas()) {
        for (const Step step : steps_of(isa)) {
          std::vector<Tensor> list = start;
          for (int i = 0; i < 2; ++i) cpu_step(step, list, groups, low_precision);
          const bool has_fma = isa != "baseline";
          if (has_fma && with_fma.empty()) with_fma = list;
          if (has_fma) check_same(list, with_fma, isa + " as the first instruction set");
          if (low_precision) continue;
          std::vector<Tensor> plain = start;
          for (int i = 0; i < 2; ++i) {
            for (Tensor& each : plain) plain_step(each, groups, has_fma);
          }
          check_same(list, plain, isa + " as a plain loop");
        }
      }
      if (with_fma.empty()) continue;
      std::vector<Tensor> list = start;
      for (int i = 0; i < 2; ++i) cuda_step(list, groups, low_precision);
      check_same(list, with_fma, "CUDA as the CPU");
    }
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
