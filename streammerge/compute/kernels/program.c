#include "magnitudes.h"
#include "random.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* How signs are elected, and what a sum is divided by: tables of the step MERGE have these as numbers. */
enum election { BY_NONE, BY_SUM, BY_COUNT };
enum division { NEVER, BY_NUMBER, BY_WEIGHTS, BY_POSITIVE_WEIGHTS };

/* Numbers of a cut, elements that are merged at once, and models whose elements are merged one by one at the most. */
#define CUT 5
#define TILE 256
#define FEW 4

/* Squares that are added up side by side: these sums are told to a few digits. */
#define ABREAST 32

/* The greatest floats whose squares, which double has exactly, are not above these: first roots that are beside them at
   the most, float's where its range allows. What is in double stays what it is. */
static void roots_below_f32(const double *restrict squares, float *restrict roots) {
  float below[TILE], above[TILE];
  int32_t bits[TILE], odd = 0;
  for (size_t k = 0; k < TILE; k++) odd += !(squares[k] == 0 || (squares[k] > 0x1p-120 && squares[k] < 0x1p120));
  if (odd)
    for (size_t k = 0; k < TILE; k++) roots[k] = (float)sqrt(squares[k]);
  else
    for (size_t k = 0; k < TILE; k++) roots[k] = sqrtf((float)squares[k]);
  memcpy(bits, roots, sizeof bits);
  for (size_t k = 0; k < TILE; k++) bits[k] -= 1;
  memcpy(below, bits, sizeof bits);
  for (size_t k = 0; k < TILE; k++) roots[k] = (double)roots[k] * roots[k] > squares[k] ? below[k] : roots[k];
  memcpy(bits, roots, sizeof bits);
  for (size_t k = 0; k < TILE; k++) bits[k] += 1;
  memcpy(above, bits, sizeof bits);
  for (size_t k = 0; k < TILE; k++) roots[k] = (double)above[k] * above[k] <= squares[k] ? above[k] : roots[k];
}

static void roots_below_f64(const double *restrict squares, double *restrict roots) {
  memcpy(roots, squares, TILE * sizeof *roots);
}

/* The same in float32 and in float64: REAL, its BITS, as a WHOLE number, its FUSED multiply and add,
   the SIZE_OF a number, its MOST, what is NEXT. */
#define COMBINE_F16
#define MOST_COMBINED 64
#define REAL float
#define BITS uint32_t
#define WHOLE int32_t
#define FUSED fmaf
#define SIZE_OF fabsf
#define MOST FLT_MAX
#define NEXT nextafterf
#define NAME(name) name##_f32
#include "sparse.inc"
#include "elementwise.inc"
#include "random.inc"
#include "program.inc"
#include "ranks.inc"
#include "magnitudes.inc"
#undef COMBINE_F16
#undef REAL
#undef BITS
#undef WHOLE
#undef FUSED
#undef SIZE_OF
#undef MOST
#undef NEXT
#undef NAME

#define REAL double
#define BITS uint64_t
#define WHOLE int64_t
#define FUSED fma
#define SIZE_OF fabs
#define MOST DBL_MAX
#define NEXT nextafter
#define NAME(name) name##_f64
#include "sparse.inc"
#include "elementwise.inc"
#include "random.inc"
#include "program.inc"
#include "ranks.inc"
#include "magnitudes.inc"
