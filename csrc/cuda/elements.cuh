// A thread's share of a tensor whose dtypes the kernel learns when it runs, eight elements in a row:
// where they lie, and how they are read and written as they are stored.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../formats/block8.h"
#include "../formats/philox.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kElemsPerThread = kRandomsPerBlock;
constexpr int kWarp = 32;
constexpr int kWarpElems = kElemsPerThread * kWarp;
constexpr int kLanesPerBlock = static_cast<int>(kScaleBlock) / kElemsPerThread;  // of 8-bit values
static_assert(kScaleBlock % kElemsPerThread == 0 && kWarp % kLanesPerBlock == 0);

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

// Of each operand.
template <bool kIsStrided, int kOperands>
struct Places {
  InARow row;

  __device__ __forceinline__ void find(const uint64_t*, int, int64_t first, int) { row = {first}; }
  __device__ __forceinline__ const InARow& operator[](int) const { return row; }
};
template <int kOperands>
struct Places<true, kOperands> {
  EachElsewhere of_operand[kOperands];

  __device__ __forceinline__ void find(const uint64_t* dims, int ndim, int64_t first, int count) {
    constexpr int kDimWords = 1 + kOperands;
#pragma unroll
    for (int e = 0; e < kElemsPerThread; ++e) {
      // Lanes without elements walk too: to the last.
      uint64_t index = static_cast<uint64_t>(first) + static_cast<uint64_t>(e < count ? e : 0);
      int64_t at[kOperands] = {};
#pragma unroll 1
      for (int d = ndim - 1; d >= 0; --d) {
        const auto [inside, outside] = split_index(index, dims[kDimWords * d]);
#pragma unroll
        for (int o = 0; o < kOperands; ++o) {
          at[o] += inside * static_cast<int64_t>(dims[kDimWords * d + 1 + o]);
        }
        index = outside;
      }
#pragma unroll
      for (int o = 0; o < kOperands; ++o) of_operand[o].offsets[e] = at[o];
    }
  }
  __device__ __forceinline__ const EachElsewhere& operator[](int operand) const {
    return of_operand[operand];
  }
};

// The same, of one operand at a time: found again each time it is asked for, where there are not enough
// registers for all.
template <int kOperands>
struct PlacesWhenAsked {
  const uint64_t* dims;
  int ndim;
  int64_t first;
  int count;

  __device__ __forceinline__ void find(const uint64_t* dims_, int ndim_, int64_t first_,
                                       int count_) {
    dims = dims_;
    ndim = ndim_;
    first = first_;
    count = count_;
  }
  __device__ __forceinline__ EachElsewhere operator[](int operand) const {
    constexpr int kDimWords = 1 + kOperands;
    EachElsewhere found;
#pragma unroll
    for (int e = 0; e < kElemsPerThread; ++e) {
      uint64_t index = static_cast<uint64_t>(first) + static_cast<uint64_t>(e < count ? e : 0);
      found.offsets[e] = 0;
#pragma unroll 1
      for (int d = ndim - 1; d >= 0; --d) {
        const auto [inside, outside] = split_index(index, dims[kDimWords * d]);
        found.offsets[e] += inside * static_cast<int64_t>(dims[kDimWords * d + 1 + operand]);
        index = outside;
      }
    }
    return found;
  }
};

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
template <typename Word, typename opmath_t>
__device__ __forceinline__ void put(Stored<opmath_t>& to, int at, Word from) {
  to.words[at] = from.x;
  to.words[at + 1] = from.y;
  if constexpr (sizeof(Word) == 16) {
    to.words[at + 2] = from.z;
    to.words[at + 3] = from.w;
  }
}
template <typename Word, typename opmath_t>
__device__ __forceinline__ Word take(const Stored<opmath_t>& from, int at) {
  if constexpr (sizeof(Word) == 16) {
    return {from.words[at], from.words[at + 1], from.words[at + 2], from.words[at + 3]};
  } else {
    return {from.words[at], from.words[at + 1]};
  }
}

// In one instruction.
__device__ __forceinline__ void store_word(uint4* to, uint4 word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w));
#else
  *to = word;
#endif
}

template <typename bits_t>
using WordOf = MachineWord<std::min<int>(kVectorBytes, kElemsPerThread * sizeof(bits_t))>;

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
        const int at = v * static_cast<int>(sizeof(WordOf<bits_t>) / 4);
        const auto word = take<WordOf<bits_t>>(from, at);
        if constexpr (sizeof(bits_t) == 2) {  // nvcc takes an assignment of bf16 apart into four
          store_word(words + v, word);
        } else {
          words[v] = word;
        }
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

}  // namespace
}  // namespace momentum_ext::cuda
