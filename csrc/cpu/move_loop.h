// Between Nesterov's two points. Included like loop.h, after it.

// The entry's grad is a tensor that keeps the look-ahead point while the parameter is the iterate;
// the group's momentum is the distance.
template <typename opmath_t, bool kBack>
void move_tiled(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams& h) {
  alignas(64) opmath_t param[kTile];
  alignas(64) opmath_t lookahead[kTile];
  alignas(64) opmath_t buffer[kTile];
  alignas(64) opmath_t iterate[kTile];
  alignas(64) char rounded[kTile * sizeof(double)];
  int64_t offsets[3][kTile];
  const bool strided = entry.layout != nullptr;
  const StridedLayout no_layout = {nullptr, 0};
  TileWalker walker(strided ? *entry.layout : no_layout, begin);
  const opmath_t distance = coefficients<opmath_t>(h).momentum;
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    if (strided) walker.next_tile(n, offsets[0], offsets[1], offsets[2]);
    const auto tile_base = [&](const void* tensor, Dtype dtype) {
      return static_cast<char*>(const_cast<void*>(tensor)) + (strided ? 0 : at * itemsize(dtype));
    };
    char* const p = tile_base(entry.param, entry.param_dtype);
    char* const y = tile_base(entry.grad, entry.grad_dtype);
    const int64_t* const p_offsets = strided ? offsets[0] : nullptr;
    const int64_t* const y_offsets = strided ? offsets[1] : nullptr;
    gather(entry.param_dtype, p, p_offsets, n, param);
    gather(entry.buffer_dtype, tile_base(entry.momentum_buffer, entry.buffer_dtype),
           strided ? offsets[2] : nullptr, n, buffer);
    if constexpr (kBack) {
      gather(entry.grad_dtype, y, y_offsets, n, lookahead);
      for (int64_t i = 0; i < n; ++i) {
        iterate[i] = iterate_of<FmaPolicy>(distance, lookahead[i], buffer[i]);
      }
      scatter(entry.param_dtype, iterate, nullptr, n, rounded);
      gather(entry.param_dtype, rounded, nullptr, n, iterate);
      // Where the parameter is still what it was moved to, back to the very bits that it came from;
      // what was changed in between moves by the same distance.
      for (int64_t i = 0; i < n; ++i) {
        const bool untouched =
            iterate[i] == param[i] || (iterate[i] != iterate[i] && param[i] != param[i]);
        param[i] =
            untouched ? lookahead[i] : lookahead_of<FmaPolicy>(distance, param[i], buffer[i]);
      }
    } else {
      scatter(entry.grad_dtype, param, y_offsets, n, y);
      for (int64_t i = 0; i < n; ++i) {
        param[i] = iterate_of<FmaPolicy>(distance, param[i], buffer[i]);
      }
    }
    scatter(entry.param_dtype, param, p_offsets, n, p);
  }
}

template <bool kBack>
void run_move(const TensorTable& table, int64_t begin, int64_t end) {
  for_each_part(
      table, begin, end,
      [](const TensorEntry& entry, int64_t from, int64_t to, const Hyperparams& h) {
        if (entry.param_dtype == Dtype::kFloat64 || entry.buffer_dtype == Dtype::kFloat64) {
          move_tiled<double, kBack>(entry, from, to, h);
        } else {
          move_tiled<float, kBack>(entry, from, to, h);
        }
      });
}
