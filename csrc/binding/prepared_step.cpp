// The two halves of a step: preparing and running.
#include "prepared_step.h"

#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "low_precision.h"
#include "slot_preparation.h"

namespace momentum_ext::binding {
namespace {

// From this many elements on the GIL is released while the kernel runs. Fewer take a small part of
// the interpreter's own switch interval of 5 ms, and releasing means holding references to all
// tensors.
constexpr int64_t kElementsToReleaseGil = 1 << 21;

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// A launch tells the device that the first steps of all tensors up to a cohort are done: none may
// be missing from it.
void separate_first_steps(Plan& plan) {
  std::unordered_set<const c10::TensorImpl*> present;
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    if (plan.entries[i].cohort != 0 && plan.tensors[i].param != nullptr) {
      present.insert(plan.tensors[i].states[0]);
    }
  }
  const auto renumbered = plan.first_steps.separate(present);
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    const auto found = renumbered.find(plan.entries[i].cohort);
    if (found != renumbered.end() && plan.tensors[i].param == nullptr) {
      plan.entries[i].cohort = found->second;
    }
  }
}

// What the tensors' counters are after the step.
void count(Plan& plan) {
  const RuleGroups& rule = *plan.rule;
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    if (plan.tensors[i].param == nullptr) continue;
    if (plan.counters[i].derived != nullptr) continue;  // the device has counted
    const Counters& after = rule.counters_after(plan.entries[i].group);
    for (int k = 0; k < rule.num_counters; ++k) {
      write_counter(plan.counters[i].data[k], after.is_double[k], after.values[k]);
    }
  }
  plan.rule->end_step();
}

// A step with lr 0 in every group is how torch.distributed.checkpoint makes a fresh optimizer's
// state: nothing was trained.
bool trains(const Plan& plan) {
  return !std::all_of(plan.readers.begin(), plan.readers.end(),
                      [](const GroupReader& reader) { return reader.lr_is_zero(); });
}

}  // namespace

PreparedStep::PreparedStep(Plan& plan, const py::list& param_groups, const py::dict& state,
                           StepOptions options)
    : plan_(&plan),
      lock_(plan.mutex),
      vectors_(std::move(plan.spare_vectors)),
      state_(state),
      may_be_left_out_(options.may_be_left_out) {
  try {
    options.all_by_torch = options.all_by_torch || operators_are_watched();
    plan.compare(param_groups, state);
    plan.first_steps.begin_step();
    plan.rule->begin_step();
    SlotPreparation slots(plan, options, *vectors_);
    versions_are_bumped_ = true;
    slots.look_at_all();
    converts_ = slots.prepare_changed();
    slots.check_capture();
    std::vector<DeviceShare>& shares = vectors_->shares;
    if (!shares.empty()) count_for_rounding(plan, shares);
    if (std::any_of(shares.begin(), shares.end(),
                    [](const DeviceShare& share) { return share.newest_cohort != 0; })) {
      separate_first_steps(plan);
    }
    if (plan.memory_has_changed) plan.find_shared_memory();
    in_order_ = plan.written.meets_itself() ||
                (!vectors_->shared_grads.empty() && some_grad_meets_another_slot());
    if (options.averaging != Averaging::kNone || plan.has_averages) {
      vectors_->averages.attach(plan, options.averaging, in_order_, vectors_->changes);
    }
    plan.has_averages = options.averaging != Averaging::kNone;
    if (needs_torch()) keep_alive();  // the caller runs Python code before it comes back
  } catch (...) {
    discard();
    throw;
  }
}

// Python code that is called while a step writes, or another thread, may hold the same step.
class PreparedStep::Writing {
 public:
  explicit Writing(PreparedStep& step) : step_(step) {
    step.vectors();
    if (step.is_writing_) throw std::runtime_error("this step is running");
    step.is_writing_ = true;
  }
  ~Writing() { step_.is_writing_ = false; }
  Writing(const Writing&) = delete;
  Writing& operator=(const Writing&) = delete;

 private:
  PreparedStep& step_;
};

StepVectors& PreparedStep::vectors() const {
  if (vectors_ == nullptr) throw std::runtime_error("this step has run or was discarded");
  return *vectors_;
}

// The next step may begin.
void PreparedStep::finish() noexcept {
  // First: clearing may call Python code, which finds the step over.
  std::unique_ptr<StepVectors> vectors = std::move(vectors_);
  vectors->clear();
  plan_->spare_vectors = std::move(vectors);
  lock_.reset();
}

py::list PreparedStep::fallback() const {
  py::list positions;
  for (const size_t i : vectors().fallback) {
    positions.append(py::make_tuple(plan_->slots[i].group, plan_->slots[i].index));
  }
  return positions;
}

