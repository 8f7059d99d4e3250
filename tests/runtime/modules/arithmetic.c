/* arithmetic.c: functions that compute something, over fixed and free dims, weights, the arena and parallel loops. */
#define WEIGHTS_SIZE 64 /* 16 floats */
#include "module.h"

/* ---- main: y[N, 4] = x[N, 8] @ W[8, 2] twice side by side, W being the weights ------------------------------- */
typedef struct {
  const float *x, *w;
  float *y;
} matmul;

static int32_t matmul_rows(void *closure, int64_t begin, int64_t end) {
  matmul *m = closure;
  for (int64_t i = begin; i < end; i++) {
    for (int j = 0; j < 4; j++) {
      float sum = 0;
      for (int k = 0; k < 8; k++) sum += m->x[i * 8 + k] * m->w[k * 2 + j % 2];
      m->y[i * 4 + j] = sum;
    }
  }
  return 0;
}

static int32_t run_main(kedge_frame *f) {
  matmul m = {f->inputs[0], (const float *)f->weights, f->outputs[0]};
  return f->api->parallel_for(f, matmul_rows, &m, f->symbols[0]);
}

static const kedge_expr x_shape[] = {EXPR(SYMBOL(0)), EXPR(CONST(8))};
static const kedge_expr y_shape[] = {EXPR(SYMBOL(0)), EXPR(CONST(4))};
static const kedge_port main_inputs[] = {{"x", x_shape, 2, F32}};
static const kedge_port main_outputs[] = {{"y", y_shape, 2, F32}};
static const kedge_symbol n_symbol[] = {{"N", 1, 1 << 20, 0, 0}};
static const kedge_function_desc main_function = {
    .struct_size = sizeof(kedge_function_desc), .name = "main", .entry = run_main,
    .inputs = main_inputs, .outputs = main_outputs, .symbols = n_symbol,
    .arena_size = EXPR(CONST(0)), .n_inputs = 1, .n_outputs = 1, .n_symbols = 1};

/* ---- join: c[N + M, 2*N] of int64 filled with N*100 + M, through the arena ------------------------------------ */
static int32_t run_join(kedge_frame *f) {
  int64_t n = f->symbols[0], m = f->symbols[1], *scratch = (int64_t *)f->arena, *out = f->outputs[0];
  for (int64_t i = 0; i < (n + m) * 2 * n; i++) scratch[i] = n * 100 + m;
  for (int64_t i = 0; i < (n + m) * 2 * n; i++) out[i] = scratch[i];
  return (uintptr_t)f->arena % KEDGE_ALIGNMENT == 0 ? KEDGE_OK : KEDGE_E_KERNEL;
}
static const kedge_expr a_shape[] = {EXPR(SYMBOL(0))};
static const kedge_expr b_shape[] = {EXPR(SYMBOL(1)), EXPR(SYMBOL(0), CONST(2), {KEDGE_EXPR_MUL, 0})};
static const kedge_expr c_shape[] = {EXPR(SYMBOL(0), SYMBOL(1), {KEDGE_EXPR_ADD, 0}),
                                     EXPR(CONST(2), SYMBOL(0), {KEDGE_EXPR_MUL, 0})};
static const kedge_port join_inputs[] = {{"a", a_shape, 1, F32}, {"b", b_shape, 2, F32}};
static const kedge_port join_outputs[] = {{"c", c_shape, 2, I64}};
static const kedge_symbol join_symbols[] = {{"N", 0, INT64_MAX, 0, 0}, {"M", 0, INT64_MAX, 1, 0}};
FUNCTION(join, .entry = run_join, .inputs = join_inputs, .outputs = join_outputs, .symbols = join_symbols,
         .arena_size = EXPR(SYMBOL(0), SYMBOL(1), {KEDGE_EXPR_ADD, 0}, SYMBOL(0), {KEDGE_EXPR_MUL, 0}, CONST(16),
                            {KEDGE_EXPR_MUL, 0}),
         .n_inputs = 2, .n_outputs = 1, .n_symbols = 2);

/* ---- ramp: out[n[0]-many], by a parallel loop in a parallel loop; counts how often each element was written ---- */
typedef struct {
  kedge_frame *frame;
  float *out;
} ramp_closure;

static int32_t ramp_inner(void *closure, int64_t begin, int64_t end) {
  float *out = closure;
  for (int64_t i = begin; i < end; i++) out[i] += (float)i;
  return 0;
}

static int32_t ramp_outer(void *closure, int64_t begin, int64_t end) {
  ramp_closure *r = closure;
  for (int64_t i = begin; i < end; i++) {
    int32_t status = r->frame->api->parallel_for(r->frame, ramp_inner, r->out + i * 64, 64);
    if (status != 0) return status;
  }
  return 0;
}

static int32_t run_ramp(kedge_frame *f) {
  ramp_closure r = {f, f->outputs[0]};
  for (int64_t i = 0; i < f->symbols[0] * 64; i++) r.out[i] = 1;
  return f->api->parallel_for(f, ramp_outer, &r, f->symbols[0]);
}
static const kedge_expr ramp_shape[] = {EXPR(SYMBOL(0)), EXPR(CONST(64))};
static const kedge_port ramp_outputs[] = {{"out", ramp_shape, 2, F32}};
FUNCTION(ramp, .entry = run_ramp, .inputs = join_inputs, .outputs = ramp_outputs, .symbols = n_symbol,
         .arena_size = EXPR(CONST(0)), .n_inputs = 1, .n_outputs = 1, .n_symbols = 1);

/* ---- fail: a kernel in a parallel loop fails ------------------------------------------------------------------ */
static int32_t fail_body(void *closure, int64_t begin, int64_t end) {
  (void)closure;
  return begin <= 3 && 3 < end ? 17 : 0;
}
static int32_t run_fail(kedge_frame *f) { return f->api->parallel_for(f, fail_body, 0, 8); }
FUNCTION(fail, .entry = run_fail, .arena_size = EXPR(CONST(0)));

/* ---- huge: an output whose size overflows for N > 1 ----------------------------------------------------------- */
static int32_t run_huge(kedge_frame *f) { return f->outputs[0] != 0 ? KEDGE_OK : KEDGE_E_KERNEL; }
static const kedge_expr huge_shape[] = {EXPR(SYMBOL(0), CONST(INT64_MAX / 2), {KEDGE_EXPR_MUL, 0}), EXPR(CONST(4))};
static const kedge_port huge_outputs[] = {{"out", huge_shape, 2, F32}};
FUNCTION(huge, .entry = run_huge, .inputs = join_inputs, .outputs = huge_outputs, .symbols = n_symbol,
         .arena_size = EXPR(CONST(0)), .n_inputs = 1, .n_outputs = 1, .n_symbols = 1);

MODULE(&main_function, &join, &ramp, &fail, &huge);
