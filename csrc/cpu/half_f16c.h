// fp16 to float and back with F16C, eight at a time. Included where loop.h is: inside the namespace
// of an instruction set.

void half_to_float(const Float16* source, int64_t n, float* tile) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) tile[i] = load(source[i]);
}

void float_to_half(const float* tile, int64_t n, Float16* target) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_loadu_ps(tile + i);
    const __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
  }
  for (; i < n; ++i) store(target[i], tile[i]);
}
