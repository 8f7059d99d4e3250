/* pool_stress.c: parallel loops from several threads at once, each element of each loop counted; loops of all sizes, and
 * loops that are stopped.
 *
 * Arguments: callers, threads of each team, loops of each caller. Prints "ok".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum { MAX_EXTENT = 200, INNER = 7 };
static int team_threads, n_loops;
static pthread_t main_thread;

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (!(condition)) {                                                  \
      fprintf(stderr, "line %d: %s\n", __LINE__, #condition);            \
      _exit(1);                                                          \
    }                                                                    \
  } while (0)

typedef struct {
  kedge_frame *frame;
  int32_t counts[MAX_EXTENT * INNER]; /* not atomic: every element belongs to one chunk */
  int64_t fail_at;
  int64_t chunk; /* 0: static ones */
} work;

static int32_t no_cancel;

static kedge_frame frame_of(kedge_team *team, int32_t *cancel) {
  CHECK(kedge_team_init(team, team_threads) == KEDGE_OK);
  return (kedge_frame){.struct_size = sizeof(kedge_frame), .api = &kedge_api, .pool = team, .cancel = cancel};
}

static int32_t run(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent, int64_t chunk) {
  return chunk == 0 ? frame->api->parallel_for(frame, body, closure, extent)
                    : frame->api->parallel_for_dynamic(frame, body, closure, extent, chunk);
}

static int32_t count_inner(void *closure, int64_t begin, int64_t end) {
  int32_t *counts = closure;
  for (int64_t i = begin; i < end; i++) counts[i]++;
  return 0;
}

static int32_t count_outer(void *closure, int64_t begin, int64_t end) {
  work *w = closure;
  if (begin >= end) return 99;
  for (int64_t i = begin; i < end; i++) {
    int32_t status = run(w->frame, count_inner, &w->counts[i * INNER], INNER, w->chunk);
    if (status != 0) return status;
    if (i == w->fail_at) return 55;
  }
  return 0;
}

static void run_loop(work *w, int64_t extent, int64_t fail_at, int64_t chunk) {
  memset(w->counts, 0, sizeof w->counts);
  w->fail_at = fail_at;
  w->chunk = chunk;
  int32_t status = run(w->frame, count_outer, w, extent, chunk);
  CHECK(status == (fail_at < extent ? KEDGE_E_KERNEL : KEDGE_OK));
  if (status != KEDGE_OK) {
    CHECK(strcmp(kedge_last_error(), "a parallel loop failed with 55") == 0);
    return;
  }
  for (int64_t i = 0; i < MAX_EXTENT * INNER; i++) CHECK(w->counts[i] == (i < extent * INNER));
}

static void *call_loops(void *seed_pointer) {
  unsigned seed = (unsigned)(uintptr_t)seed_pointer;
  kedge_team team;
  kedge_frame frame = frame_of(&team, &no_cancel);
  work *w = calloc(1, sizeof *w);
  w->frame = &frame;
  for (int i = 0; i < n_loops; i++) {
    int64_t extent = rand_r(&seed) % (MAX_EXTENT + 1);
    int64_t fail_at = rand_r(&seed) % 20 == 0 ? rand_r(&seed) % MAX_EXTENT : MAX_EXTENT;
    run_loop(w, extent, fail_at, i % 2 == 0 ? 0 : 1 + rand_r(&seed) % 9);
    if (rand_r(&seed) % 50 == 0) usleep(300); /* long enough for the workers to fall asleep */
  }
  free(w);
  return NULL;
}

static int count_workers(void) {
  DIR *tasks = opendir("/proc/self/task");
  int count = 0;
  for (struct dirent *entry; (entry = readdir(tasks)) != NULL;) {
    char path[300], name[32] = "";
    snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
    FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
    if (file == NULL) continue;
    count += fgets(name, sizeof name, file) != NULL && strcmp(name, "kedge-worker\n") == 0;
    fclose(file);
  }
  closedir(tasks);
  return count;
}

static void wait_for_workers(void) {
  for (int i = 0; i < 5000 && count_workers() < team_threads - 1; i++) usleep(1000); /* they name themselves */
  CHECK(count_workers() == team_threads - 1);
}

/* A worker that faults must find the application's handler, and get no other signal. */
static int32_t look_at_mask(void *closure, int64_t begin, int64_t end) {
  sigset_t mask;
  if (pthread_equal(pthread_self(), main_thread) || begin == end || pthread_sigmask(SIG_SETMASK, NULL, &mask) != 0) return 0;
  bool right = !sigismember(&mask, SIGSEGV) && !sigismember(&mask, SIGABRT) && sigismember(&mask, SIGINT);
  *(_Atomic int *)closure = right ? 1 : 2;
  return 0;
}

