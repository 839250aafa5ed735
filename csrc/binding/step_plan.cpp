// The flow of a step: read, compare, update.
#include "step_plan.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "../cpu/backend.h"
#include "step_plan_turn.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

// From this many elements on the GIL is released while the kernel runs. Fewer take a small part of
// the interpreter's own switch interval of 5 ms, and releasing means holding references to all
// tensors.
constexpr int64_t kElementsToReleaseGil = 1 << 21;

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

// ---- the two halves of a step -------------------------------------------------------------------

py::object StepPlan::step(const py::list& param_groups, const py::dict& state, Options options) {
  const Turn turn(*this);
  if (is_prepared_ && half_done_by_ != std::this_thread::get_id()) {
    throw std::runtime_error(
        "another thread is in the middle of a step() of the same optimizer; let it finish first");
  }
  try {
    clear_step();
    options_ = std::move(options);
    options_.all_for_torch = options_.all_for_torch || operators_are_watched();
    prepare(param_groups, state);
    if (options_.scaler.any() && host_must_know()) {
      clear_step();
      return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    }
    if (for_torch_.empty()) {
      update();
      return py::none();
    }
    keep_alive();  // the caller runs Python code before it comes back
    py::list positions;
    for (const size_t i : for_torch_) {
      positions.append(py::make_tuple(slots_[i].group, slots_[i].index));
    }
    return positions;
  } catch (...) {
    clear_step();
    throw;
  }
}

// The step's first writes.
void StepPlan::begin_torch_step() {
  if (is_new_state_inserted_) return;
  if (!new_state_.empty() || !without_average_.empty()) keep_alive();  // Python code is called
  insert_new_state();
  is_new_state_inserted_ = true;
  make_averages();
}

void StepPlan::run() {
  const Turn turn(*this);
  if (!is_prepared_ || half_done_by_ != std::this_thread::get_id()) {
    throw std::runtime_error("run(): this thread has no step that is prepared");
  }
  try {
    update();
  } catch (...) {
    clear_step();
    throw;
  }
}

void StepPlan::discard() {
  const Turn turn(*this);
  if (half_done_by_ != std::this_thread::get_id()) return;
  if (is_new_state_inserted_) take_back_new_state(new_state_.size());
  clear_step();
}

py::list StepPlan::unstarted_buffers() {
  const Turn turn(*this);
  py::list buffers;
  for (const at::Tensor& buffer : first_steps_.unstarted()) {
    buffers.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer)));
  }
  return buffers;
}

void StepPlan::clear_step() {
  restore_versions();
  is_prepared_ = false;
  is_new_state_inserted_ = false;
  converts_ = false;
  options_ = {};
  state_ = py::object();
  new_state_.clear();
  without_average_.clear();
  averaged_by_torch_.clear();
  resolved_grads_.clear();
  for_torch_.clear();
  kept_alive_.clear();
}

void StepPlan::prepare(const py::list& param_groups, const py::dict& state) {
  compare(param_groups, state);
  shares_.clear();
  first_steps_.begin_step();
  check_slots();
  if (!careful_.empty()) {
    for (const size_t i : careful_) prepare_slot(i);
    shares_.clear();
    for (size_t i = 0; i < slots_.size(); ++i) lay_out(i);
  }
  if (!shares_.empty()) refuse_random_capture();
  for (const DeviceShare& share : shares_) {
    if (share.newest_cohort != 0) {
      separate_first_steps();
      break;
    }
  }
  if (ranges_changed_) find_shared_memory();
  in_order_ = ranges_meet_ || (!shared_grads_.empty() && some_grad_meets_another_slot());
  if (options_.average_weight.has_value() || has_averages_) attach_averages();
  has_averages_ = options_.average_weight.has_value();
  half_done_by_ = std::this_thread::get_id();
  is_prepared_ = true;
}

// Brings the plan up to the optimizer's groups, parameter lists and state.
void StepPlan::compare(const py::list& param_groups, const py::dict& state) {
  state_ = state;
  const bool same_groups = read_groups(param_groups, options_.inv_grad_scale);
  if (!same_groups || !read_state(state_.ptr())) rebuild(state_.ptr());
}

