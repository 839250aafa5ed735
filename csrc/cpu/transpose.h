// Copies a block of rows and columns between a tensor and a tile, transposed in vectors where the
// tensor has it the other way round. Included like loop.h.

// Vectors of elements of kSize bytes, as many as 16 bytes have, and the interleaving of two.
template <int kSize>
struct Lanes;
template <>
struct Lanes<2> {
  using Vector = uint16_t __attribute__((vector_size(16)));
  static Vector low(Vector a, Vector b) {
    return MOMENTUM_EXT_SHUFFLE(Vector, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  static Vector high(Vector a, Vector b) {
    return MOMENTUM_EXT_SHUFFLE(Vector, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};
template <>
struct Lanes<4> {
  using Vector = uint32_t __attribute__((vector_size(16)));
  static Vector low(Vector a, Vector b) { return MOMENTUM_EXT_SHUFFLE(Vector, a, b, 0, 4, 1, 5); }
  static Vector high(Vector a, Vector b) { return MOMENTUM_EXT_SHUFFLE(Vector, a, b, 2, 6, 3, 7); }
};
template <>
struct Lanes<8> {
  using Vector = uint64_t __attribute__((vector_size(16)));
  static Vector low(Vector a, Vector b) { return MOMENTUM_EXT_SHUFFLE(Vector, a, b, 0, 2); }
  static Vector high(Vector a, Vector b) { return MOMENTUM_EXT_SHUFFLE(Vector, a, b, 1, 3); }
};

// A square of as many elements as a vector has: to[i][j] = from[j][i]. Strides in bytes.
template <int kSize, int kStages = 16 / kSize, typename Vector, int kCount>
void write_transposed(const Vector (&v)[kCount], char* to, int64_t to_stride) {
  if constexpr (kStages > 1) {
    Vector interleaved[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      interleaved[2 * i] = Lanes<kSize>::low(v[i], v[i + kCount / 2]);
      interleaved[2 * i + 1] = Lanes<kSize>::high(v[i], v[i + kCount / 2]);
    }
    write_transposed<kSize, kStages / 2>(interleaved, to, to_stride);
  } else {
    for (int i = 0; i < kCount; ++i) memcpy(to + i * to_stride, &v[i], sizeof(Vector));
  }
}

template <int kSize>
void transpose_square(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  typename Lanes<kSize>::Vector v[16 / kSize];
  for (int i = 0; i < 16 / kSize; ++i) memcpy(&v[i], from + i * from_stride, sizeof(v[i]));
  write_transposed<kSize>(v, to, to_stride);
}

// to[i][j] = from[j][i] of elements of kSize bytes, without gaps between the j of `to` and the i of
// `from`. Strides in bytes.
template <int kSize>
void transpose(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t num_i,
               int64_t num_j) {
  constexpr int64_t kCount = 16 / kSize;
  const int64_t whole_i = num_i / kCount * kCount;
  const int64_t whole_j = num_j / kCount * kCount;
  for (int64_t j = 0; j < whole_j; j += kCount) {
    for (int64_t i = 0; i < whole_i; i += kCount) {
      transpose_square<kSize>(from + j * from_stride + i * kSize, from_stride,
                              to + i * to_stride + j * kSize, to_stride);
    }
  }
  for (int64_t j = 0; j < num_j; ++j) {
    for (int64_t i = j < whole_j ? whole_i : 0; i < num_i; ++i) {
      memcpy(to + i * to_stride + j * kSize, from + j * from_stride + i * kSize, kSize);
    }
  }
}

template <int64_t kBytes>
void copy_rows_of(const char* from, int64_t from_stride, char* to, int64_t to_stride,
                  int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * to_stride, from + r * from_stride, kBytes);
}

// Rows of `bytes` bytes, in elements of kSize. A call of memcpy costs more than most rows, and so
// does a loop over what a row has: the usual rows are copied as a whole.
template <int kSize>
void copy_rows(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t rows,
               int64_t bytes) {
  if (bytes == 64) return copy_rows_of<64>(from, from_stride, to, to_stride, rows);
  if (bytes == 16) return copy_rows_of<16>(from, from_stride, to, to_stride, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const char* const source = from + r * from_stride;
    char* const target = to + r * to_stride;
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) memcpy(target + i, source + i, 64);
    for (; i + 16 <= bytes; i += 16) memcpy(target + i, source + i, 16);
    for (; i < bytes; i += kSize) memcpy(target + i, source + i, kSize);
  }
}

// Between a block in a tensor's memory and its elements of kSize bytes one after the other.
template <bool kLoad, int kSize>
void copy_block(char* memory, int64_t row_stride, int64_t column_stride, int64_t rows,
                int64_t columns, char* dense) {
  const int64_t row = columns * kSize;
  if (column_stride == 1) {
    if constexpr (kLoad) {
      copy_rows<kSize>(memory, row_stride * kSize, dense, row, rows, row);
    } else {
      copy_rows<kSize>(dense, row, memory, row_stride * kSize, rows, row);
    }
  } else if (row_stride == 1) {
    if constexpr (kLoad) {
      transpose<kSize>(memory, column_stride * kSize, dense, row, rows, columns);
    } else {
      transpose<kSize>(dense, row, memory, column_stride * kSize, columns, rows);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        char* const there = memory + (r * row_stride + c * column_stride) * kSize;
        char* const here = dense + (r * columns + c) * kSize;
        memcpy(kLoad ? here : there, kLoad ? there : here, kSize);
      }
    }
  }
}
