// What a block of the step's kernels has to do, read from the launch table: which chunk of which
// tensor, by which rule, with which numbers; and the machine words in which it moves elements.
#pragma once

#include <cuda_runtime.h>

#include "../rules/average.h"
#include "../rules/clip.h"
#include "launch_table.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

// ---- what a block has to do ---------------------------------------------------------------------

// Calls body(Sgd::Variant<...>()) for the variant with this number. All threads of a block have the
// same one.
template <typename Body>
__device__ __forceinline__ void with_variant(int variant, const Body& body) {
  switch (variant) {
    case 0:
      return body(Sgd::Variant<WeightDecay::kNone, Momentum::kNone, false>());
    case 1:
      return body(Sgd::Variant<WeightDecay::kL2, Momentum::kNone, false>());
    case 2:
      return body(Sgd::Variant<WeightDecay::kNone, Momentum::kLaterStep, false>());
    case 3:
      return body(Sgd::Variant<WeightDecay::kL2, Momentum::kLaterStep, false>());
    case 4:
      return body(Sgd::Variant<WeightDecay::kNone, Momentum::kLaterStep, true>());
    case 5:
      return body(Sgd::Variant<WeightDecay::kL2, Momentum::kLaterStep, true>());
    case 6:
      return body(Sgd::Variant<WeightDecay::kNone, Momentum::kFirstStep, false>());
    case 7:
      return body(Sgd::Variant<WeightDecay::kL2, Momentum::kFirstStep, false>());
    case 8:
      return body(Sgd::Variant<WeightDecay::kNone, Momentum::kFirstStep, true>());
    default:
      return body(Sgd::Variant<WeightDecay::kL2, Momentum::kFirstStep, true>());
  }
}

template <typename opmath_t>
struct Work {
  Sgd::Coefficients<opmath_t> coefficients;
  opmath_t decay_factor;  // of decoupled weight decay, else 1: multiplying is cheaper than asking
  int variant;
  bool reads_buffer;
  bool writes_buffer;
};

template <typename opmath_t>
__device__ __forceinline__ opmath_t read_number(const DeviceNumber& number) {
  return visit_dtype<double>(number.dtype, [&](auto type) -> opmath_t {
    return static_cast<opmath_t>(load(*static_cast<const decltype(type)*>(number.data)));
  });
}

template <typename opmath_t, int kReserved, int kBytes>
__device__ __forceinline__ Work<opmath_t> read_group(const LaunchTable<kBytes>& table, int group) {
  const TableHeader& header = table.header;
  const int at = group_at<kReserved>(table, group);
  const auto packed = unpack<PackedGroup<opmath_t>>(table, at);
  Work<opmath_t> work;
  Sgd::Coefficients<opmath_t>& c = work.coefficients;
  c = packed.coefficients;
  bool decays = (packed.flags & kHasWeightDecay) != 0;
  const bool decoupled = (packed.flags & kIsDecoupled) != 0;
  work.decay_factor = decoupled ? c.weight_decay : opmath_t{1};
  const bool has_momentum = (packed.flags & kHasMomentum) != 0;
  const bool nesterov = (packed.flags & kHasNesterov) != 0;
  const uint32_t cohort = packed.flags >> kCohortShift;
  bool is_first_step = cohort == kFirstStep;
  if (header.settled != nullptr && cohort != kNoCohort) is_first_step = *header.settled < cohort;
  if (header.grad_number_is == GradNumber::kScale) {
    c.grad_coef *= inverse_of_scale(*static_cast<const float*>(header.grad_number));
  } else if (header.grad_number_is == GradNumber::kFactor) {
    c.grad_coef *= static_cast<opmath_t>(*static_cast<const double*>(header.grad_number));
  }
  if (header.has_device_numbers != 0) {
    const int behind = at + kWordsOf<PackedGroup<opmath_t>>;
    const auto numbers = unpack<Sgd::OnDevice>(table, behind);
    if (numbers.lr.data != nullptr) c.step = read_number<opmath_t>(numbers.lr);
    if (numbers.momentum.data != nullptr) c.momentum = read_number<opmath_t>(numbers.momentum);
    if (numbers.weight_decay.data != nullptr) {
      c.weight_decay = read_number<opmath_t>(numbers.weight_decay);
      decays = c.weight_decay != 0;
    }
  }
  work.variant =
      (decays ? 1 : 0) + (has_momentum ? 2 : 0) + (nesterov ? 2 : 0) + (is_first_step ? 4 : 0);
  work.reads_buffer = has_momentum && !is_first_step;
  work.writes_buffer = has_momentum;
  return work;
}

template <typename opmath_t, int kBytes>
__device__ __forceinline__ opmath_t read_average_weight(const LaunchTable<kBytes>& table) {
  constexpr int kReserved = kWordsOf<AverageWeight>;
  const auto weight = unpack<AverageWeight>(table, LaunchTable<kBytes>::kNumWords - kReserved);
  return static_cast<opmath_t>(weight.on_device != nullptr ? *weight.on_device : weight.number);
}

template <int kBytes>
__device__ __forceinline__ bool overflowed(const LaunchTable<kBytes>& table) {
  return table.header.found_inf != nullptr && *table.header.found_inf != 0;
}

// This block's part of a tensor: elements [begin, begin + count).
struct Chunk {
  int tensor;
  int group;
  int64_t begin;
  int count;
};

template <int kRecord, int kBytes>
__device__ __forceinline__ Chunk find_chunk(const LaunchTable<kBytes>& table, int chunk_size) {
  const int tensor = locate_tensor<kRecord, 3>(table, blockIdx.x);
  const uint64_t word = table.words[tensor * kRecord + 3];
  const uint32_t end = tensor + 1 < table.header.num_tensors
                           ? first_chunk_of(table.words[(tensor + 1) * kRecord + 3])
                           : gridDim.x;
  return {tensor, group_of(word), int64_t{blockIdx.x - first_chunk_of(word)} * chunk_size,
          blockIdx.x + 1 == end ? last_count_of(word) : chunk_size};
}

// The position within an innermost dimension of this size, and the index of the rest.
struct Position {
  int64_t inside;
  uint64_t outside;
};
__device__ __forceinline__ Position split_index(uint64_t index, uint64_t size) {
  uint64_t quotient;
  if ((index | size) >> 32 == 0) {  // the 64-bit division is many times slower
    quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
  } else {
    quotient = index / size;
  }
  return {static_cast<int64_t>(index - quotient * size), quotient};
}

// ---- machine words ------------------------------------------------------------------------------

// The machine words in which a thread moves its elements.
template <int kBytes>
struct MachineWord;
template <>
struct MachineWord<2> {
  using type = uint16_t;
};
template <>
struct MachineWord<4> {
  using type = uint32_t;
};
template <>
struct MachineWord<8> {
  using type = uint2;
};
template <>
struct MachineWord<16> {
  using type = uint4;
};

template <typename scalar_t, int kCount>
__device__ __forceinline__ void read(const scalar_t* from, scalar_t (&to)[kCount]) {
  using Word = typename MachineWord<sizeof(to)>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  memcpy(to, &word, sizeof(to));
}

template <typename scalar_t, int kCount>
__device__ __forceinline__ void write(scalar_t* to, const scalar_t (&from)[kCount]) {
  using Word = typename MachineWord<sizeof(from)>::type;
  Word word;
  memcpy(&word, from, sizeof(from));
  *reinterpret_cast<Word*>(to) = word;
}

}  // namespace
}  // namespace momentum_ext::cuda
