// States of 8 or 4 bits: blocks of codes and their scales, from a tile and into it. Included like loop.h.
//
// A tile is a number of whole blocks: both begin at multiples of kTile.

constexpr int kBlocks = kTile / kScaleBlock;
static_assert(kTile % kScaleBlock == 0);

// Codes of 4 bits, two in a byte, each in a byte of its own, and back. They begin at a byte.
inline void unpack(const uint8_t* bytes, int64_t n, Int4* codes) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < (n + 1) / 2; ++i) {
    codes[2 * i].bits = static_cast<int8_t>(((bytes[i] & 15) ^ 8) - 8);
    codes[2 * i + 1].bits = static_cast<int8_t>(((bytes[i] >> 4) ^ 8) - 8);
  }
}
inline void pack(Int4* codes, int64_t n, uint8_t* bytes) {
  codes[n].bits = 0;
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < (n + 1) / 2; ++i) {
    bytes[i] = static_cast<uint8_t>((codes[2 * i].bits & 15) | codes[2 * i + 1].bits << 4);
  }
}

template <typename scalar_t, typename opmath_t>
void load_blocks(const scalar_t* codes, const ScaleBits* scales, int64_t n, opmath_t* tile) {
  int64_t at = 0;
  for (; at + kScaleBlock <= n; at += kScaleBlock) {
    const float scale = load_scale(scales[at / kScaleBlock]);
    MOMENTUM_EXT_INDEPENDENT_ITERATIONS
    for (int64_t i = at; i < at + kScaleBlock; ++i) tile[i] = value_of<FmaPolicy>(codes[i], scale);
  }
  for (; at < n; ++at) {
    tile[at] = value_of<FmaPolicy>(codes[at], load_scale(scales[at / kScaleBlock]));
  }
}

// The largest magnitude of each block, as bits: of four blocks at once, whose maxima are transposed.
inline void find_largest(const float* values, int32_t (&largest)[kBlocks]) {
  using Vector = int32_t __attribute__((vector_size(16)));
  static_assert(kBlocks % 4 == 0);
  const auto larger = [](Vector a, Vector b) { return a > b ? a : b; };
  const auto larger_of_halves = [&](Vector a, Vector b) {
    return larger((Vector)Lanes<4>::low((Lanes<4>::Vector)a, (Lanes<4>::Vector)b),
                  (Vector)Lanes<4>::high((Lanes<4>::Vector)a, (Lanes<4>::Vector)b));
  };
  for (int b = 0; b < kBlocks; b += 4) {
    Vector found[4] = {};
    for (int k = 0; k < 4; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kScaleBlock; i += 4) {
        Vector bits;
        memcpy(&bits, values + (b + k) * kScaleBlock + i, sizeof(bits));
        found[k] = larger(found[k], bits & 0x7fffffff);
      }
    }
    const Vector of_four = larger_of_halves(larger_of_halves(found[0], found[2]),
                                            larger_of_halves(found[1], found[3]));
    memcpy(largest + b, &of_four, sizeof(of_four));
  }
}

// How the blocks of a tile are stored, each field in a row: for vectors.
struct TileScales {
  uint32_t bits[kBlocks];
  float inverse[kBlocks];
  float knee[kBlocks];
  float stretch[kBlocks];
};

// Of all blocks of a tile, also those that its tensor ends before.
template <typename scalar_t>
void find_scales(const int32_t (&largest)[kBlocks], TileScales& scales) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int b = 0; b < kBlocks; ++b) {
    const BlockScale found = block_scale<scalar_t>(static_cast<uint32_t>(largest[b]));
    scales.bits[b] = found.bits;
    scales.inverse[b] = found.inverse;
  }
}
template <typename scalar_t>
void find_scales(const int32_t (&largest)[kBlocks], const uint32_t (&random)[kBlocks],
                 TileScales& scales) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int b = 0; b < kBlocks; ++b) {
    const RandomBlockScale found =
        block_scale_stochastic<scalar_t>(static_cast<uint32_t>(largest[b]), random[b]);
    scales.bits[b] = found.bits;
    scales.inverse[b] = found.inverse;
    scales.knee[b] = found.knee;
    scales.stretch[b] = found.stretch;
  }
}

// The values of a tile as floats, whole blocks of them: those that its tensor ends before are 0.
inline const float* whole_blocks(float* tile, int64_t n, float (&)[kTile]) {
  for (int64_t i = n; i < kTile; ++i) tile[i] = 0;
  return tile;
}
inline const float* whole_blocks(const double* tile, int64_t n, float (&values)[kTile]) {
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(tile[i]);
  return whole_blocks(values, n, values);
}

template <typename scalar_t, typename opmath_t>
void store_blocks(opmath_t* tile, const RandomTile* random, int64_t n, scalar_t* target,
                  ScaleBits* scales) {
  alignas(64) float buffer[kTile];
  alignas(64) int32_t codes[kTile];
  const int num_blocks = static_cast<int>((n + kScaleBlock - 1) / kScaleBlock);
  const float* const values = whole_blocks(tile, n, buffer);
  alignas(64) int32_t largest[kBlocks];
  find_largest(values, largest);
  TileScales found;
  if (random == nullptr) {
    find_scales<scalar_t>(largest, found);
  } else {
    alignas(64) uint32_t bits[kBlocks] = {};
    for (int b = 0; b < num_blocks; ++b) {
      const uint16_t* const first = random->bits + b * kScaleBlock;
      bits[b] = random_of_scale(first[0], first[1]);
    }
    find_scales<scalar_t>(largest, bits, found);
  }
  for (int b = 0; b < num_blocks; ++b) scales[b] = static_cast<ScaleBits>(found.bits[b]);
  for (int b = 0; b < num_blocks; ++b) {
    const float* const in = values + b * kScaleBlock;
    int32_t* const out = codes + b * kScaleBlock;
    const float inverse = found.inverse[b];
    if (inverse == 0) {  // the values may be Inf or NaN
      memset(out, 0, kScaleBlock * sizeof(*out));
    } else if (random == nullptr) {
      MOMENTUM_EXT_INDEPENDENT_ITERATIONS
      for (int64_t i = 0; i < kScaleBlock; ++i) {
        out[i] = encode<FmaPolicy>(scalar_t(), in_units<scalar_t>(in[i], inverse));
      }
    } else {
      const uint16_t* const bits = random->bits + b * kScaleBlock;
      const RandomBlockScale scale = {
          {static_cast<ScaleBits>(found.bits[b]), inverse}, found.knee[b], found.stretch[b]};
      MOMENTUM_EXT_INDEPENDENT_ITERATIONS
      for (int64_t i = 0; i < kScaleBlock; ++i) {
        out[i] = encode_stochastic<FmaPolicy>(scalar_t(), scaled<scalar_t>(in[i], scale), bits[i]);
      }
    }
  }
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) target[i].bits = static_cast<decltype(target->bits)>(codes[i]);
}
