// The flow of a step: read, compare, update.
#include "step_plan.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "../momentum.h"
#include "step_plan_turn.h"

namespace momentum_ext::binding {
namespace {

// Fewer tensors than this for each thread are looked at faster than another thread wakes up.
constexpr int64_t kSlotsPerThread = 256;
constexpr int64_t kGroupsPerThread = 96;

// From this many elements on the GIL is released while the kernel runs. Fewer take a small part of
// the interpreter's own switch interval of 5 ms, and releasing means holding references to all
// tensors.
constexpr int64_t kElementsToReleaseGil = 1 << 21;

void check_is_list(PyObject* params, size_t group) {
  if (PyList_Check(params) || PyTuple_Check(params)) return;
  throw py::type_error("param_groups[" + std::to_string(group) +
                       "]['params']: expected a list of tensors, got " + Py_TYPE(params)->tp_name);
}

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

// ---- the two halves of a step -------------------------------------------------------------------

py::object StepPlan::step(const py::list& param_groups, const py::dict& state,
                          double inv_grad_scale, bool all_for_torch, ScalerTensors scaler) {
  const Turn turn(*this);
  if (is_prepared_ && half_done_by_ != std::this_thread::get_id()) {
    throw std::runtime_error(
        "another thread is in the middle of a step() of the same optimizer; let it finish first");
  }
  try {
    scaler_ = std::move(scaler);
    prepare(param_groups, state, inv_grad_scale, all_for_torch);
    if (scaler_.any() && host_must_know()) {
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
  if (half_done_by_ == std::this_thread::get_id()) clear_step();
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
  is_prepared_ = false;
  scaler_ = {};
  state_ = py::object();
  new_state_.clear();
  newly_stored_.clear();
  conversions_.clear();
  without_average_.clear();
  averaged_by_torch_.clear();
  resolved_grads_.clear();
  for_torch_.clear();
  kept_alive_.clear();
}

void StepPlan::prepare(const py::list& param_groups, const py::dict& state, double inv_grad_scale,
                       bool all_for_torch) {
  ScalerTensors scaler = std::move(scaler_);
  clear_step();
  scaler_ = std::move(scaler);
  state_ = state;
  all_for_torch_ = all_for_torch;
  const bool same_groups = read_groups(param_groups, inv_grad_scale);
  for (const GroupReader& reader : readers_) {
    if (!reader.in_train_mode()) {
      throw std::runtime_error(
          "step(): the parameters are where optimizer.eval() has moved them, not where the "
          "gradients belong; call optimizer.train() before the backward pass");
    }
  }
  if (!same_groups || !read_state(state_.ptr())) rebuild(state_.ptr());
  check_slots();
  bool any_shared_grad = false;
  shares_.clear();
  first_steps_.begin_step();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (status_[i] == Status::kNeedsCare) prepare_slot(i);
    any_shared_grad = any_shared_grad || status_[i] == Status::kSharedGrad;
    TensorEntry& entry = entries_[i];
    int64_t numel_on_cpu = entry.numel;
    if (entry.device != kCpu && numel_on_cpu != 0) {
      numel_on_cpu = 0;
      entry.cohort = first_steps_.still_open(entry.cohort, entry.device);
      share_of(shares_, entry.device).add(entry);
    }
    first_element_[i + 1] = first_element_[i] + numel_on_cpu;
  }
  if (!shares_.empty()) refuse_random_capture();
  for (const DeviceShare& share : shares_) {
    if (share.newest_cohort != 0) {
      separate_first_steps();
      break;
    }
  }
  if (average_weight_ != 0 || has_averages_) attach_averages();
  has_averages_ = average_weight_ != 0;
  if (ranges_changed_) find_shared_memory();
  in_order_ = ranges_meet_ || (any_shared_grad && some_grad_meets_another_slot());
  half_done_by_ = std::this_thread::get_id();
  is_prepared_ = true;
}

void StepPlan::update() {
  if (!new_state_.empty() || !without_average_.empty()) keep_alive();  // Python code is called
  insert_new_state();
  std::optional<at::RecordFunction> range;
  if (at::hasCallbacks()) begin_range(range);
  const int threads = max_threads();
  const auto num_slots = static_cast<int64_t>(slots_.size());
  try {
    make_averages();
    convert_prepared();
    cpu::parallel_for(num_slots, kSlotsPerThread, threads,
                      [this](int64_t begin, int64_t end) { bump_versions(begin, end); });
    if (scaler_.average.count.defined()) count_average(scaler_);
    for (const DeviceShare& share : shares_) {
      launch({entries_.data(), nullptr, num_slots, hyperparams_.data(), average_weight_,
              rounding_step_},
             share, scaler_, first_steps_, in_order_);
    }
  } catch (...) {  // else the next step would find buffers that were never computed
    take_back_new_state(new_state_.size());
    throw;
  }
  for (const NewState& made : new_state_) {
    if (made.cohort != 0) first_steps_.add(made.tensor, made.cohort, made.device);
  }
  if (first_element_[slots_.size()] != 0) update_cpu();
  if (!averaged_by_torch_.empty()) update_averages_by_torch();
  for (const size_t i : newly_stored_) slots_[i].storage = readers_[slots_[i].group].storage();
  ++rounding_step_;
  clear_step();
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
  const at::Tensor& count = scaler_.average.count;
  if (count.defined()) {
    for (const DeviceShare& share : shares_) {
      if (share.device != count.device().index()) return true;
    }
  }
  const bool averages_wait = scaler_.found_inf.defined() || count.defined();
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
  TensorTable table = {
      entries_.data(),     first_element_.data(), static_cast<int64_t>(slots_.size()),
      hyperparams_.data(), average_weight_,       rounding_step_};
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

// Through the dict's own __setitem__ (an OrderedDict keeps more than its items), which may run
// Python code and raise: then what was inserted is taken back, so that no step can find state that
// was never computed.
void StepPlan::insert_new_state() {
  for (size_t k = 0; k < new_state_.size(); ++k) {
    NewState& made = new_state_[k];
    try {
      const auto key = py::reinterpret_borrow<py::object>(made.key);
      const bool has_dict = made.state_dict || PyDict_Contains(state_.ptr(), made.param.ptr()) == 1;
      if (!has_dict) state_[made.param] = py::dict();
      const py::dict target = made.state_dict ? py::reinterpret_borrow<py::dict>(made.state_dict)
                                              : py::dict(state_[made.param]);
      if (target.contains(key)) made.replaced = target[key];
      if (made.tensor.defined()) {
        target[key] = py::reinterpret_steal<py::object>(THPVariable_Wrap(made.tensor));
      } else if (made.replaced && PyObject_DelItem(target.ptr(), key.ptr()) != 0) {
        throw py::error_already_set();
      }
    } catch (...) {
      take_back_new_state(k + 1);
      throw;
    }
  }
}

void StepPlan::take_back_new_state(size_t count) noexcept {
  const py::error_scope keep_the_error;
  for (size_t k = count; k-- > 0;) {
    const NewState& made = new_state_[k];
    int failed = 0;
    if (!made.state_dict) {
      failed = PyObject_DelItem(state_.ptr(), made.param.ptr());
    } else if (made.replaced) {
      failed = PyObject_SetItem(made.state_dict.ptr(), made.key, made.replaced.ptr());
    } else {
      failed = PyObject_DelItem(made.state_dict.ptr(), made.key);
    }
    if (failed != 0) PyErr_Clear();  // it was not there yet
  }
}

// Autograd must know that these tensors have changed. Inference tensors have no version to bump.
void StepPlan::bump_versions(int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Tensors& tensors = tensors_[i];
    if (tensors.param == nullptr) continue;
    const auto bump = [](c10::TensorImpl* written) {
      if (written != nullptr && !written->is_inference()) written->bump_version();
    };
    bump(tensors.param);
    bump(tensors.buffer);
    bump(tensors.average);
    if (!any_low_precision_) continue;
    bump(more_tensors_[i].master);
    bump(more_tensors_[i].scale);
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

// ---- comparing the optimizer with the plan ------------------------------------------------------

// Reads hyperparameters and parameter lists; false when the lists are not those of the plan.
bool StepPlan::read_groups(const py::list& param_groups, double inv_grad_scale) {
  const size_t num_groups = param_groups.size();
  if (readers_.size() != num_groups) {
    readers_.clear();
    readers_.resize(num_groups);
    hyperparams_.resize(num_groups);
  }
  // Most groups are as they were, which several threads can see; what has changed is read in order.
  groups_.resize(num_groups);
  params_.resize(num_groups);
  cpu::parallel_for(static_cast<int64_t>(num_groups), kGroupsPerThread, max_threads(),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t g = begin; g < end; ++g) {
                        groups_[g] = PyList_GET_ITEM(param_groups.ptr(), g);
                        params_[g] =
                            PyDict_Check(groups_[g]) ? readers_[g].compare(groups_[g]) : nullptr;
                      }
                    });
  bool same = first_slot_.size() == num_groups + 1;
  for (size_t g = 0; g < num_groups; ++g) {
    if (params_[g] == nullptr) params_[g] = parse_group(g);
    check_is_list(params_[g], g);
    readers_[g].scale(inv_grad_scale, hyperparams_[g]);
    same = same && is_same_list(g);
  }
  return same;
}

PyObject* StepPlan::parse_group(size_t g) {
  PyObject* const group = groups_[g];
  if (!PyDict_Check(group)) {
    throw py::type_error("param_groups[" + std::to_string(g) + "]: expected a dict, got " +
                         Py_TYPE(group)->tp_name);
  }
  return readers_[g].parse(group, g, hyperparams_[g]);
}

// True when a group's list has the plan's parameters.
bool StepPlan::is_same_list(size_t g) const {
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(params_[g]));
  return count == first_slot_[g + 1] - first_slot_[g] &&
         std::equal(param_objects_.begin() + static_cast<ptrdiff_t>(first_slot_[g]),
                    param_objects_.begin() + static_cast<ptrdiff_t>(first_slot_[g + 1]),
                    PySequence_Fast_ITEMS(params_[g]));
}

// Finds each parameter's state dict; false when the state's keys are not those of the plan, in the
// same order.
bool StepPlan::read_state(PyObject* state) {
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  size_t n = 0;
  for (; PyDict_Next(state, &position, &key, &value); ++n) {
    if (n == state_keys_.size() || key != state_keys_[n].first) return false;
    if (const ptrdiff_t slot = state_keys_[n].second; slot >= 0) slots_[slot].state_dict = value;
  }
  if (n != state_keys_.size()) return false;
  for (const auto& [slot, first] : repeated_) slots_[slot].state_dict = slots_[first].state_dict;
  return true;
}

void StepPlan::rebuild(PyObject* state) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    stored_as_[param_objects_[i]] = {slots_[i].formulation, slots_[i].storage};
  }
  slots_.clear();
  param_objects_.clear();
  first_slot_.assign(1, 0);
  repeated_.clear();
  ranges_changed_ = true;
  std::unordered_map<PyObject*, size_t> slot_of;
  for (size_t g = 0; g < params_.size(); ++g) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(params_[g]);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const param = PySequence_Fast_GET_ITEM(params_[g], i);
      Slot slot;
      slot.group = static_cast<uint32_t>(g);
      slot.index = static_cast<uint32_t>(i);
      slot.formulation = readers_[g].formulation();
      if (const auto known = stored_as_.find(param); known != stored_as_.end()) {
        slot.formulation = known->second.formulation;
        slot.storage = known->second.storage;
      }
      const auto [first, is_new] = slot_of.try_emplace(param, slots_.size());
      if (!is_new) repeated_.emplace_back(slots_.size(), first->second);
      slots_.push_back(std::move(slot));
      param_objects_.push_back(param);
    }
    first_slot_.push_back(slots_.size());
  }
  status_.assign(slots_.size(), Status::kNeedsCare);
  tensors_.assign(slots_.size(), {});
  entries_.assign(slots_.size(), {});
  low_precision_.assign(slots_.size(), {});
  more_tensors_.assign(slots_.size(), {});
  any_low_precision_ = false;
  first_element_.assign(slots_.size() + 1, 0);
  state_keys_.clear();
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    const auto found = slot_of.find(key);
    state_keys_.emplace_back(key,
                             found == slot_of.end() ? -1 : static_cast<ptrdiff_t>(found->second));
  }
  read_state(state);
  // A parameter that is in no group now keeps how its state is stored for when it comes back. As
  // long as the state holds it, no other tensor has its address.
  std::unordered_map<PyObject*, StoredAs> away;
  for (const auto& [param, slot] : state_keys_) {
    const auto known = stored_as_.find(param);
    if (slot < 0 && known != stored_as_.end()) away.insert(*known);
  }
  stored_as_ = std::move(away);
}

// A quick look at all slots: are they as the plan says? Writes nothing but the plan, so that
// several threads can look; the GIL stays with the calling thread, which waits.
void StepPlan::check_slots() {
  cpu::parallel_for(
      static_cast<int64_t>(slots_.size()), kSlotsPerThread, max_threads(),
      [this](int64_t begin, int64_t end) {
        auto i = static_cast<size_t>(begin);
        auto g = static_cast<size_t>(std::upper_bound(first_slot_.begin(), first_slot_.end(), i) -
                                     first_slot_.begin() - 1);
        for (; i < static_cast<size_t>(end); ++g) {
          const bool has_momentum = hyperparams_[g].has_momentum;
          const bool needs_torch = all_for_torch_ || readers_[g].needs_torch();
          const size_t stop = std::min(first_slot_[g + 1], static_cast<size_t>(end));
          for (; i < stop; ++i) {
            status_[i] =
                needs_torch ? Status::kNeedsCare : check_slot(i, has_momentum, readers_[g]);
          }
        }
      });
}

}  // namespace momentum_ext::binding
