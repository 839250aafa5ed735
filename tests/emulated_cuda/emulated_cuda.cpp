// CUDA devices that are not there, for a torch without CUDA: tensors that say they are on cuda:N
// and lie in the host's memory, and the few operators on them that a step calls. With the kernels
// compiled for the host (../native/cuda_on_host) the whole of the binding's CUDA path runs, from
// param_groups to the last element. Built and used by tests/test_emulated_cuda.py.
#include <ATen/ATen.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include "../../csrc/cuda/step.cu"

namespace {

at::Tensor tensor_over(const c10::Storage& storage, int64_t device, caffe2::TypeMeta dtype,
                       at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  const at::Device on(device < 0 ? at::kCPU : at::kCUDA,
                      static_cast<c10::DeviceIndex>(device < 0 ? -1 : device));
  void* const data = storage.unsafeGetStorageImpl()->mutable_data();
  c10::Storage same_memory(c10::Storage::use_byte_size_t(), storage.nbytes(),
                           at::DataPtr(
                               data, new c10::Storage(storage),
                               [](void* owner) { delete static_cast<c10::Storage*>(owner); }, on));
  at::Tensor made = at::detail::make_tensor<at::TensorImpl>(
      std::move(same_memory),
      device < 0 ? c10::DispatchKeySet(c10::DispatchKey::CPU)
                 : c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return made;
}

// The same memory as a tensor on another device; device -1 is the CPU.
at::Tensor on_device(const at::Tensor& tensor, int64_t device) {
  return tensor_over(tensor.storage(), device, tensor.dtype(), tensor.sizes(), tensor.strides(),
                     tensor.storage_offset());
}
at::Tensor on_cpu(const at::Tensor& tensor) { return on_device(tensor, -1); }

at::Tensor make_strided(at::IntArrayRef sizes, at::IntArrayRef strides,
                        std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device> device, std::optional<bool>) {
  const at::Tensor memory = at::empty_strided(sizes, strides, at::dtype(dtype.value()));
  return on_device(memory, device->has_index() ? device->index() : emulated::current_device);
}

at::Tensor make_empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                      std::optional<at::Layout> layout, std::optional<at::Device> device,
                      std::optional<bool> pinned, std::optional<at::MemoryFormat>) {
  const at::Tensor memory = at::empty(sizes, at::dtype(dtype.value()));
  return make_strided(sizes, memory.strides(), dtype, layout, device, pinned);
}

at::Tensor& zero(at::Tensor& tensor) {
  on_cpu(tensor).zero_();
  return tensor;
}

at::Tensor& fill(at::Tensor& tensor, const at::Scalar& value) {
  on_cpu(tensor).fill_(value);
  return tensor;
}

at::Tensor& lerp(at::Tensor& tensor, const at::Tensor& end, const at::Scalar& weight) {
  on_cpu(tensor).lerp_(on_cpu(end), weight);
  return tensor;
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

// Counted, because on a GPU it waits for the device.
int64_t num_reads = 0;
at::Scalar read_number(const at::Tensor& tensor) {
  ++num_reads;
  return on_cpu(tensor).item();
}

// What happened since the last call: blocks, device and parameter bytes of each launch; then reads.
std::vector<int64_t> take_log() {
  std::vector<int64_t> text;
  for (const auto& launch : emulated::launches) {
    text.insert(text.end(), {static_cast<int64_t>(launch.blocks), launch.device,
                             static_cast<int64_t>(launch.parameter_bytes)});
  }
  text.push_back(num_reads);
  emulated::launches.clear();
  num_reads = 0;
  return text;
}

void replay() {
  for (const auto& launch : emulated::graph) launch();
}

void set_state(bool capturing, bool failing) {
  if (capturing) emulated::graph.clear();
  emulated::is_capturing = capturing;
  emulated::launch_error = failing ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<c10::DeviceType::CUDA>)
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", make_empty);
  m.impl("empty_strided", make_strided);
  m.impl("zero_", zero);
  m.impl("fill_.Scalar", fill);
  m.impl("lerp_.Scalar", lerp);
  m.impl("copy_", copy);
  m.impl("_local_scalar_dense", read_number);
}

TORCH_LIBRARY(emulated_cuda, m) {
  m.def("on_device(Tensor tensor, int device) -> Tensor", on_device);
  m.def("log() -> int[]", take_log);
  m.def("replay() -> ()", replay);
  m.def("set(bool capturing, bool failing) -> ()", set_state);
}
