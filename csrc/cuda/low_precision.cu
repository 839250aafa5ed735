// Tensors whose state is stored in fewer bits, or in more, than they are computed in (see
// ../low_precision.h), and flat tensors of dtypes that have no kernel in step.cu.
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

#include "../low_precision.h"
#include "packing.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kEight = kRandomsPerBlock;
constexpr int kWarp = 32;
constexpr int kTurns = 2;  // of a block through its chunk
static_assert(kEight * kWarp == kScaleBlock);

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
  static constexpr int kChunk = kThreads * kEight * kTurns;
  static_assert(kChunk <= kMaxChunk && kChunk % kScaleBlock == 0);

  static void pack_rest(const TensorEntry& entry, uint64_t* record) {
    constexpr LowPrecision kNothing = {nullptr, nullptr, 0, Master::kNone};
    const bool has_state = entry.low_precision != nullptr;
    const LowPrecision& low = has_state ? *entry.low_precision : kNothing;
    int ndim = 0;
    if constexpr (kIsStrided) ndim = pack_dims(entry, record + kFirstLowPrecisionDim);
    record[5] = pack_dtypes(entry) | static_cast<uint64_t>(ndim) << 24 |
                static_cast<uint64_t>(low.master_kind) << 28 | uint64_t{has_state} << 31 |
                uint64_t{low.tensor} << 32;
    record[6] = reinterpret_cast<uint64_t>(low.master);
    record[7] = reinterpret_cast<uint64_t>(low.scale);
  }
};

// ---- where a thread's elements lie --------------------------------------------------------------

struct InARow {
  static constexpr bool kIsRow = true;
  int64_t first;
  __device__ __forceinline__ int64_t operator[](int k) const { return first + k; }
};
struct EachElsewhere {
  static constexpr bool kIsRow = false;
  int64_t offsets[kEight];
  __device__ __forceinline__ int64_t operator[](int k) const { return offsets[k]; }
};

template <bool kIsStrided>
struct Places {
  InARow param, grad, buffer;
};
template <>
struct Places<true> {
  EachElsewhere param, grad, buffer;
};

template <bool kIsStrided>
__device__ __forceinline__ Places<kIsStrided> find_places(const uint64_t* dims, int ndim,
                                                          int64_t first, int count) {
  Places<kIsStrided> places;
  if constexpr (!kIsStrided) {
    places.param = places.grad = places.buffer = {first};
  } else {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      // Lanes without elements walk too: to the last.
      uint64_t index = static_cast<uint64_t>(first) + static_cast<uint64_t>(k < count ? k : 0);
      int64_t at_param = 0, at_grad = 0, at_buffer = 0;
#pragma unroll 1
      for (int d = ndim - 1; d >= 0; --d) {
        const auto [inside, outside] = split_index(index, dims[4 * d]);
        at_param += inside * static_cast<int64_t>(dims[4 * d + 1]);
        at_grad += inside * static_cast<int64_t>(dims[4 * d + 2]);
        at_buffer += inside * static_cast<int64_t>(dims[4 * d + 3]);
        index = outside;
      }
      places.param.offsets[k] = at_param;
      places.grad.offsets[k] = at_grad;
      places.buffer.offsets[k] = at_buffer;
    }
  }
  return places;
}

// ---- eight elements as they are stored ----------------------------------------------------------

// As words of 32 bits, of which smaller dtypes use the first. They are taken apart by shifts: the
// compiler keeps words in registers as words only if it never sees them as anything else.
template <typename opmath_t>
struct Stored {
  uint32_t words[kEight * sizeof(opmath_t) / 4];
};

template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ scalar_t element_of(const Stored<opmath_t>& stored, int k) {
  scalar_t element;
  if constexpr (sizeof(scalar_t) == 8) {
    const uint64_t bits = stored.words[2 * k] | uint64_t{stored.words[2 * k + 1]} << 32;
    memcpy(&element, &bits, sizeof(element));
  } else {
    constexpr int kBits = 8 * static_cast<int>(sizeof(scalar_t));
    const uint32_t bits = stored.words[k * kBits / 32] >> k * kBits % 32;
    memcpy(&element, &bits, sizeof(element));  // its lower end
  }
  return element;
}

