// The flow of a step: read, compare, update.
#include "step_plan.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <unordered_map>

#include "../momentum.h"

namespace momentum_ext::binding {
namespace {

// Fewer tensors than this for each thread are looked at faster than another thread wakes up.
constexpr int64_t kSlotsPerThread = 96;

// From this many elements on the GIL is released while the kernel runs. Fewer take a small part of
// the interpreter's own switch interval of 5 ms, and releasing means holding references to all
// tensors.
constexpr int64_t kElementsToReleaseGil = 1 << 21;

class GilReleased {
 public:
  explicit GilReleased(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~GilReleased() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

std::unique_lock<std::mutex> lock_without_gil(std::mutex& mutex) {
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) {
    const GilReleased released(true);
    lock.lock();
  }
  return lock;
}

}  // namespace

// ---- the two halves of a step -------------------------------------------------------------------

py::object StepPlan::step(const py::list& param_groups, const py::dict& state,
                          double inv_grad_scale, bool all_for_torch) {
  const auto lock = lock_without_gil(mutex_);
  prepare(param_groups, state, inv_grad_scale, all_for_torch);
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
}

void StepPlan::run() {
  const auto lock = lock_without_gil(mutex_);
  update();
}

void StepPlan::discard() {
  round_end_.clear();
  new_buffers_.clear();
  resolved_grads_.clear();
  for_torch_.clear();
  kept_alive_.clear();
}

void StepPlan::prepare(const py::list& param_groups, const py::dict& state, double inv_grad_scale,
                       bool all_for_torch) {
  discard();
  state_ = state.ptr();
  all_for_torch_ = all_for_torch;
  const bool same_groups = read_groups(param_groups, inv_grad_scale);
  if (!same_groups || !read_state(state_)) rebuild(state_);
  check_slots();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (status_[i] == Status::kNeedsCare) prepare_slot(i);
    first_element_[i + 1] = first_element_[i] + entries_[i].numel;
  }
  if (ranges_changed_) assign_rounds();
  if (num_rounds_ == 1) {
    round_end_.push_back(slots_.size());
  } else {
    sort_into_rounds();
  }
}

void StepPlan::update() {
  if (round_end_.empty()) return;  // nothing is prepared
  insert_new_buffers();
  const int threads = max_threads();
  cpu::parallel_for(static_cast<int64_t>(slots_.size()), kSlotsPerThread, threads,
                    [this](int64_t begin, int64_t end) { bump_versions(begin, end); });

  const bool release = first_element_[slots_.size()] >= kElementsToReleaseGil;
  if (release) keep_alive();
  {
    const GilReleased released(release);
    size_t begin = 0;
    for (const size_t end : round_end_) {
      cpu::step(table_of_round(begin, end), threads);
      begin = end;
    }
  }
  discard();
}

// Through the dict's own __setitem__: an OrderedDict keeps more than its items.
void StepPlan::insert_new_buffers() {
  for (const NewBuffer& made : new_buffers_) {
    const Slot& slot = slots_[made.slot];
    const auto buffer = py::reinterpret_steal<py::object>(THPVariable_Wrap(made.tensor));
    py::object fresh;
    PyObject* target = slot.state_dict;
    if (target == nullptr) {
      fresh = py::dict();
      target = fresh.ptr();
      if (PyObject_SetItem(state_, slot.param_object, target) != 0) throw py::error_already_set();
    }
    if (PyObject_SetItem(target, buffer_key_, buffer.ptr()) != 0) {
      throw py::error_already_set();
    }
  }
}

// Autograd must know that these tensors have changed. Inference tensors have no version to bump.
void StepPlan::bump_versions(int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Tensors& tensors = tensors_[i];
    if (tensors.param == nullptr) continue;
    if (!tensors.param->is_inference()) tensors.param->bump_version();
    if (tensors.buffer != nullptr && !tensors.buffer->is_inference())
      tensors.buffer->bump_version();
  }
}

// Holds on to this step's tensors while other code may run: Python's, or another thread's.
void StepPlan::keep_alive() {
  if (!kept_alive_.empty()) return;
  for (const Tensors& tensors : tensors_) {
    for (c10::TensorImpl* tensor : {tensors.param, tensors.grad, tensors.buffer}) {
      if (tensor == nullptr) continue;
      kept_alive_.emplace_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor),
                               tensor->unsafe_storage());
    }
  }
}

// ---- comparing the optimizer with the plan ------------------------------------------------------

// Reads hyperparameters and parameter lists; false when the lists are not those of the plan.
bool StepPlan::read_groups(const py::list& param_groups, double inv_grad_scale) {
  const size_t num_groups = param_groups.size();
  bool same = readers_.size() == num_groups && first_slot_.size() == num_groups + 1;
  if (readers_.size() != num_groups) {
    readers_.clear();
    readers_.resize(num_groups);
    hyperparams_.resize(num_groups);
  }
  params_.clear();
  for (size_t g = 0; g < num_groups; ++g) {
    PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
    if (!PyDict_Check(group)) {
      throw py::type_error("param_groups[" + std::to_string(g) + "]: expected a dict, got " +
                           Py_TYPE(group)->tp_name);
    }
    PyObject* const params = readers_[g].read(group, g, inv_grad_scale, hyperparams_[g]);
    if (!PyList_Check(params) && !PyTuple_Check(params)) {
      throw py::type_error("param_groups[" + std::to_string(g) +
                           "]['params']: expected a list of tensors, got " +
                           Py_TYPE(params)->tp_name);
    }
    params_.push_back(params);
    if (!same) continue;
    const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(params));
    PyObject** const items = PySequence_Fast_ITEMS(params);
    same = count == first_slot_[g + 1] - first_slot_[g];
    for (size_t i = 0; same && i < count; ++i) {
      same = items[i] == slots_[first_slot_[g] + i].param_object;
    }
  }
  return same;
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
  slots_.clear();
  first_slot_.assign(1, 0);
  repeated_.clear();
  ranges_changed_ = true;
  std::unordered_map<PyObject*, size_t> slot_of;
  for (size_t g = 0; g < params_.size(); ++g) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(params_[g]);
    for (Py_ssize_t i = 0; i < count; ++i) {
      Slot slot;
      slot.param_object = PySequence_Fast_GET_ITEM(params_[g], i);
      slot.group = static_cast<uint32_t>(g);
      slot.index = static_cast<uint32_t>(i);
      const auto [first, is_new] = slot_of.try_emplace(slot.param_object, slots_.size());
      if (!is_new) repeated_.emplace_back(slots_.size(), first->second);
      slots_.push_back(std::move(slot));
    }
    first_slot_.push_back(slots_.size());
  }
  status_.assign(slots_.size(), Status::kNeedsCare);
  tensors_.assign(slots_.size(), {});
  entries_.assign(slots_.size(), {});
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
}

// A quick look at all slots: are they as the plan says? Only reads, so that several threads can
// look; the GIL stays with the calling thread, which waits.
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
            status_[i] = needs_torch ? Status::kNeedsCare : check_slot(i, has_momentum);
          }
        }
      });
}

}  // namespace momentum_ext::binding
