// Which kernel takes which tensors of a step.
#pragma once

#include <array>
#include <type_traits>

#include "../rules/rules.h"
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

// The ways to store flat tensors that have an instance of the low-precision kernel: with as many states
// as this, and without an average.
template <int kStates_>
struct Mode {
  static constexpr int kStates = kStates_;
  Dtype param;  // the gradient has it, too
  Dtype state[kStates];
  Master master;
  bool param_is_random, state_is_random;  // rounded by chance; with a master, that one is

  // Among those that there could be, of fp32 and bf16 parameters.
  static constexpr int kCount = 1 << (5 + 3 * kStates);
  constexpr int index() const {
    int bits = static_cast<int>(master) | int{param_is_random} << 2 | int{state_is_random} << 3 |
               int{param == Dtype::kBFloat16} << 4;
    for (int k = 0; k < kStates; ++k) bits |= (static_cast<int>(state[k]) & 7) << (5 + 3 * k);
    return bits;
  }
};

// A rule's, those of fp32 parameters first. A rule that nothing is said of has none: a kernel that learns
// dtypes when it runs takes all of its tensors.
template <typename Rule>
inline constexpr std::array<Mode<1>, 0> kModes{};

// Those of docs/precision.md.
template <>
inline constexpr std::array<Mode<1>, 20> kModes<Sgd>{{
    // fp32 parameters
    {Dtype::kFloat32, {Dtype::kBFloat16}, Master::kNone, false, false},
    {Dtype::kFloat32, {Dtype::kBFloat16}, Master::kNone, false, true},
    {Dtype::kFloat32, {Dtype::kFloat16}, Master::kNone, false, false},
    {Dtype::kFloat32, {Dtype::kInt8}, Master::kNone, false, false},
    {Dtype::kFloat32, {Dtype::kInt8}, Master::kNone, false, true},
    {Dtype::kFloat32, {Dtype::kFloat8E4M3}, Master::kNone, false, false},
    {Dtype::kFloat32, {Dtype::kInt4}, Master::kNone, false, true},
    // bf16 parameters without a master
    {Dtype::kBFloat16, {Dtype::kBFloat16}, Master::kNone, true, true},
    {Dtype::kBFloat16, {Dtype::kFloat32}, Master::kNone, true, false},
    {Dtype::kBFloat16, {Dtype::kInt8}, Master::kNone, true, true},
    {Dtype::kBFloat16, {Dtype::kInt8}, Master::kNone, false, false},
    // with one of 32 bits
    {Dtype::kBFloat16, {Dtype::kFloat32}, Master::kRemainder, false, false},
    {Dtype::kBFloat16, {Dtype::kBFloat16}, Master::kRemainder, false, false},
    {Dtype::kBFloat16, {Dtype::kInt8}, Master::kRemainder, false, false},
    {Dtype::kBFloat16, {Dtype::kInt8}, Master::kRemainder, false, true},
    // with one of 24
    {Dtype::kBFloat16, {Dtype::kFloat32}, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, {Dtype::kBFloat16}, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, {Dtype::kInt8}, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, {Dtype::kInt8}, Master::kByteRemainder, true, true},
    {Dtype::kBFloat16, {Dtype::kInt4}, Master::kByteRemainder, true, true},
}};

// Without amsgrad.
template <>
inline constexpr std::array<Mode<2>, 10> kModes<Adam>{{
    // fp32 parameters
    {Dtype::kFloat32, {Dtype::kBFloat16, Dtype::kFloat32}, Master::kNone, false, false},
    {Dtype::kFloat32, {Dtype::kInt8, Dtype::kInt8}, Master::kNone, false, false},
    // bf16 parameters without a master
    {Dtype::kBFloat16, {Dtype::kBFloat16, Dtype::kBFloat16}, Master::kNone, true, true},
    {Dtype::kBFloat16, {Dtype::kFloat32, Dtype::kFloat32}, Master::kNone, true, false},
    // with one of 32 bits
    {Dtype::kBFloat16, {Dtype::kFloat32, Dtype::kFloat32}, Master::kRemainder, false, false},
    {Dtype::kBFloat16, {Dtype::kBFloat16, Dtype::kFloat32}, Master::kRemainder, false, false},
    {Dtype::kBFloat16, {Dtype::kInt8, Dtype::kInt8}, Master::kRemainder, false, false},
    // with one of 24
    {Dtype::kBFloat16, {Dtype::kFloat32, Dtype::kFloat32}, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, {Dtype::kBFloat16, Dtype::kBFloat16}, Master::kByteRemainder, true, false},
    {Dtype::kBFloat16, {Dtype::kInt8, Dtype::kInt8}, Master::kByteRemainder, true, false},
}};

