// Eight elements as numbers, and one operand of a tensor, whatever it is stored as: with a master, in
// 8 bits, rounded at random. The counterpart of ../cpu/slots.h.
#pragma once

#include "../formats/master.h"
#include "../formats/stochastic.h"
#include "elements.cuh"

namespace momentum_ext::cuda {
namespace {

// ---- eight elements as they are computed --------------------------------------------------------

// Of a dtype of 16 bits or more.
template <typename value_t, typename opmath_t>
__device__ __forceinline__ void decode(Dtype dtype, const Stored<opmath_t>& stored,
                                       value_t (&values)[kElemsPerThread]) {
  visit_dtype<value_t>(dtype, [&](auto type) {
#pragma unroll
    for (int e = 0; e < kElemsPerThread; ++e) {
      values[e] = static_cast<value_t>(load(element_of<decltype(type)>(stored, e)));
    }
  });
}

// 16 random bits for each of eight elements.
struct Randoms {
  uint32_t words[4];
  bool are_drawn;

  // For an element of an operand.
  template <int kOperand>
  __device__ __forceinline__ uint32_t of(int e) const {
    const uint32_t bits = words[e / 2] >> 16 * (e % 2) & 0xffffu;
    if constexpr (kOperand < kState) {
      return bits;
    } else {
      return random_of_state<kOperand - kState>(bits);
    }
  }
};

// Of the eight elements that begin at this one. Those of a shard may be in several rows and draws of
// the whole tensor: then each is drawn for by itself.
__device__ __forceinline__ void draw(const RandomKey& key, const PlaceInWhole& place, int64_t first,
                                     uint32_t (&words)[4]) {
  static_assert(kElemsPerThread == kRandomsPerBlock);
#pragma unroll 1
  for (int e = 0; e < kElemsPerThread; ++e) {
    const auto at = static_cast<uint64_t>(place.index_of(first + e));
    uint32_t drawn[4];
    random_block(key, at / kRandomsPerBlock, drawn);
    if (e == 0 && (place.run | at) % kRandomsPerBlock == 0) {  // one draw for all
      for (int k = 0; k < 4; ++k) words[k] = drawn[k];
      return;
    }
    const uint32_t lower = (at & 2) != 0 ? drawn[1] : drawn[0];
    const uint32_t upper = (at & 2) != 0 ? drawn[3] : drawn[2];
    const uint32_t pair = (at & 4) != 0 ? upper : lower;
    // Moved on by 16 bits eight times: no index into registers.
    words[0] = words[0] >> 16 | words[1] << 16;
    words[1] = words[1] >> 16 | words[2] << 16;
    words[2] = words[2] >> 16 | words[3] << 16;
    words[3] = words[3] >> 16 | ((at & 1) != 0 ? pair >> 16 : pair) << 16;
  }
}

template <int kOperand, typename scalar_t, typename value_t, typename opmath_t>
__device__ __forceinline__ void encode_as(const value_t (&values)[kElemsPerThread],
                                          const Randoms& randoms, Stored<opmath_t>& stored) {
  scalar_t element;
  if constexpr (sizeof(scalar_t) <= 2) {  // what is wider is not rounded at random
    if (randoms.are_drawn) {
#pragma unroll
      for (int e = 0; e < kElemsPerThread; ++e) {
        store_stochastic(element, static_cast<float>(values[e]), randoms.of<kOperand>(e));
        set_element(stored, e, element);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kElemsPerThread; ++e) {
    store(element, static_cast<typename OpMath<scalar_t>::type>(values[e]));
    set_element(stored, e, element);
  }
}

// Of a dtype of 16 bits or more.
template <int kOperand, typename value_t, typename opmath_t>
__device__ __forceinline__ void encode(Dtype dtype, const value_t (&values)[kElemsPerThread],
                                       const Randoms& randoms, Stored<opmath_t>& stored) {
  visit_dtype<value_t>(
      dtype, [&](auto type) { encode_as<kOperand, decltype(type)>(values, randoms, stored); });
}

// ---- parameters with a master -------------------------------------------------------------------

// Bytes become the upper halves of remainders, and come back.
template <typename opmath_t>
__device__ __forceinline__ void widen_bytes(Stored<opmath_t>& stored) {
#pragma unroll
  for (int at = 1; at >= 0; --at) {
    const uint32_t word = stored.words[at];
    stored.words[2 * at + 1] = (word >> 8 & 0xff00u) | (word & 0xff000000u);
    stored.words[2 * at] = (word << 8 & 0xff00u) | (word << 16 & 0xff000000u);
  }
}
template <typename opmath_t>
__device__ __forceinline__ void narrow_to_bytes(Stored<opmath_t>& stored) {
#pragma unroll
  for (int at = 0; at < 2; ++at) {
    const uint32_t first = stored.words[2 * at];
    const uint32_t second = stored.words[2 * at + 1];
    stored.words[at] = (first >> 8 & 0xffu) | (first >> 16 & 0xff00u) | (second << 8 & 0xff0000u) |
                       (second & 0xff000000u);
  }
}

template <typename opmath_t>
__device__ __forceinline__ void decode_master(Master kind, const Stored<opmath_t>& param,
                                              const Stored<opmath_t>& master,
                                              opmath_t (&values)[kElemsPerThread]) {
  if (kind != Master::kCopy) {
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
                                              const Randoms& randoms, Stored<opmath_t>& param,
                                              Stored<opmath_t>& master) {
  if (kind != Master::kCopy) {
#pragma unroll
    for (int k = 0; k < kElemsPerThread; ++k) {
      const uint32_t random = randoms.of<kParam>(k) & 0xffu;
      const uint32_t rounding = randoms.are_drawn ? random : kHalfOfByte;
      BFloat16 upper;
      int16_t lower;
      split(static_cast<float>(values[k]), kind == Master::kByteRemainder ? rounding : 0, upper,
            lower);
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

// ---- states in blocks ---------------------------------------------------------------------------

// A word of eight codes of 4 bits, each in a byte of its own, with its sign, and back.
template <typename opmath_t>
__device__ __forceinline__ void widen_nibbles(Stored<opmath_t>& stored) {
#pragma unroll
  for (int at = 1; at >= 0; --at) {
    uint32_t codes = stored.words[0] >> 16 * at & 0xffffu;
    codes = (codes | codes << 8) & 0x00ff00ffu;
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
    stored.words[at] = codes | (codes & 0x08080808u) * 0x1eu;
  }
}
template <typename opmath_t>
__device__ __forceinline__ void narrow_to_nibbles(Stored<opmath_t>& stored) {
#pragma unroll
  for (int at = 0; at < 2; ++at) {
    uint32_t codes = stored.words[at] & 0x0f0f0f0fu;
    codes = (codes | codes >> 4) & 0x00ff00ffu;
    codes = (codes | codes >> 8) & 0xffffu;
    stored.words[0] = at == 0 ? codes : stored.words[0] | codes << 16;
  }
}

// The first `count` codes of the eight, of which the others are zeros.
template <typename opmath_t>
__device__ __forceinline__ void read_packed(const void* base, int64_t first, int count,
                                            Stored<opmath_t>& to) {
  const auto* const bytes = static_cast<const uint8_t*>(base) + first / 2;
  if (count == kElemsPerThread && reinterpret_cast<uintptr_t>(bytes) % sizeof(uint32_t) == 0) {
    to.words[0] = *reinterpret_cast<const uint32_t*>(bytes);
  } else {
    to.words[0] = 0;
#pragma unroll 1
    for (int k = 0; 2 * k < count; ++k) to.words[0] |= uint32_t{bytes[k]} << 8 * k;
  }
}
template <typename opmath_t>
__device__ __forceinline__ void write_packed(void* base, int64_t first, int count,
                                             Stored<opmath_t>& from) {
  auto* const bytes = static_cast<uint8_t*>(base) + first / 2;
  narrow_to_nibbles(from);
  if (count == kElemsPerThread && reinterpret_cast<uintptr_t>(bytes) % sizeof(uint32_t) == 0) {
    *reinterpret_cast<uint32_t*>(bytes) = from.words[0];
    return;
  }
#pragma unroll 1
  for (int k = 0; 2 * k < count; ++k) bytes[k] = static_cast<uint8_t>(from.words[0] >> 8 * k);
}

template <typename scalar_t, typename opmath_t>
__device__ __forceinline__ void decode_block(Stored<opmath_t> stored, float scale,
                                             opmath_t (&values)[kElemsPerThread]) {
  if constexpr (std::is_same_v<scalar_t, Int4>) widen_nibbles(stored);
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k)
    values[k] = value_of(element_of<scalar_t>(stored, k), scale);
}

// The values of a warp's blocks, of which each lane has `count`; all lanes are here. Returns the
// scale of the lane's block.
template <int kOperand, typename scalar_t, typename opmath_t>
__device__ __forceinline__ ScaleBits encode_block(const opmath_t (&values)[kElemsPerThread],
                                                  int count, const Randoms& randoms,
                                                  Stored<opmath_t>& stored) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    const uint32_t bits = detail::bits_of(static_cast<float>(values[k])) & 0x7fffffffu;
    largest = k < count && bits > largest ? bits : largest;
  }
#pragma unroll
  for (int distance = kLanesPerBlock / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, largest, distance);
    largest = other > largest ? other : largest;
  }
  RandomBlockScale found = {};
  if (randoms.are_drawn) {
    const uint32_t mine = random_of_scale(randoms.of<kOperand>(0), randoms.of<kOperand>(1));
    found = block_scale_stochastic<scalar_t>(largest, __shfl_sync(~0u, mine, 0, kLanesPerBlock));
  } else {
    found = {block_scale<scalar_t>(largest), 0, 0};
  }
  if (found.inverse == 0) {  // the values may be Inf or NaN
    stored.words[0] = stored.words[1] = 0;
    return found.bits;
  }
  float units[kElemsPerThread];
#pragma unroll
  for (int k = 0; k < kElemsPerThread; ++k) {
    const float value = k < count ? static_cast<float>(values[k]) : 0;
    units[k] = randoms.are_drawn ? scaled<scalar_t>(value, found)
                                 : in_units<scalar_t>(value, found.inverse);
  }
  encode_as<kOperand, scalar_t>(units, randoms, stored);
  return found.bits;
}

// ---- an operand ---------------------------------------------------------------------------------

// A thread's elements.
struct Span {
  int64_t first;
  int count;
  int lane;
};

// How an operand is stored, which a kernel learns when it runs, or knows when it is compiled.
struct LearntFormat {
  Dtype dtype;
  Master master_kind = Master::kNone;
  bool has_scale = false;
  bool is_random = false;

  // `at_random`: what of its group is rounded so.
  __device__ __forceinline__ void learn(Dtype found, Master master, uint32_t at_random) {
    dtype = found;
    master_kind = master;
    has_scale = has_blocks(found);
    const bool is_16_bit = dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
    is_random = master == Master::kByteRemainder
                    ? (at_random & GroupRounding::kMasters) != 0
                    : (at_random & GroupRounding::kStored) != 0 && master == Master::kNone &&
                          (has_scale || is_16_bit);
  }
};
template <Dtype kDtype, Master kMaster, bool kIsRandom>
struct KnownFormat {
  static constexpr Dtype dtype = kDtype;
  static constexpr Master master_kind = kMaster;
  static constexpr bool has_scale = has_blocks(kDtype);
  static constexpr bool is_random = kIsRandom;

  __device__ __forceinline__ void learn(Dtype, Master, uint32_t) {}
};

// One operand of a tensor, and a thread's elements of it as they are stored. The counterpart of
// OperandTile in ../cpu/slots.h.
template <typename opmath_t, typename Format>
struct StoredOperand : Format {
  using Format::dtype, Format::master_kind, Format::has_scale, Format::is_random;

  void* memory;
  ScaleBits* scales = nullptr;
  void* master = nullptr;

  Stored<opmath_t> stored;
  Stored<opmath_t> exact;  // what the master has of them
  ScaleBits scale;

  __device__ __forceinline__ Dtype master_dtype() const {
    return master_kind == Master::kCopy ? Dtype::kFloat32 : Dtype::kFloat16;
  }

  template <typename Place>
  __device__ __forceinline__ void read(const Place& place, const Span& span) {
    const InARow row = {span.first};
    if (has_scale) {
      if (dtype == Dtype::kInt4) {
        read_packed(memory, span.first, span.count, stored);
      } else {
        read_bits<uint8_t>(memory, row, span.count, stored);
      }
      scale = scales[span.first / kScaleBlock];
      return;
    }
    cuda::read(dtype, memory, place, span.count, stored);
    if (master_kind == Master::kByteRemainder) {
      read_bits<uint8_t>(master, row, span.count, exact);
      widen_bytes(exact);
    } else if (master_kind != Master::kNone) {
      cuda::read(master_dtype(), master, row, span.count, exact);
    }
  }

  __device__ __forceinline__ void decode(opmath_t (&values)[kElemsPerThread]) const {
    if (has_scale) {
      visit_blocks(dtype, [&](auto type) {
        decode_block<decltype(type)>(stored, load_scale(scale), values);
      });
    } else if (master_kind != Master::kNone) {
      decode_master(master_kind, stored, exact, values);
    } else {
      cuda::decode(dtype, stored, values);
    }
  }

  template <int kOperand, typename Place>
  __device__ __forceinline__ void write(const opmath_t (&values)[kElemsPerThread], Randoms& randoms,
                                        const Place& place, const Span& span) {
    const InARow row = {span.first};
    randoms.are_drawn = is_random;
    if (has_scale) {
      scale = visit_blocks(dtype, [&](auto type) {
        return encode_block<kOperand, decltype(type)>(values, span.count, randoms, stored);
      });
      if (dtype == Dtype::kInt4) {
        write_packed(memory, span.first, span.count, stored);
      } else {
        write_bits<uint8_t>(memory, row, span.count, stored);
      }
      if (span.lane % kLanesPerBlock == 0 && span.count != 0)
        scales[span.first / kScaleBlock] = scale;
      return;
    }
    if (master_kind != Master::kNone) {
      encode_master(master_kind, values, randoms, stored, exact);
      if (master_kind == Master::kByteRemainder) {
        narrow_to_bytes(exact);
        write_bits<uint8_t>(master, row, span.count, exact);
      } else {
        cuda::write(master_dtype(), master, row, span.count, exact);
      }
    } else {
      encode<kOperand>(dtype, values, randoms, stored);
    }
    cuda::write(dtype, memory, place, span.count, stored);
  }
};

}  // namespace
}  // namespace momentum_ext::cuda
