#include "program.h"

#include <string.h>

/* Products are added up in one order, which methods/statistics/gram.py has too: a row of CHUNK of them by halves, the
   second half added to the first, until LANES numbers are left; these likewise, as float64; then the rows likewise. */
#define LANES 32

/* The sum of a lane's 32 products, in the order in which halves of the row are added to each other: of the two halves of
   products that are 16 rows of lanes apart, of these 8 apart, and so on. It stays in registers. */
#define PRODUCT(k) ((REAL)a[LANES * (k)] * (REAL)b[LANES * (k)])
#define SUM_OF_2(k) (PRODUCT(k) + PRODUCT((k) + 16))
#define SUM_OF_4(k) (SUM_OF_2(k) + SUM_OF_2((k) + 8))
#define SUM_OF_8(k) (SUM_OF_4(k) + SUM_OF_4((k) + 4))
#define SUM_OF_16(k) (SUM_OF_8(k) + SUM_OF_8((k) + 2))
#define SUM_OF_32(k) (SUM_OF_16(k) + SUM_OF_16((k) + 1))

double halved(double *values, size_t n) {
  while (n > 1) {
    n /= 2;
    for (size_t i = 0; i < n; i++) values[i] += values[n + i];
  }
  return values[0];
}

/* Products in float32 of what is computed in it, in float64 likewise, and in float64 of what is computed in float32. */
#define REAL float
#define BITS uint32_t
#define FROM float
#define NAME(name) name##_f32
#define COMPUTE compute_f32
#include "gram.inc"
#undef REAL
#undef BITS
#undef NAME

#define REAL double
#define BITS uint64_t
#define NAME(name) name##_wide
#define greatest_bits_wide greatest_bits_f64
#include "gram.inc"
#undef FROM
#undef NAME
#undef COMPUTE

#define FROM double
#define NAME(name) name##_f64
#define COMPUTE compute_f64
#include "gram.inc"

#define SQUARE(TYPE, SUFFIX)                              \
  double square_##SUFFIX(const TYPE *values) {            \
    double lanes[LANES];                                  \
    for (size_t lane = 0; lane < LANES; lane++) {         \
      const TYPE *restrict a = values + lane, *b = a;     \
      lanes[lane] = SUM_OF_32(0);                         \
    }                                                     \
    return halved(lanes, LANES);                          \
  }
SQUARE(float, f32)
SQUARE(double, f64)