// In the order of k.
template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ void set_element(Stored<opmath_t>& stored, int k, scalar_t element) {
  if constexpr (sizeof(scalar_t) == 8) {
    uint64_t bits;
    memcpy(&bits, &element, sizeof(element));
    stored.words[2 * k] = static_cast<uint32_t>(bits);
    stored.words[2 * k + 1] = static_cast<uint32_t>(bits >> 32);
  } else {
    constexpr int kBits = 8 * static_cast<int>(sizeof(scalar_t));
    uint32_t bits = 0;
    memcpy(&bits, &element, sizeof(element));
    uint32_t& word = stored.words[k * kBits / 32];
    word = k * kBits % 32 == 0 ? bits : word | bits << k * kBits % 32;
  }
}

// A machine word of a vectorised access, at word `at`.
template <typename opmath_t>
__device__ __forceinline__ void put(Stored<opmath_t>& to, int at, uint2 from) {
  to.words[at] = from.x;
  to.words[at + 1] = from.y;
}
template <typename opmath_t>
__device__ __forceinline__ void put(Stored<opmath_t>& to, int at, uint4 from) {
  put(to, at, uint2{from.x, from.y});
  put(to, at + 2, uint2{from.z, from.w});
}
template <typename opmath_t>
__device__ __forceinline__ void take(const Stored<opmath_t>& from, int at, uint2& to) {
  to = {from.words[at], from.words[at + 1]};
}
template <typename opmath_t>
__device__ __forceinline__ void take(const Stored<opmath_t>& from, int at, uint4& to) {
  to = {from.words[at], from.words[at + 1], from.words[at + 2], from.words[at + 3]};
}

template <typename bits_t>
using WordOf = typename MachineWord<std::min<int>(kVectorBytes, kEight * sizeof(bits_t))>::type;

template <typename bits_t>
constexpr int kNumWords = static_cast<int>(kEight * sizeof(bits_t) / sizeof(WordOf<bits_t>));

template <typename bits_t>
__device__ __forceinline__ bool begins_on_boundary(const bits_t* first) {
  return reinterpret_cast<uintptr_t>(first) % sizeof(WordOf<bits_t>) == 0;
}

