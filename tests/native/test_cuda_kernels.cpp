// The CUDA kernels without a GPU: csrc/cuda/step.cu as it stands, compiled as C++ with
// cuda_on_host/cuda_runtime.h in place of CUDA's header, against the CPU backend, bit for bit.
// Built and run by tests/test_native.py, with AddressSanitizer and UndefinedBehaviorSanitizer.
// Arrays are allocated to the byte, so that a kernel that touches one more is caught. Exits 0 when
// everything holds.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
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

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

// ---- a tensor and its twin ----------------------------------------------------------------------

// Memory to the byte, its first element `offset` elements behind a boundary of 16 bytes.
struct Array {
  Dtype dtype = Dtype::kFloat32;
  int64_t size = 0;
  int64_t offset = 0;
  std::vector<char> twin;  // what the CPU works on
  char* block = nullptr;   // what the emulated kernel works on

  Array(Dtype dtype_, int64_t size_, int64_t offset_)
      : dtype(dtype_), size(size_), offset(offset_), twin(bytes()) {
    block = static_cast<char*>(std::malloc(offset_bytes() + bytes()));
    for (int64_t i = 0; i < size; ++i) {
      put(dtype, twin.data() + i * itemsize(dtype), normal());
    }
    restore();
  }
  Array(Array&& other) noexcept
      : dtype(other.dtype), size(other.size), offset(other.offset), twin(std::move(other.twin)) {
    std::swap(block, other.block);
  }
  Array(const Array&) = delete;
  Array& operator=(Array&& other) noexcept {
    std::swap(dtype, other.dtype);
    std::swap(size, other.size);
    std::swap(offset, other.offset);
    std::swap(twin, other.twin);
    std::swap(block, other.block);
    return *this;
  }
  ~Array() { std::free(block); }

  size_t bytes() const { return static_cast<size_t>(size * itemsize(dtype)); }
  size_t offset_bytes() const { return static_cast<size_t>(offset * itemsize(dtype)); }
  char* data() const { return block + offset_bytes(); }
  void restore() {
    if (size != 0) std::memcpy(data(), twin.data(), bytes());
  }
  bool same() const { return size == 0 || std::memcmp(data(), twin.data(), bytes()) == 0; }
};

struct Tensors {
  Array param, grad, buffer;
  std::vector<StridedDim> dims;
  StridedLayout layout{};
  int64_t numel;
  uint32_t group = 0;
  bool is_first_step = false;
  uint32_t cohort = 0;
  Array average{Dtype::kFloat32, 0, 0};  // of no elements: none is kept

  void keep_average(int64_t offset) { average = Array(param.dtype, param.size, offset); }

  TensorEntry entry(const std::vector<Hyperparams<Sgd>>& groups, bool on_cpu, int16_t device) {
    layout = {dims.data(), static_cast<int>(dims.size())};
    TensorEntry made{};
    made.param = on_cpu ? param.twin.data() : param.data();
    made.grad = on_cpu ? grad.twin.data() : grad.data();
    if (groups[group].has_momentum) {
      made.state[0] = on_cpu ? buffer.twin.data() : buffer.data();
    }
    if (average.size != 0) made.average = on_cpu ? average.twin.data() : average.data();
    made.layout = dims.empty() ? nullptr : &layout;
    made.numel = numel;
    made.group = group;
    made.param_dtype = param.dtype;
    made.grad_dtype = grad.dtype;
    made.state_dtype[0] = buffer.dtype;
    made.is_first_step = is_first_step;
    made.device = on_cpu ? kCpu : device;
    made.cohort = on_cpu ? 0 : cohort;
    return made;
  }
};

Tensors flat(int64_t numel, Dtype p, Dtype g, Dtype b, const int64_t (&offsets)[3], uint32_t group,
             bool first) {
  return {Array(p, numel, offsets[0]),
          Array(g, numel, offsets[1]),
          Array(b, numel, offsets[2]),
          {},
          {},
          numel,
          group,
          first};
}