static void faults_are_seen(void) {
  kedge_team team;
  kedge_frame frame = frame_of(&team, &no_cancel);
  _Atomic int seen = 0;
  main_thread = pthread_self();
  /* A loop this short is over before a worker wakes up, unless the machine lets one: for a minute it may. */
  for (time_t end = time(NULL) + 60; seen == 0 && time(NULL) < end;) frame.api->parallel_for(&frame, look_at_mask, &seen, 2);
  CHECK(seen == 1);
}

static int32_t add_up(void *closure, int64_t begin, int64_t end) {
  if (begin < 0 || begin >= end) return 99;
  atomic_fetch_add((_Atomic uint64_t *)closure, (uint64_t)(end - begin));
  return 0;
}

static void extreme_loops(void) {
  static const int64_t extents[] = {INT64_MIN, -1, 0, 1, 2, 3, INT64_MAX - 1, INT64_MAX};
  static const int64_t chunks[] = {0, 1, 2, INT64_MAX / 300, INT64_MAX / 2, INT64_MAX - 1, INT64_MAX};
  kedge_team team;
  kedge_frame frame = frame_of(&team, &no_cancel);
  for (size_t e = 0; e < sizeof extents / sizeof *extents; e++) {
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
      if (extents[e] > 3 && (chunks[c] == 1 || chunks[c] == 2)) continue; /* centuries */
      _Atomic uint64_t sum = 0;
      CHECK(run(&frame, add_up, &sum, extents[e], chunks[c]) == KEDGE_OK);
      CHECK(sum == (extents[e] > 0 ? (uint64_t)extents[e] : 0));
    }
  }
  CHECK(frame.api->parallel_for_dynamic(&frame, add_up, NULL, 5, 0) == KEDGE_E_ARGUMENT);
  CHECK(strcmp(kedge_last_error(), "chunk is 0, expected at least 1") == 0);
}

enum { STOP_AT = 100 };

static int32_t fail_there(void *closure, int64_t begin, int64_t end) {
  (void)closure;
  return begin <= STOP_AT && STOP_AT < end ? 55 : 0;
}

static int32_t cancel_there(void *closure, int64_t begin, int64_t end) {
  if (begin <= STOP_AT && STOP_AT < end) __atomic_store_n((int32_t *)closure, 1, __ATOMIC_RELAXED);
  return 0;
}

/* So many chunks that the loops end only because they are stopped. */
static void stopped_loops(void) {
  int32_t cancel = 0;
  kedge_team team;
  kedge_frame frame = frame_of(&team, &cancel);
  CHECK(run(&frame, fail_there, NULL, INT64_MAX, 1) == KEDGE_E_KERNEL);
  CHECK(run(&frame, cancel_there, &cancel, INT64_MAX, 1) == KEDGE_E_CANCELLED);
  _Atomic uint64_t sum = 0; /* cancelled before: nothing begins */
  CHECK(run(&frame, add_up, &sum, 1000, 0) == KEDGE_E_CANCELLED);
  CHECK(run(&frame, add_up, &sum, 1000, 1) == KEDGE_E_CANCELLED);
  CHECK(sum == 0);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  int callers = atoi(argv[1]);
  team_threads = 1;
  n_loops = 20;
  call_loops((void *)1);
  CHECK(count_workers() == 0); /* one thread needs no other */
  team_threads = atoi(argv[2]);
  n_loops = atoi(argv[3]);
  pthread_t threads[64];
  for (int i = 0; i < callers; i++) CHECK(pthread_create(&threads[i], NULL, call_loops, (void *)(uintptr_t)(i + 1)) == 0);
  for (int i = 0; i < callers; i++) pthread_join(threads[i], NULL);
  wait_for_workers(); /* one pool, whatever the number of callers */
  faults_are_seen();

  extreme_loops();
  stopped_loops();

  kedge_team before;
  kedge_frame frame_before = frame_of(&before, &no_cancel);
  pid_t child = fork(); /* a child has none of the workers, must not wait for them, and gets its own */
  if (child == 0) {
    work *w = calloc(1, sizeof *w);
    w->frame = &frame_before;
    run_loop(w, MAX_EXTENT, MAX_EXTENT, 0); /* by a context from before the fork */
    wait_for_workers();
    n_loops = 20;
    call_loops((void *)3);
    _exit(0);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  printf("ok\n");
  return 0;
}
