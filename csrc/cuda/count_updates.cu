// How many of the last step's updates storage has lost: a read of parameter and state, a launch for
// each tensor. It is asked for now and then, so it has one kernel, which learns everything when it
// runs and goes through a tensor one element at a time.
//
// Compile with --fmad=false, as all kernels.
#include <algorithm>

#include "../rules/rules.h"
#include "backend.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr unsigned kMaxBlocks = 1024;

// What a launch must know.
struct CountedTensor {
  TensorEntry entry;  // with the place of its counts as its average
  LowPrecision low;
  Hyperparams<Sgd> group;
  const float* grad_scale;
  const double* grad_factor;
  int ndim;  // 0: flat
  StridedDim dims[kMaxStridedDimsCuda];
};
static_assert(sizeof(CountedTensor) <= kSmallTable);

template <typename opmath_t>
__device__ __forceinline__ opmath_t read_as(Dtype dtype, const void* memory, int64_t i) {
  return visit_dtype<opmath_t>(dtype, [&](auto type) {
    return static_cast<opmath_t>(load(static_cast<const decltype(type)*>(memory)[i]));
  });
}

template <typename opmath_t>
__device__ __forceinline__ opmath_t read_param(const CountedTensor& tensor, int64_t at, int64_t i) {
  const void* const master = tensor.low.master;
  if (tensor.low.master_kind == Master::kNone) {
    return read_as<opmath_t>(tensor.entry.param_dtype, tensor.entry.param, at);
  }
  if (tensor.low.master_kind == Master::kCopy) {
    const Float16 param = static_cast<const Float16*>(tensor.entry.param)[at];
    const float copy = static_cast<const float*>(master)[i];
    Float16 rounded;
    store(rounded, copy);
    return exact_value(param, load(param), copy, rounded);
  }
  const BFloat16 param = static_cast<const BFloat16*>(tensor.entry.param)[at];
  return tensor.low.master_kind == Master::kRemainder
             ? join(param, static_cast<const int16_t*>(master)[i])
             : join(param, static_cast<int16_t>(static_cast<const int8_t*>(master)[i] * 256));
}

template <typename opmath_t>
__device__ __forceinline__ opmath_t read_state(const CountedTensor& tensor, int64_t at, int64_t i) {
  const Dtype dtype = tensor.entry.state_dtype[0];
  const void* const memory = tensor.entry.state[0];
  if (!has_blocks(dtype)) return read_as<opmath_t>(dtype, memory, at);
  const float scale = load_scale(tensor.low.scale[0][i / kScaleBlock]);
  return visit_blocks(dtype, [&](auto code) -> opmath_t {
    if constexpr (std::is_same_v<decltype(code), Int4>) {
      const uint32_t bits = static_cast<const uint8_t*>(memory)[i / 2] >> 4 * (i % 2);
      code.bits = static_cast<int8_t>(static_cast<int8_t>(bits << 4) >> 4);
    } else {
      code = static_cast<const decltype(code)*>(memory)[i];
    }
    return value_of(code, scale);
  });
}

// What is found of a parameter's value that is stored, rounded to nearest.
template <typename opmath_t>
__device__ __forceinline__ opmath_t as_stored(const CountedTensor& tensor, opmath_t value) {
  const Master kind = tensor.low.master_kind;
  if (kind == Master::kByteRemainder) return rounded_to_24_bits(static_cast<float>(value));
  const Dtype dtype = kind == Master::kNone ? tensor.entry.param_dtype : Dtype::kFloat32;
  return visit_dtype<opmath_t>(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    scalar_t stored;
    store(stored, static_cast<typename OpMath<scalar_t>::type>(value));
    return static_cast<opmath_t>(load(stored));
  });
}

// The threads of a warp add up, and its first adds to the tensor's.
__device__ __forceinline__ void add_from_warp(int64_t mine, int64_t* counts) {
  auto sum = static_cast<unsigned long long>(mine);
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(~0u, sum, distance);
  }
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(counts), sum);
}

template <typename opmath_t>
__global__ void __launch_bounds__(kThreads)
    count_updates_of(const CountedTensor __grid_constant__ tensor) {
  const TensorEntry& entry = tensor.entry;
  Sgd::Options options = tensor.group;
  Sgd::Coefficients<opmath_t> c = coefficients<opmath_t>(tensor.group);
  if (tensor.grad_factor != nullptr) {
    c.grad_coef *= static_cast<opmath_t>(*tensor.grad_factor);
  } else if (tensor.grad_scale != nullptr) {
    c.grad_coef *= inverse_of_scale(*tensor.grad_scale);
  }
  const auto read = [](const DeviceNumber& number) { return read_number<opmath_t>(number); };
  Sgd::read_on_device(tensor.group.on_device, read, options, c);
  Sgd::merge(options, c);
  const int variant = Sgd::variant_of(options, false);
  UpdateCounts counts;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < entry.numel;
       i += int64_t{gridDim.x} * kThreads) {
    int64_t at[kState + 1] = {};
    auto index = static_cast<uint64_t>(i);
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      const auto [inside, outside] = split_index(index, static_cast<uint64_t>(tensor.dims[d].size));
      for (int o = 0; o <= kState; ++o) at[o] += inside * tensor.dims[d].strides[o];
      index = outside;
    }
    if (tensor.ndim == 0) at[kParam] = at[kGrad] = at[kState] = i;
    const auto before = read_param<opmath_t>(tensor, at[kParam], i);
    const auto grad = read_as<opmath_t>(entry.grad_dtype, entry.grad, at[kGrad]);
    const auto state = options.has_momentum ? read_state<opmath_t>(tensor, at[kState], i) : 0;
    opmath_t after = before;
    const bool is_update =
        Sgd::visit_variant<Sgd::kMergedVariants>(variant, [&](auto known) -> bool {
          return Sgd::update_again<FusedMultiplyAdd>(known, c, grad, after, state);
        });
    counts.add(is_update, as_stored(tensor, after) == before, after == before);
  }
  auto* const all = static_cast<UpdateCounts*>(entry.average);
  add_from_warp(counts.updates, &all->updates);
  add_from_warp(counts.below, &all->below);
  add_from_warp(counts.lost, &all->lost);
}

bool is_in_double(const TensorEntry& entry) {
  return entry.param_dtype == Dtype::kFloat64 || entry.grad_dtype == Dtype::kFloat64 ||
         (entry.state[0] != nullptr && entry.state_dtype[0] == Dtype::kFloat64);
}

}  // namespace

cudaError_t count_updates(const StepTable<Sgd>& table, int device, const StepScalars& scalars,
                          cudaStream_t stream) {
  for (int64_t i = 0; i < table.num_entries; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (!lies_on(entry, device)) continue;
    CountedTensor tensor = {entry,
                            *entry.low_precision,
                            table.groups[entry.group],
                            scalars.grad_scale,
                            scalars.grad_factor,
                            0,
                            {}};
    if (entry.layout != nullptr) {
      tensor.ndim = entry.layout->ndim;
      std::copy_n(entry.layout->dims, tensor.ndim, tensor.dims);
    }
    const int64_t blocks = std::min<int64_t>((entry.numel - 1) / kThreads + 1, kMaxBlocks);
    void* arguments[] = {&tensor};
    const auto kernel = is_in_double(entry) ? count_updates_of<double> : count_updates_of<float>;
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                                               dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace momentum_ext::cuda
