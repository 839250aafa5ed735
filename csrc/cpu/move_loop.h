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
  Walker<Sgd> walker(entry, begin, end, /*in_order=*/false);
  TensorTile<Walker<Sgd>> params(walker, kParam, entry.param, entry.param_dtype);
  TensorTile<Walker<Sgd>> lookaheads(walker, kGrad, entry.grad, entry.grad_dtype);
  TensorTile<Walker<Sgd>> buffers(walker, kState, entry.state[0], entry.state_dtype[0]);
  const opmath_t distance = coefficients<opmath_t>(h).momentum;
  while (walker.next()) {
    const int64_t n = walker.n();
    char* const p = params.load();
    load_tile(entry.param_dtype, p, n, param);
    load_tile(entry.state_dtype[0], buffers.load(), n, buffer);
    if constexpr (kBack) {
      load_tile(entry.grad_dtype, lookaheads.load(), n, lookahead);
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
      store_tile(entry.grad_dtype, param, n, lookaheads.place());
      lookaheads.store();
      for (int64_t i = 0; i < n; ++i) {
        param[i] = iterate_of<FmaPolicy>(distance, param[i], buffer[i]);
      }
    }
    store_tile(entry.param_dtype, param, n, p);
    params.store();
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
