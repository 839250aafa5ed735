// Between Nesterov's two points. Included like loop.h, after it.

// The entry's grad is a tensor that keeps the look-ahead point while the parameter is the iterate;
// the group's momentum is the distance.
template <typename opmath_t, bool kBack>
void move_tiled(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams<Sgd>& h) {
  alignas(64) opmath_t param[kTile];
  alignas(64) opmath_t lookahead[kTile];
  alignas(64) opmath_t buffer[kTile];
  alignas(64) opmath_t iterate[kTile];
  alignas(64) char rounded[kTile * sizeof(double)];
  TileWalker walker(entry, begin, end, /*in_order=*/false);
  TensorTile<false> param_memory(walker, kParam, entry.param, entry.param_dtype);
  TensorTile<false> lookahead_memory(walker, kGrad, entry.grad, entry.grad_dtype);
  TensorTile<false> buffer_memory(walker, kState, entry.state[0], entry.state_dtype[0]);
  const opmath_t distance = coefficients<opmath_t>(h).momentum;
  while (walker.next()) {
    const int64_t n = walker.n();
    char* const p = param_memory.load();
    load_tile(entry.param_dtype, p, n, param);
    load_tile(entry.state_dtype[0], buffer_memory.load(), n, buffer);
    if constexpr (kBack) {
      load_tile(entry.grad_dtype, lookahead_memory.load(), n, lookahead);
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
      store_tile(entry.grad_dtype, param, n, lookahead_memory.place());
      lookahead_memory.store();
      for (int64_t i = 0; i < n; ++i) {
        param[i] = iterate_of<FmaPolicy>(distance, param[i], buffer[i]);
      }
    }
    store_tile(entry.param_dtype, param, n, p);
    param_memory.store();
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
