#include "step_plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "../momentum.h"
#include "tensor_access.h"

namespace momentum_ext::binding {
namespace {

// Fewer tensors than this for each thread are looked at faster than another thread wakes up.
constexpr int64_t kSlotsPerThread = 256;

// From this many elements on the GIL is released while the kernel runs. Fewer take a small part of
// the interpreter's own switch interval of 5 ms, and releasing means holding references to all
// tensors.
constexpr int64_t kElementsToReleaseGil = 1 << 21;

template <typename T>
std::string to_string(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

MOMENTUM_EXT_INLINE ByteRange bytes_from(const void* data, int64_t num_bytes) {
  const auto* begin = static_cast<const char*>(data);
  return {begin, begin + num_bytes};
}

int64_t num_bytes(const c10::impl::SizesAndStrides& shape, int64_t itemsize) {
  int64_t reach = 0;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape.size_at_unchecked(d) == 0) return 0;
    reach += (shape.size_at_unchecked(d) - 1) * shape.stride_at_unchecked(d);
  }
  return (reach + 1) * itemsize;
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

// ---- the two halves of a step
// --------------------------------------------------------------------------------------

py::object StepPlan::step(const py::list& param_groups, const py::dict& state,
                          double inv_grad_scale) {
  const auto lock = lock_without_gil(mutex_);
  prepare(param_groups, state, inv_grad_scale);
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
  for_torch_.clear();
  kept_alive_.clear();
}

void StepPlan::prepare(const py::list& param_groups, const py::dict& state, double inv_grad_scale) {
  discard();
  state_ = state.ptr();
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

void StepPlan::insert_new_buffers() {
  for (const NewBuffer& made : new_buffers_) {
    const Slot& slot = slots_[made.slot];
    const auto buffer = py::reinterpret_steal<py::object>(THPVariable_Wrap(made.tensor));
    py::object fresh;
    PyObject* target = slot.state_dict;
    if (target == nullptr) {
      fresh = py::dict();
      target = fresh.ptr();
      if (PyDict_SetItem(state_, slot.param_object, target) != 0) throw py::error_already_set();
    }
    if (PyDict_SetItem(target, buffer_key_, buffer.ptr()) != 0) {
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

// ---- comparing the optimizer with the plan
// -------------------------------------------------------------------------

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

// ---- one tensor
// ----------------------------------------------------------------------------------

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
          const bool needs_torch = readers_[g].needs_torch();
          const size_t stop = std::min(first_slot_[g + 1], static_cast<size_t>(end));
          for (; i < stop; ++i) {
            status_[i] = needs_torch ? Status::kNeedsCare : check_slot(i, has_momentum);
          }
        }
      });
}

// Runs without the GIL being this thread's: calls nothing of Python's but PyDict_Next, which only
// reads.
StepPlan::Status StepPlan::check_slot(size_t i, bool has_momentum) noexcept {
  Slot& slot = slots_[i];
  if (!THPVariable_CheckTypeExact(Py_TYPE(slot.param_object))) return Status::kNeedsCare;
  const c10::TensorImpl& param = *THPVariable_Unpack(slot.param_object).unsafeGetTensorImpl();
  const at::Tensor& grad_tensor = grad_of(param);
  if (!grad_tensor.defined()) {
    tensors_[i] = {};
    entries_[i].numel = 0;
    return Status::kIdle;
  }
  const c10::TensorImpl& grad = *grad_tensor.unsafeGetTensorImpl();
  const c10::TensorImpl* buffer = nullptr;
  if (has_momentum) {
    PyObject* key;
    PyObject* value;
    Py_ssize_t position = 0;
    if (slot.state_dict == nullptr || !PyDict_Check(slot.state_dict) ||
        !PyDict_Next(slot.state_dict, &position, &key, &value) || key != buffer_key_ ||
        !THPVariable_CheckTypeExact(Py_TYPE(value))) {
      return Status::kNeedsCare;
    }
    buffer = THPVariable_Unpack(value).unsafeGetTensorImpl();
  }
  try {
    const bool unchanged = slot.path == Path::kContiguous ? is_unchanged(slot, param, grad, buffer)
                           : slot.path == Path::kLayout
                               ? is_unchanged_layout(slot, param, grad, buffer)
                               : false;
    if (!unchanged) return Status::kNeedsCare;
  } catch (...) {  // a lazily copied tensor may fail to get memory: on the calling thread it can be
                   // raised
    return Status::kNeedsCare;
  }
  tensors_[i] = {const_cast<c10::TensorImpl*>(&param), const_cast<c10::TensorImpl*>(&grad),
                 const_cast<c10::TensorImpl*>(buffer)};
  TensorEntry& entry = entries_[i];
  entry.grad = const_data_of(grad, slot.grad_itemsize);
  entry.numel = slot.num_reals;
  entry.is_first_step = false;
  return Status::kReady;
}

// Everything that a quick look does not settle: new and changed tensors, first steps, errors.
void StepPlan::prepare_slot(size_t i) {
  Slot& slot = slots_[i];
  tensors_[i] = {};
  entries_[i] = {};
  if (!THPVariable_Check(slot.param_object)) {
    throw py::type_error(name_of(slot) + ": expected a tensor, got " +
                         Py_TYPE(slot.param_object)->tp_name);
  }
  const at::Tensor& param = THPVariable_Unpack(slot.param_object);
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  if (!grad.defined()) return;

  const bool has_momentum = hyperparams_[slot.group].has_momentum;
  const at::Tensor* buffer = has_momentum ? find_buffer(slot) : nullptr;
  const bool is_first_step = has_momentum && buffer == nullptr;
  examine(slot, param, grad, buffer == nullptr ? at::Tensor() : *buffer);
  if (slot.path != Path::kTorch && is_first_step) {
    new_buffers_.push_back({i, at::empty_like(param, {}, at::MemoryFormat::Preserve)});
    buffer = &new_buffers_.back().tensor;
    examine(slot, param, grad, *buffer);
  }
  if (slot.path == Path::kTorch) {
    for_torch_.push_back(i);
    return;
  }
  tensors_[i] = {param.unsafeGetTensorImpl(), grad.unsafeGetTensorImpl(),
                 buffer == nullptr ? nullptr : buffer->unsafeGetTensorImpl()};
  TensorEntry& entry = entries_[i];
  entry.param = slot.param_data;
  entry.grad = const_data_of(*grad.unsafeGetTensorImpl(), slot.grad_itemsize);
  entry.momentum_buffer = slot.buffer_data;
  if (slot.shapes != nullptr && slot.shapes->layout != nullptr) {
    entry.layout = &slot.shapes->layout->layout;
  }
  entry.numel = slot.num_reals;
  entry.group = slot.group;
  entry.param_dtype = slot.param_kernel_dtype;
  entry.grad_dtype = slot.grad_kernel_dtype;
  entry.buffer_dtype = slot.buffer_kernel_dtype;
  entry.is_first_step = is_first_step;
}

// The tensor at opt.state[p]["momentum_buffer"]; nullptr when there is none or it is None.
const at::Tensor* StepPlan::find_buffer(const Slot& slot) const {
  if (slot.state_dict == nullptr) return nullptr;
  if (!PyDict_Check(slot.state_dict)) {
    throw py::type_error("state of " + name_of(slot) + ": expected a dict, got " +
                         Py_TYPE(slot.state_dict)->tp_name);
  }
  PyObject* key;
  PyObject* buffer;
  Py_ssize_t position = 0;
  if (!PyDict_Next(slot.state_dict, &position, &key, &buffer)) return nullptr;
  if (key != buffer_key_) {
    buffer = PyDict_GetItemWithError(slot.state_dict, buffer_key_);
    if (buffer == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  if (buffer == nullptr || buffer == Py_None) return nullptr;
  if (!THPVariable_Check(buffer)) {
    throw py::type_error("state of " + name_of(slot) +
                         ": expected a tensor as \"momentum_buffer\", got " +
                         Py_TYPE(buffer)->tp_name + "; delete the entry to start from no momentum");
  }
  return &THPVariable_Unpack(buffer);
}

// Everything that the slot's path was chosen for still holds. The gradient's address alone may
// differ.
[[gnu::flatten]] bool StepPlan::is_unchanged(const Slot& slot, const c10::TensorImpl& param,
                                             const c10::TensorImpl& grad,
                                             const c10::TensorImpl* buffer) const {
  if (slot.path != Path::kContiguous || slot.has_buffer != (buffer != nullptr)) return false;
  if (param.key_set() != plain_keys_ || grad.key_set() != plain_keys_) return false;
  if (param.dtype() != slot.param_dtype || grad.dtype() != slot.grad_dtype) return false;
  if (!param.is_contiguous() || !grad.is_contiguous()) return false;
  if (param.numel() != slot.numel || !same_sizes(param, grad)) return false;
  if (mutable_data_of(param, slot.param_itemsize) != slot.param_data) return false;
  const void* const grad_data = const_data_of(grad, slot.grad_itemsize);
  if (grad_data == nullptr && slot.numel != 0) return false;
  const ByteRange grad_bytes = bytes_from(grad_data, slot.numel * slot.grad_itemsize);
  if (grad_bytes.overlaps(bytes_from(slot.param_data, slot.numel * slot.param_itemsize))) {
    return false;
  }
  if (buffer == nullptr) return true;
  if (buffer->key_set() != plain_keys_ || buffer->dtype() != slot.buffer_dtype) return false;
  if (!buffer->is_contiguous() || !same_sizes(param, *buffer)) return false;
  return mutable_data_of(*buffer, slot.buffer_itemsize) == slot.buffer_data &&
         !grad_bytes.overlaps(bytes_from(slot.buffer_data, slot.numel * slot.buffer_itemsize));
}

bool StepPlan::is_unchanged_layout(const Slot& slot, const c10::TensorImpl& param,
                                   const c10::TensorImpl& grad,
                                   const c10::TensorImpl* buffer) const {
  const Shapes& shapes = *slot.shapes;
  const auto same = [&](const c10::TensorImpl& tensor, caffe2::TypeMeta dtype,
                        const c10::impl::SizesAndStrides& shape) {
    return tensor.key_set() == plain_keys_ && tensor.dtype() == dtype && same_shape(shape, tensor);
  };
  const auto bytes = [](const void* data, caffe2::TypeMeta dtype,
                        const c10::impl::SizesAndStrides& shape) {
    return bytes_from(data, num_bytes(shape, static_cast<int64_t>(dtype.itemsize())));
  };
  if (slot.has_buffer != (buffer != nullptr)) return false;
  if (!same(param, slot.param_dtype, shapes.param) || !same(grad, slot.grad_dtype, shapes.grad)) {
    return false;
  }
  if (mutable_data_of(param, slot.param_itemsize) != slot.param_data) return false;
  const void* const grad_data = const_data_of(grad, slot.grad_itemsize);
  if (grad_data == nullptr && slot.numel != 0) return false;
  const ByteRange grad_bytes = bytes(grad_data, slot.grad_dtype, shapes.grad);
  if (grad_bytes.overlaps(bytes(slot.param_data, slot.param_dtype, shapes.param))) return false;
  if (buffer == nullptr) return true;
  return same(*buffer, slot.buffer_dtype, shapes.buffer) &&
         mutable_data_of(*buffer, slot.buffer_itemsize) == slot.buffer_data &&
         !grad_bytes.overlaps(bytes(slot.buffer_data, slot.buffer_dtype, shapes.buffer));
}

// Chooses the path of a tensor that is new or changed, or raises.
void StepPlan::examine(Slot& slot, const at::Tensor& param, const at::Tensor& grad,
                       const at::Tensor& buffer) {
  slot.path = Path::kUnknown;
  slot.shapes.reset();
  ranges_changed_ = true;
  const auto check_written = [&](const at::Tensor& tensor, const std::string& name) {
    if (tensor.is_inference() && !c10::InferenceMode::is_enabled()) {
      throw std::runtime_error(
          name +
          ": an inference tensor cannot be updated outside torch.inference_mode(); clone() it "
          "outside inference mode first");
    }
    if (tensor.layout() == at::kStrided && overlaps_itself(tensor)) {
      throw std::runtime_error(
          name + ": several of its elements share one place in memory (shape " +
          to_string(tensor.sizes()) + ", strides " + to_string(tensor.strides()) +
          "), so it cannot be updated in place; clone() it first");
    }
  };
  const auto check_sizes = [&](const at::Tensor& tensor, const std::string& name,
                               const char* remedy) {
    if (tensor.sizes() != param.sizes()) {
      throw std::runtime_error(name + ": expected the shape of its parameter, " +
                               to_string(param.sizes()) + ", got " + to_string(tensor.sizes()) +
                               "; " + remedy);
    }
  };
  check_written(param, name_of(slot));
  check_sizes(grad, "gradient of " + name_of(slot), "set it to None or recompute it");
  if (buffer.defined()) {
    check_written(buffer, "momentum_buffer of " + name_of(slot));
    check_sizes(buffer, "momentum_buffer of " + name_of(slot),
                "delete it from the optimizer's state to start from no momentum");
  }

  const bool all_plain =
      is_plain_cpu(param) && is_plain_cpu(grad) && (!buffer.defined() || is_plain_cpu(buffer));
  const auto has_kernel = [&](const at::Tensor& tensor) {
    if (!kernel_dtype(tensor.scalar_type())) return false;
    return param.is_complex() ? tensor.scalar_type() == param.scalar_type() : !tensor.is_complex();
  };
  const bool all_dtypes =
      has_kernel(param) && has_kernel(grad) && (!buffer.defined() || has_kernel(buffer));
  const auto shares_memory = [](const at::Tensor& a, const at::Tensor& b) {
    return byte_range(a).overlaps(byte_range(b));
  };
  if (readers_[slot.group].needs_torch() || !all_plain || !all_dtypes) {
    slot.path = Path::kTorch;
    return;
  }
  // A gradient may be its own parameter (each element is read before it is written), but overlap in
  // no other way.
  const bool is_own_grad = grad.const_data_ptr() == param.const_data_ptr() &&
                           grad.strides() == param.strides() &&
                           grad.scalar_type() == param.scalar_type();
  if ((shares_memory(param, grad) && !is_own_grad) ||
      (buffer.defined() && (shares_memory(buffer, grad) || shares_memory(buffer, param)))) {
    slot.path = Path::kTorch;
    return;
  }

  const auto check_memory = [&](const at::Tensor& tensor, const std::string& name) {
    const int64_t needed = num_bytes(shape_of(tensor), tensor.element_size()) +
                           tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
    if (tensor.numel() != 0 && static_cast<int64_t>(tensor.storage().nbytes()) < needed) {
      throw std::runtime_error(name + ": its storage has " +
                               std::to_string(tensor.storage().nbytes()) + " bytes and it needs " +
                               std::to_string(needed) + "; it was freed or resized");
    }
  };
  check_memory(param, name_of(slot));
  check_memory(grad, "gradient of " + name_of(slot));
  if (buffer.defined()) check_memory(buffer, "momentum_buffer of " + name_of(slot));

  slot.numel = param.numel();
  slot.num_reals = param.is_complex() ? 2 * slot.numel : slot.numel;
  slot.has_buffer = buffer.defined();
  slot.param_itemsize = static_cast<uint8_t>(param.element_size());
  slot.grad_itemsize = static_cast<uint8_t>(grad.element_size());
  slot.param_dtype = param.dtype();
  slot.grad_dtype = grad.dtype();
  slot.param_kernel_dtype = *kernel_dtype(param.scalar_type());
  slot.grad_kernel_dtype = *kernel_dtype(grad.scalar_type());
  if (buffer.defined()) {
    slot.buffer_itemsize = static_cast<uint8_t>(buffer.element_size());
    slot.buffer_dtype = buffer.dtype();
    slot.buffer_kernel_dtype = *kernel_dtype(buffer.scalar_type());
  }
  slot.param_data = mutable_data_of(*param.unsafeGetTensorImpl(), slot.param_itemsize);
  slot.buffer_data = buffer.defined()
                         ? mutable_data_of(*buffer.unsafeGetTensorImpl(), slot.buffer_itemsize)
                         : nullptr;
  if (param.is_contiguous() && grad.is_contiguous() &&
      (!buffer.defined() || buffer.is_contiguous())) {
    slot.path = Path::kContiguous;
    return;
  }
  slot.shapes = std::make_unique<Shapes>();
  slot.shapes->param = shape_of(param);
  slot.shapes->grad = shape_of(grad);
  if (buffer.defined()) slot.shapes->buffer = shape_of(buffer);
  slot.shapes->layout = common_layout(param, grad, buffer);
  slot.path = Path::kLayout;
}

std::string StepPlan::name_of(const Slot& slot) const {
  return "param_groups[" + std::to_string(slot.group) + "]['params'][" +
         std::to_string(slot.index) + "]";
}

// ---- parameters that share memory
// ----------------------------------------------------------------------------------

// Gives each tensor a round that comes after those of all earlier tensors whose memory it touches:
// torch's for-loop updates one after the other, and so must we where the order shows.
void StepPlan::assign_rounds() {
  struct Range {
    ByteRange bytes;
    size_t slot;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.round = 0;
    if (slot.path != Path::kContiguous && slot.path != Path::kLayout) continue;
    const auto add = [&](void* data, caffe2::TypeMeta dtype,
                         const c10::impl::SizesAndStrides* shape) {
      const auto itemsize = static_cast<int64_t>(dtype.itemsize());
      const int64_t bytes = shape != nullptr ? num_bytes(*shape, itemsize) : slot.numel * itemsize;
      if (bytes > 0) ranges.push_back({bytes_from(data, bytes), i});
    };
    Shapes* const shapes = slot.shapes.get();
    add(slot.param_data, slot.param_dtype, shapes ? &shapes->param : nullptr);
    if (slot.has_buffer)
      add(slot.buffer_data, slot.buffer_dtype, shapes ? &shapes->buffer : nullptr);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.bytes.begin < b.bytes.begin; });

  std::vector<std::pair<size_t, size_t>> conflicts;  // later slot, earlier slot
  std::vector<Range> open;  // ranges that reach past the current one's begin
  for (const Range& range : ranges) {
    std::erase_if(open, [&](const Range& other) { return other.bytes.end <= range.bytes.begin; });
    for (const Range& other : open) {
      if (other.slot != range.slot)
        conflicts.push_back(std::minmax(other.slot, range.slot, std::greater<>()));
    }
    open.push_back(range);
  }
  std::sort(conflicts.begin(), conflicts.end());
  num_rounds_ = 1;
  for (const auto& [later, earlier] : conflicts) {
    slots_[later].round = std::max(slots_[later].round, slots_[earlier].round + 1);
    num_rounds_ = std::max(num_rounds_, slots_[later].round + 1);
  }
  ranges_changed_ = false;
}

void StepPlan::sort_into_rounds() {
  std::vector<size_t> order(slots_.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return slots_[a].round < slots_[b].round; });
  sorted_entries_.resize(slots_.size());
  for (size_t k = 0; k < order.size(); ++k) {
    sorted_entries_[k] = entries_[order[k]];
    first_element_[k + 1] = first_element_[k] + sorted_entries_[k].numel;
    if (k > 0 && slots_[order[k]].round != slots_[order[k - 1]].round) round_end_.push_back(k);
  }
  round_end_.push_back(slots_.size());
}

TensorTable StepPlan::table_of_round(size_t begin, size_t end) const {
  const TensorEntry* const entries = num_rounds_ == 1 ? entries_.data() : sorted_entries_.data();
  return {entries + begin, first_element_.data() + begin, static_cast<int64_t>(end - begin),
          hyperparams_.data()};
}

}  // namespace momentum_ext::binding
