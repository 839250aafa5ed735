// Tensors whose state is stored in fewer bits, or in more, than they are computed in (see
// ../formats), and flat tensors of dtypes that have no kernel in step.cu.
//
// One kernel learns the dtypes when it runs: all threads of a block have the same, so asking costs
// little beside the memory, and there are hundreds of combinations. A thread has eight elements in
// a row, as many as a draw of random bits is for, and a warp 256, a block of 8-bit values. What is
// read is kept as it is until all loads are on their way.
//
//   flat     accesses of up to 128 bits, wherever a thread's eight elements begin on such a
//            boundary
//   strided  one element at a time; in double also flat tensors
//
// Compile with --fmad=false, as all kernels.
#include <cuda_runtime.h>

#include <algorithm>

#include "packing.h"
#include "slots.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kTurns = 2;  // of a block through its chunk

// On a multiprocessor: as few as this have enough loads on their way, eight elements a thread, and
// leave registers for all that may be asked for. Doubles are not for speed.
template <typename opmath_t>
constexpr int kBlocksAtOnce = sizeof(opmath_t) == 8 ? 1 : 2;

template <typename opmath_t_, bool kIsStrided_>
struct LowPrecisionKind {
  using opmath_t = opmath_t_;
  static constexpr bool kIsStrided = kIsStrided_;
  static constexpr int kRecord = kIsStrided ? kStridedLowPrecisionRecord : kLowPrecisionRecord;
  static constexpr int kReserved = kWordsOf<AverageWeight>;
  static constexpr int kRoundingWords = kWordsOf<GroupRounding>;
  static constexpr int kChunk = kThreads * kElemsPerThread * kTurns;
  static_assert(kChunk <= kMaxChunk && kChunk % kScaleBlock == 0);

  static void pack_rest(const TensorEntry& entry, uint64_t* record) {
    constexpr LowPrecision kNothing = {nullptr, {}, 0, Master::kNone};
    const bool has_state = entry.low_precision != nullptr;
    const LowPrecision& low = has_state ? *entry.low_precision : kNothing;
    int ndim = 0;
    if constexpr (kIsStrided) ndim = pack_dims(entry, record + kFirstLowPrecisionDim);
    record[5] = pack_dtypes(entry) | static_cast<uint64_t>(ndim) << 24 |
                static_cast<uint64_t>(low.master_kind) << 28 | uint64_t{has_state} << 31 |
                uint64_t{low.tensor} << 32;
    record[6] = reinterpret_cast<uint64_t>(low.master);
    record[7] = reinterpret_cast<uint64_t>(low.scale[0]);
  }
};

// ---- the kernel ---------------------------------------------------------------------------------

// A tensor's record, read.
struct Task {
  void* param;
  const void* grad;
  void* buffer;
  void* average;
  void* master;
  float* scale;
  Dtype param_dtype;
  Dtype grad_dtype;
  Dtype buffer_dtype;
  Master master_kind;
  bool may_round_at_random;
  uint32_t tensor;
  int ndim;
  const uint64_t* dims;

  __device__ __forceinline__ explicit Task(const uint64_t* record)
      : param(reinterpret_cast<void*>(record[0])),
        grad(reinterpret_cast<const void*>(record[1])),
        buffer(reinterpret_cast<void*>(record[2])),
        average(reinterpret_cast<void*>(record[4])),
        master(reinterpret_cast<void*>(record[6])),
        scale(reinterpret_cast<float*>(record[7])),
        param_dtype(static_cast<Dtype>(record[5] & 0xffu)),
        grad_dtype(static_cast<Dtype>(record[5] >> 8 & 0xffu)),
        buffer_dtype(static_cast<Dtype>(record[5] >> 16 & 0xffu)),
        master_kind(static_cast<Master>(record[5] >> 28 & 7u)),
        may_round_at_random((record[5] >> 31 & 1u) != 0),
        tensor(static_cast<uint32_t>(record[5] >> 32)),
        ndim(static_cast<int>(record[5] >> 24 & 15u)),
        dims(record + kFirstLowPrecisionDim) {}
};

__device__ __forceinline__ bool is_16_bit(Dtype dtype) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
}

