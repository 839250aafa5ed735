// Tiles: small pieces of tensors on the stack, in the type that they are computed in. Reads and
// writes tensors of any dtype and layout. Included like loop.h.

constexpr int64_t kTile =
    256;  // elements; three tiles of double are 6 KiB of stack, well inside L1

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
    default:  // 8-bit values have a scale, see slots.h
      __builtin_unreachable();
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
    default:
      __builtin_unreachable();
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
