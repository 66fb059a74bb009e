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

/* The same in float32 and in float64: REAL, its BITS, as a WHOLE number, its FUSED multiply and add, its MOST, what is NEXT. */
#define COMBINE_F16
#define MOST_COMBINED 64
#define REAL float
#define BITS uint32_t
#define WHOLE int32_t
#define FUSED fmaf
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
#undef MOST
#undef NEXT
#undef NAME

#define REAL double
#define BITS uint64_t
#define WHOLE int64_t
#define FUSED fma
#define MOST DBL_MAX
#define NEXT nextafter
#define NAME(name) name##_f64
#include "sparse.inc"
#include "elementwise.inc"
#include "random.inc"
#include "program.inc"
#include "ranks.inc"
#include "magnitudes.inc"
