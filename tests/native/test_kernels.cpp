// The CPU kernels without torch: every instruction set that this machine can run, against a plain
// transcription of the rule. Built and run by tests/test_native.py, with AddressSanitizer and
// UndefinedBehaviorSanitizer. Arrays are allocated to the element, so that a kernel that touches
// one more is caught. Exits 0 when everything holds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "checks.h"

using namespace momentum_ext;

namespace {

// ---- a tensor as the test sees it: values in double, exact, and their bytes in memory -----------

struct Array {
  Dtype dtype;
  std::vector<int64_t> offsets;  // of each element, in elements
  std::unique_ptr<char[]> bytes;
  int64_t size;       // of the memory, in elements
  int64_t unaligned;  // bytes before the first element

  void* data() { return bytes.get() + unaligned; }

  void* at(int64_t offset) { return static_cast<char*>(data()) + offset * itemsize(dtype); }
  double get(int64_t i) { return ::get(dtype, at(offsets[i])); }
};

// The value that memory holds after `value` was stored in this dtype.
double rounded_to(Dtype dtype, double value) {
  double stored = 0;
  put(dtype, &stored, value);
  return get(dtype, &stored);
}

void put(Array& array, int64_t offset, double value) { put(array.dtype, array.at(offset), value); }

Array make_array(Dtype dtype, std::vector<int64_t> offsets, int64_t unaligned_elements) {
  int64_t size = 0;
  for (const int64_t offset : offsets) size = std::max(size, offset + 1);
  const int64_t unaligned = unaligned_elements * itemsize(dtype);
  Array array{dtype, std::move(offsets),
              std::make_unique<char[]>(static_cast<size_t>(unaligned + size * itemsize(dtype))),
              size, unaligned};
  for (int64_t i = 0; i < size; ++i) put(array, i, normal());
  return array;
}

std::vector<int64_t> contiguous(int64_t numel) {
  std::vector<int64_t> offsets(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i) offsets[static_cast<size_t>(i)] = i;
  return offsets;
}

// ---- the rule, written down once more -----------------------------------------------------------

template <typename T>
void reference_element(const Hyperparams<Sgd>& h, bool first, bool has_fma, double grad,
                       double& param, double& buffer) {
  const Sgd::Coefficients<T>& c = coefficients<T>(h);
  const auto fma = [&](T x, T y, T z) -> T { return has_fma ? std::fma(x, y, z) : x * y + z; };
  T p = static_cast<T>(param);
  T g = c.grad_coef * static_cast<T>(grad);
  if (h.weight_decay == WeightDecay::kL2) g = fma(c.weight_decay, p, g);
  if (h.weight_decay == WeightDecay::kDecoupled) p = c.weight_decay * p;
  T d = g;
  if (h.has_momentum) {
    const T decayed = c.momentum * static_cast<T>(buffer);
    const T b = first ? c.first_alpha * g : fma(c.alpha, g, decayed);
    d = h.nesterov ? fma(c.momentum, b, c.nesterov_alpha * g) : b;
    buffer = b;
  }
  param = fma(-c.step, d, p);
}

struct Case {
  Array param, grad, buffer;
  std::vector<double> expected_param, expected_buffer;
  std::vector<StridedDim> dims;
  StridedLayout layout{};
  bool is_first_step = false;
  uint32_t group = 0;

  TensorEntry entry(const std::vector<Hyperparams<Sgd>>& groups) {
    layout = {dims.data(), static_cast<int>(dims.size())};
    TensorEntry made{};
    made.param = param.data();
    made.grad = grad.data();
    made.state[0] = groups[group].has_momentum ? buffer.data() : nullptr;
    made.layout = dims.empty() ? nullptr : &layout;
    made.numel = static_cast<int64_t>(param.offsets.size());
    made.group = group;
    made.param_dtype = param.dtype;
    made.grad_dtype = grad.dtype;
    made.state_dtype[0] = buffer.dtype;
    made.is_first_step = is_first_step;
    return made;
  }

