#include "program.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* The same in float32 and in float64. */
#define REAL float
#define BITS uint32_t
#define FUSED fmaf
#define MOST FLT_MAX
#define NAME(name) name##_f32
#include "program.inc"
#undef REAL
#undef BITS
#undef FUSED
#undef MOST
#undef NAME

#define REAL double
#define BITS uint64_t
#define FUSED fma
#define MOST DBL_MAX
#define NAME(name) name##_f64
#include "program.inc"
