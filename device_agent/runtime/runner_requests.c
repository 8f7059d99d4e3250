/* runner_requests.c: what the runner does with each request: modules, calls, timings, tensors that stay, devices. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"
#include "runner.h"

/* Older C libraries name none of these. */
enum { MEMFD_CLOEXEC = 1, MEMFD_ALLOW_SEALING = 2 };
enum { ADD_SEALS = 1033, SEAL_SEAL = 1, SEAL_SHRINK = 2, SEAL_GROW = 4, SEAL_WRITE = 8 };

static int memory_file(void) {
#ifdef SYS_memfd_create
  return (int)syscall(SYS_memfd_create, "kedge-outputs", MEMFD_CLOEXEC | MEMFD_ALLOW_SEALING);
#else
  errno = ENOSYS;
  return -1;
#endif
}

bool shared_memory_works(void) {
  int file = memory_file();
  if (file >= 0) close(file);
  return file >= 0;
}

static size_t aligned(size_t size) { return (size + KEDGE_ALIGNMENT - 1) / KEDGE_ALIGNMENT * KEDGE_ALIGNMENT; }

/* ---- Replies ------------------------------------------------------------------------------------------------ */

void write_error(const channel *to, uint64_t request, int32_t status, const char *text) {
  bytes head = {0};
  bytes_u32(&head, (uint32_t)status);
  bytes_text(&head, text);
  frame_write(to, MESSAGE_ERROR, request, &head, NULL, 0, -1);
  free(head.data);
}

typedef struct { /* whom a request is answered */
  const channel *to;
  session *session;
  uint64_t request;
} reply;

static void reply_error(const reply *r, int32_t status, const char *text) {
  r->session->done();
  write_error(r->to, r->request, status, text);
}

static void reply_result(const reply *r, const bytes *head, const void *tail, size_t tail_size, int file) {
  if (head->failed) {
    reply_error(r, KEDGE_E_MEMORY, "out of memory for the reply");
    return;
  }
  r->session->done();
  frame_write(r->to, MESSAGE_RESULT, r->request, head, tail, tail_size, file);
}

/* ---- Modules ------------------------------------------------------------------------------------------------ */

static const loaded_module *find_module(const session *s, uint32_t id) {
  for (size_t i = 0; i < MAX_MODULES; i++) {
    if (s->modules[i].model != NULL && s->modules[i].id == id) return &s->modules[i];
  }
  return NULL;
}

static loaded_module *free_place(session *s) {
  for (size_t i = 0; i < MAX_MODULES; i++) {
    if (s->modules[i].model == NULL) return &s->modules[i];
  }
  return NULL;
}

kedge_context *context_of(const session *s, const frame *request) {
  if (request->payload == NULL) return NULL;
  if (request->header.type != MESSAGE_CALL && request->header.type != MESSAGE_TIME) return NULL;
  cursor c = {request->payload, (size_t)request->header.length, 0, false};
  uint32_t id = cursor_u32(&c);
  const loaded_module *module = c.broken ? NULL : find_module(s, id);
  return module == NULL ? NULL : module->context;
}

static void describe_ports(bytes *to, const kedge_port *ports, int32_t count) {
  bytes_u32(to, (uint32_t)count);
  for (int32_t i = 0; i < count; i++) {
    bytes_text(to, ports[i].name);
    bytes_add(to, &ports[i].dtype, sizeof ports[i].dtype);
    bytes_u32(to, (uint32_t)ports[i].ndim);
  }
}

static void describe_module(bytes *to, const kedge_module_desc *module) {
  bytes_text(to, module->target);
  bytes_text(to, module->features);
  bytes_u32(to, (uint32_t)module->n_functions);
  for (int32_t i = 0; i < module->n_functions; i++) {
    const kedge_function_desc *function = module->functions[i];
    bytes_text(to, function->name);
    describe_ports(to, function->inputs, function->n_inputs);
    describe_ports(to, function->outputs, function->n_outputs);
  }
}