void StepPlan::update() {
  try {
    begin_torch_step();
    std::optional<at::RecordFunction> range;
    if (at::hasCallbacks()) begin_range(range);
    bump_versions();
    if (options_.scaler.average.count.defined()) count_average(options_.scaler);
    const auto num_slots = static_cast<int64_t>(slots_.size());
    for (const DeviceShare& share : shares_) {
      launch({{entries_.data(), nullptr, num_slots},
              hyperparams_.data(),
              options_.average_weight.value_or(0),
              rounding_step_},
             share, options_.scaler, first_steps_, in_order_);
    }
  } catch (...) {  // else the next step would find buffers that were never computed
    if (is_new_state_inserted_) take_back_new_state(new_state_.size());
    throw;
  }
  for (const NewState& made : new_state_) {
    if (made.cohort != 0) first_steps_.add(made.tensor, made.cohort, made.device);
  }
  if (first_element_[slots_.size()] != 0) update_cpu();
  if (!averaged_by_torch_.empty()) update_averages_by_torch();
  if (converts_) note_converted();
  // A step with lr 0 in every group is how torch.distributed.checkpoint makes a fresh optimizer's
  // state: nothing was trained.
  const auto is_idle = [](const GroupReader& reader) { return reader.lr_is_zero(); };
  if (!std::all_of(readers_.begin(), readers_.end(), is_idle)) ++rounding_step_;
  clear_step();
}

// From now on the buffers are in their group's formulation.
void StepPlan::note_converted() {
  for (size_t g = 0; g < readers_.size(); ++g) {
    if (!hyperparams_[g].has_momentum) continue;
    const Formulation formulation = readers_[g].formulation();
    if (readers_[g].buffer_formulation() != formulation) readers_[g].note_converted(groups_[g]);
    for (size_t i = first_slot_[g]; i < first_slot_[g + 1]; ++i) {
      slots_[i].formulation = formulation;
    }
  }
}

// A launch tells the device that the first steps of all tensors up to a cohort are done: none may
// be missing from it.
void StepPlan::separate_first_steps() {
  std::unordered_set<const c10::TensorImpl*> present;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (entries_[i].cohort != 0 && tensors_[i].param != nullptr) present.insert(tensors_[i].buffer);
  }
  const auto renumbered = first_steps_.separate(present);
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto found = renumbered.find(entries_[i].cohort);
    if (found != renumbered.end() && tensors_[i].param == nullptr) {
      entries_[i].cohort = found->second;
    }
  }
}

// Whether numbers that are on a device do not reach all that is to be updated.
bool StepPlan::host_must_know() const {
  if (has_cpu_tensors() || !for_torch_.empty()) return true;
  const at::Tensor& count = options_.scaler.average.count;
  if (count.defined()) {
    for (const DeviceShare& share : shares_) {
      if (share.device != count.device().index()) return true;
    }
  }
  const bool averages_wait = options_.scaler.found_inf.defined() || count.defined();
  return averages_wait && !averaged_by_torch_.empty();
}

bool StepPlan::has_cpu_tensors() const {
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (tensors_[i].param != nullptr && slots_[i].device == kCpu) return true;
  }
  return false;
}

void StepPlan::update_cpu() {
  const bool release = first_element_[slots_.size()] >= kElementsToReleaseGil;
  if (release) keep_alive();
  StepTable<Sgd> table = {
      {entries_.data(), first_element_.data(), static_cast<int64_t>(slots_.size())},
      hyperparams_.data(),
      options_.average_weight.value_or(0),
      rounding_step_};
  if (!shares_.empty()) {
    cpu_entries_.clear();
    cpu_first_element_.assign(1, 0);
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (tensors_[i].param == nullptr || slots_[i].device != kCpu) continue;
      cpu_entries_.push_back(entries_[i]);
      cpu_first_element_.push_back(cpu_first_element_.back() + entries_[i].numel);
    }
    table.entries = cpu_entries_.data();
    table.first_element = cpu_first_element_.data();
    table.num_entries = static_cast<int64_t>(cpu_entries_.size());
  }
  const GilReleased released(release);
  cpu::step(table, in_order_ ? 1 : max_threads());
}

void StepPlan::bump_versions() {
  versions_are_bumped_ = false;  // those of the other slots stay as they are now
  for (const size_t i : careful_) {
    bump_version(tensors_[i].param);
    bump_version(tensors_[i].buffer);
  }
  for (size_t i = 0; (has_averages_ || any_low_precision_) && i < tensors_.size(); ++i) {
    if (tensors_[i].param == nullptr) continue;
    bump_version(tensors_[i].average);
    bump_version(more_tensors_[i].master);
    bump_version(more_tensors_[i].scale);
  }
}

// Holds on to this step's tensors while other code may run: Python's, or another thread's.
void StepPlan::keep_alive() {
  if (!kept_alive_.empty()) return;
  const auto keep = [this](c10::TensorImpl* tensor) {
    if (tensor == nullptr) return;
    kept_alive_.emplace_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor),
                             tensor->unsafe_storage());
  };
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensors& tensors = tensors_[i];
    if (tensors.param == nullptr) continue;
    keep(tensors.param);
    keep(tensors.grad);
    keep(tensors.buffer);
    keep(tensors.average);
    if (!any_low_precision_) continue;
    keep(more_tensors_[i].master);
    keep(more_tensors_[i].scale);
  }
}

}  // namespace momentum_ext::binding
