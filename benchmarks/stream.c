/* How fast one core reads: GB/s of summing an array of BYTES again and again, the best of many rounds. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Compilers split vectors of 512 bits in two for Intel's servers, and so read half as much from the first cache. */
#if defined(__AVX512F__)
#define LANES 16
#define WHOLE __attribute__((min_vector_width(512)))
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if !defined(WHOLE)
#define WHOLE
#endif
#define CHAINS 8
#define ROUNDS 20
#define ROUND_NS 4e6

typedef float vector __attribute__((vector_size(LANES * 4)));

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

WHOLE static float sum(const vector *data, size_t steps) {
  vector sums[CHAINS] = {{0}};
  for (size_t s = 0; s < steps; s++) {
#pragma clang loop unroll(full)
    for (int c = 0; c < CHAINS; c++) sums[c] += data[s * CHAINS + c];
  }
  vector total = {0};
  for (int c = 0; c < CHAINS; c++) total += sums[c];
  return total[0];
}

int main(int count, char **arguments) {
  const size_t wanted = count == 2 ? strtoull(arguments[1], NULL, 10) : 0;
  if (wanted == 0) {
    fprintf(stderr, "usage: stream BYTES\n");
    return 2;
  }
  const size_t step = CHAINS * sizeof(vector), steps = (wanted + step - 1) / step;
  vector *data = aligned_alloc(4096, (steps * step + 4095) / 4096 * 4096);
  if (data == NULL) {
    fprintf(stderr, "stream: no memory for %zu bytes\n", wanted);
    return 1;
  }
  for (size_t s = 0; s < steps * CHAINS; s++) data[s] = (vector){0} + 1e-3f;
  volatile float sink = 0;
  uint64_t begin = now_ns();
  sink = sum(data, steps);
  size_t repeats = (size_t)(ROUND_NS / ((double)(now_ns() - begin) + 1)) + 1;
  double best = 0;
  for (int round = 0; round < ROUNDS; round++) {
    begin = now_ns();
    for (size_t r = 0; r < repeats; r++) {
      sink = sum(data, steps);
      __asm__ volatile("" ::: "memory");
    }
    const double rate = (double)(steps * step) * (double)repeats / (double)(now_ns() - begin);
    if (rate > best) best = rate;
  }
  (void)sink;
  printf("%.2f\n", best);
  return 0;
}
