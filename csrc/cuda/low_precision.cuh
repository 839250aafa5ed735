// Tensors whose state is stored in fewer bits, or in more, than they are computed in (see
// ../formats), and flat tensors of dtypes that have no kernel in step.cu.
//
// One kernel, for any dtypes or for some. The one for any learns them when it runs: all threads of a
// block have the same, so asking costs little beside the memory, and there are hundreds of
// combinations; but it needs as many registers as the worst of them. The modes that people choose
// (kModes in kinds.h) have instances of their own, with half as many, so that twice as many loads
// are on their way.
//
// A thread has eight elements in a row, as many as a draw of random bits is for, and four threads
// have a block of 8-bit values. What is read is kept as it is until all loads are on their way.
//
//   flat     accesses of up to 128 bits, wherever a thread's eight elements begin on such a
//            boundary
//   strided  one element at a time; in double also flat tensors
//
// Compile with --fmad=false, as all kernels.
#pragma once

#include <cuda_runtime.h>

#include "../rules/rules.h"
#include "operand.cuh"
#include "packing.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kPasses = 2;  // of a block through its chunk

// Of tensors of any dtypes.
struct AnyMode {
  using ParamFormat = LearntFormat;
  using GradFormat = LearntFormat;
  template <int k>
  using StateFormat = LearntFormat;
  static constexpr int kStates = kMaxStates;  // at most
  static constexpr bool kHasAverages = true;
  // Of a multiprocessor: as few blocks as this have enough loads on their way, eight elements a
  // thread, and leave registers for all that may be asked for. A thread with more states has more on
  // its way, and needs more registers for what it learns of each. Doubles are not for speed.
  static constexpr int blocks_at_once(int num_states) { return num_states == 1 ? 2 : 1; }
};
// Of a rule's kModes[kNumber].
template <typename Rule, int kNumber>
struct OneMode {
  static constexpr auto kMode = kModes<Rule>[kNumber];
  using ParamFormat = KnownFormat<kMode.param, kMode.master, kMode.param_is_random>;
  using GradFormat = KnownFormat<kMode.param, Master::kNone, false>;
  template <int k>
  using StateFormat = KnownFormat<kMode.state[k], Master::kNone,
                                  kMode.state_is_random && itemsize(kMode.state[k]) <= 2>;
  static constexpr int kStates = kMode.kStates;
  static constexpr bool kHasAverages = false;

  // As many as have some 48 KB on their way to a multiprocessor: few where a thread has many bytes, which
  // take as many registers.
  static constexpr int blocks_at_once(int num_states) {
    int64_t bytes = 2 * itemsize(kMode.param);
    if (kMode.master != Master::kNone) bytes += kMode.master == Master::kRemainder ? 2 : 1;
    for (const Dtype each : kMode.state) bytes += itemsize(each);
    return num_states == 1 ? 4 : bytes <= 10 ? 3 : 2;
  }
};

// A thread's elements of all states, which may be stored each in a way of its own.
template <typename opmath_t, typename Mode, int kCount, int k = 0>
struct StoredStates {
  StoredOperand<opmath_t, typename Mode::template StateFormat<k>> first;
  StoredStates<opmath_t, Mode, kCount, k + 1> others;

  template <int n>
  __device__ __forceinline__ auto& get() {
    if constexpr (n == 0) {
      return first;
    } else {
      return others.template get<n - 1>();
    }
  }
};
template <typename opmath_t, typename Mode, int kCount>
struct StoredStates<opmath_t, Mode, kCount, kCount> {};

