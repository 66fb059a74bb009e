#include "random.h"

#include <math.h>
#include <string.h>

#include "elements.h"

static uint64_t word_of(const double *halves) { return (uint64_t)halves[0] << 32 | (uint64_t)halves[1]; }

/* SplitMix64: each half of a word is an element's, the lower one first. */
static const uint32_t *half_words(const double *stream, int64_t first, size_t n, uint32_t *restrict halves) {
  const uint64_t start = word_of(stream), step = word_of(stream + 2);
  const uint64_t before = (uint64_t)first / 2;
  const size_t odd = (size_t)(first % 2), words = (n + odd + 1) / 2;
  for (size_t i = 0; i < words; i++) {
    uint64_t word = start + (before + i + 1) * step;
    word = (word ^ word >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    word = (word ^ word >> 27) * UINT64_C(0x94d049bb133111eb);
    word ^= word >> 31;
    halves[2 * i] = (uint32_t)word;
    halves[2 * i + 1] = (uint32_t)(word >> 32);
  }
  return halves + odd;
}

void draw(const double *stream, int64_t first, size_t n, uint32_t *restrict numbers) {
  uint32_t room[CHUNK + 2];
  const uint32_t *restrict halves = half_words(stream, first, n, room);
  for (size_t i = 0; i < n; i++) numbers[i] = halves[i] >> 8;
}

void uniform(const double *stream, int64_t first, size_t n, float *restrict numbers) {
  uint32_t room[CHUNK + 2];
  const uint32_t *restrict halves = half_words(stream, first, n, room);
  for (size_t i = 0; i < n; i++) numbers[i] = (float)(int32_t)(halves[i] >> 8) * 0x1p-24f;
}

/* e ln 2 + ln m of x = m 2^e, 1 <= m < 2: by a series in s = (m - sqrt 2) / (m + sqrt 2). */
static double logarithm(double x) {
  const double root2 = 0x1.6a09e667f3bcdp+0;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const double power = (double)((int32_t)(bits >> 52) - 1023);
  bits = (bits & ((UINT64_C(1) << 52) - 1)) | UINT64_C(1023) << 52;
  memcpy(&x, &bits, sizeof x);
  const double s = (x - root2) / (x + root2), square = s * s;
  double sum = square * (2.0 / 21);
  for (int of = 19; of > 1; of -= 2) sum = (sum + 2.0 / of) * square;
  return (sum + 2.0) * s + (power * 0.6931471805599453 + 0.34657359027997264);
}

/* From a guess at 1 / sqrt x by its bits, in steps of Newton's. */
static double root(double x) {
  const double half = x * 0.5;
  uint64_t bits;
  double inverse;
  memcpy(&bits, &x, sizeof bits);
  bits = UINT64_C(0x5fe6eb50c7b537a9) - (bits >> 1);
  memcpy(&inverse, &bits, sizeof inverse);
  for (int step = 0; step < 4; step++) inverse *= 1.5 - inverse * inverse * half;
  return inverse * x;
}

/* The inverse of the normal distribution, at (half word + 1/2) / 2^32: algorithm AS 241, PPND7. */
void normal(const double *stream, int64_t first, size_t n, double *restrict numbers) {
  uint32_t room[CHUNK + 2];
  const uint32_t *restrict halves = half_words(stream, first, n, room);
  for (size_t i = 0; i < n; i++) {
    const double off = ((double)(int32_t)halves[i] + 0.5) * 0x1p-32, rest = -fabs(off) + 0.5;
    const double r = 0.180625 - off * off, t = root(-logarithm(rest)) - 1.6;
    const double above = ((r * 59.109374720 + 159.29113202) * r + 50.434271938) * r + 3.3871327179;
    const double below = ((r * 67.187563600 + 78.757757664) * r + 17.895169469) * r + 1.0;
    const double top = ((t * 0.17023821103 + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777;
    const double bottom = (t * 0.12021132975 + 0.73700164250) * t + 1.0;
    const double far_off = copysign(top / bottom, off), near = above / below * off;
    numbers[i] = rest < 0.075 ? far_off : near;
  }
}