  void expect_result_of(const Hyperparams<Sgd>& h, bool has_fma) {
    const bool in_double = param.dtype == Dtype::kFloat64 || grad.dtype == Dtype::kFloat64 ||
                           (h.has_momentum && buffer.dtype == Dtype::kFloat64);
    for (size_t i = 0; i < param.offsets.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      double p = param.get(at);
      double b = buffer.get(at);
      (in_double ? reference_element<double> : reference_element<float>)(h, is_first_step, has_fma,
                                                                         grad.get(at), p, b);
      expected_param.push_back(rounded_to(param.dtype, p));
      expected_buffer.push_back(rounded_to(buffer.dtype, b));
    }
  }

  void check(const std::string& name) {
    for (size_t i = 0; i < param.offsets.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const double p = param.get(at), b = buffer.get(at);
      const bool same = std::memcmp(&p, &expected_param[i], 8) == 0 &&
                        std::memcmp(&b, &expected_buffer[i], 8) == 0;
      if (same) {
        ++checks;
        continue;
      }
      return expect(false, name + ", element " + std::to_string(i) + " of " +
                               std::to_string(param.offsets.size()));
    }
  }
};

std::vector<Hyperparams<Sgd>> all_hyperparams() {
  std::vector<Hyperparams<Sgd>> all;
  for (const WeightDecay decay : {WeightDecay::kNone, WeightDecay::kL2, WeightDecay::kDecoupled}) {
    for (const double momentum : {0.0, 0.9}) {
      for (const bool nesterov : {false, true}) {
        for (const double sign : {1.0, -0.0078125}) {
          if (nesterov && momentum == 0.0) continue;
          Hyperparams<Sgd> h;
          h.weight_decay = decay;
          h.has_momentum = momentum != 0.0;
          h.nesterov = nesterov;
          const double decay_coef = decay == WeightDecay::kNone ? 0.0
                                    : decay == WeightDecay::kL2 ? 0.01
                                                                : 0.99;
          // torch's numbers, then some that tell all coefficients apart.
          h.f64 = sign == 1.0
                      ? Sgd::Coefficients<double>{sign, decay_coef, momentum, 0.7, 1.0, 1.0, 0.1}
                      : Sgd::Coefficients<double>{sign, decay_coef, momentum, 0.7, 0.3, 0.45, 0.1};
          round_to_float(h);
          all.push_back(h);
        }
      }
    }
  }
  return all;
}

Case flat_case(int64_t numel, Dtype p, Dtype g, Dtype b, int64_t unaligned, uint32_t group,
               bool first) {
  Case made;
  made.param = make_array(p, contiguous(numel), unaligned);
  made.grad = make_array(g, contiguous(numel), unaligned / 2);
  made.buffer = make_array(b, contiguous(numel), unaligned);
  made.group = group;
  made.is_first_step = first;
  return made;
}

// A tensor of sizes rows x columns: the parameter a slice with gaps, the gradient transposed, the
// buffer contiguous.
Case strided_case(int64_t rows, int64_t columns, Dtype p, Dtype g, Dtype b, uint32_t group,
                  bool first) {
  Case made;
  made.dims = {{rows, {3 * columns, 1, columns}}, {columns, {3, rows, 1}}};
  std::vector<int64_t> po, go, bo;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      po.push_back(r * 3 * columns + c * 3);
      go.push_back(r + c * rows);
      bo.push_back(r * columns + c);
    }
  }
  made.param = make_array(p, po, 1);
  made.grad = make_array(g, go, 0);
  made.buffer = make_array(b, bo, 0);
  made.group = group;
  made.is_first_step = first;
  return made;
}

