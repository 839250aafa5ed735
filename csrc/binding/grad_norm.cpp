#include "grad_norm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "../cpu/backend.h"
#include "../rules/clip.h"
#include "shards.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

// Of torch.Tensor in Python, which may be a DTensor.
MOMENTUM_EXT_INLINE bool is_subclass(const at::Tensor& grad) {
  return grad.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

}  // namespace

py::object GradNorm::compute(const py::list& param_groups, double norm_type, bool remembers,
                             const py::object& grads, const py::object& process_group) {
  remembers_ = false;
  reduce_over(process_group);
  const bool readable = read_params(param_groups);
  redistributes_ = false;
  py::object computed = compute(norm_type, [&](bool complex_too) {
    return readable ? collect(complex_too, remembers, grads) : Status::kNotOurs;
  });
  resolved_.clear();
  remembers_ = remembers && !computed.is_none();
  if (remembers_) records_.resize(entries_.size());
  return computed;
}

py::object GradNorm::compute_of(const std::vector<at::Tensor>& grads, double norm_type) {
  return compute(norm_type, [&](bool complex_too) {
    start_collecting();
    for (size_t i = 0; i < grads.size(); ++i) {
      const auto name = [&] { return "grads[" + std::to_string(i) + "]"; };
      if (!add(grads[i], complex_too, name)) return Status::kNotOurs;
    }
    return Status::kFine;
  });
}

py::object GradNorm::compute(double norm_type, const std::function<Status(bool)>& collect) {
  const Norm kind = norm_type == 2   ? Norm::kSumOfSquares
                    : norm_type == 1 ? Norm::kSumOfAbs
                                     : Norm::kMax;
  if (kind == Norm::kMax && norm_type != std::numeric_limits<double>::infinity()) {
    return py::none();
  }
  std::exception_ptr error;
  const bool complex_too = kind == Norm::kSumOfSquares;
  Status status = collect_safely(collect, complex_too, error);
  if (!has_ranks() && error) std::rethrow_exception(error);
  if (!has_ranks() && status != Status::kFine) return py::none();
  is_pending_ = !has_ranks() && device_.value_or(kCpu) != kCpu;
  kind_ = kind;
  double norm = is_pending_ ? 0 : sum(kind, 1.0, status);
  if (status == Status::kLiesOtherwise) {
    redistributes_ = true;
    status = collect_safely(collect, complex_too, error);
    norm = sum(kind, 1.0, status);
  }
  if (error) std::rethrow_exception(error);
  if (status == Status::kError) {
    throw std::runtime_error(
        "the gradients of another rank could not be read, see its error; nothing was written");
  }
  if (status == Status::kNotOurs) return py::none();
  const at::ScalarType dtype = dtype_ == at::ScalarType::Undefined ? at::kFloat : dtype_;
  const auto dtype_object =
      py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype)));
  if (is_pending_) return py::make_tuple(py::none(), dtype_object);
  if (kind == Norm::kSumOfSquares) norm = root_of_squares(norm, status);
  return py::make_tuple(norm, dtype_object);
}

// Where other ranks wait for what this one has found, an error comes after it was told to them.
GradNorm::Status GradNorm::collect_safely(const std::function<Status(bool)>& collect,
                                          bool complex_too, std::exception_ptr& error) const {
  try {
    return collect(complex_too);
  } catch (...) {
    error = std::current_exception();
    return Status::kError;
  }
}

py::tuple GradNorm::conclude(const std::optional<at::Tensor>& factor,
                             const std::optional<at::Tensor>& inv_scale,
                             const std::optional<at::Tensor>& grad_scale,
                             std::optional<double> max_norm) {
  if (device_.value_or(kCpu) == kCpu) throw std::runtime_error("conclude(): no CUDA gradients");
  const TensorTable grads = table();
  const DeviceNorm::Factors factors = {factor.value_or(at::Tensor()),
                                       inv_scale.value_or(at::Tensor()),
                                       grad_scale.value_or(at::Tensor())};
  // Should the launch fail, these gradients are not looked at again: they may be gone by then.
  const bool reads = std::exchange(is_pending_, false);
  const DeviceNorm::Result result =
      on_device_.conclude(*device_, reads ? &grads : nullptr, kind_, factors, max_norm, dtype_);
  const auto wrap = [](const at::Tensor& tensor) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  };
  return py::make_tuple(wrap(result.factor),
                        wrap(max_norm.has_value() ? result.norm : result.found_inf));
}

