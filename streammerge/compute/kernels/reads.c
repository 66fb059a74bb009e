#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#endif

#include "elements.h"

#if !defined(_WIN32)
#include <errno.h>
#include <unistd.h>
#endif

/* `size` bytes of an open file from `start` on, and where in memory they go. */
typedef struct {
  int64_t file, start, size, buffer;
} file_range;

/* Fill memory with ranges of files, one after the other; how many. What can't be read, or ends too early, is left to who
   asks, who reads it again and says what is wrong. */
EXPORT int64_t read_ranges(const file_range *ranges, int64_t count) {
#if defined(_WIN32) /* no reading at a position there */
  (void)ranges, (void)count;
  return 0;
#else
  for (int64_t i = 0; i < count; i++) {
    char *buffer = (char *)(intptr_t)ranges[i].buffer;
    for (int64_t done = 0; done < ranges[i].size;) {
      size_t left = (size_t)(ranges[i].size - done);
      ssize_t got = pread((int)ranges[i].file, buffer + done, left, (off_t)(ranges[i].start + done));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return i;
      done += got;
    }
  }
  return count;
#endif
}