// The `count` first of the eight; the others are zeros.
template <typename bits_t, typename Place, typename opmath_t>
__device__ __forceinline__ void read_bits(const void* base, const Place& place, int count,
                                          Stored<opmath_t>& to) {
  const auto* const bits = static_cast<const bits_t*>(base);
  if constexpr (Place::kIsRow) {
    const bits_t* const first = bits + place[0];
    if (count == kEight && begins_on_boundary(first)) {
      const auto* const words = reinterpret_cast<const WordOf<bits_t>*>(first);
#pragma unroll
      for (int v = 0; v < kNumWords<bits_t>; ++v) {
        put(to, v * static_cast<int>(sizeof(WordOf<bits_t>) / 4), words[v]);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    set_element(to, k, k < count ? bits[place[k]] : bits_t{0});
  }
}

template <typename bits_t, typename Place, typename opmath_t>
__device__ __forceinline__ void write_bits(void* base, const Place& place, int count,
                                           const Stored<opmath_t>& from) {
  auto* const bits = static_cast<bits_t*>(base);
  if constexpr (Place::kIsRow) {
    bits_t* const first = bits + place[0];
    if (count == kEight && begins_on_boundary(first)) {
      auto* const words = reinterpret_cast<WordOf<bits_t>*>(first);
#pragma unroll
      for (int v = 0; v < kNumWords<bits_t>; ++v) {
        WordOf<bits_t> word;
        take(from, v * static_cast<int>(sizeof(word) / 4), word);
        words[v] = word;
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    if (k < count) bits[place[k]] = element_of<bits_t>(from, k);
  }
}

// Of a dtype of 16 bits or more.
template <typename Place, typename opmath_t>
__device__ __forceinline__ void read(Dtype dtype, const void* base, const Place& place, int count,
                                     Stored<opmath_t>& to) {
  if (dtype == Dtype::kFloat32) return read_bits<uint32_t>(base, place, count, to);
  if constexpr (sizeof(opmath_t) == 8) {
    if (dtype == Dtype::kFloat64) return read_bits<uint64_t>(base, place, count, to);
  }
  read_bits<uint16_t>(base, place, count, to);
}
template <typename Place, typename opmath_t>
__device__ __forceinline__ void write(Dtype dtype, void* base, const Place& place, int count,
                                      const Stored<opmath_t>& from) {
  if (dtype == Dtype::kFloat32) return write_bits<uint32_t>(base, place, count, from);
  if constexpr (sizeof(opmath_t) == 8) {
    if (dtype == Dtype::kFloat64) return write_bits<uint64_t>(base, place, count, from);
  }
  write_bits<uint16_t>(base, place, count, from);
}

// ---- eight elements as they are computed --------------------------------------------------------

template <typename scalar_t, typename value_t, typename opmath_t>
__device__ __forceinline__ void decode_as(const Stored<opmath_t>& stored,
                                          value_t (&values)[kEight]) {
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    values[k] = static_cast<value_t>(load(element_of<scalar_t>(stored, k)));
  }
}

// Of a dtype of 16 bits or more.
template <typename value_t, typename opmath_t>
__device__ __forceinline__ void decode(Dtype dtype, const Stored<opmath_t>& stored,
                                       value_t (&values)[kEight]) {
  if (dtype == Dtype::kFloat32) return decode_as<float>(stored, values);
  if constexpr (sizeof(value_t) == 8) {
    if (dtype == Dtype::kFloat64) return decode_as<double>(stored, values);
  }
  if (dtype == Dtype::kBFloat16) return decode_as<BFloat16>(stored, values);
  decode_as<Float16>(stored, values);
}

// 16 random bits for each of eight elements.
struct Randoms {
  uint32_t words[4];
  bool are_drawn;
  __device__ __forceinline__ uint32_t operator[](int k) const {
    return words[k / 2] >> 16 * (k % 2) & 0xffffu;
  }
};

template <bool kIsBuffer, typename scalar_t, typename value_t, typename opmath_t>
__device__ __forceinline__ void encode_as(const value_t (&values)[kEight], const Randoms& randoms,
                                          Stored<opmath_t>& stored) {
  scalar_t element;
  if (randoms.are_drawn) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      store_stochastic(element, static_cast<float>(values[k]),
                       kIsBuffer ? random_of_buffer(randoms[k]) : randoms[k]);
      set_element(stored, k, element);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      store(element, static_cast<float>(values[k]));
      set_element(stored, k, element);
    }
  }
}

// Of a dtype of 16 bits or more; what is wider is not rounded at random.
template <bool kIsBuffer, typename value_t, typename opmath_t>
__device__ __forceinline__ void encode(Dtype dtype, const value_t (&values)[kEight],
                                       const Randoms& randoms, Stored<opmath_t>& stored) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) set_element(stored, k, static_cast<float>(values[k]));
    return;
  }
  if constexpr (sizeof(value_t) == 8) {
    if (dtype == Dtype::kFloat64) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) set_element(stored, k, values[k]);
      return;
    }
  }
  if (dtype == Dtype::kBFloat16) {
    encode_as<kIsBuffer, BFloat16>(values, randoms, stored);
  } else {
    encode_as<kIsBuffer, Float16>(values, randoms, stored);
  }
}

// ---- parameters with a master -------------------------------------------------------------------

