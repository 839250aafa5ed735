// Tiles: small pieces of tensors on the stack, in the type that they are computed in. Reads and
// writes tensors of any dtype and layout. Included like loop.h.

constexpr int64_t kTile =
    256;  // elements; three tiles of double are 6 KiB of stack, well inside L1

constexpr int64_t kLineBytes = 64;

// ---- between dtypes -----------------------------------------------------------------------------

template <typename scalar_t, typename opmath_t>
void load_all(const scalar_t* source, int64_t n, opmath_t* tile) {
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) tile[i] = static_cast<opmath_t>(load(source[i]));
}
void load_all(const Float16* source, int64_t n, float* tile) { half_to_float(source, n, tile); }

template <typename scalar_t, typename opmath_t>
void store_all(const opmath_t* tile, int64_t n, scalar_t* target) {
  using stored_t = typename OpMath<scalar_t>::type;
  MOMENTUM_EXT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) store(target[i], static_cast<stored_t>(tile[i]));
}
void store_all(const float* tile, int64_t n, Float16* target) { float_to_half(tile, n, target); }

// Of a dtype of 16 bits or more; 8-bit values have a scale, see slots.h.
template <typename opmath_t>
void load_tile(Dtype dtype, const void* source, int64_t n, opmath_t* tile) {
  visit_dtype<opmath_t>(
      dtype, [&](auto type) { load_all(static_cast<const decltype(type)*>(source), n, tile); });
}

template <typename opmath_t>
void store_tile(Dtype dtype, const opmath_t* tile, int64_t n, void* target) {
  visit_dtype<opmath_t>(
      dtype, [&](auto type) { store_all(tile, n, static_cast<decltype(type)*>(target)); });
}

// ---- between layouts ----------------------------------------------------------------------------

// Goes through elements of an entry, a tile at a time. A strided layout is walked in blocks, see
// StridedLayout, strip by strip: a strip has several blocks, one after the other along `across`,
// before the walk moves on to the next columns, because in most layouts each of their lines is in a
// page of its own, and so all that is needed of a page is read before its turn in the TLB is over.
//
// Where the order matters, a tile has elements that follow on each other by their index, and begins
// at a multiple of kTile. Then a block is a single row, as long as a tile, if the rows are whole
// tiles; else the walk is in the order of the index.
template <int kOperands>
class TileWalker {
 public:
  // A block of a strided layout, row by row.
  struct Block {
    int64_t rows;
    int64_t columns;
    int64_t offsets[kOperands];  // of its first element in each tensor
  };

  // Elements [begin, end), or as many blocks as fall to them. Neighbouring ranges together have
  // every element once.
  TileWalker(const TensorEntry& entry, int64_t begin, int64_t end, bool in_order)
      : layout_(entry.layout), at_(begin), end_(end) {
    if (layout_ == nullptr) return;
    inner_ = layout_->ndim - 1;
    for (int d = 0; d <= inner_; ++d) index_[d] = 0;
    by_row_ = in_order && layout_->across >= 0 && size_of(inner_) % kTile == 0;
    by_index_ = in_order && !by_row_;
    if (by_index_) {
      go_to(begin, layout_->ndim - 1);
      return;
    }
    across_ = layout_->across;
    choose_blocks(kLineBytes / itemsize(entry.grad_dtype));
    int64_t num_blocks = 1;
    for (int d = 0; d <= inner_; ++d) num_blocks *= num_steps(d);
    const auto first_block_of = [&](int64_t element) {
      const double part = static_cast<double>(element) / static_cast<double>(entry.numel);
      return static_cast<int64_t>(part * static_cast<double>(num_blocks));
    };
    const int64_t first = first_block_of(begin);
    blocks_left_ = first_block_of(end) - first;
    go_to_block(first);
  }

