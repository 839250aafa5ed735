// The CPU loop, compiled once per instruction set: every cpu/isa_*.cpp includes this file inside a
// namespace of its own, after it has chosen the target, FmaPolicy and the conversion of 16-bit
// floats. Nothing here may instantiate a function of the standard library: the linker would keep
// one copy for all instruction sets.
//
// Two ways through a tensor:
//   flat   one dtype, one dense layout: plain loops that the compiler vectorises;
//   tiled  everything else (strided, mixed dtypes, fp16, low-precision state): load a small tile
//          into opmath_t, update it as if it were a flat tensor, store it.

// ---- flat ---------------------------------------------------------------------------------------

template <typename Rule, typename Variant, typename scalar_t>
void update_flat(const OperandPointers& at, int64_t begin, int64_t end,
                 const Hyperparams<Rule>& hyperparams) {
  using opmath_t = typename OpMath<scalar_t>::type;
  const auto c = coefficients<opmath_t>(hyperparams);
  auto* const param = static_cast<scalar_t*>(at.param) + begin;
  const auto* const grad = static_cast<const scalar_t*>(at.grad) + begin;
  scalar_t* state[Rule::kMaxStates];
  repeat<Variant::kStates>(
      [&]<int k>() { state[k] = static_cast<scalar_t*>(at.state[k]) + begin; });
  const int64_t n = end - begin;
  // Pointers are equal or disjoint (the binding sees to it), so iterations do not depend on each
  // other.
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    opmath_t p = load(param[i]);
    opmath_t s[Rule::kMaxStates];
    repeat<Variant::kReads>([&]<int k>() { s[k] = load(state[k][i]); });
    Rule::template update<FmaPolicy>(Variant(), c, opmath_t{load(grad[i])}, p, s);
    repeat<Variant::kStates>([&]<int k>() { store(state[k][i], s[k]); });
    store(param[i], p);
  }
}

// The instances of update_flat(), of which one is chosen for each tensor. A table, because a switch
// would jump once more.
template <typename Rule>
using FlatFn = void (*)(const OperandPointers& at, int64_t begin, int64_t end,
                        const Hyperparams<Rule>& hyperparams);

template <typename Rule, typename scalar_t>
struct FlatFns {
  FlatFn<Rule> of_variant[Rule::kVariants];

  constexpr FlatFns() : of_variant() {
    for (int number = 0; number < Rule::kVariants; ++number) {
      of_variant[number] = Rule::visit_variant(number, [](auto variant) -> FlatFn<Rule> {
        return update_flat<Rule, decltype(variant), scalar_t>;
      });
    }
  }
};
template <typename Rule, typename scalar_t>
constexpr FlatFns<Rule, scalar_t> kFlatFns;

template <typename Rule, typename scalar_t>
MOMENTUM_EXT_INLINE FlatFn<Rule> choose_flat(const Hyperparams<Rule>& h, bool is_first_step) {
  return kFlatFns<Rule, scalar_t>.of_variant[Rule::variant_of(h, is_first_step)];
}

// fp16 is computed in tiles, which have the processor's own conversions.
template <typename scalar_t>
constexpr bool kIsFlat = !std::is_same_v<scalar_t, Float16>;

// ---- tiled --------------------------------------------------------------------------------------

template <typename Rule, typename opmath_t>
void update_tiled(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Rule>& h,
                  uint32_t rounding_step) {
  const LowPrecision* const low = entry.low_precision;
  const int num_states = Rule::num_states(h);
  const int num_reads = Rule::num_reads(h, entry.is_first_step);
  Walker<Rule> walker(entry, begin, end, /*in_order=*/low != nullptr);
  OperandTile<opmath_t, Walker<Rule>> param, states[Rule::kMaxStates];
  OperandTile<opmath_t, Walker<Rule>, /*kAhead=*/true> grad;
  param.start(walker, kParam, entry.param, entry.param_dtype);
  grad.start(walker, kGrad, entry.grad, entry.grad_dtype);
  if (low != nullptr) param.keep_master(low->master_kind, low->master);
  repeat<Rule::kMaxStates>([&]<int k>() {
    if (k >= num_states) return;
    states[k].start(walker, kState + k, entry.state[k], entry.state_dtype[k]);
    if (low != nullptr) states[k].keep_scales(low->scale[k]);
  });
  bool draws = false;
  RandomKey key{};
  if (low != nullptr && (h.stochastic_rounding || h.rounds_masters)) {
    key = {h.rounding_seed, low->param_index, rounding_step};
    draws = param.round_at_random(h.stochastic_rounding, h.rounds_masters);
    for (int k = 0; k < num_states; ++k) {
      draws = states[k].round_at_random(h.stochastic_rounding, false) || draws;
    }
  }
  const FlatFn<Rule> update = choose_flat<Rule, opmath_t>(h, entry.is_first_step);
  RandomTile random, random_of_state;
  while (walker.next()) {
    OperandPointers tile;
    tile.param = param.load();
    tile.grad = grad.load();
    repeat<Rule::kMaxStates>([&]<int k>() {
      if (k < num_states) tile.state[k] = k < num_reads ? states[k].load() : states[k].place();
    });
    update(tile, 0, walker.n(), h);
    if (draws) fill_random(random, key, low->place, walker.at(), walker.n());
    repeat<Rule::kMaxStates>([&]<int k>() {
      if (k >= num_states) return;
      if (states[k].is_random()) rotate_random<k>(random, walker.n(), random_of_state);
      states[k].store(random_of_state);
    });
    param.store(random);
  }
}