size_t GradNorm::remember(const py::list& param_groups,
                          const std::optional<std::vector<int64_t>>& indices, int64_t shift) {
  if (std::exchange(remembers_, false)) return 0;  // compute() has done it
  if (!read_params(param_groups)) return 0;
  GradRecords before = std::exchange(records_, {});
  size_t n = 0;
  for_each_grad([&](const at::Tensor& memory, size_t k) {
    const GradRecords::Gradient grad = gradient(memory, k);
    records_.add(grad, indices.has_value() ? indices->at(n) : 0, before.take(n, grad));
    ++n;
    return true;
  });
  if (shift != 0) records_.add_others(std::move(before), shift);
  return records_.size() - n;
}

size_t GradNorm::forget(const py::list& param_groups) {
  if (!read_params(param_groups)) return records_.size();
  GradRecords before = std::exchange(records_, {});
  size_t n = 0;
  for_each_grad([&](const at::Tensor& grad, size_t k) {
    before.take(n++, gradient(grad, k));
    return true;
  });
  records_.add_others(std::move(before), 0);
  return records_.size();
}

py::object GradNorm::match(const py::list& param_groups) {
  py::list found;
  if (!read_params(param_groups)) return found;
  size_t n = 0;
  bool same = records_.has_one_coefficient();
  for_each_grad([&](const at::Tensor& grad, size_t k) {
    same = same && records_.is_same(n, gradient(grad, k));
    ++n;
    return same;
  });
  if (same && n == records_.size()) return py::none();
  for_each_grad([&](const at::Tensor& grad, size_t k) {
    found.append(
        py::make_tuple(places_[k].group, places_[k].index, records_.find(gradient(grad, k))));
    return true;
  });
  return found;
}

// The parameters, each once; false where a group has none. Most of the time they are as they were.
bool GradNorm::read_params(const py::list& param_groups) {
  size_t n = 0;
  bool same = true;
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  const auto for_each_param = [&](const auto& visit) {
    for (size_t g = 0; g < param_groups.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
      PyObject* const params = PyDict_Check(group) ? PyDict_GetItem(group, params_key) : nullptr;
      if (params == nullptr || !(PyList_Check(params) || PyTuple_Check(params))) return false;
      PyObject** const items = PySequence_Fast_ITEMS(params);
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
        if (!THPVariable_Check(items[i])) return false;
        visit(items[i], Place{g, static_cast<size_t>(i)});
      }
    }
    return true;
  };
  const bool readable = for_each_param([&](PyObject* param, Place place) {
    same = same && n < listed_.size() &&
           listed_[n] == std::tuple(param, place.group, shard_of(param).spec);
    ++n;
  });
  if (!readable) return false;
  if (same && n == listed_.size()) return true;
  listed_.clear();
  params_.clear();
  places_.clear();
  std::unordered_set<PyObject*> visited;
  decltype(listed_) listed;
  for_each_param([&](PyObject* param, Place place) {
    resolve(param);  // finds out what a DTensor is
    listed.emplace_back(param, place.group, shard_of(param).spec);
    if (!visited.insert(param).second) return;
    params_.push_back(param);
    places_.push_back(place);
  });
  placed_specs_.assign(params_.size(), {});
  find_ranks();
  listed_ = std::move(listed);  // not before: it may have raised
  return true;
}

const at::Tensor& GradNorm::listed_grad(size_t k) const {
  return grad_of(*THPVariable_Unpack(params_[k]).unsafeGetTensorImpl());
}

