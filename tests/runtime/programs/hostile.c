/* hostile.c: random modules and random tensors, most of them malformed, against the checks of the runtime.
 *
 * Arguments: seed, rounds. What passes the checks is called, and the callee touches every byte that it was promised,
 * so that a sanitizer sees a promise that does not hold. Prints how many modules, calls and timings were accepted.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { MAX_PORTS = 3, MAX_DIMS = 10, MAX_OPS = 66, TOUCHABLE = 1 << 16 };

static uint64_t state;
static uint64_t below(uint64_t n) { /* xorshift64* */
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return n == 0 ? 0 : (state * 0x2545F4914F6CDD1Dull >> 16) % n;
}
static bool rarely(void) { return below(40) == 0; }

static int64_t number(void) {
  static const int64_t odd[] = {-1, 0, 63, 64, 65, INT32_MAX, INT32_MAX + 1ll, INT64_MAX / 2, INT64_MAX, INT64_MIN};
  return rarely() ? odd[below(sizeof odd / sizeof *odd)] : (int64_t)below(6);
}

/* ---- Modules ------------------------------------------------------------------------------------------------ */

static kedge_expr_op ops[2 * MAX_PORTS * MAX_DIMS + 1][MAX_OPS];
static kedge_expr shapes[2 * MAX_PORTS][MAX_DIMS];
static kedge_port ports[2 * MAX_PORTS];
static kedge_symbol symbols[MAX_PORTS];
static kedge_function_desc function;
static const kedge_function_desc *functions[1] = {&function};
static kedge_module_desc module;
static kedge_device_kernel kernel;
static const kedge_device_kernel *kernels[2];

static kedge_expr expression(kedge_expr_op *room, int32_t n_symbols) {
  int64_t count = 0, depth = 0, wanted = 1 + 2 * (int64_t)below(rarely() ? 34 : 3);
  while (count < wanted && count < MAX_OPS) {
    bool leaf = depth < 2 || (below(2) == 0 && wanted - count > depth);
    room[count] = (kedge_expr_op){leaf ? (int64_t)below(2) : 2 + (int64_t)below(7), number()};
    if (leaf && room[count].opcode == KEDGE_EXPR_SYMBOL && !rarely()) {
      room[count] = n_symbols > 0 ? (kedge_expr_op){KEDGE_EXPR_SYMBOL, (int64_t)below((uint64_t)n_symbols)}
                                  : (kedge_expr_op){KEDGE_EXPR_CONST, 2};
    }
    if (rarely()) room[count].opcode = number();
    depth += leaf ? 1 : -1;
    count++;
  }
  while (depth-- > 1 && count < MAX_OPS) room[count++] = (kedge_expr_op){KEDGE_EXPR_ADD, 0};
  return (kedge_expr){rarely() && rarely() ? NULL : room, rarely() && rarely() ? number() : count};
}

static DLDataType type(void) {
  static const uint8_t bits[] = {8, 16, 32, 64, 1, 4, 0, 255};
  if (below(4) != 0) return (DLDataType){kDLFloat, 32, 1};
  return (DLDataType){(uint8_t)below(7), bits[below(rarely() ? 8 : 4)], rarely() ? (uint16_t)number() : 1};
}

static int32_t touch(kedge_frame *frame);

