/* doubling.c: main (x: f32[N] -> y: f32[N]), y = 2 x + 1, by a kernel in OpenCL C. */
#include "kedge.h"

#ifndef NEEDS
#define NEEDS "" /* what the kernel asks of the device */
#endif
static const char code[] =
    "__kernel void doubling(__global uchar *x, ulong at_x, __global uchar *y, ulong at_y, long n) {\n"
    "  long i = get_global_id(0);\n"
    "  if (i < n) ((__global float *)(y + at_y))[i] = 2.0f * ((__global float *)(x + at_x))[i] + 1.0f;\n"
    "}\n";
static const kedge_device_kernel kernel = {.struct_size = sizeof kernel,
                                           .name = "doubling",
                                           .code = code,
                                           .code_size = sizeof code - 1,
                                           .features = NEEDS,
                                           .n_buffers = 2,
                                           .n_scalars = 1};
static const kedge_device_kernel *const kernels[] = {&kernel};
#define DEVICE kDLOpenCL
#define N_KERNELS 1
#define KERNELS kernels
#include "module.h"

static int32_t run_main(kedge_frame *f) {
  int64_t n = f->symbols[0];
  int64_t args[] = {(int64_t)(intptr_t)f->inputs[0], (int64_t)(intptr_t)f->outputs[0], n};
  kedge_launch launch = {
      .struct_size = sizeof launch, .kernel = &kernel, .grid = {(n + 63) / 64, 1, 1}, .block = {64, 1, 1}, .args = args};
  return f->api->launch(f, &launch);
}

static const kedge_port ports[] = {{"x", (const kedge_expr[]){EXPR(SYMBOL(0))}, 1, F32},
                                   {"y", (const kedge_expr[]){EXPR(SYMBOL(0))}, 1, F32}};
static const kedge_symbol n_symbol = {"N", 0, INT64_MAX, 0, 0};
static const kedge_function_desc main_function = {.struct_size = sizeof(kedge_function_desc),
                                                  .name = "main",
                                                  .entry = run_main,
                                                  .inputs = &ports[0],
                                                  .outputs = &ports[1],
                                                  .symbols = &n_symbol,
                                                  .arena_size = EXPR(CONST(0)),
                                                  .n_inputs = 1,
                                                  .n_outputs = 1,
                                                  .n_symbols = 1};
MODULE(&main_function);
