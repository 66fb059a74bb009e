/* How elements lie in files, and how they become float32 or float64 and are rounded back.

   Rounding is to the nearest, ties to even, once: from float64 to fewer than 32 bits by way of a float32 rounded to odd
   (Boldo, Melquiond 2008). float8 without an infinity (E4M3) keeps what is too large as its greatest number. Every NaN is
   written as the one quiet NaN of its type. So does torch, by which each of these is tested, but for the NaNs. */
#ifndef STREAMMERGE_ELEMENTS_H
#define STREAMMERGE_ELEMENTS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__F16C__) || (defined(_MSC_VER) && defined(__AVX2__))
#include <immintrin.h>
#define HAS_F16C 1
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum element { F16, BF16, F8_E4M3, F8_E5M2, F32, F64 };

/* Elements that are computed at once: few enough for a dozen registers of them to stay in the first-level cache. */
#define CHUNK 1024

/* What became of values that were stored: those of the report's Finding. `largest` stays -1, what it was, where none was
   finite. */
typedef struct {
  int64_t nonfinite, overflowed, saturated;
  double largest;
} finding;

size_t size_of(enum element kind);

/* n <= CHUNK elements from anywhere in memory, aligned or not, and to there; what they are made of has room for CHUNK. */
void load_f32(enum element kind, const void *from, size_t n, float *to);
void load_f64(enum element kind, const void *from, size_t n, double *to);
void store_f32(const float *from, size_t n, enum element kind, void *to);
void store_f64(const double *from, size_t n, enum element kind, void *to);

/* to[i] = Σ numbers[j] · xⱼ[i], or if it goes `on`, to[i] and that, of the float16 numbers that begin so many bytes
   behind `from[j]`; added one after the other, each product rounded once with the sum. */
void combine_f16(const void *const *from, size_t skipped, const float *numbers, size_t count, int on, size_t n,
                 float *to);

/* The same, rounded to float16 at once, of no more than 4 inputs; the bits of the greatest magnitude before that. Whoever
   finds it too large has to look at what was rounded. 0 elements are done where the machine has no instructions for it. */
size_t combine_to_f16(const void *const *from, size_t skipped, const float *numbers, size_t count, size_t n, void *to,
                      uint32_t *greatest);

/* The greatest finite number. */
double limit_of(enum element kind);

/* Count what was lost when these values were stored so. */
void look_f32(const float *from, size_t n, enum element kind, const void *stored, finding *found);
void look_f64(const double *from, size_t n, enum element kind, const void *stored, finding *found);

/* Make every NaN the one quiet NaN, whose sign and payload are those that the type's conversion gives to `NAN`. */
void quiet(enum element kind, size_t n, void *stored);

/* How many elements are infinite or no numbers. */
EXPORT int64_t nonfinite_in(enum element kind, const void *from, int64_t n);

#endif
