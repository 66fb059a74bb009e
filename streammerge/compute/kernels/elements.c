#include "elements.h"

#include <math.h>
#include <string.h>

#if !defined(HAS_F16C) && (defined(__aarch64__) || defined(_M_ARM64))
#include <arm_neon.h>
#define HAS_NEON 1
#endif

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

size_t size_of(enum element kind) {
  switch (kind) {
    case F16:
    case BF16: return 2;
    case F32: return 4;
    case F64: return 8;
    default: return 1;
  }
}

double limit_of(enum element kind) {
  switch (kind) {
    case F16: return 65504.0;
    case BF16: return 0x1.fep127;
    case F8_E4M3: return 448.0;
    case F8_E5M2: return 57344.0;
    case F32: return 0x1.fffffep127;
    default: return 0x1.fffffffffffffp1023;
  }
}

/* Eight halves at a time, by the machine's own instructions where it has them. */
#if defined(HAS_F16C)
static void load_halves(const uint16_t *from, float *to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
}
static void store_halves(const float *from, uint16_t *to) {
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(HAS_NEON)
static void load_halves(const uint16_t *from, float *to) {
  uint16x8_t halves;
  memcpy(&halves, from, 16);
  vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))));
  vst1q_f32(to + 4, vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves))));
}
static void store_halves(const float *from, uint16_t *to) {
  uint16x8_t halves = vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))),
                                   vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + 4))));
  memcpy(to, &halves, 16);
}
#else
static float half_value(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  float value = float_of(rest << 13) * 0x1p112f; /* the exponents' biases differ by 112; exact, for subnormals too */
  return float_of(sign | bits_of(value));
}
static uint16_t half_of(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (size < 0x38800000) return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000)); /* ulp of 1/2: 2^-24 */
  return (uint16_t)(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}
static void load_halves(const uint16_t *from, float *to) {
  uint16_t halves[8];
  memcpy(halves, from, 16);
  for (int i = 0; i < 8; i++) to[i] = half_value(halves[i]);
}
static void store_halves(const float *from, uint16_t *to) {
  uint16_t halves[8];
  for (int i = 0; i < 8; i++) halves[i] = half_of(from[i]);
  memcpy(to, halves, 16);
}
#endif

/* float8: a sign, 4 or 5 bits of exponent, 3 or 2 of mantissa. Written as choices between values, not as branches, for
   compilers to turn the loops around them into vectors. */
static float e4m3_value(uint8_t code) {
  uint32_t sign = (uint32_t)(code & 0x80) << 24, rest = code & 0x7f;
  float small = (float)(int32_t)rest * 0x1p-9f;
  uint32_t bits = rest < 0x08 ? bits_of(small) : rest == 0x7f ? 0x7fc00000 : (rest << 20) + 0x3c000000;
  return float_of(sign | bits);
}

static float e5m2_value(uint8_t code) {
  uint32_t sign = (uint32_t)(code & 0x80) << 24, rest = code & 0x7f;
  float small = (float)(int32_t)rest * 0x1p-16f;
  uint32_t large = rest < 0x7c ? (rest << 21) + 0x38000000 : rest == 0x7c ? 0x7f800000 : 0x7fc00000;
  return float_of(sign | (rest < 0x04 ? bits_of(small) : large));
}

static uint8_t e4m3_of(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  uint32_t small = bits_of(float_of(size) + 0x1p14f) - 0x46800000; /* below 2^-6: adding 2^14 leaves 2^-9 as last digit */
  uint32_t large = (size - 0x3c000000 + 0x7ffff + (size >> 20 & 1)) >> 20;
  uint32_t rounded = size < 0x3c800000 ? small : size < 0x43e80000 ? large : 0x7e;
  return (uint8_t)(size > 0x7f800000 ? 0x7f : sign | rounded);
}

static uint8_t e5m2_of(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  uint32_t small = bits_of(float_of(size) + 0x1p7f) - 0x43000000; /* below 2^-14: adding 2^7 leaves 2^-16 as last digit */
  uint32_t large = (size - 0x38000000 + 0xfffff + (size >> 21 & 1)) >> 21;
  uint32_t rounded = size < 0x38800000 ? small : size < 0x47700000 ? large : 0x7c;
  return (uint8_t)(size > 0x7f800000 ? 0x7f : sign | rounded);
}

