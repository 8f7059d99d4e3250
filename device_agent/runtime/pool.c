/* pool.c: the process's one thread pool, shared by all contexts.
 *
 * A parallel loop is cut into one chunk per thread of its team, always at the same places, and worker i gets the same
 * chunk each time, so that it finds its data in its own cache. The caller takes part: it runs the first chunk, then
 * takes back every chunk that no worker has begun. So a loop ends even if no worker ever runs, several contexts can
 * share the workers without waiting for each other, and a worker that is late costs nothing.
 *
 * Each worker has a mailbox, one word that holds a state and counts its letters (so that a letter is never taken for
 * another). Whoever moves the word out of POSTED, the worker or the caller, runs the chunk. A worker that finds
 * nothing spins for a moment, since the next loop of a model usually follows at once, then sleeps.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

#include "internal.h"

enum { MAX_WORKERS = 255 };
enum { STACK_BYTES = 4 << 20 };           /* kernels keep small tiles on the stack; limits count address space */
enum { SPIN_NS = 50000, SPIN_STEP = 64 }; /* look at the clock once in so many looks at the mailbox */

enum { EMPTY, CLAIMED, POSTED, BUSY, ASLEEP }; /* the low bits of a mailbox */
enum { STATE_BITS = 3, STATE_MASK = (1 << STATE_BITS) - 1 };
#define SLEEPING 0x80000000u /* in loop.pending: its caller sleeps */

typedef struct {
  kedge_loop_body body;
  void *closure;
  _Atomic uint32_t pending; /* chunks that workers have not finished */
  _Atomic int32_t error;    /* the first one */
} loop;

typedef struct {
  _Alignas(KEDGE_ALIGNMENT) _Atomic uint32_t mailbox;
  loop *loop;
  int64_t begin, end;
} worker;

typedef struct {
  worker *worker;
  uint32_t mailbox; /* as it was when posted */
} letter;

static worker workers[MAX_WORKERS];
static _Atomic int32_t n_workers;
static _Atomic int64_t spin_ns; /* 0 when there are more threads than CPUs: who spins then keeps another from working */
static pthread_mutex_t grow_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic bool forked; /* contexts from before the fork expect workers that are not there yet */
static _Thread_local bool inside_loop;

static uint32_t with_state(uint32_t mailbox, uint32_t state) { return (mailbox & ~(uint32_t)STATE_MASK) | state; }

static void run_chunk(loop *l, int64_t begin, int64_t end) {
  bool outer = inside_loop;
  inside_loop = true;
  int32_t result = l->body(l->closure, begin, end);
  inside_loop = outer;
  int32_t none = 0;
  if (result != 0) atomic_compare_exchange_strong(&l->error, &none, result);
}

/* ---- Workers ------------------------------------------------------------------------------------------------ */

static void wait_for_letter(worker *w) {
  int64_t until = -1;
  for (uint32_t i = 1;; i++) {
    uint32_t mailbox = atomic_load_explicit(&w->mailbox, memory_order_acquire);
    if ((mailbox & STATE_MASK) == POSTED) return;
    kedge_relax();
    if (i % SPIN_STEP != 0 || (mailbox & STATE_MASK) != EMPTY) continue;
    int64_t now = kedge_now_ns();
    if (until < 0) until = now + atomic_load_explicit(&spin_ns, memory_order_relaxed);
    if (now < until) continue;
    uint32_t asleep = with_state(mailbox, ASLEEP);
    if (atomic_compare_exchange_strong(&w->mailbox, &mailbox, asleep)) {
      while (atomic_load_explicit(&w->mailbox, memory_order_acquire) == asleep) kedge_wait_while(&w->mailbox, asleep);
      until = -1;
    }
  }
}

static void *worker_main(void *argument) {
  worker *w = argument;
  prctl(PR_SET_NAME, "kedge-worker");
  for (;;) {
    wait_for_letter(w);
    uint32_t mailbox = atomic_load_explicit(&w->mailbox, memory_order_acquire);
    if ((mailbox & STATE_MASK) != POSTED) continue; /* taken back */
    if (!atomic_compare_exchange_strong(&w->mailbox, &mailbox, with_state(mailbox, BUSY))) continue;
    loop *l = w->loop;
    run_chunk(l, w->begin, w->end);
    /* Free for the next loop before this one can end, so that a caller in a row of loops finds every worker. */
    atomic_store_explicit(&w->mailbox, with_state(mailbox, EMPTY), memory_order_release);
    /* The last touch: the loop lies on its caller's stack. Waking a word that is gone by then does no harm. */
    if (atomic_fetch_sub(&l->pending, 1) == (SLEEPING | 1u)) kedge_wake_one(&l->pending);
  }
  return NULL;
}

static void forget_workers(void) { /* in the child of a fork, which has none of them */
  atomic_store(&n_workers, 0);
  for (int32_t i = 0; i < MAX_WORKERS; i++) atomic_store(&workers[i].mailbox, EMPTY);
  pthread_mutex_init(&grow_lock, NULL);
  inside_loop = false;
  atomic_store(&forked, true);
}

static bool start_worker(worker *w) {
  static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS};
  pthread_t thread;
  pthread_attr_t attributes;
  sigset_t all, before;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  sigfillset(&all); /* signals belong to the application's threads, but for a worker's own faults: their handlers see */
  for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool started = pthread_create(&thread, &attributes, worker_main, w) == 0;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return started;
}

int32_t kedge_usable_cpus(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  int count = CPU_COUNT(&set);
  return count > 0 ? count : 1;
}