template <typename Rule_, typename opmath_t_, bool kIsStrided_, typename Mode_ = AnyMode>
struct LowPrecisionKind {
  using Rule = Rule_;
  using opmath_t = opmath_t_;
  using Mode = Mode_;
  using Fields = Record<Rule>;
  static constexpr bool kIsStrided = kIsStrided_;
  static constexpr int kStates = std::min(Rule::kMaxStates, Mode::kStates);
  static constexpr int kBlocksAtOnce = sizeof(opmath_t) == 8 ? 1 : Mode::blocks_at_once(kStates);
  static constexpr int kRecord = kIsStrided ? Fields::kStridedLowPrecision : Fields::kLowPrecision;
  static constexpr bool kHasManyDoubles = sizeof(opmath_t) == 8 && kStates > 1;
  using PlacesOfAll = std::conditional_t<kHasManyDoubles, PlacesWhenAsked<Fields::kOperands>,
                                         Places<kIsStrided, Fields::kOperands>>;
  static constexpr int kReserved = 1 + kWordsOf<AverageWeight>;
  static constexpr int kRoundingWords = kWordsOf<GroupRounding>;
  static constexpr int kChunk = kThreads * kElemsPerThread * kPasses;
  static_assert(kChunk <= kMaxChunk && kChunk % kWarpElems == 0);

  static void pack_rest(const TensorEntry& entry, uint64_t* record) {
    int ndim = 0;
    if constexpr (kIsStrided) {
      with_layout(entry, [&](const StridedLayout& layout) {
        for (; ndim < layout.ndim; ++ndim) {
          uint64_t* const words = record + Fields::kFirstDimBehindPlace + Fields::kDimWords * ndim;
          pack_dim<Rule>(layout.dims[ndim], words);
        }
      });
    }
    record[Fields::kKind] = TensorKind(entry, ndim).word();
    constexpr LowPrecision kNothing{};
    const LowPrecision& low = entry.low_precision != nullptr ? *entry.low_precision : kNothing;
    record[Fields::kMaster] = reinterpret_cast<uint64_t>(low.master);
    for (int k = 0; k < Rule::kMaxStates; ++k) {
      record[Fields::kScale + k] = reinterpret_cast<uint64_t>(low.scale[k]);
    }
    memcpy(record + Fields::kPlace, &low.place, sizeof(low.place));
  }
};

// ---- the kernel ---------------------------------------------------------------------------------

