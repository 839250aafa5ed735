#include "list_step.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/lerp.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "../cpu/backend.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

std::string name_of(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

std::string to_string(c10::IntArrayRef sizes) {
  std::ostringstream stream;
  stream << sizes;
  return stream.str();
}

void check_length(const char* list, size_t length, size_t expected) {
  if (length == expected) return;
  throw std::runtime_error(std::string(list) + ": expected one for each of the " +
                           std::to_string(expected) + " parameters, got " + std::to_string(length));
}

// Of a tensor of `list` that belongs to a parameter of these sizes.
void check_tensor(const at::Tensor& tensor, const at::Tensor& param, const std::string& name,
                  bool is_written) {
  if (tensor.sizes() != param.sizes()) {
    throw std::runtime_error(name + ": expected the shape of its parameter, " +
                             to_string(param.sizes()) + ", got " + to_string(tensor.sizes()));
  }
  if (tensor.device() != param.device()) {
    throw std::runtime_error(name + ": expected the device of its parameter, " +
                             param.device().str() + ", got " + tensor.device().str());
  }
  if (tensor.layout() != at::kStrided) return;
  if (is_written && overlaps_itself(tensor)) {
    throw std::runtime_error(name + ": several of its elements share one place in memory (shape " +
                             to_string(tensor.sizes()) + ", strides " +
                             to_string(tensor.strides()) +
                             "), so it cannot be updated in place; clone() it first");
  }
  if (is_written && tensor.is_inference() && !c10::InferenceMode::is_enabled()) {
    throw std::runtime_error(name +
                             ": an inference tensor cannot be updated outside "
                             "torch.inference_mode(); clone() it outside inference mode first");
  }
  check_memory(tensor, name);
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  return byte_range(a).overlaps(byte_range(b));
}

void* data_of(const at::Tensor& tensor) {
  return mutable_data_of(*tensor.unsafeGetTensorImpl(),
                         static_cast<int64_t>(tensor.element_size()));
}

}  // namespace

ListStep::ListStep(const py::list& groups, Lists lists, double inv_grad_scale,
                   double average_weight)
    : lists_(std::move(lists)), average_weight_(average_weight) {
  const size_t count = lists_.params.size();
  check_length("grads", lists_.grads.size(), count);
  check_length("momentum_buffers", lists_.momentum_buffers.size(), count);
  check_length("averages", lists_.averages.size(), count);
  check_length("is_first_step", lists_.is_first_step.size(), count);
  hyperparams_.resize(groups.size());
  size_t i = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    GroupReader reader;
    PyObject* const params = reader.parse(groups[g].ptr(), g, hyperparams_[g]);
    reader.scale(inv_grad_scale, hyperparams_[g]);
    const Py_ssize_t size = PyObject_Size(params);
    if (size < 0) throw py::error_already_set();
    for (size_t k = 0; k < static_cast<size_t>(size); ++k, ++i) {
      if (i >= count) check_length("params", count, i + 1);
      check(i);
      if (hyperparams_[g].has_momentum != lists_.momentum_buffers[i].has_value()) {
        throw std::runtime_error(name_of("momentum_buffers", i) + ": expected " +
                                 (hyperparams_[g].has_momentum
                                      ? "a tensor, because its group has momentum"
                                      : "none, because its group has no momentum"));
      }
      at::Tensor& grad = lists_.grads[i];
      if (grad.is_neg() || grad.is_conj()) grad = grad.resolve_conj().resolve_neg();
      if (reader.needs_torch() || !has_kernel(i) || !add(i, static_cast<uint32_t>(g))) {
        for_torch_.emplace_back(g, k);
        if (lists_.averages[i].has_value()) averaged_by_torch_.push_back(i);
      }
    }
  }
  check_length("params", count, i);
}

void ListStep::check(size_t i) const {
  const at::Tensor& param = lists_.params[i];
  check_tensor(param, param, name_of("params", i), true);
  check_tensor(lists_.grads[i], param, name_of("grads", i), false);
  const auto check_state = [&](const std::optional<at::Tensor>& tensor, const char* list) {
    if (tensor.has_value()) check_tensor(*tensor, param, name_of(list, i), true);
  };
  check_state(lists_.momentum_buffers[i], "momentum_buffers");
  check_state(lists_.averages[i], "averages");
  if (lists_.averages[i].has_value() && lists_.averages[i]->scalar_type() != param.scalar_type()) {
    throw std::runtime_error(name_of("averages", i) + ": expected the dtype of its parameter");
  }
}

bool ListStep::has_kernel(size_t i) const {
  const at::Tensor& param = lists_.params[i];
  const at::Tensor& grad = lists_.grads[i];
  const std::optional<at::Tensor>& buffer = lists_.momentum_buffers[i];
  const std::optional<int16_t> device = kernel_device(param);
  if (!device.has_value()) return false;
  const auto fits = [&](const at::Tensor& tensor) {
    return kernel_device(tensor) == device && kernel_dtype(tensor.scalar_type()).has_value() &&
           (param.is_complex() ? tensor.scalar_type() == param.scalar_type()
                               : !tensor.is_complex());
  };
  if (!fits(param) || !fits(grad) || (buffer.has_value() && !fits(*buffer))) return false;
  if (overlap(param, grad) && !is_own_grad(param, grad)) return false;
  return !buffer.has_value() || (!overlap(*buffer, grad) && !overlap(*buffer, param));
}

