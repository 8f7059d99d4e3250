/* A module as the compiler would make it, written by hand: one function that is right and several that go wrong. */
#include <stdio.h>
#include <stdlib.h>
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
    FUNCTION("litter", litter, NOTHING), FUNCTION("weigh", add_weight, NOTHING),
};
static const kedge_function_desc *const FUNCTIONS[] = {&ALL[0], &ALL[1], &ALL[2], &ALL[3],
                                                       &ALL[4], &ALL[5], &ALL[6], &ALL[7]};
static const kedge_weight_desc WEIGHTS[] = {{"w", 0, 64}};

KEDGE_API const kedge_module_desc kedge_module = {
    KEDGE_MODULE_MAGIC, KEDGE_ABI_VERSION, sizeof(kedge_module_desc), "llvm -mtriple=x86_64-linux-gnu", FEATURES,
    FUNCTIONS, WEIGHTS, 64, 8, 1, kDLCPU, 0, NULL,
};