template <typename opmath_t>
__device__ __forceinline__ void decode_master(Master kind, const Stored<opmath_t>& param,
                                              const Stored<opmath_t>& master,
                                              opmath_t (&values)[kEight]) {
  if (kind == Master::kRemainder) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      values[k] = join(element_of<BFloat16>(param, k), element_of<int16_t>(master, k));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    // A parameter that is no longer its master rounded was written by someone else, who is
    // believed.
    const auto rounded = element_of<Float16>(param, k);
    const auto exact = element_of<float>(master, k);
    Float16 expected;
    store(expected, exact);
    const float found = load(rounded);
    const bool both_nan = found != found && exact != exact;
    values[k] = expected.bits == rounded.bits || both_nan ? exact : found;
  }
}

template <typename opmath_t>
__device__ __forceinline__ void encode_master(Master kind, const opmath_t (&values)[kEight],
                                              Stored<opmath_t>& param, Stored<opmath_t>& master) {
  if (kind == Master::kRemainder) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      BFloat16 upper;
      int16_t lower;
      split(static_cast<float>(values[k]), upper, lower);
      set_element(param, k, upper);
      set_element(master, k, lower);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    Float16 rounded;
    store(rounded, static_cast<float>(values[k]));
    set_element(param, k, rounded);
    set_element(master, k, static_cast<float>(values[k]));
  }
}

// ---- buffers of 8 bits --------------------------------------------------------------------------

template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ void decode_block_as(const Stored<opmath_t>& stored, float scale,
                                                opmath_t (&values)[kEight]) {
#pragma unroll
  for (int k = 0; k < kEight; ++k) values[k] = load(element_of<scalar_t>(stored, k)) * scale;
}

// A warp's values, of which each lane has `count`; all lanes are here. Returns the block's scale.
template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ float encode_block_as(const opmath_t (&values)[kEight], int count,
                                                 const Randoms& randoms, Stored<opmath_t>& stored) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    const uint32_t bits = detail::bits_of(static_cast<float>(values[k])) & 0x7fffffffu;
    largest = k < count && bits > largest ? bits : largest;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, largest, distance);
    largest = other > largest ? other : largest;
  }
  const BlockScale found = block_scale<scalar_t>(largest);
  if (found.inverse == 0) {  // the values may be Inf or NaN
    stored.words[0] = stored.words[1] = 0;
    return found.scale;
  }
  float scaled[kEight];
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    scaled[k] = k < count ? static_cast<float>(values[k]) * found.inverse : 0;
  }
  encode_as<true, scalar_t>(scaled, randoms, stored);
  return found.scale;
}

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
  value_t p[kEight];
  value_t a[kEight];
  decode(dtype, param, p);
  decode(dtype, average, a);
#pragma unroll
  for (int k = 0; k < kEight; ++k) a[k] = new_average(weight, a[k], p[k]);
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
  for (int turn = warp_begin; turn < chunk.count; turn += kThreads * kEight) {
    const int left = chunk.count - turn - lane * kEight;
    const int count = left < 0 ? 0 : left < kEight ? left : kEight;
    const int64_t first = chunk.begin + turn + (count == 0 ? 0 : lane * kEight);
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

    opmath_t p[kEight];
    opmath_t g[kEight];
    opmath_t b[kEight] = {};
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

    with_rule(work.rule, [&](auto rule) {
      using Rule = decltype(rule);
#pragma unroll
      for (int k = 0; k < kEight; ++k) {
        p[k] = decayed(work.decay_factor, p[k]);
        update_element<FusedMultiplyAdd, Rule::kWeightDecay, Rule::kMomentum, Rule::kNesterov>(
            work.coefficients, g[k], p[k], b[k]);
      }
    });

    // Not before: what was read is in fewer registers now.
    if (task.average != nullptr) read(task.param_dtype, task.average, places.param, count, average);

    Randoms randoms = {{}, random_param || random_buffer};
    if (randoms.are_drawn) random_block(key, static_cast<uint64_t>(first) / kEight, randoms.words);

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