// ---- one tensor, then a range of the table ------------------------------------------------------

template <typename Rule>
void update_part(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Rule>& h,
                 uint32_t rounding_step) {
  const int num_states = Rule::num_states(h);
  bool one_dtype = entry.param_dtype == entry.grad_dtype;
  repeat<Rule::kMaxStates>([&]<int k>() {
    one_dtype = one_dtype && (k >= num_states || entry.param_dtype == entry.state_dtype[k]);
  });
  if (entry.layout == nullptr && entry.low_precision == nullptr && one_dtype &&
      entry.param_dtype != Dtype::kFloat16) {
    return visit_dtype<double>(entry.param_dtype, [&](auto type) {
      using scalar_t = decltype(type);
      if constexpr (kIsFlat<scalar_t>) {
        choose_flat<Rule, scalar_t>(h, entry.is_first_step)(entry, begin, end, h);
      }
    });
  }
  bool in_double = entry.param_dtype == Dtype::kFloat64 || entry.grad_dtype == Dtype::kFloat64;
  for (int k = 0; k < num_states; ++k) {
    in_double = in_double || entry.state_dtype[k] == Dtype::kFloat64;
  }
  const auto update = in_double ? update_tiled<Rule, double> : update_tiled<Rule, float>;
  update(entry, begin, end, h, rounding_step);
}

// Two threads that share a tensor meet at a multiple of this many elements, so that no cache line
// and no block of 8-bit values has two writers.
constexpr int64_t kSplitAlignment = kTile;

// Calls update(entry, first element, past the last, its group) for what lies in elements
// [begin, end) of the table's concatenated range, with both ends moved down to a multiple of
// kSplitAlignment inside the tensor they fall into; neighbouring ranges therefore still cover
// everything once.
template <typename Rule, typename Update>
void for_each_part(const StepTable<Rule>& table, int64_t begin, int64_t end, const Update& update) {
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

void average_in_tiles(const Float16* param, Float16* average, int64_t n, double weight) {
  alignas(64) float param_tile[kTile];
  alignas(64) float average_tile[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = n - i < kTile ? n - i : kTile;
    half_to_float(param + i, count, param_tile);
    half_to_float(average + i, count, average_tile);
    average_flat<float>(param_tile, average_tile, count, weight);
    float_to_half(average_tile, count, average + i);
  }
}

void average_part(const TensorEntry& entry, int64_t begin, int64_t end, double weight) {
  visit_dtype<double>(entry.param_dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const auto* const param = static_cast<const scalar_t*>(entry.param) + begin;
    auto* const average = static_cast<scalar_t*>(entry.average) + begin;
    if constexpr (kIsFlat<scalar_t>) {
      average_flat<scalar_t>(param, average, end - begin, weight);
    } else {
      average_in_tiles(param, average, end - begin, weight);
    }
  });
}

// Elements after which the averages are brought up to date, while the parameters are in the cache.
constexpr int64_t kAverageAfter = 2048;
static_assert(kAverageAfter % kTile == 0);

template <typename Rule>
void run_step(const StepTable<Rule>& table, int64_t begin, int64_t end) {
  const auto update = [&table](const TensorEntry& entry, int64_t from, int64_t to,
                               const Hyperparams<Rule>& h) {
    const uint32_t step = table.rounding_step;
    if (entry.average == nullptr) return update_part(entry, from, to, h, step);
    for (int64_t at = from; at < to; at += kAverageAfter) {
      const int64_t stop = to - at < kAverageAfter ? to : at + kAverageAfter;
      update_part(entry, at, stop, h, step);
      average_part(entry, at, stop, table.average_weight);
    }
  };
  for_each_part(table, begin, end, update);
}
