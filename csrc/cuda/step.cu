// One step on a CUDA device: the whole list of tensors in one launch.
//
// Each tensor is cut into chunks, and each block updates one. A block learns from the launch table
// which chunk it has and what to do with it, and then goes through it once: loads, the rule,
// stores.
//
//   flat     parameter, gradient and buffer share one dense layout and a combination of dtypes from
//            the list below: 128-bit accesses, wherever the three pointers let the same elements
//            fall on 128-bit boundaries
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

template <bool kHasAverage_, typename param_t_, typename grad_t_, typename buffer_t_>
struct Flat {
  using param_t = param_t_;
  using grad_t = grad_t_;
  using buffer_t = buffer_t_;
  using opmath_t = typename OpMath<param_t>::type;
  static constexpr bool kHasAverage = kHasAverage_;
  static constexpr int kRecord = kHasAverage ? kAveragedRecord : kFlatRecord;
  static constexpr int kReserved = kHasAverage ? kWordsOf<AverageWeight> : 0;
  static constexpr int kRoundingWords = 0;
  static constexpr int kVector =
      kVectorBytes / std::max({sizeof(param_t), sizeof(grad_t), sizeof(buffer_t)});
  static constexpr int kChunk = kThreads * kVector * kVectorsPerThread;
  static_assert(kChunk <= kMaxChunk);

  param_t* param;
  const grad_t* grad;
  buffer_t* buffer;  // nullptr without momentum
  param_t* average;
  opmath_t average_weight;
  Work<opmath_t> work;

