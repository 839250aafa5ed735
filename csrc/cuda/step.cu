// One step on a CUDA device: the whole list of tensors in one launch.
//
// Each tensor is cut into chunks, and each block updates one. A block learns from the launch table
// which chunk it has and what to do with it, and then goes through it once: loads, the rule,
// stores.
//
//   flat     parameter, gradient and states share one dense layout and have dtypes from the list in
//            kinds.h: 128-bit accesses, wherever the pointers let the same elements fall on 128-bit
//            boundaries
//   strided  tensors that lie otherwise, one element at a time, each block of threads a block of up
//            to three dimensions
//
// What has low-precision state, and flat tensors of other combinations, is in low_precision.cu.
//
// Where the parameters' averages are kept, each is brought up to date with its element.
//
// Compile with --fmad=false: every fma is written out, in ../rules.
#include <cuda_runtime.h>

#include <algorithm>

#include "../rules/rules.h"
#include "packing.h"
#include "strided.cuh"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kVectorsPerThread = 4;  // in a chunk; enough to make finding the chunk cheap

// ---- flat ---------------------------------------------------------------------------------------

// How many of a tensor's first elements lie before a boundary of kCount elements.
template <int kCount, typename scalar_t>
__device__ __forceinline__ int elements_to_boundary(const scalar_t* first) {
  const auto position = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(scalar_t));
  return -position & (kCount - 1);
}

template <typename Rule_, bool kHasAverage_, typename param_t_, typename grad_t_, typename state_t_>
struct Flat {
  using Rule = Rule_;
  using param_t = param_t_;
  using grad_t = grad_t_;
  using state_t = state_t_;
  using opmath_t = typename OpMath<param_t>::type;
  using Fields = Record<Rule>;
  static constexpr bool kHasAverage = kHasAverage_;
  static constexpr int kRecord = kHasAverage ? Fields::kAveraged : Fields::kFlat;
  static constexpr int kReserved = kHasAverage ? kWordsOf<AverageWeight> : 0;
  static constexpr int kRoundingWords = 0;
  static constexpr int kStates = Rule::kMaxStates;
  static constexpr int kVector =
      kVectorBytes / std::max({sizeof(param_t), sizeof(grad_t), sizeof(state_t)});
  static constexpr int kChunk = kThreads * kVector * kVectorsPerThread;
  static_assert(kChunk <= kMaxChunk);

  param_t* param;
  const grad_t* grad;
  state_t* state[kStates];  // nullptr: there is none
  param_t* average;
  opmath_t average_weight;
  Work<Rule, opmath_t> work;

  // Updates elements [i, i + kCount). All loads come before the first store.
  template <int kCount>
  __device__ __forceinline__ void update(int i) const {
    param_t p[kCount];
    grad_t g[kCount];
    state_t s[kStates][kCount] = {};
    read(param + i, p);
    read(grad + i, g);
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (k < work.num_reads) read(state[k] + i, s[k]);
    }
    [[maybe_unused]] param_t a[kCount] = {};
    if constexpr (kHasAverage) read(average + i, a);
    with_variant(work, [&](auto variant) {
      using Variant = decltype(variant);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        opmath_t new_p = load(p[e]);
        opmath_t new_s[kStates];
#pragma unroll
        for (int k = 0; k < Variant::kReads; ++k) new_s[k] = load(s[k][e]);
        Rule::template update<CudaArithmetic>(variant, work.coefficients,
                                              static_cast<opmath_t>(load(g[e])), new_p, new_s);
#pragma unroll
        for (int k = 0; k < Variant::kStates; ++k) store(s[k][e], new_s[k]);
        store(p[e], new_p);
      }
    });
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (k < work.num_states) write(state[k] + i, s[k]);
    }
    write(param + i, p);
    if constexpr (kHasAverage) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        store(a[e],
              new_average<FusedMultiplyAdd, opmath_t>(average_weight, load(a[e]), load(p[e])));
      }
      write(average + i, a);
    }
  }

  __device__ __forceinline__ bool is_aligned_after(int head) const {
    bool aligned = elements_to_boundary<kVector>(grad + head) == 0 &&
                   (!kHasAverage || elements_to_boundary<kVector>(average + head) == 0);
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      aligned =
          aligned && (state[k] == nullptr || elements_to_boundary<kVector>(state[k] + head) == 0);
    }
    return aligned;
  }
};

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(kThreads)
    update_flat(const LaunchTable<kBytes> __grid_constant__ table) {
  using Fields = typename Kind::Fields;
  if (overflowed(table)) return;
  const Chunk chunk = find_chunk<Kind>(table);
  const uint64_t* const record = table.words + chunk.tensor * Kind::kRecord;
  Kind kind;
  kind.param = reinterpret_cast<typename Kind::param_t*>(record[kParam]) + chunk.begin;
  kind.grad = reinterpret_cast<const typename Kind::grad_t*>(record[kGrad]) + chunk.begin;
#pragma unroll
  for (int k = 0; k < Kind::kStates; ++k) {
    kind.state[k] = reinterpret_cast<typename Kind::state_t*>(record[kState + k]);
    if (kind.state[k] != nullptr) kind.state[k] += chunk.begin;
  }
  if constexpr (Kind::kHasAverage) {
    kind.average =
        reinterpret_cast<typename Kind::param_t*>(record[Fields::kAverage]) + chunk.begin;
    kind.average_weight = read_average_weight<typename Kind::opmath_t>(table);
  }
  kind.work =
      read_group<typename Kind::Rule, typename Kind::opmath_t, Kind::kReserved>(table, chunk.group);

  const int thread = static_cast<int>(threadIdx.x);
  const int to_boundary = elements_to_boundary<Kind::kVector>(kind.param);
  const int head = to_boundary < chunk.count ? to_boundary : chunk.count;
  if (!kind.is_aligned_after(head)) {
    for (int i = thread; i < chunk.count; i += kThreads) kind.template update<1>(i);
    return;
  }
  const int body_end = head + (chunk.count - head) / Kind::kVector * Kind::kVector;
  for (int i = head + thread * Kind::kVector; i < body_end; i += kThreads * Kind::kVector) {
    kind.template update<Kind::kVector>(i);
  }
  // What lies before the first boundary and after the last: less than a vector each.
  const int i = thread < head ? thread : body_end - head + thread;
  if (i < chunk.count) kind.template update<1>(i);
}