template <typename value_t, typename opmath_t>
__device__ __forceinline__ void update_average(Dtype dtype, value_t weight,
                                               const Stored<opmath_t>& param,
                                               Stored<opmath_t>& average) {
  value_t p[kElemsPerThread];
  value_t a[kElemsPerThread];
  decode(dtype, param, p);
  decode(dtype, average, a);
#pragma unroll
  for (int e = 0; e < kElemsPerThread; ++e) {
    a[e] = new_average<FusedMultiplyAdd>(weight, a[e], p[e]);
  }
  encode<kParam>(dtype, a, Randoms{{}, false}, average);
}

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(kThreads, Kind::kBlocksAtOnce)
    update_low_precision(const LaunchTable<kBytes> __grid_constant__ table) {
  using Rule = typename Kind::Rule;
  using Fields = typename Kind::Fields;
  using opmath_t = typename Kind::opmath_t;
  constexpr int kStates = Kind::kStates;
  if (overflowed(table)) return;
  const Chunk chunk = find_chunk<Kind>(table);
  const uint64_t* const record = table.words + chunk.tensor * Kind::kRecord;
  const auto memory = [record](int word) { return reinterpret_cast<void*>(record[word]); };
  const TensorKind kind(record[Fields::kKind]);
  const auto work = read_group<Rule, opmath_t, Kind::kReserved>(table, chunk.group);
  const int behind_group = group_at<Kind::kReserved>(table, chunk.group - 1);
  const auto rounding = unpack<GroupRounding>(table.words + behind_group - Kind::kRoundingWords);
  const uint32_t at_random = kind.may_round_at_random() ? rounding.at_random : 0;

  StoredOperand<opmath_t, typename Kind::Mode::ParamFormat> param;
  StoredOperand<opmath_t, typename Kind::Mode::GradFormat> grad;
  StoredStates<opmath_t, typename Kind::Mode, kStates> states;
  param.memory = memory(kParam);
  param.master = memory(Fields::kMaster);
  param.learn(kind.dtype(kParam), kind.master(), at_random);
  grad.memory = memory(kGrad);
  grad.learn(kind.dtype(kGrad), Master::kNone, 0);
  bool draws = param.is_random;
  repeat<kStates>([&]<int k>() {
    auto& state = states.template get<k>();
    state.memory = memory(kState + k);
    state.scales = static_cast<ScaleBits*>(memory(Fields::kScale + k));
    state.learn(kind.dtype(kState + k), Master::kNone, at_random);
    draws = draws || (k < work.num_states && state.is_random);
  });

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_begin = static_cast<int>(threadIdx.x) / kWarp * kWarpElems;
  // A warp goes on while it has an element, with all of its lanes.
#pragma unroll 1
  for (int at = warp_begin; at < chunk.count; at += kThreads * kElemsPerThread) {
    const int left = chunk.count - at - lane * kElemsPerThread;
    const int count = left < 0 ? 0 : left < kElemsPerThread ? left : kElemsPerThread;
    const int64_t first = chunk.begin + at + (count == 0 ? 0 : lane * kElemsPerThread);
    const Span span = {first, count, lane};
    typename Kind::PlacesOfAll places;
    places.find(record + Fields::kFirstDimBehindPlace, kind.ndim(), first, count);

    opmath_t p[kElemsPerThread];
    opmath_t g[kElemsPerThread];
    opmath_t s[kStates][kElemsPerThread] = {};
    // All loads are on their way before the first value is made; but of many doubles one operand after
    // the other.
    constexpr bool kAllAtOnce = !Kind::kHasManyDoubles;
    param.read(places[kParam], span);
    if constexpr (!kAllAtOnce) param.decode(p);
    grad.read(places[kGrad], span);
    if constexpr (!kAllAtOnce) grad.decode(g);
    repeat<kStates>([&]<int k>() {
      if (k >= work.num_reads) return;
      states.template get<k>().read(places[kState + k], span);
      if constexpr (!kAllAtOnce) states.template get<k>().decode(s[k]);
    });
    if constexpr (kAllAtOnce) {
      param.decode(p);
      grad.decode(g);
      repeat<kStates>([&]<int k>() {
        if (k < work.num_reads) states.template get<k>().decode(s[k]);
      });
    }

    with_variant(work, [&](auto variant) {
      if constexpr (decltype(variant)::kStates <= kStates) {
#pragma unroll
        for (int e = 0; e < kElemsPerThread; ++e) {
          opmath_t mine[kStates];
#pragma unroll
          for (int k = 0; k < kStates; ++k) mine[k] = s[k][e];
          Rule::template update<CudaArithmetic>(variant, work.coefficients, g[e], p[e], mine);
#pragma unroll
          for (int k = 0; k < kStates; ++k) s[k][e] = mine[k];
        }
      }
    });

    Randoms randoms;
    if (draws) {  // the step is read each time: kept, it would take a register too many
      const uint32_t step = read_rounding_step<Kind::kReserved>(table);
      draw({rounding.seed, kind.number, step}, unpack<PlaceInWhole>(record + Fields::kPlace), first,
           randoms.words);
    }
    repeat<kStates>([&]<int k>() {
      if (k >= work.num_states) return;
      states.template get<k>().template write<kState + k>(s[k], randoms, places[kState + k], span);
    });
    param.template write<kParam>(p, randoms, places[kParam], span);
    // Not before: what was read is in fewer registers now.
    void* const average_memory = Kind::Mode::kHasAverages ? memory(Fields::kAverage) : nullptr;
    if (average_memory != nullptr) {
      Stored<opmath_t> average;
      read(param.dtype, average_memory, places[kParam], count, average);
      // Computed in the type that goes with the parameter, whatever its gradient is.
      if (sizeof(opmath_t) == 8 && param.dtype == Dtype::kFloat64) {
        update_average(param.dtype, read_average_weight<opmath_t>(table), param.stored, average);
      } else {
        update_average(param.dtype, read_average_weight<float>(table), param.stored, average);
      }
      write(param.dtype, average_memory, places[kParam], count, average);
    }
  }
}

template <typename Rule, typename opmath_t, bool kIsStrided, typename Mode, int kBytes>
auto kernel_of(LowPrecisionKind<Rule, opmath_t, kIsStrided, Mode>, const LaunchTable<kBytes>&) {
  return update_low_precision<LowPrecisionKind<Rule, opmath_t, kIsStrided, Mode>, kBytes>;
}

}  // namespace
}  // namespace momentum_ext::cuda
