// Norms of gradients, compiled once per instruction set: included after loop.h, in the same
// namespace.
//
// A tensor is cut into blocks of kNormBlock elements, a block into kLanes interleaved sums in
// double. Which elements meet in which sum, and in which order, depends on nothing but the tensor's
// size: the same bits for every number of threads and every instruction set. The square of a float
// is exact in a double and cannot overflow it.

using Vector = Double8;
using FloatVector = float __attribute__((vector_size(32)));
constexpr int kVectorSize = 8;
constexpr int kNumVectors = 4;  // as many as hide an addition's latency
constexpr int kLanes = kVectorSize * kNumVectors;

MOMENTUM_EXT_INLINE Vector load_vector(const double* from) {
  Vector v;
  memcpy(&v, from, sizeof(v));
  return v;
}
MOMENTUM_EXT_INLINE Vector load_vector(const float* from) {
  FloatVector v;
  memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, Vector);
}

// With kIsExact the elements are floats that need no scale: their squares have at most 48 bits, so
// that it is no matter whether they are rounded before they are added.
template <Norm kNorm, bool kIsExact>
MOMENTUM_EXT_INLINE Vector add_term(Vector sum, Vector x, double scale) {
  if constexpr (kNorm == Norm::kSumOfSquares && kIsExact) {
    return add_product(sum, x, x);
  } else if constexpr (kNorm == Norm::kSumOfSquares) {
    x *= scale;
    return sum + x * x;
  } else {
    const Vector absolute = x < 0 ? -x : x;
    if constexpr (kNorm == Norm::kSumOfAbs) {
      return sum + absolute;
    } else {  // a NaN stays
      return ((absolute <= sum) | (sum != sum)) ? sum : absolute;
    }
  }
}

struct NormSums {
  Vector sums[kNumVectors] = {};

  // n elements from a place that is a multiple of kLanes in the block.
  template <Norm kNorm, bool kIsExact, typename T>
  void add_all(const T* x, int64_t n, double scale) {
    Vector a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      a = add_term<kNorm, kIsExact>(a, load_vector(x + i), scale);
      b = add_term<kNorm, kIsExact>(b, load_vector(x + i + kVectorSize), scale);
      c = add_term<kNorm, kIsExact>(c, load_vector(x + i + 2 * kVectorSize), scale);
      d = add_term<kNorm, kIsExact>(d, load_vector(x + i + 3 * kVectorSize), scale);
    }
    if (i < n) {  // zeros add nothing
      T rest[kLanes] = {};
      memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(T));
      a = add_term<kNorm, kIsExact>(a, load_vector(rest), scale);
      b = add_term<kNorm, kIsExact>(b, load_vector(rest + kVectorSize), scale);
      c = add_term<kNorm, kIsExact>(c, load_vector(rest + 2 * kVectorSize), scale);
      d = add_term<kNorm, kIsExact>(d, load_vector(rest + 3 * kVectorSize), scale);
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
  }

  template <Norm kNorm, typename T>
  void add(const T* x, int64_t n, double scale) {
    if (sizeof(T) == sizeof(float) && scale == 1) {
      add_all<kNorm, true>(x, n, scale);
    } else {
      add_all<kNorm, false>(x, n, scale);
    }
  }

  template <Norm kNorm>
  double total() const {
    const auto join = [](Vector x, Vector y) {
      if constexpr (kNorm == Norm::kMax) {
        return ((y <= x) | (x != x)) ? x : y;
      } else {
        return x + y;
      }
    };
    const Vector all = join(join(sums[0], sums[1]), join(sums[2], sums[3]));
    double result = all[0];
    for (int i = 1; i < kVectorSize; ++i) {
      result = kNorm == Norm::kMax ? larger(result, all[i]) : result + all[i];
    }
    return result;
  }
};

template <Norm kNorm, typename opmath_t>
double norm_of_block(const TensorEntry& entry, int64_t begin, int64_t end, double scale) {
  NormSums sums;
  const Dtype dtype = entry.grad_dtype;
  const bool as_it_is = dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64;
  if (entry.layout == nullptr && as_it_is) {
    sums.add<kNorm>(static_cast<const opmath_t*>(entry.grad) + begin, end - begin, scale);
    return sums.total<kNorm>();
  }
  alignas(64) opmath_t tile[kTile];
  Walker<Sgd> walker(entry, begin, end, /*in_order=*/true);
  TensorTile<Walker<Sgd>> grad(walker, kGrad, entry.grad, dtype);
  while (walker.next()) {
    load_tile(dtype, grad.load(), walker.n(), tile);
    sums.add<kNorm>(tile, walker.n(), scale);
  }
  return sums.total<kNorm>();
}

template <Norm kNorm>
void run_norm(const TensorTable& table, int64_t begin, int64_t end, double scale,
              double* block_norms) {
  if (begin >= end) return;
  int64_t i = locate_entry(table, begin);
  for (int64_t block = begin; block < end; ++block) {
    while (table.first_element[i + 1] <= block) ++i;
    const TensorEntry& entry = table.entries[i];
    const int64_t from = (block - table.first_element[i]) * kNormBlock;
    const int64_t to = entry.numel - from < kNormBlock ? entry.numel : from + kNormBlock;
    block_norms[block] = entry.grad_dtype == Dtype::kFloat64
                             ? norm_of_block<kNorm, double>(entry, from, to, scale)
                             : norm_of_block<kNorm, float>(entry, from, to, scale);
  }
}
