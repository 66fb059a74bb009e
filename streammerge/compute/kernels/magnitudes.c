#include "magnitudes.h"

#include <math.h>
#include <string.h>

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

void answer_between(question *the, const int32_t *restrict keys, size_t n) {
  const int64_t low = the->low < INT32_MIN ? INT32_MIN : the->low;
  const int64_t high = the->high > INT32_MAX ? (int64_t)INT32_MAX + 1 : the->high;
  const uint32_t first = (uint32_t)(low + 1), size = (uint32_t)(high - low - 1);
  const int32_t last = (int32_t)(high - 1); /* those above are greater */
  int32_t *restrict found = (int32_t *)the->out + the->inside;
  int32_t above = 0, inside = 0;
  uint8_t is_inside[CHUNK];
  for (size_t i = 0; i < n; i++) above += keys[i] > last;
  for (size_t i = 0; i < n; i++) is_inside[i] = (uint32_t)keys[i] - first < size;
  memset(is_inside + n, 0, CHUNK - n);
  for (size_t start = 0; start < n; start += 8) {
    uint64_t any;
    memcpy(&any, is_inside + start, 8); /* few are, so that most eights have none */
    if (!any) continue;
    for (size_t i = start; i < start + 8; i++) {
      found[inside] = keys[i];
      inside += is_inside[i];
    }
  }
  the->above += above;
  the->inside += inside;
}

EXPORT int32_t kth(const int32_t *values, int64_t n, int64_t k) {
  static const int shifts[] = {22, 11, 0};
  uint32_t known = 0;
  for (int digit = 0; digit < 3; digit++) {
    int64_t counts[1 << 11] = {0};
    const int shift = shifts[digit], above = shift + (digit ? 11 : 10);
    uint32_t bin = 0;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t value = (uint32_t)values[i] ^ 0x80000000;
      if (!digit || value >> above == known) counts[value >> shift & 0x7ff]++;
    }
    while (k > counts[bin]) k -= counts[bin++];
    known = known << 11 | bin;
  }
  return (int32_t)(known ^ 0x80000000);
}

EXPORT void count_at(const int32_t *values, int64_t n, int32_t key, int64_t *found) {
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < n; i++) above += values[i] > key;
  for (int64_t i = 0; i < n; i++) equal += values[i] == key;
  found[0] = above;
  found[1] = equal;
}

EXPORT void add_counts(int64_t *totals, const int64_t *counts, int64_t n) {
  for (int64_t i = 0; i < n; i++) totals[i] += counts[i];
}

EXPORT int64_t bin_from_top(const int64_t *counts, int64_t n, int64_t wanted, int64_t *above) {
  *above = 0;
  while (n > 1 && *above + counts[n - 1] < wanted) *above += counts[--n];
  return n - 1;
}
