// The Python module: momentum_ext._C.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <string>

#include "../cpu/backend.h"
#include "grad_norm.h"
#include "list_step.h"
#include "lookahead.h"
#include "prepared_step.h"
#include "quantization.h"
#include "state_format.h"
#include "state_layout.h"
#include "update_counts.h"

namespace momentum_ext::binding {
namespace {

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = std::string("clang++ ") + __clang_version__;
#else
  const std::string compiler = std::string("g++ ") + __VERSION__;
#endif
  return {
      {"compiler", compiler},
      {"cuda", cuda_build_info()},
      {"threads",
       cpu::has_threads() ? "torch's OpenMP" : "none (no OpenMP runtime found in this process)"},
  };
}

// The environment's choice of an instruction set, before anything can run.
void choose_isa_from_environment() {
  const char* const name = std::getenv("MOMENTUM_EXT_ISA");
  if (name == nullptr || *name == '\0') return;
  try {
    cpu::set_isa(name);
  } catch (const std::invalid_argument& error) {
    throw py::import_error(std::string("MOMENTUM_EXT_ISA: ") + error.what());
  }
}

// torch's own errors carry a C++ stack trace that users do not want to read.
void translate_torch_error(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

using OptionalTensor = std::optional<at::Tensor>;

void run(PreparedStep& step, double grad_factor, double average_weight,
         const OptionalTensor& found_inf, const OptionalTensor& grad_scale,
         const OptionalTensor& device_factor,
         const std::optional<std::pair<at::Tensor, at::Tensor>>& average, double decay,
         bool warms_up) {
  PreparedStep::Numbers numbers{grad_factor, average_weight, {}};
  numbers.on_device = {found_inf.value_or(at::Tensor()),
                       grad_scale.value_or(at::Tensor()),
                       device_factor.value_or(at::Tensor()),
                       {}};
  if (average) {
    numbers.on_device.average = {average->first, average->second, decay, warms_up};
  }
  step.run(numbers);
}

void define_steps(py::module_& m) {
  py::class_<PreparedStep>(m, "PreparedStep")
      .def("fallback", &PreparedStep::fallback)
      .def("is_on_devices", &PreparedStep::is_on_devices, py::arg("average_count") = py::none())
      .def("begin", &PreparedStep::begin)
      .def("run", &run, py::arg("grad_factor") = 1.0, py::arg("average_weight") = 0.0,
           py::arg("found_inf") = py::none(), py::arg("grad_scale") = py::none(),
           py::arg("device_factor") = py::none(), py::arg("average") = py::none(),
           py::arg("ema_decay") = 0.0, py::arg("ema_warmup") = false)
      .def("__enter__",
           [](const py::object& step) {
             step.cast<const PreparedStep&>().needs_torch();  // raises for a step that is over
             return step;
           })
      .def("__exit__", [](PreparedStep& step, const py::args&) { step.discard(); });
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init<const std::string&, std::string>(), py::arg("rule"), py::arg("name"))
      .def("step", &step, py::arg("param_groups"), py::arg("state"),
           py::arg("all_by_torch") = false)
      // Apart from step(), to which more arguments would cost a tenth of a microsecond.
      .def(
          "prepare",
          [](Plan& plan, const py::list& param_groups, const py::dict& state, bool all_by_torch,
             std::optional<bool> averaging, const py::object& grads, bool may_be_left_out) {
            const Averaging how = !averaging.has_value() ? Averaging::kNone
                                  : *averaging           ? Averaging::kUpdate
                                                         : Averaging::kStart;
            PreparedStep step(
                plan, param_groups, state,
                {all_by_torch, may_be_left_out, how, grads.is_none() ? py::object() : grads});
            step.keep_plan();
            return step;
          },
          py::arg("param_groups"), py::arg("state"), py::arg("all_by_torch") = false,
          py::arg("averaging") = py::none(), py::arg("grads") = py::none(),
          py::arg("may_be_left_out") = false)
      .def("pending_changes", &pending_changes, py::arg("param_groups"), py::arg("state"),
           py::arg("moved_only") = false)
      .def_readwrite("redistributing_meshes", &Plan::redistributing_meshes)
      .def("adopt", &Plan::adopt, py::arg("param_groups"))
      .def("has_moved", &Plan::has_moved, py::arg("param_groups"))
      .def_property(
          "rounding_step",
          [](const Plan& plan) { return plan.rounding_steps.read().value_or(plan.rounding_step); },
          [](Plan& plan, uint32_t count) { plan.rounding_step = count; })
      .def(
          "count_updates",
          [](Plan& plan, const py::list& groups, std::vector<at::Tensor> params,
             CountedLists::Tensors grads, CountedLists::Tensors momentum_buffers,
             CountedLists::Tensors scales, CountedLists::Tensors masters) {
            const StepLock lock(plan.mutex);
            if (!plan.last_factors) {
              throw std::runtime_error(
                  "update_report(): there is no update to look at; call it after step()");
            }
            return count_updates(groups,
                                 {std::move(params), std::move(grads), std::move(momentum_buffers),
                                  std::move(scales), std::move(masters)},
                                 *plan.last_factors);
          },
          py::arg("groups"), py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"),
          py::arg("scales"), py::arg("masters"))
      .def("unstarted_buffers", [](Plan& plan) {
        const StepLock lock(plan.mutex);
        return plan.first_steps.unstarted();
      });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  choose_isa_from_environment();
  py::register_local_exception_translator(translate_torch_error);

  define_steps(m);
  m.attr("HAS_CUDA_KERNELS") = kHasCudaKernels;
  py::class_<GradNorm>(m, "GradNorm")
      .def(py::init<>())
      .def("compute",
           py::overload_cast<const py::list&, double, bool, const py::object&, const py::object&>(
               &GradNorm::compute),
           py::arg("param_groups"), py::arg("norm_type"), py::arg("remembers") = false,
           py::arg("grads") = py::none(), py::arg("process_group") = py::none())
      .def("tell_error", &GradNorm::tell_error, py::arg("param_groups"), py::arg("process_group"))
      .def_property_readonly("has_ranks", &GradNorm::has_ranks)
      .def("compute_of", &GradNorm::compute_of, py::arg("grads"), py::arg("norm_type"))
      .def("conclude", &GradNorm::conclude, py::arg("factor"), py::arg("inv_scale"),
           py::arg("grad_scale"), py::arg("max_norm"))
      .def("remember", &GradNorm::remember, py::arg("param_groups"),
           py::arg("indices") = py::none(), py::arg("shift") = 0)
      .def("forget", &GradNorm::forget, py::arg("param_groups"))
      .def("match", &GradNorm::match, py::arg("param_groups"))
      .def_property_readonly("num_grads", &GradNorm::num_grads)
      .def_property_readonly("device", &GradNorm::device)
      .def_property_readonly("has_float16", &GradNorm::has_float16);
  py::class_<ListStep>(m, "ListStep")
      .def(py::init([](const py::list& groups, std::vector<at::Tensor> params,
                       std::vector<at::Tensor> grads,
                       std::vector<std::optional<at::Tensor>> momentum_buffers,
                       std::vector<std::optional<at::Tensor>> averages,
                       std::vector<bool> is_first_step, double inv_grad_scale,
                       double average_weight) {
             return std::make_unique<ListStep>(
                 groups,
                 ListStep::Lists{std::move(params), std::move(grads), std::move(momentum_buffers),
                                 std::move(averages), std::move(is_first_step)},
                 inv_grad_scale, average_weight);
           }),
           py::arg("groups"), py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"),
           py::arg("averages"), py::arg("is_first_step"), py::arg("inv_grad_scale"),
           py::arg("average_weight"))
      .def("fallback", &ListStep::fallback)
      .def("run", &ListStep::run);
  m.def("move_lookahead", &move_lookahead, py::arg("params"), py::arg("momentum_buffers"),
        py::arg("lookaheads"), py::arg("distances"), py::arg("back"));
  m.def("clip_by_norm", &clip_by_norm, py::arg("norm"), py::arg("dtype"), py::arg("max_norm"));
  // As torch.amp.GradScaler.unscale_ rounds it.
  m.def("inverse_scale", [](double scale) { return static_cast<float>(1 / scale); });
  m.def("quantize", &quantize, py::arg("value"), py::arg("dtype"), py::arg("param"),
        py::arg("non_negative") = false);
  m.def("dequantize", &dequantize, py::arg("quantized"), py::arg("scale"), py::arg("sizes"),
        py::arg("non_negative") = false);
  m.def("can_pack", &can_pack, py::arg("param"));
  m.def("is_packed_of", &is_packed_of, py::arg("packed"), py::arg("sizes"));
  m.def(
      "check_memory",
      [](const at::Tensor& tensor, const std::string& name) {
        check_memory(tensor, [&] { return name; });
      },
      py::arg("tensor"), py::arg("name"));
  m.def("is_capturing", [](int16_t device) { return is_capturing(device); }, py::arg("device"));
  m.def("isa", &cpu::isa);
  m.def("isas", &cpu::isas);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));
  m.def("set_elements_per_thread", &cpu::set_elements_per_thread, py::arg("count"));
  m.def("build_info", &build_info);
  m.def("has_record_function_callbacks", &at::hasCallbacks);
}

}  // namespace momentum_ext::binding
