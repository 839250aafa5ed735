// The step plan: what a step needs to know about every parameter, built once and brought up to date
// by comparing.
//
// Nothing about a tensor is assumed to be as it was: each step reads the parameter lists, the
// groups' hyperparameters, the gradients and the optimizer's state again, and compares them with
// the plan. The plan holds no reference to a tensor between steps, so it keeps no memory alive and
// takes part in no reference cycle. Addresses that it remembers are compared, never followed; those
// that it follows were read from the optimizer in the same step.
//
// The state says what it is: its dtypes and keys tell its format, "buffer_formulation" in the group
// how its buffers are written. A step compares that with what the group wants and converts.
//
// A step has two halves. Preparing checks everything and allocates new state, but writes nothing
// that a user can see. Running inserts the new state and updates. Tensors that the kernels are not
// made for are handed to the caller for torch's own path in between.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../rules/sgd.h"
#include "../table.h"
#include "device.h"
#include "group_reader.h"
#include "layout.h"

namespace momentum_ext::binding {

class StepPlan {
 public:
  // What a step may be given besides the optimizer.
  struct Options {
    double inv_grad_scale = 1;
    bool all_for_torch = false;
    // For a step on CUDA devices alone, where the kernels read what it points to.
    ScalerTensors scaler;
    // Keep an exponential moving average of each parameter at opt.state[p]["ema"], in the same
    // pass, with this weight of the new parameter; 0: only make those that are missing.
    std::optional<double> average_weight;
    // Parameters with the tensors that stand in for their gradients; null: there are none.
    py::object grads;
  };

  // Updates all tensors that have a gradient and returns None. When some of them need torch's path
  // it writes nothing and returns a list of their (group, index in group): the caller calls
  // begin_torch_step(), treats those and calls run(), or discard() on an error. When the host would
  // have to know what the scaler points to, step() returns NotImplemented and has written nothing.
  py::object step(const py::list& param_groups, const py::dict& state, Options options);
  void begin_torch_step();
  void run();
  void discard();

  // What the next step would make of the state before it updates: a list of (parameter, key, tensor
  // or None for a key that goes), and the indices of the groups whose buffers are then written in
  // their group's formulation. A parameter that came from another group, whose buffer is not
  // written as "buffer_formulation" says, is among them; with `moved_only` these are all. Changes
  // nothing.
  py::tuple pending_changes(const py::list& param_groups, const py::dict& state, bool moved_only);

  // Takes all buffers to be written as their groups say.
  void adopt(const py::list& param_groups);

  // True where a parameter has come from another group and its buffer is not written as its group
  // says.
  bool has_moved(const py::list& param_groups) const;

  // How many steps there have been: random numbers depend on it.
  uint32_t rounding_step() const { return rounding_step_; }
  void set_rounding_step(uint32_t count) { rounding_step_ = count; }

  // Buffers in the state whose tensor has yet to have its first step, because it overflowed. Waits
  // for the devices.
  py::list unstarted_buffers();

 private:
  class Turn;
  // How the kernels reach a tensor, and how it is compared with the plan.
  enum class Path : uint8_t {
    kUnknown,     // not examined yet
    kContiguous,  // parameter, gradient and buffer contiguous: the comparison is short
    kLayout,      // any other layout: sizes and strides are compared as well
    kTorch,       // not for the kernels; examined anew in each step
  };

  // What a quick look at a slot found.
  enum class Status : uint8_t {
    kIdle,   // no gradient
    kReady,  // as the plan says; its versions are bumped already
    kNeedsCare,
  };

  // The tensors' shapes, and how to walk them together, when they are not all contiguous.
  struct Shapes {
    c10::impl::SizesAndStrides param;
    c10::impl::SizesAndStrides grad;
    c10::impl::SizesAndStrides buffer;
    std::unique_ptr<OwnedLayout> layout;  // nullptr: one dense layout, walked as flat arrays
  };

  // A tensor of a slot's low-precision state, as it was when the slot was examined.
  struct Known {
    PyObject* key = nullptr;  // in the parameter's state; nullptr: there is none
    const void* data = nullptr;
    caffe2::TypeMeta dtype;
    c10::impl::SizesAndStrides shape;
  };
  struct KnownState {
    Known master;
    Known scale;
  };

