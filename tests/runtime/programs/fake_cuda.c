/* fake_cuda.c: a stand-in for libcuda.so.1 that runs the kernels of modules/gpu.c on the host.
 *
 * It ends the process with a word on stderr where a caller breaks a rule of the driver API: no context is current, an
 * object is unknown, a copy leaves its allocation, parameters are missing. Copies and launches happen when their stream
 * is synchronized and not before, so that whoever lets go of memory too early is caught. What is alive at the end is
 * written to the file that FAKE_CUDA_REPORT names, as "contexts modules streams allocations stack", and how many
 * launches there were, and synchronizations that had something to wait for.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define TAG ((uint64_t)1 << 60) /* makes an address that no host can read */
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_READY = 3, BAD_PTX = 218, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
enum { DEVICES = 2, ROOM = 256, MEMORY = 64 << 20 };

typedef enum { TO_DEVICE, FROM_DEVICE, ON_DEVICE, LAUNCH } action_kind;
typedef struct action {
  struct action *next;
  action_kind kind;
  uint64_t to, from;
  size_t bytes;
  const struct kernel *kernel;
  unsigned grid[3], block[3];
  uint64_t parameters[8];
} action;
typedef struct kernel {
  const char *name;
  int parameters, max_threads;
  int (*run)(const action *launch);
} kernel;
typedef struct {
  int device;
  action *first, **last;
} stream;
typedef struct {
  uint64_t address;
  size_t bytes;
  int device;
} allocation;
typedef struct {
  const char *text;
} module;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int retained[DEVICES], fault[DEVICES], initialized, modules, streams, launches, waits;
static allocation allocations[ROOM];
static char contexts[DEVICES];
static __thread int stack[16], depth;

#define RULE(condition, text)                                    \
  do {                                                           \
    if (!(condition)) {                                          \
      fprintf(stderr, "fake_cuda: %s: %s\n", __func__, text);    \
      abort();                                                   \
    }                                                            \
  } while (0)

static int current(void) {
  RULE(depth > 0, "no context is current");
  return stack[depth - 1];
}

/* The host's memory behind an address, if `bytes` from there on are in one allocation. */
static uint8_t *behind(uint64_t address, size_t bytes) {
  for (int i = 0; i < ROOM; i++) {
    const allocation *a = &allocations[i];
    if (a->address != 0 && address >= a->address && address - a->address <= a->bytes &&
        bytes <= a->bytes - (address - a->address)) {
      return (uint8_t *)(uintptr_t)(address & ~TAG);
    }
  }
  return NULL;
}

/* ---- Kernels ------------------------------------------------------------------------------------------------- */

static int64_t threads_of(const action *l) { return (int64_t)l->grid[0] * l->block[0]; }

static int run_add(const action *l) {
  int64_t n = (int64_t)l->parameters[3];
  if (n > threads_of(l)) n = threads_of(l);
  const float *a = (void *)behind(l->parameters[0], (size_t)n * 4), *b = (void *)behind(l->parameters[1], (size_t)n * 4);
  float *y = (void *)behind(l->parameters[2], (size_t)n * 4);
  if (a == NULL || b == NULL || y == NULL) return ILLEGAL_ADDRESS;
  for (int64_t i = 0; i < n; i++) y[i] = a[i] + b[i];
  return OK;
}

static int run_scale(const action *l) {
  int64_t n = (int64_t)l->parameters[2];
  if (n > threads_of(l)) n = threads_of(l);
  const float *x = (void *)behind(l->parameters[0], (size_t)n * 4);
  float *y = (void *)behind(l->parameters[1], (size_t)n * 4);
  if (x == NULL || y == NULL) return ILLEGAL_ADDRESS;
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * (float)(int64_t)l->parameters[3];
  return OK;
}

static int run_sums(const action *l) {
  const float *x = (void *)behind(l->parameters[0], (size_t)threads_of(l) * 4);
  float *y = (void *)behind(l->parameters[1], l->grid[0] * 4);
  if (x == NULL || y == NULL || l->block[0] != 64) return ILLEGAL_ADDRESS;
  for (unsigned row = 0; row < l->grid[0]; row++) {
    y[row] = 0;
    for (int i = 0; i < 64; i++) y[row] += x[row * 64 + i];
  }
  return OK;
}

static int run_where(const action *l) {
  int32_t *y = (void *)behind(l->parameters[0], 4 * 3 * 8 * 4);
  unsigned size[3];
  for (int axis = 0; axis < 3; axis++) size[axis] = l->grid[axis] * l->block[axis];
  if (y == NULL || size[0] != 8 || size[1] != 3 || size[2] != 4) return ILLEGAL_ADDRESS;
  for (int i = 0; i < 4 * 3 * 8; i++) y[i] = i % 8 + i / 8 % 3 * 100 + i / 24 * 10000;
  return OK;
}

static int run_wild(const action *l) {
  const char *other = getenv("FAKE_CUDA_FAULT");
  if (behind(l->parameters[0], 4) != NULL) return OK;
  return other == NULL ? ILLEGAL_ADDRESS : atoi(other);
}