  // False: there is none left.
  bool next() {
    at_ += n_;
    n_ = 0;
    const bool has_range = layout_ == nullptr || by_index_;
    const int64_t most = has_range && end_ - at_ < kTile ? end_ - at_ : kTile;
    if (layout_ == nullptr) {
      n_ = most;
      return n_ > 0;
    }
    if (by_row_) {
      at_ = 0;
      for (int d = 0; d <= inner_; ++d) at_ = at_ * size_of(d) + index_[d];
      rows_to_strip_end_ = min_of(strip_ - index_[across_] % strip_, rows_left());
    }
    num_blocks_ = 0;
    while (n_ < most && (by_index_ || blocks_left_ > 0)) {
      Block& block = blocks_[num_blocks_];
      block.columns = min_of(size_of(inner_) - index_[inner_], by_index_ ? most - n_ : columns_);
      block.rows = across_ < 0 ? 1 : min_of(rows_left(), rows_);
      for (int t = 0; t < kOperands; ++t) block.offsets[t] = offsets_[t];
      if (n_ + block.rows * block.columns > most) break;
      n_ += block.rows * block.columns;
      ++num_blocks_;
      --blocks_left_;
      go_on_from(block);
    }
    return n_ > 0;
  }

  bool is_strided() const { return layout_ != nullptr; }
  int64_t at() const { return at_; }  // the index of the tile's first element, where in order
  int64_t n() const { return n_; }
  const Block* begin() const { return blocks_; }
  const Block* end() const { return blocks_ + num_blocks_; }
  int64_t column_stride(int operand) const { return layout_->dims[inner_].strides[operand]; }
  int64_t row_stride(int operand) const {
    return across_ < 0 ? 0 : layout_->dims[across_].strides[operand];
  }
  // Of tiles that are rows, how many are next: this one, and others below it. Else 0.
  int64_t rows_to_strip_end() const { return rows_to_strip_end_; }

 private:
  static constexpr int kMaxDims = 65;  // torch's 64 and one for the real view of a complex tensor
  static constexpr int64_t kBlocksInStrip = 8;

  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
  int64_t size_of(int d) const { return layout_->dims[d].size; }
  int64_t rows_left() const { return size_of(across_) - index_[across_]; }
  int64_t step_of(int d) const { return d == inner_ ? columns_ : d == across_ ? rows_ : 1; }
  int64_t num_steps(int d) const { return (size_of(d) - 1) / step_of(d) + 1; }

  // As many rows as a cache line has elements, columns to fill the tile.
  void choose_blocks(int64_t line) {
    if (by_row_) {
      columns_ = kTile;
      strip_ = line;
      return;
    }
    third_ = layout_->third;
    if (across_ >= 0) rows_ = min_of(size_of(across_), line);
    columns_ = min_of(size_of(inner_), kTile / rows_);
    if (across_ >= 0) rows_ = min_of(size_of(across_), kTile / columns_);
    strip_ = kBlocksInStrip * rows_;
  }

  void advance(int d, int64_t by) {
    index_[d] += by;
    for (int t = 0; t < kOperands; ++t) offsets_[t] += by * layout_->dims[d].strides[t];
  }

  // False: the dimension was through, and begins again.
  bool step(int d, int64_t by) {
    advance(d, by);
    if (index_[d] < size_of(d)) return true;
    advance(d, -index_[d]);
    return false;
  }

  // To this position in the dimensions up to `last`, but for those that blocks are made of.
  void go_to(int64_t position, int last) {
    for (int d = last; d >= 0; --d) {
      if (d == across_ || d == third_) continue;
      advance(d, position % size_of(d));
      position /= size_of(d);
    }
  }

  void go_to_block(int64_t number) {
    if (third_ >= 0) {
      advance(third_, number % size_of(third_));
      number /= size_of(third_);
    }
    const int64_t width = num_steps(inner_);
    if (across_ < 0) {
      advance(inner_, number % width * columns_);
      return go_to(number / width, inner_ - 1);
    }
    const int64_t height = num_steps(across_);
    const int64_t in_strip = strip_ / rows_;
    const int64_t in_plane = number % (width * height);
    const int64_t strip = in_plane / (in_strip * width);
    const int64_t strip_height = min_of(in_strip, height - strip * in_strip);
    const int64_t in_this_strip = in_plane - strip * in_strip * width;
    advance(inner_, in_this_strip / strip_height * columns_);
    advance(across_, strip * strip_ + in_this_strip % strip_height * rows_);
    go_to(number / (width * height), inner_ - 1);
  }

  void go_on_from(const Block& block) {
    if (third_ >= 0 && step(third_, 1)) return;
    if (across_ < 0) {
      if (step(inner_, block.columns)) return;
    } else {
      const int64_t strip_begin = index_[across_] / strip_ * strip_;
      advance(across_, block.rows);
      if (index_[across_] < min_of(strip_begin + strip_, size_of(across_))) return;
      if (step(inner_, block.columns)) return advance(across_, strip_begin - index_[across_]);
      if (step(across_, 0)) return;
    }
    for (int d = inner_ - 1; d >= 0; --d) {
      if (d != across_ && d != third_ && step(d, 1)) return;
    }
  }