  // Updates elements [i, i + kCount). All loads come before the first store.
  template <int kCount>
  __device__ __forceinline__ void update(int i) const {
    param_t p[kCount];
    grad_t g[kCount];
    buffer_t b[kCount] = {};
    read(param + i, p);
    read(grad + i, g);
    if (work.reads_buffer) read(buffer + i, b);
    [[maybe_unused]] param_t a[kCount] = {};
    if constexpr (kHasAverage) read(average + i, a);
    with_variant(work.variant, [&](auto variant) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        opmath_t new_p = Sgd::decayed(work.decay_factor, opmath_t{load(p[k])});
        opmath_t new_b = 0;
        if constexpr (decltype(variant)::kMomentum == Momentum::kLaterStep) new_b = load(b[k]);
        Sgd::update<FusedMultiplyAdd>(variant, work.coefficients, static_cast<opmath_t>(load(g[k])),
                                      new_p, new_b);
        if constexpr (decltype(variant)::kMomentum != Momentum::kNone) store(b[k], new_b);
        store(p[k], new_p);
      }
    });
    if (work.writes_buffer) write(buffer + i, b);
    write(param + i, p);
    if constexpr (kHasAverage) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        store(a[k],
              new_average<FusedMultiplyAdd, opmath_t>(average_weight, load(a[k]), load(p[k])));
      }
      write(average + i, a);
    }
  }

  __device__ __forceinline__ bool is_aligned_after(int head) const {
    return elements_to_boundary<kVector>(grad + head) == 0 &&
           (buffer == nullptr || elements_to_boundary<kVector>(buffer + head) == 0) &&
           (!kHasAverage || elements_to_boundary<kVector>(average + head) == 0);
  }
};

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(kThreads)
    update_flat(const LaunchTable<kBytes> __grid_constant__ table) {
  if (overflowed(table)) return;
  const Chunk chunk = find_chunk<Kind::kRecord>(table, Kind::kChunk);
  const uint64_t* const record = table.words + chunk.tensor * Kind::kRecord;
  Kind kind;
  kind.param = reinterpret_cast<typename Kind::param_t*>(record[0]) + chunk.begin;
  kind.grad = reinterpret_cast<const typename Kind::grad_t*>(record[1]) + chunk.begin;
  kind.buffer = reinterpret_cast<typename Kind::buffer_t*>(record[2]);
  if (kind.buffer != nullptr) kind.buffer += chunk.begin;
  if constexpr (Kind::kHasAverage) {
    kind.average = reinterpret_cast<typename Kind::param_t*>(record[4]) + chunk.begin;
    kind.average_weight = read_average_weight<typename Kind::opmath_t>(table);
  }
  kind.work = read_group<typename Kind::opmath_t, Kind::kReserved>(table, chunk.group);

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

// ---- which kernel takes which tensors -----------------------------------------------------------

template <bool kHasAverage, typename param_t, typename grad_t, typename buffer_t, int kBytes>
auto kernel_of(Flat<kHasAverage, param_t, grad_t, buffer_t>, const LaunchTable<kBytes>&) {
  return update_flat<Flat<kHasAverage, param_t, grad_t, buffer_t>, kBytes>;
}
template <typename opmath_t, int kBytes>
auto kernel_of(Strided<opmath_t>, const LaunchTable<kBytes>&) {
  return update_strided<Strided<opmath_t>, kBytes>;
}

template <bool kHasAverage, typename Visitor>
auto visit_flat(int index, const Visitor& visitor) {
  switch (index) {
    case kF32:
      return visitor(Flat<kHasAverage, float, float, float>());
    case kF64:
      return visitor(Flat<kHasAverage, double, double, double>());
    case kBf16:
      return visitor(Flat<kHasAverage, BFloat16, BFloat16, BFloat16>());
    case kF16:
      return visitor(Flat<kHasAverage, Float16, Float16, Float16>());
    case kF32Bf16:
      return visitor(Flat<kHasAverage, float, BFloat16, float>());
    case kF32F16:
      return visitor(Flat<kHasAverage, float, Float16, float>());
    case kBf16F32:
      return visitor(Flat<kHasAverage, BFloat16, BFloat16, float>());
    default:
      return visitor(Flat<kHasAverage, Float16, Float16, float>());
  }
}

template <typename Visitor>
auto visit_kind(int index, const Visitor& visitor) {
  if (index == kStrided32) return visitor(Strided<float>());
  if (index == kStrided64) return visitor(Strided<double>());
  return index < kAveraged ? visit_flat<false>(index, visitor)
                           : visit_flat<true>(index - kAveraged, visitor);
}

// ---- launching ----------------------------------------------------------------------------------

// What a table holds for one device.
struct Census {
  int64_t of_kind[kNumKinds] = {};
  bool has_device_numbers = false;
};

Census count_tensors(const StepTable<Sgd>& table, int device) {
  Census census;
  for (int64_t i = 0; i < table.num_entries; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (!lies_on(entry, device)) continue;
    ++census.of_kind[kind_of(entry)];
    census.has_device_numbers =
        census.has_device_numbers || table.groups[entry.group].on_device.any();
  }
  return census;
}

cudaError_t launch_kinds(const StepTable<Sgd>& table, int device, const StepScalars& scalars,
                         cudaStream_t stream) {
  const Census census = count_tensors(table, device);
  for (int8_t k = 0; k < kNumKinds; ++k) {
    if (census.of_kind[k] == 0) continue;
    const Launching launching = {table,
                                 device,
                                 scalars,
                                 census.has_device_numbers,
                                 stream,
                                 static_cast<KindIndex>(k),
                                 census.of_kind[k]};
    const cudaError_t error =
        k >= kLowPrecisionFlat
            ? launch_low_precision(launching)
            : visit_kind(k, [&](auto type) { return launch_kind<decltype(type)>(launching); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <>
cudaError_t step<Sgd>(const StepTable<Sgd>& table, int device, const StepScalars& scalars,
                      bool one_by_one, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (one_by_one) {
    for (int64_t i = 0; i < table.num_entries && error == cudaSuccess; ++i) {
      StepTable<Sgd> one = table;
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

cudaError_t count_average(const float* found_inf, double decay, bool warms_up, double* weight,
                          double* count, cudaStream_t stream) {
  int warm = warms_up ? 1 : 0;
  void* arguments[] = {&found_inf, &decay, &warm, &weight, &count};
  return cudaLaunchKernel(count_update, dim3(1), dim3(1), arguments, 0, stream);
}

}  // namespace momentum_ext::cuda
