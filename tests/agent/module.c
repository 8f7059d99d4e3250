/* A module as the compiler would make it, written by hand: one function that is right and several that go wrong. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kedge.h"

static int32_t add_one(kedge_frame *frame) {
  const float *x = frame->inputs[0];
  float *y = frame->outputs[0];
  for (int64_t i = 0; i < frame->symbols[0]; i++) y[i] = x[i] + 1.0f;
  return KEDGE_OK;
}

static int32_t crash(kedge_frame *frame) {
  (void)frame;
  *(volatile int *)16 = 1;
  return KEDGE_OK;
}

static int32_t leave(kedge_frame *frame) {
  (void)frame;
  fputs("leaving for good\n", stderr);
  _exit(7);
}

static int32_t spin(kedge_frame *frame) {
  volatile const int32_t *never = frame->cancel;
  for (volatile int64_t i = 0;; i++) (void)never;
}

/* Never ends either, and costs nothing. */
static int32_t linger(kedge_frame *frame) {
  (void)frame;
  for (;;) pause();
}

static int32_t refuse(kedge_frame *frame) {
  (void)frame;
  return KEDGE_E_KERNEL;
}

/* Leaves a file in its working directory and a process behind; the output is that process's id. */
static int32_t litter(kedge_frame *frame) {
  FILE *file = fopen("left-behind", "w");
  if (file == NULL) return KEDGE_E_KERNEL;
  fclose(file);
  pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  ((float *)frame->outputs[0])[0] = (float)child;
  return KEDGE_OK;
}

/* y = x + the first weight. */
static int32_t add_weight(kedge_frame *frame) {
  const float *x = frame->inputs[0], *w = (const float *)frame->weights;
  float *y = frame->outputs[0];
  for (int64_t i = 0; i < frame->symbols[0]; i++) y[i] = x[i] + w[0];
  return KEDGE_OK;
}

static float tried(const char *path, int flags) {
  int fd = open(path, flags, 0600);
  if (fd < 0) return (float)errno;
  close(fd);
  return 0;
}

/* x is a path, a character each; y is what came of reading it, writing to it, and making a file beside it. */
static int32_t pry(kedge_frame *frame) {
  const float *x = frame->inputs[0];
  float *y = frame->outputs[0];
  char path[4096] = "";
  for (int64_t i = 0; i < frame->symbols[0] && i < 4000; i++) path[i] = (char)x[i];
  memset(y, 0, sizeof *y * (size_t)frame->symbols[0]);
  y[0] = tried(path, O_RDONLY);
  y[1] = tried(path, O_WRONLY);
  strcat(path, ".new");
  y[2] = tried(path, O_WRONLY | O_CREAT);
  return KEDGE_OK;
}

/* x is a process and a port; y is what came of a signal, of tracing, of connecting, and who this is. */
static int32_t reach(kedge_frame *frame) {
  const float *x = frame->inputs[0];
  float *y = frame->outputs[0];
  y[0] = kill((pid_t)x[0], 0) == 0 ? 0 : (float)errno;
  y[1] = ptrace(PTRACE_SEIZE, (pid_t)x[0], NULL, NULL) == 0 ? 0 : (float)errno;
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)x[1])};
  inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  y[2] = fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) == 0 ? 0 : (float)errno;
  y[3] = (float)geteuid();
  return KEDGE_OK;
}

/* Uses as many MiB as x says, one after the other. */
static int32_t eat(kedge_frame *frame) {
  const float *x = frame->inputs[0];
  float *y = frame->outputs[0];
  for (int64_t i = 0; i < (int64_t)x[0]; i++) {
    volatile char *more = malloc(1 << 20);
    if (more == NULL) return KEDGE_E_MEMORY;
    for (int at = 0; at < 1 << 20; at += 4096) more[at] = 1;
    y[0] = (float)i;
  }
  return KEDGE_OK;
}

/* Forks until it is refused, or x[0] times; y is how often that went well. The children stay. */
static int32_t swarm(kedge_frame *frame) {
  float *y = frame->outputs[0];
  y[0] = 0;
  for (int i = 0; i < (int)((const float *)frame->inputs[0])[0]; i++) {
    pid_t child = fork();
    if (child < 0) break;
    if (child == 0) {
      setsid();
      for (;;) pause();
    }
    y[0]++;
  }
  return KEDGE_OK;
}

static const kedge_expr_op N[] = {{KEDGE_EXPR_SYMBOL, 0}};
static const kedge_expr N_SHAPE[] = {{N, 1}};
static const kedge_port X[] = {{"x", N_SHAPE, 1, {kDLFloat, 32, 1}}};
static const kedge_port Y[] = {{"y", N_SHAPE, 1, {kDLFloat, 32, 1}}};
static const kedge_symbol SYMBOLS[] = {{"N", 1, INT64_MAX, 0, 0}};
static const kedge_expr_op NOTHING[] = {{KEDGE_EXPR_CONST, 0}};
static const kedge_expr_op TOO_MUCH[] = {{KEDGE_EXPR_CONST, (int64_t)1 << 46}};

#define FUNCTION(name, entry, arena) \
  {sizeof(kedge_function_desc), name, entry, X, Y, SYMBOLS, {arena, 1}, 1, 1, 1, 0}

static const kedge_function_desc ALL[] = {
    FUNCTION("add", add_one, NOTHING),  FUNCTION("crash", crash, NOTHING),   FUNCTION("leave", leave, NOTHING),
    FUNCTION("spin", spin, NOTHING),    FUNCTION("refuse", refuse, NOTHING), FUNCTION("hog", add_one, TOO_MUCH),
    FUNCTION("litter", litter, NOTHING), FUNCTION("weigh", add_weight, NOTHING), FUNCTION("pry", pry, NOTHING),
    FUNCTION("reach", reach, NOTHING),  FUNCTION("eat", eat, NOTHING),       FUNCTION("swarm", swarm, NOTHING),
    FUNCTION("linger", linger, NOTHING),
};
static const kedge_function_desc *const FUNCTIONS[] = {&ALL[0], &ALL[1], &ALL[2], &ALL[3],
                                                       &ALL[4], &ALL[5], &ALL[6], &ALL[7],
                                                       &ALL[8], &ALL[9], &ALL[10], &ALL[11],
                                                       &ALL[12]};
static const kedge_weight_desc WEIGHTS[] = {{"w", 0, 64}};

KEDGE_API const kedge_module_desc kedge_module = {
    KEDGE_MODULE_MAGIC, KEDGE_ABI_VERSION, sizeof(kedge_module_desc), "llvm -mtriple=x86_64-linux-gnu", FEATURES,
    FUNCTIONS, WEIGHTS, 64, 13, 1, kDLCPU, 0, NULL,
};
