#include "lookahead.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/where.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "../cpu/backend.h"
#include "operands.h"

namespace momentum_ext::binding {
namespace {

bool has_kernel(const at::Tensor& param, const at::Tensor& buffer, const at::Tensor& lookahead) {
  for (const at::Tensor* const tensor : {&param, &buffer, &lookahead}) {
    if (!is_plain_cpu(*tensor) || !kernel_dtype(tensor->scalar_type()) ||
        tensor->is_complex() != param.is_complex()) {
      return false;
    }
  }
  return lookahead.scalar_type() == param.scalar_type() && !overlaps_itself(param);
}

void move_by_torch(const at::Tensor& param, const at::Tensor& buffer, const at::Tensor& lookahead,
                   double distance, bool back) {
  if (!back) {
    lookahead.copy_(param);
    param.add_(buffer, distance);
    return;
  }
  const at::Tensor iterate = lookahead.clone().add_(buffer, distance);
  const at::Tensor untouched =
      iterate.eq(param).logical_or(at::isnan(iterate).logical_and(at::isnan(param)));
  param.copy_(at::where(untouched, lookahead, param.sub(buffer, distance)));
}

}  // namespace

void move_lookahead(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& buffers,
                    const std::vector<at::Tensor>& lookaheads, const std::vector<double>& distances,
                    bool back) {
  for (size_t i = 0; i < params.size(); ++i) {
    const auto check = [&](const at::Tensor& tensor, const char* name) {
      check_memory(tensor, [&] { return std::string(name) + "[" + std::to_string(i) + "]"; });
      if (tensor.device() != params[i].device()) {
        throw std::runtime_error(std::string(name) + "[" + std::to_string(i) +
                                 "]: it is on another device than its parameter; move the "
                                 "optimizer's state, or delete it to start from no momentum");
      }
      if (tensor.sizes() == params[i].sizes()) return;
      throw std::runtime_error(std::string(name) + "[" + std::to_string(i) +
                               "]: its shape is not that of its parameter; delete the optimizer's "
                               "state to start from no momentum");
    };
    check(params[i], "params");
    check(buffers[i], "momentum_buffers");
    check(lookaheads[i], "lookaheads");
  }
  const at::NoGradGuard no_grad;
  std::vector<TensorEntry> entries;
  std::vector<int64_t> first_element{0};
  std::vector<Hyperparams<Sgd>> groups;
  std::vector<std::unique_ptr<OwnedLayout>> layouts;
  for (size_t i = 0; i < params.size(); ++i) {
    if (!has_kernel(params[i], buffers[i], lookaheads[i])) {
      move_by_torch(params[i], buffers[i], lookaheads[i], distances[i], back);
      continue;
    }
    // The look-ahead point is written, in the gradient's place.
    const Operands operands{params[i], lookaheads[i], {buffers[i]}, 1};
    layouts.push_back(common_layout(operands));
    TensorEntry entry = entry_of(operands, layouts.back().get());
    entry.grad = mutable_data_of(lookaheads[i]);
    entry.group = static_cast<uint32_t>(groups.size());
    Hyperparams<Sgd> h;
    h.f64.momentum = distances[i];
    round_to_float(h);
    groups.push_back(h);
    entries.push_back(entry);
    first_element.push_back(first_element.back() + entry.numel);
    if (!params[i].is_inference()) params[i].unsafeGetTensorImpl()->bump_version();
  }
  const StepTable<Sgd> table{
      {entries.data(), first_element.data(), static_cast<int64_t>(entries.size())}, groups.data()};
  if (entries.empty()) return;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  back ? cpu::move_to_lookahead(table, threads) : cpu::move_to_iterate(table, threads);
}

}  // namespace momentum_ext::binding
