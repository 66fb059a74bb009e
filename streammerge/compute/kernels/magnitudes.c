#include "magnitudes.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* What keys say, whatever they were made of. */
void answer(question *the, const int64_t *restrict keys, size_t n) {
  int64_t above = 0, inside = 0;
  const uint64_t first = (uint64_t)the->low + 1, size = (uint64_t)the->high - first; /* no branch to be guessed */
  int32_t *restrict found = the->out;
  int64_t *restrict counts = the->out;
  switch (the->code) {
    case BETWEEN:
      found += the->inside;
      for (size_t i = 0; i < n; i++) {
        above += keys[i] >= the->high;
        found[inside] = (int32_t)keys[i];
        inside += (uint64_t)keys[i] - first < size;
      }
      break;
    case BINS:
      for (size_t i = 0; i < n; i++) {
        const uint64_t bin = (uint64_t)((keys[i] >> the->shift) - the->low);
        if (bin < 1 << 16) counts[bin]++;
        above += keys[i] != 0;
      }
      break;
    case EQUAL:
      for (size_t i = 0; i < n; i++) inside += keys[i] == the->low;
      break;
  }
  the->above += above;
  the->inside += inside;
}

/* Keys above `low` but not above `most` are gathered; those above that are counted. */
typedef struct {
  int32_t low, most;
  int64_t above, inside;
} sieve;

#if defined(__AVX2__)
/* Where the numbers of four go that are chosen by the bits of 0 to 15: to the front, the rest is anything. */
#define LANE(k) 4 * (k), 4 * (k) + 1, 4 * (k) + 2, 4 * (k) + 3
static const uint8_t to_front[16][16] = {
    {LANE(0), LANE(1), LANE(2), LANE(3)}, {LANE(0), LANE(1), LANE(2), LANE(3)}, {LANE(1), LANE(1), LANE(2), LANE(3)},
    {LANE(0), LANE(1), LANE(2), LANE(3)}, {LANE(2), LANE(1), LANE(2), LANE(3)}, {LANE(0), LANE(2), LANE(2), LANE(3)},
    {LANE(1), LANE(2), LANE(2), LANE(3)}, {LANE(0), LANE(1), LANE(2), LANE(3)}, {LANE(3), LANE(1), LANE(2), LANE(3)},
    {LANE(0), LANE(3), LANE(2), LANE(3)}, {LANE(1), LANE(3), LANE(2), LANE(3)}, {LANE(0), LANE(1), LANE(3), LANE(3)},
    {LANE(2), LANE(3), LANE(2), LANE(3)}, {LANE(0), LANE(2), LANE(3), LANE(3)}, {LANE(1), LANE(2), LANE(3), LANE(3)},
    {LANE(0), LANE(1), LANE(2), LANE(3)},
};
static const uint8_t chosen[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};

static int32_t *gather_four(__m128i keys, int choice, int32_t *found) {
  const __m128i order = _mm_loadu_si128((const __m128i *)to_front[choice]);
  _mm_storeu_si128((__m128i *)found, _mm_shuffle_epi8(keys, order));
  return found + chosen[choice];
}

/* Eights of numbers, without a branch: how many may be between cannot be guessed. */
static inline size_t sift_eights(sieve *the, const float *values, const float *base, size_t n, int32_t *found) {
  const __m256i low = _mm256_set1_epi32(the->low), most = _mm256_set1_epi32(the->most);
  const __m256i rest = _mm256_set1_epi32(0x7fffffff), last = _mm256_set1_epi32(LAST);
  const size_t whole = n & ~(size_t)7;
  __m256i above = _mm256_setzero_si256();
  int32_t *next = found, counts[8];
  for (size_t i = 0; i < whole; i += 8) {
    __m256 value = _mm256_loadu_ps(values + i);
    if (base) value = _mm256_sub_ps(value, _mm256_loadu_ps(base + i));
    const __m256i key = _mm256_min_epi32(_mm256_and_si256(_mm256_castps_si256(value), rest), last);
    const __m256i beyond = _mm256_cmpgt_epi32(key, most);
    const __m256i inside = _mm256_andnot_si256(beyond, _mm256_cmpgt_epi32(key, low));
    const int choice = _mm256_movemask_ps(_mm256_castsi256_ps(inside));
    above = _mm256_sub_epi32(above, beyond);
    next = gather_four(_mm256_castsi256_si128(key), choice & 15, next);
    next = gather_four(_mm256_extracti128_si256(key, 1), choice >> 4, next);
  }
  _mm256_storeu_si256((__m256i *)counts, above);
  for (int i = 0; i < 8; i++) the->above += counts[i];
  the->inside = next - found;
  return whole;
}
#else
static size_t sift_eights(sieve *the, const float *values, const float *base, size_t n, int32_t *found) {
  (void)the, (void)values, (void)base, (void)n, (void)found;
  return 0;
}
#endif

