// The strided kernel of a step: tensors whose parameter, gradient and buffer do not share one dense
// layout, one element at a time, each block of threads a block of up to three dimensions. Included
// by step.cu, after the packing that it reads.
#pragma once

#include "packing.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

template <typename opmath_t>
__device__ __forceinline__ opmath_t load_as(int dtype, const void* base, int64_t i) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat32:
      return static_cast<opmath_t>(static_cast<const float*>(base)[i]);
    case Dtype::kBFloat16:
      return load(static_cast<const BFloat16*>(base)[i]);
    case Dtype::kFloat16:
      return load(static_cast<const Float16*>(base)[i]);
    default:
      if constexpr (sizeof(opmath_t) == 8) return static_cast<const double*>(base)[i];
      return 0;  // a float64 tensor is computed in double
  }
}

template <typename opmath_t>
__device__ __forceinline__ void store_as(int dtype, void* base, int64_t i, opmath_t value) {
  const auto single = static_cast<float>(value);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat32:
      return store(static_cast<float*>(base)[i], single);
    case Dtype::kBFloat16:
      return store(static_cast<BFloat16*>(base)[i], single);
    case Dtype::kFloat16:
      return store(static_cast<Float16*>(base)[i], single);
    default:
      if constexpr (sizeof(opmath_t) == 8) static_cast<double*>(base)[i] = value;
  }
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
    const StridedDim flat = {entry.numel, {1, 1, 1}};
    const StridedLayout layout = entry.layout != nullptr ? *entry.layout : StridedLayout(&flat, 1);
    const int inner = layout.ndim - 1;
    dims[ndim++] = layout.dims[inner];
    if (layout.across >= 0) dims[ndim++] = layout.dims[layout.across];
    if (layout.third >= 0) dims[ndim++] = layout.dims[layout.third];
    const int num_wanted = ndim;
    for (int d = inner - 1; d >= 0; --d) {
      if (d != layout.across && d != layout.third) dims[ndim++] = layout.dims[d];
    }
    while (ndim < kBlockDims) dims[ndim++] = {1, {0, 0, 0}};

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

// On a multiprocessor, which leaves 48 registers a thread; left to itself, ptxas 13.0 spills.
constexpr int kStridedBlocksAtOnce = 5;

template <typename opmath_t_>
struct Strided {
  using opmath_t = opmath_t_;
  static constexpr int kRecord = kStridedRecord;
  static constexpr int kReserved = kWordsOf<AverageWeight>;
  static constexpr int kRoundingWords = 0;
  static constexpr int kLogChunk = 10;
  static constexpr int kChunk = 1 << kLogChunk;

  static int64_t num_chunks(const TensorEntry& entry) {
    return BlockShape(entry, kLogChunk).num_blocks;
  }

  static void pack_rest(const TensorEntry& entry, uint64_t* record) {
    const BlockShape shape(entry, kLogChunk);
    record[5] = pack_dtypes(entry) | static_cast<uint64_t>(shape.ndim) << 24;
    for (int d = 0; d < shape.ndim; ++d)
      pack_dim(shape.dims[d], record + kFirstDim + kDimWords * d);
    for (int d = 0; d < BlockShape::kBlockDims; ++d) {
      record[5] |= static_cast<uint64_t>(shape.log_sizes[d]) << (32 + 8 * d);
    }
  }
};