static void make_module(void) {
  function = (kedge_function_desc){.struct_size = sizeof function, .name = rarely() ? NULL : "f", .entry = touch};
  function.n_symbols = (int32_t)below(MAX_PORTS + 1);
  function.n_steps = rarely() ? (int32_t)number() : 0;
  function.n_inputs = rarely() ? -1 : (int32_t)below(MAX_PORTS + 1);
  function.n_outputs = (int32_t)below(MAX_PORTS + 1);
  for (int p = 0; p < 2 * MAX_PORTS; p++) {
    int32_t ndim = rarely() ? (int32_t)below(12) - 1 : (int32_t)below(4);
    ports[p] = (kedge_port){rarely() && rarely() ? NULL : "p", rarely() && rarely() ? NULL : shapes[p], ndim, type()};
    for (int d = 0; d < MAX_DIMS; d++) shapes[p][d] = expression(ops[p * MAX_DIMS + d], function.n_symbols);
  }
  for (int i = 0; i < MAX_PORTS; i++) {
    symbols[i] = (kedge_symbol){"N", number(), rarely() ? number() : INT64_MAX, (int32_t)below(MAX_PORTS), 0};
    if (symbols[i].lower > 0 && !rarely()) symbols[i].lower = 0;
    if (function.n_inputs > 0 && !rarely()) symbols[i].input = (int32_t)below((uint64_t)function.n_inputs);
    int32_t ndim = ports[symbols[i].input].ndim;
    symbols[i].dim = rarely() ? (int32_t)number() : ndim > 0 ? (int32_t)below((uint64_t)ndim) : 0;
    /* The dim that binds a symbol usually is that symbol. */
    if (ndim > 0 && symbols[i].dim >= 0 && symbols[i].dim < MAX_DIMS && i < function.n_symbols) {
      kedge_expr_op *room = ops[symbols[i].input * MAX_DIMS + symbols[i].dim];
      room[0] = (kedge_expr_op){KEDGE_EXPR_SYMBOL, i};
      shapes[symbols[i].input][symbols[i].dim] = (kedge_expr){room, 1};
    }
  }
  function.inputs = ports;
  function.outputs = ports + MAX_PORTS;
  function.symbols = rarely() && rarely() ? NULL : symbols;
  function.arena_size = expression(ops[2 * MAX_PORTS * MAX_DIMS], function.n_symbols);
  kernel = (kedge_device_kernel){rarely() ? 8 : sizeof kernel, rarely() ? NULL : "k", rarely() ? NULL : "", 0,
                                 rarely() ? NULL : "", rarely() ? (int32_t)number() : 1, (int32_t)below(4)};
  kernels[0] = kernels[1] = rarely() ? NULL : &kernel;
  module = (kedge_module_desc){KEDGE_MODULE_MAGIC, KEDGE_ABI_VERSION, sizeof module, "t", "", functions, NULL, 0, 1, 0,
                               rarely() ? (int32_t)below(6) : kDLCPU, rarely() ? (int32_t)below(4) - 1 : 0, NULL};
  if (module.n_kernels <= 2 && !rarely()) module.kernels = kernels;
}

/* ---- Tensors ------------------------------------------------------------------------------------------------ */

static DLTensor tensors[2 * MAX_PORTS];
static int64_t dims[2 * MAX_PORTS][MAX_DIMS], strides[2 * MAX_PORTS][MAX_DIMS];
static void *memory[2 * MAX_PORTS];
static uint64_t sizes[2 * MAX_PORTS];
static int64_t called;

static int32_t touch(kedge_frame *frame) {
  called++;
  for (int32_t i = 0; i < function.n_inputs; i++) {
    for (uint64_t b = 0; b < sizes[i]; b++) called += ((const uint8_t *)frame->inputs[i])[b] == 255;
  }
  for (int32_t i = 0; i < function.n_outputs; i++) {
    if (sizes[MAX_PORTS + i] > 0) memset(frame->outputs[i], 7, sizes[MAX_PORTS + i]);
  }
  int64_t arena;
  if (!kedge_expr_eval(&function.arena_size, frame->symbols, &arena) || arena < 0) abort();
  if (arena > 0 && arena <= TOUCHABLE) memset(frame->arena, 9, (size_t)arena);
  return KEDGE_OK;
}

/* A tensor over exactly as much memory as its shape takes; its shape is what `ndim` and `dims` say. */
static void furnish(int i) {
  DLTensor *t = &tensors[i];
  int64_t expected = 1;
  free(memory[i]);
  memory[i] = NULL;
  t->shape = rarely() && rarely() ? NULL : dims[i];
  t->device = (DLDevice){rarely() ? (int32_t)number() : kDLCPU, 0};
  t->strides = below(3) == 0 ? strides[i] : NULL;
  for (int d = MAX_DIMS - 1; d >= 0; d--) {
    strides[i][d] = rarely() ? number() : expected;
    if (d < t->ndim && dims[i][d] > 0 && dims[i][d] < 100) expected *= dims[i][d];
  }
  sizes[i] = 0;
  if (t->shape == NULL || t->ndim < 0 || t->ndim > MAX_DIMS || !kedge_tensor_bytes(t, &sizes[i])) return;
  if (sizes[i] > TOUCHABLE) { /* the callee may touch nothing of it, but a pointer is due */
    sizes[i] = 0;
    t->data = &state;
    return;
  }
  t->byte_offset = rarely() ? below(16) : 0;
  memory[i] = malloc(sizes[i] + t->byte_offset + 1);
  memset(memory[i], 0, sizes[i] + t->byte_offset);
  t->data = rarely() && rarely() ? NULL : memory[i];
  if (t->data == NULL) sizes[i] = 0;
}

