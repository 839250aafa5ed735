// The CPU loop, compiled once per instruction set: every cpu/isa_*.cpp includes this file inside a
// namespace of its own, after it has chosen the target, FmaPolicy and the conversion of 16-bit
// floats. Nothing here may instantiate a template of the standard library: the linker would keep
// one copy for all instruction sets.
//
// Two ways through a tensor:
//   flat   one dtype, one dense layout: plain loops that the compiler vectorises;
//   tiled  everything else (strided, mixed dtypes, fp16, low-precision state): load a small tile
//   into opmath_t, update it as if it were a flat tensor, store it.

// ---- flat ---------------------------------------------------------------------------------------

template <typename scalar_t, WeightDecay kWeightDecay, Momentum kMomentum, bool kNesterov>
void update_flat(void* param_ptr, const void* grad_ptr, void* buffer_ptr, int64_t n,
                 const Hyperparams<Sgd>& hyperparams) {
  using opmath_t = typename OpMath<scalar_t>::type;
  const Sgd::Coefficients<opmath_t> c = coefficients<opmath_t>(hyperparams);
  auto* param = static_cast<scalar_t*>(param_ptr);
  auto* buffer = static_cast<scalar_t*>(buffer_ptr);
  const auto* grad = static_cast<const scalar_t*>(grad_ptr);
  // Pointers are equal or disjoint (the binding sees to it), so iterations do not depend on each
  // other.
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    opmath_t p = load(param[i]);
    opmath_t b = 0;
    if constexpr (kMomentum == Momentum::kLaterStep) b = load(buffer[i]);
    Sgd::update<FmaPolicy>(Sgd::Variant<kWeightDecay, kMomentum, kNesterov>(), c,
                           opmath_t{load(grad[i])}, p, b);
    if constexpr (kMomentum != Momentum::kNone) store(buffer[i], b);
    store(param[i], p);
  }
}

// The instance of update_flat() for a group, which is chosen once for each tensor.
using FlatFn = void (*)(void* param, const void* grad, void* buffer, int64_t n,
                        const Hyperparams<Sgd>& hyperparams);

template <typename scalar_t, WeightDecay kWeightDecay>
FlatFn choose_flat(const Hyperparams<Sgd>& h, bool is_first_step) {
  constexpr Momentum kFirst = Momentum::kFirstStep;
  constexpr Momentum kLater = Momentum::kLaterStep;
  if (!h.has_momentum) return update_flat<scalar_t, kWeightDecay, Momentum::kNone, false>;
  if (is_first_step) {
    return h.nesterov ? update_flat<scalar_t, kWeightDecay, kFirst, true>
                      : update_flat<scalar_t, kWeightDecay, kFirst, false>;
  }
  return h.nesterov ? update_flat<scalar_t, kWeightDecay, kLater, true>
                    : update_flat<scalar_t, kWeightDecay, kLater, false>;
}

template <typename scalar_t>
FlatFn choose_flat(const Hyperparams<Sgd>& h, bool is_first_step) {
  switch (h.weight_decay) {
    case WeightDecay::kNone:
      return choose_flat<scalar_t, WeightDecay::kNone>(h, is_first_step);
    case WeightDecay::kL2:
      return choose_flat<scalar_t, WeightDecay::kL2>(h, is_first_step);
    default:
      return choose_flat<scalar_t, WeightDecay::kDecoupled>(h, is_first_step);
  }
}

// ---- tiled --------------------------------------------------------------------------------------

template <typename opmath_t>
constexpr Dtype kDtypeOf = sizeof(opmath_t) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32;

