// sum + a * b for norm_loop.h, rounded once. No part of the update: the norm's products are exact,
// so that its bits are those of a multiplication and an addition. Included like half_f16c.h.

Double8 add_product(Double8 sum, Double8 a, Double8 b) {
  return (Double8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
}
