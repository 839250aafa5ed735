// What ranks tell each other of a norm: sums, the dtype, and whether they can go on.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <tuple>
#include <utility>

#include "../rules/clip.h"
#include "grad_norm.h"
#include "shards.h"

namespace momentum_ext::binding {

void GradNorm::reduce_over(const py::object& process_group) {
  if (!process_group.is(process_group_)) listed_.clear();  // to be read anew
  process_group_ = process_group;
}

// For the parameters that were listed.
void GradNorm::find_ranks() {
  ranks_ = {};
  meshes_.clear();
  const bool has_group = process_group_ && !process_group_.is_none();
  const bool has_dtensor = std::any_of(params_.begin(), params_.end(), [](PyObject* param) {
    return shard_of(param).spec != nullptr;
  });
  if (!has_group && !has_dtensor) return;
  py::list params;
  for (PyObject* const param : params_) params.append(py::handle(param));
  const py::object group = has_group ? process_group_ : py::object(py::none());
  py::object ranks = py::module_::import("momentum_ext.ranks").attr("Ranks")(params, group);
  meshes_ = ranks.attr("mesh_of").cast<std::vector<int>>();
  ranks_ = std::move(ranks);
}

// Squares of doubles can leave a double's range, where their root does not: then they are added up
// once more, scaled. Ranks whose plain tensors differ agree on that.
double GradNorm::root_of_squares(double sum_of_squares, Status& status) {
  // Of other dtypes a sum of squares is 0 or not finite only where the norm is.
  if (dtype_ != at::kDouble) return std::sqrt(sum_of_squares);
  const bool is_outside = !(sum_of_squares > 1e-280 && sum_of_squares < 1e300);
  if (largest_of_ranks(is_outside ? 1.0 : 0.0) == 0) return std::sqrt(sum_of_squares);
  const double largest = largest_of_ranks(sum(Norm::kMax, 1.0, status));
  if (!std::isfinite(largest) || largest == 0) return std::sqrt(sum_of_squares);
  const double scale = std::exp2(-std::clamp(std::ilogb(largest), -1000, 1000));
  const double scaled = std::sqrt(sum(Norm::kSumOfSquares, scale, status)) / scale;
  return is_outside ? scaled : std::sqrt(sum_of_squares);
}

// Over all ranks, which also agree on the worst status and on the norm's dtype.
double GradNorm::reduce(const std::vector<double>& sums, bool is_max, Status& status) {
  constexpr at::ScalarType kDtypes[] = {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble};
  std::vector<bool> mine;
  for (const at::ScalarType dtype : kDtypes) mine.push_back(dtype == dtype_);
  const auto [reduced, worst, dtypes] =
      ranks_.attr("reduce")(sums, is_max, static_cast<int>(status), mine)
          .cast<std::tuple<double, int, std::vector<bool>>>();
  status = static_cast<Status>(worst);
  for (size_t k = 0; k < std::size(kDtypes); ++k) {
    if (!dtypes[k]) continue;
    dtype_ =
        dtype_ == at::ScalarType::Undefined ? kDtypes[k] : c10::promoteTypes(dtype_, kDtypes[k]);
  }
  return reduced;
}

double GradNorm::largest_of_ranks(double mine) {
  if (!has_ranks()) return mine;
  Status status = Status::kFine;
  const auto num_meshes = ranks_.attr("num_meshes").cast<size_t>();
  return reduce(std::vector<double>(num_meshes + 1, mine), /*is_max=*/true, status);
}

void GradNorm::tell_error(const py::list& param_groups, const py::object& process_group) {
  start_collecting();
  reduce_over(process_group);
  if (!read_params(param_groups) || !has_ranks()) return;
  Status status = Status::kError;
  sum(Norm::kSumOfSquares, 1.0, status);
}

double GradNorm::sum_of_mesh(Norm kind, int mesh) const {
  double sum = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (mesh_of_entry_[i] != mesh) continue;
    for (int64_t block = first_block_[i]; block < first_block_[i + 1]; ++block) {
      const double norm = block_norms_[static_cast<size_t>(block)];
      sum = kind == Norm::kMax ? larger(sum, norm) : sum + norm;
    }
  }
  return sum;
}

// Waits for the device: other ranks must be told whether this one goes on.
double GradNorm::sum_on_device(Norm kind, int mesh, double scale) {
  std::vector<TensorEntry> entries;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (mesh_of_entry_[i] == mesh) entries.push_back(entries_[i]);
  }
  if (entries.empty()) return 0;
  const TensorTable table{entries.data(), nullptr, static_cast<int64_t>(entries.size())};
  const double norm =
      on_device_.conclude(*device_, &table, kind, {}, 1.0, at::kDouble).norm.item<double>() * scale;
  return kind == Norm::kSumOfSquares ? norm * norm : norm;
}

}  // namespace momentum_ext::binding
