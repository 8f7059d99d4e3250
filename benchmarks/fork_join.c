/* What it costs to begin a parallel loop and to end it, in nanoseconds a loop: one line of JSON.
 *
 * Arguments: static | dynamic, empty | meet, threads, iterations, the idle gap before each loop in ns, and how many loops
 * at most: on a machine that is too busy it ends after MOST_NS.
 *
 * An `empty` body returns at once; a pool may then let one thread do it all. In `meet` each iteration waits until all
 * have begun, so that every thread must really come: with as many iterations as threads, each runs one. With
 * -DOPENMP -fopenmp the loops are OpenMP's, else kedge's.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

#define WARM_UP_NS 10000000 /* until every thread runs */
#define MOST_NS 2000000000

typedef struct {
  _Alignas(64) _Atomic int64_t arrived;
  int64_t expected; /* 0: wait for nobody */
} meeting;

static int64_t now_ns(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int32_t body(void *closure, int64_t begin, int64_t end) {
  meeting *m = closure;
  if (m->expected == 0) return 0;
  atomic_fetch_add(&m->arrived, end - begin);
  while (atomic_load_explicit(&m->arrived, memory_order_acquire) < m->expected) kedge_relax();
  return 0;
}

#ifdef OPENMP
static int threads;
static void start(int n) { threads = n; }
static void loop(bool dynamic, int64_t iterations, meeting *m) {
  if (dynamic) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < iterations; i++) body(m, i, i + 1);
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < iterations; i++) body(m, i, i + 1);
  }
}
#else
static kedge_team team;
static int32_t not_cancelled;
static kedge_frame frame = {.struct_size = sizeof frame, .api = &kedge_api, .pool = &team, .cancel = &not_cancelled};
static void start(int n) {
  if (kedge_team_init(&team, n) != KEDGE_OK) exit(1);
}
static void loop(bool dynamic, int64_t iterations, meeting *m) {
  int32_t status = dynamic ? kedge_api.parallel_for_dynamic(&frame, body, m, iterations, 1)
                           : kedge_api.parallel_for(&frame, body, m, iterations);
  if (status != KEDGE_OK) exit(1);
}
#endif

static int ascending(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  if (argc != 7) return 2;
  bool dynamic = strcmp(argv[1], "dynamic") == 0, meet = strcmp(argv[2], "meet") == 0;
  int64_t iterations = atoll(argv[4]), gap_ns = atoll(argv[5]), loops = atoll(argv[6]);
  int64_t *samples_ns = malloc((size_t)loops * sizeof *samples_ns);
  meeting m = {.expected = meet ? iterations : 0}, quiet = {0};
  start(atoi(argv[3]));
  for (int64_t until = now_ns(CLOCK_MONOTONIC) + WARM_UP_NS; now_ns(CLOCK_MONOTONIC) < until;) loop(dynamic, iterations, &quiet);
  int64_t total = 0, end = now_ns(CLOCK_MONOTONIC) + MOST_NS, done = 0;
  for (; done < loops && now_ns(CLOCK_MONOTONIC) < end; done++) {
    atomic_store(&m.arrived, 0);
    int64_t begin = now_ns(CLOCK_MONOTONIC);
    if (gap_ns > 0) {
      int64_t until = begin + gap_ns;
      while ((begin = now_ns(CLOCK_MONOTONIC)) < until) kedge_relax();
    }
    loop(dynamic, iterations, &m);
    int64_t spent = now_ns(CLOCK_MONOTONIC) - begin;
    samples_ns[done] = spent;
    total += spent;
  }
  int64_t cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
  nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
  cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu; /* of the workers: this thread slept */
  qsort(samples_ns, (size_t)done, sizeof *samples_ns, ascending);
  printf("{\"p50_ns\": %lld, \"p99_ns\": %lld, \"mean_ns\": %lld, \"idle_cpu_us\": %lld}\n",
         (long long)samples_ns[done / 2], (long long)samples_ns[done * 99 / 100], (long long)(total / done),
         (long long)(cpu / 1000));
  return 0;
}
