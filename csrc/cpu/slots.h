// What a tile has of one operand, whatever it is stored as: with a master, in 8 bits, rounded at
// random. Included like loop.h.

// ---- storing at random --------------------------------------------------------------------------

// The same numbers for state k, of whole blocks.
template <int k>
void rotate_random(const RandomTile& random, int64_t n, RandomTile& rotated) {
  const int64_t end = (n + kScaleBlock - 1) / kScaleBlock * kScaleBlock;
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < end; ++i) {
    rotated.bits[i] = static_cast<uint16_t>(random_of_state<k>(random.bits[i]));
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

// Of a dtype of 16 bits.
template <typename opmath_t>
void store_tile_stochastic(Dtype dtype, const opmath_t* tile, const RandomTile& random, int64_t n,
                           void* target) {
  visit_dtype<opmath_t>(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    if constexpr (sizeof(scalar_t) == 2) store_all_stochastic<scalar_t>(tile, random, n, target);
  });
}

// ---- parameters with a master -------------------------------------------------------------------

// Remainders as they are, or their upper halves.
template <typename remainder_t, typename opmath_t>
void load_split(const BFloat16* param, const void* remainders, int64_t n, opmath_t* tile) {
  constexpr int kUnit = sizeof(remainder_t) == 1 ? 256 : 1;
  const auto* const remainder = static_cast<const remainder_t*>(remainders);
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    tile[i] = join(param[i], static_cast<int16_t>(remainder[i] * kUnit));
  }
}

template <typename remainder_t, typename opmath_t, typename Addend>
void store_split(const opmath_t* tile, const Addend& addend, int64_t n, BFloat16* param,
                 void* remainders) {
  constexpr int kShift = sizeof(remainder_t) == 1 ? 8 : 0;
  auto* const remainder = static_cast<remainder_t*>(remainders);
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    int16_t whole;
    split(static_cast<float>(tile[i]), addend(i), param[i], whole);
    remainder[i] = static_cast<remainder_t>(whole >> kShift);
  }
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
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) master[i] = static_cast<float>(tile[i]);
  float_to_half(master, n, param);
}

// ---- an operand ---------------------------------------------------------------------------------

// One operand of a tensor in the type that it is computed in: where its tensor has it like that,
// else in a tile.
template <typename opmath_t, typename W, bool kAhead = false>
class OperandTile : TensorTile<W, kAhead> {
  using Memory = TensorTile<W, kAhead>;
  using Memory::size_, Memory::tensor_, Memory::walker_;

 public:
  void start(const W& walker, int operand, const void* data, Dtype dtype) {
    Memory::start(walker, operand, data, dtype);
    dtype_ = dtype;
    is_in_place_ =
        dtype == (sizeof(opmath_t) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32);
  }
  void keep_master(Master kind, void* master) {
    master_kind_ = kind;
    master_ = master;
  }
  void keep_scales(ScaleBits* scales) { scales_ = scales; }

  // False where nothing is rounded so.
  bool round_at_random(bool stored, bool masters) {
    return is_random_ = master_kind_ == Master::kByteRemainder
                            ? masters
                            : stored && size_ <= 2 && master_kind_ == Master::kNone;
  }
  bool is_random() const { return is_random_; }

  // Where the walker's elements are to be written.
  MOMENTUM_EXT_INLINE void* place() {
    if (size_ == 1) return tile_;
    found_ = Memory::place();
    return is_in_place_ ? static_cast<void*>(found_) : tile_;
  }

  // Where they are.
  MOMENTUM_EXT_INLINE void* load() {
    if (size_ != 1) found_ = Memory::load();
    if (is_in_place_) return found_;
    load_values();
    return tile_;
  }

  // What was written there.
  MOMENTUM_EXT_INLINE void store(const RandomTile& random) {
    if (!is_in_place_) store_values(random);
    if (size_ != 1) Memory::store();
  }

 private:
  void load_values() {
    const int64_t at = walker_->at();
    const int64_t n = walker_->n();
    if (master_kind_ == Master::kRemainder) {
      load_split<int16_t>(as<BFloat16>(found_), static_cast<int16_t*>(master_) + at, n, tile_);
    } else if (master_kind_ == Master::kByteRemainder) {
      load_split<int8_t>(as<BFloat16>(found_), static_cast<int8_t*>(master_) + at, n, tile_);
    } else if (master_kind_ == Master::kCopy) {
      load_copy(as<Float16>(found_), static_cast<const float*>(master_) + at, n, tile_);
    } else if (size_ != 1) {
      load_tile(dtype_, found_, n, tile_);
    } else {
      with_codes(at, [&](auto* codes) {
        if constexpr (std::is_same_v<decltype(codes), Int4*>) unpack(packed_codes(at), n, codes);
        load_blocks(codes, scales_ + at / kScaleBlock, n, tile_);
      });
    }
  }

  void store_values(const RandomTile& random) {
    const int64_t at = walker_->at();
    const int64_t n = walker_->n();
    if (master_kind_ == Master::kRemainder) {
      const auto nothing = [](int64_t) { return uint32_t{0}; };
      store_split<int16_t>(tile_, nothing, n, as<BFloat16>(found_),
                           static_cast<int16_t*>(master_) + at);
    } else if (master_kind_ == Master::kByteRemainder) {
      auto* const target = as<BFloat16>(found_);
      auto* const remainder = static_cast<int8_t*>(master_) + at;
      if (is_random_) {
        const auto by_chance = [&](int64_t i) { return random.bits[i] & 0xffu; };
        store_split<int8_t>(tile_, by_chance, n, target, remainder);
      } else {
        const auto to_nearest = [](int64_t) { return kHalfOfByte; };
        store_split<int8_t>(tile_, to_nearest, n, target, remainder);
      }
    } else if (master_kind_ == Master::kCopy) {
      store_copy(tile_, n, as<Float16>(found_), static_cast<float*>(master_) + at);
    } else if (size_ == 1) {
      with_codes(at, [&](auto* codes) {
        store_blocks(tile_, is_random_ ? &random : nullptr, n, codes, scales_ + at / kScaleBlock);
        if constexpr (std::is_same_v<decltype(codes), Int4*>) pack(codes, n, packed_codes(at));
      });
    } else if (is_random_) {
      store_tile_stochastic(dtype_, tile_, random, n, found_);
    } else {
      store_tile(dtype_, tile_, n, found_);
    }
  }

  // Calls use(codes) with the codes from element `at` on, each in a byte.
  template <typename Use>
  void with_codes(int64_t at, const Use& use) {
    char* const tensor = tensor_;  // g++ 12 does not find it in a generic lambda
    visit_blocks(dtype_, [&](auto type) {
      using scalar_t = decltype(type);
      if constexpr (std::is_same_v<scalar_t, Int4>) {
        Int4 codes[kTile + 1];
        use(codes);
      } else {
        use(as<scalar_t>(tensor) + at);
      }
    });
  }
  uint8_t* packed_codes(int64_t at) { return as<uint8_t>(tensor_) + at / 2; }

  template <typename scalar_t>
  static scalar_t* as(char* memory) {
    return reinterpret_cast<scalar_t*>(memory);
  }

  Dtype dtype_;
  bool is_in_place_;
  bool is_random_ = false;
  Master master_kind_ = Master::kNone;
  void* master_ = nullptr;
  ScaleBits* scales_ = nullptr;
  char* found_ = nullptr;  // the elements as they are stored
  alignas(64) opmath_t tile_[kTile];
};
