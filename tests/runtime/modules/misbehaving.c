/* misbehaving.c: everything that code from elsewhere may do to the process that runs it. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "module.h"

static int32_t run_segfault(kedge_frame *f) {
  (void)f;
  *(volatile int *)8 = 1;
  return 0;
}
FUNCTION(segfault, .entry = run_segfault, .arena_size = EXPR(CONST(0)));

static int32_t run_forever(kedge_frame *f) { /* never looks at cancel */
  volatile uint64_t n = 1;
  while (n != 0) n |= f->struct_size;
  return KEDGE_OK;
}
FUNCTION(forever, .entry = run_forever, .arena_size = EXPR(CONST(0)));

static int32_t run_slow(kedge_frame *f) { /* a row of kernels: looks at cancel between them */
  while (*f->cancel == 0) usleep(200);
  return KEDGE_E_CANCELLED;
}
FUNCTION(slow, .entry = run_slow, .arena_size = EXPR(CONST(0)));

static int32_t run_big_arena(kedge_frame *f) { return f->arena != 0 ? KEDGE_OK : KEDGE_E_KERNEL; }
FUNCTION(big_arena, .entry = run_big_arena, .arena_size = EXPR(CONST(1ll << 40)));

static int32_t run_quit(kedge_frame *f) {
  (void)f;
  static const char text[] = "a last word\n";
  if (write(2, text, sizeof text - 1) < 0) return KEDGE_E_KERNEL;
  _exit(7);
}
FUNCTION(quit, .entry = run_quit, .arena_size = EXPR(CONST(0)));

static int32_t run_chatter(kedge_frame *f) { /* more on both streams than a pipe holds */
  (void)f;
  static const char line[] = "0123456789012345678901234567890123456789012345678901234567890123456789\n";
  for (int i = 0; i < 4000; i++) {
    if (write(1, line, sizeof line - 1) < 0 || write(2, line, sizeof line - 1) < 0) return KEDGE_E_KERNEL;
  }
  return KEDGE_OK;
}
FUNCTION(chatter, .entry = run_chatter, .arena_size = EXPR(CONST(0)));

static int32_t run_orphan(kedge_frame *f) { /* leaves a child behind that holds every descriptor, then crashes */
  if (fork() == 0) {
    for (;;) pause();
  }
  return run_segfault(f);
}
FUNCTION(orphan, .entry = run_orphan, .arena_size = EXPR(CONST(0)));

static int32_t run_scribble(kedge_frame *f) { /* writes to its input */
  ((float *)f->inputs[0])[0] = 1;
  return KEDGE_OK;
}
static const kedge_expr x_shape[] = {EXPR(SYMBOL(0))};
static const kedge_port x_port[] = {{"x", x_shape, 1, F32}};
static const kedge_symbol n_symbol[] = {{"N", 0, INT64_MAX, 0, 0}};
FUNCTION(scribble, .entry = run_scribble, .inputs = x_port, .symbols = n_symbol, .arena_size = EXPR(CONST(0)),
         .n_inputs = 1, .n_symbols = 1);

static int32_t run_copy(kedge_frame *f) {
  const float *x = f->inputs[0];
  float *y = f->outputs[0];
  for (int64_t i = 0; i < f->symbols[0]; i++) y[i] = x[i];
  return KEDGE_OK;
}
static const kedge_port y_port[] = {{"y", x_shape, 1, F32}};
FUNCTION(copy, .entry = run_copy, .inputs = x_port, .outputs = y_port, .symbols = n_symbol,
         .arena_size = EXPR(CONST(0)), .n_inputs = 1, .n_outputs = 1, .n_symbols = 1);

static int32_t run_grow(kedge_frame *f) { /* as code that allocates would */
  (void)f;
  static void *volatile kept; /* or a compiler may leave the allocation out */
  kept = malloc((size_t)3 << 30);
  return kept == 0 ? KEDGE_E_MEMORY : KEDGE_OK;
}
FUNCTION(grow, .entry = run_grow, .arena_size = EXPR(CONST(0)));

static void *nothing(void *unused) { return unused; }

static float refusal(long result) { return result < 0 ? (float)errno : 0; }

/* What an intruder would try first, as errno each; x has as many elements as there are attempts. */
static int32_t run_escape(kedge_frame *f) {
  float *y = f->outputs[0];
  pid_t child = fork();
  if (child == 0) _exit(0);
  if (child > 0) waitpid(child, NULL, 0);
  y[0] = refusal(child);
  y[1] = refusal(socket(AF_INET, SOCK_STREAM, 0));
  y[2] = refusal(socket(AF_UNIX, SOCK_STREAM, 0));
  y[3] = refusal(kill(getppid(), 0));
  y[4] = refusal(ptrace(PTRACE_PEEKUSER, getppid(), NULL, NULL)); /* not traced: ESRCH, once it is asked at all */
  char *const words[] = {"/nowhere", NULL};
  y[5] = refusal(syscall(SYS_execveat, -1, words[0], words, words, 0)); /* ENOENT, likewise */
  pthread_t thread;
  y[6] = (float)pthread_create(&thread, NULL, nothing, NULL);
  if (y[6] == 0) pthread_join(thread, NULL);
  struct rlimit limit = {1 << 20, 1 << 20};
  y[7] = refusal(setrlimit(RLIMIT_CORE, &limit));
  return KEDGE_OK;
}
FUNCTION(escape, .entry = run_escape, .inputs = x_port, .outputs = y_port, .symbols = n_symbol,
         .arena_size = EXPR(CONST(0)), .n_inputs = 1, .n_outputs = 1, .n_symbols = 1);

static int32_t run_abort(kedge_frame *f) {
  (void)f;
  abort();
}
FUNCTION(give_up, .entry = run_abort, .arena_size = EXPR(CONST(0)));

MODULE(&segfault, &forever, &slow, &big_arena, &quit, &chatter, &orphan, &scribble, &copy, &grow, &escape, &give_up);