Case permuted_case(const Orders& orders, Dtype p, Dtype g, Dtype b, uint32_t group, bool first) {
  Case made;
  made.dims = orders.dims();
  std::vector<int64_t> offsets[] = {{0}, {0}, {0}};
  for (const StridedDim& dim : made.dims) {
    for (int t = 0; t <= kState; ++t) {
      std::vector<int64_t> longer;
      for (const int64_t offset : offsets[t]) {
        for (int64_t i = 0; i < dim.size; ++i) longer.push_back(offset + i * dim.strides[t]);
      }
      offsets[t] = std::move(longer);
    }
  }
  made.param = make_array(p, offsets[kParam], 1);
  made.grad = make_array(g, offsets[kGrad], 0);
  made.buffer = make_array(b, offsets[kState], 3);
  made.group = group;
  made.is_first_step = first;
  return made;
}

using Runner = std::function<void(const StepTable<Sgd>&)>;

void run_and_check(std::vector<Case>& cases, const std::vector<Hyperparams<Sgd>>& groups,
                   bool has_fma, const Runner& run, const std::string& name) {
  std::vector<TensorEntry> entries;
  std::vector<int64_t> first_element{0};
  for (Case& each : cases) {
    each.expect_result_of(groups[each.group], has_fma);
    entries.push_back(each.entry(groups));
    first_element.push_back(first_element.back() + entries.back().numel);
  }
  std::vector<std::vector<char>>
      gaps;  // what lies between a strided parameter's elements must stay
  for (Case& each : cases) {
    const char* begin = static_cast<char*>(each.param.data());
    gaps.emplace_back(begin, begin + each.param.size * itemsize(each.param.dtype));
  }
  run({{entries.data(), first_element.data(), static_cast<int64_t>(entries.size())},
       groups.data()});
  for (size_t k = 0; k < cases.size(); ++k) {
    Case& each = cases[k];
    each.check(name + ", tensor " + std::to_string(k));
    const auto size = static_cast<size_t>(itemsize(each.param.dtype));
    std::vector<bool> is_element(static_cast<size_t>(each.param.size), false);
    for (const int64_t offset : each.param.offsets) is_element[static_cast<size_t>(offset)] = true;
    for (size_t i = 0; i < is_element.size(); ++i) {
      if (is_element[i]) continue;
      expect(std::memcmp(gaps[k].data() + i * size,
                         static_cast<char*>(each.param.data()) + i * size, size) == 0,
             name + ": wrote between the elements of a strided parameter");
    }
  }
}

const cpu::Loops& loops_of(const std::string& isa) {
  return *(isa == "avx512" ? cpu::kAvx512
           : isa == "avx2" ? cpu::kAvx2
           : isa == "neon" ? cpu::kNeon
                           : cpu::kBaseline);
}

cpu::RunFn<Sgd> step_of(const std::string& isa) {
  return static_cast<const cpu::StepLoop<Sgd>&>(loops_of(isa)).step;
}

// As threads would divide it, at random places.
void run_divided(cpu::RunFn<Sgd> run, const StepTable<Sgd>& table) {
  const int64_t end = table.first_element[table.num_entries];
  for (int64_t from = 0; from < end;) {
    const int64_t to = std::min<int64_t>(end, from + static_cast<int64_t>(generator() % 200));
    run(table, from, to);
    from = to;
  }
}