  const StridedLayout* layout_;
  bool by_row_ = false;
  bool by_index_ = false;
  int64_t at_;
  int64_t end_;
  int64_t n_ = 0;
  int inner_ = 0;
  int across_ = -1;
  int third_ = -1;
  int64_t rows_ = 1;
  int64_t columns_ = 1;
  int64_t strip_ = 1;  // rows
  int64_t rows_to_strip_end_ = 0;
  int64_t blocks_left_ = 0;
  int64_t index_[kMaxDims];
  int64_t offsets_[kOperands] = {};
  int num_blocks_ = 0;
  Block blocks_[kTile / 2 + 1];  // of two elements, but for one at an end
};

// Through the operands that a rule has.
template <typename Rule>
using Walker = TileWalker<kState + Rule::kMaxStates>;

// What a walker's tile has of one tensor, one element after the other: in the tensor's own memory
// where they lie like that, else in a copy. kAhead: with a tile that is a row, the rows below it
// are loaded, which have the same cache lines.
template <typename W, bool kAhead = false>
class TensorTile {
 public:
  TensorTile() = default;
  TensorTile(const W& walker, int operand, const void* tensor, Dtype dtype) {
    start(walker, operand, tensor, dtype);
  }
  void start(const W& walker, int operand, const void* tensor, Dtype dtype) {
    walker_ = &walker;
    operand_ = operand;
    tensor_ = static_cast<char*>(const_cast<void*>(tensor));
    size_ = itemsize(dtype);
  }

  // Where they are, or shall be.
  char* place() {
    if (!walker_->is_strided()) return place_ = tensor_ + walker_->at() * size_;
    return place_ = is_in_place() ? tensor_ + walker_->begin()->offsets[operand_] * size_ : copy_;
  }

  char* load() {
    if constexpr (kAhead) {
      if (walker_->rows_to_strip_end() > 0 && walker_->column_stride(operand_) != 1) {
        return load_ahead();
      }
    }
    place();
    if (place_ == copy_) copy<true>(walker_->begin(), walker_->end());
    return place_;
  }

  void store() {
    if (place_ == copy_) copy<false>(walker_->begin(), walker_->end());
  }

 protected:
  // The elements of each block lie in a row, and each block behind the one before.
  bool is_in_place() const {
    if (walker_->column_stride(operand_) != 1) return false;
    int64_t offset = walker_->begin()->offsets[operand_];
    for (const typename W::Block& block : *walker_) {
      if (block.rows > 1 && walker_->row_stride(operand_) != block.columns) return false;
      if (block.offsets[operand_] != offset) return false;
      offset += block.rows * block.columns;
    }
    return true;
  }

  char* load_ahead() {
    if (rows_ahead_ == 0) {
      typename W::Block rows = *walker_->begin();
      rows.rows = rows_ahead_ = walker_->rows_to_strip_end();
      copy<true>(&rows, &rows + 1);
      place_ = copy_;
    } else {
      place_ += kTile * size_;
    }
    --rows_ahead_;
    return place_;
  }

  template <bool kLoad>
  void copy(const typename W::Block* begin, const typename W::Block* end) {
    if (size_ == 2) return copy_as<kLoad, 2>(begin, end);
    if (size_ == 4) return copy_as<kLoad, 4>(begin, end);
    copy_as<kLoad, 8>(begin, end);
  }

  template <bool kLoad, int kSize>
  void copy_as(const typename W::Block* begin, const typename W::Block* end) {
    char* dense = copy_;
    for (const typename W::Block* block = begin; block != end; ++block) {
      copy_block<kLoad, kSize>(tensor_ + block->offsets[operand_] * kSize,
                               walker_->row_stride(operand_), walker_->column_stride(operand_),
                               block->rows, block->columns, dense);
      dense += block->rows * block->columns * kSize;
    }
  }

  const W* walker_;
  int operand_;
  char* tensor_;
  int64_t size_;
  char* place_;
  int64_t rows_ahead_ = 0;
  alignas(64) char copy_[kTile * (kAhead ? kLineBytes : static_cast<int64_t>(sizeof(double)))];
};