GradRecords::Gradient GradNorm::gradient(const at::Tensor& memory, size_t k) const {
  return {*listed_grad(k).unsafeGetTensorImpl(), *memory.unsafeGetTensorImpl()};
}

// Calls visit(gradient, its parameter's number) in order; stops and returns false when that does.
// Of a DTensor it is the local shard, whose memory is the gradient's.
template <typename Visit>
bool GradNorm::for_each_grad(const Visit& visit) const {
  for (size_t k = 0; k < params_.size(); ++k) {
    const at::Tensor& grad = listed_grad(k);
    if (!grad.defined()) continue;
    at::Tensor awaited;
    const at::Tensor* memory = &grad;
    if (is_subclass(grad) && shard_of(params_[k]).spec != nullptr) {
      const Shard shard = shard_of(object_of(grad));
      if (shard.spec == nullptr) awaited = awaited_shard(grad);
      memory = shard.spec != nullptr ? &THPVariable_Unpack(shard.local) : &awaited;
    }
    if (!visit(*memory, k)) return false;
  }
  return true;
}

// Whether a gradient lies as its parameter. That takes Python, and the next step's gradient often has
// the same spec.
bool GradNorm::has_placed(const at::Tensor& grad, size_t k) {
  PyObject* const spec = shard_of(object_of(grad)).spec;
  if (spec != nullptr && (spec == shard_of(params_[k]).spec || spec == placed_specs_[k].ptr())) {
    return true;
  }
  if (!is_placed_like(params_[k], grad)) return false;
  placed_specs_[k] = py::reinterpret_borrow<py::object>(spec);
  return true;
}

void GradNorm::start_collecting() {
  entries_.clear();
  layouts_.clear();
  mesh_of_entry_.clear();
  resolved_.clear();
  first_block_.assign(1, 0);
  dtype_ = at::ScalarType::Undefined;
  device_.reset();
  has_float16_ = false;
  is_watched_ = operators_are_watched();
}

std::string GradNorm::name_of(size_t k) const {
  return "gradient of param_groups[" + std::to_string(places_[k].group) + "]['params'][" +
         std::to_string(places_[k].index) + "]";
}

