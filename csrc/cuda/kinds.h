// Which kernel takes which tensors of a step.
#pragma once

#include "backend.h"
#include "launch_table.h"

namespace momentum_ext::cuda {

// The dtypes of flat tensors that have a kernel of their own, those that training makes: one dtype;
// low-precision gradients; states in fp32.
struct Dtypes {
  Dtype param, grad, state;
};
constexpr Dtypes kFlatDtypes[] = {
    {Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32},
    {Dtype::kFloat64, Dtype::kFloat64, Dtype::kFloat64},
    {Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kBFloat16},
    {Dtype::kFloat16, Dtype::kFloat16, Dtype::kFloat16},
    {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat32},
    {Dtype::kFloat32, Dtype::kFloat16, Dtype::kFloat32},
    {Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kFloat32},
    {Dtype::kFloat16, Dtype::kFloat16, Dtype::kFloat32},
};
constexpr int kNumFlat = static_cast<int>(sizeof(kFlatDtypes) / sizeof(Dtypes));

// The ways to store flat tensors that have an instance of the low-precision kernel: those of
// docs/precision.md, with a state and without an average.
struct Mode {
  Dtype param, state;  // the gradient has the parameter's
  Master master;
  bool param_is_random, state_is_random;  // rounded by chance; with a master, that one is

  // Among those that there could be, of fp32 and bf16 parameters.
  static constexpr int kCount = 256;
  constexpr int index() const {
    return static_cast<int>(state) | static_cast<int>(master) << 3 | int{param_is_random} << 5 |
           int{state_is_random} << 6 | int{param == Dtype::kBFloat16} << 7;
  }
};
constexpr Mode kModes[] = {
    // fp32 parameters
    {Dtype::kFloat32, Dtype::kBFloat16, Master::kNone, false, false},
    {Dtype::kFloat32, Dtype::kBFloat16, Master::kNone, false, true},
    {Dtype::kFloat32, Dtype::kFloat16, Master::kNone, false, false},
    {Dtype::kFloat32, Dtype::kInt8, Master::kNone, false, false},
    {Dtype::kFloat32, Dtype::kInt8, Master::kNone, false, true},
    {Dtype::kFloat32, Dtype::kFloat8E4M3, Master::kNone, false, false},
    {Dtype::kFloat32, Dtype::kInt4, Master::kNone, false, true},
    // bf16 parameters without a master
    {Dtype::kBFloat16, Dtype::kBFloat16, Master::kNone, true, true},
    {Dtype::kBFloat16, Dtype::kFloat32, Master::kNone, true, false},
    {Dtype::kBFloat16, Dtype::kInt8, Master::kNone, true, true},
    {Dtype::kBFloat16, Dtype::kInt8, Master::kNone, false, false},
    // with one of 32 bits
    {Dtype::kBFloat16, Dtype::kFloat32, Master::kRemainder, false, false},
    {Dtype::kBFloat16, Dtype::kBFloat16, Master::kRemainder, false, false},
    {Dtype::kBFloat16, Dtype::kInt8, Master::kRemainder, false, false},
    {Dtype::kBFloat16, Dtype::kInt8, Master::kRemainder, false, true},
    // with one of 24
    {Dtype::kBFloat16, Dtype::kFloat32, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, Dtype::kBFloat16, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, Dtype::kInt8, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, Dtype::kInt8, Master::kByteRemainder, true, true},
    {Dtype::kBFloat16, Dtype::kInt4, Master::kByteRemainder, true, true},
};
constexpr int kNumModes = static_cast<int>(sizeof(kModes) / sizeof(Mode));
constexpr int kNumModesOfFp32 = 7;  // the first ones
static_assert(kModes[kNumModesOfFp32 - 1].param == Dtype::kFloat32 &&
              kModes[kNumModesOfFp32].param == Dtype::kBFloat16);

// The place of a mode in kModes; -1: it has none. A table, because each step asks for each tensor.
struct ModeNumbers {
  int8_t of[Mode::kCount];

