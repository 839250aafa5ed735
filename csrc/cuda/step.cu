// One step on a CUDA device: the whole list of tensors in one launch.
//
// Each tensor is cut into chunks, and each block updates one. A block learns from the launch table
// which chunk it has and what to do with it, and then goes through it once: loads, the rule,
// stores.
//
//   flat     parameter, gradient and buffer share one dense layout and a combination of dtypes from
//            the list below: 128-bit accesses, wherever the three pointers let the same elements
//            fall on 128-bit boundaries
//   strided  everything else, one element at a time
//
// Where the parameters' averages are kept, each is brought up to date with its element.
//
// Compile with --fmad=false: every fma is written out, in update_rule.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include "launch_table.h"
#include "launching.h"
#include "step.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerThread = 4;  // in a chunk; enough to make finding the chunk cheap

// ---- what a block has to do ---------------------------------------------------------------------

// The flags of update_element(), as a type and as the number that stands for it at run time.
template <WeightDecay kWeightDecay_, Momentum kMomentum_, bool kNesterov_>
struct Rule {
  static constexpr WeightDecay kWeightDecay = kWeightDecay_;
  static constexpr Momentum kMomentum = kMomentum_;
  static constexpr bool kNesterov = kNesterov_;
};

// Calls body(Rule<...>()) for the rule with this number. All threads of a block have the same one.
template <typename Body>
__device__ __forceinline__ void with_rule(int rule, const Body& body) {
  switch (rule) {
    case 0:
      return body(Rule<WeightDecay::kNone, Momentum::kNone, false>());
    case 1:
      return body(Rule<WeightDecay::kL2, Momentum::kNone, false>());
    case 2:
      return body(Rule<WeightDecay::kNone, Momentum::kLaterStep, false>());
    case 3:
      return body(Rule<WeightDecay::kL2, Momentum::kLaterStep, false>());
    case 4:
      return body(Rule<WeightDecay::kNone, Momentum::kLaterStep, true>());
    case 5:
      return body(Rule<WeightDecay::kL2, Momentum::kLaterStep, true>());
    case 6:
      return body(Rule<WeightDecay::kNone, Momentum::kFirstStep, false>());
    case 7:
      return body(Rule<WeightDecay::kL2, Momentum::kFirstStep, false>());
    case 8:
      return body(Rule<WeightDecay::kNone, Momentum::kFirstStep, true>());
    default:
      return body(Rule<WeightDecay::kL2, Momentum::kFirstStep, true>());
  }
}

template <typename opmath_t>
struct Work {
  Coefficients<opmath_t> coefficients;
  opmath_t decay_factor;  // of decoupled weight decay, else 1: multiplying is cheaper than asking
  int rule;
  bool reads_buffer;
  bool writes_buffer;
};

template <typename opmath_t>
__device__ __forceinline__ opmath_t read_number(const DeviceNumber& number) {
  switch (number.dtype) {
    case Dtype::kFloat64:
      return static_cast<opmath_t>(*static_cast<const double*>(number.data));
    case Dtype::kBFloat16:
      return load(*static_cast<const BFloat16*>(number.data));
    case Dtype::kFloat16:
      return load(*static_cast<const Float16*>(number.data));
    default:
      return *static_cast<const float*>(number.data);
  }
}

