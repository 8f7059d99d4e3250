/* gpu.c: functions whose kernels run on a GPU: in PTX with -DCUDA, else in OpenCL C.
 *
 * Variants to be refused: -DBROKEN (code that does not compile), -DNEEDS='"…"' (a feature), -DPARAMETERS=n (of `add`).
 */
#ifdef CUDA
#define DEVICE kDLCUDA
#else
#define DEVICE kDLOpenCL
#endif
#define N_KERNELS 5
#define KERNELS kernels
#define WEIGHTS_SIZE 128 /* two times 16 floats */
#include "module.h"

#ifndef NEEDS
#define NEEDS ""
#endif
#ifndef PARAMETERS
#define PARAMETERS 1
#endif

/* ---- Kernels ------------------------------------------------------------------------------------------------- */
#ifdef CUDA
#define HEAD ".version 6.0\n.target sm_50\n.address_size 64\n"
#define DECLARE                                                                                              \
  "{\n.reg .pred %p<2>;\n.reg .b32 %r<12>;\n.reg .b64 %d<12>;\n.reg .f32 %f<4>;\n"
#define ITEM "mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %ntid.x;\nmov.u32 %r2, %tid.x;\nmad.lo.u32 %r3, %r0, %r1, %r2;\n"
static const char code[] = HEAD
#ifdef BROKEN
    "this_is_no_instruction;\n"
#endif
    ".visible .entry add(.param .u64 a, .param .u64 b, .param .u64 y, .param .s64 n)\n" DECLARE ITEM
    "cvt.u64.u32 %d0, %r3;\nld.param.s64 %d1, [n];\nsetp.ge.s64 %p0, %d0, %d1;\n@%p0 bra DONE;\n"
    "ld.param.u64 %d2, [a];\nld.param.u64 %d3, [b];\nld.param.u64 %d4, [y];\nshl.b64 %d5, %d0, 2;\n"
    "add.u64 %d2, %d2, %d5;\nadd.u64 %d3, %d3, %d5;\nadd.u64 %d4, %d4, %d5;\n"
    "ld.global.f32 %f0, [%d2];\nld.global.f32 %f1, [%d3];\nadd.f32 %f2, %f0, %f1;\nst.global.f32 [%d4], %f2;\n"
    "DONE:\nret;\n}\n"
    ".visible .entry scale(.param .u64 x, .param .u64 y, .param .s64 n, .param .s64 factor)\n" DECLARE ITEM
    "cvt.u64.u32 %d0, %r3;\nld.param.s64 %d1, [n];\nsetp.ge.s64 %p0, %d0, %d1;\n@%p0 bra DONE;\n"
    "ld.param.u64 %d2, [x];\nld.param.u64 %d3, [y];\nld.param.s64 %d4, [factor];\nshl.b64 %d5, %d0, 2;\n"
    "add.u64 %d2, %d2, %d5;\nadd.u64 %d3, %d3, %d5;\ncvt.rn.f32.s64 %f1, %d4;\n"
    "ld.global.f32 %f0, [%d2];\nmul.f32 %f2, %f0, %f1;\nst.global.f32 [%d3], %f2;\n"
    "DONE:\nret;\n}\n";
