#include "rule_groups.h"

#include <algorithm>
#include <vector>

#include "../cpu/backend.h"
#include "../rules/rules.h"

namespace momentum_ext::binding {
namespace {

template <typename Rule>
class GroupsOf : public RuleGroups {
  static constexpr bool kHasCounters = Rule::kCounters > 0;

 public:
  GroupsOf() {
    max_states = Rule::kMaxStates;
    for (int k = 0; k < max_states; ++k) {
      state_keys[k] = PyUnicode_InternFromString(Rule::kStateKeys[k]);
      scale_keys[k] = PyUnicode_InternFromString(Rule::kScaleKeys[k]);
      state_is_non_negative[k] = Rule::kIsNonNegative[k];
    }
    if constexpr (kHasCounters) {
      num_counters = Rule::kCounters;
      for (int k = 0; k < num_counters; ++k) {
        counter_keys[k] = PyUnicode_InternFromString(Rule::kCounterKeys[k]);
        counter_starts.values[k] = Rule::kCounterStarts[k];
      }
    }
    for (int n = 0; n <= max_states; ++n) {
      std::copy_n(state_keys, n, state_and_counter_keys[n]);
      std::copy_n(counter_keys, num_counters, state_and_counter_keys[n] + n);
    }
  }

  void resize(size_t count) override {
    hyperparams_.resize(count);
    signs_.resize(count);
    numbers_.resize(count);
    rows_.clear();
  }

  PyObject* parse(GroupReader& reader, PyObject* group, size_t g) override {
    Hyperparams<Rule> h;
    NumbersOf<Rule> numbers;
    const auto read = [&](HyperparamReader& from) {
      if constexpr (kHasCounters) {
        signs_[g] = Rule::read(from, h, numbers, h.on_device) ? -1 : 1;
      } else {
        signs_[g] = Rule::read(from, h, h.f64, h.on_device) ? -1 : 1;
      }
    };
    PyObject* const params =
        reader.parse(group, g, {Rule::kStateKeys, Rule::kIsNonNegative, Rule::kMaxStates}, read);
    h.stochastic_rounding = reader.storage().stochastic_rounding;
    h.rounds_masters = reader.storage().rounds_masters;
    h.rounding_seed = reader.storage().rounding_seed;
    hyperparams_[g] = h;
    numbers_[g] = numbers;
    rows_.advance_anew(g, [&](const Counters& from) { return advance(g, from); });
    scale_group(g);
    return params;
  }

  void scale(double grad_factor) override {
    if (grad_factor == grad_factor_) return;
    grad_factor_ = grad_factor;
    for (size_t g = 0; g < hyperparams_.size(); ++g) scale_group(g);
  }

  int num_states(size_t g) const override { return Rule::num_states(hyperparams_[g]); }

  uint32_t row_of(uint32_t hint, size_t g, const Counters& before) override {
    if constexpr (!kHasCounters) return static_cast<uint32_t>(g);
    return rows_.find(hint, g, before, [&](const Counters& from) { return advance(g, from); });
  }
  const Counters& counters_after(uint32_t row) const override { return rows_.all()[row].after; }
  bool counts_on_device([[maybe_unused]] size_t g) const override {
    if constexpr (kHasCounters) return numbers_[g].counts_on_device;
    return false;
  }
  void count_on_device([[maybe_unused]] size_t g,
                       [[maybe_unused]] const std::vector<CountedOnDevice>& tensors,
                       [[maybe_unused]] int16_t device,
                       [[maybe_unused]] const at::Tensor& found_inf) const override {
    if constexpr (kHasCounters) {
      binding::count_on_device<Rule>(numbers_[g], tensors, device, found_inf);
    }
  }
  void begin_step() override { rows_.begin_step(); }

  void prepare_rows() override {
    if constexpr (kHasCounters) {
      of_rows_.resize(rows_.all().size());
      for (size_t r = 0; r < of_rows_.size(); ++r) {
        const CounterRow& row = rows_.all()[r];
        if (!row.is_used) continue;
        of_rows_[r] = hyperparams_[row.group];
        Rule::prepare(numbers_[row.group], row.after.values, of_rows_[r].f64);
        round_to_float(of_rows_[r]);
        of_rows_[r].on_device.derived = row.after.derived;
      }
    }
  }

  void end_step() override {
    rows_.end_step([this](size_t g, const Counters& from) { return advance(g, from); });
  }

  void step_on_cpu(const TensorTable& table, const StepNumbers& numbers,
                   int max_threads) const override {
    cpu::step<Rule>(with_groups(table, numbers), max_threads);
  }

  void launch(const TensorTable& table, const StepNumbers& numbers, const DeviceShare& share,
              const ScalerTensors& scaler, FirstSteps& first_steps,
              bool one_by_one) const override {
    binding::launch<Rule>(with_groups(table, numbers), share, scaler, first_steps, one_by_one);
  }

 private:
  void scale_group(size_t g) {
    hyperparams_[g].f64.grad_coef = signs_[g] * grad_factor_;
    round_to_float(hyperparams_[g]);
  }
  Counters advance([[maybe_unused]] size_t g, const Counters& before) const {
    Counters after = before;
    if constexpr (kHasCounters) {
      if (before.derived != nullptr) return before;
      Rule::count(numbers_[g], before.is_double, after.values);
      for (int k = 0; k < kMaxCounters; ++k) {
        if (!before.is_double[k]) after.values[k] = static_cast<float>(after.values[k]);
      }
    }
    return after;
  }
  StepTable<Rule> with_groups(const TensorTable& table, const StepNumbers& numbers) const {
    const auto& groups = kHasCounters ? of_rows_ : hyperparams_;
    return {table, groups.data(), numbers.average_weight, numbers.rounding_step};
  }

  std::vector<Hyperparams<Rule>> hyperparams_;
  std::vector<double> signs_;  // -1: maximize
  std::vector<NumbersOf<Rule>> numbers_;
  CounterRows rows_;
  std::vector<Hyperparams<Rule>> of_rows_;
  double grad_factor_ = 1;
};

}  // namespace

bool RuleGroups::lies_like_param(PyObject* key, const at::Tensor& tensor) const {
  for (int k = 0; k < max_states; ++k) {
    if (key == scale_keys[k]) return false;
    if (key == state_keys[k]) return !packs(tensor.scalar_type(), state_is_non_negative[k]);
  }
  return true;
}

std::unique_ptr<RuleGroups> make_rule_groups(const std::string& rule) {
#define MOMENTUM_EXT_MAKE(Rule) \
  if (rule == Rule::kName) return std::make_unique<GroupsOf<Rule>>();
  MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_MAKE)
  throw py::value_error("no rule has the name '" + rule + "'");
}

}  // namespace momentum_ext::binding
