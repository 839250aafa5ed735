#include "plan.h"

#include <algorithm>
#include <string>

#include "step_vectors.h"

namespace momentum_ext::binding {

Plan::Plan(const std::string& rule_name, std::string name_)
    : name(std::move(name_)),
      rule(make_rule_groups(rule_name)),
      spare_vectors(std::make_unique<StepVectors>()) {}
Plan::~Plan() = default;

void Plan::compare(const py::list& param_groups, const py::dict& state) {
  const bool same_groups = read_groups(param_groups);
  if (!same_groups || !read_state(state.ptr())) rebuild(state.ptr());
}

// Reads hyperparameters and parameter lists; false when the lists are not those of the plan.
bool Plan::read_groups(const py::list& param_groups) {
  const size_t num_groups = param_groups.size();
  if (readers.size() != num_groups) {
    readers.clear();
    readers.resize(num_groups);
    rule->resize(num_groups);
  }
  groups.resize(num_groups);
  params_.resize(num_groups);
  bool same = first_slot.size() == num_groups + 1;
  for (size_t g = 0; g < num_groups; ++g) {
    groups[g] = PyList_GET_ITEM(param_groups.ptr(), g);
    params_[g] = PyDict_Check(groups[g]) ? readers[g].compare(groups[g]) : nullptr;
    if (params_[g] == nullptr) params_[g] = parse_group(g);
    if (!PyList_Check(params_[g]) && !PyTuple_Check(params_[g])) {
      throw py::type_error("param_groups[" + std::to_string(g) +
                           "]['params']: expected a list of tensors, got " +
                           Py_TYPE(params_[g])->tp_name);
    }
    same = same && is_same_list(g);
  }
  return same;
}

PyObject* Plan::parse_group(size_t g) {
  if (!PyDict_Check(groups[g])) {
    throw py::type_error("param_groups[" + std::to_string(g) + "]: expected a dict, got " +
                         Py_TYPE(groups[g])->tp_name);
  }
  const Storage storage = readers[g].storage();
  PyObject* const params = rule->parse(readers[g], groups[g], g);
  // What the group wants of its tensors is no longer what they were examined for.
  const size_t end = g + 1 < first_slot.size() ? first_slot[g + 1] : 0;
  for (size_t i = g < first_slot.size() ? first_slot[g] : 0; i < end; ++i) {
    if (!(storage == readers[g].storage())) slots[i].path = Path::kUnknown;
  }
  return params;
}

// True when a group's list has the plan's parameters.
bool Plan::is_same_list(size_t g) const {
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(params_[g]));
  return count == first_slot[g + 1] - first_slot[g] &&
         std::equal(param_objects.begin() + static_cast<ptrdiff_t>(first_slot[g]),
                    param_objects.begin() + static_cast<ptrdiff_t>(first_slot[g + 1]),
                    PySequence_Fast_ITEMS(params_[g]));
}

// Finds each parameter's state dict; false when the state's keys are not those of the plan, in the
// same order.
bool Plan::read_state(PyObject* state) {
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  size_t n = 0;
  for (; PyDict_Next(state, &position, &key, &value); ++n) {
    if (n == state_keys_.size() || key != state_keys_[n].first) return false;
    if (const ptrdiff_t slot = state_keys_[n].second; slot >= 0) slots[slot].state_dict = value;
  }
  if (n != state_keys_.size()) return false;
  for (const auto& [slot, first] : repeated_) slots[slot].state_dict = slots[first].state_dict;
  return true;
}

void Plan::rebuild(PyObject* state) {
  for (size_t i = 0; i < slots.size(); ++i) {
    formulation_of_[param_objects[i]] = slots[i].formulation;
  }
  slots.clear();
  param_objects.clear();
  first_slot.assign(1, 0);
  repeated_.clear();
  memory_has_changed = true;
  std::unordered_map<PyObject*, size_t> slot_of;
  for (size_t g = 0; g < params_.size(); ++g) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(params_[g]);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const param = PySequence_Fast_GET_ITEM(params_[g], i);
      Slot slot;
      slot.group = static_cast<uint32_t>(g);
      slot.index = static_cast<uint32_t>(i);
      const auto known = formulation_of_.find(param);
      slot.formulation =
          known != formulation_of_.end() ? known->second : readers[g].buffer_formulation();
      const auto [first, is_new] = slot_of.try_emplace(param, slots.size());
      if (!is_new) {
        slot.is_repeated = true;
        slots[first->second].is_repeated_later = true;
        repeated_.emplace_back(slots.size(), first->second);
      }
      slots.push_back(std::move(slot));
      param_objects.push_back(param);
    }
    first_slot.push_back(slots.size());
  }
  tensors.assign(slots.size(), {});
  entries.assign(slots.size(), {});
  counters.assign(rule->num_counters != 0 ? slots.size() : 0, {});
  low_precision.assign(slots.size(), {});
  companion_tensors.assign(slots.size(), {});
  has_low_precision = false;
  first_element.assign(slots.size() + 1, 0);
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
  // A parameter that is in no group now keeps its formulation for when it comes back. As long as
  // the state holds it, no other tensor has its address.
  std::unordered_map<PyObject*, Formulation> away;
  for (const auto& [param, slot] : state_keys_) {
    const auto known = formulation_of_.find(param);
    if (slot < 0 && known != formulation_of_.end()) away.insert(*known);
  }
  formulation_of_ = std::move(away);
}

void Plan::adopt(const py::list& param_groups) {
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::dict group = param_groups[g];
    const Formulation formulation = read_buffer_formulation(group.ptr(), g);
    for (const py::handle param : group["params"]) formulation_of_[param.ptr()] = formulation;
  }
}

bool Plan::has_moved(const py::list& param_groups) const {
  std::unordered_map<PyObject*, Formulation> known = formulation_of_;
  for (size_t i = 0; i < slots.size(); ++i) known[param_objects[i]] = slots[i].formulation;
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::dict group = param_groups[g];
    const Formulation stored = read_buffer_formulation(group.ptr(), g);
    for (const py::handle param : group["params"]) {
      const auto found = known.find(param.ptr());
      if (found != known.end() && found->second != stored) return true;
    }
  }
  return false;
}

void Plan::note_converted() {
  for (size_t g = 0; g < readers.size(); ++g) {
    if (rule->num_states(g) == 0) continue;
    const Formulation formulation = readers[g].formulation();
    if (readers[g].buffer_formulation() != formulation) readers[g].note_converted(groups[g]);
    for (size_t i = first_slot[g]; i < first_slot[g + 1]; ++i) slots[i].formulation = formulation;
  }
}

void Plan::find_shared_memory() {
  written.clear();
  for (size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    if (slot.path != Path::kContiguous && slot.path != Path::kLayout) continue;
    written.add(slot.bytes_of_param(), i);
    for (int k = 0; k < slot.num_states; ++k) written.add(slot.bytes_of_state(k), i);
    if (slot.companions == nullptr) continue;
    const Companions& all = *slot.companions;
    for (const Companion* const each :
         {&all.master, &all.scales[0], &all.scales[1], &all.scales[2]}) {
      if (each->key == nullptr) continue;
      written.add(
          {each->data, num_bytes(each->shape, static_cast<int64_t>(each->dtype.itemsize()))}, i);
    }
  }
  written.close();
  memory_has_changed = false;
}

}  // namespace momentum_ext::binding
