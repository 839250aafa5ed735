// What a block of the step's kernels has to do, read from the launch table: which chunk of which
// tensor, by which variant of its rule, with which numbers; and the machine words in which it moves
// elements.
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

// All threads of a block have the same.
template <typename Rule, typename opmath_t>
struct Work {
  typename Rule::template Coefficients<opmath_t> coefficients;
  int variant;
  int num_reads;   // states that are read
  int num_states;  // that are written
};

// Calls body(variant) with the variant of the rule that is to be computed.
template <typename Rule, typename opmath_t, typename Body>
__device__ __forceinline__ void with_variant(const Work<Rule, opmath_t>& work, const Body& body) {
  Rule::template visit_variant<Rule::kMergedVariants>(work.variant, body);
}

template <typename opmath_t>
__device__ __forceinline__ opmath_t read_number(const DeviceNumber& number) {
  return visit_dtype<double>(number.dtype, [&](auto type) -> opmath_t {
    return static_cast<opmath_t>(load(*static_cast<const decltype(type)*>(number.data)));
  });
}

template <typename Rule, typename opmath_t, int kReserved, int kBytes>
__device__ __forceinline__ Work<Rule, opmath_t> read_group(const LaunchTable<kBytes>& table,
                                                           int group) {
  const TableHeader& header = table.header;
  const int at = group_at<kReserved>(table, group);
  const auto packed = unpack<PackedGroup<Rule, opmath_t>>(table.words + at);
  Work<Rule, opmath_t> work;
  auto& c = work.coefficients;
  c = packed.coefficients;
  auto options = Rule::Options::of_bits(packed.flags);
  const uint32_t cohort = packed.flags >> kCohortShift<Rule>;
  bool is_first_step = cohort == kFirstStep<Rule>;
  if (header.settled != nullptr && cohort != kNoCohort) is_first_step = *header.settled < cohort;
  if (header.grad_number_is == GradNumber::kScale) {
    c.grad_coef *= inverse_of_scale(*static_cast<const float*>(header.grad_number));
  } else if (header.grad_number_is == GradNumber::kFactor) {
    c.grad_coef *= static_cast<opmath_t>(*static_cast<const double*>(header.grad_number));
  }
  if (header.has_device_numbers != 0) {
    const int behind = at + kWordsOf<PackedGroup<Rule, opmath_t>>;
    const auto numbers = unpack<typename Rule::OnDevice>(table.words + behind);
    const auto read = [](const DeviceNumber& number) { return read_number<opmath_t>(number); };
    Rule::read_on_device(numbers, read, options, c);
  }
  Rule::merge(options, c);
  work.variant = Rule::variant_of(options, is_first_step);
  work.num_reads = Rule::num_reads(options, is_first_step);
  work.num_states = Rule::num_states(options);
  return work;
}

template <typename opmath_t, int kBytes>
__device__ __forceinline__ opmath_t read_average_weight(const LaunchTable<kBytes>& table) {
  constexpr int kReserved = kWordsOf<AverageWeight>;
  const auto weight =
      unpack<AverageWeight>(table.words + LaunchTable<kBytes>::kNumWords - kReserved);
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

template <typename Kind, int kBytes>
__device__ __forceinline__ Chunk find_chunk(const LaunchTable<kBytes>& table) {
  constexpr int kRecord = Kind::kRecord, kChunks = Record<typename Kind::Rule>::kChunks;
  const int tensor = locate_tensor<kRecord, kChunks>(table, blockIdx.x);
  const uint64_t word = table.words[tensor * kRecord + kChunks];
  const uint32_t end = tensor + 1 < table.header.num_tensors
                           ? first_chunk_of(table.words[(tensor + 1) * kRecord + kChunks])
                           : gridDim.x;
  return {tensor, group_of(word), int64_t{blockIdx.x - first_chunk_of(word)} * Kind::kChunk,
          blockIdx.x + 1 == end ? last_count_of(word) : Kind::kChunk};
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

// In which a thread moves its elements.
template <int kBytes>
using MachineWord = std::conditional_t<
    kBytes == 2, uint16_t,
    std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>;

template <typename scalar_t, int kCount>
__device__ __forceinline__ void read(const scalar_t* from, scalar_t (&to)[kCount]) {
  using Word = MachineWord<sizeof(to)>;
  const Word word = *reinterpret_cast<const Word*>(from);
  memcpy(to, &word, sizeof(to));
}

template <typename scalar_t, int kCount>
__device__ __forceinline__ void write(scalar_t* to, const scalar_t (&from)[kCount]) {
  using Word = MachineWord<sizeof(from)>;
  Word word;
  memcpy(&word, from, sizeof(from));
  *reinterpret_cast<Word*>(to) = word;
}

}  // namespace
}  // namespace momentum_ext::cuda
