#include "layout.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <stdexcept>

#include "device.h"
#include "storage.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

// The dispatch keys of a plain dense tensor. Its TensorImpl is made without the dispatcher: a mode
// that happens to be active (FakeTensorMode, functionalize) would have other keys, and CUDA may be
// missing.
c10::DispatchKeySet keys_of_new_tensor(at::DeviceType device, bool inference_mode) {
  const c10::InferenceMode guard(inference_mode);
  const auto key = device == at::kCPU ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  return c10::make_intrusive<c10::TensorImpl>(
             c10::DispatchKeySet(key), caffe2::TypeMeta::Make<float>(), at::Device(device, 0))
      ->key_set();
}

// Outermost first, by the parameter's strides, so that the walk goes through the parameter's memory
// in order.
std::vector<StridedDim> dims_in_memory_order(const Operands& operands) {
  // Seen as real numbers, a complex tensor has strides twice as long and one dimension of two more.
  const int64_t reals = operands.param.is_complex() ? 2 : 1;
  const auto dim_of = [&](int64_t size, const auto& stride_of) {
    StridedDim dim{size, {stride_of(operands.param), stride_of(operands.grad)}};
    for (int k = 0; k < operands.num_states; ++k) {
      const at::Tensor& state = operands.states[k];
      if (!has_blocks(state.scalar_type())) dim.strides[operand_of_state(k)] = stride_of(state);
    }
    return dim;
  };
  std::vector<StridedDim> dims;
  for (int64_t d = 0; d < operands.param.dim(); ++d) {
    if (operands.param.size(d) == 1) continue;
    dims.push_back(dim_of(operands.param.size(d),
                          [&](const at::Tensor& tensor) { return tensor.stride(d) * reals; }));
  }
  std::stable_sort(dims.begin(), dims.end(), [](const StridedDim& a, const StridedDim& b) {
    return a.strides[kParam] > b.strides[kParam];
  });
  if (reals == 2) dims.push_back(dim_of(2, [](const at::Tensor&) -> int64_t { return 1; }));
  return dims;
}

// Joins a dimension with the one inside it where all tensors step over both evenly.
std::vector<StridedDim> coalesce(const std::vector<StridedDim>& dims) {
  std::vector<StridedDim> joined;
  for (const StridedDim& inner : dims) {
    const auto runs_on = [&](const StridedDim& outer) {
      for (int operand = 0; operand < kNumOperands; ++operand) {
        if (outer.strides[operand] != inner.size * inner.strides[operand]) return false;
      }
      return true;
    };
    if (!joined.empty() && runs_on(joined.back())) {
      StridedDim& outer = joined.back();
      const int64_t outer_size = outer.size;
      outer = inner;
      outer.size *= outer_size;
      continue;
    }
    joined.push_back(inner);
  }
  return joined;
}

// True for operands that lie as one dense array.
bool is_flat(const std::vector<StridedDim>& dims, const Operands& operands) {
  if (dims.empty()) return true;
  if (dims.size() != 1) return false;
  const int64_t* const strides = dims[0].strides;
  bool flat = strides[kParam] == 1 && strides[kGrad] == 1;
  for (int k = 0; k < operands.num_states; ++k) {
    flat =
        flat && (strides[operand_of_state(k)] == 1 || has_blocks(operands.states[k].scalar_type()));
  }
  return flat;
}

}  // namespace

std::optional<Dtype> kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
    case at::kComplexFloat:
      return Dtype::kFloat32;
    case at::kDouble:
    case at::kComplexDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

c10::DispatchKeySet plain_keys(int16_t device) {
  static const c10::DispatchKeySet cpu_keys = keys_of_new_tensor(at::kCPU, false);
  static const c10::DispatchKeySet cuda_keys = keys_of_new_tensor(at::kCUDA, false);
  return device == kCpu ? cpu_keys : cuda_keys;
}

bool is_plain_cpu(const at::Tensor& tensor) {
  static const c10::DispatchKeySet inference_keys = keys_of_new_tensor(at::kCPU, true);
  return tensor.key_set() == plain_keys(kCpu) || tensor.key_set() == inference_keys;
}

std::optional<int16_t> kernel_device(const at::Tensor& tensor) {
  static const c10::DispatchKeySet inference_keys = keys_of_new_tensor(at::kCUDA, true);
  if (is_plain_cpu(tensor)) return kCpu;
  if (!kHasCudaKernels) return std::nullopt;
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys != plain_keys(/*device=*/0) && keys != inference_keys) return std::nullopt;
  return tensor.device().index();
}

