// Random bits. They come from nothing but what is written here, so that threads, launches and
// devices do not matter.
#pragma once

#include "../rules/math.h"

namespace momentum_ext {

// Where the random bits of a tensor's elements come from.
struct RandomKey {
  uint64_t seed;
  uint32_t tensor;  // its place among the optimizer's parameters
  uint32_t step;
};

constexpr int kRandomsPerBlock = 8;

// Where the elements of a shard are in the whole tensor: by rows of `run` elements that begin every
// `stride`. An element has the random bits of its place there, on however many ranks it is sharded.
// A tensor that is no shard is the whole.
struct PlaceInWhole {
  int64_t first = 0;
  uint32_t run = 0;  // 0: all elements are in a row
  uint32_t stride = 0;

  MOMENTUM_EXT_INLINE int64_t index_of(int64_t element) const {
    if (run == 0) return first + element;
    return first + element / run * stride + element % run;
  }
};

// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the fewest
// rounds that pass BigCrush there).
constexpr int kPhiloxRounds = 7;

// Words 0 and 1 of a round's key.
template <int kWord>
MOMENTUM_EXT_INLINE uint32_t philox_key(uint64_t seed, uint32_t round) {
  return static_cast<uint32_t>(seed >> 32 * kWord) +
         round * (kWord == 0 ? 0x9E3779B9u : 0xBB67AE85u);
}

// The rounds, for one counter in uint64_t or several in a vector of them. The lower half of each is
// a word of the counter, and then of the result; what is in the upper half does not matter.
// `multiply` makes the 64 bits of the product of two lower halves, key<word>(round) is as above.
template <typename Lanes, typename Key, typename Multiply>
MOMENTUM_EXT_INLINE void philox(const Key& key, Lanes& c0, Lanes& c1, Lanes& c2, Lanes& c3,
                                const Multiply& multiply) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Lanes product0, product1;
    multiply(c0, uint64_t{0xD2511F53u}, product0);
    multiply(c2, uint64_t{0xCD9E8D57u}, product1);
    c0 = (product1 >> 32) ^ c1 ^ key.template operator()<0>(round);
    c2 = (product0 >> 32) ^ c3 ^ key.template operator()<1>(round);
    c1 = product1;
    c3 = product0;
  }
}

// 128 random bits for elements [8 * block, 8 * block + 8) of a tensor, 16 for each, the lower half
// of words[0] first.
MOMENTUM_EXT_INLINE void random_block(const RandomKey& key, uint64_t block, uint32_t (&words)[4]) {
  uint64_t c0 = block;
  uint64_t c1 = key.tensor;
  uint64_t c2 = key.step;
  uint64_t c3 = block >> 32;
  const auto round_key = [&key]<int kWord>(int round) {
    return uint64_t{philox_key<kWord>(key.seed, static_cast<uint32_t>(round))};
  };
  philox(round_key, c0, c1, c2, c3, [](uint64_t a, uint64_t b, uint64_t& product) {
    product = uint64_t{static_cast<uint32_t>(a)} * b;
  });
  words[0] = static_cast<uint32_t>(c0);
  words[1] = static_cast<uint32_t>(c1);
  words[2] = static_cast<uint32_t>(c2);
  words[3] = static_cast<uint32_t>(c3);
}

}  // namespace momentum_ext