// rows x columns: the parameter a slice with gaps, the gradient transposed, the buffer contiguous.
Tensors strided(int64_t rows, int64_t columns, Dtype p, Dtype g, Dtype b, uint32_t group,
                bool first) {
  Tensors made = {Array(p, rows * 3 * columns, 1),
                  Array(g, rows * columns, 0),
                  Array(b, rows * columns, 0),
                  {},
                  {},
                  rows * columns,
                  group,
                  first};
  made.dims = {{rows, {3 * columns, 1, columns}}, {columns, {3, rows, 1}}};
  return made;
}

// The gradient's dtype may be another, and all lie in orders of their own.
Tensors permuted(const Orders& orders, Dtype p, Dtype g, uint32_t group, bool first) {
  const std::vector<StridedDim> dims = orders.dims();
  int64_t numel = 1, sizes[] = {1, 1, 1};
  for (const StridedDim& dim : dims) {
    numel *= dim.size;
    for (int t = 0; t <= kState; ++t) sizes[t] += (dim.size - 1) * dim.strides[t];
  }
  return {Array(p, sizes[kParam], 1),
          Array(g, sizes[kGrad], 0),
          Array(p, sizes[kState], 3),
          dims,
          {},
          numel,
          group,
          first};
}

// ---- both backends ------------------------------------------------------------------------------

std::vector<TensorEntry> entries_of(std::vector<Tensors>& list,
                                    const std::vector<Hyperparams<Sgd>>& groups, bool on_cpu,
                                    int16_t device) {
  std::vector<TensorEntry> entries;
  for (Tensors& each : list) entries.push_back(each.entry(groups, on_cpu, device));
  return entries;
}

void cpu_step(std::vector<Tensors>& list, const std::vector<Hyperparams<Sgd>>& groups,
              double average_weight = 0) {
  const std::vector<TensorEntry> entries = entries_of(list, groups, true, 0);
  std::vector<int64_t> first_element{0};
  for (const TensorEntry& each : entries) {
    first_element.push_back(first_element.back() + each.numel);
  }
  cpu::step<Sgd>({{entries.data(), first_element.data(), static_cast<int64_t>(entries.size())},
                  groups.data(),
                  average_weight},
                 1);
}

cudaError_t cuda_step(std::vector<Tensors>& list, const std::vector<Hyperparams<Sgd>>& groups,
                      const StepScalars& scalars = {}, int16_t device = 0, bool one_by_one = false,
                      double average_weight = 0) {
  const std::vector<TensorEntry> entries = entries_of(list, groups, false, device);
  emulated::launches.clear();
  return cuda::step<Sgd>({{entries.data(), nullptr, static_cast<int64_t>(entries.size())},
                          groups.data(),
                          average_weight},
                         device, scalars, one_by_one, nullptr);
}

void check_same(const std::vector<Tensors>& list, const std::string& name) {
  for (size_t k = 0; k < list.size(); ++k) {
    const Tensors& each = list[k];
    expect(each.param.same() && each.buffer.same() && each.grad.same() && each.average.same(),
           name + ", tensor " + std::to_string(k) + " of " + std::to_string(list.size()) +
               " with " + std::to_string(each.numel) + " elements");
  }
}

void compare(std::vector<Tensors>& list, const std::vector<Hyperparams<Sgd>>& groups,
             const std::string& name, int16_t device = 0) {
  expect(cuda_step(list, groups, {}, device) == cudaSuccess, name + ": launched");
  cpu_step(list, groups);
  check_same(list, name);
}

std::vector<Hyperparams<Sgd>> all_hyperparams() {
  std::vector<Hyperparams<Sgd>> all;
  for (const WeightDecay decay : {WeightDecay::kNone, WeightDecay::kL2, WeightDecay::kDecoupled}) {
    const double decay_number = decay == WeightDecay::kNone ? 0.0
                                : decay == WeightDecay::kL2 ? 0.01
                                                            : 1 - 0.1 * 0.01;
    for (const double momentum : {0.0, 0.9}) {
      for (const bool nesterov : {false, true}) {
        for (const double sign : {1.0, -0.0078125}) {
          if (nesterov && momentum == 0.0) continue;
          Hyperparams<Sgd> h;
          h.weight_decay = decay;
          h.has_momentum = momentum != 0.0;
          h.nesterov = nesterov;
          h.f64 = {sign, decay_number, momentum, 0.7, 1.0, 1.0, 0.1};
          round_to_float(h);
          all.push_back(h);
        }
      }
    }
  }
  return all;
}

