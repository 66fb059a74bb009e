#include "program.h"

#include <string.h>

/* Products are added up in one order, which methods/statistics/gram.py has too: a row of CHUNK of them by halves, the
   second half added to the first, until LANES numbers are left; these likewise, as float64; then the rows likewise. */
#define LANES 32

static double halved(double *values, size_t n) {
  while (n > 1) {
    n /= 2;
    for (size_t i = 0; i < n; i++) values[i] += values[n + i];
  }
  return values[0];
}

#define REAL float
#define BITS uint32_t
#define NAME(name) name##_f32
#include "gram.inc"
#undef REAL
#undef BITS
#undef NAME

#define REAL double
#define BITS uint64_t
#define NAME(name) name##_f64
#include "gram.inc"