void answer_between(question *the, const float *values, const float *base, size_t n) {
  int32_t *restrict found = (int32_t *)the->out + the->inside;
  sieve own = {the->low < INT32_MIN ? INT32_MIN : (int32_t)the->low,
               the->high > INT32_MAX ? INT32_MAX : (int32_t)(the->high - 1), 0, 0};
  size_t done = base ? sift_eights(&own, values, base, n, found) : sift_eights(&own, values, NULL, n, found);
  for (size_t i = done; i < n; i++) {
    const float size = fabsf(base ? values[i] - base[i] : values[i]);
    int32_t key;
    memcpy(&key, &size, sizeof key);
    key = key < LAST ? key : LAST;
    own.above += key > own.most;
    found[own.inside] = key;
    own.inside += key > own.low && key <= own.most;
  }
  the->above += own.above;
  the->inside += own.inside;
}

/* Bins of the numbers that are selected from, and how many of them are moved to where they are sought on. */
#define DIGIT 11
#define MOVED 4096

EXPORT int32_t kth(const int32_t *values, int64_t n, int64_t k) {
  int32_t few[MOVED], least = values[0], most = values[0];
  for (int64_t i = 0; i < n; i++) least = values[i] < least ? values[i] : least;
  for (int64_t i = 0; i < n; i++) most = values[i] > most ? values[i] : most;
  uint32_t low = (uint32_t)least, width = (uint32_t)most - low; /* the k-th is one of [low, low + width] */
  while (width) {
    int64_t counts[1 << DIGIT] = {0};
    int shift = 0;
    while (width >> shift >= 1 << DIGIT) shift++;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t off = (uint32_t)values[i] - low;
      if (off <= width) counts[off >> shift]++;
    }
    uint32_t bin = 0;
    while (k > counts[bin]) k -= counts[bin++];
    low += bin << shift;
    width = ((uint32_t)1 << shift) - 1;
    if (!width || counts[bin] > MOVED - 1) continue;
    int64_t moved = 0;
    for (int64_t i = 0; i < n; i++) {
      few[moved] = values[i];
      moved += (uint32_t)values[i] - low <= width;
    }
    values = few, n = moved;
  }
  return (int32_t)low;
}

EXPORT void count_at(const int32_t *values, int64_t n, int32_t key, int64_t *found) {
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < n; i++) above += values[i] > key;
  for (int64_t i = 0; i < n; i++) equal += values[i] == key;
  found[0] = above;
  found[1] = equal;
}

EXPORT void equal_in_parts(const int32_t *values, const int64_t *sizes, int64_t parts, int32_t key, int64_t *equal) {
  for (int64_t part = 0; part < parts; values += sizes[part++]) {
    int64_t found = 0;
    for (int64_t i = 0; i < sizes[part]; i++) found += values[i] == key;
    equal[part] = found;
  }
}

EXPORT void add_counts(int64_t *totals, const int64_t *counts, int64_t n) {
  for (int64_t i = 0; i < n; i++) totals[i] += counts[i];
}

EXPORT int64_t bin_from_top(const int64_t *counts, int64_t n, int64_t wanted, int64_t *above) {
  *above = 0;
  while (n > 1 && *above + counts[n - 1] < wanted) *above += counts[--n];
  return n - 1;
}