// ---- the tests ----------------------------------------------------------------------------------

// Sizes around every vector and chunk edge, every dtype and formula, in one list.
void test_sizes(const std::vector<Hyperparams<Sgd>>& groups) {
  const int64_t none[] = {0, 0, 0};
  for (const Dtype dtype : kDtypes) {
    const int64_t chunk = dtype == Dtype::kFloat64 ? 2048 : dtype == Dtype::kFloat32 ? 4096 : 8192;
    std::vector<Tensors> list;
    for (uint32_t group = 0; group < groups.size(); ++group) {
      for (const int64_t numel : {0,  1,  2,  3,  7,  8,   9,   15,  16,   17,   31,
                                  32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025}) {
        list.push_back(flat(numel, dtype, dtype, dtype, none, group, numel % 2 == 1));
      }
    }
    for (const int64_t numel : {chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 1}) {
      list.push_back(flat(numel, dtype, dtype, dtype, none, 9, false));
    }
    compare(list, groups, "sizes");
    expect(emulated::launches.size() == 1, "one launch for all sizes and groups");
  }
}

// Pointers that are unaligned alike, and pointers that are not.
void test_alignment(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Dtype dtype : kDtypes) {
    std::vector<Tensors> list;
    for (int64_t p = 0; p < 8; ++p) {
      for (int64_t g = 0; g < 8; ++g) {
        for (const int64_t numel : {1, 3, 7, 8, 9, 63, 700}) {
          const int64_t offsets[] = {p, g, p};
          const int64_t others[] = {p, p, g};
          list.push_back(flat(numel, dtype, dtype, dtype, offsets, 7, false));
          list.push_back(flat(numel, dtype, dtype, dtype, others, 9, numel % 2 == 0));
        }
      }
    }
    compare(list, groups, "alignment");
  }
}

// Every mix of dtypes, flat and strided, aligned or not, with and without momentum.
void test_mixes(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Dtype p : kDtypes) {
    for (const Dtype g : kDtypes) {
      for (const Dtype b : kDtypes) {
        std::vector<Tensors> list;
        for (uint32_t group = 0; group < groups.size(); ++group) {
          const int64_t none[] = {0, 0, 0};
          const int64_t alike[] = {1, 1, 1};
          const int64_t unlike[] = {1, 2, 3};
          list.push_back(flat(1000, p, g, b, none, group, false));
          list.push_back(flat(300, p, g, b, alike, group, true));
          list.push_back(flat(70, p, g, b, unlike, group, false));
          list.push_back(strided(5, 67, p, g, b, group, false));
          list.push_back(strided(300, 5, p, g, b, group, true));
          list.push_back(strided(1, 3, p, g, b, group, false));
        }
        compare(list, groups, "mix of dtypes");
      }
    }
  }
}

// Every layout, and tensors of several blocks of threads.
void test_layouts(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Dtype dtype : kDtypes) {
    for (const Dtype other : {dtype, Dtype::kBFloat16}) {
      std::vector<Tensors> list;
      uint32_t k = 0;
      std::vector<Orders> all = all_orders();
      all.push_back({{100, 70, 30}, {1, 0, 2}, {2, 1, 0}});
      all.push_back({{300, 301}, {1, 0}, {0, 1}});
      for (const Orders& orders : all) {
        const auto group = static_cast<uint32_t>(++k % groups.size());
        list.push_back(permuted(orders, dtype, other, group, k % 7 == 0));
      }
      compare(list, groups, "layouts");
    }
  }
}

// As many dimensions as the kernel takes.
void test_many_dims(const std::vector<Hyperparams<Sgd>>& groups) {
  std::vector<Tensors> list;
  Tensors deep = flat(6561, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, {0, 0, 0}, 9, false);
  for (int64_t d = 0, stride = 2187, other = 1; d < 8; ++d, stride /= 3, other *= 3) {
    deep.dims.push_back({3, {stride, other, stride}});
  }
  list.push_back(std::move(deep));
  compare(list, groups, "eight dimensions");
}