template <typename value_t, typename opmath_t>
__device__ __forceinline__ void average_eight(Dtype dtype, value_t weight,
                                              const Stored<opmath_t>& param,
                                              Stored<opmath_t>& average) {
  value_t p[kElemsPerThread];
  value_t a[kElemsPerThread];
  decode(dtype, param, p);
  decode(dtype, average, a);
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k)
    a[k] = new_average<FusedMultiplyAdd>(weight, a[k], p[k]);
  encode<false>(dtype, a, Randoms{{}, false}, average);
}

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename Kind::opmath_t>)
    update_low_precision(const LaunchTable<kBytes> __grid_constant__ table) {
  using opmath_t = typename Kind::opmath_t;
  if (overflowed(table)) return;
  const Chunk chunk = find_chunk<Kind::kRecord>(table, Kind::kChunk);
  const Task task(table.words + chunk.tensor * Kind::kRecord);
  const Work<opmath_t> work = read_group<opmath_t, Kind::kReserved>(table, chunk.group);
  const int behind_group = group_at<Kind::kReserved>(table, chunk.group - 1);
  const auto rounding = unpack<GroupRounding>(table, behind_group - Kind::kRoundingWords);
  const bool has_master = task.master_kind != Master::kNone;
  const Dtype master_dtype = task.master_kind == Master::kCopy ? Dtype::kFloat32 : Dtype::kFloat16;
  const bool has_scale = work.writes_buffer && is_8_bit(task.buffer_dtype);
  const bool at_random = rounding.at_random != 0 && task.may_round_at_random;
  const bool random_param = at_random && !has_master && is_16_bit(task.param_dtype);
  const bool random_buffer =
      at_random && work.writes_buffer && (has_scale || is_16_bit(task.buffer_dtype));
  const RandomKey key = {rounding.seed, task.tensor, rounding.step};

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_begin = static_cast<int>(threadIdx.x) / kWarp * kScaleBlock;
  // A warp goes on while it has an element, with all of its lanes.
#pragma unroll 1
  for (int turn = warp_begin; turn < chunk.count; turn += kThreads * kElemsPerThread) {
    const int left = chunk.count - turn - lane * kElemsPerThread;
    const int count = left < 0 ? 0 : left < kElemsPerThread ? left : kElemsPerThread;
    const int64_t first = chunk.begin + turn + (count == 0 ? 0 : lane * kElemsPerThread);
    const InARow row = {first};
    const auto places = find_places<Kind::kIsStrided>(task.dims, task.ndim, first, count);
    float* const scale = has_scale ? task.scale + (chunk.begin + turn) / kScaleBlock : nullptr;

    Stored<opmath_t> param, grad, buffer = {}, master, average;
    float old_scale = 0;
    read(task.param_dtype, task.param, places.param, count, param);
    read(task.grad_dtype, task.grad, places.grad, count, grad);
    if (has_master) read(master_dtype, task.master, row, count, master);
    if (work.reads_buffer) {
      if (has_scale) {
        read_bits<uint8_t>(task.buffer, row, count, buffer);
        old_scale = *scale;
      } else {
        read(task.buffer_dtype, task.buffer, places.buffer, count, buffer);
      }
    }

    opmath_t p[kElemsPerThread];
    opmath_t g[kElemsPerThread];
    opmath_t b[kElemsPerThread] = {};
    if (has_master) {
      decode_master(task.master_kind, param, master, p);
    } else {
      decode(task.param_dtype, param, p);
    }
    decode(task.grad_dtype, grad, g);
    if (work.reads_buffer) {
      if (!has_scale) {
        decode(task.buffer_dtype, buffer, b);
      } else if (task.buffer_dtype == Dtype::kInt8) {
        decode_block_as<Int8>(buffer, old_scale, b);
      } else {
        decode_block_as<Float8E4M3>(buffer, old_scale, b);
      }
    }

    with_variant(work.variant, [&](auto variant) {
#pragma unroll
      for (int k = 0; k < kElemsPerThread; ++k) {
        p[k] = Sgd::decayed(work.decay_factor, p[k]);
        Sgd::update<FusedMultiplyAdd>(variant, work.coefficients, g[k], p[k], b[k]);
      }
    });

    // Not before: what was read is in fewer registers now.
    if (task.average != nullptr) read(task.param_dtype, task.average, places.param, count, average);

    Randoms randoms = {{}, random_param || random_buffer};
    if (randoms.are_drawn)
      random_block(key, static_cast<uint64_t>(first) / kElemsPerThread, randoms.words);

    if (work.writes_buffer) {
      randoms.are_drawn = random_buffer;
      if (has_scale) {
        const float new_scale = task.buffer_dtype == Dtype::kInt8
                                    ? encode_block_as<Int8>(b, count, randoms, buffer)
                                    : encode_block_as<Float8E4M3>(b, count, randoms, buffer);
        write_bits<uint8_t>(task.buffer, row, count, buffer);
        if (lane == 0) *scale = new_scale;
      } else {
        encode<true>(task.buffer_dtype, b, randoms, buffer);
        write(task.buffer_dtype, task.buffer, places.buffer, count, buffer);
      }
    }
    randoms.are_drawn = random_param;
    if (has_master) {
      encode_master(task.master_kind, p, param, master);
      write(master_dtype, task.master, row, count, master);
    } else {
      encode<false>(task.param_dtype, p, randoms, param);
    }
    write(task.param_dtype, task.param, places.param, count, param);
    if (task.average != nullptr) {
      // Computed in the type that goes with the parameter, whatever its gradient is.
      if (sizeof(opmath_t) == 8 && task.param_dtype == Dtype::kFloat64) {
        average_eight(task.param_dtype, read_average_weight<opmath_t>(table), param, average);
      } else {
        average_eight(task.param_dtype, read_average_weight<float>(table), param, average);
      }
      write(task.param_dtype, task.average, places.param, count, average);
    }
  }
}

template <typename opmath_t, bool kIsStrided, int kBytes>
auto kernel_of(LowPrecisionKind<opmath_t, kIsStrided>, const LaunchTable<kBytes>&) {
  return update_low_precision<LowPrecisionKind<opmath_t, kIsStrided>, kBytes>;
}

}  // namespace

cudaError_t launch_low_precision(const Launching& launching) {
  switch (launching.kind) {
    case kLowPrecisionFlat:
      return launch_kind<LowPrecisionKind<float, false>>(launching);
    case kLowPrecisionStrided32:
      return launch_kind<LowPrecisionKind<float, true>>(launching);
    default:
      return launch_kind<LowPrecisionKind<double, true>>(launching);
  }
}

}  // namespace momentum_ext::cuda
