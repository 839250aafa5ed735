// The CPU loop, compiled once per instruction set: every cpu/isa_*.cpp includes this file inside a
// namespace of its own, after it has chosen the target, FmaPolicy and the conversion of 16-bit
// floats. Nothing here may instantiate a template of the standard library: the linker would keep
// one copy for all instruction sets.
//
// Two ways through a tensor:
//   flat   one dtype, one dense layout: plain loops that the compiler vectorises;
//   tiled  everything else (strided, mixed dtypes, fp16): gather a small tile into opmath_t, update
//   it, scatter it.

constexpr int64_t kTile =
    256;  // elements; three tiles of double are 6 KiB of stack, well inside L1

// ---- flat ---------------------------------------------------------------------------------------

template <typename scalar_t, WeightDecay kWeightDecay, Momentum kMomentum, bool kNesterov>
void update_flat(void* param_ptr, const void* grad_ptr, void* buffer_ptr, int64_t n,
                 const Hyperparams& hyperparams) {
  using opmath_t = typename OpMath<scalar_t>::type;
  const Coefficients<opmath_t> c = coefficients<opmath_t>(hyperparams);
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
    update_element<FmaPolicy, kWeightDecay, kMomentum, kNesterov>(c, opmath_t{load(grad[i])}, p, b);
    if constexpr (kMomentum != Momentum::kNone) store(buffer[i], b);
    store(param[i], p);
  }
}

// ---- tiled --------------------------------------------------------------------------------------

