/* What passes for ranks and norms ask of the magnitudes of tensors, and what they do with the answers. */
#ifndef STREAMMERGE_MAGNITUDES_H
#define STREAMMERGE_MAGNITUDES_H

#include "program.h"

/* The greatest keys: those of what is no number. */
#define LAST 0x7f800001
#define LAST_WIDE 0x7ff0000000000001

enum asked {
  BETWEEN, /* how many keys are no less than `high`, and which are above `low` and less than that: int32 */
  BINS,    /* how many keys have each value of the 16 bits above `shift`, counted from `low`, and how many are not 0 */
  EQUAL,   /* how many keys are `low` */
  SQUARES, /* Σ x² of each row of CHUNK, of all of them in the end */
  SIZES,   /* Σ |x| likewise */
  NORMS,   /* Σ |x| likewise, and of what cuts keep of it */
};

typedef struct {
  int32_t code, vector; /* the register, or if `apart` what it differs by from the first */
  int32_t apart, wide, shift, count;
  int64_t low, high, rows; /* rows: 2ᵏ ≥ n / CHUNK */
  const double *cuts;      /* so many as `count` says */
  void *out;               /* int32 for n + 1 keys; int64 for 2¹⁶ counts; double for a sum of every row, of norms two */
  int64_t start; /* the number under which cuts know the first element */
  int64_t above, inside, seen[2];
} question;

void answer(question *the, const int64_t *keys, size_t n);

/* BETWEEN, of the keys of float32: of n values, or of what they differ by from a base, unless that is NULL. */
void answer_between(question *the, const float *values, const float *base, size_t n);

/* The answers for elements [start, start + n) of the tensors that a program leaves in its registers. Questions for the same
   vector stand side by side. */
EXPORT void ask_f32(step *steps, int64_t count, const void *const *inputs, int64_t start, int64_t n, float *room,
                    question *questions, int64_t asked);
EXPORT void ask_f64(step *steps, int64_t count, const void *const *inputs, int64_t start, int64_t n, double *room,
                    question *questions, int64_t asked);

/* The k-th smallest of n values, by their digits. */
EXPORT int32_t kth(const int32_t *values, int64_t n, int64_t k);

/* How many values are above the key, and how many are equal to it. */
EXPORT void count_at(const int32_t *values, int64_t n, int32_t key, int64_t *found);

/* How many of each part of the values, which are so many one after the other, are equal to the key. */
EXPORT void equal_in_parts(const int32_t *values, const int64_t *sizes, int64_t parts, int32_t key, int64_t *equal);

/* totals += counts */
EXPORT void add_counts(int64_t *totals, const int64_t *counts, int64_t n);

/* The bin where so many are reached, counted from the last bin down, and how many are above it. */
EXPORT int64_t bin_from_top(const int64_t *counts, int64_t n, int64_t wanted, int64_t *above);

#endif