static void make_inputs(void) {
  for (int i = 0; i < MAX_PORTS; i++) {
    tensors[i] = (DLTensor){.ndim = ports[i].ndim, .dtype = rarely() ? type() : ports[i].dtype};
    if (rarely()) tensors[i].ndim = (int32_t)below(12) - 1;
    if (tensors[i].ndim > MAX_DIMS) tensors[i].ndim = MAX_DIMS;
    for (int d = 0; d < MAX_DIMS; d++) dims[i][d] = number();
    for (int d = 0; d < ports[i].ndim && d < MAX_DIMS; d++) { /* what is constant fits, usually */
      if (!rarely() && shapes[i][d].n_ops == 1 && ops[i * MAX_DIMS + d][0].opcode == KEDGE_EXPR_CONST) {
        dims[i][d] = ops[i * MAX_DIMS + d][0].value;
      }
    }
    furnish(i);
  }
}

static void use(kedge_context *context, int64_t *calls, int64_t *times) {
  DLTensor *rets = tensors + MAX_PORTS;
  make_inputs();
  for (int i = 0; i < MAX_PORTS; i++) rets[i] = (DLTensor){.shape = dims[MAX_PORTS + i]};
  if (kedge_infer(context, 0, tensors, function.n_inputs, rets, function.n_outputs) != KEDGE_OK) {
    if (kedge_last_error()[0] == '\0') abort();
    for (int i = 0; i < MAX_PORTS; i++) rets[i].ndim = (int32_t)below(4), rets[i].dtype = type();
  }
  for (int i = MAX_PORTS; i < 2 * MAX_PORTS; i++) {
    if (rarely()) dims[i][below(MAX_DIMS)] = number();
    furnish(i);
  }
  int32_t n_inputs = rarely() ? (int32_t)number() : function.n_inputs, index = rarely() ? (int32_t)number() : 0;
  if (n_inputs > MAX_PORTS) n_inputs = function.n_inputs;
  *calls += kedge_call(context, index, tensors, n_inputs, rets, function.n_outputs) == KEDGE_OK;
  double samples[4];
  int64_t flush = rarely() ? number() : 0;
  kedge_time_options options = {sizeof options, 1, 1 + (int64_t)below(4), 0, number() & 3, 1, 0, 1, flush, 0};
  kedge_time_result result = {.struct_size = sizeof result, .samples_ns = samples};
  /* More memory than there is; on 32 bits a number that becomes small when it is cut. */
  int64_t too_much = sizeof(size_t) < 8 ? ((int64_t)1 << 32) + 64 : INT64_MAX;
  if (options.cache_flush_bytes > TOUCHABLE) options.cache_flush_bytes = too_much;
  *times += kedge_time(context, 0, tensors, function.n_inputs, rets, function.n_outputs, &options, &result) == KEDGE_OK;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  state = strtoull(argv[1], NULL, 10) * 2 + 1;
  int64_t opened = 0, calls = 0, times = 0;
  for (long round = atol(argv[2]); round > 0; round--) {
    kedge_model *model;
    kedge_context *context;
    make_module();
    if (kedge_open_linked(&module, NULL, &model) != KEDGE_OK) continue;
    kedge_context_options options = {.struct_size = sizeof options, .num_threads = 1};
    if (module.device_type != kDLCPU) { /* sound, but for a GPU: not on the CPU */
      if (kedge_context_create(model, (DLDevice){kDLCPU, 0}, &options, &context) != KEDGE_E_ARGUMENT) return 3;
      kedge_close(model);
      continue;
    }
    if (kedge_context_create(model, (DLDevice){kDLCPU, 0}, &options, &context) != KEDGE_OK) return 1;
    kedge_close(model);
    opened++;
    for (int i = 0; i < 8; i++) use(context, &calls, &times);
    kedge_context_destroy(context);
  }
  for (int i = 0; i < 2 * MAX_PORTS; i++) free(memory[i]);
  printf("%lld %lld %lld\n", (long long)opened, (long long)calls, (long long)times);
  return called > 0 ? 0 : 1;
}
