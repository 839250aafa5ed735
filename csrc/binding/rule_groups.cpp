#include "rule_groups.h"

#include <vector>

#include "../cpu/backend.h"
#include "../rules/rules.h"

namespace momentum_ext::binding {
namespace {

template <typename Rule>
class GroupsOf : public RuleGroups {
 public:
  GroupsOf() {
    max_states = Rule::kMaxStates;
    for (int k = 0; k < max_states; ++k) {
      state_keys[k] = PyUnicode_InternFromString(Rule::kStateKeys[k]);
      scale_keys[k] = PyUnicode_InternFromString(Rule::kScaleKeys[k]);
      state_is_non_negative[k] = Rule::kIsNonNegative[k];
    }
  }

  void resize(size_t count) override {
    hyperparams_.resize(count);
    signs_.resize(count);
  }

  PyObject* parse(GroupReader& reader, PyObject* group, size_t g) override {
    Hyperparams<Rule> h;
    PyObject* const params = reader.parse(group, g, [&](HyperparamReader& from) {
      signs_[g] = Rule::read(from, h, h.f64, h.on_device) ? -1 : 1;
    });
    h.stochastic_rounding = reader.storage().stochastic_rounding;
    h.rounds_masters = reader.storage().rounds_masters;
    h.rounding_seed = reader.storage().rounding_seed;
    hyperparams_[g] = h;
    scale_group(g);
    return params;
  }

  void scale(double grad_factor) override {
    if (grad_factor == grad_factor_) return;
    grad_factor_ = grad_factor;
    for (size_t g = 0; g < hyperparams_.size(); ++g) scale_group(g);
  }

  int num_states(size_t g) const override { return Rule::num_states(hyperparams_[g]); }

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
  StepTable<Rule> with_groups(const TensorTable& table, const StepNumbers& numbers) const {
    return {table, hyperparams_.data(), numbers.average_weight, numbers.rounding_step};
  }

  std::vector<Hyperparams<Rule>> hyperparams_;
  std::vector<double> signs_;  // -1: maximize
  double grad_factor_ = 1;
};

}  // namespace

std::unique_ptr<RuleGroups> make_rule_groups(const std::string& rule) {
#define MOMENTUM_EXT_MAKE(Rule) \
  if (rule == Rule::kName) return std::make_unique<GroupsOf<Rule>>();
  MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_MAKE)
  throw py::value_error("no rule has the name '" + rule + "'");
}

}  // namespace momentum_ext::binding
