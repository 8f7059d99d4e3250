/* context.c: checking arguments, binding free dims, the arena, calling. */
#include <stdlib.h>
#include <string.h>

#include "device.h"

enum { IDLE = -1, RUNNING = 0, CANCELLED = 1 }; /* of context.cancel; compiled code stops at anything but 0 */

/* ---- Cancelling --------------------------------------------------------------------------------------------- */

void kedge_arm(kedge_context *context) {
  int32_t idle = IDLE; /* armed already: a cancel may have come before the call could begin, and it stays */
  atomic_compare_exchange_strong(&context->cancel, &idle, RUNNING);
}

void kedge_disarm(kedge_context *context) { atomic_store(&context->cancel, IDLE); }

bool kedge_is_cancelled(const kedge_context *context) {
  return atomic_load_explicit(&context->cancel, memory_order_relaxed) == CANCELLED;
}

void kedge_cancel(kedge_context *context) {
  int32_t running = RUNNING; /* an idle context stays idle: the next call is not this one */
  if (context != NULL) atomic_compare_exchange_strong(&context->cancel, &running, CANCELLED);
}

/* ---- Creating ----------------------------------------------------------------------------------------------- */

static bool on_host(const kedge_context *context) { return context->model->module->device_type == kDLCPU; }

static int32_t allocate(kedge_context *context) {
  int32_t inputs = 1, outputs = 1, symbols = 1;
  const kedge_module_desc *module = context->model->module;
  for (int32_t i = 0; i < module->n_functions; i++) {
    const kedge_function_desc *f = module->functions[i];
    if (f->n_inputs > inputs) inputs = f->n_inputs;
    if (f->n_outputs > outputs) outputs = f->n_outputs;
    if (f->n_symbols > symbols) symbols = f->n_symbols;
  }
  context->inputs = calloc((size_t)inputs, sizeof *context->inputs);
  context->outputs = calloc((size_t)outputs, sizeof *context->outputs);
  context->symbols = calloc((size_t)symbols, sizeof *context->symbols);
  bool done = context->inputs != NULL && context->outputs != NULL && context->symbols != NULL;
  if (!on_host(context)) {
    context->max_inputs = inputs;
    context->n_slots = inputs + outputs;
    context->slots = calloc((size_t)context->n_slots, sizeof *context->slots);
    done = done && context->slots != NULL;
  }
  return done ? KEDGE_OK : kedge_fail(KEDGE_E_MEMORY, "out of memory");
}

static int32_t start_team(kedge_context *context, int32_t num_threads) {
  /* What a GPU leaves for the host to do needs no help; who wants threads all the same says how many. */
  if (num_threads == 0 && !on_host(context)) num_threads = 1;
  return kedge_team_init(&context->team, num_threads);
}

static int32_t open_queue(kedge_context *context, DLDevice device) {
  int32_t status = kedge_place(context->model, device, &context->placement);
  if (status != KEDGE_OK) return status;
  kedge_device *opened = context->placement->device;
  status = kedge_device_enter(opened);
  if (status != KEDGE_OK) return status;
  status = opened->driver->begin(opened, context->placement->program, &context->queue);
  kedge_device_leave(opened);
  return status;
}

static kedge_text name_of_type(int32_t device_type) {
  const kedge_driver *driver = kedge_find_driver(device_type);
  kedge_text name = {.used = 0};
  if (driver != NULL) {
    kedge_text_add(&name, "%s", driver->name);
  } else {
    kedge_text_add(&name, "type-%d", device_type);
  }
  return name;
}

static int32_t check_device(const kedge_module_desc *module, DLDevice device) {
  if (device.device_type == module->device_type) return KEDGE_OK;
  kedge_text name = name_of_type(device.device_type);
  return kedge_fail(KEDGE_E_ARGUMENT, "the module was compiled for %s, not for %s",
                    kedge_find_driver(module->device_type)->name, name.data);
}

