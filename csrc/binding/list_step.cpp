#include "list_step.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/lerp.h>

#include <stdexcept>
#include <string>

#include "aliasing.h"

namespace momentum_ext::binding {
namespace {

std::string name_of(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

std::string name_of(Operand operand, size_t i) {
  return name_of(operand == kParam ? "params" : operand == kGrad ? "grads" : "momentum_buffers", i);
}

void check_length(const char* list, size_t length, size_t expected) {
  if (length == expected) return;
  throw std::runtime_error(std::string(list) + ": expected one for each of the " +
                           std::to_string(expected) + " parameters, got " + std::to_string(length));
}

void check_device(const at::Tensor& tensor, const at::Tensor& param, const std::string& name) {
  if (tensor.device() == param.device()) return;
  throw std::runtime_error(name + ": expected the device of its parameter, " +
                           param.device().str() + ", got " + tensor.device().str());
}

}  // namespace

ListStep::ListStep(const py::list& groups, Lists lists, double inv_grad_scale,
                   double average_weight)
    : lists_(std::move(lists)), average_weight_(average_weight), rule_(make_rule_groups("sgd")) {
  const size_t count = lists_.params.size();
  check_length("grads", lists_.grads.size(), count);
  check_length("momentum_buffers", lists_.momentum_buffers.size(), count);
  check_length("averages", lists_.averages.size(), count);
  check_length("is_first_step", lists_.is_first_step.size(), count);
  rule_->resize(groups.size());
  rule_->scale(inv_grad_scale);
  size_t i = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    GroupReader reader;
    PyObject* const params = rule_->parse(reader, groups[g].ptr(), g);
    const Py_ssize_t size = PyObject_Size(params);
    if (size < 0) throw py::error_already_set();
    for (size_t k = 0; k < static_cast<size_t>(size); ++k, ++i) {
      if (i >= count) check_length("params", count, i + 1);
      const std::optional<at::Tensor>& buffer = lists_.momentum_buffers[i];
      Operands operands{lists_.params[i],
                        lists_.grads[i],
                        {buffer.value_or(at::Tensor())},
                        buffer.has_value() ? 1 : 0};
      check(i, operands);
      if ((rule_->num_states(g) != 0) != buffer.has_value()) {
        throw std::runtime_error(name_of(operand_of_state(0), i) + ": expected " +
                                 (buffer.has_value() ? "none, because its group has no momentum"
                                                     : "a tensor, because its group has momentum"));
      }
      at::Tensor& grad = lists_.grads[i];
      if (grad.is_neg() || grad.is_conj()) operands.grad = grad = grad.resolve_conj().resolve_neg();
      std::unique_ptr<OwnedLayout> layout;
      const bool is_quantized = buffer.has_value() && has_blocks(buffer->scalar_type());
      const bool is_ours = !reader.needs_torch() && !is_quantized && has_kernel(operands);
      if (is_ours && !are_contiguous(operands)) layout = common_layout(operands);
      if (!is_ours || has_too_many_dims(layout.get(), *kernel_device(operands.param))) {
        fallback_.emplace_back(g, k);
        if (lists_.averages[i].has_value()) averaged_by_torch_.push_back(i);
        continue;
      }
      TensorEntry entry = entry_of(operands, layout.get());
      if (layout != nullptr) layouts_.push_back(std::move(layout));
      entry.group = static_cast<uint32_t>(g);
      entry.is_first_step = operands.num_states != 0 && lists_.is_first_step[i];
      add(i, entry);
    }
  }
  check_length("params", count, i);
}

void ListStep::check(size_t i, const Operands& operands) const {
  check_operands(operands, [i](Operand operand) { return name_of(operand, i); });
  check_device(operands.grad, operands.param, name_of(kGrad, i));
  if (operands.num_states != 0) {
    check_device(operands.states[0], operands.param, name_of(operand_of_state(0), i));
  }
  if (!lists_.averages[i].has_value()) return;
  const std::string name = name_of("averages", i);
  if (lists_.averages[i]->sizes() != operands.param.sizes()) {
    throw std::runtime_error(name + ": expected the shape of its parameter");
  }
  const auto name_of_average = [&](Operand operand) {
    return operand == operand_of_state(0) ? name : name_of(operand, i);
  };
  check_operands({operands.param, operands.grad, {*lists_.averages[i]}, 1}, name_of_average);
  check_device(*lists_.averages[i], operands.param, name);
  if (lists_.averages[i]->scalar_type() != operands.param.scalar_type()) {
    throw std::runtime_error(name + ": expected the dtype of its parameter");
  }
}

void ListStep::add(size_t i, TensorEntry entry) {
  if (entry.device != kCpu) {
    if (entry.is_first_step && is_capturing(entry.device)) {
      throw std::runtime_error(name_of(kParam, i) +
                               ": it has no momentum buffer yet, and the step is being captured "
                               "into a CUDA graph; run one step before the capture");
    }
    if (entry.numel != 0) share_of(shares_, entry.device).add(entry);
  }
  if (const std::optional<at::Tensor>& average = lists_.averages[i]; average.has_value()) {
    if (entry.device == kCpu && entry.layout == nullptr && lies_like(*average, lists_.params[i])) {
      entry.average = mutable_data_of(*average);
    } else {
      averaged_by_torch_.push_back(i);
    }
  }
  entries_.push_back(entry);
  updated_.push_back(i);
}

// True when what one tensor's update writes is another's: then the order shows.
bool ListStep::shares_memory() const {
  WrittenMemory written;
  for (const size_t i : updated_) {
    written.add(byte_range(lists_.params[i]), i);
    for (const auto* const list : {&lists_.momentum_buffers, &lists_.averages}) {
      if ((*list)[i].has_value()) written.add(byte_range(*(*list)[i]), i);
    }
  }
  written.close();
  if (written.meets_itself()) return true;
  for (const size_t i : updated_) {
    if (lists_.grads[i].numel() == 0) continue;
    if (written.meets_another(byte_range(lists_.grads[i]), i)) return true;
  }
  return false;
}

py::list ListStep::fallback() const {
  py::list positions;
  for (const auto& [group, index] : fallback_) positions.append(py::make_tuple(group, index));
  return positions;
}

void ListStep::run() {
  const py::gil_scoped_release released;
  const at::NoGradGuard no_grad;
  const bool in_order = shares_memory();
  if (in_order) {  // a later tensor may yet write to an earlier one's memory
    averaged_by_torch_.clear();
    for (size_t i = 0; i < lists_.averages.size(); ++i) {
      if (lists_.averages[i].has_value()) averaged_by_torch_.push_back(i);
    }
    for (TensorEntry& entry : entries_) entry.average = nullptr;
  }
  for (const size_t i : updated_) {
    bump_version(lists_.params[i].unsafeGetTensorImpl());
    for (const auto* const list : {&lists_.momentum_buffers, &lists_.averages}) {
      if ((*list)[i].has_value()) bump_version((*list)[i]->unsafeGetTensorImpl());
    }
  }
  const auto count = static_cast<int64_t>(entries_.size());
  FirstSteps first_steps;  // without a GradScaler the host knows them all
  for (const DeviceShare& share : shares_) {
    rule_->launch({entries_.data(), nullptr, count}, {}, share, {}, first_steps, in_order);
  }
  std::vector<TensorEntry> on_cpu;
  std::vector<int64_t> first_element{0};
  for (const TensorEntry& entry : entries_) {
    if (entry.device != kCpu) continue;
    on_cpu.push_back(entry);
    first_element.push_back(first_element.back() + entry.numel);
  }
  const int threads = in_order || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (first_element.back() != 0) {
    rule_->step_on_cpu({on_cpu.data(), first_element.data(), static_cast<int64_t>(on_cpu.size())},
                       {average_weight_}, threads);
  }
  average_by_torch();
}

void ListStep::average_by_torch() const {
  for (const size_t i : averaged_by_torch_) {
    const at::Tensor& average = *lists_.averages[i];
    if (average_weight_ == 1) {
      average.copy_(lists_.params[i]);
    } else {
      average.lerp_(lists_.params[i], average_weight_);
    }
  }
}

}  // namespace momentum_ext::binding
