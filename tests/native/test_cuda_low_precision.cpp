// The CUDA kernel of low-precision state without a GPU: csrc/cuda/low_precision.cuh as it stands,
// compiled as C++ with cuda_on_host/cuda_runtime.h in place of CUDA's header, against the CPU
// backend, bit for bit. Built and run by tests/test_native.py under sanitizers. Exits 0 when
// everything holds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cpu/backend.h"
#include "../../csrc/cuda/low_precision.cu"
#include "../../csrc/cuda/modes_bf16.cu"
#include "../../csrc/cuda/modes_fp32.cu"
#include "../../csrc/cuda/step.cu"
#include "checks.h"

using namespace momentum_ext;

namespace {

// ---- a tensor and its twin ----------------------------------------------------------------------

// Memory to the byte, its first element `offset` elements behind a boundary of 16 bytes.
struct Array {
  int64_t itemsize = 1;
  int64_t offset = 0;
  std::vector<char> twin;  // what the CPU works on
  std::unique_ptr<char, void (*)(void*)> block{nullptr, std::free};

  Array() = default;
  Array(int64_t itemsize_, int64_t size, int64_t offset_)
      : itemsize(itemsize_), offset(offset_), twin(static_cast<size_t>(itemsize * size)) {
    block.reset(
        static_cast<char*>(std::malloc(static_cast<size_t>(offset * itemsize) + twin.size())));
  }
  int64_t size() const { return static_cast<int64_t>(twin.size()) / itemsize; }
  char* data() const { return block.get() + offset * itemsize; }
  void* on(bool cpu) { return twin.empty() ? nullptr : cpu ? twin.data() : data(); }
  void upload() {
    if (!twin.empty()) std::memcpy(data(), twin.data(), twin.size());
  }
  template <typename T>
  T& at(int64_t i) {
    return reinterpret_cast<T*>(twin.data())[i];
  }
};

bool is_nan(Dtype dtype, const char* from) {
  uint16_t half;
  float single;
  double wide;
  std::memcpy(&half, from, 2);
  switch (dtype) {
    case Dtype::kBFloat16:
      return (half & 0x7fffu) > 0x7f80u;
    case Dtype::kFloat16:
      return (half & 0x7fffu) > 0x7c00u;
    case Dtype::kFloat32:
      std::memcpy(&single, from, 4);
      return single != single;
    case Dtype::kFloat64:
      std::memcpy(&wide, from, 8);
      return wide != wide;
    default:
      return false;
  }
}

// The same bits, but for which NaN it is.
bool same(const Array& array, Dtype dtype) {
  if (array.twin.empty() || std::memcmp(array.data(), array.twin.data(), array.twin.size()) == 0) {
    return true;
  }
  for (int64_t i = 0; i < array.size(); ++i) {
    const char* const one = array.data() + i * array.itemsize;
    const char* const other = array.twin.data() + i * array.itemsize;
    if (std::memcmp(one, other, static_cast<size_t>(array.itemsize)) == 0) continue;
    if (has_blocks(dtype) || !is_nan(dtype, one) || !is_nan(dtype, other)) return false;
  }
  return true;
}

void put(Array& array, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::kInt8) {
    array.at<int8_t>(i) = static_cast<int8_t>(std::fmax(-127, std::fmin(127, 40 * value)));
  } else if (dtype == Dtype::kUInt8Root) {
    array.at<uint8_t>(i) = static_cast<uint8_t>(generator());
  } else if (dtype == Dtype::kFloat8E4M3) {
    store(array.at<Float8E4M3>(i), 20 * static_cast<float>(value));
  } else {
    put(dtype, array.twin.data() + i * array.itemsize, value);
  }
}

// Two codes in a byte; behind an odd number of them there is a zero.
Array filled_with_int4(int64_t size, int64_t offset) {
  Array array(1, num_bytes(Dtype::kInt4, size), offset);
  const auto code = [] { return static_cast<int>(generator() % 15) - 7; };
  for (int64_t i = 0; i < array.size(); ++i) {
    const int second = 2 * i + 1 < size ? code() : 0;
    array.at<uint8_t>(i) = static_cast<uint8_t>((code() & 15) | (second & 15) << 4);
  }
  return array;
}

Array filled(Dtype dtype, int64_t size, int64_t offset) {
  if (dtype == Dtype::kInt4) return filled_with_int4(size, offset);
  Array array(itemsize(dtype), size, offset);
  for (int64_t i = 0; i < size; ++i) put(array, dtype, i, normal());
  return array;
}

