/* harness.c: calls function 0 of the module it is linked with, on any Linux, without a C library or the runtime.
 *
 * In: i64 weight bytes, the weights, then for inputs, symbols and outputs each: i64 count, and so many: inputs i64 size
 * and data, symbols i64 value, outputs i64 size. Out: the data of the outputs. Exits with the entry's status.
 * Parallel loops run in two pieces, or in chunks of the size asked for, the last one first.
 */
#include "kedge.h"

extern const kedge_module_desc kedge_module;

#if defined(__x86_64__)
__asm__(".globl _start\n_start: xor %ebp, %ebp\n and $-16, %rsp\n call start\n");
static long call3(long number, long a, long b, long c) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}
enum { READ = 0, WRITE = 1, EXIT = 60 };
#elif defined(__aarch64__)
__asm__(".globl _start\n_start: bl start\n");
static long call3(long number, long a, long b, long c) {
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
  return x0;
}
enum { READ = 63, WRITE = 64, EXIT = 93 };
#elif defined(__arm__)
__asm__(".globl _start\n_start: bl start\n");
static long call3(long number, long a, long b, long c) {
  register long r7 __asm__("r7") = number, r0 __asm__("r0") = a, r1 __asm__("r1") = b, r2 __asm__("r2") = c;
  __asm__ volatile("svc 0" : "+r"(r0) : "r"(r7), "r"(r1), "r"(r2) : "memory");
  return r0;
}
enum { READ = 3, WRITE = 4, EXIT = 1 };
#elif defined(__riscv)
__asm__(".globl _start\n_start: call start\n");
static long call3(long number, long a, long b, long c) {
  register long a7 __asm__("a7") = number, a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c;
  __asm__ volatile("ecall" : "+r"(a0) : "r"(a7), "r"(a1), "r"(a2) : "memory");
  return a0;
}
enum { READ = 63, WRITE = 64, EXIT = 93 };
#endif

enum { FAILED = 100, MOST = 32 };
static _Alignas(KEDGE_ALIGNMENT) uint8_t memory[48 << 20];
static long used;

static void leave(long status) {
  call3(EXIT, status, 0, 0);
  for (;;) {
  }
}

static void transfer(long number, int file, uint8_t *data, long size) {
  while (size > 0) {
    long done = call3(number, file, (long)data, size);
    if (done <= 0) leave(FAILED);
    data += done;
    size -= done;
  }
}

static uint8_t *bytes(int64_t size) {
  uint8_t *data = memory + used;
  used += ((long)size + 2 * KEDGE_ALIGNMENT - 1) & ~(KEDGE_ALIGNMENT - 1);
  if (used > (long)sizeof memory) leave(FAILED + 1);
  for (int64_t i = 0; i < size; i++) data[i] = 77;
  return data;
}

static int64_t number(void) {
  int64_t value;
  transfer(READ, 0, (uint8_t *)&value, sizeof value);
  return value;
}

static uint8_t *blob(int64_t size) {
  uint8_t *data = bytes(size);
  transfer(READ, 0, data, (long)size);
  return data;
}

/* By subtraction: 32-bit ARM divides 64-bit numbers in a library only. */
static int64_t quotient(int64_t a, int64_t b) {
  int64_t result = 0;
  for (; a >= b; a -= b) result++;
  return result;
}

static int64_t evaluate(const kedge_expr *expr, const int64_t *symbols) {
  int64_t stack[32];
  int top = 0;
  for (int64_t i = 0; i < expr->n_ops; i++) {
    int64_t code = expr->ops[i].opcode, value = expr->ops[i].value;
    if (code <= KEDGE_EXPR_SYMBOL) {
      stack[top++] = code == KEDGE_EXPR_CONST ? value : symbols[value];
      continue;
    }
    int64_t b = stack[--top], a = stack[top - 1];
    if (code == KEDGE_EXPR_ADD) a += b;
    if (code == KEDGE_EXPR_SUB) a -= b;
    if (code == KEDGE_EXPR_MUL) a *= b;
    if (code == KEDGE_EXPR_FLOORDIV) a = quotient(a, b);
    if (code == KEDGE_EXPR_FLOORMOD) a -= quotient(a, b) * b;
    if (code == KEDGE_EXPR_MIN && b < a) a = b;
    if (code == KEDGE_EXPR_MAX && b > a) a = b;
    stack[top - 1] = a;
  }
  return stack[0];
}

static int32_t in_two_pieces(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent) {
  (void)frame;
  int64_t middle = extent / 2;
  int32_t status = body(closure, middle, extent);
  return status != 0 || middle == 0 ? status : body(closure, 0, middle);
}

static int32_t in_chunks(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent, int64_t chunk) {
  (void)frame;
  int32_t status = 0;
  for (int64_t begin = extent > 0 ? quotient(extent - 1, chunk) * chunk : -1; begin >= 0 && status == 0; begin -= chunk) {
    status = body(closure, begin, extent - begin > chunk ? begin + chunk : extent);
  }
  return status;
}

static int32_t failed(kedge_frame *frame, const char *what, int32_t status, const char *why) {
  (void)frame, (void)what, (void)why;
  return status;
}

__attribute__((used)) void start(void) {
  void *inputs[MOST], *outputs[MOST];
  int64_t symbols[MOST], sizes[MOST];
  const uint8_t *weights = blob(number());
  int64_t n_inputs = number();
  if (n_inputs > MOST) leave(FAILED + 3);
  for (int64_t i = 0; i < n_inputs; i++) inputs[i] = blob(number());
  int64_t n_symbols = number();
  for (int64_t i = 0; i < n_symbols; i++) symbols[i] = number();
  int64_t n_outputs = number();
  for (int64_t i = 0; i < n_outputs; i++) outputs[i] = bytes(sizes[i] = number());
  const kedge_function_desc *function = kedge_module.functions[0];
  if (kedge_module.magic != KEDGE_MODULE_MAGIC || kedge_module.struct_size != sizeof(kedge_module_desc) ||
      function->struct_size != sizeof *function || function->n_inputs != n_inputs ||
      function->n_outputs != n_outputs || function->n_symbols != n_symbols) {
    leave(FAILED + 2);
  }
  kedge_runtime_api api = {.struct_size = sizeof api, .parallel_for = in_two_pieces,
                           .parallel_for_dynamic = in_chunks, .fail = failed};
  volatile int32_t cancel = 0;
  kedge_frame frame = {sizeof frame, &api, 0, inputs, outputs, symbols,
                       bytes(evaluate(&function->arena_size, symbols)), weights, &cancel};
  int32_t status = function->entry(&frame);
  if (status == 0) {
    for (int64_t i = 0; i < n_outputs; i++) transfer(WRITE, 1, outputs[i], (long)sizes[i]);
  }
  leave(status);
}
