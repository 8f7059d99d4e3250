/* The most multiply-adds of float32 that one core does: chains that wait for nobody but themselves, in registers. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define CHAINS 12
#define STEPS 4096

typedef float vector __attribute__((vector_size(LANES * 4)));

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static float run(int repeats, float seed) {
  vector sums[CHAINS], factor = {0}, addend = {0};
  factor += 0.999f + seed, addend += 1e-3f;
  for (int c = 0; c < CHAINS; c++) sums[c] = addend * (float)(c + 1);
  for (int r = 0; r < repeats; r++) {
    for (int s = 0; s < STEPS; s++) {
#pragma clang loop unroll(full)
      for (int c = 0; c < CHAINS; c++) sums[c] = sums[c] * factor + addend;
    }
    __asm__ volatile("" ::: "memory");
  }
  vector total = {0};
  for (int c = 0; c < CHAINS; c++) total += sums[c];
  return total[0];
}

int main(void) {
  double best = 0;
  volatile float sink = 0;
  for (int attempt = 0; attempt < 30; attempt++) {
    const uint64_t begin = now_ns();
    sink = run(40, sink * 0.0f);
    const uint64_t spent = now_ns() - begin;
    const double rate = 2.0 * LANES * CHAINS * STEPS * 40 / (double)spent;
    if (rate > best) best = rate;
  }
  printf("%.2f\n", best);
  return 0;
}