std::unique_ptr<OwnedLayout> common_layout(const Operands& operands) {
  std::vector<StridedDim> dims = coalesce(dims_in_memory_order(operands));
  if (is_flat(dims, operands)) return nullptr;
  auto owned = std::make_unique<OwnedLayout>();
  owned->dims = std::move(dims);
  owned->layout = StridedLayout(owned->dims.data(), static_cast<int>(owned->dims.size()));
  return owned;
}

bool are_contiguous(const Operands& operands) {
  bool all = operands.param.is_contiguous() && operands.grad.is_contiguous();
  for (int k = 0; k < operands.num_states; ++k) {
    all = all && operands.states[k].is_contiguous() && operands.states[k].scalar_type() != kPacked;
  }
  return all;
}

bool operators_are_watched() {
  constexpr c10::DispatchKeySet kWatchers({c10::DispatchKey::Python,
                                           c10::DispatchKey::Functionalize,
                                           c10::DispatchKey::FuncTorchDynamicLayerFrontMode});
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(kWatchers);
}

bool is_own_grad(const at::Tensor& param, const at::Tensor& grad) {
  return grad.const_data_ptr() == param.const_data_ptr() && grad.strides() == param.strides() &&
         grad.scalar_type() == param.scalar_type();
}

bool lies_like(const at::Tensor& average, const at::Tensor& param) {
  return kernel_device(average) == kernel_device(param) &&
         average.scalar_type() == param.scalar_type() && average.sizes() == param.sizes() &&
         average.strides() == param.strides() &&
         lies_in_storage(*average.unsafeGetTensorImpl(), byte_range(average).end);
}

void check_memory(const at::Tensor& tensor, const std::function<std::string()>& name) {
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched});
  const bool has_memory = tensor.layout() == at::kStrided &&
                          (tensor.is_cpu() || tensor.is_cuda()) &&
                          !tensor.key_set().has_any(kWrappers) && !tensor.is_nested();
  if (!has_memory || tensor.numel() == 0) return;
  const int64_t itemsize = static_cast<int64_t>(tensor.element_size());
  const int64_t needed = num_bytes(shape_of(tensor), itemsize) + tensor.storage_offset() * itemsize;
  const auto found = static_cast<int64_t>(tensor.storage().nbytes());
  if (found >= needed && tensor.storage().data() != nullptr) return;
  throw std::runtime_error(name() + ": its storage has " + std::to_string(found) +
                           " bytes and it needs " + std::to_string(needed) +
                           "; it was freed or resized");
}

bool overlaps_itself(const at::Tensor& tensor) {
  switch (at::has_internal_overlap(tensor)) {
    case at::MemOverlap::No:
      return false;
    case at::MemOverlap::Yes:
      return true;
    case at::MemOverlap::TooHard:
      break;
  }
  if (tensor.numel() == 0) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the largest offset that the dimensions so far can make
  bool nested = true;
  for (const auto& [stride, size] : dims) {
    nested = nested && stride > reach;
    reach += stride * (size - 1);
  }
  if (nested) return false;  // each dimension steps over all that the smaller ones cover
  // Interleaved dimensions may still be disjoint. Mark every element: rare.
  std::vector<bool> taken(reach + 1, false);
  std::vector<int64_t> index(dims.size(), 0);
  int64_t offset = 0;
  while (true) {
    if (taken[offset]) return true;
    taken[offset] = true;
    size_t d = 0;
    for (; d < dims.size(); ++d) {
      offset += dims[d].first;
      if (++index[d] < dims[d].second) break;
      offset -= dims[d].first * dims[d].second;
      index[d] = 0;
    }
    if (d == dims.size()) return false;
  }
}

ByteRange byte_range(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), num_bytes(shape_of(tensor), tensor.element_size())};
}

c10::impl::SizesAndStrides shape_of(const at::Tensor& tensor) {
  c10::impl::SizesAndStrides shape;
  shape.set_sizes(tensor.sizes());
  shape.set_strides(tensor.strides());
  return shape;
}

bool same_shape(const c10::impl::SizesAndStrides& shape, const c10::TensorImpl& tensor) {
  return tensor.sizes() == shape.sizes_arrayref() && tensor.strides() == shape.strides_arrayref();
}

int64_t num_bytes(c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t itemsize) {
  int64_t reach = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    reach += (sizes[d] - 1) * strides[d];
  }
  return (reach + 1) * itemsize;
}

}  // namespace momentum_ext::binding
