// Low-precision slots: parameters with a master and buffers of 8 bits, a tile at a time, and stores
// that round at random. Included like loop.h.

// Random numbers for one tile: 16 bits for each element.
struct RandomTile {
  uint16_t bits[kTile];
};

constexpr int kBlocksAtOnce = sizeof(WideVector) / sizeof(uint64_t);

// 128 bits for each of kBlocksAtOnce blocks.
MOMENTUM_EXT_INLINE void random_blocks(const RandomKey& key, WideVector block, uint16_t* bits) {
  WideVector c0 = block;
  WideVector c1 = WideVector{} + uint64_t{key.tensor};
  WideVector c2 = WideVector{} + uint64_t{key.step};
  WideVector c3 = block >> 32;
  philox(key.seed, c0, c1, c2, c3, [](const WideVector& a, uint64_t b, WideVector& product) {
    product = multiply_lower_halves(a, WideVector{} + b);
  });
  const WideVector lower = (c0 & uint64_t{0xffffffffu}) | c1 << 32;
  const WideVector upper = (c2 & uint64_t{0xffffffffu}) | c3 << 32;
  uint64_t words[kBlocksAtOnce][2];
  for (int lane = 0; lane < kBlocksAtOnce; ++lane) {
    words[lane][0] = lower[lane];
    words[lane][1] = upper[lane];
  }
  memcpy(bits, words, sizeof(words));
}

// Of elements [at, at + n), where `at` is a multiple of kTile.
void fill_random(RandomTile& random, const RandomKey& key, int64_t at, int64_t n) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "random numbers are taken from little-endian words"
#endif
  constexpr int kElementsAtOnce = 2 * kBlocksAtOnce * kRandomsPerBlock;
  static_assert(kTile % kElementsAtOnce == 0);
  WideVector block = {};
  for (int lane = 0; lane < kBlocksAtOnce; ++lane) {
    block[lane] = static_cast<uint64_t>(at / kRandomsPerBlock + lane);
  }
  // Two at once: each waits for its own multiplications.
  for (int64_t i = 0; i < n; i += kElementsAtOnce) {
    random_blocks(key, block, random.bits + i);
    random_blocks(key, block + kBlocksAtOnce, random.bits + i + kElementsAtOnce / 2);
    block += uint64_t{2 * kBlocksAtOnce};
  }
}

// ---- storing at random --------------------------------------------------------------------------

// The same numbers for the momentum buffer.
void exchange_bytes(const RandomTile& random, int64_t n, RandomTile& exchanged) {
  for (int64_t i = 0; i < n; ++i) {
    exchanged.bits[i] = static_cast<uint16_t>(random_of_buffer(random.bits[i]));
  }
}

// False, and nothing useful was stored, where some value is Inf or NaN: to ask once for a tile
// halves the work on a value.
bool store_finite_stochastic(const float* tile, const RandomTile& random, int64_t n,
                             BFloat16* target) {
  int32_t largest = 0;
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<int32_t>(detail::bits_of(tile[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    store_finite_stochastic(target[i], tile[i], random.bits[i]);
  }
  return largest < 0x7f800000;
}
template <typename opmath_t, typename scalar_t>
bool store_finite_stochastic(const opmath_t*, const RandomTile&, int64_t, scalar_t*) {
  return false;
}

template <typename scalar_t, typename opmath_t>
void store_all_stochastic(const opmath_t* tile, const RandomTile& random, int64_t n,
                          void* target_ptr) {
  auto* const target = static_cast<scalar_t*>(target_ptr);
  if (store_finite_stochastic(tile, random, n, target)) return;
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    store_stochastic(target[i], static_cast<float>(tile[i]), random.bits[i]);
  }
}

bool is_16_bit(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }

// Of a dtype of 16 bits.
template <typename opmath_t>
void store_tile_stochastic(Dtype dtype, const opmath_t* tile, const RandomTile& random, int64_t n,
                           void* target) {
  if (dtype == Dtype::kBFloat16) {
    store_all_stochastic<BFloat16>(tile, random, n, target);
  } else {
    store_all_stochastic<Float16>(tile, random, n, target);
  }
}

// ---- parameters with a master -------------------------------------------------------------------

template <typename opmath_t>
void load_split(const BFloat16* param, const int16_t* remainder, int64_t n, opmath_t* tile) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) tile[i] = join(param[i], remainder[i]);
}