  constexpr ModeNumbers() : of() {
    for (int8_t& number : of) number = -1;
    for (int k = 0; k < kNumModes; ++k) of[kModes[k].index()] = static_cast<int8_t>(k);
  }
};
constexpr ModeNumbers kModeNumbers;

// Kernels by number: the flat ones by their dtypes; once more, for tensors whose average is kept;
// and these. Tensors with low-precision state, and flat ones of other dtypes, have instances for
// some modes and share a kernel that learns their dtypes when it runs for all others.
enum Kind : int {
  kStrided32 = 2 * kNumFlat,
  kStrided64,
  kLowPrecisionFlat,
  kLowPrecisionStrided32,
  kLowPrecisionStrided64,  // flat ones too
  kFirstMode,
  kNumKinds = kFirstMode + kNumModes
};

// Of a flat tensor that is not stored as it is computed.
template <typename Rule>
int kind_of_mode(const TensorEntry& entry, const Hyperparams<Rule>& h) {
  if (entry.average != nullptr || entry.state[0] == nullptr) return kLowPrecisionFlat;
  const LowPrecision* const low = entry.low_precision;
  const Master master = low != nullptr ? low->master_kind : Master::kNone;
  const bool is_random = low != nullptr && h.stochastic_rounding;
  const bool rounds_param =
      is_random && master == Master::kNone && itemsize(entry.param_dtype) == 2;
  const bool has_modes =
      entry.param_dtype == entry.grad_dtype &&
      (entry.param_dtype == Dtype::kFloat32 || entry.param_dtype == Dtype::kBFloat16);
  if (!has_modes) return kLowPrecisionFlat;
  const Mode mine = {entry.param_dtype, entry.state_dtype[0], master,
                     master == Master::kByteRemainder ? h.rounds_masters : rounds_param,
                     is_random && itemsize(entry.state_dtype[0]) <= 2};
  const int number = kModeNumbers.of[mine.index()];
  return number < 0 ? kLowPrecisionFlat : kFirstMode + number;
}

template <typename Rule>
int kind_of(const TensorEntry& entry, const Hyperparams<Rule>& h) {
  const Dtype p = entry.param_dtype;
  const Dtype g = entry.grad_dtype;
  const bool has_state = entry.state[0] != nullptr;
  const Dtype s = has_state ? entry.state_dtype[0] : p;
  bool in_double = p == Dtype::kFloat64 || g == Dtype::kFloat64 || s == Dtype::kFloat64;
  bool alike = true;  // the states
  for (int k = 1; k < Rule::kMaxStates; ++k) {
    if (entry.state[k] == nullptr) break;
    alike = alike && entry.state_dtype[k] == s;
    in_double = in_double || entry.state_dtype[k] == Dtype::kFloat64;
  }
  if (entry.low_precision != nullptr) {
    return in_double                 ? kLowPrecisionStrided64
           : entry.layout != nullptr ? kLowPrecisionStrided32
           : alike                   ? kind_of_mode(entry, h)
                                     : kLowPrecisionFlat;
  }
  if (entry.layout == nullptr) {
    for (int k = 0; k < kNumFlat && alike; ++k) {
      const Dtypes& mine = kFlatDtypes[k];
      const bool is_mine = p == mine.param && g == mine.grad && (s == mine.state || !has_state);
      if (is_mine) return entry.average != nullptr ? kNumFlat + k : k;
    }
    if (!in_double) return alike ? kind_of_mode(entry, h) : kLowPrecisionFlat;
  }
  return in_double ? kStrided64 : kStrided32;
}

// What a launch needs beside the tensors of its kind, of which the table has `count`.
template <typename Rule>
struct Launching {
  const StepTable<Rule>& table;
  int device;
  const StepScalars& scalars;
  bool has_device_numbers;
  cudaStream_t stream;
  int kind;
  int64_t count;
};

// Of the kinds from kLowPrecisionFlat on: of any mode, of those of fp32 and of bf16 parameters.
template <typename Rule>
cudaError_t launch_any_mode(const Launching<Rule>& launching);
template <typename Rule>
cudaError_t launch_fp32_mode(const Launching<Rule>& launching);
template <typename Rule>
cudaError_t launch_bf16_mode(const Launching<Rule>& launching);

}  // namespace momentum_ext::cuda
