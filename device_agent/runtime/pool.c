/* pool.c: the process's one thread pool, shared by all contexts.
 *
 * In static chunks a parallel loop is cut into one chunk per thread of its team, always at the same places, and worker
 * i gets the same chunk each time, so that it finds its data in its own cache. In dynamic chunks each thread of the
 * team takes the next chunk from a counter when it is through with its last. The caller takes part: it runs the first
 * chunk, or takes from the counter, and then takes back every letter that no worker has opened. So a loop ends even if
 * no worker ever runs, several contexts can share the workers without waiting for each other, and a worker that is late
 * costs nothing.
 *
 * Each worker has a mailbox, one word that holds a state and counts its letters (so that a letter is never taken for
 * another). Whoever moves the word out of POSTED, the worker or the caller, has the letter. A worker that finds
 * nothing spins for a moment, since the next loop of a model usually follows at once, then sleeps.
 *
 * Memory orders, for machines that reorder (ARM): what the caller wrote before the loop, the loop and the letter among
 * it, is published by the release that posts the letter, and seen after the acquire that takes it. What a worker
 * computed is published by its release on `pending`, and seen by the caller's acquire that finds nothing pending: each
 * subtraction goes on with the release sequence of those before, so the last one brings the work of all. The counter of
 * dynamic chunks only deals out numbers, and `outcome` only stops others early: both are relaxed. Sleepers cannot miss
 * their waker, since the state that says that they sleep is in the very word that the waker changes and that the futex
 * compares: no order between two words matters.
 *
 * Cache lines: a loop has one that all threads only read and one that they write; the chunk counter and `pending` share
 * the latter, so that who finds the counter used up already owns the line in which it says so.
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
enum { YIELD_NS = 5000 };                 /* who spins lets others on its CPU go first so often */

enum { EMPTY, CLAIMED, POSTED, BUSY, ASLEEP }; /* the low bits of a mailbox */
enum { STATE_BITS = 3, STATE_MASK = (1 << STATE_BITS) - 1 };
#define SLEEPING 0x80000000u /* in loop.pending: its caller sleeps */
#define CANCELLED INT64_MIN  /* as a loop's outcome: no result of a body */
#define CACHE_LINE 128       /* of some ARMs; many an x86 fetches its lines of 64 in pairs */

typedef struct {
  _Alignas(CACHE_LINE) kedge_loop_body body;
  void *closure;
  const volatile int32_t *cancel;
  int64_t extent;
  int64_t chunk;            /* iterations of a dynamic chunk; 0: static ones, which the letters tell */
  uint64_t n_chunks;        /* dynamic ones */
  _Atomic int64_t outcome;  /* 0 while all is well, else the first failure, or CANCELLED: no further chunk begins */
  _Alignas(CACHE_LINE) _Atomic uint64_t next; /* dynamic chunk; at most n_threads beyond n_chunks, so it cannot wrap */
  _Atomic uint32_t pending; /* letters that are not answered: workers that may still touch the loop */
} loop;

