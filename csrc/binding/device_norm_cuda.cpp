// The binding's CUDA side of clipping and unscaling: workspace, results, the launch, and its error.
#if defined(MOMENTUM_EXT_WITH_CUDA)

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/backend.h"
#include "device.h"
#include "device_norm.h"
#include "device_values.h"
#include "layout.h"

namespace momentum_ext::binding {

DeviceNorm::Result DeviceNorm::conclude(int16_t device, const TensorTable* grads, Norm kind,
                                        const Factors& factors, std::optional<double> max_norm,
                                        at::ScalarType norm_dtype) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const auto options =
      at::device(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))).dtype(at::kDouble);
  if (!workspace_.defined() || workspace_.device().index() != device) {
    if (is_capturing(device)) {
      throw std::runtime_error(
          "clipping or unscaling is being captured into a CUDA graph before it has ever run, and "
          "it needs memory that outlives the graph; run one step before the capture");
    }
    constexpr int64_t kDoubles = (sizeof(cuda::NormWorkspace) + 7) / 8;
    workspace_ = at::zeros({kDoubles}, options);
    for (at::Tensor& each : factors_) each = at::empty({}, options);
  }
  auto* const workspace = static_cast<cuda::NormWorkspace*>(workspace_.mutable_data_ptr());

  Factors here = factors;
  cuda::Conclusion conclusion;
  conclusion.factor = value_on<double>(device, here.factor);
  conclusion.inv_scale = value_on<float>(device, here.inv_scale);
  conclusion.grad_scale = value_on<float>(device, here.grad_scale);
  // Not over the old one, which counts again if the step fails.
  Result result;
  result.factor = factors_[here.factor.is_same(factors_[0]) ? 1 : 0];
  conclusion.new_factor = result.factor.mutable_data_ptr<double>();
  if (max_norm.has_value()) {
    result.norm = at::empty({}, options.dtype(norm_dtype));
    conclusion.norm = result.norm.mutable_data_ptr();
    conclusion.norm_dtype = *kernel_dtype(norm_dtype);
    conclusion.clips = true;
    conclusion.max_norm = *max_norm;
  } else {
    result.found_inf = at::empty({}, options.dtype(at::kFloat));
    conclusion.found_inf = result.found_inf.mutable_data_ptr<float>();
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  check_cuda(grads == nullptr ? cuda::conclude(workspace, conclusion, stream)
                              : cuda::norm(kind, *grads, device, workspace, conclusion, stream),
             device, "FusedMomentum", "launching the norm of the gradients");
  return result;
}

}  // namespace momentum_ext::binding

#endif