// One launch up to the capacity, then as few as possible; by the 4 KB form where it must be.
void test_long_lists(const std::vector<Hyperparams<Sgd>>& groups) {
  const auto list_of = [&](int64_t count, Dtype dtype) {
    std::vector<Tensors> list;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t offset = k % 3;
      list.push_back(
          flat(1 + k * 37 % 90, dtype, dtype, dtype, {offset, offset, offset}, 9, k % 5 == 0));
      if (k % 7 == 0) list.push_back(flat(0, dtype, dtype, dtype, {0, 0, 0}, 0, false));
    }
    return list;
  };
  struct Case {
    int64_t count;
    int16_t device;
    size_t launches;
  };
  for (const Case& c : {Case{1, 0, 1},
                        {126, 0, 1},
                        {127, 0, 1},
                        {1020, 0, 1},
                        {1021, 0, 2},
                        {1022, 0, 2},
                        {5000, 0, 5},
                        {125, 1, 1},
                        {126, 1, 2},
                        {1021, 1, 9}}) {
    // First steps and later ones are two groups to the kernel, so one tensor less fits than with
    // one.
    std::vector<Tensors> list = list_of(c.count, Dtype::kFloat32);
    const std::string name = "a list of " + std::to_string(c.count);
    compare(list, groups, name, c.device);
    expect(emulated::launches.size() == c.launches,
           name + ": " + std::to_string(emulated::launches.size()) + " launches");
    const size_t most = c.device == 1 ? 4096 : 32764;
    for (const auto& launch : emulated::launches) {
      expect(launch.parameter_bytes <= most, name + ": the parameter is too large");
    }
    for (Tensors& each : list) each.is_first_step = false;
    compare(list, groups, name + ", later", c.device);
    if (c.count == 1021 && c.device == 0) {
      expect(emulated::launches.size() == 1, "1,021 tensors of one group take one launch");
    }
  }
  std::vector<Tensors> doubles = list_of(5000, Dtype::kFloat64);
  compare(doubles, groups, "5,000 in fp64");

  // An old driver has the small form on every device.
  std::vector<Tensors> list = list_of(300, Dtype::kFloat32);
  for (Tensors& each : list) each.is_first_step = false;
  emulated::driver = 12000;
  compare(list, groups, "an old driver", 2);
  expect(emulated::launches.size() == 3, "300 tensors in three launches of the small form");
  emulated::driver = 13000;
}

// 465 groups that all differ, one tensor each: one launch; 2,000: several.
void test_many_groups() {
  for (const int64_t count : {465, 2000}) {
    std::vector<Hyperparams<Sgd>> groups;
    std::vector<Tensors> list;
    for (int64_t k = 0; k < count; ++k) {
      Hyperparams<Sgd> h;
      h.has_momentum = k % 4 != 0;
      h.nesterov = k % 4 == 1;
      h.weight_decay = static_cast<WeightDecay>(k % 3);
      h.f64 = {1.0, 0.01, 0.9, 1.0, 1.0, 1.0, 0.1 * std::pow(0.99, static_cast<double>(k))};
      round_to_float(h);
      groups.push_back(h);
      list.push_back(flat(k % 40, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, {0, 0, 0},
                          static_cast<uint32_t>(k), false));
    }
    compare(list, groups, "many groups");
    expect(emulated::launches.size() == (count == 465 ? 1 : 4), "launches of many groups");
  }
}

// Tensors that share memory are updated in order.
void test_one_by_one(const std::vector<Hyperparams<Sgd>>& groups) {
  std::vector<Tensors> list;
  for (int64_t k = 0; k < 5; ++k) {
    list.push_back(
        flat(100, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, {0, 0, 0}, 9, false));
  }
  expect(cuda_step(list, groups, {}, 0, true) == cudaSuccess, "one by one: launched");
  expect(emulated::launches.size() == 5, "one by one: a launch for each tensor");
  cpu_step(list, groups);
  check_same(list, "one by one");
}

