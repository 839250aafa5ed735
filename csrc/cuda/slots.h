// Eight elements in a row, a thread's share of a tensor with low-precision state: where they lie,
// how they are read and written, and what they are as numbers. The counterpart of ../cpu/slots.h.
#pragma once

#include <cuda_runtime.h>

#include "../formats/master.h"
#include "../formats/philox.h"
#include "../formats/stochastic.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kElemsPerThread = kRandomsPerBlock;
constexpr int kWarp = 32;
static_assert(kElemsPerThread * kWarp == kScaleBlock);

// ---- where a thread's elements lie --------------------------------------------------------------

struct InARow {
  static constexpr bool kIsRow = true;
  int64_t first;
  __device__ __forceinline__ int64_t operator[](int k) const { return first + k; }
};
struct EachElsewhere {
  static constexpr bool kIsRow = false;
  int64_t offsets[kElemsPerThread];
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
    for (int k = 0; k < kElemsPerThread; ++k) {
      // Lanes without elements walk too: to the last.
      uint64_t index = static_cast<uint64_t>(first) + static_cast<uint64_t>(k < count ? k : 0);
      int64_t at_param = 0, at_grad = 0, at_buffer = 0;
#pragma unroll 1
      for (int d = ndim - 1; d >= 0; --d) {
        const auto [inside, outside] = split_index(index, dims[kDimWords * d]);
        at_param += inside * static_cast<int64_t>(dims[kDimWords * d + 1]);
        at_grad += inside * static_cast<int64_t>(dims[kDimWords * d + 2]);
        at_buffer += inside * static_cast<int64_t>(dims[kDimWords * d + 3]);
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
  uint32_t words[kElemsPerThread * sizeof(opmath_t) / 4];
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
using WordOf =
    typename MachineWord<std::min<int>(kVectorBytes, kElemsPerThread * sizeof(bits_t))>::type;

template <typename bits_t>
constexpr int kNumWords =
    static_cast<int>(kElemsPerThread * sizeof(bits_t) / sizeof(WordOf<bits_t>));

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
    if (count == kElemsPerThread && begins_on_boundary(first)) {
      const auto* const words = reinterpret_cast<const WordOf<bits_t>*>(first);
#pragma unroll
      for (int v = 0; v < kNumWords<bits_t>; ++v) {
        put(to, v * static_cast<int>(sizeof(WordOf<bits_t>) / 4), words[v]);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    set_element(to, k, k < count ? bits[place[k]] : bits_t{0});
  }
}

template <typename bits_t, typename Place, typename opmath_t>
__device__ __forceinline__ void write_bits(void* base, const Place& place, int count,
                                           const Stored<opmath_t>& from) {
  auto* const bits = static_cast<bits_t*>(base);
  if constexpr (Place::kIsRow) {
    bits_t* const first = bits + place[0];
    if (count == kElemsPerThread && begins_on_boundary(first)) {
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
  for (int k = 0; k < kElemsPerThread; ++k) {
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
                                          value_t (&values)[kElemsPerThread]) {
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    values[k] = static_cast<value_t>(load(element_of<scalar_t>(stored, k)));
  }
}

// Of a dtype of 16 bits or more.
template <typename value_t, typename opmath_t>
__device__ __forceinline__ void decode(Dtype dtype, const Stored<opmath_t>& stored,
                                       value_t (&values)[kElemsPerThread]) {
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
__device__ __forceinline__ void encode_as(const value_t (&values)[kElemsPerThread],
                                          const Randoms& randoms, Stored<opmath_t>& stored) {
  scalar_t element;
  if (randoms.are_drawn) {
#pragma unroll
    for (int k = 0; k < kElemsPerThread; ++k) {
      store_stochastic(element, static_cast<float>(values[k]),
                       kIsBuffer ? random_of_buffer(randoms[k]) : randoms[k]);
      set_element(stored, k, element);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kElemsPerThread; ++k) {
      store(element, static_cast<float>(values[k]));
      set_element(stored, k, element);
    }
  }
}

// Of a dtype of 16 bits or more; what is wider is not rounded at random.
template <bool kIsBuffer, typename value_t, typename opmath_t>
__device__ __forceinline__ void encode(Dtype dtype, const value_t (&values)[kElemsPerThread],
                                       const Randoms& randoms, Stored<opmath_t>& stored) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int k = 0; k < kElemsPerThread; ++k) set_element(stored, k, static_cast<float>(values[k]));
    return;
  }
  if constexpr (sizeof(value_t) == 8) {
    if (dtype == Dtype::kFloat64) {
#pragma unroll
      for (int k = 0; k < kElemsPerThread; ++k) set_element(stored, k, values[k]);
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
                                              opmath_t (&values)[kElemsPerThread]) {
  if (kind == Master::kRemainder) {
#pragma unroll
    for (int k = 0; k < kElemsPerThread; ++k) {
      values[k] = join(element_of<BFloat16>(param, k), element_of<int16_t>(master, k));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    const auto found = element_of<Float16>(param, k);
    const auto copy = element_of<float>(master, k);
    Float16 rounded;
    store(rounded, copy);
    values[k] = exact_value(found, load(found), copy, rounded);
  }
}

template <typename opmath_t>
__device__ __forceinline__ void encode_master(Master kind,
                                              const opmath_t (&values)[kElemsPerThread],
                                              Stored<opmath_t>& param, Stored<opmath_t>& master) {
  if (kind == Master::kRemainder) {
#pragma unroll
    for (int k = 0; k < kElemsPerThread; ++k) {
      BFloat16 upper;
      int16_t lower;
      split(static_cast<float>(values[k]), upper, lower);
      set_element(param, k, upper);
      set_element(master, k, lower);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    Float16 rounded;
    store(rounded, static_cast<float>(values[k]));
    set_element(param, k, rounded);
    set_element(master, k, static_cast<float>(values[k]));
  }
}

// ---- buffers of 8 bits --------------------------------------------------------------------------

template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ void decode_block_as(const Stored<opmath_t>& stored, float scale,
                                                opmath_t (&values)[kElemsPerThread]) {
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k)
    values[k] = load(element_of<scalar_t>(stored, k)) * scale;
}

// A warp's values, of which each lane has `count`; all lanes are here. Returns the block's scale.
template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ float encode_block_as(const opmath_t (&values)[kElemsPerThread],
                                                 int count, const Randoms& randoms,
                                                 Stored<opmath_t>& stored) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
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
  float scaled[kElemsPerThread];
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    scaled[k] = k < count ? static_cast<float>(values[k]) * found.inverse : 0;
  }
  encode_as<true, scalar_t>(scaled, randoms, stored);
  return found.scale;
}

}  // namespace
}  // namespace momentum_ext::cuda