static int32_t open_module(loaded_module *m, const char *lib, const char *weights, uint64_t offset, int32_t threads,
                           DLDevice device) {
  kedge_open_options options = {sizeof options, lib, weights[0] == '\0' ? NULL : weights, offset, NULL};
  int32_t status = kedge_open(&options, &m->model);
  if (status != KEDGE_OK) {
    m->model = NULL;
    return status;
  }
  kedge_context_options context = {.struct_size = sizeof context, .num_threads = threads};
  status = kedge_context_create(m->model, device, &context, &m->context);
  if (status == KEDGE_OK) return status;
  kedge_close(m->model);
  m->model = NULL;
  m->context = NULL;
  return status;
}

static void handle_open(const reply *r, session *s, cursor *c) {
  int32_t threads = (int32_t)cursor_u32(c);
  uint64_t offset = cursor_u64(c);
  char *lib = cursor_text(c), *weights = cursor_text(c);
  uint32_t type = cursor_u32(c), id = cursor_u32(c);
  loaded_module *place = free_place(s);
  if (lib == NULL || weights == NULL || c->broken) {
    reply_error(r, KEDGE_E_ARGUMENT, "a malformed open");
  } else if (place == NULL) {
    reply_error(r, KEDGE_E_ARGUMENT, "as many modules are open as one runner holds; close one");
  } else {
    int32_t status = open_module(place, lib, weights, offset, threads, (DLDevice){(int32_t)type, (int32_t)id});
    if (status != KEDGE_OK) {
      reply_error(r, status, kedge_last_error());
    } else {
      place->id = s->n_opened++;
      bytes head = {0};
      bytes_u32(&head, place->id);
      describe_module(&head, kedge_describe(place->model));
      reply_result(r, &head, NULL, 0, -1);
      free(head.data);
    }
  }
  free(lib);
  free(weights);
}

static void reply_done(const reply *r) {
  bytes head = {0};
  reply_result(r, &head, NULL, 0, -1);
}

static void handle_close(const reply *r, session *s, cursor *c) {
  uint32_t id = cursor_u32(c);
  loaded_module *module = c->broken ? NULL : (loaded_module *)find_module(s, id);
  if (module == NULL) {
    reply_error(r, KEDGE_E_ARGUMENT, "there is no such module to close");
    return;
  }
  kedge_context_destroy(module->context);
  kedge_close(module->model);
  *module = (loaded_module){0, NULL, NULL};
  reply_done(r);
}

/* ---- Devices ------------------------------------------------------------------------------------------------ */

static void describe_device(bytes *to, uint32_t id, const kedge_device_properties *device) {
  bytes_u32(to, id);
  bytes_text(to, device->name);
  bytes_text(to, device->driver_version);
  bytes_text(to, device->arch);
  bytes_text(to, device->features);
  bytes_u64(to, device->global_memory);
  bytes_u64(to, device->local_memory);
  bytes_u64(to, (uint64_t)device->max_group);
  bytes_u64(to, (uint64_t)device->compute_units);
}

/* The devices of a type. Where there is none, or one of them does not answer, the text says why. */
static void handle_devices(const reply *r, cursor *c) {
  int32_t type = (int32_t)cursor_u32(c);
  bytes list = {0}, head = {0};
  uint32_t described = 0;
  char *reason = NULL;
  int32_t count = kedge_device_count(type);
  if (count == 0) reason = strdup(kedge_last_error());
  for (int32_t id = 0; id < count; id++) {
    kedge_device_properties properties = {.struct_size = sizeof properties};
    if (kedge_device_info(type, id, &properties) == KEDGE_OK) {
      describe_device(&list, (uint32_t)id, &properties);
      described++;
    } else {
      free(reason);
      reason = strdup(kedge_last_error());
    }
  }
  if (c->broken) {
    reply_error(r, KEDGE_E_ARGUMENT, "a malformed question about devices");
  } else {
    bytes_u32(&head, described);
    bytes_add(&head, list.data, list.size);
    bytes_text(&head, reason == NULL ? "" : reason);
    head.failed = head.failed || list.failed;
    reply_result(r, &head, NULL, 0, -1);
  }
  free(head.data);
  free(list.data);
  free(reason);
}