  // One position in one parameter list, with what was true of its tensors when its path was chosen.
  struct Slot {
    // What each step compares, together.
    PyObject* state_dict = nullptr;  // opt.state[p], borrowed, read in each step; nullptr: none
    void* param_data = nullptr;
    void* buffer_data = nullptr;
    int64_t numel = 0;
    int64_t num_reals = 0;     // twice numel for a complex tensor
    c10::DispatchKeySet keys;  // of all its tensors
    caffe2::TypeMeta param_dtype;
    caffe2::TypeMeta grad_dtype;
    caffe2::TypeMeta buffer_dtype;
    int16_t device = kCpu;
    Path path = Path::kUnknown;
    Formulation formulation{};  // of the buffer
    bool has_buffer = false;
    bool has_known = false;  // further tensors, in `known`
    uint8_t param_itemsize = 0;
    uint8_t grad_itemsize = 0;
    uint8_t buffer_itemsize = 0;
    // The rest.
    Dtype param_kernel_dtype{};
    Dtype grad_kernel_dtype{};
    Dtype buffer_kernel_dtype{};
    uint32_t group = 0;
    uint32_t index = 0;  // in the group's list
    std::unique_ptr<Shapes> shapes;
    std::unique_ptr<KnownState> known;  // of a slot with low-precision state
  };

  // A change of a parameter's state that a step makes before it updates.
  struct NewState {
    at::Tensor tensor;  // undefined: the key goes
    PyObject* key;
    py::object param;
    py::object state_dict;  // null: to be made
    py::object replaced;    // what the state had in its place; null: nothing
    uint32_t cohort = 0;
    int16_t device = kCpu;
  };

  // The state of a slot in its group's formulation and format, and what must be put into it for
  // that.
  struct PlannedState {
    at::Tensor master;
    at::Tensor scale;
    std::vector<std::pair<PyObject*, at::Tensor>> changes;  // an undefined tensor: the key goes
  };

  bool read_groups(const py::list& param_groups, double inv_grad_scale);
  PyObject* parse_group(size_t g);
  bool is_same_list(size_t g) const;
  bool read_state(PyObject* state);
  void rebuild(PyObject* state);
  void prepare(const py::list& param_groups, const py::dict& state);
  void compare(const py::list& param_groups, const py::dict& state);
  void check_slots();
  void lay_out(size_t i);
  void restore_versions() noexcept;
  Status check_slot(size_t i, bool has_momentum, const GroupReader& reader);
  bool is_repeated(size_t i) const;
  bool wants_conversion(size_t i) const;
  at::Tensor converted(const Slot& slot, const at::Tensor& value, Formulation wanted) const;
  std::pair<PyObject*, at::Tensor> as_stored(const Slot& slot) const;
  PlannedState plan_state(size_t i, const at::Tensor& param, at::Tensor& buffer) const;
  void plan_buffer(size_t i, const at::Tensor& param, at::Tensor& buffer,
                   PlannedState& state) const;
  void plan_master(const Slot& slot, const at::Tensor& param, PlannedState& state) const;
  at::Tensor find_scale(const Slot& slot, const at::Tensor& buffer) const;
  void attach_low_precision(size_t i, const at::Tensor& param, const PlannedState& state);
  bool find_known(size_t i) noexcept;
  void refuse_random_capture() const;
  void prepare_slot(size_t i);
  at::Tensor find_grad(size_t i, const at::Tensor& param);
  void put(size_t i, PyObject* key, const at::Tensor& tensor, uint32_t cohort);
  void finish_slot(size_t i, const at::Tensor& param, const at::Tensor& grad,
                   const at::Tensor& buffer);
  const at::Tensor* find_buffer(const Slot& slot) const;
  const at::Tensor* find_state(const Slot& slot, PyObject* key) const;
  const NewState* find_planned(const Slot& slot, PyObject* key) const;
  bool is_unchanged(const Slot& slot, const c10::TensorImpl& param, const c10::TensorImpl& grad,
                    const c10::TensorImpl* buffer) const;
  bool is_unchanged_layout(const Slot& slot, const c10::TensorImpl& param,
                           const c10::TensorImpl& grad, const c10::TensorImpl* buffer) const;
  void examine(Slot& slot, const at::Tensor& param, const at::Tensor& grad,
               const at::Tensor& buffer);
  void find_shared_memory();
  bool some_grad_meets_another_slot() const;
  void attach_averages();
  bool can_attach(size_t i, const at::Tensor& param, const at::Tensor& average) const;
  void attach(size_t i, const at::Tensor& average);
  void make_averages();
  void update_averages_by_torch();
  void clear_step();
  void keep_alive();
  void update();
  int64_t bytes_to_move() const;
  void begin_range(std::optional<at::RecordFunction>& range) const;
  void separate_first_steps();
  bool has_cpu_tensors() const;
  bool host_must_know() const;
  void update_cpu();
  void insert_new_state();
  void take_back_new_state(size_t count) noexcept;
  void note_converted();
  void bump_versions();
  std::string name_of(const Slot& slot) const;

