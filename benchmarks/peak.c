/* The most multiply-adds of float32 that one core does: chains that wait for nobody but themselves, in registers. Of
 * the widths of vectors that the machine has the best counts. Compilers split vectors of 512 bits in two where they
 * take such ones for a bad choice, as for Intel's servers: these are asked to be whole. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define CHAINS 12
#define STEPS 4096

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#define CHAINS_OF(LANES, WHOLE)                                                    \
  WHOLE static float run_##LANES(int repeats, float seed) {                        \
    typedef float vector __attribute__((vector_size(LANES * 4)));                  \
    vector sums[CHAINS], factor = {0}, addend = {0};                               \
    factor += 0.999f + seed, addend += 1e-3f;                                      \
    for (int c = 0; c < CHAINS; c++) sums[c] = addend * (float)(c + 1);            \
    for (int r = 0; r < repeats; r++) {                                            \
      for (int s = 0; s < STEPS; s++) {                                            \
        _Pragma("clang loop unroll(full)") for (int c = 0; c < CHAINS; c++) {      \
          sums[c] = sums[c] * factor + addend;                                     \
        }                                                                          \
      }                                                                            \
      __asm__ volatile("" ::: "memory");                                           \
    }                                                                              \
    vector total = {0};                                                            \
    for (int c = 0; c < CHAINS; c++) total += sums[c];                             \
    return total[0];                                                               \
  }

CHAINS_OF(4, )
#if defined(__AVX__)
CHAINS_OF(8, )
#endif
#if defined(__AVX512F__)
CHAINS_OF(16, __attribute__((min_vector_width(512))))
#endif

static const struct {
  int lanes;
  float (*run)(int repeats, float seed);
} widths[] = {
    {4, run_4},
#if defined(__AVX__)
    {8, run_8},
#endif
#if defined(__AVX512F__)
    {16, run_16},
#endif
};

int main(void) {
  double best = 0;
  volatile float sink = 0;
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    for (int attempt = 0; attempt < 30; attempt++) {
      const uint64_t begin = now_ns();
      sink = widths[w].run(40, sink * 0.0f);
      const uint64_t spent = now_ns() - begin;
      const double rate = 2.0 * widths[w].lanes * CHAINS * STEPS * 40 / (double)spent;
      if (rate > best) best = rate;
    }
  }
  printf("%.2f\n", best);
  return 0;
}