template <typename opmath_t, int kBytes>
__device__ __forceinline__ void average_one(const LaunchTable<kBytes>& table, int dtype,
                                            const void* param, void* average, int64_t i) {
  store_as(dtype, average, i,
           new_average<FusedMultiplyAdd>(read_average_weight<opmath_t>(table),
                                         load_as<opmath_t>(dtype, average, i),
                                         load_as<opmath_t>(dtype, param, i)));
}

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(kThreads, kStridedBlocksAtOnce)
    update_strided(const LaunchTable<kBytes> __grid_constant__ table) {
  using opmath_t = typename Kind::opmath_t;
  if (overflowed(table)) return;
  const Chunk chunk = find_chunk<Kind::kRecord>(table, Kind::kChunk);
  const uint64_t* const record = table.words + chunk.tensor * Kind::kRecord;
  auto* const param = reinterpret_cast<void*>(record[0]);
  const auto* const grad = reinterpret_cast<const void*>(record[1]);
  auto* const buffer = reinterpret_cast<void*>(record[2]);
  auto* const average = reinterpret_cast<void*>(record[4]);
  const auto kinds = static_cast<uint32_t>(record[5]);
  const int param_dtype = static_cast<int>(kinds & 0xffu);
  const int grad_dtype = static_cast<int>(kinds >> 8 & 0xffu);
  const int buffer_dtype = static_cast<int>(kinds >> 16 & 0xffu);
  const int ndim = static_cast<int>(kinds >> 24);
  const uint64_t* const dims = record + kFirstDim;
  const Work<opmath_t> work = read_group<opmath_t, Kind::kReserved>(table, chunk.group);

  // Where this block of the tensor begins, and how much of it there is in each of its dimensions.
  constexpr int kBlockDims = BlockShape::kBlockDims;
  const auto log_sizes = static_cast<uint32_t>(record[5] >> 32);  // a byte each
  int sizes[kBlockDims];
  int64_t begin_param = 0, begin_grad = 0, begin_buffer = 0;
  const auto begin_at = [&](int d, int64_t index) {
    begin_param += index * static_cast<int64_t>(dims[kDimWords * d + 1]);
    begin_grad += index * static_cast<int64_t>(dims[kDimWords * d + 2]);
    begin_buffer += index * static_cast<int64_t>(dims[kDimWords * d + 3]);
  };
  uint64_t number = static_cast<uint64_t>(chunk.begin) >> Kind::kLogChunk;
#pragma unroll
  for (int d = 0; d < kBlockDims; ++d) {
    const auto size = static_cast<int64_t>(dims[kDimWords * d]);
    const auto log_size = static_cast<int>(log_sizes >> 8 * d & 0xffu);
    const auto [block, rest] =
        split_index(number, static_cast<uint64_t>((size - 1) >> log_size) + 1);
    const int64_t begin = block << log_size;
    const int64_t left = size - begin;
    sizes[d] = left >> log_size != 0 ? 1 << log_size : static_cast<int>(left);
    begin_at(d, begin);
    number = rest;
  }
#pragma unroll 1
  for (int d = kBlockDims; d < ndim; ++d) {
    const auto [index, rest] = split_index(number, dims[kDimWords * d]);
    begin_at(d, index);
    number = rest;
  }

#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x); k < Kind::kChunk; k += kThreads) {
    int64_t at_param = begin_param, at_grad = begin_grad, at_buffer = begin_buffer;
    int rest = k;
    bool is_there = true;
#pragma unroll
    for (int d = 0; d < kBlockDims; ++d) {
      const auto log_size = static_cast<int>(log_sizes >> 8 * d & 0xffu);
      const int index = rest & ((1 << log_size) - 1);
      rest >>= log_size;
      is_there = is_there && index < sizes[d];
      at_param += index * static_cast<int64_t>(dims[kDimWords * d + 1]);
      at_grad += index * static_cast<int64_t>(dims[kDimWords * d + 2]);
      at_buffer += index * static_cast<int64_t>(dims[kDimWords * d + 3]);
    }
    if (!is_there || rest != 0) continue;
    auto p = Sgd::decayed(work.decay_factor, load_as<opmath_t>(param_dtype, param, at_param));
    const auto g = load_as<opmath_t>(grad_dtype, grad, at_grad);
    opmath_t b = 0;
    if (work.reads_buffer) b = load_as<opmath_t>(buffer_dtype, buffer, at_buffer);
    with_variant(work.variant, [&](auto variant) {
      Sgd::update<FusedMultiplyAdd>(variant, work.coefficients, g, p, b);
    });
    if (work.writes_buffer) store_as(buffer_dtype, buffer, at_buffer, b);
    store_as(param_dtype, param, at_param, p);
    if (average != nullptr) {
      // Computed in the type that goes with the parameter, whatever its gradient is.
      if (sizeof(opmath_t) == 8 && param_dtype == static_cast<int>(Dtype::kFloat64)) {
        average_one<opmath_t>(table, param_dtype, param, average, at_param);
      } else {
        average_one<float>(table, param_dtype, param, average, at_param);
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
