#include "shards.h"

#include <structmember.h>

#include <stdexcept>

#include "state_layout.h"

namespace momentum_ext::binding {
namespace {

// Where objects of a type have what is declared in its __slots__; -1: not there.
Py_ssize_t offset_of_slot(PyObject* type, const char* name) {
  const py::object descriptor = py::getattr(type, name, py::none());
  if (Py_TYPE(descriptor.ptr()) != &PyMemberDescr_Type) return -1;
  const PyMemberDef* const member =
      reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
  return member->type == T_OBJECT_EX ? member->offset : -1;
}

// Looks for the type where no tensor was one yet. Left alone where a torch has other DTensors than
// ours are made for: then torch's own path takes them.
void find_dtensor_type() {
  if (dtensor_type.type != nullptr) return;
  const auto module = py::reinterpret_steal<py::object>(
      PyImport_GetModule(py::str("torch.distributed.tensor").ptr()));
  if (!module) {
    PyErr_Clear();
    return;
  }
  const py::object type = py::getattr(module, "DTensor", py::none());
  if (!PyType_Check(type.ptr())) return;
  const Py_ssize_t local = offset_of_slot(type.ptr(), "_local_tensor");
  const Py_ssize_t spec = offset_of_slot(type.ptr(), "_spec");
  if (local < 0 || spec < 0) return;
  dtensor_type = {reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr()), local, spec};
}

bool is_dtensor(PyObject* tensor) {
  if (THPVariable_CheckTypeExact(Py_TYPE(tensor))) return false;
  find_dtensor_type();
  return Py_TYPE(tensor) == dtensor_type.type;
}

Shard find_shard(PyObject* tensor) { return is_dtensor(tensor) ? shard_of(tensor) : Shard{}; }

// What calls DTensor's own methods.
py::object python(const char* function) {
  return py::module_::import("momentum_ext.dtensor").attr(function);
}

py::object object(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

bool is_placed_alike(PyObject* spec, PyObject* other_spec, PyObject* param,
                     const at::Tensor& other) {
  if (spec == other_spec) return true;
  const py::handle a(spec);
  const py::handle b(other_spec);
  return a.attr("mesh").equal(b.attr("mesh")) && a.attr("placements").equal(b.attr("placements")) &&
         other.sizes() == THPVariable_Unpack(param).sizes();
}

}  // namespace

bool is_placed_like(PyObject* param, const at::Tensor& other) {
  const Shard wanted = find_shard(param);
  PyObject* const object = object_of(other);
  const Shard found = object != nullptr ? find_shard(object) : Shard{};
  if (wanted.spec == nullptr || found.spec == nullptr) return wanted.spec == found.spec;
  return is_placed_alike(wanted.spec, found.spec, param, other);
}

const at::Tensor& resolve(PyObject* param) {
  const Shard shard = find_shard(param);
  return THPVariable_Unpack(shard.spec != nullptr ? shard.local : param);
}

const at::Tensor& resolve_state(PyObject* param, const at::Tensor& state,
                                const std::function<std::string()>& name) {
  const Shard wanted = find_shard(param);
  PyObject* const found = object_of(state);
  const bool is_plain = found == nullptr || !is_dtensor(found);
  // A DTensor that is not resolved is torch's, with all that belongs to it.
  if (wanted.spec == nullptr && (is_plain || is_dtensor(param))) return state;
  if (is_plain || !is_placed_like(param, state)) {
    throw std::runtime_error(
        name() + ": " + python("mismatch")(py::handle(param), object(state)).cast<std::string>());
  }
  return resolve(found);
}

bool lies_otherwise(PyObject* param, const at::Tensor& grad) {
  PyObject* const spec = find_shard(param).spec;
  PyObject* const found = object_of(grad);
  return spec != nullptr && found != nullptr && is_dtensor(found) &&
         !is_placed_alike(spec, field_of(found, dtensor_type.spec), param, grad);
}

at::Tensor resolve_grad(PyObject* param, const at::Tensor& grad,
                        const std::function<std::string()>& name) {
  PyObject* const found = object_of(grad);
  const bool is_made = found == nullptr || !is_dtensor(found) || shard_of(found).spec != nullptr;
  if (is_made || find_shard(param).spec == nullptr || lies_otherwise(param, grad)) {
    return resolve_state(param, grad, name);
  }
  return awaited_shard(grad);
}

std::vector<at::Tensor> redistribute(const std::vector<PyObject*>& params,
                                     const std::vector<at::Tensor>& grads,
                                     const std::function<std::string(size_t)>& name,
                                     const py::object& meshes, uint32_t step) {
  py::list numbers;
  py::list listed;
  py::list listed_grads;
  for (size_t i = 0; i < params.size(); ++i) {
    if (find_shard(params[i]).spec == nullptr) continue;
    numbers.append(i);
    listed.append(py::handle(params[i]));
    listed_grads.append(grads[i].defined() ? object(grads[i]) : py::object(py::none()));
  }
  const auto name_of = py::cpp_function([&](size_t k) { return name(numbers[k].cast<size_t>()); });
  const py::list placed = python("redistributed")(listed, listed_grads, name_of, meshes, step);
  std::vector<at::Tensor> shards(params.size());
  for (size_t k = 0; k < placed.size(); ++k) {
    if (placed[k].is_none()) continue;
    shards[numbers[k].cast<size_t>()] = THPVariable_Unpack(py::object(placed[k]).ptr());
  }
  return shards;
}

at::Tensor awaited_shard(const at::Tensor& grad) {
  PyObject* const found = object_of(grad);
  if (found == nullptr || !is_dtensor(found)) return grad;
  const py::object local = python("awaited")(py::handle(found));
  return THPVariable_Unpack(local.ptr());
}

py::object as_state_of(PyObject* param, const at::Tensor& local, bool lies_like_param) {
  if (!lies_like_param || find_shard(param).spec == nullptr) return object(local);
  return python("like")(py::handle(param), object(local));
}

PlaceInWhole place_in_whole(PyObject* param, const std::function<std::string()>& name) {
  if (find_shard(param).spec == nullptr) return {};
  const auto [first, run, stride] = python("place_in_whole")(py::handle(param), name())
                                        .cast<std::tuple<int64_t, uint32_t, uint32_t>>();
  return {first, run, stride};
}

std::string where_is(PyObject* param) {
  if (find_shard(param).spec == nullptr) return "";
  return python("where_is")(py::handle(param)).cast<std::string>();
}

}  // namespace momentum_ext::binding