// Precedes the launches of a step that keeps averages: counts it, unless it is left out, and works
// out the weight.
__global__ void count_update(const float* found_inf, double decay, int warms_up, double* weight,
                             double* count) {
  if (found_inf != nullptr && *found_inf != 0) return;
  *weight = average_weight(decay, warms_up != 0, *count);
  *count += 1;
}

// Follows the launches of a step.
__global__ void count_one(uint32_t* steps) { *steps += 1; }

// ---- which kernel takes which tensors -----------------------------------------------------------

template <typename Rule, bool kHasAverage, typename... scalars_t, int kBytes>
auto kernel_of(Flat<Rule, kHasAverage, scalars_t...>, const LaunchTable<kBytes>&) {
  return update_flat<Flat<Rule, kHasAverage, scalars_t...>, kBytes>;
}
template <typename Rule, typename opmath_t, int kBytes>
auto kernel_of(Strided<Rule, opmath_t>, const LaunchTable<kBytes>&) {
  return update_strided<Strided<Rule, opmath_t>, kBytes>;
}

template <typename Rule>
cudaError_t launch_one_kind(const Launching<Rule>& launching) {
  const int kind = launching.kind;
  if (kind >= kFirstMode + kNumModesOfFp32<Rule>) return launch_bf16_mode(launching);
  if (kind >= kFirstMode) return launch_fp32_mode(launching);
  if (kind >= kLowPrecisionFlat) return launch_any_mode(launching);
  if (kind == kStrided32) return launch_kind<Strided<Rule, float>>(launching);
  if (kind == kStrided64) return launch_kind<Strided<Rule, double>>(launching);
  return choose<2 * kNumFlat>(kind, [&]<int k>() {
    constexpr Dtypes kMine = kFlatDtypes[k % kNumFlat];
    return launch_kind<
        Flat<Rule, (k >= kNumFlat), Scalar<kMine.param>, Scalar<kMine.grad>, Scalar<kMine.state>>>(
        launching);
  });
}

// ---- launching ----------------------------------------------------------------------------------

// What a table holds for one device.
template <typename Rule>
struct Census {
  int64_t of_kind[kNumKinds<Rule>] = {};
  bool has_device_numbers = false;
};

template <typename Rule>
Census<Rule> count_tensors(const StepTable<Rule>& table, int device) {
  Census<Rule> census;
  for (int64_t i = 0; i < table.num_entries; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (!lies_on(entry, device)) continue;
    ++census.of_kind[kind_of<Rule>(entry, table.groups[entry.group])];
    census.has_device_numbers =
        census.has_device_numbers || table.groups[entry.group].on_device.any();
  }
  return census;
}

template <typename Rule>
cudaError_t launch_kinds(const StepTable<Rule>& table, int device, const StepScalars& scalars,
                         cudaStream_t stream) {
  const Census<Rule> census = count_tensors(table, device);
  for (int k = 0; k < kNumKinds<Rule>; ++k) {
    if (census.of_kind[k] == 0) continue;
    const cudaError_t error = launch_one_kind<Rule>(
        {table, device, scalars, census.has_device_numbers, stream, k, census.of_kind[k]});
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename Rule>
cudaError_t step(const StepTable<Rule>& table, int device, const StepScalars& scalars,
                 bool one_by_one, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (one_by_one) {
    for (int64_t i = 0; i < table.num_entries && error == cudaSuccess; ++i) {
      StepTable<Rule> one = table;
      one.entries += i;
      one.num_entries = 1;
      error = launch_kinds(one, device, scalars, stream);
    }
  } else {
    error = launch_kinds(table, device, scalars, stream);
  }
  if (error != cudaSuccess || scalars.newest_cohort == 0) return error;
  const float* found_inf = scalars.found_inf;
  uint32_t newest_cohort = scalars.newest_cohort;
  uint32_t* settled = scalars.settled;
  uint32_t* settled_on_host = scalars.settled_on_host;
  void* arguments[] = {&found_inf, &newest_cohort, &settled, &settled_on_host};
  return cudaLaunchKernel(record_settled, dim3(1), dim3(1), arguments, 0, stream);
}

#define MOMENTUM_EXT_STEP(Rule)                                                                   \
  template cudaError_t step(const StepTable<Rule>& table, int device, const StepScalars& scalars, \
                            bool one_by_one, cudaStream_t stream);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_STEP)

cudaError_t count_average(const float* found_inf, double decay, bool warms_up, double* weight,
                          double* count, cudaStream_t stream) {
  int warm = warms_up ? 1 : 0;
  void* arguments[] = {&found_inf, &decay, &warm, &weight, &count};
  return cudaLaunchKernel(count_update, dim3(1), dim3(1), arguments, 0, stream);
}

cudaError_t count_step(uint32_t* steps, cudaStream_t stream) {
  void* arguments[] = {&steps};
  return cudaLaunchKernel(count_one, dim3(1), dim3(1), arguments, 0, stream);
}

}  // namespace momentum_ext::cuda