static const char other_code[] = HEAD
    /* Halves a group of 64 floats in shared memory until one is left. */
    ".visible .entry sums(.param .u64 x, .param .u64 y)\n" DECLARE
    ".shared .align 4 .b8 part[256];\n" ITEM
    "cvt.u64.u32 %d0, %r3;\nld.param.u64 %d1, [x];\nshl.b64 %d2, %d0, 2;\nadd.u64 %d1, %d1, %d2;\n"
    "ld.global.f32 %f0, [%d1];\nmov.u32 %r4, part;\nshl.b32 %r5, %r2, 2;\nadd.u32 %r6, %r4, %r5;\n"
    "st.shared.f32 [%r6], %f0;\nmov.u32 %r7, 32;\n"
    "LOOP:\nbar.sync 0;\nsetp.ge.u32 %p0, %r2, %r7;\n@%p0 bra SKIP;\n"
    "shl.b32 %r8, %r7, 2;\nadd.u32 %r9, %r6, %r8;\nld.shared.f32 %f0, [%r6];\nld.shared.f32 %f1, [%r9];\n"
    "add.f32 %f0, %f0, %f1;\nst.shared.f32 [%r6], %f0;\n"
    "SKIP:\nshr.u32 %r7, %r7, 1;\nsetp.gt.u32 %p0, %r7, 0;\n@%p0 bra LOOP;\n"
    "setp.ne.u32 %p0, %r2, 0;\n@%p0 bra DONE;\n"
    "ld.param.u64 %d3, [y];\nmul.wide.u32 %d4, %r0, 4;\nadd.u64 %d3, %d3, %d4;\nst.global.f32 [%d3], %f0;\n"
    "DONE:\nret;\n}\n"
    /* Each thread of a 2 x 3 x 2 grid of 4 x 1 x 2 threads writes where it is. */
    ".visible .entry where(.param .u64 y)\n" DECLARE
    "mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %tid.x;\nmad.lo.u32 %r0, %r0, 4, %r1;\n"
    "mov.u32 %r2, %ctaid.y;\nmov.u32 %r3, %ctaid.z;\nmov.u32 %r4, %tid.z;\nmad.lo.u32 %r3, %r3, 2, %r4;\n"
    "mad.lo.u32 %r5, %r3, 3, %r2;\nmad.lo.u32 %r5, %r5, 8, %r0;\n"
    "mad.lo.u32 %r6, %r2, 100, %r0;\nmad.lo.u32 %r6, %r3, 10000, %r6;\n"
    "ld.param.u64 %d0, [y];\nmul.wide.u32 %d1, %r5, 4;\nadd.u64 %d0, %d0, %d1;\nst.global.u32 [%d0], %r6;\nret;\n}\n"
    ".visible .entry wild(.param .u64 y)\n" DECLARE "mov.u64 %d0, 16;\nst.global.u32 [%d0], %r0;\nret;\n}\n";
#else
static const char code[] =
#ifdef BROKEN
    "this_is_no_type broken;\n"
#endif
    "#define AT(b) ((__global float *)(b##_base + b##_at))\n"
    "__kernel void add(__global uchar *a_base, ulong a_at, __global uchar *b_base, ulong b_at,\n"
    "                  __global uchar *y_base, ulong y_at, long n) {\n"
    "  long i = get_global_id(0);\n"
    "  if (i < n) AT(y)[i] = AT(a)[i] + AT(b)[i];\n"
    "}\n"
    "__kernel void scale(__global uchar *x_base, ulong x_at, __global uchar *y_base, ulong y_at, long n, long factor) {\n"
    "  long i = get_global_id(0);\n"
    "  if (i < n) AT(y)[i] = AT(x)[i] * factor;\n"
    "}\n";
static const char other_code[] =
    "__kernel void sums(__global uchar *x_base, ulong x_at, __global uchar *y_base, ulong y_at) {\n"
    "  __local float part[64];\n"
    "  int i = get_local_id(0);\n"
    "  part[i] = ((__global float *)(x_base + x_at))[get_global_id(0)];\n"
    "  for (int half_ = 32; half_ > 0; half_ /= 2) {\n"
    "    barrier(CLK_LOCAL_MEM_FENCE);\n"
    "    if (i < half_) part[i] += part[i + half_];\n"
    "  }\n"
    "  if (i == 0) ((__global float *)(y_base + y_at))[get_group_id(0)] = part[0];\n"
    "}\n"
    "__kernel void where(__global uchar *y_base, ulong y_at) {\n"
    "  int x = get_global_id(0), y = get_global_id(1), z = get_global_id(2);\n"
    "  ((__global int *)(y_base + y_at))[(z * 3 + y) * 8 + x] = x + 100 * y + 10000 * z;\n"
    "}\n"
    "__kernel void wild(__global uchar *y_base, ulong y_at) { *(__global int *)(y_base + y_at) = 1; }\n";