struct Mix {
  Dtype param;
  Master master;
  Dtype grad;
  Dtype buffer;
};

// Of a whole tensor, and of shards whose rows begin at blocks of random bits or not.
PlaceInWhole any_place() {
  constexpr PlaceInWhole kPlaces[] = {{},           {4096, 0, 0},      {13, 0, 0}, {64, 32, 96},
                                      {3, 40, 101}, {1ll << 36, 1, 9}, {5, 8, 8}};
  return kPlaces[generator() % std::size(kPlaces)];
}

struct Tensors {
  Mix mix;
  int64_t numel;
  uint32_t group;
  bool is_first_step = false;
  uint32_t cohort = 0;
  Array param{}, grad{}, buffer{}, master{}, scale{}, average{};
  PlaceInWhole place = any_place();
  std::vector<StridedDim> dims{};
  StridedLayout layout{};
  LowPrecision low[2]{};

  void make_master(int64_t offset) {
    if (mix.master == Master::kRemainder) {
      master = Array(2, numel, offset);
      for (int64_t i = 0; i < numel; ++i) master.at<int16_t>(i) = static_cast<int16_t>(generator());
    } else if (mix.master == Master::kByteRemainder) {
      master = Array(1, numel, offset);
      for (int64_t i = 0; i < numel; ++i) master.at<int8_t>(i) = static_cast<int8_t>(generator());
    } else if (mix.master == Master::kCopy) {
      master = filled(Dtype::kFloat32, numel, offset);
      // Some have been written by someone else; where the parameter is strided, most.
      for (int64_t i = 0; i < numel; ++i) {
        if (i % 5 != 0) store(param.at<Float16>(i), master.at<float>(i));
      }
    }
  }
  void make_scale() {
    if (!has_blocks(mix.buffer)) return;
    scale = Array(sizeof(ScaleBits), (numel + kScaleBlock - 1) / kScaleBlock, 0);
    for (int64_t i = 0; i < scale.size(); ++i) {
      const auto value = static_cast<float>(std::exp(normal()) / 50);
      scale.at<ScaleBits>(i) = static_cast<ScaleBits>(detail::bits_of(value) >> kCutOff);
    }
  }
  void upload() {
    for (Array* each : {&param, &grad, &buffer, &master, &scale, &average}) each->upload();
  }

  TensorEntry entry(const std::vector<Hyperparams<Sgd>>& groups, bool cpu) {
    LowPrecision& mine = low[cpu ? 0 : 1];
    mine = {master.on(cpu),
            {static_cast<ScaleBits*>(scale.on(cpu))},
            place,
            1000 + 7 * group,
            mix.master};
    layout = {dims.data(), static_cast<int>(dims.size())};
    TensorEntry made{};
    made.param = param.on(cpu);
    made.grad = grad.on(cpu);
    if (groups[group].has_momentum) made.state[0] = buffer.on(cpu);
    made.average = average.on(cpu);
    made.layout = dims.empty() ? nullptr : &layout;
    made.low_precision = &mine;
    made.numel = numel;
    made.group = group;
    made.param_dtype = mix.param;
    made.grad_dtype = mix.grad;
    made.state_dtype[0] = mix.buffer;
    made.is_first_step = is_first_step;
    made.device = cpu ? kCpu : int16_t{0};
    made.cohort = cpu ? 0 : cohort;
    return made;
  }
};

Tensors flat(const Mix& mix, int64_t numel, uint32_t group, bool first,
             const int64_t (&offsets)[4] = {0, 0, 0, 0}) {
  Tensors made{mix, numel, group, first};
  made.param = filled(mix.param, numel, offsets[0]);
  made.grad = filled(mix.grad, numel, offsets[1]);
  made.buffer = filled(mix.buffer, numel, offsets[2]);
  made.make_master(offsets[3]);
  made.make_scale();
  made.upload();
  return made;
}

// rows x columns: the parameter a slice with gaps, the gradient transposed, a buffer of 16 bits or
// more transposed too.
Tensors strided(const Mix& mix, int64_t rows, int64_t columns, uint32_t group, bool first) {
  Tensors made{mix, rows * columns, group, first};
  made.param = filled(mix.param, rows * 3 * columns, 1);
  made.grad = filled(mix.grad, rows * columns, 0);
  made.buffer = filled(mix.buffer, rows * columns, 0);
  made.make_master(0);
  made.make_scale();
  made.dims = {{rows, {3 * columns, 1, 1}}, {columns, {3, rows, rows}}};
  made.upload();
  return made;
}

