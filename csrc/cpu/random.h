// Random numbers for a tile, several blocks at once. Included like loop.h.

constexpr int kBlocksAtOnce = sizeof(WideVector) / sizeof(uint64_t);
constexpr int kElementsAtOnce = 2 * kBlocksAtOnce * kRandomsPerBlock;

// Random numbers for one tile: 16 bits for each element. What is drawn for its last elements may
// begin before them and ends behind them.
struct RandomTile {
  uint16_t bits[kTile + 2 * kElementsAtOnce];
};

// Even or odd lanes of two vectors in turn, which is an instruction where 128 bits have two lanes.
template <int kOdd, typename Vector>
MOMENTUM_EXT_INLINE Vector lanes_in_turn(const Vector& a, const Vector& b) {
  constexpr int k = kOdd;
  if constexpr (sizeof(Vector) == 64) {
    return MOMENTUM_EXT_SHUFFLE(Vector, a, b, k, 8 + k, 2 + k, 10 + k, 4 + k, 12 + k, 6 + k,
                                14 + k);
  } else if constexpr (sizeof(Vector) == 32) {
    return MOMENTUM_EXT_SHUFFLE(Vector, a, b, k, 4 + k, 2 + k, 6 + k);
  } else {
    return MOMENTUM_EXT_SHUFFLE(Vector, a, b, k, 2 + k);
  }
}

// So the blocks of the even lanes come first.
constexpr int block_of_lane(int lane) { return lane / 2 + lane % 2 * (kBlocksAtOnce / 2); }

// What all of a tensor's random numbers of a step are made with, in vectors.
struct RandomVectors {
  WideVector keys[2][kPhiloxRounds];
  WideVector tensor;
  WideVector step;

  explicit RandomVectors(const RandomKey& key)
      : tensor(WideVector{} + uint64_t{key.tensor}), step(WideVector{} + uint64_t{key.step}) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys[0][round] = WideVector{} + uint64_t{philox_key<0>(key.seed, round)};
      keys[1][round] = WideVector{} + uint64_t{philox_key<1>(key.seed, round)};
    }
  }
};

// 128 bits for each of kBlocksAtOnce blocks.
MOMENTUM_EXT_INLINE void random_blocks(const RandomVectors& vectors, WideVector block,
                                       uint16_t* bits) {
  WideVector c0 = block;
  WideVector c1 = vectors.tensor;
  WideVector c2 = vectors.step;
  WideVector c3 = block >> 32;
  // By reference: clang passes no such vector by value outside of the target region.
  const auto key = [&vectors]<int kWord>(int round) -> const WideVector& {
    return vectors.keys[kWord][round];
  };
  philox(key, c0, c1, c2, c3, [](const WideVector& a, uint64_t b, WideVector& product) {
    product = multiply_lower_halves(a, WideVector{} + b);
  });
  const WideVector lower = (c0 & uint64_t{0xffffffffu}) | c1 << 32;
  const WideVector upper = (c2 & uint64_t{0xffffffffu}) | c3 << 32;
  const WideVector words[2] = {lanes_in_turn<0>(lower, upper), lanes_in_turn<1>(lower, upper)};
  memcpy(bits, words, sizeof(words));
}

// Of elements [first, first + n) of a whole tensor, where `first` is a multiple of kRandomsPerBlock.
void draw(const RandomKey& key, int64_t first, int64_t n, uint16_t* bits) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "random numbers are taken from little-endian words"
#endif
  const auto first_block = static_cast<uint64_t>(first / kRandomsPerBlock);
  if (n <= kRandomsPerBlock) {
    uint32_t words[4];
    random_block(key, first_block, words);
    memcpy(bits, words, sizeof(words));
    return;
  }
  const RandomVectors vectors(key);
  WideVector block = {};
  for (int lane = 0; lane < kBlocksAtOnce; ++lane) {
    block[lane] = first_block + static_cast<uint64_t>(block_of_lane(lane));
  }
  // Two at once: each waits for its own multiplications.
  for (int64_t i = 0; i < n; i += kElementsAtOnce) {
    random_blocks(vectors, block, bits + i);
    random_blocks(vectors, block + kBlocksAtOnce, bits + i + kElementsAtOnce / 2);
    block += uint64_t{2 * kBlocksAtOnce};
  }
}

// Of elements [at, at + n), where `at` is a multiple of kTile, and of the block of kRandomsPerBlock
// that the last is in.
void fill_random(RandomTile& random, const RandomKey& key, const PlaceInWhole& place, int64_t at,
                 int64_t n) {
  static_assert(kTile % kElementsAtOnce == 0 && kElementsAtOnce % kScaleBlock == 0);
  const int64_t end = (n + kRandomsPerBlock - 1) / kRandomsPerBlock * kRandomsPerBlock;
  for (int64_t i = 0; i < end;) {
    const int64_t in_row = place.run == 0 ? end : place.run - (at + i) % place.run;
    const int64_t count = in_row < end - i ? in_row : end - i;
    const int64_t index = place.index_of(at + i);
    const int64_t before = index % kRandomsPerBlock;
    uint16_t* const bits = random.bits + i;
    draw(key, index - before, before + count, bits);
    if (before != 0) memmove(bits, bits + before, static_cast<size_t>(count) * sizeof(*bits));
    i += count;
  }
}