template <typename opmath_t>
void update_tiled(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Sgd>& h,
                  uint32_t rounding_step) {
  alignas(64) opmath_t param_tile[kTile];
  alignas(64) opmath_t grad_tile[kTile];
  alignas(64) opmath_t buffer_tile[kTile];
  RandomTile random;
  RandomTile random_for_buffer;
  const FlatFn update = choose_flat<opmath_t>(h, entry.is_first_step);
  const LowPrecision* const low = entry.low_precision;
  const bool has_master = low != nullptr && low->master_kind != Master::kNone;
  const bool has_scale = h.has_momentum && is_8_bit(entry.state_dtype[0]);
  const bool stochastic = low != nullptr && h.stochastic_rounding;
  const bool random_param = stochastic && !has_master && is_16_bit(entry.param_dtype);
  const bool random_buffer =
      stochastic && h.has_momentum && (has_scale || is_16_bit(entry.state_dtype[0]));
  const RandomKey key = {h.rounding_seed, low == nullptr ? 0 : low->tensor, rounding_step};

  TileWalker walker(entry, begin, end, /*in_order=*/low != nullptr);
  TensorTile<false> param_memory(walker, kParam, entry.param, entry.param_dtype);
  TensorTile<true> grad_memory(walker, kGrad, entry.grad, entry.grad_dtype);
  TensorTile<false> buffer_memory(walker, kState, entry.state[0], entry.state_dtype[0]);
  // What is in memory as it is computed needs no tile.
  const bool param_in_place = entry.param_dtype == kDtypeOf<opmath_t>;
  const bool grad_in_place = entry.grad_dtype == kDtypeOf<opmath_t>;
  const bool buffer_in_place = h.has_momentum && entry.state_dtype[0] == kDtypeOf<opmath_t>;

  while (walker.next()) {
    const int64_t at = walker.at();
    const int64_t n = walker.n();
    char* const p = param_memory.load();
    char* const g = grad_memory.load();
    char* b = nullptr;
    if (h.has_momentum && !has_scale) {
      b = entry.is_first_step ? buffer_memory.place() : buffer_memory.load();
    }

    if (has_master) {
      load_master(*low, p, at, n, param_tile);
    } else if (!param_in_place) {
      load_tile(entry.param_dtype, p, n, param_tile);
    }
    if (!grad_in_place) load_tile(entry.grad_dtype, g, n, grad_tile);
    if (h.has_momentum && !entry.is_first_step) {
      if (has_scale) {
        load_block(entry.state_dtype[0], entry.state[0], low->scale[0], at, n, buffer_tile);
      } else if (!buffer_in_place) {
        load_tile(entry.state_dtype[0], b, n, buffer_tile);
      }
    }

    void* const params = param_in_place ? static_cast<void*>(p) : param_tile;
    void* const grads = grad_in_place ? static_cast<void*>(g) : grad_tile;
    void* const buffers = buffer_in_place ? static_cast<void*>(b) : buffer_tile;
    update(params, grads, buffers, n, h);

    if (random_buffer || random_param) fill_random(random, key, at, n);
    if (random_buffer) exchange_bytes(random, n, random_for_buffer);
    if (has_scale) {
      store_block(entry.state_dtype[0], buffer_tile, random_buffer ? &random_for_buffer : nullptr,
                  at, n, entry.state[0], low->scale[0]);
    } else if (random_buffer) {
      store_tile_stochastic(entry.state_dtype[0], buffer_tile, random_for_buffer, n, b);
    } else if (h.has_momentum && !buffer_in_place) {
      store_tile(entry.state_dtype[0], buffer_tile, n, b);
    }
    if (b != nullptr) buffer_memory.store();
    if (has_master) {
      store_master(*low, param_tile, at, n, p);
    } else if (random_param) {
      store_tile_stochastic(entry.param_dtype, param_tile, random, n, p);
    } else if (!param_in_place) {
      store_tile(entry.param_dtype, param_tile, n, p);
    }
    param_memory.store();
  }
}

// ---- one tensor, then a range of the table ------------------------------------------------------

void update_part(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Sgd>& h,
                 uint32_t rounding_step) {
  const bool one_dtype = entry.param_dtype == entry.grad_dtype &&
                         (!h.has_momentum || entry.param_dtype == entry.state_dtype[0]);
  if (entry.layout == nullptr && entry.low_precision == nullptr && one_dtype &&
      entry.param_dtype != Dtype::kFloat16) {
    const int64_t offset = begin * itemsize(entry.param_dtype);
    char* const p = static_cast<char*>(entry.param) + offset;
    const char* const g = static_cast<const char*>(entry.grad) + offset;
    char* const b = h.has_momentum ? static_cast<char*>(entry.state[0]) + offset : nullptr;
    const FlatFn update =
        entry.param_dtype == Dtype::kFloat32   ? choose_flat<float>(h, entry.is_first_step)
        : entry.param_dtype == Dtype::kFloat64 ? choose_flat<double>(h, entry.is_first_step)
                                               : choose_flat<BFloat16>(h, entry.is_first_step);
    return update(p, g, b, end - begin, h);
  }
  const bool needs_double = entry.param_dtype == Dtype::kFloat64 ||
                            entry.grad_dtype == Dtype::kFloat64 ||
                            (h.has_momentum && entry.state_dtype[0] == Dtype::kFloat64);
  if (needs_double) {
    update_tiled<double>(entry, begin, end, h, rounding_step);
  } else {
    update_tiled<float>(entry, begin, end, h, rounding_step);
  }
}

