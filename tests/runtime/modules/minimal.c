/* minimal.c: one function that does nothing; compiled with other ABI and FEATURES values to be refused. */
#include "module.h"

static int32_t run_main(kedge_frame *f) { return f->struct_size == sizeof *f ? KEDGE_OK : KEDGE_E_KERNEL; }
static const kedge_function_desc main_function = {.struct_size = sizeof(kedge_function_desc),
                                                  .name = "main",
                                                  .entry = run_main,
                                                  .arena_size = EXPR(CONST(0))};
#ifdef MAGIC
#undef KEDGE_MODULE_MAGIC
#define KEDGE_MODULE_MAGIC MAGIC
#endif
MODULE(&main_function);
