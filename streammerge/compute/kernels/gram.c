#include "program.h"

#include <string.h>

/* Products are added up in one order, which methods/statistics/gram.py has too: a row of CHUNK of them by halves, the
   second half added to the first, until LANES numbers are left; these likewise, as float64; then the rows likewise. */
#define LANES 32

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