// A GradScaler's tensors, and a first step that the device leaves out.
void test_overflow(std::vector<Hyperparams<Sgd>> groups) {
  for (const Dtype dtype : kDtypes) {
    for (uint32_t group = 0; group < groups.size(); ++group) {
      std::vector<Tensors> list;
      for (const int64_t numel : {1, 9, 5000}) {
        list.push_back(flat(numel, dtype, dtype, dtype, {0, 0, 0}, group, false));
        list.back().cohort = 1;
      }
      list.push_back(flat(77, dtype, dtype, dtype, {0, 0, 0}, group, false));  // began long ago
      list.push_back(strided(3, 7, dtype, dtype, dtype, group, false));
      list.back().cohort = 1;

      float found_inf = 1;
      const float grad_scale = 1024;
      uint32_t settled = 0, settled_on_host = 0;
      StepScalars scalars = {&found_inf, &grad_scale, &settled, &settled_on_host, 1};
      const auto set_scale = [](Hyperparams<Sgd> h) {
        h.f64.grad_coef *= 1.0 / 1024;
        round_to_float(h);
        return h;
      };
      std::vector<Hyperparams<Sgd>> scaled;
      for (const Hyperparams<Sgd>& each : groups) scaled.push_back(set_scale(each));

      for (int skipped = 0; skipped < 2; ++skipped) {
        cuda_step(list, groups, scalars);
        check_same(list, "an overflow changes nothing");
        expect(settled == 0 && settled_on_host == 0, "an overflow is no first step");
      }
      found_inf = 0;
      const auto twin_step = [&](bool first, size_t count) {
        for (size_t k = 0; k < count; ++k) list[k].is_first_step = first && list[k].cohort != 0;
        cpu_step(list, scaled);
        for (Tensors& each : list) each.is_first_step = false;
      };
      cuda_step(list, groups, scalars);
      expect(settled == 1 && settled_on_host == 1, "the first step is recorded");
      twin_step(true, list.size());
      check_same(list, "the first step after an overflow");

      // A second cohort joins in a step that overflows; the first one goes on.
      list.push_back(flat(65, dtype, dtype, dtype, {0, 0, 0}, group, false));
      list.back().cohort = 2;
      scalars.newest_cohort = 2;
      found_inf = 1;
      cuda_step(list, groups, scalars);
      found_inf = 0;
      cuda_step(list, groups, scalars);
      for (Tensors& each : list) each.is_first_step = each.cohort == 2;
      cpu_step(list, scaled);
      for (Tensors& each : list) each.is_first_step = false;
      check_same(list, "two cohorts");
      expect(settled == 2, "the second cohort is recorded");

      // A replay of an old graph, and a step without the GradScaler.
      scalars.newest_cohort = 1;
      cuda_step(list, groups, scalars);
      expect(settled == 2, "an old graph records nothing old");
      twin_step(false, list.size());
      check_same(list, "a later step");
      scalars = {nullptr, nullptr, &settled, &settled_on_host, 2};
      cuda_step(list, groups, scalars);
      cpu_step(list, groups);
      check_same(list, "a step without the GradScaler");
    }
  }
}

// A factor in device memory is what it would be on the host, rounded once.
void test_grad_factor(const std::vector<Hyperparams<Sgd>>& groups) {
  const double factor = 1.0 / 3;
  StepScalars scalars;
  scalars.grad_factor = &factor;
  std::vector<Hyperparams<Sgd>> multiplied = groups;
  for (Hyperparams<Sgd>& each : multiplied) {
    each.f64.grad_coef *= factor;  // these are powers of two: one rounding there as here
    round_to_float(each);
  }
  for (const Dtype dtype : kDtypes) {
    std::vector<Tensors> list;
    for (uint32_t group = 0; group < groups.size(); ++group) {
      list.push_back(flat(5001, dtype, dtype, dtype, {0, 0, 0}, group, false));
      list.push_back(strided(7, 9, dtype, dtype, dtype, group, true));
    }
    cuda_step(list, groups, scalars);
    cpu_step(list, multiplied);
    check_same(list, "a factor in device memory");
  }
}