// Two threads that share a tensor meet at a multiple of this many elements, so that no cache line
// and no block of 8-bit values has two writers.
constexpr int64_t kSplitAlignment = kTile;

// Calls update(entry, first element, past the last, its group) for what lies in elements
// [begin, end) of the table's concatenated range, with both ends moved down to a multiple of
// kSplitAlignment inside the tensor they fall into; neighbouring ranges therefore still cover
// everything once.
template <typename Update>
void for_each_part(const StepTable<Sgd>& table, int64_t begin, int64_t end, const Update& update) {
  if (begin >= end) return;
  const int64_t first = locate_entry(table, begin);
  for (int64_t i = first; i < table.num_entries && table.first_element[i] < end; ++i) {
    const TensorEntry& entry = table.entries[i];
    const int64_t from = begin - table.first_element[i];
    const int64_t to = end - table.first_element[i];
    const int64_t first_index = from <= 0 ? 0 : from / kSplitAlignment * kSplitAlignment;
    const int64_t last_index =
        to >= entry.numel ? entry.numel : to / kSplitAlignment * kSplitAlignment;
    if (first_index < last_index) update(entry, first_index, last_index, table.groups[entry.group]);
  }
}

// The averages of elements [begin, end), whose parameters were just updated.
template <typename scalar_t>
void average_flat(const void* param_ptr, void* average_ptr, int64_t n, double weight_of_new) {
  using opmath_t = typename OpMath<scalar_t>::type;
  const auto weight = static_cast<opmath_t>(weight_of_new);
  const auto* const param = static_cast<const scalar_t*>(param_ptr);
  auto* const average = static_cast<scalar_t*>(average_ptr);
  if (is_copy(weight)) {
    memcpy(average, param, static_cast<size_t>(n) * sizeof(scalar_t));
    return;
  }
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const opmath_t old_average = load(average[i]);
    store(average[i], interpolate<FmaPolicy>(weight, old_average, opmath_t{load(param[i])}));
  }
}

void average_part(const TensorEntry& entry, int64_t begin, int64_t end, double weight) {
  const int64_t offset = begin * itemsize(entry.param_dtype);
  const char* const p = static_cast<const char*>(entry.param) + offset;
  char* const a = static_cast<char*>(entry.average) + offset;
  const int64_t n = end - begin;
  switch (entry.param_dtype) {
    case Dtype::kFloat32:
      return average_flat<float>(p, a, n, weight);
    case Dtype::kFloat64:
      return average_flat<double>(p, a, n, weight);
    case Dtype::kBFloat16:
      return average_flat<BFloat16>(p, a, n, weight);
    default:
      break;
  }
  alignas(64) float param[kTile];
  alignas(64) float average[kTile];
  const int64_t size = itemsize(entry.param_dtype);
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = n - i < kTile ? n - i : kTile;
    load_tile(entry.param_dtype, p + i * size, count, param);
    load_tile(entry.param_dtype, a + i * size, count, average);
    average_flat<float>(param, average, count, weight);
    store_tile(entry.param_dtype, average, count, a + i * size);
  }
}

// Elements after which the averages are brought up to date, while the parameters are in the cache.
constexpr int64_t kAverageAfter = 2048;
static_assert(kAverageAfter % kTile == 0);

void run_step(const StepTable<Sgd>& table, int64_t begin, int64_t end) {
  for_each_part(
      table, begin, end,
      [&table](const TensorEntry& entry, int64_t from, int64_t to, const Hyperparams<Sgd>& h) {
        const uint32_t step = table.rounding_step;
        if (entry.average == nullptr) return update_part(entry, from, to, h, step);
        for (int64_t at = from; at < to; at += kAverageAfter) {
          const int64_t stop = to - at < kAverageAfter ? to : at + kAverageAfter;
          update_part(entry, at, stop, h, step);
          average_part(entry, at, stop, table.average_weight);
        }
      });
}
