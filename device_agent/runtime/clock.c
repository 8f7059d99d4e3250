/* clock.c: CLOCK_MONOTONIC. A test puts another file in its place. */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>

#include "internal.h"

int64_t kedge_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The smallest step that reading the clock shows: clock_getres says 1 ns on most machines, which none of them has. */
int64_t kedge_clock_resolution_ns(void) {
  struct timespec declared;
  clock_getres(CLOCK_MONOTONIC, &declared);
  int64_t smallest = INT64_MAX;
  for (int i = 0; i < 100; i++) {
    int64_t start = kedge_now_ns(), end = start;
    while (end == start) end = kedge_now_ns();
    if (end - start < smallest) smallest = end - start;
  }
  int64_t step = (int64_t)declared.tv_sec * 1000000000 + declared.tv_nsec;
  return smallest > step ? smallest : step;
}

void kedge_sleep_ns(int64_t duration_ns) {
  struct timespec left = {(time_t)(duration_ns / 1000000000), (long)(duration_ns % 1000000000)};
  while (nanosleep(&left, &left) == -1 && errno == EINTR) {
  }
}