// ---- both backends ------------------------------------------------------------------------------

constexpr uint32_t kStep = 77;

void cpu_step(std::vector<Tensors>& list, const std::vector<Hyperparams<Sgd>>& groups,
              double average_weight = 0, uint32_t step = kStep) {
  std::vector<TensorEntry> entries;
  std::vector<int64_t> first_element{0};
  for (Tensors& each : list) {
    entries.push_back(each.entry(groups, true));
    first_element.push_back(first_element.back() + each.numel);
  }
  cpu::step<Sgd>({{entries.data(), first_element.data(), static_cast<int64_t>(entries.size())},
                  groups.data(),
                  average_weight,
                  step},
                 1);
}

void cuda_step(std::vector<Tensors>& list, const std::vector<Hyperparams<Sgd>>& groups,
               double average_weight = 0, StepScalars scalars = {}, bool one_by_one = false,
               uint32_t step = kStep) {
  std::vector<TensorEntry> entries;
  scalars.rounding_step = &step;  // a device counts its own steps
  for (Tensors& each : list) entries.push_back(each.entry(groups, false));
  emulated::launches.clear();
  const cudaError_t error =
      cuda::step<Sgd>({{entries.data(), nullptr, static_cast<int64_t>(entries.size())},
                       groups.data(),
                       average_weight,
                       step},
                      0, scalars, one_by_one, nullptr);
  expect(error == cudaSuccess, "launched");
}

void check_same(const std::vector<Tensors>& list, const std::string& name) {
  for (const Tensors& each : list) {
    const bool holds =
        same(each.param, each.mix.param) && same(each.grad, each.mix.grad) &&
        same(each.buffer, each.mix.buffer) && same(each.average, each.mix.param) &&
        same(each.scale, Dtype::kInt8) &&
        same(each.master, each.mix.master == Master::kCopy ? Dtype::kFloat32 : Dtype::kInt8);
    expect(holds, name + ": dtypes " + std::to_string(static_cast<int>(each.mix.param)) + " " +
                      std::to_string(static_cast<int>(each.mix.grad)) + " " +
                      std::to_string(static_cast<int>(each.mix.buffer)) + ", master " +
                      std::to_string(static_cast<int>(each.mix.master)) + ", group " +
                      std::to_string(each.group) + ", " + std::to_string(each.numel) + " elements");
  }
}

// The second half of the groups rounds at random.
std::vector<Hyperparams<Sgd>> all_groups() {
  std::vector<Hyperparams<Sgd>> all;
  for (const bool at_random : {false, true}) {
    for (const WeightDecay decay :
         {WeightDecay::kNone, WeightDecay::kL2, WeightDecay::kDecoupled}) {
      for (int kind = 0; kind < 3; ++kind) {
        Hyperparams<Sgd> h;
        h.weight_decay = decay;
        h.has_momentum = kind != 0;
        h.nesterov = kind == 2;
        const double number = decay == WeightDecay::kL2 ? 0.01 : 0.999;
        h.f64 = {kind == 1 ? 0.25 : -1.0, number, 0.9, 0.7, 1.0, 1.0, 0.1};
        round_to_float(h);
        h.stochastic_rounding = at_random;
        h.rounds_masters = at_random || kind == 1;
        h.rounding_seed = 0x123456789abcdef0ull + all.size();
        all.push_back(h);
      }
    }
  }
  return all;
}

std::vector<Mix> all_mixes() {
  struct Param {
    Dtype dtype;
    Master master;
  };
  std::vector<Mix> all;
  for (const Param& param : {Param{Dtype::kFloat32, Master::kNone},
                             {Dtype::kBFloat16, Master::kNone},
                             {Dtype::kBFloat16, Master::kRemainder},
                             {Dtype::kBFloat16, Master::kByteRemainder},
                             {Dtype::kFloat16, Master::kNone},
                             {Dtype::kFloat16, Master::kCopy},
                             {Dtype::kFloat64, Master::kNone}}) {
    for (const Dtype grad : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64}) {
      for (const Dtype buffer :
           {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kInt8, Dtype::kFloat8E4M3,
            Dtype::kInt4, Dtype::kUInt8Root, Dtype::kFloat64}) {
        all.push_back({param.dtype, param.master, grad, buffer});
      }
    }
  }
  return all;
}

// ---- the tests ----------------------------------------------------------------------------------