bool PreparedStep::is_on_devices(const std::optional<at::Tensor>& average_count) const {
  if (needs_torch()) return false;
  for (size_t i = 0; i < plan_->slots.size(); ++i) {
    if (plan_->tensors[i].param == nullptr) continue;
    if (plan_->slots[i].device == kCpu) return false;
    if (may_be_left_out_ && plan_->rule->num_counters != 0 &&
        plan_->counters[i].derived == nullptr) {
      return false;  // the host counts
    }
  }
  if (average_count.has_value()) {
    for (const DeviceShare& share : vectors_->shares) {
      if (share.device != average_count->device().index()) return false;
    }
  }
  const bool averages_wait = may_be_left_out_ || average_count.has_value();
  return !averages_wait || !vectors_->averages.need_torch();
}

void PreparedStep::begin() {
  const Writing writing(*this);
  insert_state();
}

void PreparedStep::insert_state() {
  if (!vectors_->changes.empty()) keep_alive();  // Python code is called
  vectors_->changes.insert(state_);
}

void PreparedStep::run(const Numbers& numbers) {
  const Writing writing(*this);
  insert_state();
  Plan& plan = *plan_;
  plan.rule->scale(numbers.grad_factor);
  plan.last_factors = {numbers.grad_factor, numbers.on_device.grad_scale,
                       numbers.on_device.grad_factor};
  std::optional<at::RecordFunction> range;
  if (at::hasCallbacks()) {
    range.emplace(at::RecordScope::USER_SCOPE);
    const int64_t bytes = range->isActive() ? bytes_to_move(plan, vectors_->averages) : 0;
    if (range->isActive()) range->before(plan.name + ".step: " + std::to_string(bytes) + " bytes");
  }
  bump_versions();
  plan.rule->prepare_rows();
  if (numbers.on_device.average.count.defined()) count_average(numbers.on_device);
  const StepNumbers step_numbers{numbers.average_weight, plan.rounding_step};
  if (plan.rule->num_counters != 0) count_on_devices(numbers.on_device.found_inf);
  for (const DeviceShare& share : vectors_->shares) {
    plan.rule->launch({plan.entries.data(), nullptr, static_cast<int64_t>(plan.slots.size())},
                      step_numbers, share, numbers.on_device, plan.first_steps, in_order_);
  }
  const bool counts = trains(plan);
  if (counts) plan.rounding_steps.add_one();
  for (const StateChanges::Change& change : vectors_->changes.all()) {
    if (change.cohort != 0) {
      plan.first_steps.add(change.tensor, change.cohort,
                           static_cast<int16_t>(change.tensor.device().index()));
    }
  }
  vectors_->changes.clear();  // from here on the step takes place
  if (plan.rule->num_counters != 0) count(plan);
  if (plan.first_element.back() != 0) update_cpu(step_numbers);
  vectors_->averages.update_by_torch(plan, state_, numbers.average_weight);
  if (converts_) plan.note_converted();
  if (counts) ++plan.rounding_step;
  finish();
}

// The counters that are on devices, a group's and device's together.
void PreparedStep::count_on_devices(const at::Tensor& found_inf) {
  const Plan& plan = *plan_;
  const int num_counters = plan.rule->num_counters;
  std::vector<CountedOnDevice>& list = vectors_->counted;
  for (size_t g = 0; g < plan.readers.size(); ++g) {
    int16_t device = kCpu;
    const auto launch = [&] {
      if (!list.empty()) plan.rule->count_on_device(g, list, device, found_inf);
      list.clear();
    };
    for (size_t i = plan.first_slot[g]; i < plan.first_slot[g + 1]; ++i) {
      const Plan::CounterTensors& counters = plan.counters[i];
      if (plan.tensors[i].param == nullptr || counters.derived == nullptr) continue;
      if (in_order_ || plan.slots[i].device != device) launch();  // the same counter may come again
      device = plan.slots[i].device;
      CountedOnDevice counted{{}, counters.derived, 0};
      for (int k = 0; k < num_counters; ++k) {
        counted.counters[k] = counters.data[k];
        counted.is_double |= uint64_t{counters.each[k]->dtype().itemsize() == 8} << k;
      }
      list.push_back(counted);
    }
    launch();
  }
}

void PreparedStep::discard() noexcept {
  if (vectors_ == nullptr || is_writing_) return;
  const Writing writing(*this);
  restore_versions();
  vectors_->changes.take_back(state_);
  finish();
}