void test_instruction_set(const std::string& isa) {
  cpu::set_isa(isa);
  const bool has_fma = isa != "baseline";
  const std::vector<Hyperparams<Sgd>> groups = all_hyperparams();
  const Runner one_thread = [](const StepTable<Sgd>& table) { cpu::step(table, 1); };
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

  // Sizes around every vector and tile edge, each dtype, each formula, aligned or not.
  for (const Dtype dtype : dtypes) {
    std::vector<Case> cases;
    for (uint32_t group = 0; group < groups.size(); ++group) {
      for (const int64_t numel : {0,  1,  2,  3,   7,   8,   9,   15,  16,  17,  31,  32,  33,
                                  63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000}) {
        cases.push_back(flat_case(numel, dtype, dtype, dtype, numel % 3, group, numel % 2 == 1));
      }
    }
    run_and_check(cases, groups, has_fma, one_thread, isa + " flat");
  }

  // Every mix of dtypes, flat and strided.
  for (const Dtype p : dtypes) {
    for (const Dtype g : dtypes) {
      for (const Dtype b : dtypes) {
        std::vector<Case> cases;
        for (uint32_t group = 0; group < groups.size(); ++group) {
          cases.push_back(flat_case(300, p, g, b, 1, group, false));
          cases.push_back(flat_case(17, p, g, b, 0, group, true));
          cases.push_back(strided_case(5, 67, p, g, b, group, false));
          cases.push_back(strided_case(300, 1, p, g, b, group, true));
          cases.push_back(strided_case(1, 3, p, g, b, group, false));
        }
        run_and_check(cases, groups, has_fma, one_thread, isa + " mixed");
      }
    }
  }

  // Every layout, as a whole and in parts.
  for (const Dtype dtype : dtypes) {
    const Dtype other = dtype == Dtype::kFloat32 ? Dtype::kBFloat16 : Dtype::kFloat32;
    for (const bool divided : {false, true}) {
      std::vector<Case> cases;
      uint32_t k = 0;
      for (const Orders& orders : all_orders()) {
        const auto group = static_cast<uint32_t>(++k % groups.size());
        cases.push_back(
            permuted_case(orders, dtype, divided ? other : dtype, dtype, group, k % 7 == 0));
      }
      const Runner in_parts = [&](const StepTable<Sgd>& table) {
        run_divided(step_of(isa), table);
      };
      run_and_check(cases, groups, has_fma, divided ? in_parts : one_thread, isa + " layouts");
    }
  }

  // Long tables, on one thread and on several, with empty tensors among them.
  for (const int64_t count : {1, 2, 1021, 1022, 5000}) {
    for (const int threads : {1, 2, 3}) {
      std::vector<Case> cases;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t numel = count <= 2 ? 100003 : (k * 37) % 90;
        cases.push_back(flat_case(numel, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, k % 3,
                                  static_cast<uint32_t>(k % static_cast<int64_t>(groups.size())),
                                  k % 5 == 0));
      }
      run_and_check(
          cases, groups, has_fma, [&](const StepTable<Sgd>& table) { cpu::step(table, threads); },
          isa + " table of " + std::to_string(count));
    }
  }

  // Any division of the range among threads covers every element exactly once.
  const cpu::RunFn<Sgd> run = step_of(isa);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<Case> cases;
    for (const int64_t numel : {130, 0, 64, 1, 500, 63}) {
      cases.push_back(
          flat_case(numel, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, 0, 9, false));
    }
    run_and_check(
        cases, groups, has_fma, [&](const StepTable<Sgd>& table) { run_divided(run, table); },
        isa + " divided");
  }
}

// ---- between Nesterov's two points --------------------------------------------------------------

// from + distance * buffer, as the kernels compute it for these dtypes.
double moved(const Case& each, double distance, double from, double buffer, bool has_fma) {
  if (each.param.dtype == Dtype::kFloat64 || each.buffer.dtype == Dtype::kFloat64) {
    const double sum = has_fma ? std::fma(distance, buffer, from) : distance * buffer + from;
    return rounded_to(each.param.dtype, sum);
  }
  const auto d = static_cast<float>(distance), b = static_cast<float>(buffer),
             p = static_cast<float>(from);
  const float sum = has_fma ? std::fma(d, b, p) : d * b + p;
  return rounded_to(each.param.dtype, sum);
}

std::vector<char> memory_of(Array& array) {
  const char* const begin = static_cast<char*>(array.data());
  return {begin, begin + array.size * itemsize(array.dtype)};
}

void expect_values(Array& array, const std::vector<double>& expected, const std::string& what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = array.get(static_cast<int64_t>(i));
    const bool same = std::memcmp(&value, &expected[i], sizeof(value)) == 0;
    expect(same,
           what + ", element " + std::to_string(i) + " of " + std::to_string(expected.size()));
    if (!same) return;
  }
}