// Sizes around every vector, block and chunk edge, two steps each.
void test_sizes(const std::vector<Hyperparams<Sgd>>& groups, const Mix& mix, uint32_t first_group) {
  std::vector<Tensors> list;
  for (const int64_t numel :
       {1, 7, 8, 9, 31, 32, 33, 63, 255, 256, 257, 511, 512, 513, 2047, 4095, 4096, 4097}) {
    const auto group = first_group + static_cast<uint32_t>(generator() % 9);
    list.push_back(flat(mix, numel, group, generator() % 3 == 0));
  }
  for (const uint32_t step : {0u, 4000000000u}) {
    cuda_step(list, groups, 0, {}, false, step);
    cpu_step(list, groups, 0, step);
    check_same(list, "sizes");
    for (Tensors& each : list) each.is_first_step = false;
  }
  // A buffer in fp64 has no part in a group without momentum.
  const bool one_kind =
      mix.buffer != Dtype::kFloat64 || mix.param == Dtype::kFloat64 || mix.grad == Dtype::kFloat64;
  std::set<int> kinds;
  for (Tensors& each : list) {
    kinds.insert(cuda::kind_of(each.entry(groups, false), groups[each.group]));
  }
  if (one_kind) expect(emulated::launches.size() == kinds.size(), "a launch for each mode");
}

// Every group; pointers that are unaligned in all ways; tensors that lie in different orders.
void test_layouts(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Mix& mix : all_mixes()) {
    std::vector<Tensors> list;
    for (uint32_t group = 0; group < groups.size(); ++group) {
      for (const int64_t numel : {9, 300, 520}) {
        const auto any = [] { return static_cast<int64_t>(generator() % 8); };
        list.push_back(flat(mix, numel, group, numel == 9, {any(), any(), any(), any()}));
      }
      list.push_back(strided(mix, 5, 67, group, false));
      list.push_back(strided(mix, 1, 3, group, true));
    }
    list.push_back(strided(mix, 70, 61, 13, false));
    // Rows of whole tiles: the CPU takes them out of order.
    list.push_back(strided(mix, 37, 256, 13, false));
    list.push_back(strided(mix, 5, 512, 13, true));
    cuda_step(list, groups);
    cpu_step(list, groups);
    check_same(list, "layouts");
  }
}

// Blocks that are zero, tiny, or have an Inf or a NaN; and steps after them.
void test_special_values(const std::vector<Hyperparams<Sgd>>& groups) {
  const double specials[] = {0.0,   std::numeric_limits<double>::infinity(),
                             NAN,   -std::numeric_limits<double>::infinity(),
                             1e-38, 1e-42,
                             3e38,  6e-8,
                             70000};
  for (const Mix& mix : all_mixes()) {
    std::vector<Tensors> list;
    for (const uint32_t group : {1u, 5u, 10u, 14u}) {
      list.push_back(flat(mix, 256 * 10 + 3, group, true));
      Tensors& each = list.back();
      for (int64_t block = 0; block < 9; ++block) {
        if (block % 4 == 0) {
          for (int64_t i = 0; i < 256; ++i) put(each.grad, mix.grad, 256 * block + i, 0);
        }
        put(each.grad, mix.grad, 256 * block + 31 * block, specials[block]);
        put(each.param, mix.param, 256 * block + 100, specials[8 - block]);
      }
      each.upload();
    }
    for (int step = 0; step < 3; ++step) {
      cuda_step(list, groups);
      cpu_step(list, groups);
      check_same(list, "special values");
      for (Tensors& each : list) each.is_first_step = false;
    }
  }
}

void test_averages(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Mix& mix : all_mixes()) {
    for (const double weight : {1.0, 0.25}) {
      std::vector<Tensors> list;
      for (const uint32_t group : {1u, 5u, 10u, 14u}) {
        for (const int64_t numel : {7, 600, 5001}) {
          list.push_back(flat(mix, numel, group, false));
          list.back().average = filled(mix.param, numel, numel == 600 ? 1 : 0);
          list.back().average.upload();
        }
        list.push_back(flat(mix, 77, group, false));
      }
      StepScalars scalars;
      cuda_step(list, groups, weight, scalars);
      cpu_step(list, groups, weight);
      check_same(list, "averages");
      scalars.average_weight = &weight;
      cuda_step(list, groups, 99, scalars);
      cpu_step(list, groups, weight);
      check_same(list, "averages, weight on the device");
    }
    // A strided tensor's average lies as its parameter does.
    std::vector<Tensors> list;
    list.push_back(strided(mix, 5, 67, 4, false));
    Tensors& each = list.back();
    each.average = filled(mix.param, each.param.size(), 0);
    each.average.upload();
    cuda_step(list, groups, 1);
    for (int64_t i = 0; i < each.param.size(); i += 3) {
      const auto at = static_cast<size_t>(i * each.param.itemsize);
      const bool inside = i % (3 * 67) / 3 < 67;
      if (inside)
        std::memcpy(each.average.twin.data() + at, each.param.data() + at,
                    static_cast<size_t>(each.param.itemsize));
    }
    expect(same(each.average, mix.param), "the average of a strided tensor");
  }
}