/* ---- Inputs and outputs of a call ---------------------------------------------------------------------------- */

typedef struct {
  const kedge_function_desc *function;
  kedge_context *context;
  int32_t index;
  DLTensor *args, *rets;
  int64_t *shapes;     /* KEDGE_MAX_NDIM for each of args, then of rets */
  uint64_t *handles;   /* of args: that of a tensor that is kept, or 0 */
  kept_tensor **kept;  /* outputs that are to stay, until the session has them; NULL where none is */
  void *input_memory;  /* a mapping, or NULL where the frame's payload holds the data */
  size_t input_size;
  uint8_t *outputs; /* output_size bytes: a mapping of output_file, or of none when that is -1 */
  size_t output_size;
  int output_file;
} call;

static void free_call(call *k) {
  for (int32_t i = 0; k->kept != NULL && i < k->function->n_outputs; i++) tensor_destroy(k->kept[i]);
  free(k->kept);
  free(k->handles);
  free(k->args);
  free(k->shapes);
  if (k->input_memory != NULL) munmap(k->input_memory, k->input_size);
  if (k->outputs != NULL) munmap(k->outputs, k->output_size);
  if (k->output_file >= 0) close(k->output_file);
}

static int32_t make_room(call *k, size_t inputs, size_t outputs) {
  k->args = calloc(inputs + outputs + 1, sizeof *k->args);
  k->shapes = calloc((inputs + outputs + 1) * KEDGE_MAX_NDIM, sizeof *k->shapes);
  k->handles = calloc(inputs + 1, sizeof *k->handles);
  if (k->args == NULL || k->shapes == NULL || k->handles == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  k->rets = k->args + inputs;
  for (size_t i = 0; i < inputs + outputs; i++) {
    k->args[i].shape = k->shapes + i * KEDGE_MAX_NDIM;
    k->args[i].device = (DLDevice){kDLCPU, 0};
  }
  return KEDGE_OK;
}

static int32_t begin_call(call *k, const session *s, uint32_t module_id, uint32_t index) {
  const loaded_module *loaded = find_module(s, module_id);
  if (loaded == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "no module %u is open", module_id);
  const kedge_module_desc *module = kedge_describe(loaded->model);
  if (index >= (uint32_t)module->n_functions) return kedge_fail(KEDGE_E_ARGUMENT, "there is no function %u", index);
  k->context = loaded->context;
  k->index = (int32_t)index;
  k->function = module->functions[index];
  return make_room(k, (size_t)k->function->n_inputs, (size_t)k->function->n_outputs);
}

/* The data section: the file that came along, or what follows the descriptors in the payload. */
static int32_t find_data(call *k, const frame *f, const cursor *c, const uint8_t **data, uint64_t *size) {
  if (!(f->header.flags & FLAG_SHARED)) {
    size_t start = aligned(c->at);
    *data = f->payload + start;
    *size = start < f->header.length ? f->header.length - start : 0;
    return KEDGE_OK;
  }
  struct stat info;
  if (f->file < 0 || fstat(f->file, &info) != 0) return kedge_fail(KEDGE_E_ARGUMENT, "no file came with shared inputs");
  *size = (uint64_t)info.st_size;
  k->input_size = (size_t)info.st_size;
  if (*size == 0) return KEDGE_OK;
  /* Read-only: code that writes to its inputs is wrong, and ends here. */
  void *memory = mmap(NULL, k->input_size, PROT_READ, MAP_PRIVATE, f->file, 0);
  if (memory == MAP_FAILED) {
    return kedge_fail(KEDGE_E_MEMORY, "cannot map %llu bytes of inputs: %s", (unsigned long long)*size, strerror(errno));
  }
  k->input_memory = memory;
  *data = memory;
  return KEDGE_OK;
}

/* A descriptor; its offset into the data section stays in byte_offset. */
static void read_tensor(DLTensor *tensor, cursor *c) {
  uint64_t bytes_sent, needed;
  cursor_take(c, &tensor->dtype, sizeof tensor->dtype);
  tensor->ndim = (int32_t)cursor_u32(c);
  tensor->byte_offset = cursor_u64(c);
  bytes_sent = cursor_u64(c);
  if (tensor->ndim < 0 || tensor->ndim > KEDGE_MAX_NDIM) {
    tensor->ndim = 0;
    c->broken = true;
    return;
  }
  cursor_take(c, tensor->shape, sizeof *tensor->shape * (size_t)tensor->ndim);
  if (!kedge_tensor_bytes(tensor, &needed) || needed != bytes_sent) c->broken = true;
}

/* The tensors of args that came by value, in order: descriptors, then data. */
static int32_t read_values(call *k, size_t n_args, const frame *f, cursor *c) {
  uint32_t count = cursor_u32(c), expected = 0;
  for (size_t i = 0; i < n_args; i++) expected += k->handles[i] == 0;
  if (count != expected) c->broken = true;
  for (size_t i = 0; i < n_args && !c->broken; i++) {
    if (k->handles[i] == 0) read_tensor(&k->args[i], c);
  }
  const uint8_t *data = NULL;
  uint64_t size = 0;
  if (c->broken) return kedge_fail(KEDGE_E_ARGUMENT, "a malformed request");
  int32_t status = find_data(k, f, c, &data, &size);
  for (size_t i = 0; i < n_args && status == KEDGE_OK; i++) {
    DLTensor *tensor = &k->args[i];
    uint64_t needed, end;
    if (k->handles[i] != 0) continue;
    kedge_tensor_bytes(tensor, &needed);
    if (__builtin_add_overflow(tensor->byte_offset, needed, &end) || (needed > 0 && end > size)) {
      return kedge_fail(KEDGE_E_ARGUMENT, "the data of input %s is cut off", k->function->inputs[i].name);
    }
    tensor->data = needed > 0 ? (void *)(data + tensor->byte_offset) : NULL;
    tensor->byte_offset = 0;
  }
  return status;
}

/* A tensor that can be used; NULL with the error set. */
static const kept_tensor *find_whole(const session *s, uint64_t handle) {
  const kept_tensor *kept = tensors_find(&s->tensors, handle);
  if (kept == NULL) kedge_fail(KEDGE_E_ARGUMENT, "no tensor %llu is kept", (unsigned long long)handle);
  if (kept == NULL || kept->filled == kept->size) return kept;
  kedge_fail(KEDGE_E_ARGUMENT, "of tensor %llu %zu bytes have not come yet", (unsigned long long)handle,
             kept->size - kept->filled);
  return NULL;
}

static int32_t read_inputs(call *k, const session *s, const frame *f, cursor *c) {
  uint32_t count = cursor_u32(c);
  if (!c->broken && count != (uint32_t)k->function->n_inputs) {
    return kedge_fail(KEDGE_E_ARGUMENT, "function %s takes %d inputs, but %u came", k->function->name,
                      k->function->n_inputs, count);
  }
  for (uint32_t i = 0; i < count && !c->broken; i++) {
    k->handles[i] = cursor_u64(c);
    if (k->handles[i] == 0 || c->broken) continue;
    const kept_tensor *kept = find_whole(s, k->handles[i]);
    if (kept == NULL) return KEDGE_E_ARGUMENT;
    int64_t *shape = k->args[i].shape;
    k->args[i] = kept->tensor;
    k->args[i].shape = shape;
    if (kept->tensor.ndim > 0) memcpy(shape, kept->shape, sizeof *shape * (size_t)kept->tensor.ndim);
  }
  if (c->broken) return kedge_fail(KEDGE_E_ARGUMENT, "a malformed request");
  return read_values(k, count, f, c);
}

/* Outputs of fewer bytes are sent sooner than a file for them is made, sealed and mapped. */
enum { SHARED_OUTPUT_BYTES = 64 << 10 };

/* Shared memory is offered, not promised: a limit on file sizes holds for it too, and then the data goes inline. */
static void *map_outputs(call *k, bool shared) {
  if (shared) k->output_file = memory_file();
  if (k->output_file >= 0 && ftruncate(k->output_file, (off_t)k->output_size) != 0) {
    close(k->output_file);
    k->output_file = -1;
  }
  int flags = k->output_file >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  return mmap(NULL, k->output_size, PROT_READ | PROT_WRITE, flags, k->output_file, 0);
}

static int32_t infer_outputs(call *k) {
  return kedge_infer(k->context, k->index, k->args, k->function->n_inputs, k->rets, k->function->n_outputs);
}

/* Outputs that are to stay, each in memory of its own. */
static int32_t make_kept_outputs(call *k) {
  int32_t status = infer_outputs(k);
  if (status != KEDGE_OK) return status;
  k->kept = calloc((size_t)k->function->n_outputs + 1, sizeof *k->kept);
  if (k->kept == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  for (int32_t i = 0; i < k->function->n_outputs; i++) {
    k->kept[i] = tensor_new(&k->rets[i]);
    if (k->kept[i] == NULL) return KEDGE_E_MEMORY;
    k->rets[i].data = k->kept[i]->tensor.data;
    k->rets[i].byte_offset = 0;
  }
  return KEDGE_OK;
}

static int32_t make_outputs(call *k, bool shared) {
  int32_t n_outputs = k->function->n_outputs;
  int32_t status = infer_outputs(k);
  if (status != KEDGE_OK) return status;
  size_t total = 0;
  for (int32_t i = 0; i < n_outputs; i++) {
    uint64_t size;
    k->rets[i].byte_offset = total;
    if (!kedge_tensor_bytes(&k->rets[i], &size) || size > PTRDIFF_MAX - KEDGE_ALIGNMENT - total) {
      return kedge_fail(KEDGE_E_MEMORY, "the size of the outputs overflows");
    }
    total += aligned((size_t)size);
  }
  k->output_size = total > 0 ? total : KEDGE_ALIGNMENT;
  void *memory = map_outputs(k, shared && total >= SHARED_OUTPUT_BYTES);
  if (memory == MAP_FAILED) return kedge_fail(KEDGE_E_MEMORY, "cannot allocate %zu bytes for the outputs", total);
  k->outputs = memory;
  for (int32_t i = 0; i < n_outputs; i++) k->rets[i].data = k->outputs;
  return KEDGE_OK;
}

static void describe_tensor(bytes *to, const DLTensor *tensor) {
  uint64_t size = 0;
  kedge_tensor_bytes(tensor, &size);
  bytes_add(to, &tensor->dtype, sizeof tensor->dtype);
  bytes_u32(to, (uint32_t)tensor->ndim);
  bytes_u64(to, tensor->byte_offset);
  bytes_u64(to, size);
  bytes_add(to, tensor->shape, sizeof *tensor->shape * (size_t)tensor->ndim);
}

static void describe_outputs(bytes *to, const call *k, bool discard) {
  uint32_t count = discard ? 0 : (uint32_t)k->function->n_outputs;
  bytes_u32(to, count);
  for (uint32_t i = 0; i < count; i++) describe_tensor(to, &k->rets[i]);
}

/* ---- Call --------------------------------------------------------------------------------------------------- */

/* What was computed, as one section: sealed where it is a file, so that the other end can map it without fear that it
 * shrinks or changes. */
static void reply_section(const reply *r, bytes *head, call *k) {
  if (k->output_file >= 0) {
    munmap(k->outputs, k->output_size);
    k->outputs = NULL;
    fcntl(k->output_file, ADD_SEALS, SEAL_SEAL | SEAL_SHRINK | SEAL_GROW | SEAL_WRITE);
    reply_result(r, head, NULL, 0, k->output_file);
  } else {
    bytes_pad(head, KEDGE_ALIGNMENT);
    reply_result(r, head, k->outputs, k->output_size, -1);
  }
}

static void reply_to_call(const reply *r, call *k, uint64_t duration_ns, bool discard) {
  bytes head = {0};
  bytes_u64(&head, duration_ns);
  describe_outputs(&head, k, discard);
  if (discard) {
    reply_result(r, &head, NULL, 0, -1);
  } else {
    reply_section(r, &head, k);
  }
  free(head.data);
}

/* Hands tensors to the session, all of them or none, and appends the handle and descriptor of each to head. */
static int32_t keep_all(session *s, kept_tensor **tensors, uint32_t count, bytes *head) {
  int32_t status = KEDGE_OK;
  uint32_t kept = 0;
  bytes_u32(head, count);
  for (; kept < count; kept++) {
    status = tensor_protect(tensors[kept]);
    if (status == KEDGE_OK) status = tensors_keep(&s->tensors, tensors[kept]);
    if (status != KEDGE_OK) break;
    bytes_u64(head, tensors[kept]->handle);
    describe_tensor(head, &tensors[kept]->tensor);
  }
  if (status == KEDGE_OK && head->failed) status = kedge_fail(KEDGE_E_MEMORY, "out of memory for the reply");
  for (uint32_t i = 0; i < kept; i++) {
    if (status != KEDGE_OK) tensors_release(&s->tensors, tensors[i]->handle);
    tensors[i] = NULL;
  }
  return status;
}

static void keep_outputs(const reply *r, session *s, call *k, uint64_t duration_ns) {
  bytes head = {0};
  bytes_u64(&head, duration_ns);
  int32_t status = keep_all(s, k->kept, (uint32_t)k->function->n_outputs, &head);
  if (status == KEDGE_OK) {
    reply_result(r, &head, NULL, 0, -1);
  } else {
    reply_error(r, status, kedge_last_error());
  }
  free(head.data);
}

static void handle_call(const reply *r, session *s, const frame *f, cursor *c) {
  call k = {.output_file = -1};
  uint32_t module = cursor_u32(c), index = cursor_u32(c), options = cursor_u32(c);
  bool discard = (options & CALL_DISCARD_OUTPUTS) != 0, keep = (options & CALL_KEEP_OUTPUTS) != 0 && !discard;
  bool shared = (options & CALL_SHARED_OUTPUTS) != 0 && !discard && r->to->is_socket;
  int32_t status = begin_call(&k, s, module, index);
  if (status == KEDGE_OK) status = read_inputs(&k, s, f, c);
  if (status == KEDGE_OK) status = keep ? make_kept_outputs(&k) : make_outputs(&k, shared);
  int64_t start = kedge_now_ns();
  if (status == KEDGE_OK) {
    status = kedge_call(k.context, k.index, k.args, k.function->n_inputs, k.rets, k.function->n_outputs);
  }
  int64_t duration = kedge_now_ns() - start;
  if (status != KEDGE_OK) {
    reply_error(r, status, kedge_last_error());
  } else if (keep) {
    keep_outputs(r, s, &k, (uint64_t)duration);
  } else {
    reply_to_call(r, &k, (uint64_t)duration, discard);
  }
  free_call(&k);
}

/* ---- Tensors that stay --------------------------------------------------------------------------------------- */

/* Room for a tensor, and the first of its bytes; the others follow in pieces, so that they are never there twice. */
static void handle_keep(const reply *r, session *s, cursor *c) {
  int64_t shape[KEDGE_MAX_NDIM];
  DLTensor like = {.shape = shape};
  kept_tensor *tensor = NULL;
  bytes head = {0};
  read_tensor(&like, c);
  int32_t status = c->broken ? kedge_fail(KEDGE_E_ARGUMENT, "a malformed request to keep") : KEDGE_OK;
  if (status == KEDGE_OK && (tensor = tensor_new(&like)) == NULL) status = KEDGE_E_MEMORY;
  if (status == KEDGE_OK) status = tensor_fill(tensor, c->data + c->at, c->size - c->at);
  if (status == KEDGE_OK) status = tensors_keep(&s->tensors, tensor);
  if (status == KEDGE_OK) {
    bytes_u64(&head, tensor->handle);
    reply_result(r, &head, NULL, 0, -1);
  } else {
    tensor_destroy(tensor);
    reply_error(r, status, kedge_last_error());
  }
  free(head.data);
}

static void handle_fill(const reply *r, const session *s, cursor *c) {
  uint64_t handle = cursor_u64(c);
  kept_tensor *tensor = c->broken ? NULL : tensors_find(&s->tensors, handle);
  int32_t status = tensor == NULL
                       ? kedge_fail(KEDGE_E_ARGUMENT, "no tensor %llu is kept", (unsigned long long)handle)
                       : tensor_fill(tensor, c->data + c->at, c->size - c->at);
  if (status == KEDGE_OK) {
    reply_done(r);
  } else {
    reply_error(r, status, kedge_last_error());
  }
}

static void handle_fetch(const reply *r, const session *s, cursor *c) {
  uint64_t handle = cursor_u64(c), offset = cursor_u64(c), size = cursor_u64(c);
  const kept_tensor *kept = find_whole(s, handle);
  bytes head = {0};
  if (kept == NULL) {
    reply_error(r, KEDGE_E_ARGUMENT, kedge_last_error());
  } else if (c->broken || offset > kept->size || size > kept->size - offset) {
    reply_error(r, KEDGE_E_ARGUMENT, "a malformed request to fetch");
  } else {
    reply_result(r, &head, (const uint8_t *)kept->tensor.data + offset, (size_t)size, -1);
  }
}

static void handle_release(const reply *r, session *s, cursor *c) {
  uint32_t count = cursor_u32(c);
  cursor check = *c;
  for (uint32_t i = 0; i < count && !check.broken; i++) {
    uint64_t handle = cursor_u64(&check);
    if (!check.broken && tensors_find(&s->tensors, handle) == NULL) {
      kedge_fail(KEDGE_E_ARGUMENT, "no tensor %llu is kept; none was released", (unsigned long long)handle);
      reply_error(r, KEDGE_E_ARGUMENT, kedge_last_error());
      return;
    }
  }
  if (check.broken) {
    reply_error(r, KEDGE_E_ARGUMENT, "a malformed request to release");
    return;
  }
  for (uint32_t i = 0; i < count; i++) tensors_release(&s->tensors, cursor_u64(c)); /* one named twice is gone once */
  reply_done(r);
}

/* ---- Time --------------------------------------------------------------------------------------------------- */

static int32_t read_options(cursor *c, kedge_time_options *options, kedge_time_result *result) {
  options->struct_size = sizeof *options;
  cursor_take(c, (uint8_t *)options + sizeof options->struct_size, sizeof *options - sizeof options->struct_size);
  result->struct_size = sizeof *result;
  uint64_t room;
  if (c->broken || options->repeat < 1 || __builtin_mul_overflow((uint64_t)options->repeat, sizeof(double), &room) ||
      room > PTRDIFF_MAX) {
    return kedge_fail(KEDGE_E_ARGUMENT, "a malformed request to time");
  }
  result->samples_ns = malloc((size_t)room);
  return result->samples_ns != NULL ? KEDGE_OK : kedge_fail(KEDGE_E_MEMORY, "no memory for the samples");
}

static int32_t make_step_room(const call *k, const kedge_time_options *options, kedge_time_result *result) {
  uint64_t row = sizeof(double) * (uint64_t)k->function->n_steps, room;
  if (options->profile == 0) return KEDGE_OK;
  if (__builtin_mul_overflow((uint64_t)options->repeat, row, &room) || room > PTRDIFF_MAX) {
    return kedge_fail(KEDGE_E_ARGUMENT, "a malformed request to time");
  }
  result->step_ns = malloc(room > 0 ? (size_t)room : 1);
  return result->step_ns != NULL ? KEDGE_OK : kedge_fail(KEDGE_E_MEMORY, "no memory for the samples of the steps");
}

static void reply_to_time(const reply *r, const call *k, const kedge_time_result *result) {
  size_t n_steps = result->step_ns == NULL ? 0 : (size_t)k->function->n_steps, samples = (size_t)result->n_samples;
  bytes head = {0};
  bytes_u64(&head, (uint64_t)result->number);
  bytes_u64(&head, (uint64_t)result->resolution_ns);
  bytes_u32(&head, (uint32_t)samples);
  bytes_u32(&head, (uint32_t)n_steps);
  bytes_add(&head, result->samples_ns, sizeof(double) * samples);
  if (result->step_ns != NULL) {
    bytes_add(&head, &result->clock_hz, sizeof result->clock_hz);
    bytes_add(&head, result->read_bytes_per_s, sizeof result->read_bytes_per_s);
    bytes_add(&head, result->step_ns, sizeof(double) * samples * n_steps);
  }
  reply_result(r, &head, NULL, 0, -1);
  free(head.data);
}

static void handle_time(const reply *r, const session *s, const frame *f, cursor *c) {
  call k = {.output_file = -1};
  kedge_time_options options;
  kedge_time_result result = {.samples_ns = NULL, .step_ns = NULL};
  uint32_t module = cursor_u32(c), index = cursor_u32(c);
  int32_t status = read_options(c, &options, &result);
  if (status == KEDGE_OK) status = begin_call(&k, s, module, index);
  if (status == KEDGE_OK) status = read_inputs(&k, s, f, c);
  if (status == KEDGE_OK) status = make_outputs(&k, false);
  if (status == KEDGE_OK) status = make_step_room(&k, &options, &result);
  if (status == KEDGE_OK) {
    status = kedge_time(k.context, k.index, k.args, k.function->n_inputs, k.rets, k.function->n_outputs, &options,
                        &result);
  }
  if (status == KEDGE_OK) {
    reply_to_time(r, &k, &result);
  } else {
    reply_error(r, status, kedge_last_error());
  }
  free(result.samples_ns);
  free(result.step_ns);
  free_call(&k);
}

void handle_request(const channel *to, session *s, const frame *request) {
  cursor c = {request->payload, (size_t)request->header.length, 0, false};
  reply r = {to, s, request->header.request};
  if (request->payload == NULL) {
    reply_error(&r, KEDGE_E_MEMORY, "no memory for the request");
    return;
  }
  switch (request->header.type) {
    case MESSAGE_OPEN: handle_open(&r, s, &c); break;
    case MESSAGE_CALL: handle_call(&r, s, request, &c); break;
    case MESSAGE_DEVICES: handle_devices(&r, &c); break;
    case MESSAGE_KEEP: handle_keep(&r, s, &c); break;
    case MESSAGE_FILL: handle_fill(&r, s, &c); break;
    case MESSAGE_FETCH: handle_fetch(&r, s, &c); break;
    case MESSAGE_RELEASE: handle_release(&r, s, &c); break;
    case MESSAGE_CLOSE: handle_close(&r, s, &c); break;
    default: handle_time(&r, s, request, &c); break;
  }
}
