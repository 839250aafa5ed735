#include "update_counts.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <string>

#include "../cpu/backend.h"
#include "group_reader.h"
#include "low_precision.h"
#include "operands.h"
#include "quantization.h"
#include "state_layout.h"

namespace momentum_ext::binding {
namespace {

// A tensor that is counted, with what its entry points to.
struct Counted {
  size_t i;  // in the lists
  TensorEntry entry;
  std::unique_ptr<LowPrecision> low_precision;
  std::unique_ptr<OwnedLayout> layout;
};

// The companions of parameter i; nullptr where a kernel cannot read them.
std::unique_ptr<LowPrecision> companions_of(const CountedLists& lists, size_t i,
                                            const Operands& operands, const std::string& place) {
  auto low = std::make_unique<LowPrecision>();
  const auto is_there = [&](const at::Tensor& tensor) {
    check_memory(tensor, [&] { return "state of " + place; });
    return tensor.device() == operands.param.device();
  };
  const at::Tensor& buffer = operands.states[0];
  if (operands.num_states != 0 && has_blocks(buffer.scalar_type())) {
    const std::optional<at::Tensor>& scale = lists.scales[i];
    if (!scale || !is_scale(*scale, buffer) || !lies_beside(buffer, operands.param) ||
        !is_there(*scale)) {
      return nullptr;
    }
    low->scale[0] = static_cast<ScaleBits*>(mutable_data_of(*scale));
  }
  if (const std::optional<at::Tensor>& master = lists.masters[i]; master.has_value()) {
    if (!lies_beside(*master, operands.param) || !is_there(*master)) return nullptr;
    low->master = mutable_data_of(*master);
    low->master_kind = kind_of_master(master->scalar_type());
  }
  return low;
}

// Parameter i's entry; without low_precision where it is not to be counted.
Counted counted(const CountedLists& lists, size_t i, const Hyperparams<Sgd>& h, size_t group,
                const std::string& place) {
  Counted counted{i, {}, nullptr, nullptr};
  const at::Tensor& param = lists.params.at(i);
  const bool needs_grad = h.nesterov || !h.has_momentum;
  if (needs_grad && !lists.grads[i].has_value()) return counted;
  if (h.has_momentum && !lists.momentum_buffers[i].has_value()) return counted;
  Operands operands{param, needs_grad ? *lists.grads[i] : param, {}, h.has_momentum ? 1 : 0};
  if (h.has_momentum) operands.states[0] = *lists.momentum_buffers[i];
  const auto name_of = [&](Operand operand) {
    const char* const of = operand == kGrad ? "gradient of " : "momentum_buffer of ";
    return (operand == kParam ? "" : of) + place;
  };
  check_operands(operands, name_of);
  if (!has_kernel(operands)) return counted;
  if (!are_contiguous(operands)) counted.layout = common_layout(operands);
  counted.entry = entry_of(operands, counted.layout.get());
  counted.entry.group = static_cast<uint32_t>(group);
  if (has_too_many_dims(counted.layout.get(), counted.entry.device)) return counted;
  counted.low_precision = companions_of(lists, i, operands, place);
  counted.entry.low_precision = counted.low_precision.get();
  return counted;
}

// Those tensors of the list that lie on this device, into rows of `counts`, which lies there too.
void count_on(int16_t device, const std::vector<Counted>& list,
              const std::vector<Hyperparams<Sgd>>& groups, const GradFactors& factors,
              const at::Tensor& counts) {
  std::vector<TensorEntry> entries;
  std::vector<int64_t> first_element{0};
  for (const Counted& each : list) {
    if (each.entry.device != device) continue;
    entries.push_back(each.entry);
    entries.back().average = static_cast<UpdateCounts*>(mutable_data_of(counts)) + each.i;
    first_element.push_back(first_element.back() + each.entry.numel);
  }
  const StepTable<Sgd> table{
      {entries.data(), first_element.data(), static_cast<int64_t>(entries.size())}, groups.data()};
  if (device != kCpu) return count_updates(table, device, factors);
  const py::gil_scoped_release released;
  cpu::count_updates(table, at::in_parallel_region() ? 1 : at::get_num_threads());
}

}  // namespace

at::Tensor count_updates(const py::list& groups, const CountedLists& lists,
                         const GradFactors& factors) {
  const at::Tensor counts =
      at::zeros({static_cast<int64_t>(lists.params.size()),
                 static_cast<int64_t>(sizeof(UpdateCounts) / sizeof(int64_t))},
                at::kLong);
  std::vector<Hyperparams<Sgd>> hyperparams;
  std::vector<Counted> list;
  std::vector<int16_t> devices;
  size_t i = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    GroupReader reader;
    Hyperparams<Sgd> h;
    PyObject* const params =
        reader.parse(groups[g].ptr(), g, {Sgd::kStateKeys, Sgd::kIsNonNegative, Sgd::kMaxStates},
                     [&](HyperparamReader& from) {
                       const bool maximize = Sgd::read(from, h, h.f64, h.on_device);
                       h.f64.grad_coef = maximize ? -factors.on_host : factors.on_host;
                     });
    round_to_float(h);
    hyperparams.push_back(h);
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k, ++i) {
      Counted each =
          counted(lists, i, h, g,
                  "param_groups[" + std::to_string(g) + "]['params'][" + std::to_string(k) + "]");
      if (reader.needs_torch() || each.low_precision == nullptr) {
        counts[static_cast<int64_t>(i)].fill_(-1);
        continue;
      }
      const int16_t device = each.entry.device;
      if (std::find(devices.begin(), devices.end(), device) == devices.end()) {
        devices.push_back(device);
      }
      list.push_back(std::move(each));
    }
  }
  for (const int16_t device : devices) {
    if (device == kCpu) {
      count_on(device, list, hyperparams, factors, counts);
      continue;
    }
    const at::Device cuda(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    const at::Tensor there = at::zeros(counts.sizes(), at::device(cuda).dtype(at::kLong));
    count_on(device, list, hyperparams, factors, there);
    counts.add_(at::empty_like(counts).copy_(there));
  }
  return counts;
}

}  // namespace momentum_ext::binding