template <typename opmath_t>
void store_split(const opmath_t* tile, int64_t n, BFloat16* param, int16_t* remainder) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) split(static_cast<float>(tile[i]), param[i], remainder[i]);
}

template <typename opmath_t>
void load_copy(const Float16* param, const float* master, int64_t n, opmath_t* tile) {
  alignas(64) Float16 rounded[kTile];
  alignas(64) float widened[kTile];
  float_to_half(master, n, rounded);
  half_to_float(param, n, widened);
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    tile[i] = exact_value(param[i], widened[i], master[i], rounded[i]);
  }
}

template <typename opmath_t>
void store_copy(const opmath_t* tile, int64_t n, Float16* param, float* master) {
  for (int64_t i = 0; i < n; ++i) master[i] = static_cast<float>(tile[i]);
  float_to_half(master, n, param);
}

// Elements [at, at + n), of which the parameter's are at `param`.
template <typename opmath_t>
void load_master(const LowPrecision& low, const void* param, int64_t at, int64_t n,
                 opmath_t* tile) {
  if (low.master_kind == Master::kRemainder) {
    load_split(static_cast<const BFloat16*>(param), static_cast<const int16_t*>(low.master) + at, n,
               tile);
  } else {
    load_copy(static_cast<const Float16*>(param), static_cast<const float*>(low.master) + at, n,
              tile);
  }
}

template <typename opmath_t>
void store_master(const LowPrecision& low, const opmath_t* tile, int64_t at, int64_t n,
                  void* param) {
  if (low.master_kind == Master::kRemainder) {
    store_split(tile, n, static_cast<BFloat16*>(param), static_cast<int16_t*>(low.master) + at);
  } else {
    store_copy(tile, n, static_cast<Float16*>(param), static_cast<float*>(low.master) + at);
  }
}

// ---- buffers of 8 bits --------------------------------------------------------------------------
// A tile is a block: both begin at multiples of kTile.

static_assert(kTile == kScaleBlock);

template <typename scalar_t, typename opmath_t>
void load_block_as(const scalar_t* block, float scale, int64_t n, opmath_t* tile) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) tile[i] = load(block[i]) * scale;
}

template <typename scalar_t, typename opmath_t>
void store_block_as(const opmath_t* tile, const RandomTile* random, int64_t n, scalar_t* block,
                    float* scale) {
  alignas(64) float values[kTile];
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    values[i] = static_cast<float>(tile[i]);
    const auto magnitude = static_cast<int32_t>(detail::bits_of(values[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  const BlockScale found = block_scale<scalar_t>(static_cast<uint32_t>(largest));
  *scale = found.scale;
  if (found.inverse == 0) {
    memset(block, 0, static_cast<size_t>(n));
    return;
  }
  const float inverse = found.inverse;
  if (random == nullptr) {
    MOMENTUM_EXT_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < n; ++i) store(block[i], values[i] * inverse);
  } else {
    MOMENTUM_EXT_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < n; ++i) {
      store_stochastic(block[i], values[i] * inverse, random->bits[i]);
    }
  }
}

template <typename opmath_t>
void load_block(Dtype dtype, const void* buffer, const float* scales, int64_t at, int64_t n,
                opmath_t* tile) {
  const float scale = scales[at / kScaleBlock];
  if (dtype == Dtype::kInt8) {
    load_block_as(static_cast<const Int8*>(buffer) + at, scale, n, tile);
  } else {
    load_block_as(static_cast<const Float8E4M3*>(buffer) + at, scale, n, tile);
  }
}

template <typename opmath_t>
void store_block(Dtype dtype, const opmath_t* tile, const RandomTile* random, int64_t at, int64_t n,
                 void* buffer, float* scales) {
  float* const scale = scales + at / kScaleBlock;
  if (dtype == Dtype::kInt8) {
    store_block_as(tile, random, n, static_cast<Int8*>(buffer) + at, scale);
  } else {
    store_block_as(tile, random, n, static_cast<Float8E4M3*>(buffer) + at, scale);
  }
}