// An overflow leaves everything; the device knows which step is the first; numbers in its memory.
void test_device_values(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Mix& mix : all_mixes()) {
    std::vector<Tensors> list;
    for (const uint32_t group : {2u, 4u, 10u, 14u}) {
      list.push_back(flat(mix, 700, group, false));
      list.back().cohort = 1;
      list.push_back(strided(mix, 9, 31, group, false));
      list.back().cohort = 1;
      list.push_back(flat(mix, 33, group, false));
      for (const size_t back : {1u, 3u}) {
        Tensors& each = list[list.size() - back];
        if (!each.dims.empty() || back == 1) continue;
        each.average = filled(mix.param, each.numel, 0);
        each.average.upload();
      }
    }
    float found_inf = 1;
    const float grad_scale = 1024;
    const float lr = 0.5f;
    uint32_t settled = 0, settled_on_host = 0;
    StepScalars scalars = {&found_inf, &grad_scale, &settled, &settled_on_host, 1};
    std::vector<Hyperparams<Sgd>> on_device = groups;
    std::vector<Hyperparams<Sgd>> on_host = groups;
    for (size_t g = 0; g < groups.size(); ++g) {
      on_device[g].on_device.lr = {&lr, Dtype::kFloat32};
      on_host[g].f64.step = lr;
      on_host[g].f64.grad_coef /= 1024;
      if (groups[g].weight_decay == WeightDecay::kL2) continue;
      on_device[g].weight_decay = on_host[g].weight_decay = WeightDecay::kNone;
    }
    for (Hyperparams<Sgd>& each : on_host) round_to_float(each);
    cuda_step(list, on_device, 0.5, scalars);
    check_same(list, "an overflow changes nothing");
    found_inf = 0;
    cuda_step(list, on_device, 0.5, scalars);
    for (Tensors& each : list) each.is_first_step = each.cohort != 0;
    cpu_step(list, on_host, 0.5);
    check_same(list, "the first step after an overflow");
    for (Tensors& each : list) each.is_first_step = false;
    cuda_step(list, on_device, 0.5, scalars);
    cpu_step(list, on_host, 0.5);
    check_same(list, "the step after it");
  }
}

// 408 tensors of one group take one launch; one by one, each takes its own, with the same numbers.
void test_long_lists(const std::vector<Hyperparams<Sgd>>& groups) {
  constexpr int64_t kMost = 408;
  const Mix mix = {Dtype::kBFloat16, Master::kNone, Dtype::kBFloat16, Dtype::kInt8};
  for (const int64_t count : {kMost, kMost + 1}) {
    std::vector<Tensors> list;
    for (int64_t k = 0; k < count; ++k) list.push_back(flat(mix, 1 + k % 9, 10, false));
    cuda_step(list, groups);
    expect(emulated::launches.size() == static_cast<size_t>(count - kMost + 1), "launches of many");
    cpu_step(list, groups);
    check_same(list, "many tensors");
  }
  std::vector<Tensors> list;
  for (int64_t k = 0; k < 9; ++k) {
    list.push_back(flat(mix, 300, static_cast<uint32_t>(9 + k), false));
  }
  cuda_step(list, groups, 0, {}, true);
  expect(emulated::launches.size() == list.size(), "one by one");
  cpu_step(list, groups);
  check_same(list, "one by one");
}

}  // namespace

int main() {
  if (cpu::isa() == "baseline") {
    std::printf("0 checks, 0 failures: this machine has no fma to compare with\n");
    return 0;
  }
  const std::vector<Hyperparams<Sgd>> groups = all_groups();
  for (const Mix& mix : all_mixes()) {
    for (const uint32_t first_group : {0u, 9u}) test_sizes(groups, mix, first_group);
  }
  test_layouts(groups);
  test_special_values(groups);
  test_averages(groups);
  test_device_values(groups);
  test_long_lists(groups);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
