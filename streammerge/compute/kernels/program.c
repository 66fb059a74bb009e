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

static float next_f32(float value, int32_t more) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits += more;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

/* The greatest float whose square, which double has exactly, is not above it. What is in double stays what it is. */
static float root_below_f32(double square) {
  const float near = (float)sqrt(square);
  const float root = (double)near * near > square ? next_f32(near, -1) : near, above = next_f32(root, 1);
  return (double)above * above <= square ? above : root;
}

static double root_below_f64(double square) { return square; }

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