#endif

#define KERNEL(id, text, buffers, scalars)                                                                         \
  static const kedge_device_kernel id##_kernel = {sizeof(kedge_device_kernel), #id, text, sizeof text - 1, NEEDS, \
                                                  buffers, scalars}
KERNEL(add, code, 3, PARAMETERS);
KERNEL(scale, code, 2, 2);
KERNEL(sums, other_code, 2, 0);
KERNEL(where, other_code, 1, 0);
KERNEL(wild, other_code, 1, 0);
KERNEL(unlisted, code, 0, 0);
static const kedge_device_kernel *const kernels[] = {&add_kernel, &scale_kernel, &sums_kernel, &where_kernel, &wild_kernel};

static int32_t launch(kedge_frame *f, const kedge_device_kernel *kernel, int64_t groups, int64_t items,
                      const int64_t *args) {
  kedge_launch l = {sizeof l, kernel, {groups, 1, 1}, {items, 1, 1}, args};
  return f->api->launch(f, &l);
}

static int32_t scaled(kedge_frame *f, const void *x, void *y, int64_t n, int64_t factor) {
  return launch(f, &scale_kernel, (n + 63) / 64, 64, (int64_t[]){(intptr_t)x, (intptr_t)y, n, factor});
}

static int32_t added(kedge_frame *f, const void *a, const void *b, void *y, int64_t n) {
  return launch(f, &add_kernel, (n + 63) / 64, 64, (int64_t[]){(intptr_t)a, (intptr_t)b, (intptr_t)y, n});
}

/* ---- Functions ------------------------------------------------------------------------------------------------ */
static const kedge_expr n_shape[] = {EXPR(SYMBOL(0))};
static const kedge_expr n64_shape[] = {EXPR(SYMBOL(0)), EXPR(CONST(64))};
static const kedge_expr w_shape[] = {EXPR(CONST(16))};
static const kedge_expr where_shape[] = {EXPR(CONST(4)), EXPR(CONST(3)), EXPR(CONST(8))};
static const kedge_symbol n_symbol[] = {{"N", 0, INT64_MAX, 0, 0}};
static const kedge_port ab_ports[] = {{"a", n_shape, 1, F32}, {"b", n_shape, 1, F32}};
static const kedge_port x_port[] = {{"x", n_shape, 1, F32}};
static const kedge_port y_port[] = {{"y", n_shape, 1, F32}};
static const kedge_port x64_port[] = {{"x", n64_shape, 2, F32}};
static const kedge_port wx_port[] = {{"x", w_shape, 1, F32}};
static const kedge_port wy_port[] = {{"y", w_shape, 1, F32}};
static const kedge_port where_port[] = {{"y", where_shape, 3, {kDLInt, 32, 1}}};
#define UNARY .inputs = x_port, .outputs = y_port, .symbols = n_symbol, .n_inputs = 1, .n_outputs = 1, .n_symbols = 1
#define NO_ARENA .arena_size = EXPR(CONST(0))

/* add: y[N] = a[N] + b[N] */
static int32_t run_add(kedge_frame *f) {
  return added(f, f->inputs[0], f->inputs[1], f->outputs[0], f->symbols[0]);
}
FUNCTION(add, .entry = run_add, .inputs = ab_ports, .outputs = y_port, .symbols = n_symbol, NO_ARENA, .n_inputs = 2,
         .n_outputs = 1, .n_symbols = 1);

/* weigh: y = x + the second weight */
static int32_t run_weigh(kedge_frame *f) { return added(f, f->inputs[0], f->weights + 64, f->outputs[0], 16); }
FUNCTION(weigh, .entry = run_weigh, .inputs = wx_port, .outputs = wy_port, NO_ARENA, .n_inputs = 1, .n_outputs = 1);