// Element i of a tile is base[offsets[i]], or base[i] where offsets is nullptr.
template <typename scalar_t, typename opmath_t>
void gather_as(const void* base, const int64_t* offsets, int64_t n, opmath_t* tile) {
  const auto* source = static_cast<const scalar_t*>(base);
  if (offsets == nullptr) {
    for (int64_t i = 0; i < n; ++i) tile[i] = static_cast<opmath_t>(load(source[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) tile[i] = static_cast<opmath_t>(load(source[offsets[i]]));
  }
}

template <typename scalar_t, typename opmath_t>
void scatter_as(const opmath_t* tile, const int64_t* offsets, int64_t n, void* base) {
  using stored_t = typename OpMath<scalar_t>::type;
  auto* target = static_cast<scalar_t*>(base);
  if (offsets == nullptr) {
    for (int64_t i = 0; i < n; ++i) store(target[i], static_cast<stored_t>(tile[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) store(target[offsets[i]], static_cast<stored_t>(tile[i]));
  }
}

template <typename opmath_t>
void gather(Dtype dtype, const void* base, const int64_t* offsets, int64_t n, opmath_t* tile) {
  switch (dtype) {
    case Dtype::kFloat32:
      return gather_as<float>(base, offsets, n, tile);
    case Dtype::kFloat64:
      return gather_as<double>(base, offsets, n, tile);
    case Dtype::kBFloat16:
      return gather_as<BFloat16>(base, offsets, n, tile);
    case Dtype::kFloat16:
      if constexpr (sizeof(opmath_t) == sizeof(float)) {
        if (offsets == nullptr) return half_to_float(static_cast<const Float16*>(base), n, tile);
      }
      return gather_as<Float16>(base, offsets, n, tile);
  }
}

template <typename opmath_t>
void scatter(Dtype dtype, const opmath_t* tile, const int64_t* offsets, int64_t n, void* base) {
  switch (dtype) {
    case Dtype::kFloat32:
      return scatter_as<float>(tile, offsets, n, base);
    case Dtype::kFloat64:
      return scatter_as<double>(tile, offsets, n, base);
    case Dtype::kBFloat16:
      return scatter_as<BFloat16>(tile, offsets, n, base);
    case Dtype::kFloat16:
      if constexpr (sizeof(opmath_t) == sizeof(float)) {
        if (offsets == nullptr) return float_to_half(tile, n, static_cast<Float16*>(base));
      }
      return scatter_as<Float16>(tile, offsets, n, base);
  }
}

template <typename opmath_t, WeightDecay kWeightDecay, Momentum kMomentum, bool kNesterov>
void update_tile(opmath_t* param, const opmath_t* grad, opmath_t* buffer, int64_t n,
                 const Coefficients<opmath_t>& coefs) {
  const Coefficients<opmath_t> c = coefs;
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    opmath_t p = param[i];
    opmath_t b = buffer[i];
    update_element<FmaPolicy, kWeightDecay, kMomentum, kNesterov>(c, grad[i], p, b);
    buffer[i] = b;
    param[i] = p;
  }
}

// Walks a strided layout in order and writes down where each element of a tile lies in the three
// tensors.
struct TileWalker {
  static constexpr int kMaxDims = 65;  // torch's 64 and one for the real view of a complex tensor

  TileWalker(const StridedLayout& layout, int64_t position) : layout_(layout) {
    for (int d = layout.ndim - 1; d >= 0; --d) {
      const StridedDim& dim = layout.dims[d];
      index_[d] = position % dim.size;
      position /= dim.size;
      param_ += index_[d] * dim.param_stride;
      grad_ += index_[d] * dim.grad_stride;
      buffer_ += index_[d] * dim.buffer_stride;
    }
  }

  void next_tile(int64_t n, int64_t* param, int64_t* grad, int64_t* buffer) {
    const int inner = layout_.ndim - 1;
    const StridedDim dim = layout_.dims[inner];
    for (int64_t done = 0; done < n;) {
      const int64_t left = dim.size - index_[inner];
      const int64_t run = left < n - done ? left : n - done;
      for (int64_t i = 0; i < run; ++i) {
        param[done + i] = param_ + i * dim.param_stride;
        grad[done + i] = grad_ + i * dim.grad_stride;
        buffer[done + i] = buffer_ + i * dim.buffer_stride;
      }
      done += run;
      advance(inner, run);
      for (int d = inner; index_[d] == layout_.dims[d].size && d > 0; --d) {
        advance(d, -index_[d]);
        advance(d - 1, 1);
      }
    }
  }

 private:
  void advance(int d, int64_t by) {
    const StridedDim& dim = layout_.dims[d];
    index_[d] += by;
    param_ += by * dim.param_stride;
    grad_ += by * dim.grad_stride;
    buffer_ += by * dim.buffer_stride;
  }

  const StridedLayout& layout_;
  int64_t index_[kMaxDims];
  int64_t param_ = 0;
  int64_t grad_ = 0;
  int64_t buffer_ = 0;
};

template <typename opmath_t, WeightDecay kWeightDecay, Momentum kMomentum, bool kNesterov>
void update_tiled(const TensorEntry& entry, int64_t begin, int64_t end,
                  const Hyperparams& hyperparams) {
  alignas(64) opmath_t param[kTile];
  alignas(64) opmath_t grad[kTile];
  alignas(64) opmath_t buffer[kTile] = {};  // zeros where no buffer is read
  int64_t offsets[3][kTile];
  const bool strided = entry.layout != nullptr;
  const StridedLayout no_layout = {nullptr, 0};
  TileWalker walker(strided ? *entry.layout : no_layout, begin);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    if (strided) walker.next_tile(n, offsets[0], offsets[1], offsets[2]);
    // The base of a contiguous tile moves along; a strided tile's offsets count from the tensor's
    // first element.
    const auto tile_base = [&](const void* tensor, Dtype dtype) {
      return static_cast<const char*>(tensor) + (strided ? 0 : at * itemsize(dtype));
    };
    char* const p = const_cast<char*>(tile_base(entry.param, entry.param_dtype));
    char* b = nullptr;
    if constexpr (kMomentum != Momentum::kNone) {
      b = const_cast<char*>(tile_base(entry.momentum_buffer, entry.buffer_dtype));
    }
    const int64_t* const p_offsets = strided ? offsets[0] : nullptr;
    const int64_t* const g_offsets = strided ? offsets[1] : nullptr;
    const int64_t* const b_offsets = strided ? offsets[2] : nullptr;

    gather(entry.param_dtype, p, p_offsets, n, param);
    gather(entry.grad_dtype, tile_base(entry.grad, entry.grad_dtype), g_offsets, n, grad);
    if constexpr (kMomentum == Momentum::kLaterStep) {
      gather(entry.buffer_dtype, b, b_offsets, n, buffer);
    }
    update_tile<opmath_t, kWeightDecay, kMomentum, kNesterov>(param, grad, buffer, n,
                                                              coefficients<opmath_t>(hyperparams));
    if constexpr (kMomentum != Momentum::kNone) {
      scatter(entry.buffer_dtype, buffer, b_offsets, n, b);
    }
    scatter(entry.param_dtype, param, p_offsets, n, p);
  }
}

// ---- one tensor, then a range of the table ------------------------------------------------------

template <WeightDecay kWeightDecay, Momentum kMomentum, bool kNesterov>
void update_tensor(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams& h) {
  const bool has_buffer = kMomentum != Momentum::kNone;
  const bool one_dtype = entry.param_dtype == entry.grad_dtype &&
                         (!has_buffer || entry.param_dtype == entry.buffer_dtype);
  if (entry.layout == nullptr && one_dtype && entry.param_dtype != Dtype::kFloat16) {
    const int64_t offset = begin * itemsize(entry.param_dtype);
    char* const p = static_cast<char*>(entry.param) + offset;
    const char* const g = static_cast<const char*>(entry.grad) + offset;
    char* const b = has_buffer ? static_cast<char*>(entry.momentum_buffer) + offset : nullptr;
    const int64_t n = end - begin;
    switch (entry.param_dtype) {
      case Dtype::kFloat32:
        return update_flat<float, kWeightDecay, kMomentum, kNesterov>(p, g, b, n, h);
      case Dtype::kFloat64:
        return update_flat<double, kWeightDecay, kMomentum, kNesterov>(p, g, b, n, h);
      default:
        return update_flat<BFloat16, kWeightDecay, kMomentum, kNesterov>(p, g, b, n, h);
    }
  }
  const bool needs_double = entry.param_dtype == Dtype::kFloat64 ||
                            entry.grad_dtype == Dtype::kFloat64 ||
                            (has_buffer && entry.buffer_dtype == Dtype::kFloat64);
  if (needs_double) {
    update_tiled<double, kWeightDecay, kMomentum, kNesterov>(entry, begin, end, h);
  } else {
    update_tiled<float, kWeightDecay, kMomentum, kNesterov>(entry, begin, end, h);
  }
}

template <WeightDecay kWeightDecay>
void update_tensor(const TensorEntry& entry, int64_t begin, int64_t end, const Hyperparams& h) {
  constexpr Momentum kFirst = Momentum::kFirstStep;
  constexpr Momentum kLater = Momentum::kLaterStep;
  if (!h.has_momentum) {
    update_tensor<kWeightDecay, Momentum::kNone, false>(entry, begin, end, h);
  } else if (entry.is_first_step) {
    h.nesterov ? update_tensor<kWeightDecay, kFirst, true>(entry, begin, end, h)
               : update_tensor<kWeightDecay, kFirst, false>(entry, begin, end, h);
  } else {
    h.nesterov ? update_tensor<kWeightDecay, kLater, true>(entry, begin, end, h)
               : update_tensor<kWeightDecay, kLater, false>(entry, begin, end, h);
  }
}

// Two threads that share a tensor meet at a multiple of this many elements, so that no cache line
// has two writers.
constexpr int64_t kSplitAlignment = 64;

// Calls update(entry, first element, past the last, its group) for what lies in elements
// [begin, end) of the table's concatenated range, with both ends moved down to a multiple of
// kSplitAlignment inside the tensor they fall into; neighbouring ranges therefore still cover
// everything once.
template <typename Update>
void for_each_part(const TensorTable& table, int64_t begin, int64_t end, const Update& update) {
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

void update_part(const TensorEntry& entry, int64_t from, int64_t to, const Hyperparams& h) {
  switch (h.weight_decay) {
    case WeightDecay::kNone:
      return update_tensor<WeightDecay::kNone>(entry, from, to, h);
    case WeightDecay::kL2:
      return update_tensor<WeightDecay::kL2>(entry, from, to, h);
    case WeightDecay::kDecoupled:
      return update_tensor<WeightDecay::kDecoupled>(entry, from, to, h);
  }
}

template <typename opmath_t>
void average_part(const TensorEntry& entry, int64_t begin, int64_t end, opmath_t weight) {
  alignas(64) opmath_t param[kTile];
  alignas(64) opmath_t average[kTile];
  const int64_t size = itemsize(entry.param_dtype);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    char* const a = static_cast<char*>(entry.average) + at * size;
    gather(entry.param_dtype, static_cast<const char*>(entry.param) + at * size, nullptr, n, param);
    if (weight == 1) {  // also where there is nothing yet to average with
      scatter(entry.param_dtype, param, nullptr, n, a);
      continue;
    }
    gather(entry.param_dtype, a, nullptr, n, average);
    for (int64_t i = 0; i < n; ++i) {
      average[i] = average_of<FmaPolicy>(weight, average[i], param[i]);
    }
    scatter(entry.param_dtype, average, nullptr, n, a);
  }
}

// Elements after which the averages are brought up to date, while the parameters are in the cache.
constexpr int64_t kAverageAfter = 2048;

void run_step(const TensorTable& table, int64_t begin, int64_t end) {
  const double weight = table.average_weight;
  for_each_part(table, begin, end,
                [weight](const TensorEntry& entry, int64_t from, int64_t to, const Hyperparams& h) {
                  if (entry.average == nullptr) return update_part(entry, from, to, h);
                  for (int64_t at = from; at < to; at += kAverageAfter) {
                    const int64_t stop = to - at < kAverageAfter ? to : at + kAverageAfter;
                    update_part(entry, at, stop, h);
                    if (entry.param_dtype == Dtype::kFloat64) {
                      average_part<double>(entry, at, stop, weight);
                    } else {
                      average_part<float>(entry, at, stop, static_cast<float>(weight));
                    }
                  }
                });
}

// ---- between Nesterov's two points --------------------------------------------------------------

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
