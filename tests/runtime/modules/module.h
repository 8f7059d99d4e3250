/* module.h: the little that hand-written modules share. */
#include "kedge.h"

#define CONST(n) {KEDGE_EXPR_CONST, n}
#define SYMBOL(n) {KEDGE_EXPR_SYMBOL, n}
#define EXPR(...) \
  { (const kedge_expr_op[]){__VA_ARGS__}, sizeof((const kedge_expr_op[]){__VA_ARGS__}) / sizeof(kedge_expr_op) }
#define F32 {kDLFloat, 32, 1}
#define I64 {kDLInt, 64, 1}

#ifndef FEATURES
#define FEATURES ""
#endif
#ifndef ABI
#define ABI KEDGE_ABI_VERSION
#endif
#ifndef DEVICE
#define DEVICE kDLCPU
#define N_KERNELS 0
#define KERNELS NULL
#endif
#ifndef WEIGHTS_SIZE
#define WEIGHTS_SIZE 0
#endif

#define FUNCTION(id, ...) \
  static const kedge_function_desc id = {.struct_size = sizeof(kedge_function_desc), .name = #id, __VA_ARGS__}

#define MODULE(...)                                                                                     \
  static const kedge_function_desc *const functions[] = {__VA_ARGS__};                                  \
  KEDGE_API extern const kedge_module_desc kedge_module;                                                \
  const kedge_module_desc kedge_module = {.magic = KEDGE_MODULE_MAGIC,                                  \
                                          .abi_version = ABI,                                           \
                                          .struct_size = sizeof(kedge_module_desc),                     \
                                          .target = "c",                                                \
                                          .features = FEATURES,                                         \
                                          .functions = functions,                                       \
                                          .weights_size = WEIGHTS_SIZE,                                 \
                                          .n_functions = sizeof functions / sizeof *functions,           \
                                          .device_type = DEVICE,                                        \
                                          .n_kernels = N_KERNELS,                                       \
                                          .kernels = KERNELS}