typedef struct {
  _Alignas(CACHE_LINE) _Atomic uint32_t mailbox;
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

/* Changes the state of a mailbox, unless it is no longer as it was. */
static bool move(worker *w, uint32_t mailbox, uint32_t state) {
  return atomic_compare_exchange_strong_explicit(&w->mailbox, &mailbox, with_state(mailbox, state), memory_order_acquire,
                                                 memory_order_relaxed);
}

/* Whether another chunk may begin. */
static bool goes_on(loop *l) {
  if (atomic_load_explicit(&l->outcome, memory_order_relaxed) != 0) return false;
  if (__atomic_load_n(l->cancel, __ATOMIC_RELAXED) == 0) return true;
  int64_t none = 0;
  atomic_compare_exchange_strong_explicit(&l->outcome, &none, CANCELLED, memory_order_relaxed, memory_order_relaxed);
  return false;
}

static void run_chunk(loop *l, int64_t begin, int64_t end) {
  int64_t none = 0, result = l->body(l->closure, begin, end);
  if (result == 0) return;
  atomic_compare_exchange_strong_explicit(&l->outcome, &none, result, memory_order_relaxed, memory_order_relaxed);
}

static void run_dynamic_chunks(loop *l) {
  while (goes_on(l)) {
    uint64_t i = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
    if (i >= l->n_chunks) return;
    int64_t begin = (int64_t)i * l->chunk;
    run_chunk(l, begin, l->extent - begin > l->chunk ? begin + l->chunk : l->extent);
  }
}

/* This thread's part of a loop: dynamic chunks while there are any, or the static one [begin, end). */
static void take_part(loop *l, int64_t begin, int64_t end) {
  bool outer = inside_loop;
  inside_loop = true;
  if (l->chunk > 0) {
    run_dynamic_chunks(l);
  } else if (goes_on(l)) {
    run_chunk(l, begin, end);
  }
  inside_loop = outer;
}

/* ---- Workers ------------------------------------------------------------------------------------------------ */

/* Takes the next letter; returns the mailbox as it was posted.
 *
 * The worker yields while it spins: on a busy machine the one whom it keeps from its CPU may be the very caller that
 * woke it.
 */
static uint32_t next_letter(worker *w) {
  int64_t until = -1, yielded = 0;
  uint32_t last = atomic_load_explicit(&w->mailbox, memory_order_relaxed);
  for (uint32_t i = 1;; i++) {
    uint32_t mailbox = atomic_load_explicit(&w->mailbox, memory_order_relaxed), state = mailbox & STATE_MASK;
    if (state == POSTED && move(w, mailbox, BUSY)) return mailbox;
    kedge_relax();
    if (i % SPIN_STEP != 0 || state != EMPTY) continue;
    int64_t now = kedge_now_ns();
    if (until < 0 || mailbox != last) until = now + atomic_load_explicit(&spin_ns, memory_order_relaxed);
    last = mailbox; /* letters that were taken back tell, too, that loops follow each other */
    if (now < until) {
      if (now - yielded >= YIELD_NS) {
        sched_yield();
        yielded = now;
      }
    } else if (move(w, mailbox, ASLEEP)) {
      uint32_t asleep = with_state(mailbox, ASLEEP);
      while (atomic_load_explicit(&w->mailbox, memory_order_relaxed) == asleep) kedge_wait_while(&w->mailbox, asleep);
      until = -1;
    }
  }
}

static void *worker_main(void *argument) {
  worker *w = argument;
  prctl(PR_SET_NAME, "kedge-worker");
  for (;;) {
    uint32_t mailbox = next_letter(w);
    loop *l = w->loop;
    take_part(l, w->begin, w->end);
    /* Free for the next loop before this one can end, so that a caller in a row of loops finds every worker. */
    atomic_store_explicit(&w->mailbox, with_state(mailbox, EMPTY), memory_order_release);
    /* The last touch: the loop lies on its caller's stack. Waking a word that is gone by then does no harm. */
    uint32_t pending = atomic_fetch_sub_explicit(&l->pending, 1, memory_order_release);
    if (pending == (SLEEPING | 1u)) kedge_wake_one(&l->pending);
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
  int32_t count = CPU_COUNT(&set), quota = kedge_cpu_quota("");
  count = quota < count ? quota : count;
  return count > 0 ? count : 1;
}

/* Starts what lacks for `wanted` threads on `cpus`, the caller's included; returns how many there are. */
static int32_t grow(int32_t wanted, int32_t cpus) {
  static bool watches_forks = false;
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
  int32_t started = grow(team->num_threads, cpus);
  if (started >= team->num_threads) return KEDGE_OK;
  return kedge_fail(KEDGE_E_MEMORY, "cannot start thread %d of %d", started + 1, team->num_threads);
}

/* ---- Callers ------------------------------------------------------------------------------------------------ */

static bool post(worker *w, loop *l, int64_t begin, int64_t end, letter *sent) {
  uint32_t mailbox = atomic_load_explicit(&w->mailbox, memory_order_relaxed);
  uint32_t state = mailbox & STATE_MASK;
  if ((state != EMPTY && state != ASLEEP) || !move(w, mailbox, CLAIMED)) return false;
  w->loop = l;
  w->begin = begin;
  w->end = end;
  uint32_t posted = with_state(mailbox + (1u << STATE_BITS), POSTED);
  *sent = (letter){w, posted};
  atomic_store_explicit(&w->mailbox, posted, memory_order_release);
  if (state == ASLEEP) kedge_wake_one(&w->mailbox);
  return true;
}

/* Posts to worker `first`, or the next below it that is free, going round; false when none is. */
static bool post_to_any(int32_t first, int32_t available, loop *l, int64_t begin, int64_t end, letter *sent) {
  for (int32_t i = first, tries = 0; tries < available; tries++, i = i == 0 ? available - 1 : i - 1) {
    if (i < available && post(&workers[i], l, begin, end, sent)) return true;
  }
  return false;
}

/* Does what the letters say that no worker has opened. */
static void take_back(loop *l, const letter *letters, int32_t count) {
  uint32_t taken = 0;
  for (int32_t i = count - 1; i >= 0; i--) {
    worker *w = letters[i].worker;
    uint32_t mailbox = letters[i].mailbox; /* look first: a try takes the line from the worker */
    if (atomic_load_explicit(&w->mailbox, memory_order_relaxed) != mailbox || !move(w, mailbox, CLAIMED)) continue;
    int64_t begin = w->begin, end = w->end;
    atomic_store_explicit(&w->mailbox, with_state(mailbox, EMPTY), memory_order_release);
    if (l->chunk == 0) take_part(l, begin, end);
    taken++;
  }
  if (taken > 0) atomic_fetch_sub_explicit(&l->pending, taken, memory_order_relaxed);
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

/* Runs a loop on this thread and at most `threads` - 1 workers. */
static int32_t share(loop *l, const kedge_team *team, int64_t threads) {
  letter letters[MAX_WORKERS];
  int32_t available = atomic_load_explicit(&n_workers, memory_order_acquire), posted = 0;
  if (available == 0 && atomic_exchange(&forked, false)) available = grow(team->num_threads, kedge_usable_cpus()) - 1;
  atomic_init(&l->pending, (uint32_t)threads - 1);
  int64_t size = l->extent / threads, larger = l->extent % threads; /* the first `larger` chunks take one more */
  int64_t end = l->extent;
  for (int64_t part = threads - 1; part > 0; part--) {
    int64_t begin = end - size - (part < larger);
    if (!post_to_any((int32_t)part - 1, available, l, begin, end, &letters[posted])) break;
    posted++;
    end = begin;
  } /* where every worker has something to do, the rest is the caller's */
  uint32_t unsent = (uint32_t)(threads - 1 - posted);
  if (unsent > 0) atomic_fetch_sub_explicit(&l->pending, unsent, memory_order_relaxed);
  take_part(l, 0, end);
  take_back(l, letters, posted);
  wait_for_workers(l);
  int64_t outcome = atomic_load_explicit(&l->outcome, memory_order_relaxed);
  return outcome == CANCELLED ? KEDGE_E_CANCELLED : kernel_failed((int32_t)outcome);
}

static int32_t parallel_for(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent) {
  const kedge_team *team = frame->pool;
  int64_t threads = team == NULL ? 1 : team->num_threads;
  if (threads > extent) threads = extent;
  if (extent <= 0) return KEDGE_OK;
  if (threads <= 1 || inside_loop) return kernel_failed(body(closure, 0, extent));
  loop l = {.body = body, .closure = closure, .cancel = frame->cancel, .extent = extent};
  return share(&l, team, threads);
}

static int32_t parallel_for_dynamic(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent,
                                    int64_t chunk) {
  if (chunk < 1) return kedge_fail(KEDGE_E_ARGUMENT, "chunk is %lld, expected at least 1", (long long)chunk);
  const kedge_team *team = frame->pool;
  int64_t threads = team == NULL ? 1 : team->num_threads;
  if (extent <= 0) return KEDGE_OK;
  uint64_t n_chunks = ((uint64_t)extent - 1) / (uint64_t)chunk + 1;
  if ((uint64_t)threads > n_chunks) threads = (int64_t)n_chunks;
  if (threads <= 1 || inside_loop) return kernel_failed(body(closure, 0, extent));
  loop l = {.body = body, .closure = closure, .cancel = frame->cancel, .extent = extent, .chunk = chunk,
            .n_chunks = n_chunks};
  return share(&l, team, threads);
}

const kedge_runtime_api kedge_api = {
    .struct_size = sizeof(kedge_runtime_api),
    .parallel_for = parallel_for,
    .parallel_for_dynamic = parallel_for_dynamic,
    .fail = kedge_fail_external,
    .launch = kedge_launch_kernel,
    .mark = kedge_mark,
};