template <typename opmath_t, int kReserved, int kBytes>
__device__ __forceinline__ Work<opmath_t> read_group(const LaunchTable<kBytes>& table, int group) {
  const TableHeader& header = table.header;
  const int at = group_at<kReserved>(table, group);
  const auto packed = unpack<PackedGroup<opmath_t>>(table, at);
  Work<opmath_t> work;
  Coefficients<opmath_t>& c = work.coefficients;
  c = packed.coefficients;
  bool decays = (packed.flags & kHasWeightDecay) != 0;
  const bool decoupled = (packed.flags & kIsDecoupled) != 0;
  work.decay_factor = decoupled ? c.weight_decay : opmath_t{1};
  const bool has_momentum = (packed.flags & kHasMomentum) != 0;
  const bool nesterov = (packed.flags & kHasNesterov) != 0;
  const uint32_t cohort = packed.flags >> kCohortShift;
  bool is_first_step = cohort == kFirstStep;
  if (header.settled != nullptr && cohort != kNoCohort) is_first_step = *header.settled < cohort;
  // The scale is a float and so is its inverse, as torch.amp.GradScaler computes it.
  if (header.grad_number_is == GradNumber::kScale) {
    c.grad_coef *= 1.0f / *static_cast<const float*>(header.grad_number);
  } else if (header.grad_number_is == GradNumber::kFactor) {
    c.grad_coef *= static_cast<opmath_t>(*static_cast<const double*>(header.grad_number));
  }
  if (header.has_device_numbers != 0) {
    const int behind = at + kWordsOf<PackedGroup<opmath_t>>;
    const auto numbers = unpack<DeviceHyperparams>(table, behind);
    if (numbers.lr.data != nullptr) c.step = read_number<opmath_t>(numbers.lr);
    if (numbers.momentum.data != nullptr) c.momentum = read_number<opmath_t>(numbers.momentum);
    if (numbers.weight_decay.data != nullptr) {
      c.weight_decay = read_number<opmath_t>(numbers.weight_decay);
      decays = c.weight_decay != 0;
    }
  }
  work.rule =
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

// The average after an update; with a weight of 1 there may be nothing yet to average with.
template <typename opmath_t>
__device__ __forceinline__ opmath_t new_average(opmath_t weight, opmath_t average, opmath_t param) {
  return weight == 1 ? param : average_of<FusedMultiplyAdd>(weight, average, param);
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

// ---- flat ---------------------------------------------------------------------------------------

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
    with_rule(work.rule, [&](auto rule) {
      using Rule = decltype(rule);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        opmath_t new_p = decayed(work.decay_factor, opmath_t{load(p[k])});
        opmath_t new_b = 0;
        if constexpr (Rule::kMomentum == Momentum::kLaterStep) new_b = load(b[k]);
        update_element<FusedMultiplyAdd, Rule::kWeightDecay, Rule::kMomentum, Rule::kNesterov>(
            work.coefficients, static_cast<opmath_t>(load(g[k])), new_p, new_b);
        if constexpr (Rule::kMomentum != Momentum::kNone) store(b[k], new_b);
        store(p[k], new_p);
      }
    });
    if (work.writes_buffer) write(buffer + i, b);
    write(param + i, p);
    if constexpr (kHasAverage) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        store(a[k], new_average<opmath_t>(average_weight, load(a[k]), load(p[k])));
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

// ---- strided ------------------------------------------------------------------------------------

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

template <typename opmath_t_>
struct Strided {
  using opmath_t = opmath_t_;
  static constexpr int kRecord = kStridedRecord;
  static constexpr int kReserved = kWordsOf<AverageWeight>;
  static constexpr int kChunk = kThreads * kVectorsPerThread;
};

template <typename opmath_t, int kBytes>
__device__ __forceinline__ void average_one(const LaunchTable<kBytes>& table, int dtype,
                                            const void* param, void* average, int64_t i) {
  store_as(dtype, average, i,
           new_average(read_average_weight<opmath_t>(table), load_as<opmath_t>(dtype, average, i),
                       load_as<opmath_t>(dtype, param, i)));
}

template <typename Kind, int kBytes>
__global__ void __launch_bounds__(kThreads)
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

  for (int k = static_cast<int>(threadIdx.x); k < chunk.count; k += kThreads) {
    uint64_t index = static_cast<uint64_t>(chunk.begin) + static_cast<uint64_t>(k);
    int64_t at_param = 0, at_grad = 0, at_buffer = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const uint64_t size = dims[4 * d];
      uint64_t quotient;
      if ((index | size) >> 32 == 0) {  // the 64-bit division is many times slower
        quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
      } else {
        quotient = index / size;
      }
      const auto position = static_cast<int64_t>(index - quotient * size);
      at_param += position * static_cast<int64_t>(dims[4 * d + 1]);
      at_grad += position * static_cast<int64_t>(dims[4 * d + 2]);
      at_buffer += position * static_cast<int64_t>(dims[4 * d + 3]);
      index = quotient;
    }
    auto p = decayed(work.decay_factor, load_as<opmath_t>(param_dtype, param, at_param));
    const auto g = load_as<opmath_t>(grad_dtype, grad, at_grad);
    opmath_t b = 0;
    if (work.reads_buffer) b = load_as<opmath_t>(buffer_dtype, buffer, at_buffer);
    with_rule(work.rule, [&](auto rule) {
      using Rule = decltype(rule);
      update_element<FusedMultiplyAdd, Rule::kWeightDecay, Rule::kMomentum, Rule::kNesterov>(
          work.coefficients, g, p, b);
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

// Precedes the launches of a step that keeps averages: counts it, unless it is left out, and works
// out the weight.
__global__ void count_update(const float* found_inf, double decay, int warms_up, double* weight,
                             double* count) {
  if (found_inf != nullptr && *found_inf != 0) return;
  *weight = average_weight(decay, warms_up != 0, *count);
  *count += 1;
}

// ---- which kernel takes which tensors -----------------------------------------------------------

template <typename Kind, int kBytes>
auto kernel_of() {
  if constexpr (Kind::kRecord != kStridedRecord) {
    return update_flat<Kind, kBytes>;
  } else {
    return update_strided<Kind, kBytes>;
  }
}

// The combinations that training makes: one dtype; low-precision gradients; a buffer in fp32. The
// others take the strided kernel. Each flat one once more, for tensors whose average is kept.
enum KindIndex : int8_t {
  kF32,
  kF64,
  kBf16,
  kF16,
  kF32Bf16,
  kF32F16,
  kBf16F32,
  kF16F32,
  kAveraged,  // kF32 to kF16F32 again
  kStrided32 = 2 * kAveraged,
  kStrided64,
  kNumKinds
};

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

// Of a tensor whose average is not kept.
KindIndex plain_kind_of(const TensorEntry& entry) {
  const bool has_buffer = entry.momentum_buffer != nullptr;
  const Dtype p = entry.param_dtype;
  const Dtype g = entry.grad_dtype;
  const Dtype b = has_buffer ? entry.buffer_dtype : p;
  if (entry.layout == nullptr) {
    if (p == g && p == b) {
      return p == Dtype::kFloat32    ? kF32
             : p == Dtype::kFloat64  ? kF64
             : p == Dtype::kBFloat16 ? kBf16
                                     : kF16;
    }
    if (p == Dtype::kFloat32 && b == p && g == Dtype::kBFloat16) return kF32Bf16;
    if (p == Dtype::kFloat32 && b == p && g == Dtype::kFloat16) return kF32F16;
    if (p == Dtype::kBFloat16 && g == p && b == Dtype::kFloat32) return kBf16F32;
    if (p == Dtype::kFloat16 && g == p && b == Dtype::kFloat32) return kF16F32;
  }
  const bool in_double = p == Dtype::kFloat64 || g == Dtype::kFloat64 || b == Dtype::kFloat64;
  return in_double ? kStrided64 : kStrided32;
}

KindIndex kind_of(const TensorEntry& entry) {
  const KindIndex kind = plain_kind_of(entry);
  const bool averaged = entry.average != nullptr && kind < kAveraged;
  return averaged ? static_cast<KindIndex>(kind + kAveraged) : kind;
}

// ---- launching ----------------------------------------------------------------------------------

// Fills a table tensor by tensor.
template <typename Kind, int kBytes>
class Packer {
 public:
  using opmath_t = typename Kind::opmath_t;
  using Table = LaunchTable<kBytes>;

  Packer(const Overflow& overflow, double average_weight, bool has_device_numbers) {
    TableHeader& header = table_.header;
    header = {overflow.found_inf,
              overflow.grad_scale,
              overflow.settled,
              0,
              static_cast<uint16_t>(kWordsOf<PackedGroup<opmath_t>> +
                                    (has_device_numbers ? kWordsOf<DeviceHyperparams> : 0)),
              has_device_numbers,
              overflow.grad_scale != nullptr ? GradNumber::kScale : GradNumber::kNone};
    if (overflow.grad_factor != nullptr) {
      header.grad_number = overflow.grad_factor;
      header.grad_number_is = GradNumber::kFactor;
    }
    if constexpr (Kind::kReserved != 0) {
      const AverageWeight weight = {average_weight, overflow.average_weight};
      memcpy(table_.words + Table::kNumWords - Kind::kReserved, &weight, sizeof(weight));
    }
  }

  // False when there is no room left: launch() first.
  bool add(const TensorEntry& entry, const Hyperparams& h) {
    const int64_t chunks = (entry.numel - 1) / Kind::kChunk + 1;
    const int group = find_or_add_group(entry, h);
    const int at = table_.header.num_tensors * Kind::kRecord;
    if (group < 0 || at + Kind::kRecord > first_group_word(num_groups_) ||
        num_chunks_ + chunks > INT32_MAX) {
      return false;
    }
    uint64_t* const record = table_.words + at;
    record[0] = reinterpret_cast<uint64_t>(entry.param);
    record[1] = reinterpret_cast<uint64_t>(entry.grad);
    record[2] = h.has_momentum ? reinterpret_cast<uint64_t>(entry.momentum_buffer) : 0;
    record[3] = pack_chunks(static_cast<uint32_t>(num_chunks_),
                            static_cast<uint32_t>(entry.numel - (chunks - 1) * Kind::kChunk),
                            static_cast<uint32_t>(group));
    if constexpr (Kind::kRecord != kFlatRecord) {
      record[4] = reinterpret_cast<uint64_t>(entry.average);
    }
    if constexpr (Kind::kRecord == kStridedRecord) add_layout(entry, record);
    num_chunks_ += chunks;
    ++table_.header.num_tensors;
    return true;
  }

  bool empty() const { return table_.header.num_tensors == 0; }

  cudaError_t launch(cudaStream_t stream) {
    void* arguments[] = {&table_};
    const cudaError_t error =
        cudaLaunchKernel(kernel_of<Kind, kBytes>(), dim3(static_cast<unsigned>(num_chunks_)),
                         dim3(kThreads), arguments, 0, stream);
    table_.header.num_tensors = 0;
    num_groups_ = 0;
    num_chunks_ = 0;
    return error;
  }

 private:
  static constexpr int kGroupsToCompare = 8;

  int first_group_word(int num_groups) const {
    return Table::kNumWords - Kind::kReserved - num_groups * table_.header.words_per_group;
  }

  // Neighbouring tensors are mostly of one group: the last answer is mostly the next. -1: no room.
  int find_or_add_group(const TensorEntry& entry, const Hyperparams& h) {
    const uint32_t cohort = entry.cohort != 0     ? entry.cohort
                            : entry.is_first_step ? kFirstStep
                                                  : kNoCohort;
    if (num_groups_ == 0 || entry.group != last_group_ || cohort != last_cohort_) {
      last_answer_ = compare_or_add_group(cohort, h);
      last_group_ = entry.group;
      last_cohort_ = cohort;
    }
    return last_answer_;
  }

  // Groups are mostly of few kinds: those that were added last are compared, and one that was
  // missed is only written twice.
  int compare_or_add_group(uint32_t cohort, const Hyperparams& h) {
    const uint32_t flags = (h.weight_decay == WeightDecay::kL2 ? kHasWeightDecay : 0) |
                           (h.weight_decay == WeightDecay::kDecoupled ? kIsDecoupled : 0) |
                           (h.has_momentum ? kHasMomentum | cohort << kCohortShift : 0) |
                           (h.has_momentum && h.nesterov ? kHasNesterov : 0);
    // Part by part, so that no byte between them is left unset: they are compared as words.
    constexpr int kWords = kWordsOf<PackedGroup<opmath_t>>;
    uint64_t words[kWords + kWordsOf<DeviceHyperparams>] = {};
    auto* const bytes = reinterpret_cast<char*>(words);
    memcpy(bytes, &coefficients<opmath_t>(h), sizeof(Coefficients<opmath_t>));
    memcpy(bytes + offsetof(PackedGroup<opmath_t>, flags), &flags, sizeof(flags));
    const bool has_numbers = table_.header.has_device_numbers != 0;
    if (has_numbers) {
      const DeviceNumber* const numbers[] = {&h.on_device.lr, &h.on_device.weight_decay,
                                             &h.on_device.momentum};
      for (int i = 0; i < 3; ++i) {
        words[kWords + 2 * i] = reinterpret_cast<uint64_t>(numbers[i]->data);
        words[kWords + 2 * i + 1] = static_cast<uint64_t>(numbers[i]->dtype);
      }
    }
    const size_t num_bytes = 8 * static_cast<size_t>(table_.header.words_per_group);
    const int oldest = num_groups_ > kGroupsToCompare ? num_groups_ - kGroupsToCompare : 0;
    for (int g = num_groups_ - 1; g >= oldest; --g) {
      if (memcmp(table_.words + first_group_word(g + 1), words, num_bytes) == 0) return g;
    }
    const int used = (table_.header.num_tensors + 1) * Kind::kRecord;
    if (num_groups_ == kMaxGroups || first_group_word(num_groups_ + 1) < used) return -1;
    memcpy(table_.words + first_group_word(num_groups_ + 1), words, num_bytes);
    return num_groups_++;
  }

  static void add_layout(const TensorEntry& entry, uint64_t* record) {
    const StridedDim flat = {entry.numel, 1, 1, 1};
    const StridedLayout one_dim = {&flat, 1};
    const StridedLayout& layout = entry.layout != nullptr ? *entry.layout : one_dim;
    record[5] =
        static_cast<uint64_t>(entry.param_dtype) | static_cast<uint64_t>(entry.grad_dtype) << 8 |
        static_cast<uint64_t>(entry.buffer_dtype) << 16 | static_cast<uint64_t>(layout.ndim) << 24;
    for (int d = 0; d < layout.ndim; ++d) {
      uint64_t* const dim = record + kFirstDim + 4 * d;
      dim[0] = static_cast<uint64_t>(layout.dims[d].size);
      dim[1] = static_cast<uint64_t>(layout.dims[d].param_stride);
      dim[2] = static_cast<uint64_t>(layout.dims[d].grad_stride);
      dim[3] = static_cast<uint64_t>(layout.dims[d].buffer_stride);
    }
  }

  Table table_;  // its words are written before they are read
  int num_groups_ = 0;
  int64_t num_chunks_ = 0;
  uint32_t last_group_ = 0;
  uint32_t last_cohort_ = 0;
  int last_answer_ = -1;
};

// What a table holds for one device.
struct Census {
  int64_t of_kind[kNumKinds] = {};
  bool has_device_numbers = false;
};

bool is_ours(const TensorEntry& entry, int device) {
  return entry.device == device && entry.numel != 0;
}

Census count_tensors(const TensorTable& table, int device) {
  Census census;
  for (int64_t i = 0; i < table.num_entries; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (!is_ours(entry, device)) continue;
    ++census.of_kind[kind_of(entry)];
    census.has_device_numbers =
        census.has_device_numbers || table.groups[entry.group].on_device.any();
  }
  return census;
}

template <typename Kind, int kBytes>
cudaError_t launch_all(const TensorTable& table, int device, KindIndex kind,
                       const Overflow& overflow, bool has_device_numbers, cudaStream_t stream) {
  Packer<Kind, kBytes> packer(overflow, table.average_weight, has_device_numbers);
  for (int64_t i = 0; i < table.num_entries; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (!is_ours(entry, device) || kind_of(entry) != kind) continue;
    const Hyperparams& h = table.groups[entry.group];
    if (packer.add(entry, h)) continue;
    if (packer.empty()) return cudaErrorInvalidValue;  // 2^31 chunks: more than any memory holds
    if (const cudaError_t error = packer.launch(stream); error != cudaSuccess) return error;
    if (!packer.add(entry, h)) return cudaErrorInvalidValue;
  }
  return packer.empty() ? cudaSuccess : packer.launch(stream);
}

// A short list goes into the small parameter, which costs less to hand over.
template <typename Kind>
cudaError_t launch_kind(const TensorTable& table, int device, KindIndex kind, int64_t count,
                        const Overflow& overflow, bool has_device_numbers, cudaStream_t stream) {
  constexpr int64_t kLikelyGroups = 2;
  const int64_t words = count * Kind::kRecord + Kind::kReserved +
                        kLikelyGroups * kWordsOf<PackedGroup<typename Kind::opmath_t>>;
  if (words > LaunchTable<kSmallTable>::kNumWords && has_large_parameters(device)) {
    return launch_all<Kind, kLargeTable>(table, device, kind, overflow, has_device_numbers, stream);
  }
  return launch_all<Kind, kSmallTable>(table, device, kind, overflow, has_device_numbers, stream);
}

cudaError_t launch_kinds(const TensorTable& table, int device, const Overflow& overflow,
                         cudaStream_t stream) {
  const Census census = count_tensors(table, device);
  for (int8_t k = 0; k < kNumKinds; ++k) {
    if (census.of_kind[k] == 0) continue;
    const auto kind = static_cast<KindIndex>(k);
    const cudaError_t error = visit_kind(k, [&](auto type) {
      return launch_kind<decltype(type)>(table, device, kind, census.of_kind[k], overflow,
                                         census.has_device_numbers, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t step(const TensorTable& table, int device, const Overflow& overflow, bool one_by_one,
                 cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (one_by_one) {
    for (int64_t i = 0; i < table.num_entries && error == cudaSuccess; ++i) {
      const TensorTable one = {table.entries + i, nullptr, 1, table.groups, table.average_weight};
      error = launch_kinds(one, device, overflow, stream);
    }
  } else {
    error = launch_kinds(table, device, overflow, stream);
  }
  if (error != cudaSuccess || overflow.newest_cohort == 0) return error;
  const float* found_inf = overflow.found_inf;
  uint32_t newest_cohort = overflow.newest_cohort;
  uint32_t* settled = overflow.settled;
  uint32_t* settled_on_host = overflow.settled_on_host;
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