template <typename Rule>
constexpr int kNumModes = static_cast<int>(kModes<Rule>.size());

template <typename Rule>
constexpr int count_modes_of_fp32() {
  int count = 0;
  for (const auto& mode : kModes<Rule>) count += mode.param == Dtype::kFloat32 ? 1 : 0;
  return count;
}
template <typename Rule>
constexpr int kNumModesOfFp32 = count_modes_of_fp32<Rule>();  // the first ones

// The place of a mode in kModes; -1: it has none. A table, because each step asks for each tensor.
template <typename Rule>
struct ModeNumbers {
  using Mode = typename std::remove_const_t<decltype(kModes<Rule>)>::value_type;
  int8_t of[Mode::kCount];

  constexpr ModeNumbers() : of() {
    for (int8_t& number : of) number = -1;
    for (int k = 0; k < kNumModes<Rule>; ++k) of[kModes<Rule>[k].index()] = static_cast<int8_t>(k);
  }
};
template <typename Rule>
constexpr ModeNumbers<Rule> kModeNumbers;

// Kernels by number: the flat ones by their dtypes; once more, for tensors whose average is kept;
// and these. Tensors with low-precision state, and flat ones of other dtypes, have instances for
// some modes and share a kernel that learns their dtypes when it runs for all others.
enum Kind : int {
  kStrided32 = 2 * kNumFlat,
  kStrided64,
  kLowPrecisionFlat,
  kLowPrecisionStrided32,
  kLowPrecisionStrided64,  // flat ones too
  kFirstMode
};
template <typename Rule>
constexpr int kNumKinds = kFirstMode + kNumModes<Rule>;

// Of a flat tensor that is not stored as it is computed.
template <typename Rule>
int kind_of_mode(const TensorEntry& entry, const Hyperparams<Rule>& h) {
  using Mode = typename ModeNumbers<Rule>::Mode;
  if (kNumModes<Rule> == 0 || entry.average != nullptr || Rule::num_states(h) != Mode::kStates) {
    return kLowPrecisionFlat;
  }
  const LowPrecision* const low = entry.low_precision;
  const Master master = low != nullptr ? low->master_kind : Master::kNone;
  const bool is_random = low != nullptr && h.stochastic_rounding;
  const bool rounds_param =
      is_random && master == Master::kNone && itemsize(entry.param_dtype) == 2;
  const bool has_modes =
      entry.param_dtype == entry.grad_dtype &&
      (entry.param_dtype == Dtype::kFloat32 || entry.param_dtype == Dtype::kBFloat16);
  if (!has_modes) return kLowPrecisionFlat;
  Mode mine = {entry.param_dtype,
               {},
               master,
               master == Master::kByteRemainder ? h.rounds_masters : rounds_param,
               false};
  for (int k = 0; k < Mode::kStates; ++k) {
    mine.state[k] = entry.state_dtype[k];
    mine.state_is_random = mine.state_is_random || (is_random && itemsize(mine.state[k]) <= 2);
  }
  const int number = kModeNumbers<Rule>.of[mine.index()];
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
                                     : kind_of_mode(entry, h);
  }
  if (entry.layout == nullptr) {
    for (int k = 0; k < kNumFlat && alike; ++k) {
      const Dtypes& mine = kFlatDtypes[k];
      const bool is_mine = p == mine.param && g == mine.grad && (s == mine.state || !has_state);
      if (is_mine) return entry.average != nullptr ? kNumFlat + k : k;
    }
    if (!in_double) return kind_of_mode(entry, h);
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