// Averages of flat tensors of every mix of dtypes, aligned or not, beside tensors without.
void test_averages(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const double weight : {1.0, 0.25, 0.75, 2e-4}) {
    for (const Dtype p : kDtypes) {
      for (const Dtype other : kDtypes) {
        std::vector<Tensors> list;
        for (uint32_t group = 0; group < groups.size(); group += 3) {
          for (const int64_t numel : {1, 7, 64, 700, 5001}) {
            list.push_back(flat(numel, p, other, p, {1, 1, 1}, group, numel == 7));
            list.back().keep_average(numel == 64 ? 2 : 1);
            list.push_back(flat(numel, p, p, other, {0, 0, 0}, group, numel == 64));
            list.back().keep_average(0);
            list.push_back(flat(numel, p, p, p, {0, 0, 0}, group, false));
          }
        }
        StepScalars scalars;
        for (const bool on_device : {false, true}) {
          if (on_device) scalars.average_weight = &weight;
          cuda_step(list, groups, scalars, 0, false, on_device ? 99 : weight);
          cpu_step(list, groups, weight);
          for (Tensors& each : list) each.is_first_step = false;
          check_same(list, "averages");
        }
        const float found_inf = 1;
        scalars.found_inf = &found_inf;
        cuda_step(list, groups, scalars, 0, false, weight);
        check_same(list, "an overflow leaves the averages");
      }
    }
  }

  // A strided tensor's average lies as its parameter does.
  for (const Dtype dtype : kDtypes) {
    std::vector<Tensors> list;
    list.push_back(strided(5, 67, dtype, dtype, dtype, 9, false));
    Tensors& each = list.back();
    each.keep_average(0);
    cuda_step(list, groups, {}, 0, false, 1.0);
    std::vector<char> expected = each.average.twin;
    const auto size = static_cast<size_t>(itemsize(dtype));
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t column = 0; column < 67; ++column) {
        const auto at = static_cast<size_t>(row * 3 * 67 + column * 3) * size;
        std::memcpy(expected.data() + at, each.param.data() + at, size);
      }
    }
    each.average.twin = expected;
    TensorEntry entry = each.entry(groups, true, 0);
    entry.average = nullptr;
    const int64_t first_element[] = {0, entry.numel};
    cpu::step<Sgd>({{&entry, first_element, 1}, groups.data()}, 1);
    check_same(list, "the average of a strided tensor");
  }

  // 817 of them take one launch.
  for (const int64_t count : {817, 818}) {
    std::vector<Tensors> list;
    for (int64_t k = 0; k < count; ++k) {
      list.push_back(
          flat(1 + k % 9, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, {0, 0, 0}, 9, false));
      list.back().keep_average(0);
    }
    cuda_step(list, groups, {}, 0, false, 0.5);
    expect(emulated::launches.size() == static_cast<size_t>(count - 816), "averages in a launch");
    cpu_step(list, groups, 0.5);
    check_same(list, "many averages");
  }

  double weight = 0, count = 0;
  float found_inf = 1;
  for (const double expected : {0.0, 1.0, 1 - 2.0 / 11, 1 - 3.0 / 12, 0.5, 0.5}) {
    cuda::count_average(&found_inf, expected == 0.5 ? 0.5 : 0.9, expected != 0.5, &weight, &count,
                        nullptr);
    expect(weight == expected, "the weight of an average");
    found_inf = 0;
  }
  expect(count == 5, "a step that overflows is not counted");
}

