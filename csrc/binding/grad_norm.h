// The norm of all gradients of an optimizer, in one parallel region or one launch, and what has
// become of these gradients later.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/backend.h"
#include "device_norm.h"
#include "grad_records.h"
#include "layout.h"

namespace momentum_ext::binding {

namespace py = pybind11;

class GradNorm {
 public:
  // The p-norm (1, 2 or inf) of all gradients together, and the dtype in which torch would return
  // it; None where a gradient is not one for the kernels. On a CUDA device the norm is None:
  // conclude() has it computed there.
  // With `remembers`, for a caller for whom no coefficient waits, the next remember() is done
  // already. `grads`: parameters with what stands in for their gradients, or null.
  // Where parameters are DTensors, or with a process group, all ranks call this, and get the same.
  py::object compute(const py::list& param_groups, double norm_type, bool remembers,
                     const py::object& grads, const py::object& process_group);

  // In place of compute() on a rank that has found an error before: then it raises on the others.
  void tell_error(const py::list& param_groups, const py::object& process_group);

  // Whether other ranks took part in the last compute().
  bool has_ranks() const { return static_cast<bool>(ranks_); }

  // The same for a list of gradients.
  py::object compute_of(const std::vector<at::Tensor>& grads, double norm_type);

  // On that device, at once after compute() or later: what the next step is to multiply gradients
  // with, and, with a max_norm, the norm of what that makes, else whether the norm is not finite.
  py::tuple conclude(const std::optional<at::Tensor>& factor,
                     const std::optional<at::Tensor>& inv_scale,
                     const std::optional<at::Tensor>& grad_scale, std::optional<double> max_norm);

  // Of the gradients that the last compute() read.
  size_t num_grads() const { return entries_.size(); }
  bool has_float16() const { return has_float16_; }
  int16_t device() const { return device_.value_or(kCpu); }

  // Remembers the gradients that are there now, each with the index of its coefficient; without
  // indices it is 0 for all. Those remembered before that are absent keep their coefficients, whose
  // indices move up by `shift`; with 0 they are forgotten. Returns how many these are.
  size_t remember(const py::list& param_groups, const std::optional<std::vector<int64_t>>& indices,
                  int64_t shift);

  // Forgets the gradients that are there now; returns how many others are remembered.
  size_t forget(const py::list& param_groups);

  // None when the gradients are those that were remembered, untouched, with one coefficient. Else
  // for each gradient that is there: its parameter's group and index, and the coefficient's index;
  // -1: its memory was not remembered, -2 - index: it was written since.
  py::object match(const py::list& param_groups);

 private:
  // Whether the kernels can read what was found: said by one rank, or by the worst of all. Gradients
  // that lie otherwise than their parameters are redistributed first, once all ranks know.
  enum class Status : uint8_t { kFine, kLiesOtherwise, kNotOurs, kError };

  py::object compute(double norm_type, const std::function<Status(bool)>& collect);
  Status collect_safely(const std::function<Status(bool)>& collect, bool complex_too,
                        std::exception_ptr& error) const;
  void start_collecting();
  void reduce_over(const py::object& process_group);
  bool read_params(const py::list& param_groups);
  void find_ranks();
  const at::Tensor& listed_grad(size_t k) const;
  GradRecords::Gradient gradient(const at::Tensor& memory, size_t k) const;
  template <typename Visit>
  bool for_each_grad(const Visit& visit) const;
  bool has_placed(const at::Tensor& grad, size_t k);
  Status collect(bool complex_too, bool remembers, const py::object& grads);
  const at::Tensor& listed_grad(size_t k, const py::object& grads) const;
  std::string name_of(size_t k) const;
  void redistribute_grads(const py::object& grads);
  template <typename Name>
  bool add(const at::Tensor& grad, bool complex_too, const Name& name);
  TensorTable table() const;
  double sum(Norm kind, double scale, Status& status);
  double root_of_squares(double sum_of_squares, Status& status);
  double reduce(const std::vector<double>& sums, bool is_max, Status& status);
  double largest_of_ranks(double mine);
  double sum_of_mesh(Norm kind, int mesh) const;
  double sum_on_device(Norm kind, int mesh, double scale);

  // A parameter's place in the groups.
  struct Place {
    size_t group;
    size_t index;
  };

  // Parameters with their groups and, of DTensors, specs, in order: only compared.
  std::vector<std::tuple<PyObject*, size_t, PyObject*>> listed_;
  std::vector<PyObject*> params_;  // each once; followed only after they were compared
  std::vector<Place> places_;      // of each of these
  // Of the same list: momentum_ext.ranks.Ranks, which adds up what ranks have found, or null; and the
  // number of the mesh of each of params_ there.
  static constexpr int kNoMesh = -1;
  static constexpr int kAnotherRank = -2;  // counts this replica
  py::object ranks_;
  py::object process_group_;
  std::vector<int> meshes_;
  std::vector<py::object> placed_specs_;  // with which a gradient was found to lie as its parameter
  GradRecords records_;
  bool remembers_ = false;  // compute() has remembered what it has read
  // The vectors keep their capacity, so that nothing is allocated once warm.
  std::vector<TensorEntry> entries_;
  std::vector<int64_t> first_block_;
  std::vector<double> block_norms_;
  std::vector<int> mesh_of_entry_;  // only where there are ranks_
  bool redistributes_ = false;      // compute() has been told to
  // Empty, or one for each of params_; defined where a gradient is not read where it lies.
  std::vector<at::Tensor> resolved_;
  std::vector<std::unique_ptr<OwnedLayout>> layouts_;
  at::ScalarType dtype_ = at::ScalarType::Undefined;
  std::optional<int16_t> device_;  // of the gradients; none where there are none
  Norm kind_ = Norm::kSumOfSquares;
  bool is_pending_ = false;  // no pass has read them yet
  bool has_float16_ = false;
  bool is_watched_ = false;  // see operators_are_watched()
  DeviceNorm on_device_;
};

// The norm as torch.nn.utils.clip_grad_norm_ returns it, a tensor of no dimension, and the
// coefficient that clips, with torch's formula and roundings: max_norm / (norm + 1e-6), at most 1.
std::pair<at::Tensor, double> clip_by_norm(double norm, at::ScalarType dtype, double max_norm);

}  // namespace momentum_ext::binding