/* chain: y = 2x + -3(2x), both halves in the arena */
static int32_t run_chain(kedge_frame *f) {
  int64_t n = f->symbols[0];
  uint8_t *second = f->arena + (n * 4 + 63) / 64 * 64;
  int32_t status = scaled(f, f->inputs[0], f->arena, n, 2);
  if (status == KEDGE_OK) status = scaled(f, f->arena, second, n, -3);
  return status == KEDGE_OK ? added(f, f->arena, second, f->outputs[0], n) : status;
}
FUNCTION(chain, .entry = run_chain, UNARY,
         .arena_size = EXPR(SYMBOL(0), CONST(8), {KEDGE_EXPR_MUL, 0}, CONST(128), {KEDGE_EXPR_ADD, 0}));

/* sums: y[N] = x[N, 64] summed along its rows, a group for each */
static int32_t run_sums(kedge_frame *f) {
  return launch(f, &sums_kernel, f->symbols[0], 64, (int64_t[]){(intptr_t)f->inputs[0], (intptr_t)f->outputs[0]});
}
FUNCTION(sums, .entry = run_sums, .inputs = x64_port, .outputs = y_port, .symbols = n_symbol, NO_ARENA, .n_inputs = 1,
         .n_outputs = 1, .n_symbols = 1);

/* where: what each item knows of its place */
static int32_t run_where(kedge_frame *f) {
  kedge_launch l = {sizeof l, &where_kernel, {2, 3, 2}, {4, 1, 2}, (int64_t[]){(intptr_t)f->outputs[0]}};
  return f->api->launch(f, &l);
}
FUNCTION(where, .entry = run_where, .outputs = where_port, NO_ARENA, .n_outputs = 1);

/* wide: one group of N items */
static int32_t run_wide(kedge_frame *f) {
  int64_t n = f->symbols[0];
  return launch(f, &scale_kernel, 1, n, (int64_t[]){(intptr_t)f->inputs[0], (intptr_t)f->outputs[0], n, 1});
}
FUNCTION(wide, .entry = run_wide, UNARY, NO_ARENA);

/* forever: kernels until it is cancelled */
static int32_t run_forever(kedge_frame *f) {
  int32_t status = KEDGE_OK;
  while (*f->cancel == 0 && status == KEDGE_OK) status = scaled(f, f->inputs[0], f->outputs[0], f->symbols[0], 5);
  return status == KEDGE_OK ? KEDGE_E_CANCELLED : status;
}
FUNCTION(forever, .entry = run_forever, UNARY, NO_ARENA);

/* failing: writes its output, then fails */
static int32_t run_failing(kedge_frame *f) {
  int32_t status = scaled(f, f->inputs[0], f->outputs[0], f->symbols[0], 5);
  return status == KEDGE_OK ? KEDGE_E_KERNEL : status;
}
FUNCTION(failing, .entry = run_failing, UNARY, NO_ARENA);

static int32_t run_unlisted(kedge_frame *f) { return launch(f, &unlisted_kernel, 1, 1, NULL); }
FUNCTION(unlisted, .entry = run_unlisted, NO_ARENA);

static int32_t run_negative(kedge_frame *f) { return launch(f, &where_kernel, -1, 1, NULL); }
FUNCTION(negative, .entry = run_negative, NO_ARENA);

/* stray: a kernel is given an address of the host */
static int32_t run_stray(kedge_frame *f) { return launch(f, &wild_kernel, 1, 1, (int64_t[]){(intptr_t)f}); }
FUNCTION(stray, .entry = run_stray, NO_ARENA);

/* wild: on CUDA a kernel writes where nothing is */
static int32_t run_wild(kedge_frame *f) { return launch(f, &wild_kernel, 1, 1, (int64_t[]){0}); }
FUNCTION(wild, .entry = run_wild, NO_ARENA);

/* huge: an arena of 2^40 times N bytes */
FUNCTION(huge, .entry = run_add, UNARY, .arena_size = EXPR(SYMBOL(0), CONST(1ll << 40), {KEDGE_EXPR_MUL, 0}));

MODULE(&add, &weigh, &chain, &sums, &where, &wide, &forever, &failing, &unlisted, &negative, &stray, &wild, &huge);
