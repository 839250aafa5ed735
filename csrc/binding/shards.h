// DTensors: what a step updates is their local shards, which are plain tensors. Python is called
// only where something is new; what was seen before is compared by address.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <string>
#include <vector>

#include "../formats/philox.h"
#include "tensor_access.h"

namespace momentum_ext::binding {

namespace py = pybind11;

// torch.distributed.tensor.DTensor, and where its objects have _local_tensor and _spec. The type is
// null until that module is imported: before, no tensor is one.
struct DTensorType {
  PyTypeObject* type = nullptr;
  Py_ssize_t local = 0;
  Py_ssize_t spec = 0;
};
inline DTensorType dtensor_type;

MOMENTUM_EXT_INLINE PyObject* field_of(PyObject* tensor, Py_ssize_t offset) noexcept {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset);
}

// The local shard of a DTensor, and its spec (mesh, placements, global shape), both borrowed; null
// for any other object, for none, and for a DTensor whose shard is no plain tensor.
struct Shard {
  PyObject* local = nullptr;
  PyObject* spec = nullptr;
};
MOMENTUM_EXT_INLINE Shard shard_of(PyObject* tensor) noexcept {
  if (tensor == nullptr || Py_TYPE(tensor) != dtensor_type.type) return {};
  PyObject* const local = field_of(tensor, dtensor_type.local);
  if (local == nullptr || !THPVariable_CheckTypeExact(Py_TYPE(local))) return {};
  return {local, field_of(tensor, dtensor_type.spec)};
}

// The tensor that a step updates for this object: a plain tensor itself, which has no spec, or a
// DTensor's local shard. nullptr where the object's spec is not `spec`.
MOMENTUM_EXT_INLINE c10::TensorImpl* local_impl(PyObject* tensor, const PyObject* spec) noexcept {
  if (THPVariable_CheckTypeExact(Py_TYPE(tensor))) {
    return spec == nullptr ? THPVariable_Unpack(tensor).unsafeGetTensorImpl() : nullptr;
  }
  const Shard shard = shard_of(tensor);
  return shard.spec != nullptr && shard.spec == spec
             ? THPVariable_Unpack(shard.local).unsafeGetTensorImpl()
             : nullptr;
}

// Torch 2.11 has renamed this.
template <typename Slot>
MOMENTUM_EXT_INLINE PyObject* load_object(const Slot& slot) {
  if constexpr (requires { slot.load_pyobj(); }) {
    return slot.load_pyobj();
  } else {
    return slot._unchecked_untagged_pyobj();
  }
}

// The Python object that a tensor has; nullptr: none.
inline PyObject* object_of(const at::Tensor& tensor) {
  return load_object(*tensor.unsafeGetTensorImpl()->pyobj_slot());
}

// What an item of a parameter list resolves to: the tensor that is updated in its place. The tensor
// itself for anything but a DTensor.
const at::Tensor& resolve(PyObject* param);

// True where both are DTensors of the same mesh, placements and shape, or neither is one that
// resolves.
bool is_placed_like(PyObject* param, const at::Tensor& other);

// The same for a parameter's gradient or state, which must lie as the parameter does. Raises, with
// the remedy, where one of the two is a DTensor and the other is not, or lies elsewhere.
const at::Tensor& resolve_state(PyObject* param, const at::Tensor& state,
                                const std::function<std::string()>& name);

// True for a DTensor's gradient that is a DTensor and lies otherwise: it has to be redistributed.
bool lies_otherwise(PyObject* param, const at::Tensor& grad);

// As resolve_state(); waits for the shard of a gradient that a collective is still making.
at::Tensor resolve_grad(PyObject* param, const at::Tensor& grad,
                        const std::function<std::string()>& name);

// The local shards of gradients that lie otherwise than their parameters, redistributed; undefined
// for the others, and for parameters that are no DTensors. `meshes`: a set of those of which some
// gradient has lain otherwise, which grows, or None for all. Their ranks agree first on what is to
// be redistributed, and that they are at the same step; where they differ, all raise.
std::vector<at::Tensor> redistribute(const std::vector<PyObject*>& params,
                                     const std::vector<at::Tensor>& grads,
                                     const std::function<std::string(size_t)>& name,
                                     const py::object& meshes, uint32_t step);

// The local shard of a gradient that shard_of() does not know: once it is there, since a collective
// may still run. The gradient itself where it is no DTensor.
at::Tensor awaited_shard(const at::Tensor& grad);

// A tensor like what the parameter resolves to, as the object that the optimizer's state holds: a
// DTensor of the parameter's mesh and placements for a DTensor, unless it lies otherwise: then it is
// plain, and belongs to the local shard.
py::object as_state_of(PyObject* param, const at::Tensor& local, bool lies_like_param);

// Where the elements of what the parameter resolves to are in the whole tensor. Raises for shards
// that PlaceInWhole cannot tell.
PlaceInWhole place_in_whole(PyObject* param, const std::function<std::string()>& name);

// " on rank 1 of [Shard(dim=0)] on DeviceMesh(...)" for a DTensor, for errors; else nothing.
std::string where_is(PyObject* param);

}  // namespace momentum_ext::binding
