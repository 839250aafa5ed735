// Between Nesterov's two points. Included like loop.h, after it.

// The entry's grad is a tensor that keeps the look-ahead point while the parameter is the iterate;
// the group's momentum is the distance.
template <typename opmath_t, bool kBack>
void move_tiled(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Sgd>& h) {
  Walker<Sgd> walker(entry, begin, end, /*in_order=*/false);
  OperandTile<opmath_t, Walker<Sgd>> param_tile, lookahead_tile, buffer_tile;
  param_tile.start(walker, kParam, entry.param, entry.param_dtype);
  lookahead_tile.start(walker, kGrad, entry.grad, entry.grad_dtype);
  buffer_tile.start(walker, kState, entry.state[0], entry.state_dtype[0]);
  alignas(64) opmath_t iterate[kTile];
  alignas(64) char rounded[kTile * sizeof(double)];
  const RandomTile no_random{};
  const opmath_t distance = coefficients<opmath_t>(h).momentum;
  while (walker.next()) {
    const int64_t n = walker.n();
    auto* const param = static_cast<opmath_t*>(param_tile.load());
    const auto* const buffer = static_cast<const opmath_t*>(buffer_tile.load());
    if constexpr (kBack) {
      const auto* const lookahead = static_cast<const opmath_t*>(lookahead_tile.load());
      for (int64_t i = 0; i < n; ++i) {
        iterate[i] = iterate_of<FmaPolicy>(distance, lookahead[i], buffer[i]);
      }
      store_tile(entry.param_dtype, iterate, n, rounded);
      load_tile(entry.param_dtype, rounded, n, iterate);
      for (int64_t i = 0; i < n; ++i) {
        param[i] =
            return_to_lookahead<FmaPolicy>(distance, lookahead[i], iterate[i], param[i], buffer[i]);
      }
    } else {
      memcpy(lookahead_tile.place(), param, static_cast<size_t>(n) * sizeof(opmath_t));
      lookahead_tile.store(no_random);
      for (int64_t i = 0; i < n; ++i) {
        param[i] = iterate_of<FmaPolicy>(distance, param[i], buffer[i]);
      }
    }
    param_tile.store(no_random);
  }
}

template <bool kBack>
void run_move(const StepTable<Sgd>& table, int64_t begin, int64_t end) {
  for_each_part(
      table, begin, end,
      [](const TensorEntry& entry, int64_t from, int64_t to, const Hyperparams<Sgd>& h) {
        if (entry.param_dtype == Dtype::kFloat64 || entry.state_dtype[0] == Dtype::kFloat64) {
          move_tiled<double, kBack>(entry, from, to, h);
        } else {
          move_tiled<float, kBack>(entry, from, to, h);
        }
      });
}
