// How many of the last step's updates storage has lost. Included like loop.h, after it.

// What is found of values that are stored, rounded to nearest.
template <typename opmath_t>
void as_stored(const TensorEntry& entry, const opmath_t* values, int64_t n, opmath_t* found) {
  alignas(64) char stored[kTile * sizeof(double)];
  const Master kind = entry.low_precision->master_kind;
  if (kind == Master::kByteRemainder) {
    MOMENTUM_EXT_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < n; ++i) found[i] = rounded_to_24_bits(static_cast<float>(values[i]));
  } else {
    const Dtype dtype = kind == Master::kNone ? entry.param_dtype : Dtype::kFloat32;
    store_tile(dtype, values, n, stored);
    load_tile(dtype, stored, n, found);
  }
}

// The entry's average is the place of its UpdateCounts. Writes nothing else.
template <typename opmath_t>
void count_tiled(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Sgd>& h) {
  alignas(64) opmath_t moved[kTile];
  alignas(64) opmath_t found[kTile];
  alignas(64) uint8_t is_update[kTile];
  const LowPrecision& low = *entry.low_precision;
  Walker<Sgd> walker(entry, begin, end, /*in_order=*/true);
  OperandTile<opmath_t, Walker<Sgd>> param, grad, state;
  param.start(walker, kParam, entry.param, entry.param_dtype);
  param.keep_master(low.master_kind, low.master);
  grad.start(walker, kGrad, entry.grad, entry.grad_dtype);
  if (h.has_momentum) state.start(walker, kState, entry.state[0], entry.state_dtype[0]);
  if (h.has_momentum) state.keep_scales(low.scale[0]);
  Sgd::Options options = h;
  Sgd::Coefficients<opmath_t> c = coefficients<opmath_t>(h);
  Sgd::merge(options, c);
  UpdateCounts counts;
  while (walker.next()) {
    const int64_t n = walker.n();
    const auto* const p = static_cast<const opmath_t*>(param.load());
    const auto* const g = static_cast<const opmath_t*>(grad.load());
    const auto* const s = h.has_momentum ? static_cast<const opmath_t*>(state.load()) : p;
    Sgd::visit_variant<Sgd::kMergedVariants>(Sgd::variant_of(options, false), [&](auto variant) {
      for (int64_t i = 0; i < n; ++i) {
        moved[i] = p[i];
        is_update[i] = Sgd::update_again<FmaPolicy>(variant, c, g[i], moved[i], s[i]);
      }
    });
    as_stored(entry, moved, n, found);
    for (int64_t i = 0; i < n; ++i) {
      counts.add(is_update[i] != 0, found[i] == p[i], moved[i] == p[i]);
    }
  }
  static_cast<UpdateCounts*>(entry.average)->add_from_thread(counts);
}

void run_count(const StepTable<Sgd>& table, int64_t begin, int64_t end) {
  const auto count = [](const TensorEntry& entry, int64_t from, int64_t to,
                        const Hyperparams<Sgd>& h) {
    const bool in_double = entry.param_dtype == Dtype::kFloat64 ||
                           entry.grad_dtype == Dtype::kFloat64 ||
                           (h.has_momentum && entry.state_dtype[0] == Dtype::kFloat64);
    in_double ? count_tiled<double>(entry, from, to, h) : count_tiled<float>(entry, from, to, h);
  };
  for_each_part(table, begin, end, count);
}
