/* Code of artifacts for the fault suite: some that is right, quickly or slowly, and some that means harm. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kedge.h"

static int32_t add_one(kedge_frame *frame) {
  const float *x = frame->inputs[0];
  float *y = frame->outputs[0];
  for (int64_t i = 0; i < frame->symbols[0]; i++) y[i] = x[i] + 1.0f;
  return KEDGE_OK;
}

/* Takes as many milliseconds as x[1] says. */
static int32_t slowly(kedge_frame *frame) {
  long ms = (long)((const float *)frame->inputs[0])[1];
  struct timespec rest = {ms / 1000, ms % 1000 * 1000000};
  while (nanosleep(&rest, &rest) != 0) continue;
  return add_one(frame);
}

static int32_t segfault(kedge_frame *frame) {
  (void)frame;
  *(volatile int *)16 = 1;
  return KEDGE_OK;
}

static int32_t endless(kedge_frame *frame) {
  for (volatile int64_t i = 0;; i++) (void)frame;
}

/* Takes all memory that it is given, and uses a little of each piece. */
static int32_t hungry(kedge_frame *frame) {
  (void)frame;
  for (;;) {
    char *volatile piece = malloc((size_t)256 << 20); /* volatile, or a compiler sees that nobody needs it */
    if (piece == NULL) return KEDGE_E_MEMORY;
    piece[0] = 1;
  }
}

static int32_t bomb(kedge_frame *frame) {
  int born = 0;
  for (int i = 0; i < 500; i++) {
    pid_t child = i % 2 ? fork() : (pid_t)syscall(SYS_clone, 0, 0, 0, 0, 0);
    if (child == 0) {
      for (;;) fork();
    }
    born += child > 0;
  }
  return born ? KEDGE_E_KERNEL : add_one(frame);
}

/* Writes over whatever it can write to: among the open files is the channel that its results take. */
static int32_t scribble(kedge_frame *frame) {
  char rubbish[4096];
  memset(rubbish, 0xa5, sizeof rubbish);
  memset(frame->outputs[0], 0xa5, (size_t)frame->symbols[0] * sizeof(float));
  for (int fd = 0; fd < 64; fd++) {
    ssize_t ignored = write(fd, rubbish, sizeof rubbish);
    (void)ignored;
  }
  return KEDGE_OK;
}

static const kedge_expr_op N[] = {{KEDGE_EXPR_SYMBOL, 0}};
static const kedge_expr N_SHAPE[] = {{N, 1}};
static const kedge_port X[] = {{"x", N_SHAPE, 1, {kDLFloat, 32, 1}}};
static const kedge_port Y[] = {{"y", N_SHAPE, 1, {kDLFloat, 32, 1}}};
static const kedge_symbol SYMBOLS[] = {{"N", 1, INT64_MAX, 0, 0}};
static const kedge_expr_op NOTHING[] = {{KEDGE_EXPR_CONST, 0}};

#define FUNCTION(name) {sizeof(kedge_function_desc), #name, name, X, Y, SYMBOLS, {NOTHING, 1}, 1, 1, 1, 0}

static const kedge_function_desc ALL[] = {
    FUNCTION(add_one), FUNCTION(slowly), FUNCTION(segfault), FUNCTION(endless),
    FUNCTION(hungry),  FUNCTION(bomb),   FUNCTION(scribble),
};
static const kedge_function_desc *const FUNCTIONS[] = {&ALL[0], &ALL[1], &ALL[2], &ALL[3], &ALL[4], &ALL[5], &ALL[6]};
static const kedge_weight_desc WEIGHTS[] = {{"w", 0, 64}};

KEDGE_API const kedge_module_desc kedge_module = {
    KEDGE_MODULE_MAGIC, KEDGE_ABI_VERSION, sizeof(kedge_module_desc), "llvm -mtriple=x86_64-linux-gnu", FEATURES,
    FUNCTIONS, WEIGHTS, 64, 7, 1, kDLCPU, 0, NULL,
};
