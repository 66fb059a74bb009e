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

static int row_from_stored(const step *steps, int64_t count, const void *const *inputs, size_t done, size_t vectors,
                           int32_t skipped, size_t rows, double *sums, double *greatest);

/* Products in float32 of what is computed in it, in float64 likewise, and in float64 of what is computed in float32. */
#define REAL float
#define BITS uint32_t
#define FROM float
#define NAME(name) name##_f32
#define COMPUTE compute_f32
#define FROM_STORED
#include "gram.inc"
#undef FROM_STORED
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

/* Differences and their products in float32, of few vectors that are read as they are stored: nothing leaves the machine's
   registers but sums of four. */
#if defined(HAS_F16C)
#define FEW 4
#define PAIRS (FEW * (FEW + 1) / 2)
#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

INLINE __m256 eight_stored(enum element kind, const char *from, size_t i) {
  if (kind == F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i)));
  if (kind == F32) return _mm256_loadu_ps((const float *)(const void *)(from + 4 * i));
  const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + 2 * i)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)); /* bfloat16 */
}

/* The products of eight elements from i on, and their greatest bits. */
INLINE void eight_products(enum element kind, const char *const *from, size_t vectors, size_t skipped, size_t i,
                                  __m256 *products, __m256i *most) {
  const __m256i rest = _mm256_set1_epi32(0x7fffffff);
  __m256 d[FEW];
  for (size_t v = 0, pair = 0; v < vectors; v++) {
    d[v] = eight_stored(kind, from[v], i);
    if (v) d[v] = _mm256_sub_ps(d[v], d[0]);
    if (v < skipped) continue;
    most[v] = _mm256_max_epu32(most[v], _mm256_and_si256(_mm256_castps_si256(d[v]), rest));
    for (size_t w = skipped; w <= v; w++, pair++) products[pair] = _mm256_mul_ps(d[v], d[w]);
  }
}

/* Σ of the eights at k and k + 16 rows of lanes, and those between: the innermost sums of SUM_OF_32. */
INLINE void four_products(enum element kind, const char *const *from, size_t vectors, size_t skipped, size_t i,
                                 __m256 *sums, __m256i *most) {
  const size_t own = vectors - skipped, pairs = own * (own + 1) / 2;
  __m256 a[PAIRS], b[PAIRS];
  eight_products(kind, from, vectors, skipped, i, a, most);
  eight_products(kind, from, vectors, skipped, i + 16 * LANES, b, most);
  for (size_t p = 0; p < pairs; p++) sums[p] = _mm256_add_ps(a[p], b[p]);
  eight_products(kind, from, vectors, skipped, i + 8 * LANES, a, most);
  eight_products(kind, from, vectors, skipped, i + 24 * LANES, b, most);
  for (size_t p = 0; p < pairs; p++) sums[p] = _mm256_add_ps(sums[p], _mm256_add_ps(a[p], b[p]));
}

INLINE void stored_row(enum element kind, const char *const *from, size_t vectors, size_t skipped, size_t rows,
                              double *sums, double *greatest) {
  const size_t own = vectors - skipped, pairs = own * (own + 1) / 2;
  double lanes[PAIRS][LANES];
  __m256i most[FEW];
  for (size_t v = 0; v < vectors; v++) most[v] = _mm256_setzero_si256();
  for (size_t lane = 0; lane < LANES; lane += 8) {
    __m256 fours[8][PAIRS];
    for (size_t k = 0; k < 8; k++) four_products(kind, from, vectors, skipped, lane + k * LANES, fours[k], most);
    for (size_t p = 0; p < pairs; p++) {
      for (size_t half = 4; half; half /= 2)
        for (size_t k = 0; k < half; k++) fours[k][p] = _mm256_add_ps(fours[k][p], fours[k + half][p]);
      float sum[8];
      _mm256_storeu_ps(sum, fours[0][p]);
      for (size_t k = 0; k < 8; k++) lanes[p][lane + k] = sum[k];
    }
  }
  for (size_t p = 0; p < pairs; p++) sums[p * rows] = halved(lanes[p], LANES);
  for (size_t v = skipped; v < vectors; v++) {
    uint32_t found[8], bits = 0;
    _mm256_storeu_si256((__m256i *)found, most[v]);
    for (int k = 0; k < 8; k++) bits = found[k] > bits ? found[k] : bits;
    take_greatest_f32(greatest + v - skipped, bits);
  }
}

/* Where the compiler knows the kind, and how many there are. */
INLINE int few_stored(enum element kind, const char *const *from, size_t vectors, size_t skipped, size_t rows,
                             double *sums, double *greatest) {
  switch (2 * vectors + skipped) {
    case 4: stored_row(kind, from, 2, 0, rows, sums, greatest); return 1;
    case 6: stored_row(kind, from, 3, 0, rows, sums, greatest); return 1;
    case 7: stored_row(kind, from, 3, 1, rows, sums, greatest); return 1;
    case 8: stored_row(kind, from, 4, 0, rows, sums, greatest); return 1;
    case 9: stored_row(kind, from, 4, 1, rows, sums, greatest); return 1;
    default: return 0;
  }
}
#endif

/* A whole row of a program that only loads tensors of one kind; 0 if it isn't one. */
static int row_from_stored(const step *steps, int64_t count, const void *const *inputs, size_t done, size_t vectors,
                           int32_t skipped, size_t rows, double *sums, double *greatest) {
#if defined(HAS_F16C)
  const char *from[FEW];
  const enum element kind = (enum element)steps->kind;
  if (vectors > FEW || (size_t)count != vectors) return 0;
  for (size_t v = 0; v < vectors; v++) {
    const step *the = steps + v;
    if (the->code != LOAD || the->kind != steps->kind || (size_t)the->to != v) return 0;
    from[v] = (const char *)inputs[the->from] + done * size_of(kind);
  }
  switch (kind) {
    case F16: return few_stored(F16, from, vectors, (size_t)skipped, rows, sums, greatest);
    case BF16: return few_stored(BF16, from, vectors, (size_t)skipped, rows, sums, greatest);
    case F32: return few_stored(F32, from, vectors, (size_t)skipped, rows, sums, greatest);
    default: return 0;
  }
#else
  (void)steps, (void)count, (void)inputs, (void)done, (void)vectors, (void)skipped, (void)rows, (void)sums;
  (void)greatest;
  return 0;
#endif
}