// There, a few elements changed by someone else, and back.
void move_and_check(std::vector<Case>& cases, const std::vector<Hyperparams<Sgd>>& groups,
                    bool has_fma, const Runner& to_iterate, const Runner& to_lookahead,
                    const std::string& name) {
  std::vector<TensorEntry> entries;
  std::vector<int64_t> first_element{0};
  std::vector<std::vector<double>> starts, iterates;
  std::vector<std::vector<char>> params, buffers;
  for (Case& each : cases) {
    const double distance = groups[each.group].f64.momentum;
    entries.push_back(each.entry(groups));
    first_element.push_back(first_element.back() + entries.back().numel);
    params.push_back(memory_of(each.param));
    buffers.push_back(memory_of(each.buffer));
    starts.emplace_back();
    iterates.emplace_back();
    for (int64_t i = 0; i < entries.back().numel; ++i) {
      starts.back().push_back(each.param.get(i));
      iterates.back().push_back(
          moved(each, distance, each.param.get(i), each.buffer.get(i), has_fma));
    }
  }
  const StepTable<Sgd> table{
      {entries.data(), first_element.data(), static_cast<int64_t>(entries.size())}, groups.data()};
  to_iterate(table);
  for (size_t k = 0; k < cases.size(); ++k) {
    const std::string what = name + ", tensor " + std::to_string(k);
    expect_values(cases[k].param, iterates[k], what + ": the iterate");
    expect_values(cases[k].grad, starts[k], what + ": the look-ahead point that is kept");
  }

  std::vector<std::vector<double>> expected = starts;
  for (size_t k = 0; k < cases.size(); ++k) {
    Case& each = cases[k];
    for (size_t i = k % 5; i < expected[k].size(); i += 5) {
      const auto at = static_cast<int64_t>(i);
      put(each.param, each.param.offsets[i], normal());
      const double changed = each.param.get(at);
      if (changed == iterates[k][i]) continue;
      expected[k][i] =
          moved(each, -groups[each.group].f64.momentum, changed, each.buffer.get(at), has_fma);
    }
  }
  to_lookahead(table);
  for (size_t k = 0; k < cases.size(); ++k) {
    Case& each = cases[k];
    const std::string what = name + ", tensor " + std::to_string(k);
    expect_values(each.param, expected[k], what + ": back");
    expect_values(each.grad, starts[k], what + ": the look-ahead point after its use");
    expect(memory_of(each.buffer) == buffers[k], what + ": wrote into the buffer");
    for (size_t i = 0; i < expected[k].size(); ++i) {  // then everything else must be as it was
      put(each.param, each.param.offsets[i], starts[k][i]);
    }
    expect(memory_of(each.param) == params[k], what + ": wrote between the elements");
  }
}