static const kernel kernels[] = {{"add", 4, 1024, run_add},   {"scale", 4, 512, run_scale}, {"sums", 2, 1024, run_sums},
                                 {"where", 1, 1024, run_where}, {"wild", 1, 1024, run_wild}};

/* ---- The driver ---------------------------------------------------------------------------------------------- */

static void report(void) {
  const char *path = getenv("FAKE_CUDA_REPORT");
  FILE *file = path == NULL ? NULL : fopen(path, "w");
  if (file == NULL) return;
  int alive = 0, contexts_alive = 0;
  for (int i = 0; i < ROOM; i++) alive += allocations[i].address != 0;
  for (int i = 0; i < DEVICES; i++) contexts_alive += retained[i];
  fprintf(file, "%d %d %d %d %d %d %d\n", contexts_alive, modules, streams, alive, depth, launches, waits);
  fclose(file);
}

API int cuInit(unsigned flags) {
  RULE(flags == 0, "flags");
  if (!initialized) atexit(report);
  initialized = 1;
  return getenv("FAKE_CUDA_BROKEN") == NULL ? OK : 804;
}

API int cuDriverGetVersion(int *version) { return *version = 12040, OK; }
API int cuDeviceGetCount(int *count) { return *count = initialized ? DEVICES : 0, OK; }
API int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < DEVICES ? OK : 101; }
API int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = MEMORY, (void)device, OK; }

API int cuDeviceGetName(char *name, int room, int device) {
  snprintf(name, (size_t)room, "Stand-in %d", device);
  return OK;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device) {
  static const int limits[] = {[1] = 1024, [2] = 1024, [3] = 1024, [4] = 64, [5] = 2147483647, [6] = 65535, [7] = 65535,
                               [8] = 49152, [16] = 4};
  RULE(device >= 0 && device < DEVICES, "no such device");
  if (attribute == 75 || attribute == 76) return *value = attribute == 75 ? 8 : 6, OK;
  RULE(attribute > 0 && attribute <= 16 && limits[attribute] != 0, "an attribute it does not know");
  return *value = limits[attribute], OK;
}

API int cuGetErrorName(int error, const char **text) {
  *text = error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : error == BAD_PTX       ? "CUDA_ERROR_INVALID_PTX"
          : error == NOT_FOUND     ? "CUDA_ERROR_NOT_FOUND"
                                   : NULL;
  return *text == NULL ? INVALID : OK;
}

API int cuGetErrorString(int error, const char **text) {
  *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : error == BAD_PTX ? "bad PTX" : NULL;
  return *text == NULL ? INVALID : OK;
}

API int cuDevicePrimaryCtxRetain(void **context, int device) {
  RULE(initialized && device >= 0 && device < DEVICES, "no such device");
  pthread_mutex_lock(&lock);
  retained[device]++;
  pthread_mutex_unlock(&lock);
  return *context = &contexts[device], OK;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
  pthread_mutex_lock(&lock);
  RULE(retained[device] > 0, "it is not retained");
  --retained[device]; /* a fault stays, as the real driver's does until the process ends */
  pthread_mutex_unlock(&lock);
  return OK;
}

API int cuCtxPushCurrent_v2(void *context) {
  int device = (int)((char *)context - contexts);
  RULE(device >= 0 && device < DEVICES && retained[device] > 0, "no context");
  RULE(depth < 16, "the stack grows");
  stack[depth++] = device;
  return OK;
}

API int cuCtxPopCurrent_v2(void **context) {
  *context = &contexts[current()];
  depth--;
  return OK;
}

API int cuMemGetInfo_v2(size_t *available, size_t *total) {
  current();
  *available = *total = MEMORY;
  for (int i = 0; i < ROOM; i++) *available -= allocations[i].bytes;
  return OK;
}

API int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  int device = current(), status = NO_MEMORY;
  RULE(bytes > 0, "no bytes");
  if (fault[device]) return fault[device];
  pthread_mutex_lock(&lock);
  void *memory = bytes <= MEMORY ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
  for (int i = 0; i < ROOM && memory != NULL && status != OK; i++) {
    if (allocations[i].address != 0) continue;
    memset(memory, 0xA5, bytes);
    *address = (uint64_t)(uintptr_t)memory | TAG;
    allocations[i] = (allocation){*address, bytes, device};
    status = OK;
  }
  pthread_mutex_unlock(&lock);
  return status;
}

API int cuMemFree_v2(uint64_t address) {
  int device = current(), found = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < ROOM; i++) {
    if (allocations[i].address != address) continue;
    RULE(allocations[i].device == device, "memory of another device");
    allocations[i] = (allocation){0, 0, 0};
    free((void *)(uintptr_t)(address & ~TAG));
    found = 1;
  }
  pthread_mutex_unlock(&lock);
  if (fault[device]) return fault[device];
  return found ? OK : INVALID;
}