// Or what stands in for it.
const at::Tensor& GradNorm::listed_grad(size_t k, const py::object& grads) const {
  PyObject* const stand_in =
      grads.is_none() ? nullptr : PyDict_GetItemWithError(grads.ptr(), params_[k]);
  if (stand_in == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return stand_in != nullptr ? THPVariable_Unpack(stand_in) : listed_grad(k);
}

void GradNorm::redistribute_grads(const py::object& grads) {
  std::vector<at::Tensor> listed;
  for (size_t k = 0; k < params_.size(); ++k) listed.push_back(listed_grad(k, grads));
  resolved_ = redistribute(params_, listed, [this](size_t k) { return name_of(k); }, py::none(), 0);
}

GradNorm::Status GradNorm::collect(bool complex_too, bool remembers, const py::object& grads) {
  start_collecting();
  if (redistributes_) redistribute_grads(grads);
  Status status = Status::kFine;
  for_each_grad([&](const at::Tensor& found, size_t k) {
    const auto name = [&] { return name_of(k) + where_is(params_[k]); };
    const at::Tensor* grad = &found;
    const at::Tensor& listed = listed_grad(k, grads);
    if (!resolved_.empty() && resolved_[k].defined()) {
      grad = &resolved_[k];
    } else if (!grads.is_none() || (has_ranks() && !has_placed(listed, k))) {
      if (!redistributes_ && lies_otherwise(params_[k], listed)) {
        status = Status::kLiesOtherwise;
        return false;
      }
      if (resolved_.empty()) resolved_.resize(params_.size());
      grad = &(resolved_[k] = resolve_grad(params_[k], listed, name));
    }
    if (!add(*grad, complex_too, name)) {
      status = Status::kNotOurs;
      return false;
    }
    if (!meshes_.empty()) {
      mesh_of_entry_.push_back(meshes_[k]);
      if (meshes_[k] == kAnotherRank) first_block_.back() = first_block_[first_block_.size() - 2];
    }
    if (remembers) records_.put(entries_.size() - 1, gradient(found, k));
    return true;
  });
  return status;
}

template <typename Name>
bool GradNorm::add(const at::Tensor& grad, bool complex_too, const Name& name) {
  const at::ScalarType scalar_type = grad.scalar_type();
  const std::optional<Dtype> dtype = kernel_dtype(scalar_type);
  const std::optional<int16_t> device = kernel_device(grad);
  const auto is_ours = [&] {
    return device && dtype && (!grad.is_complex() || complex_too) &&
           device_.value_or(*device) == *device && !is_watched_;
  };
  if (!is_ours()) {
    check_memory(grad, name);
    return false;
  }
  device_ = device;
  has_float16_ = has_float16_ || *dtype == Dtype::kFloat16;
  const int64_t numel = grad.numel();
  const int64_t size = static_cast<int64_t>(grad.element_size());
  const c10::TensorImpl& impl = *grad.unsafeGetTensorImpl();
  const void* const data = const_data_of(impl, size);
  const bool is_dense = grad.is_contiguous() || grad.is_non_overlapping_and_dense();
  const int64_t bytes = is_dense ? numel * size : num_bytes(shape_of(grad), size);
  if (!lies_in_storage(impl, ByteRange(data, bytes).end)) check_memory(grad, name);
  TensorEntry entry{};
  entry.grad = data;
  entry.grad_dtype = *dtype;
  entry.numel = grad.is_complex() ? 2 * numel : numel;
  entry.device = *device;
  if (!is_dense) {
    if (*device != kCpu) return false;
    layouts_.push_back(common_layout({grad, grad, {}, 0}));
    if (layouts_.back() != nullptr) entry.layout = &layouts_.back()->layout;
  }
  entries_.push_back(entry);
  first_block_.push_back(first_block_.back() +
                         (entry.numel + cpu::kNormBlock - 1) / cpu::kNormBlock);
  const at::ScalarType real = c10::toRealValueType(scalar_type);
  if (dtype_ == at::ScalarType::Undefined) {
    dtype_ = real;
  } else if (dtype_ != real) {
    dtype_ = c10::promoteTypes(dtype_, real);
  }
  return true;
}

TensorTable GradNorm::table() const {
  return {entries_.data(), first_block_.data(), static_cast<int64_t>(entries_.size())};
}

double GradNorm::sum(Norm kind, double scale, Status& status) {
  block_norms_.resize(static_cast<size_t>(first_block_.back()));
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool is_fine = status == Status::kFine;
  const bool is_on_cpu = device_.value_or(kCpu) == kCpu;
  const double total =
      is_fine && is_on_cpu ? cpu::norm(kind, table(), scale, block_norms_.data(), threads) : 0.0;
  if (!has_ranks()) return total;
  // What each mesh has of it; the last are the plain tensors.
  const auto num_meshes = ranks_.attr("num_meshes").cast<int>();
  std::vector<double> sums(static_cast<size_t>(num_meshes) + 1, 0.0);
  for (int mesh = 0; is_fine && mesh <= num_meshes; ++mesh) {
    const int key = mesh < num_meshes ? mesh : kNoMesh;
    sums[static_cast<size_t>(mesh)] =
        is_on_cpu ? sum_of_mesh(kind, key) : sum_on_device(kind, key, scale);
  }
  return reduce(sums, kind == Norm::kMax, status);
}

std::pair<at::Tensor, double> clip_by_norm(double norm, at::ScalarType dtype, double max_norm) {
  // Only what is returned may overflow a 16-bit dtype.
  const double coefficient = dtype == at::kDouble ? clip_coefficient(max_norm, norm)
                                                  : clip_coefficient(static_cast<float>(max_norm),
                                                                     static_cast<float>(norm));
  const double precise = dtype == at::kDouble ? norm : static_cast<float>(norm);
  return {at::scalar_tensor(precise, at::TensorOptions().dtype(dtype)), coefficient};
}

}  // namespace momentum_ext::binding
