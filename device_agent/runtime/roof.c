/* roof.c: what a machine does at most, beside which a profile shows its kernels. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

enum { SHARE = 8 }; /* of the machine's memory that a working set may take is one in so many */
enum { ADDITIONS = 64, ROUNDS = 4096, TRIES = 5 };
enum { LEAST_BYTES = 32 << 20 }; /* read in one try, or a small working set is over before the clock has moved */
static const int64_t working_sets[KEDGE_ROOFS] = {256 << 10, 2 << 20, 16 << 20, 128 << 20};

/* A chain of additions that nothing can shorten: the compiler sees neither operand, and no core adds two registers
 * before the first is known. Every core that runs kedge takes one cycle for each. */
double kedge_core_clock(void) {
  int64_t best = INT64_MAX;
  size_t sum = 1, term = 1;
  for (int i = 0; i < TRIES; i++) {
    int64_t start = kedge_now_ns();
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 64
      for (int k = 0; k < ADDITIONS; k++) {
        sum += term;
        __asm__ volatile("" : "+r"(sum), "+r"(term));
      }
    }
    int64_t duration = kedge_now_ns() - start;
    if (duration > 0 && duration < best) best = duration;
  }
  return best == INT64_MAX ? 0 : 1e9 * ADDITIONS * ROUNDS / (double)best;
}

typedef uint64_t block __attribute__((vector_size(32)));
typedef struct {
  block *data;
  int64_t blocks; /* of each thread */
  int64_t passes; /* 0: write them for the first time */
} reading;

static int32_t read_slice(void *closure, int64_t begin, int64_t end) {
  const reading *r = closure;
  for (int64_t thread = begin; thread < end; thread++) {
    block *slice = r->data + thread * r->blocks;
    if (r->passes == 0) memset(slice, 1, (size_t)r->blocks * sizeof *slice);
    for (int64_t pass = 0; pass < r->passes; pass++) {
      block a = {0}, b = {0}, c = {0}, d = {0};
      for (int64_t i = 0; i + 4 <= r->blocks; i += 4) {
        a += slice[i];
        b += slice[i + 1];
        c += slice[i + 2];
        d += slice[i + 3];
      }
      block sum = a + b + c + d;
      __asm__ volatile("" : : "m"(sum) : "memory");
    }
  }
  return 0;
}

static int32_t read_rate(kedge_frame *frame, int64_t bytes, double *rate) {
  int64_t threads = ((const kedge_team *)frame->pool)->num_threads;
  reading r = {.blocks = bytes / threads / (int64_t)sizeof(block) / 4 * 4};
  int64_t all = r.blocks * threads * (int64_t)sizeof(block);
  *rate = 0;
  /* A larger part of a small board's memory may not be there, and it is whoever touches it who is killed. */
  int64_t memory = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  r.data = all == 0 || all > memory / SHARE ? NULL : aligned_alloc(KEDGE_ALIGNMENT, (size_t)all);
  if (r.data == NULL) return KEDGE_OK;
  int32_t status = frame->api->parallel_for(frame, read_slice, &r, threads);
  r.passes = all < LEAST_BYTES ? LEAST_BYTES / all : 1;
  for (int i = 0; i < TRIES && status == KEDGE_OK; i++) {
    int64_t start = kedge_now_ns();
    status = frame->api->parallel_for(frame, read_slice, &r, threads);
    int64_t duration = kedge_now_ns() - start;
    double found = 1e9 * (double)all * (double)r.passes / (double)(duration > 0 ? duration : 1);
    if (found > *rate) *rate = found;
  }
  free(r.data);
  return status;
}

int32_t kedge_read_rates(kedge_frame *frame, double rates[KEDGE_ROOFS]) {
  int32_t status = KEDGE_OK;
  for (int i = 0; i < KEDGE_ROOFS && status == KEDGE_OK; i++) status = read_rate(frame, working_sets[i], &rates[i]);
  return status;
}