API int cuModuleLoadDataEx(void **made, const void *image, unsigned n, int *options, void **values) {
  current();
  RULE(n == 2 && options[0] == 5 && options[1] == 6, "no log is wanted");
  RULE(strncmp(image, ".version", 8) == 0, "this is no PTX");
  if (strstr(image, "this_is_no_instruction") != NULL) {
    snprintf(values[0], (size_t)(uintptr_t)values[1], "ptxas application ptx input, line 4; error: Not a name: this_is");
    return BAD_PTX;
  }
  module *m = malloc(sizeof *m);
  m->text = image;
  pthread_mutex_lock(&lock);
  modules++;
  pthread_mutex_unlock(&lock);
  return *made = m, OK;
}

API int cuModuleUnload(void *m) {
  current();
  pthread_mutex_lock(&lock);
  modules--;
  pthread_mutex_unlock(&lock);
  free(m);
  return OK;
}

API int cuModuleGetFunction(const kernel **function, void *m, const char *name) {
  char entry[64];
  current();
  snprintf(entry, sizeof entry, ".entry %s(", name);
  if (strstr(((module *)m)->text, entry) == NULL) return NOT_FOUND;
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
    if (strcmp(kernels[i].name, name) == 0) return *function = &kernels[i], OK;
  }
  return NOT_FOUND;
}

API int cuFuncGetAttribute(int *value, int attribute, const kernel *function) {
  RULE(attribute == 0, "an attribute it does not know");
  return *value = function->max_threads, OK;
}

/* ---- Streams ------------------------------------------------------------------------------------------------- */

API int cuStreamCreate(stream **made, unsigned flags) {
  RULE(flags == 1, "a stream that waits for the default one");
  stream *s = calloc(1, sizeof *s);
  s->device = current();
  s->last = &s->first;
  pthread_mutex_lock(&lock);
  streams++;
  pthread_mutex_unlock(&lock);
  return *made = s, OK;
}

API int cuStreamDestroy_v2(stream *s) {
  RULE(s->device == current() && s->first == NULL, "it is not done");
  pthread_mutex_lock(&lock);
  streams--;
  pthread_mutex_unlock(&lock);
  free(s);
  return OK;
}

static int put(stream *s, action what) {
  RULE(s->device == current(), "a stream of another context");
  if (fault[s->device]) return fault[s->device];
  action *a = malloc(sizeof *a);
  *a = what;
  a->next = NULL;
  *s->last = a;
  s->last = &a->next;
  return OK;
}

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, stream *s) {
  RULE(behind(to, bytes) != NULL, "beyond an allocation");
  return put(s, (action){.kind = TO_DEVICE, .to = to, .from = (uintptr_t)from, .bytes = bytes});
}

API int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, stream *s) {
  RULE(behind(from, bytes) != NULL, "beyond an allocation");
  return put(s, (action){.kind = FROM_DEVICE, .to = (uintptr_t)to, .from = from, .bytes = bytes});
}

API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, stream *s) {
  RULE(behind(from, bytes) != NULL && behind(to, bytes) != NULL, "beyond an allocation");
  return put(s, (action){.kind = ON_DEVICE, .to = to, .from = from, .bytes = bytes});
}

API int cuLaunchKernel(const kernel *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                       unsigned bz, unsigned shared, stream *s, void **parameters, void **extra) {
  action what = {.kind = LAUNCH, .kernel = function, .grid = {gx, gy, gz}, .block = {bx, by, bz}};
  RULE(shared == 0 && extra == NULL, "neither is used here");
  RULE(gx > 0 && gy > 0 && gz > 0 && bx > 0 && by > 0 && bz > 0, "nothing to run");
  RULE((int64_t)bx * by * bz <= function->max_threads && bz <= 64, "too many threads");
  for (int i = 0; i < function->parameters; i++) memcpy(&what.parameters[i], parameters[i], 8);
  pthread_mutex_lock(&lock);
  launches++;
  pthread_mutex_unlock(&lock);
  return put(s, what);
}

static int perform(const action *a) {
  void *to = (void *)(uintptr_t)(a->to & ~TAG);
  const void *from = (const void *)(uintptr_t)(a->from & ~TAG);
  if (a->kind == LAUNCH) return a->kernel->run(a);
  RULE(a->kind == FROM_DEVICE || behind(a->to, a->bytes) != NULL, "freed while a copy into it was in the stream");
  RULE(a->kind == TO_DEVICE || behind(a->from, a->bytes) != NULL, "freed while a copy from it was in the stream");
  memmove(to, from, a->bytes);
  return OK;
}

API int cuStreamSynchronize(stream *s) {
  RULE(s->device == current(), "a stream of another context");
  pthread_mutex_lock(&lock);
  waits += s->first != NULL;
  while (s->first != NULL) {
    action *a = s->first;
    s->first = a->next;
    if (fault[s->device] == OK) fault[s->device] = perform(a);
    free(a);
  }
  s->last = &s->first;
  pthread_mutex_unlock(&lock);
  return fault[s->device];
}