  PyObject* const buffer_key_ = PyUnicode_InternFromString("momentum_buffer");
  PyObject* const average_key_ = PyUnicode_InternFromString("ema");
  PyObject* const scale_key_ = PyUnicode_InternFromString("momentum_scale");
  PyObject* const remainder_key_ = PyUnicode_InternFromString("param_remainder");
  PyObject* const master_key_ = PyUnicode_InternFromString("master_param");
  std::mutex mutex_;  // a second thread that steps the same optimizer waits its turn
  std::atomic<std::thread::id> owner_{};  // who holds the mutex
  std::thread::id half_done_by_{};        // who has prepared a step and not yet run it

  // The plan.
  std::vector<GroupReader> readers_;
  std::vector<Hyperparams<Sgd>> hyperparams_;  // one for each reader
  std::vector<Slot> slots_;
  std::vector<PyObject*> param_objects_;  // of each slot; only compared
  std::vector<size_t> first_slot_;        // of each group, and the end
  std::vector<std::pair<PyObject*, ptrdiff_t>>
      state_keys_;  // the state's keys in order; their slot, or -1
  std::vector<std::pair<size_t, size_t>>
      repeated_;  // a slot, and the earlier one of the same parameter
  // Of parameters that have changed their group or have left it, for the next rebuild.
  std::unordered_map<PyObject*, Formulation> formulation_of_;
  // The memory of all parameters and buffers, by address; where two of them meet, order matters.
  struct Range {
    ByteRange bytes;
    size_t slot;
  };
  std::vector<Range> ranges_;
  bool ranges_changed_ = false;
  bool ranges_meet_ = false;

  FirstSteps first_steps_;  // on CUDA devices, of tensors that began under a GradScaler

  // This step. The vectors keep their capacity, so that a step allocates nothing once warm. The
  // vectors named after tensors and entries have one element for each slot; a slot without a
  // gradient has an entry of no elements.
  struct Tensors {
    c10::TensorImpl* param = nullptr;  // nullptr: nothing to update
    c10::TensorImpl* grad = nullptr;
    c10::TensorImpl* buffer = nullptr;
    c10::TensorImpl* average = nullptr;
  };
  struct MoreTensors {
    c10::TensorImpl* master = nullptr;
    c10::TensorImpl* scale = nullptr;
  };
  std::vector<Status> status_;
  std::vector<size_t> careful_;       // slots that need care
  std::vector<size_t> shared_grads_;  // slots whose gradient's storage has other owners
  bool versions_are_bumped_ = false;  // of the slots that are ready
  std::vector<Tensors> tensors_;
  std::vector<TensorEntry> entries_;
  std::vector<LowPrecision> low_precision_;
  std::vector<MoreTensors> more_tensors_;
  bool any_low_precision_ = false;  // else nobody looks at the two
  std::vector<int64_t> first_element_;
  std::vector<PyObject*> groups_;  // the dicts, borrowed
  std::vector<PyObject*> params_;  // and their lists, borrowed
  py::object state_;               // opt.state
  Options options_;
  std::vector<DeviceShare> shares_;       // one for each CUDA device that has tensors in this step
  std::vector<TensorEntry> cpu_entries_;  // only where CPU and CUDA tensors are mixed
  std::vector<int64_t> cpu_first_element_;
  bool is_prepared_ = false;
  bool is_new_state_inserted_ = false;
  bool converts_ = false;  // some slot's formulation is not its group's
  bool in_order_ = false;  // tensors share memory: one after the other, as torch's for-loop
  std::vector<NewState> new_state_;
  uint32_t rounding_step_ = 0;
  bool has_averages_ = false;            // some entry may have one
  std::vector<size_t> without_average_;  // slots that are to get one
  std::vector<size_t> averaged_by_torch_;
  std::vector<at::Tensor> resolved_grads_;
  std::vector<size_t> for_torch_;
  std::vector<std::pair<c10::intrusive_ptr<c10::TensorImpl>, c10::Storage>> kept_alive_;
};

}  // namespace momentum_ext::binding
