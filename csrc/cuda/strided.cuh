// The strided kernel of a step: tensors whose operands do not share one dense layout, one element at
// a time, each block of threads a block of up to three dimensions. Included by step.cu, after the
// packing that it reads.
#pragma once

#include "packing.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

template <typename opmath_t>
__device__ __forceinline__ opmath_t load_as(Dtype dtype, const void* base, int64_t i) {
  return visit_dtype<opmath_t>(dtype, [&](auto type) {
    return static_cast<opmath_t>(load(static_cast<const decltype(type)*>(base)[i]));
  });
}

template <typename opmath_t>
__device__ __forceinline__ void store_as(Dtype dtype, void* base, int64_t i, opmath_t value) {
  visit_dtype<opmath_t>(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    store(static_cast<scalar_t*>(base)[i], static_cast<typename OpMath<scalar_t>::type>(value));
  });
}

// How a strided tensor is cut into chunks: blocks of three dimensions, each as long as a power of
// two. They are long enough in each tensor's innermost dimension to have whole sectors of its
// memory, of 32 bytes, and small enough for these to stay in L1 until all warps have been there:
// what a transposition in shared memory would save is the L1's own bandwidth, which is not what the
// step waits for.
struct BlockShape {
  static constexpr int kBlockDims = 3;

  StridedDim dims[kMaxStridedDimsCuda];  // the block's first
  int ndim = 0;
  int log_sizes[kBlockDims];
  int64_t num_blocks = 1;

  BlockShape(const TensorEntry& entry, int log_chunk) {
    int num_wanted = 0;
    with_layout(entry, [&](const StridedLayout& layout) {
      const int inner = layout.ndim - 1;
      dims[ndim++] = layout.dims[inner];
      if (layout.across >= 0) dims[ndim++] = layout.dims[layout.across];
      if (layout.third >= 0) dims[ndim++] = layout.dims[layout.third];
      num_wanted = ndim;
      for (int d = inner - 1; d >= 0; --d) {
        if (d != layout.across && d != layout.third) dims[ndim++] = layout.dims[d];
      }
    });
    while (ndim < kBlockDims) dims[ndim++] = {1, {}};

    // What the dimensions that are wanted do not need is for whichever comes next.
    constexpr int kWanted[][kBlockDims] = {{10, 0, 0}, {4, 6, 0}, {4, 3, 3}};
    int left = log_chunk;
    for (const bool as_wanted : {true, false}) {
      for (int d = 0; d < kBlockDims; ++d) {
        if (as_wanted) log_sizes[d] = 0;
        const int most = as_wanted ? std::min(left, kWanted[num_wanted - 1][d]) : left;
        for (int more = 0; more < most && dims[d].size > int64_t{1} << log_sizes[d]; ++more) {
          ++log_sizes[d];
          --left;
        }
      }
    }
    for (int d = 0; d < ndim; ++d) {
      num_blocks *= ((dims[d].size - 1) >> (d < kBlockDims ? log_sizes[d] : 0)) + 1;
    }
  }
};

// On a multiprocessor: 5 leave 48 registers a thread, 4 leave 64 and 2 leave 128. Each state takes a
// pointer, an offset and a value; left to itself, ptxas 13.0 spills.
template <typename Rule, typename opmath_t>
constexpr int kStridedBlocksAtOnce = Rule::kMaxStates == 1   ? 5
                                     : sizeof(opmath_t) == 4 ? 4
                                                             : 2;

template <typename Rule_, typename opmath_t_>
struct Strided {
  using Rule = Rule_;
  using opmath_t = opmath_t_;
  using Fields = Record<Rule>;
  static constexpr int kRecord = Fields::kStrided;
  static constexpr int kReserved = kWordsOf<AverageWeight>;
  static constexpr int kRoundingWords = 0;
  static constexpr int kLogChunk = 10;
  static constexpr int kChunk = 1 << kLogChunk;

  static int64_t num_chunks(const TensorEntry& entry) {
    return BlockShape(entry, kLogChunk).num_blocks;
  }

  static void pack_rest(const TensorEntry& entry, uint64_t* record) {
    const BlockShape shape(entry, kLogChunk);
    TensorKind kind(entry, shape.ndim);
    for (int d = 0; d < BlockShape::kBlockDims; ++d) {
      kind.number |= static_cast<uint32_t>(shape.log_sizes[d]) << 8 * d;
    }
    record[Fields::kKind] = kind.word();
    for (int d = 0; d < shape.ndim; ++d) {
      pack_dim<Rule>(shape.dims[d], record + Fields::kFirstDim + Fields::kDimWords * d);
    }
  }
};