/* Starts what lacks for `wanted` threads, the caller's included; returns how many there are. */
static int32_t grow(int32_t wanted) {
  static bool watches_forks = false;
  int32_t cpus = kedge_usable_cpus();
  pthread_mutex_lock(&grow_lock);
  int32_t count = atomic_load(&n_workers);
  if (!watches_forks && wanted > 1) watches_forks = pthread_atfork(NULL, NULL, forget_workers) == 0;
  while (count < wanted - 1 && start_worker(&workers[count])) atomic_store(&n_workers, ++count);
  atomic_store(&spin_ns, count + 1 > cpus ? 0 : SPIN_NS);
  pthread_mutex_unlock(&grow_lock);
  return count + 1;
}

int32_t kedge_team_init(kedge_team *team, int32_t num_threads) {
  if (num_threads < 0 || num_threads > MAX_WORKERS + 1) {
    return kedge_fail(KEDGE_E_ARGUMENT, "num_threads is %d, expected 0 to %d", num_threads, MAX_WORKERS + 1);
  }
  int32_t cpus = kedge_usable_cpus();
  team->num_threads = num_threads > 0 ? num_threads : cpus < MAX_WORKERS + 1 ? cpus : MAX_WORKERS + 1;
  int32_t started = grow(team->num_threads);
  if (started >= team->num_threads) return KEDGE_OK;
  return kedge_fail(KEDGE_E_MEMORY, "cannot start thread %d of %d", started + 1, team->num_threads);
}

/* ---- Callers ------------------------------------------------------------------------------------------------ */

static bool post(worker *w, loop *l, int64_t begin, int64_t end, letter *sent) {
  uint32_t mailbox = atomic_load_explicit(&w->mailbox, memory_order_relaxed);
  uint32_t state = mailbox & STATE_MASK;
  if (state != EMPTY && state != ASLEEP) return false;
  if (!atomic_compare_exchange_strong(&w->mailbox, &mailbox, with_state(mailbox, CLAIMED))) return false;
  w->loop = l;
  w->begin = begin;
  w->end = end;
  atomic_fetch_add_explicit(&l->pending, 1, memory_order_relaxed);
  uint32_t posted = with_state(mailbox + (1u << STATE_BITS), POSTED);
  *sent = (letter){w, posted};
  atomic_store(&w->mailbox, posted);
  if (state == ASLEEP) kedge_wake_one(&w->mailbox);
  return true;
}

/* Runs the chunks that no worker has begun. */
static void take_back(loop *l, const letter *letters, int32_t count) {
  for (int32_t i = count - 1; i >= 0; i--) {
    worker *w = letters[i].worker;
    uint32_t mailbox = letters[i].mailbox;
    if (!atomic_compare_exchange_strong(&w->mailbox, &mailbox, with_state(mailbox, CLAIMED))) continue;
    int64_t begin = w->begin, end = w->end;
    atomic_store_explicit(&w->mailbox, with_state(mailbox, EMPTY), memory_order_release);
    run_chunk(l, begin, end);
    atomic_fetch_sub(&l->pending, 1);
  }
}

static void wait_for_workers(loop *l) {
  int64_t until = -1;
  for (uint32_t i = 1;; i++) {
    uint32_t pending = atomic_load_explicit(&l->pending, memory_order_acquire);
    if ((pending & ~SLEEPING) == 0) return;
    kedge_relax();
    if (i % SPIN_STEP != 0) continue;
    int64_t now = kedge_now_ns();
    if (until < 0) until = now + atomic_load_explicit(&spin_ns, memory_order_relaxed);
    if (now < until) continue;
    if ((pending & SLEEPING) == 0 && !atomic_compare_exchange_strong(&l->pending, &pending, pending | SLEEPING)) continue;
    kedge_wait_while(&l->pending, pending | SLEEPING);
  }
}

static int32_t kernel_failed(int32_t result) {
  return result == 0 ? KEDGE_OK : kedge_fail(KEDGE_E_KERNEL, "a parallel loop failed with %d", result);
}

static int32_t parallel_for(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent) {
  const kedge_team *team = frame->pool;
  int64_t threads = team == NULL ? 1 : team->num_threads;
  if (threads > extent) threads = extent;
  if (extent <= 0) return KEDGE_OK;
  if (threads <= 1 || inside_loop) return kernel_failed(body(closure, 0, extent));
  loop l = {.body = body, .closure = closure};
  letter letters[MAX_WORKERS];
  int32_t available = atomic_load_explicit(&n_workers, memory_order_acquire), posted = 0;
  if (available == 0 && atomic_exchange(&forked, false)) available = grow(team->num_threads) - 1;
  int64_t size = extent / threads, larger = extent % threads; /* the first `larger` chunks take one more */
  int64_t end = extent;
  for (int64_t chunk = threads - 1; chunk > 0 && end > 0; chunk--) {
    int64_t begin = end - size - (chunk < larger);
    for (int32_t i = (int32_t)chunk - 1, tries = 0; tries < available; tries++, i = i == 0 ? available - 1 : i - 1) {
      if (i < available && post(&workers[i], &l, begin, end, &letters[posted])) {
        posted++;
        end = begin;
        break;
      }
    }
    if (end != begin) break; /* every worker has something to do: the rest is the caller's */
  }
  run_chunk(&l, 0, end);
  take_back(&l, letters, posted);
  wait_for_workers(&l);
  return kernel_failed(atomic_load_explicit(&l.error, memory_order_relaxed));
}

const kedge_runtime_api kedge_api = {
    .struct_size = sizeof(kedge_runtime_api),
    .parallel_for = parallel_for,
    .fail = kedge_fail_external,
};