// False for a tensor with more strided dimensions than the CUDA kernels take.
bool ListStep::add(size_t i, uint32_t group) {
  const at::Tensor& param = lists_.params[i];
  const at::Tensor& grad = lists_.grads[i];
  const at::Tensor buffer = lists_.momentum_buffers[i].value_or(at::Tensor());
  TensorEntry entry{};
  entry.param = data_of(param);
  entry.grad =
      const_data_of(*grad.unsafeGetTensorImpl(), static_cast<int64_t>(grad.element_size()));
  entry.numel = param.is_complex() ? 2 * param.numel() : param.numel();
  entry.group = group;
  entry.param_dtype = *kernel_dtype(param.scalar_type());
  entry.grad_dtype = *kernel_dtype(grad.scalar_type());
  if (buffer.defined()) {
    entry.state[0] = data_of(buffer);
    entry.state_dtype[0] = *kernel_dtype(buffer.scalar_type());
    entry.is_first_step = lists_.is_first_step[i];
  }
  entry.device = *kernel_device(param);
  const bool all_contiguous = param.is_contiguous() && grad.is_contiguous() &&
                              (!buffer.defined() || buffer.is_contiguous());
  std::unique_ptr<OwnedLayout> layout =
      all_contiguous ? nullptr : common_layout(param, grad, buffer);
  if (layout != nullptr) {
    if (entry.device != kCpu && layout->layout.ndim > kMaxStridedDimsCuda) return false;
    entry.layout = &layout->layout;
    layouts_.push_back(std::move(layout));
  }
  if (entry.device != kCpu) {
    if (entry.is_first_step && is_capturing(entry.device)) {
      throw std::runtime_error(name_of("params", i) +
                               ": it has no momentum buffer yet, and the step is being captured "
                               "into a CUDA graph; run one step before the capture");
    }
    if (entry.numel != 0) share_of(shares_, entry.device).add(entry);
  }
  if (const std::optional<at::Tensor>& average = lists_.averages[i]; average.has_value()) {
    if (entry.device == kCpu && entry.layout == nullptr && lies_like(*average, param)) {
      entry.average = data_of(*average);
    } else {
      averaged_by_torch_.push_back(i);
    }
  }
  entries_.push_back(entry);
  updated_.push_back(i);
  return true;
}

// True when what one tensor's update writes is another's: then the order shows.
bool ListStep::shares_memory() const {
  struct Written {
    ByteRange bytes;
    size_t owner;
  };
  std::vector<Written> written;
  for (const size_t i : updated_) {
    for (const at::Tensor* tensor :
         {&lists_.params[i], lists_.momentum_buffers[i] ? &*lists_.momentum_buffers[i] : nullptr,
          lists_.averages[i] ? &*lists_.averages[i] : nullptr}) {
      if (tensor != nullptr && tensor->numel() != 0) written.push_back({byte_range(*tensor), i});
    }
  }
  std::sort(written.begin(), written.end(),
            [](const Written& a, const Written& b) { return a.bytes.begin < b.bytes.begin; });
  for (size_t k = 1; k < written.size(); ++k) {
    if (written[k].bytes.begin < written[k - 1].bytes.end) return true;
  }
  for (const size_t i : updated_) {
    if (lists_.grads[i].numel() == 0) continue;
    const ByteRange grad = byte_range(lists_.grads[i]);
    auto after = std::lower_bound(
        written.begin(), written.end(), grad.end,
        [](const Written& range, const char* address) { return range.bytes.begin < address; });
    while (after != written.begin() && (--after)->bytes.end > grad.begin) {
      if (after->owner != i) return true;
    }
  }
  return false;
}

py::list ListStep::for_torch() const {
  py::list positions;
  for (const auto& [group, index] : for_torch_) positions.append(py::make_tuple(group, index));
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
    const auto bump = [](const at::Tensor& tensor) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    };
    bump(lists_.params[i]);
    if (lists_.momentum_buffers[i].has_value()) bump(*lists_.momentum_buffers[i]);
    if (lists_.averages[i].has_value()) bump(*lists_.averages[i]);
  }
  const auto count = static_cast<int64_t>(entries_.size());
  FirstSteps first_steps;  // without a GradScaler the host knows them all
  for (const DeviceShare& share : shares_) {
    launch({{entries_.data(), nullptr, count}, hyperparams_.data()}, share, {}, first_steps,
           in_order);
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
    cpu::step<Sgd>({{on_cpu.data(), first_element.data(), static_cast<int64_t>(on_cpu.size())},
                    hyperparams_.data(),
                    average_weight_},
                   threads);
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