template <typename opmath_t, int kBytes>
__device__ __forceinline__ void average_one(const LaunchTable<kBytes>& table, Dtype dtype,
                                            const void* param, void* average, int64_t i) {
  store_as(dtype, average, i,
           new_average<FusedMultiplyAdd>(read_average_weight<opmath_t>(table),
                                         load_as<opmath_t>(dtype, average, i),
                                         load_as<opmath_t>(dtype, param, i)));
}

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(
    kThreads, kStridedBlocksAtOnce<typename Kind::Rule, typename Kind::opmath_t>)
    update_strided(const LaunchTable<kBytes> __grid_constant__ table) {
  using Rule = typename Kind::Rule;
  using Fields = typename Kind::Fields;
  using opmath_t = typename Kind::opmath_t;
  constexpr int kOperands = Fields::kOperands;
  if (overflowed(table)) return;
  const Chunk chunk = find_chunk<Kind>(table);
  const uint64_t* const record = table.words + chunk.tensor * Kind::kRecord;
  void* memory[kOperands];
#pragma unroll
  for (int o = 0; o < kOperands; ++o) memory[o] = reinterpret_cast<void*>(record[o]);
  auto* const average = reinterpret_cast<void*>(record[Fields::kAverage]);
  const TensorKind kind(record[Fields::kKind]);
  const uint64_t* const dims = record + Fields::kFirstDim;
  const auto work = read_group<Rule, opmath_t, Kind::kReserved>(table, chunk.group);

  // Where this block of the tensor begins, and how much of it there is in each of its dimensions.
  constexpr int kBlockDims = BlockShape::kBlockDims;
  int sizes[kBlockDims];
  int64_t begin[kOperands] = {};
  const auto move = [&](int64_t (&offsets)[kOperands], int d, int64_t by) {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      offsets[o] += by * static_cast<int64_t>(dims[Fields::kDimWords * d + 1 + o]);
    }
  };
  uint64_t number = static_cast<uint64_t>(chunk.begin) >> Kind::kLogChunk;
#pragma unroll
  for (int d = 0; d < kBlockDims; ++d) {
    const auto size = static_cast<int64_t>(dims[Fields::kDimWords * d]);
    const int log_size = kind.log_size(d);
    const auto [block, rest] =
        split_index(number, static_cast<uint64_t>((size - 1) >> log_size) + 1);
    const int64_t first = block << log_size;
    const int64_t left = size - first;
    sizes[d] = left >> log_size != 0 ? 1 << log_size : static_cast<int>(left);
    move(begin, d, first);
    number = rest;
  }
#pragma unroll 1
  for (int d = kBlockDims; d < kind.ndim(); ++d) {
    const auto [index, rest] = split_index(number, dims[Fields::kDimWords * d]);
    move(begin, d, index);
    number = rest;
  }

#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Kind::kChunk; i += kThreads) {
    int64_t at[kOperands];
#pragma unroll
    for (int o = 0; o < kOperands; ++o) at[o] = begin[o];
    int rest = i;
    bool is_there = true;
#pragma unroll
    for (int d = 0; d < kBlockDims; ++d) {
      const int log_size = kind.log_size(d);
      const int index = rest & ((1 << log_size) - 1);
      rest >>= log_size;
      is_there = is_there && index < sizes[d];
      move(at, d, index);
    }
    if (!is_there || rest != 0) continue;
    auto p = load_as<opmath_t>(kind.dtype(kParam), memory[kParam], at[kParam]);
    const auto g = load_as<opmath_t>(kind.dtype(kGrad), memory[kGrad], at[kGrad]);
    opmath_t s[Rule::kMaxStates] = {};
    repeat<Rule::kMaxStates>([&]<int k>() {
      constexpr int o = kState + k;
      if (k < work.num_reads) s[k] = load_as<opmath_t>(kind.dtype(o), memory[o], at[o]);
    });
    with_variant(work, [&](auto variant) {
      Rule::template update<CudaArithmetic>(variant, work.coefficients, g, p, s);
    });
    repeat<Rule::kMaxStates>([&]<int k>() {
      constexpr int o = kState + k;
      if (k < work.num_states) store_as(kind.dtype(o), memory[o], at[o], s[k]);
    });
    store_as(kind.dtype(kParam), memory[kParam], at[kParam], p);
    if (average != nullptr) {
      // Computed in the type that goes with the parameter, whatever its gradient is.
      if (sizeof(opmath_t) == 8 && kind.dtype(kParam) == Dtype::kFloat64) {
        average_one<opmath_t>(table, kind.dtype(kParam), memory[kParam], average, at[kParam]);
      } else {
        average_one<float>(table, kind.dtype(kParam), memory[kParam], average, at[kParam]);
      }
    }
  }
}

// Follows the launches of a step in which some tensors may have had their first update.
__global__ void record_settled(const float* found_inf, uint32_t newest_cohort, uint32_t* settled,
                               uint32_t* settled_on_host) {
  if (found_inf != nullptr && *found_inf != 0) return;
  if (*settled < newest_cohort) *settled = newest_cohort;  // a replayed graph may be an old one
  *settled_on_host = *settled;
}

}  // namespace
}  // namespace momentum_ext::cuda