// What counts the writes to the state at this key: it, or the DTensor whose shard it is.
c10::TensorImpl* PreparedStep::counter_of(size_t i, PyObject* key, c10::TensorImpl* state) const {
  if (state == nullptr || plan_->slots[i].specs == nullptr) return state;
  PyObject* const value = find_item(plan_->slots[i].state_dict, key);
  return value != nullptr && THPVariable_Check(value)
             ? THPVariable_Unpack(value).unsafeGetTensorImpl()
             : state;
}

void PreparedStep::bump_versions() {
  versions_are_bumped_ = false;  // those of the other slots stay as they are now
  PyObject* const* const keys = plan_->rule->state_keys;
  for (const size_t i : vectors_->changed) {
    if (plan_->tensors[i].param == nullptr) continue;
    bump_version(plan_->listed(i).unsafeGetTensorImpl());
    for (int k = 0; k < kMaxStates; ++k) {
      bump_version(counter_of(i, keys[k], plan_->tensors[i].states[k]));
    }
  }
  if (!plan_->has_averages && !plan_->has_low_precision) return;
  for (size_t i = 0; i < plan_->slots.size(); ++i) {
    if (plan_->tensors[i].param == nullptr) continue;
    bump_version(counter_of(i, state_keys().average, plan_->tensors[i].average));
    if (c10::TensorImpl* const master = plan_->companion_tensors[i].master; master != nullptr) {
      bump_version(counter_of(i, plan_->slots[i].companions->master.key, master));
    }
    for (c10::TensorImpl* const scale : plan_->companion_tensors[i].scales) bump_version(scale);
  }
}

// For a step that does not take place.
void PreparedStep::restore_versions() noexcept {
  if (!versions_are_bumped_) return;
  versions_are_bumped_ = false;
  auto next_changed = vectors_->changed.begin();  // in order
  for (size_t i = 0; i < plan_->slots.size(); ++i) {
    if (next_changed != vectors_->changed.end() && *next_changed == i) {
      ++next_changed;
      continue;
    }
    const auto restore = [](c10::TensorImpl* written) {
      if (written == nullptr || written->is_inference()) return;
      c10::VariableVersion counter = written->version_counter();
      counter.set_version(static_cast<int64_t>(counter.current_version()) - 1);
    };
    if (plan_->tensors[i].param == nullptr) continue;
    restore(plan_->listed(i).unsafeGetTensorImpl());
    for (int k = 0; k < kMaxStates; ++k) {
      restore(counter_of(i, plan_->rule->state_keys[k], plan_->tensors[i].states[k]));
    }
  }
}

void PreparedStep::update_cpu(const StepNumbers& numbers) {
  const Plan& plan = *plan_;
  const bool release = plan.first_element.back() >= kElementsToReleaseGil;
  if (release) keep_alive();
  TensorTable table = {plan.entries.data(), plan.first_element.data(),
                       static_cast<int64_t>(plan.slots.size())};
  if (!vectors_->shares.empty()) {
    std::vector<TensorEntry>& entries = vectors_->cpu_entries;
    std::vector<int64_t>& first_element = vectors_->cpu_first_element;
    first_element.assign(1, 0);
    for (size_t i = 0; i < plan.slots.size(); ++i) {
      if (plan.tensors[i].param == nullptr || plan.slots[i].device != kCpu) continue;
      entries.push_back(plan.entries[i]);
      first_element.push_back(first_element.back() + plan.entries[i].numel);
    }
    table.entries = entries.data();
    table.first_element = first_element.data();
    table.num_entries = static_cast<int64_t>(entries.size());
  }
  const GilReleased released(release);
  plan.rule->step_on_cpu(table, numbers, in_order_ ? 1 : max_threads());
}

void PreparedStep::keep_alive() {
  if (std::exchange(keeps_all_, true)) return;
  for (size_t i = 0; i < plan_->slots.size(); ++i) binding::keep_alive(*vectors_, *plan_, i);
}

// Only gradients whose storage has other owners can lie in another slot's parameter or buffer.
bool PreparedStep::some_grad_meets_another_slot() const {
  for (const size_t i : vectors_->shared_grads) {
    const TensorEntry& entry = plan_->entries[i];
    if (entry.numel == 0) continue;
    if (plan_->written.meets_another(plan_->slots[i].bytes_of_grad(entry.grad), i)) return true;
  }
  return false;
}

py::object step(Plan& plan, const py::list& param_groups, const py::dict& state,
                bool all_by_torch) {
  PreparedStep prepared(plan, param_groups, state, {all_by_torch});
  if (prepared.needs_torch()) {
    prepared.keep_plan();
    return py::cast(std::move(prepared));
  }
  prepared.run({});
  return py::none();
}

}  // namespace momentum_ext::binding