static uint16_t bf16_of(float value) {
  uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static void load_f16(const char *from, size_t n, float *to) {
  size_t whole = n & ~(size_t)7;
  for (size_t i = 0; i < whole; i += 8) load_halves((const uint16_t *)(from + 2 * i), to + i);
  if (whole == n) return;
  uint16_t halves[8] = {0};
  float values[8];
  memcpy(halves, from + 2 * whole, 2 * (n - whole));
  load_halves(halves, values);
  memcpy(to + whole, values, 4 * (n - whole));
}

static void store_f16(const float *from, size_t n, char *to) {
  size_t whole = n & ~(size_t)7;
  for (size_t i = 0; i < whole; i += 8) store_halves(from + i, (uint16_t *)(to + 2 * i));
  if (whole == n) return;
  float values[8] = {0};
  uint16_t halves[8];
  memcpy(values, from + whole, 4 * (n - whole));
  store_halves(values, halves);
  memcpy(to + 2 * whole, halves, 2 * (n - whole));
}

#define MOST_AT_ONCE 4

#if defined(HAS_F16C)
/* Eight sums, of the elements that lie so many bytes behind where each input begins, `on` from what is there. They stay in
   a register from the first input to the last, where the compiler knows `count` and `on`. */
static inline __m256 eight_sums(const char *const *from, const float *numbers, size_t count, int on, size_t skipped,
                                __m256 sum) {
  for (size_t j = 0; j < count; j++) {
    const __m256 number = _mm256_set1_ps(numbers[j]);
    const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from[j] + skipped)));
    sum = on || j ? _mm256_fmadd_ps(number, values, sum) : _mm256_mul_ps(number, values);
  }
  return sum;
}
#endif

static inline size_t combine_eights(const char *const *from, const float *numbers, size_t count, int on, size_t n,
                                    float *to) {
#if defined(HAS_F16C)
  size_t whole = n & ~(size_t)7;
  for (size_t i = 0; i < whole; i += 8) {
    const __m256 before = on ? _mm256_loadu_ps(to + i) : _mm256_setzero_ps();
    _mm256_storeu_ps(to + i, eight_sums(from, numbers, count, on, 2 * i, before));
  }
  return whole;
#else
  (void)from, (void)numbers, (void)count, (void)on, (void)n, (void)to;
  return 0;
#endif
}

static void combine_few(const char *const *from, const float *numbers, size_t count, int on, size_t n, float *to) {
  size_t done = 0;
  switch (2 * count + (on != 0)) {
    case 2: done = combine_eights(from, numbers, 1, 0, n, to); break;
    case 3: done = combine_eights(from, numbers, 1, 1, n, to); break;
    case 4: done = combine_eights(from, numbers, 2, 0, n, to); break;
    case 5: done = combine_eights(from, numbers, 2, 1, n, to); break;
    case 6: done = combine_eights(from, numbers, 3, 0, n, to); break;
    case 7: done = combine_eights(from, numbers, 3, 1, n, to); break;
    case 8: done = combine_eights(from, numbers, 4, 0, n, to); break;
    case 9: done = combine_eights(from, numbers, 4, 1, n, to); break;
  }
  for (size_t j = 0; j < count && done < n; j++) {
    float values[CHUNK];
    load_f16(from[j] + 2 * done, n - done, values);
    for (size_t i = done; i < n; i++)
      to[i] = on || j ? fmaf(numbers[j], values[i - done], to[i]) : numbers[j] * values[i - done];
  }
}

void combine_f16(const void *const *from, size_t skipped, const float *numbers, size_t count, int on, size_t n,
                 float *to) {
  for (size_t first = 0; first < count; first += MOST_AT_ONCE) {
    size_t few = count - first < MOST_AT_ONCE ? count - first : MOST_AT_ONCE;
    const char *starts[MOST_AT_ONCE];
    for (size_t j = 0; j < few; j++) starts[j] = (const char *)from[first + j] + skipped;
    combine_few(starts, numbers + first, few, on || first, n, to);
  }
}

#if defined(HAS_F16C)
static inline size_t round_eights(const char *const *from, const float *numbers, size_t count, size_t n, uint16_t *to,
                                  uint32_t *greatest) {
  const __m256i rest = _mm256_set1_epi32(0x7fffffff);
  const size_t whole = n & ~(size_t)7;
  __m256i most = _mm256_setzero_si256();
  uint32_t found[8];
  for (size_t i = 0; i < whole; i += 8) {
    const __m256 sum = eight_sums(from, numbers, count, 0, 2 * i, _mm256_setzero_ps());
    most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(sum), rest));
    _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
  }
  _mm256_storeu_si256((__m256i *)found, most);
  for (int i = 0; i < 8; i++) *greatest = found[i] > *greatest ? found[i] : *greatest;
  return whole;
}
#endif

size_t combine_to_f16(const void *const *from, size_t skipped, const float *numbers, size_t count, size_t n, void *to,
                      uint32_t *greatest) {
#if defined(HAS_F16C)
  const char *starts[MOST_AT_ONCE];
  if (count > MOST_AT_ONCE) return 0;
  for (size_t j = 0; j < count; j++) starts[j] = (const char *)from[j] + skipped;
  switch (count) {
    case 1: return round_eights(starts, numbers, 1, n, to, greatest);
    case 2: return round_eights(starts, numbers, 2, n, to, greatest);
    case 3: return round_eights(starts, numbers, 3, n, to, greatest);
    case 4: return round_eights(starts, numbers, 4, n, to, greatest);
  }
#else
  (void)from, (void)skipped, (void)numbers, (void)count, (void)n, (void)to, (void)greatest;
#endif
  return 0;
}