int32_t kedge_context_create(kedge_model *model, DLDevice device, const kedge_context_options *options,
                             kedge_context **context) {
  kedge_clear_error();
  if (model == NULL || context == NULL || (options != NULL && options->struct_size < sizeof *options)) {
    return kedge_fail(KEDGE_E_ARGUMENT, "kedge_context_create: model and context are required");
  }
  *context = NULL;
  int32_t status = check_device(model->module, device);
  if (status != KEDGE_OK) return status;
  kedge_context *created = calloc(1, sizeof *created);
  if (created == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  created->model = model;
  kedge_model_retain(model);
  kedge_disarm(created);
  status = start_team(created, options == NULL ? 0 : options->num_threads);
  if (status == KEDGE_OK) status = allocate(created);
  if (status == KEDGE_OK) status = open_queue(created, device);
  if (status != KEDGE_OK) {
    kedge_kept_error why;
    kedge_keep_error(&why);
    kedge_context_destroy(created);
    kedge_restore_error(&why);
    return status;
  }
  *context = created;
  return KEDGE_OK;
}

/* What the context has on its device. Where the device cannot be entered any more, its memory is gone with it. */
static void free_on_device(kedge_context *context) {
  kedge_device *device = context->placement->device;
  if (kedge_is_left_behind(device->driver)) return; /* it is the parent's, and stays there */
  bool entered = kedge_device_enter(device) == KEDGE_OK;
  if (context->queue != NULL) {
    device->driver->synchronize(context->queue);
    kedge_free_staging(context);
    if (context->arena != NULL) device->driver->release(device, context->arena);
    device->driver->end(context->queue);
  }
  if (entered) kedge_device_leave(device);
  kedge_unplace(context->model, context->placement);
}

void kedge_context_destroy(kedge_context *context) {
  if (context == NULL) return;
  if (context->placement != NULL) free_on_device(context);
  kedge_close(context->model);
  free(context->inputs);
  free(context->outputs);
  free(context->symbols);
  free(context->slots);
  free(context);
}

/* ---- Checking ----------------------------------------------------------------------------------------------- */

typedef struct { /* where a tensor stands, for messages */
  const kedge_function_desc *function;
  const char *kind;
  const kedge_port *port;
  const DLTensor *tensor;
} place;

static int32_t wrong_shape(const place *at, const char *because) {
  kedge_text text = {.used = 0};
  for (int32_t d = 0; d < at->tensor->ndim && d < KEDGE_MAX_NDIM; d++) {
    kedge_text_add(&text, "%s%lld", d > 0 ? ", " : "", (long long)at->tensor->shape[d]);
  }
  kedge_text_add(&text, "], expected [");
  for (int32_t d = 0; d < at->port->ndim; d++) {
    if (d > 0) kedge_text_add(&text, ", ");
    kedge_expr_print(&at->port->shape[d], at->function->symbols, &text);
  }
  return kedge_fail(KEDGE_E_INPUT, "%s %s has shape [%s]%s", at->kind, at->port->name, text.data, because);
}

static int32_t check_type(const place *at) {
  const DLTensor *tensor = at->tensor;
  const DLDataType want = at->port->dtype, have = tensor->dtype;
  if (want.code != have.code || want.bits != have.bits || want.lanes != have.lanes) {
    kedge_text text = {.used = 0};
    kedge_dtype_print(have, &text);
    kedge_text_add(&text, ", expected ");
    kedge_dtype_print(want, &text);
    return kedge_fail(KEDGE_E_INPUT, "%s %s has dtype %s", at->kind, at->port->name, text.data);
  }
  if (tensor->ndim < 0 || (tensor->ndim > 0 && tensor->shape == NULL)) {
    return kedge_fail(KEDGE_E_INPUT, "%s %s has no shape", at->kind, at->port->name);
  }
  return tensor->ndim == at->port->ndim ? KEDGE_OK : wrong_shape(at, "");
}

static int32_t check_shape(const place *at, const int64_t *symbols) {
  for (int32_t d = 0; d < at->port->ndim; d++) {
    int64_t want;
    if (!kedge_expr_eval(&at->port->shape[d], symbols, &want)) return wrong_shape(at, ", which overflows");
    if (want == at->tensor->shape[d] && want >= 0) continue;
    kedge_text because = {.used = 0};
    if (at->port->shape[d].n_ops > 1 || at->port->shape[d].ops[0].opcode == KEDGE_EXPR_SYMBOL) {
      kedge_text_add(&because, ", which is %lld in dim %d", (long long)want, d);
    }
    return wrong_shape(at, because.used > 0 ? because.data : "");
  }
  return KEDGE_OK;
}

static int32_t check_place(const kedge_context *context, const place *at) {
  const kedge_device *device = context->queue->device;
  const DLDevice is = at->tensor->device;
  if (is.device_type == kDLCPU || (is.device_type == device->driver->device_type && is.device_id == device->id)) {
    return KEDGE_OK;
  }
  kedge_text type = name_of_type(is.device_type);
  if (on_host(context)) {
    return kedge_fail(KEDGE_E_INPUT, "%s %s is on %s device %d, expected the CPU", at->kind, at->port->name, type.data,
                      is.device_id);
  }
  return kedge_fail(KEDGE_E_INPUT, "%s %s is on %s device %d, expected the CPU or %s device %d", at->kind,
                    at->port->name, type.data, is.device_id, device->driver->name, device->id);
}

/* `slot` is NULL where the module runs on the host; else it tells afterwards whether there is something to copy. */
static int32_t check_data(const kedge_context *context, const place *at, kedge_slot *slot, void **data) {
  const DLTensor *tensor = at->tensor;
  int32_t status = check_place(context, at);
  if (status != KEDGE_OK) return status;
  if (!kedge_tensor_is_dense(tensor)) {
    return kedge_fail(KEDGE_E_INPUT, "%s %s is strided, expected dense row-major", at->kind, at->port->name);
  }
  uint64_t bytes;
  if (!kedge_tensor_bytes(tensor, &bytes)) {
    return kedge_fail(KEDGE_E_MEMORY, "the size of %s %s overflows", at->kind, at->port->name);
  }
  uintptr_t address = (uintptr_t)tensor->data + (uintptr_t)tensor->byte_offset;
  if (tensor->data == NULL && bytes > 0) {
    return kedge_fail(KEDGE_E_INPUT, "%s %s has no data", at->kind, at->port->name);
  }
  if (bytes > 0 && address % (tensor->dtype.bits > 8 ? tensor->dtype.bits / 8u : 1u) != 0) {
    return kedge_fail(KEDGE_E_INPUT, "%s %s is not aligned to its element size", at->kind, at->port->name);
  }
  *data = (void *)address;
  if (slot == NULL) return KEDGE_OK;
  bool staged = bytes > 0 && tensor->device.device_type == kDLCPU;
  slot->host = staged ? *data : NULL;
  slot->bytes = bytes;
  if (staged) return KEDGE_OK;
  if (bytes == 0) *data = NULL; /* nothing of it is touched, and it need not be memory of the device */
  kedge_device *device = context->queue->device;
  if (bytes == 0 || device->driver->holds == NULL || device->driver->holds(device, *data, bytes)) return KEDGE_OK;
  return kedge_fail(KEDGE_E_INPUT, "%s %s is not in memory of kedge_device_alloc on %s device %d", at->kind,
                    at->port->name, device->driver->name, device->id);
}

static int32_t bind_symbols(kedge_context *context, const kedge_function_desc *function, const DLTensor *args) {
  for (int32_t i = 0; i < function->n_symbols; i++) {
    const kedge_symbol *symbol = &function->symbols[i];
    int64_t value = args[symbol->input].shape[symbol->dim];
    if (value < symbol->lower || value > symbol->upper || value < 0) {
      kedge_text range = {.used = 0};
      kedge_text_add(&range, "at least %lld", (long long)symbol->lower);
      if (symbol->upper != INT64_MAX) kedge_text_add(&range, " and at most %lld", (long long)symbol->upper);
      return kedge_fail(KEDGE_E_INPUT, "dim %d of input %s (%s) is %lld, expected %s", symbol->dim,
                        function->inputs[symbol->input].name, symbol->name, (long long)value, range.data);
    }
    context->symbols[i] = value;
  }
  return KEDGE_OK;
}

/* Which of the caller's dims an expression is made of: "dim 2 of input x (h) is 33". */
static void print_symbols(const kedge_function_desc *function, const kedge_equality *equality, const int64_t *values,
                          kedge_text *text) {
  for (int32_t i = 0; i < function->n_symbols; i++) {
    const kedge_symbol *symbol = &function->symbols[i];
    if (!kedge_expr_uses(&equality->a, i) && !kedge_expr_uses(&equality->b, i)) continue;
    kedge_text_add(text, "%sdim %d of input %s (%s) is %lld", text->used > 0 ? ", " : "", symbol->dim,
                   function->inputs[symbol->input].name, symbol->name, (long long)values[i]);
  }
}

static int32_t check_equalities(const kedge_function_desc *function, const int64_t *symbols) {
  for (int64_t i = 0; i < function->n_equalities; i++) {
    const kedge_equality *equality = &function->equalities[i];
    int64_t a, b;
    if (!kedge_expr_eval(&equality->a, symbols, &a) || !kedge_expr_eval(&equality->b, symbols, &b)) {
      return kedge_fail(KEDGE_E_MEMORY, "a size in function %s overflows for these shapes", function->name);
    }
    if (a == b) continue;
    kedge_text dims = {.used = 0}, left = {.used = 0}, right = {.used = 0};
    print_symbols(function, equality, symbols, &dims);
    kedge_expr_print(&equality->a, function->symbols, &left);
    kedge_expr_print(&equality->b, function->symbols, &right);
    return kedge_fail(KEDGE_E_INPUT, "%s: %s needs %s and %s to be equal, but they are %lld and %lld", dims.data,
                      equality->of, left.data, right.data, (long long)a, (long long)b);
  }
  return KEDGE_OK;
}

/* The function, with the dtypes and shapes of its arguments checked and its symbols bound. */
static int32_t check_arguments(kedge_context *context, int32_t index, const DLTensor *args, int32_t n_args,
                               const DLTensor *rets, int32_t n_rets, const kedge_function_desc **found) {
  kedge_clear_error();
  if (context == NULL || index < 0 || index >= context->model->module->n_functions) {
    return kedge_fail(KEDGE_E_ARGUMENT, "there is no function %d", index);
  }
  const kedge_function_desc *function = context->model->module->functions[index];
  if (n_args != function->n_inputs || n_rets != function->n_outputs || (n_args > 0 && args == NULL) ||
      (n_rets > 0 && rets == NULL)) {
    return kedge_fail(KEDGE_E_ARGUMENT, "function %s takes %d inputs and gives %d outputs, but was called with %d and %d",
                      function->name, function->n_inputs, function->n_outputs, n_args, n_rets);
  }
  int32_t status = KEDGE_OK;
  for (int32_t i = 0; i < n_args && status == KEDGE_OK; i++) {
    status = check_type(&(place){function, "input", &function->inputs[i], &args[i]});
  }
  if (status == KEDGE_OK) status = bind_symbols(context, function, args);
  for (int32_t i = 0; i < n_args && status == KEDGE_OK; i++) {
    status = check_shape(&(place){function, "input", &function->inputs[i], &args[i]}, context->symbols);
  }
  if (status == KEDGE_OK) status = check_equalities(function, context->symbols);
  *found = function;
  return status;
}

static int32_t grow_arena(kedge_context *context, const kedge_function_desc *function) {
  int64_t size;
  if (!kedge_expr_eval(&function->arena_size, context->symbols, &size) || size < 0 || (uint64_t)size > PTRDIFF_MAX) {
    return kedge_fail(KEDGE_E_MEMORY, "the memory that function %s needs for these shapes overflows", function->name);
  }
  if ((uint64_t)size <= context->arena_size) return KEDGE_OK;
  kedge_device *device = context->queue->device;
  void *memory = context->arena;
  context->arena = NULL;
  context->arena_size = 0;
  int32_t status = memory == NULL ? KEDGE_OK : device->driver->release(device, memory);
  if (status == KEDGE_OK) status = device->driver->allocate(device, (uint64_t)size, &memory);
  if (status != KEDGE_OK) {
    return kedge_fail_within(status, "function %s needs an arena of %lld bytes", function->name, (long long)size);
  }
  context->arena = memory;
  context->arena_size = (uint64_t)size;
  return KEDGE_OK;
}

/* ---- Calling ------------------------------------------------------------------------------------------------ */

int32_t kedge_infer(kedge_context *context, int32_t index, const DLTensor *args, int32_t n_args, DLTensor *rets,
                    int32_t n_rets) {
  const kedge_function_desc *function;
  int32_t status = check_arguments(context, index, args, n_args, rets, n_rets, &function);
  for (int32_t i = 0; i < n_rets && status == KEDGE_OK; i++) {
    const kedge_port *port = &function->outputs[i];
    if (port->ndim > 0 && rets[i].shape == NULL) {
      return kedge_fail(KEDGE_E_ARGUMENT, "output %s has no room for its shape", port->name);
    }
    rets[i].ndim = port->ndim;
    rets[i].dtype = port->dtype;
    for (int32_t d = 0; d < port->ndim && status == KEDGE_OK; d++) {
      if (!kedge_expr_eval(&port->shape[d], context->symbols, &rets[i].shape[d]) || rets[i].shape[d] < 0) {
        status = kedge_fail(KEDGE_E_MEMORY, "dim %d of output %s overflows", d, port->name);
      }
    }
  }
  return status;
}

/* Lets the host give its memory now, a write to each of its smallest pages; a call would wait for that. */
static void touch(uint8_t *memory, uint64_t bytes) {
  enum { PAGE = 4096 };
  for (uint64_t at = 0; at < bytes; at += PAGE) ((volatile uint8_t *)memory)[at] = 0;
}

int32_t kedge_prepare(kedge_context *context, int32_t index, const DLTensor *args, int32_t n_args, DLTensor *rets,
                      int32_t n_rets) {
  const kedge_function_desc *function;
  int32_t status = check_arguments(context, index, args, n_args, rets, n_rets, &function);
  if (status == KEDGE_OK) status = kedge_check_queue(context);
  if (status == KEDGE_OK) status = kedge_device_enter(context->queue->device);
  if (status != KEDGE_OK) return status;
  uint64_t before = context->arena_size;
  status = grow_arena(context, function);
  if (status == KEDGE_OK && on_host(context) && context->arena_size != before) touch(context->arena, context->arena_size);
  kedge_device_leave(context->queue->device);
  return status;
}

/* Everything that needs no device: after it, data of tensors, symbols and slots are those of this call. */
static int32_t check_call(kedge_context *context, int32_t index, const DLTensor *args, int32_t n_args,
                          const DLTensor *rets, int32_t n_rets, const kedge_function_desc **function) {
  int32_t status = check_arguments(context, index, args, n_args, rets, n_rets, function);
  kedge_slot *slots = context->slots;
  for (int32_t i = 0; i < n_args && status == KEDGE_OK; i++) {
    place at = {*function, "input", &(*function)->inputs[i], &args[i]};
    status = check_data(context, &at, slots == NULL ? NULL : &slots[i], &context->inputs[i]);
  }
  for (int32_t i = 0; i < n_rets && status == KEDGE_OK; i++) {
    place at = {*function, "output", &(*function)->outputs[i], &rets[i]};
    status = check_type(&at);
    if (status == KEDGE_OK) status = check_shape(&at, context->symbols);
    if (status == KEDGE_OK) {
      kedge_slot *slot = slots == NULL ? NULL : &slots[context->max_inputs + i];
      status = check_data(context, &at, slot, &context->outputs[i]);
    }
  }
  return status;
}

static void fill_frame(kedge_context *context) {
  context->frame = (kedge_frame){
      .struct_size = sizeof context->frame,
      .api = &kedge_api,
      .pool = &context->team,
      .inputs = context->inputs,
      .outputs = context->outputs,
      .symbols = context->symbols,
      .arena = context->arena,
      .weights = context->placement->weights,
      .cancel = (const volatile int32_t *)&context->cancel,
  };
}

int32_t kedge_check_queue(const kedge_context *context) {
  int32_t status = kedge_check_fork(context->queue->device->driver);
  if (status != KEDGE_OK) return status;
  if (!context->queue->faulted) return KEDGE_OK;
  return kedge_fail(KEDGE_E_KERNEL, "the device faulted earlier: %s", context->queue->device->driver->after_fault);
}

int32_t kedge_drain(kedge_context *context, int32_t status) {
  kedge_queue *queue = context->queue;
  if (status == KEDGE_OK) return queue->device->driver->synchronize(queue);
  kedge_kept_error why;
  kedge_keep_error(&why);
  if (queue->device->driver->synchronize(queue) != KEDGE_OK) kedge_restore_error(&why);
  return status;
}

int32_t kedge_begin_call(kedge_context *context, int32_t index, const DLTensor *args, int32_t n_args, DLTensor *rets,
                         int32_t n_rets) {
  const kedge_function_desc *function;
  int32_t status = check_call(context, index, args, n_args, rets, n_rets, &function);
  if (status == KEDGE_OK) status = kedge_check_queue(context);
  if (status == KEDGE_OK) status = kedge_device_enter(context->queue->device);
  if (status != KEDGE_OK) return status;
  context->function = function;
  status = grow_arena(context, function);
  if (status == KEDGE_OK && !on_host(context)) status = kedge_stage(context, function);
  if (status == KEDGE_OK && !on_host(context)) status = kedge_copy_in(context, function);
  fill_frame(context);
  return status == KEDGE_OK ? status : kedge_end_call(context, status);
}

int32_t kedge_enter(kedge_context *context) {
  const kedge_function_desc *function = context->function;
  int32_t status = kedge_is_cancelled(context) ? KEDGE_E_CANCELLED : function->entry(&context->frame);
  if (status == KEDGE_OK) return status;
  if (status == KEDGE_E_CANCELLED) return kedge_fail(status, "function %s was cancelled", function->name);
  if (kedge_last_error()[0] != '\0') return status; /* who failed has said why */
  return kedge_fail(status, "function %s failed: %s", function->name, kedge_status_name(status));
}

int32_t kedge_end_call(kedge_context *context, int32_t status) {
  if (!on_host(context)) {
    if (status == KEDGE_OK) status = kedge_drain(context, KEDGE_OK); /* the outputs of a failure stay untouched */
    if (status == KEDGE_OK) status = kedge_copy_out(context, context->function);
    status = kedge_drain(context, status);
  }
  kedge_device_leave(context->queue->device);
  return status;
}

int32_t kedge_call(kedge_context *context, int32_t index, const DLTensor *args, int32_t n_args, DLTensor *rets,
                   int32_t n_rets) {
  if (context == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "kedge_call: context is required");
  kedge_arm(context);
  int32_t status = kedge_begin_call(context, index, args, n_args, rets, n_rets);
  if (status == KEDGE_OK) status = kedge_end_call(context, kedge_enter(context));
  kedge_disarm(context);
  return status;
}