// lr, weight decay and momentum in device memory, of every dtype, changed between two launches.
void test_device_numbers(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Dtype dtype : kDtypes) {
    for (const Dtype number : kDtypes) {
      for (uint32_t group = 0; group < groups.size(); ++group) {
        std::vector<Hyperparams<Sgd>> on_host = groups;
        std::vector<Hyperparams<Sgd>> on_device = groups;
        alignas(8) char lr[8], weight_decay[8], momentum[8];
        Hyperparams<Sgd>& h = on_device[group];
        h.weight_decay = WeightDecay::kL2;
        h.f64.step = h.f64.weight_decay = 99;  // never used
        round_to_float(h);
        h.on_device.lr = {lr, number};
        h.on_device.weight_decay = {weight_decay, number};
        if (h.has_momentum) h.on_device.momentum = {momentum, number};
        std::vector<Tensors> list;
        list.push_back(flat(777, dtype, dtype, dtype, {0, 0, 0}, group, false));
        list.push_back(flat(77, dtype, dtype, dtype, {0, 0, 0}, group, true));
        list.push_back(strided(7, 9, dtype, dtype, dtype, group, false));
        list.push_back(flat(77, dtype, dtype, dtype, {0, 0, 0}, 9, false));
        for (const double decay : {0.0, 0.25}) {
          put(number, lr, 0.5 + decay);
          put(number, weight_decay, decay);
          put(number, momentum, 0.75 + decay / 2);
          Hyperparams<Sgd>& same = on_host[group];
          same.weight_decay = decay != 0 ? WeightDecay::kL2 : WeightDecay::kNone;
          same.f64.step = 0.5 + decay;
          same.f64.weight_decay = decay;
          if (same.has_momentum) same.f64.momentum = 0.75 + decay / 2;
          round_to_float(same);
          if (group == 9) on_device[9].on_device = h.on_device;
          cuda_step(list, on_device);
          cpu_step(list, on_host);
          check_same(list, "numbers in device memory");
        }
      }
    }
  }
}

// More than 2^31 elements and more than 2^31 elements apart, of which only the last have memory.
char* reserve(size_t bytes) {
  void* const got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  return static_cast<char*>(got);
}

void test_huge(const std::vector<Hyperparams<Sgd>>& groups) {
  for (const Dtype dtype : kDtypes) {
    for (const bool is_strided : {false, true}) {
      const int64_t size = itemsize(dtype);
      const int64_t numel = (int64_t{1} << (is_strided ? 31 : 33)) + 12345;
      const int64_t tail = 10000;  // elements that are updated
      const auto bytes = static_cast<size_t>(numel * size);
      char* memory[3];
      for (char*& each : memory) each = reserve(bytes);
      Tensors small = flat(tail, dtype, dtype, dtype, {0, 0, 0}, 9, false);
      const Array* arrays[] = {&small.param, &small.grad, &small.buffer};
      const auto at = static_cast<size_t>((numel - tail) * size);
      for (int k = 0; k < 3; ++k)
        std::memcpy(memory[k] + at, arrays[k]->data(), arrays[k]->bytes());

      std::vector<Tensors> list;
      list.push_back(std::move(small));
      list.push_back(flat(100, dtype, dtype, dtype, {0, 0, 0}, 9, false));
      std::vector<TensorEntry> entries = entries_of(list, groups, false, 0);
      const StridedDim dim = {numel, {1, 1, 1}};
      const StridedLayout layout = {&dim, 1};
      entries[0].param = memory[0];
      entries[0].grad = memory[1];
      entries[0].state[0] = memory[2];
      entries[0].numel = numel;
      if (is_strided) entries[0].layout = &layout;
      // Blocks before the tail are left out: run all would take minutes.
      const int64_t chunk = is_strided ? 1024 : 1024 * 16 / size;
      emulated::first_block = static_cast<unsigned>((numel - tail) / chunk + 1);
      const int64_t from = static_cast<int64_t>(emulated::first_block) * chunk - (numel - tail);
      emulated::launches.clear();
      cuda::step<Sgd>({{entries.data(), nullptr, 1}, groups.data()}, 0, {}, false, nullptr);
      expect(emulated::launches.size() == 1, "huge: one launch");
      // The same, in front of another tensor, whose chunks have large numbers then.
      if (!is_strided) {
        entries[0].numel = numel / chunk * chunk;
        emulated::first_block = static_cast<unsigned>(numel / chunk);
        cuda::step<Sgd>({{entries.data(), nullptr, 2}, groups.data()}, 0, {}, false, nullptr);
      }
      emulated::first_block = 0;

      cpu_step(list, groups);
      if (!is_strided) {
        expect(list[1].param.same() && list[1].buffer.same(), "huge: the tensor behind");
      }
      // Before `skip` lie the elements of blocks that were not run: they are as they were.
      const auto skip = static_cast<size_t>(from * size);
      for (const int k : {0, 2}) {
        const Array& array = k == 0 ? list[0].param : list[0].buffer;
        expect(std::memcmp(memory[k] + at, array.data(), skip) == 0, "huge: other blocks");
        expect(
            std::memcmp(memory[k] + at + skip, array.twin.data() + skip, array.bytes() - skip) == 0,
            "huge: the last elements");
      }
      for (char* each : memory) munmap(each, bytes);
    }
  }

  // Strides beyond 2^31: three rows, 2^31 + 7 elements apart.
  const int64_t apart = (int64_t{1} << 31) + 7;
  const StridedDim dims[] = {{3, {apart, apart, apart}}, {50, {2, 1, 3}}};
  const StridedLayout layout = {dims, 2};
  char* memory[3];
  const auto bytes = static_cast<size_t>((2 * apart + 200) * 4);
  for (char*& each : memory) each = reserve(bytes);
  std::vector<Tensors> list;
  for (int row = 0; row < 3; ++row) {
    list.push_back(
        flat(50, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, {0, 0, 0}, 9, false));
  }
  const auto copy = [&](bool in, bool& same) {
    for (int64_t row = 0; row < 3; ++row) {
      Tensors& each = list[static_cast<size_t>(row)];
      Array* const arrays[] = {&each.param, &each.grad, &each.buffer};
      for (int k = 0; k < 3; ++k) {
        for (int64_t i = 0; i < 50; ++i) {
          char* const element = memory[k] + (row * apart + i * dims[1].strides[k]) * 4;
          char* const twin = arrays[k]->twin.data() + i * 4;
          if (in) std::memcpy(element, twin, 4);
          same = same && std::memcmp(element, twin, 4) == 0;
        }
      }
    }
  };
  bool same = true;
  copy(true, same);
  std::vector<TensorEntry> entries = entries_of(list, groups, false, 0);
  entries[0].param = memory[0];
  entries[0].grad = memory[1];
  entries[0].state[0] = memory[2];
  entries[0].numel = 150;
  entries[0].layout = &layout;
  cuda::step<Sgd>({{entries.data(), nullptr, 1}, groups.data()}, 0, {}, false, nullptr);
  cpu_step(list, groups);
  copy(false, same);
  expect(same, "strides beyond 2^31");
  for (char* each : memory) munmap(each, bytes);
}