void load_f32(enum element kind, const void *from, size_t n, float *to) {
  const char *bytes = from;
  switch (kind) {
    case F16: load_f16(bytes, n, to); break;
    case BF16:
      for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, 2);
        to[i] = float_of((uint32_t)half << 16);
      }
      break;
    case F32: memcpy(to, from, 4 * n); break;
    case F64:
      for (size_t i = 0; i < n; i++) {
        double value;
        memcpy(&value, bytes + 8 * i, 8);
        to[i] = (float)value;
      }
      break;
    case F8_E4M3:
      for (size_t i = 0; i < n; i++) to[i] = e4m3_value(((const uint8_t *)from)[i]);
      break;
    case F8_E5M2:
      for (size_t i = 0; i < n; i++) to[i] = e5m2_value(((const uint8_t *)from)[i]);
      break;
  }
}

void load_f64(enum element kind, const void *from, size_t n, double *to) {
  float narrow[CHUNK];
  if (kind == F64) {
    memcpy(to, from, 8 * n);
    return;
  }
  load_f32(kind, from, n, narrow);
  for (size_t i = 0; i < n; i++) to[i] = narrow[i];
}

void store_f32(const float *from, size_t n, enum element kind, void *to) {
  char *bytes = to;
  switch (kind) {
    case F16: store_f16(from, n, to); break;
    case BF16:
      for (size_t i = 0; i < n; i++) {
        uint16_t half = bf16_of(from[i]);
        memcpy(bytes + 2 * i, &half, 2);
      }
      break;
    case F8_E4M3:
      for (size_t i = 0; i < n; i++) ((uint8_t *)to)[i] = e4m3_of(from[i]);
      break;
    case F8_E5M2:
      for (size_t i = 0; i < n; i++) ((uint8_t *)to)[i] = e5m2_of(from[i]);
      break;
    case F32: memcpy(to, from, 4 * n); break;
    case F64:
      for (size_t i = 0; i < n; i++) {
        double value = from[i];
        memcpy(bytes + 8 * i, &value, 8);
      }
      break;
  }
}

/* The float32 beside an inexact value whose last bit is 1: no tie in fewer bits, and on the right side of all. */
static float odd_of(double value) {
  float near = (float)value;
  uint32_t bits = bits_of(near);
  double size = fabs(value), kept = fabs((double)near);
  int32_t towards = (size > kept) - (size < kept);
  return float_of(bits + (uint32_t)towards * (1 - (bits & 1)));
}

void store_f64(const double *from, size_t n, enum element kind, void *to) {
  float narrow[CHUNK];
  if (kind == F64) {
    memcpy(to, from, 8 * n);
    return;
  }
  if (kind == F32)
    for (size_t i = 0; i < n; i++) narrow[i] = (float)from[i];
  else
    for (size_t i = 0; i < n; i++) narrow[i] = odd_of(from[i]);
  store_f32(narrow, n, kind, to);
}

/* The magnitude from which on a number is cut to the greatest float8 rather than rounded to it. */
static double beyond(enum element kind) {
  return kind == F8_E4M3 ? 464.0 : kind == F8_E5M2 ? 61440.0 : INFINITY;
}

static void look_at(double value, double stored, enum element kind, finding *found) {
  if (!isfinite(stored)) {
    found->nonfinite++;
    found->overflowed += isfinite(value);
  } else {
    found->saturated += fabs(value) > beyond(kind); /* of what is no float8 none is */
  }
  if (isfinite(value) && fabs(value) > found->largest) found->largest = fabs(value);
}

void look_f32(const float *from, size_t n, enum element kind, const void *stored, finding *found) {
  double values[CHUNK];
  load_f64(kind, stored, n, values);
  for (size_t i = 0; i < n; i++) look_at(from[i], values[i], kind, found);
}

void look_f64(const double *from, size_t n, enum element kind, const void *stored, finding *found) {
  double values[CHUNK];
  load_f64(kind, stored, n, values);
  for (size_t i = 0; i < n; i++) look_at(from[i], values[i], kind, found);
}

void quiet(enum element kind, size_t n, void *stored) {
  double values[CHUNK];
  const double nan = NAN;
  char *bytes = stored;
  load_f64(kind, stored, n, values);
  for (size_t i = 0; i < n; i++)
    if (isnan(values[i])) store_f64(&nan, 1, kind, bytes + i * size_of(kind));
}

EXPORT int64_t nonfinite_in(enum element kind, const void *from, int64_t n) {
  double values[CHUNK];
  int64_t found = 0;
  for (int64_t start = 0; start < n; start += CHUNK) {
    size_t count = (size_t)(n - start < CHUNK ? n - start : CHUNK);
    load_f64(kind, (const char *)from + start * (int64_t)size_of(kind), count, values);
    for (size_t i = 0; i < count; i++) found += !isfinite(values[i]);
  }
  return found;
}

EXPORT int version(void) { return 8; }
