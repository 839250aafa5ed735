#include "operands.h"

#include <c10/core/InferenceMode.h>

#include <sstream>
#include <stdexcept>

#include "state_layout.h"

namespace momentum_ext::binding {
namespace {

std::string to_string(c10::IntArrayRef sizes) {
  std::ostringstream stream;
  stream << sizes;
  return stream.str();
}

void check_written(const at::Tensor& tensor, Operand operand, const NameOf& name_of) {
  if (tensor.is_inference() && !c10::InferenceMode::is_enabled()) {
    throw std::runtime_error(
        name_of(operand) +
        ": an inference tensor cannot be updated outside torch.inference_mode(); clone() it "
        "outside inference mode first");
  }
  if (tensor.layout() == at::kStrided && overlaps_itself(tensor)) {
    throw std::runtime_error(
        name_of(operand) + ": several of its elements share one place in memory (shape " +
        to_string(tensor.sizes()) + ", strides " + to_string(tensor.strides()) +
        "), so it cannot be updated in place; clone() it first");
  }
}

void check_sizes(const at::Tensor& tensor, const Operands& operands, Operand operand,
                 const NameOf& name_of) {
  const at::Tensor& param = operands.param;
  if (operand == kGrad
          ? tensor.sizes() == param.sizes()
          : has_sizes_beside(tensor, param, operands.is_non_negative(operand - kState))) {
    return;
  }
  throw std::runtime_error(
      name_of(operand) + ": expected the shape of its parameter, " + to_string(param.sizes()) +
      ", got " + to_string(tensor.sizes()) +
      (operand == kGrad ? "; set it to None or recompute it"
                        : "; delete it from the optimizer's state to start from no momentum"));
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  return byte_range(a).overlaps(byte_range(b));
}

}  // namespace

void check_operands(const Operands& operands, const NameOf& name_of) {
  const at::Tensor& param = operands.param;
  const at::Tensor& grad = operands.grad;
  const auto& states = operands.states;
  const int num_states = operands.num_states;
  bool is_nested = param.is_nested() || grad.is_nested();
  for (int k = 0; k < num_states; ++k) is_nested = is_nested || states[k].is_nested();
  if (is_nested) return;
  check_written(param, kParam, name_of);
  check_sizes(grad, operands, kGrad, name_of);
  for (int k = 0; k < num_states; ++k) {
    check_written(states[k], operand_of_state(k), name_of);
    check_sizes(states[k], operands, operand_of_state(k), name_of);
  }
  check_memory(param, [&] { return name_of(kParam); });
  check_memory(grad, [&] { return name_of(kGrad); });
  for (int k = 0; k < num_states; ++k) {
    check_memory(states[k], [&] { return name_of(operand_of_state(k)); });
  }
}

bool has_kernel(const Operands& operands) {
  const at::Tensor& param =
      operands.param;  // a structured binding goes into no lambda with older clang++
  const at::Tensor& grad = operands.grad;
  const std::optional<int16_t> device = kernel_device(param);
  const auto fits = [&](const at::Tensor& tensor) {
    return kernel_device(tensor) == device && kernel_dtype(tensor.scalar_type()).has_value() &&
           (param.is_complex() ? tensor.scalar_type() == param.scalar_type()
                               : !tensor.is_complex());
  };
  if (!device.has_value() || !fits(param) || !fits(grad)) return false;
  if (overlap(param, grad) && !is_own_grad(param, grad)) return false;
  for (int k = 0; k < operands.num_states; ++k) {
    const at::Tensor& state = operands.states[k];
    const bool is_quantized = has_blocks(state.scalar_type()) && kernel_device(state) == device;
    if (!is_quantized && !fits(state)) return false;
    if (overlap(state, grad) || overlap(state, param)) return false;
    for (int other = 0; other < k; ++other) {
      if (overlap(state, operands.states[other])) return false;
    }
  }
  return true;
}

Dtype state_dtype(const at::Tensor& state, bool non_negative) {
  return has_blocks(state.scalar_type()) ? dtype_of_blocks(state.scalar_type(), non_negative)
                                         : *kernel_dtype(state.scalar_type());
}

TensorEntry entry_of(const Operands& operands, const OwnedLayout* layout) {
  const at::Tensor& param = operands.param;
  const at::Tensor& grad = operands.grad;
  TensorEntry entry{};
  entry.param = mutable_data_of(param);
  entry.grad =
      const_data_of(*grad.unsafeGetTensorImpl(), static_cast<int64_t>(grad.element_size()));
  for (int k = 0; k < operands.num_states; ++k) {
    entry.state[k] = mutable_data_of(operands.states[k]);
    entry.state_dtype[k] = state_dtype(operands.states[k], operands.is_non_negative(k));
  }
  if (layout != nullptr) entry.layout = &layout->layout;
  entry.numel = param.is_complex() ? 2 * param.numel() : param.numel();
  entry.param_dtype = *kernel_dtype(param.scalar_type());
  entry.grad_dtype = *kernel_dtype(grad.scalar_type());
  entry.device = *kernel_device(param);
  return entry;
}

}  // namespace momentum_ext::binding