void test_moves(const std::string& isa) {
  cpu::set_isa(isa);
  const bool has_fma = isa != "baseline";
  std::vector<Hyperparams<Sgd>> groups;
  for (const double distance : {0.9, 0.0437, 1e-30, 3000.0}) {
    Hyperparams<Sgd> h;
    h.has_momentum = true;
    h.f64.momentum = distance;
    round_to_float(h);
    groups.push_back(h);
  }
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};
  const cpu::Loops& loops = loops_of(isa);
  for (const Dtype p : dtypes) {
    for (const Dtype b : dtypes) {
      std::vector<Case> cases;
      for (uint32_t group = 0; group < groups.size(); ++group) {
        for (const int64_t numel :
             {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000}) {
          cases.push_back(flat_case(numel, p, p, b, numel % 3, group, false));
        }
        cases.push_back(strided_case(5, 67, p, p, b, group, false));
        cases.push_back(strided_case(300, 1, p, p, b, group, false));
        cases.push_back(strided_case(1, 3, p, p, b, group, false));
        cases.push_back(permuted_case({{9, 16, 5}, {2, 1, 0}, {1, 2, 0}}, p, p, b, group, false));
        cases.push_back(permuted_case({{33, 65}, {1, 0}, {0, 1}, 2}, p, p, b, group, false));
      }
      const std::string name = isa + " moves, dtypes " + std::to_string(static_cast<int>(p)) + " " +
                               std::to_string(static_cast<int>(b));
      move_and_check(
          cases, groups, has_fma,
          [&](const StepTable<Sgd>& table) { run_divided(loops.to_iterate, table); },
          [&](const StepTable<Sgd>& table) { run_divided(loops.to_lookahead, table); }, name);
    }
  }
  for (const int threads : {1, 3}) {
    std::vector<Case> cases;
    for (const int64_t numel : {100003, 0, 5, 65537}) {
      cases.push_back(
          flat_case(numel, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, 1, 0, false));
    }
    move_and_check(
        cases, groups, has_fma,
        [&](const StepTable<Sgd>& table) { cpu::move_to_iterate(table, threads); },
        [&](const StepTable<Sgd>& table) { cpu::move_to_lookahead(table, 4 - threads); },
        isa + " moves on threads");
  }
}

// ---- conversions --------------------------------------------------------------------------------

// The nearest of all values of a 16-bit type, ties to the even one, found by search.
template <typename Half>
void test_rounding(const char* name, uint16_t largest_finite, int mantissa_bits) {
  const auto value_of = [](uint32_t bits) {
    return static_cast<double>(load(Half{static_cast<uint16_t>(bits)}));
  };
  for (uint32_t bits = 0; bits <= largest_finite; ++bits) {
    expect(bits == 0 || value_of(bits) > value_of(bits - 1),
           std::string(name) + " is not monotonic");
    Half back;
    store(back, load(Half{static_cast<uint16_t>(bits)}));
    expect(back.bits == bits, std::string(name) + " does not survive a round trip");
  }
  for (uint32_t bits = 0; bits < largest_finite; bits += 1 + bits % 7) {
    const double low = value_of(bits), high = value_of(bits + 1);
    const double middle = low + (high - low) / 2;
    const auto rounds_to = [&](double value, uint32_t expected) {
      Half stored;
      store(stored, static_cast<float>(value));
      expect(stored.bits == expected,
             std::string(name) + " rounds wrongly near " + std::to_string(value));
      store(stored, static_cast<float>(-value));
      expect(stored.bits == (expected | 0x8000u), std::string(name) + " rounds wrongly, negative");
    };
    if (static_cast<double>(static_cast<float>(middle)) != middle)
      continue;  // below float's own range
    rounds_to(middle, bits % 2 == 0 ? bits : bits + 1);
    rounds_to(std::nextafterf(static_cast<float>(middle), 0.0f), bits);
    rounds_to(std::nextafterf(static_cast<float>(middle), INFINITY), bits + 1);
  }
  Half special;
  store(special, INFINITY);
  expect(std::isinf(load(special)), std::string(name) + ": Inf");
  store(special, 3e38f);
  expect(std::isinf(load(special)) == (mantissa_bits == 10), std::string(name) + ": overflow");
  store(special, NAN);
  expect(std::isnan(load(special)), std::string(name) + ": NaN");
}

}  // namespace

int main() {
  test_rounding<Float16>("fp16", 0x7bff, 10);
  test_rounding<BFloat16>("bf16", 0x7f7f, 7);
  for (const std::string& isa : cpu::isas()) {
    test_instruction_set(isa);
    test_moves(isa);
  }
  bool refused = false;
  try {
    cpu::set_isa("no such instruction set");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "an unknown instruction set is refused");
  std::printf("%d checks, %d failures, instruction sets:", checks, failures);
  for (const std::string& isa : cpu::isas()) std::printf(" %s", isa.c_str());
  std::printf("\n");
  return failures == 0 ? 0 : 1;
}
