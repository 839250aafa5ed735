// The steps of tensors that count them on the device: a launch before those of the update, with a thread
// for each tensor. It makes the powers of double precision that a block of the update would make once
// more for each chunk.
//
// Compile with --fmad=false, as all kernels.
#include <cuda_runtime.h>

#include <algorithm>

#include "../rules/rules.h"
#include "backend.h"
#include "launch_table.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kThreadsThatCount = 128;

// What a launch must know. A rule's lr may be on the device, too.
template <typename Rule, int kBytes>
struct CountTable {
  static constexpr int kMax =
      (kBytes - static_cast<int>(sizeof(NumbersOf<Rule>)) - 16) / sizeof(CountedOnDevice);

  NumbersOf<Rule> numbers;
  const float* found_inf;
  int64_t count;
  CountedOnDevice tensors[kMax];
};

template <typename Rule, int kBytes>
__global__ void __launch_bounds__(kThreadsThatCount)
    count_steps_of(const CountTable<Rule, kBytes> __grid_constant__ table) {
  const int at = static_cast<int>(blockIdx.x * kThreadsThatCount + threadIdx.x);
  if (at >= table.count) return;
  if (table.found_inf != nullptr && *table.found_inf != 0) return;
  const CountedOnDevice mine = table.tensors[at];
  NumbersOf<Rule> numbers = table.numbers;
  numbers.read_on_device();
  double counters[Rule::kCounters];
  bool is_double[Rule::kCounters];
  for (int k = 0; k < Rule::kCounters; ++k) {
    is_double[k] = (mine.is_double >> k & 1) != 0;
    counters[k] = is_double[k] ? *static_cast<const double*>(mine.counters[k])
                               : *static_cast<const float*>(mine.counters[k]);
  }
  Rule::count(numbers, is_double, counters);
  for (int k = 0; k < Rule::kCounters; ++k) {
    if (is_double[k]) {
      *static_cast<double*>(mine.counters[k]) = counters[k];
    } else {
      const auto rounded = static_cast<float>(counters[k]);
      *static_cast<float*>(mine.counters[k]) = rounded;
      counters[k] = rounded;
    }
  }
  typename Rule::template Coefficients<double> c;
  Rule::prepare(numbers, counters, c);
  Rule::keep_derived(c, mine.derived);
}

template <typename Rule, int kBytes>
cudaError_t launch_counts(const NumbersOf<Rule>& numbers, const CountedOnDevice* tensors,
                          int64_t count, const float* found_inf, cudaStream_t stream) {
  using Table = CountTable<Rule, kBytes>;
  static_assert(sizeof(Table) <= kBytes);
  cudaError_t error = cudaSuccess;
  while (count > 0 && error == cudaSuccess) {
    Table table = {numbers, found_inf, std::min<int64_t>(count, Table::kMax), {}};
    std::copy_n(tensors, table.count, table.tensors);
    tensors += table.count;
    count -= table.count;
    const auto blocks = static_cast<unsigned>((table.count - 1) / kThreadsThatCount + 1);
    void* arguments[] = {&table};
    const auto kernel = count_steps_of<Rule, kBytes>;
    error = cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreadsThatCount), arguments, 0, stream);
  }
  return error;
}

}  // namespace

template <typename Rule>
cudaError_t count_on_device(const NumbersOf<Rule>& numbers, const CountedOnDevice* tensors,
                            int64_t count, int device, const float* found_inf,
                            cudaStream_t stream) {
  if constexpr (Rule::kCounters == 0) {
    return cudaSuccess;
  } else if (count > CountTable<Rule, kSmallTable>::kMax && has_large_parameters(device)) {
    return launch_counts<Rule, kLargeTable>(numbers, tensors, count, found_inf, stream);
  } else {
    return launch_counts<Rule, kSmallTable>(numbers, tensors, count, found_inf, stream);
  }
}

#define MOMENTUM_EXT_COUNT(Rule)                                                                 \
  template cudaError_t count_on_device<Rule>(                                                    \
      const NumbersOf<Rule>& numbers, const CountedOnDevice* tensors, int64_t count, int device, \
      const float* found_inf, cudaStream_t stream);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_COUNT)

}  // namespace momentum_ext::cuda
