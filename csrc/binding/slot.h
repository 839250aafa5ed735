// One position in one parameter list: what was true of its tensors when its way to the kernels was
// chosen, and the comparison with what is true now. Addresses are compared, never followed.
#pragma once

#include <memory>
#include <optional>

#include "formulation.h"
#include "operands.h"
#include "py_state.h"

namespace momentum_ext::binding {

// How the kernels reach a slot's tensors, and how these are compared with the slot.
enum class Path : uint8_t {
  kUnknown,     // not examined yet
  kContiguous,  // all are contiguous: the comparison is short
  kLayout,      // any other layout: sizes and strides are compared as well
  kTorch,       // not for the kernels; examined anew in each step
};

// The tensors' shapes, and how to walk them together, when they are not all contiguous.
struct Shapes {
  c10::impl::SizesAndStrides param;
  c10::impl::SizesAndStrides grad;
  c10::impl::SizesAndStrides states[kMaxStates];
  std::unique_ptr<OwnedLayout> layout;  // nullptr: one dense layout, walked as flat arrays
};

// A tensor that lies beside an operand: a parameter's master, a state's scales.
struct Companion {
  PyObject* key = nullptr;  // in the parameter's state; nullptr: there is none
  void* data = nullptr;
  caffe2::TypeMeta dtype;
  c10::impl::SizesAndStrides shape;

  Companion() = default;
  Companion(PyObject* key_, const at::Tensor& tensor);
  // The tensor in this dict where it is as it was; nullptr where not. Never where there is none.
  c10::TensorImpl* find(PyObject* state_dict, const PyObject* spec, c10::DispatchKeySet keys,
                        int16_t device) const noexcept;
};
struct Companions {
  Companion master;
  Companion scales[kMaxStates];
};

struct SlotOperand {
  void* data = nullptr;
  caffe2::TypeMeta dtype;
  uint8_t itemsize = 0;
};

// Of a DTensor parameter: the specs with which it, its gradient and its state were found to lie
// alike. They hold no tensor.
struct Specs {
  py::object param;
  py::object grad;
  py::object states[kMaxStates];
  py::object master;
  py::object average;
};

struct Slot {
  // What each step compares, together.
  PyObject* state_dict = nullptr;  // opt.state[p], borrowed, read in each step; nullptr: none
  std::unique_ptr<Specs> specs;    // nullptr: the parameter is no DTensor
  int64_t numel = 0;
  int64_t num_reals = 0;     // twice numel for a complex tensor
  c10::DispatchKeySet keys;  // of all its tensors
  SlotOperand param;
  caffe2::TypeMeta grad_dtype;
  uint8_t grad_itemsize = 0;
  uint8_t num_states = 0;
  Path path = Path::kUnknown;
  Formulation formulation{};  // of the momentum buffer
  bool has_companions = false;
  bool is_repeated = false;  // an earlier slot has the same parameter
  bool is_repeated_later = false;
  int16_t device = kCpu;
  SlotOperand states[kMaxStates];
  // The rest.
  uint32_t group = 0;
  uint32_t index = 0;  // in the group's list
  std::unique_ptr<Shapes> shapes;
  std::unique_ptr<Companions> companions;
  std::unique_ptr<Companion> average;  // that the kernels keep; nullptr: not known

  std::string name() const;

  // Takes the path that these operands go, and what the next step compares them with. Raises for
  // operands that no step could update.
  void examine(const Operands& operands, const NameOf& name_of, bool by_torch);

  // True when everything that the path was chosen for still holds. The gradient's address alone may
  // differ. May throw where torch refuses to tell a tensor's sizes or memory.
  bool is_unchanged(const c10::TensorImpl& param, const c10::TensorImpl& grad,
                    c10::TensorImpl* const* state, int num_states) const;

  // The bytes that the operands have, were they as examined.
  ByteRange bytes_of_param() const;
  ByteRange bytes_of_grad(const void* data) const;
  ByteRange bytes_of_state(int k) const;

 private:
  bool has_contiguous(const c10::TensorImpl& param, const c10::TensorImpl& grad,
                      c10::TensorImpl* const* state) const;
  bool has_shapes(const c10::TensorImpl& param, const c10::TensorImpl& grad,
                  c10::TensorImpl* const* state) const;
};

}  // namespace momentum_ext::binding
