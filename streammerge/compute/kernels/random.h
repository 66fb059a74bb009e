/* Random numbers by the place of an element: those of methods/random_numbers.py, where it is said whose they are. */
#ifndef STREAMMERGE_RANDOM_H
#define STREAMMERGE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

/* Numbers that name a stream: the upper and lower half of its start, and of its step. */
#define STREAM 4

/* For n <= CHUNK elements from the tensor's element `first` on: */
void draw(const double *stream, int64_t first, size_t n, uint32_t *numbers); /* whole numbers below 2^24 */
void uniform(const double *stream, int64_t first, size_t n, float *numbers); /* the same by 2^24, of [0, 1) */
void normal(const double *stream, int64_t first, size_t n, double *numbers); /* normally distributed */

#endif
