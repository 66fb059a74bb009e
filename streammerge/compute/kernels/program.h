/* A program: the expression of a tensor, as a list of steps over registers of CHUNK elements each.

   Every step is a plain loop over the elements of a chunk. A whole block is gone through chunk by chunk, all steps for
   each, so that what lies between them never leaves the first-level cache. Registers are numbered like the slots of the
   path that computes by torch, whose arithmetic this is, step by step. */
#ifndef STREAMMERGE_PROGRAM_H
#define STREAMMERGE_PROGRAM_H

#include "elements.h"

enum code {
  LOAD,   /* r[to] = the elements of input `from`, which are of this kind */
  ZERO,   /* r[to] = 0 */
  SCALE,  /* r[to] = number · r[from] */
  ADD,    /* r[to] = number · r[from] + r[to], rounded once */
  DIVIDE, /* r[to] = r[to] / number */
  ROUND,  /* r[to] = r[from], rounded to this kind */
  WATCH,  /* remembers whether one of so many registers from `from` on holds what isn't finite */
  KEEP,   /* r[to] = what its cuts keep of r[to] − r[from], scaled: sparse.inc */
  MERGE,  /* r[to] = r[to] + the sum of the registers behind it, of those that agree with the sign elected: sparse.inc */
  DEVIATE, /* r[to] = the standard deviation of the registers behind `from`: sparse.inc */
  MASK,    /* r[to] = whether a cut keeps it: sparse.inc */
  SELECT,  /* r[to] = (r[to] − r[from]) · r[from + the table's number] */
  AGREE,   /* r[to] = r[to] + a mean of what agrees of the registers behind it: sparse.inc */
  /* r[to] of elements a and b of the registers that the table numbers, counted from `from` on: elementwise.inc */
  FILL,    /* the table's number */
  COPY,    /* a */
  PLUS,    /* a + b */
  FUSE,    /* a + number · b, rounded once; the number is the table's third */
  MINUS,   /* a − b */
  TIMES,   /* a · b */
  OVER,    /* a / b */
  LESSER,  /* the lesser; what is no number if one of them is; a if they are equal */
  GREATER, /* likewise */
  SIZE,    /* |a| */
  SIGN,    /* 1, 0 or −1; of what is no number 0 */
  ABOVE,   /* 1 where a > b, else 0 */
  REACHES, /* 1 where a ≥ b, else 0 */
  SAME,    /* 1 where a = b, else 0 */
  CHOOSE,  /* a where the third register is not 0, else b */
  COMBINE, /* r[to] = Σ cⱼ xⱼ of so many inputs from `from` on, which are of this kind, added one after the other, each
              product rounded once with the sum; to what r[to] is, where the table's first number, before cⱼ, is not 0 */
  /* of numbers that are drawn for the tensor's elements: random.inc */
  DRAW,    /* r[to] = 1 with the probability that the table begins with, else 0 */
  NORMAL,  /* r[to] = normally distributed numbers */
  DROP,    /* r[to] = what is kept of r[to] − r[from] at random, scaled */
  SIFT,    /* likewise, by the rank in the row: ranks.inc */
  DEPART,  /* adds Σ (r[to] − r[from])² and Σ r[from]² to what it remembers, two doubles */
};

typedef struct {
  int32_t code, to, from, kind;
  double number;
  const double *table; /* numbers of which a step has many */
  int64_t seen[2];     /* what it remembers from chunk to chunk */
} step;

/* All steps for n <= CHUNK elements, the first of which are `done` elements behind those that `inputs` point to; these
   are the tensor's elements from `start` on. */
void compute_f32(step *steps, int64_t count, const void *const *inputs, int64_t start, size_t done, size_t n,
                 float *room);
void compute_f64(step *steps, int64_t count, const void *const *inputs, int64_t start, size_t done, size_t n,
                 double *room);

/* The bits of the greatest magnitude, NaN above infinity: of magnitudes, bits compare as numbers do. */
uint32_t greatest_bits_f32(const float *values, size_t n);
uint64_t greatest_bits_f64(const double *values, size_t n);

/* Elements [start, start + n) of the tensor whose expression these steps are; `inputs` point to their first elements.

   What the last step leaves in register 0 is stored as `kind` in `out`. `room` has CHUNK elements for each register.
   Returned is whether something is infinite, no number, or beyond the kind's range; then `found` tells what. */
EXPORT int run_f32(step *steps, int64_t count, const void *const *inputs, int64_t start, int64_t n, float *room,
                   int32_t kind, void *out, finding *found);
EXPORT int run_f64(step *steps, int64_t count, const void *const *inputs, int64_t start, int64_t n, double *room,
                   int32_t kind, void *out, finding *found);

/* Before steps SIFT are run for elements of [start, start + n), which are whole rows: what follows from how they rank. There
   is room for n numbers for each of these steps; and of the program's type for 5 times the elements of the longest row, or
   of CHUNK if that is longer. */
EXPORT void rank_f32(step *steps, int64_t count, const void *const *inputs, int64_t start, int64_t n, float *room,
                     uint32_t *told, void *space);
EXPORT void rank_f64(step *steps, int64_t count, const void *const *inputs, int64_t start, int64_t n, double *room,
                     uint32_t *told, void *space);

/* The sum of n = 2ᵏ values, the second half added to the first until one is left. */
double halved(double *values, size_t n);

/* The sum of the squares of CHUNK values, in double, added up so. */
double square_f32(const float *values);
double square_f64(const double *values);

#endif