// A gradient that is its own parameter, and a launch that fails.
void test_rest(const std::vector<Hyperparams<Sgd>>& groups) {
  std::vector<Tensors> list;
  list.push_back(
      flat(1000, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, {1, 1, 1}, 9, false));
  std::vector<TensorEntry> entries = entries_of(list, groups, false, 0);
  entries[0].grad = entries[0].param;
  cuda::step<Sgd>({{entries.data(), nullptr, 1}, groups.data()}, 0, {}, false, nullptr);
  list[0].grad.twin = list[0].param.twin;
  cpu_step(list, groups);
  expect(list[0].param.same() && list[0].buffer.same(), "a gradient that is its own parameter");

  emulated::launch_error = cudaErrorLaunchFailure;
  expect(cuda_step(list, groups) == cudaErrorLaunchFailure, "a failed launch is reported");
  emulated::launch_error = cudaSuccess;
  list[0].param.restore();

  // Tensors of other devices and empty ones launch nothing.
  std::vector<TensorEntry> elsewhere = entries_of(list, groups, false, 3);
  emulated::launches.clear();
  cuda::step<Sgd>({{elsewhere.data(), nullptr, 1}, groups.data()}, 0, {}, false, nullptr);
  expect(emulated::launches.empty(), "another device's tensors are left alone");
}

}  // namespace

int main() {
  if (cpu::isa() == "baseline") {
    std::printf("0 checks, 0 failures: this machine has no fma to compare with\n");
    return 0;
  }
  const std::vector<Hyperparams<Sgd>> groups = all_hyperparams();
  test_sizes(groups);
  test_alignment(groups);
  test_mixes(groups);
  test_layouts(groups);
  test_many_dims(groups);
  test_long_lists(groups);
  test_many_groups();
  test_one_by_one(groups);
  test_overflow(groups);
  test_grad_factor(groups);
  test_averages(groups);
  test_device_numbers(groups);
  test_huge(groups);
  test_rest(groups);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
