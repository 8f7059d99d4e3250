/* device_cuda.c: NVIDIA's GPUs through the driver's own interface, which comes with the driver.
 *
 * Nothing of CUDA is needed to build: what is used of cuda.h is declared here, from the driver API's manual. Contexts
 * use the device's primary context, the one that frameworks in the same process use as well, so that their memory can
 * be handed over. It is current only while a function of the runtime runs.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "device.h"

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

enum { CUDA_SUCCESS = 0, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_NO_DEVICE = 100 };
enum { STREAM_NON_BLOCKING = 1 };
enum { JIT_ERROR_LOG = 5, JIT_ERROR_LOG_BYTES = 6 };
enum { FUNC_MAX_THREADS = 0 };
enum { /* CUdevice_attribute */
  MAX_THREADS = 1, MAX_BLOCK_X = 2, MAX_GRID_X = 5, SHARED_MEMORY = 8, MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76
};

static struct {
  CUresult (*Init)(unsigned flags);
  CUresult (*DriverGetVersion)(int *version);
  CUresult (*GetErrorName)(CUresult error, const char **text);
  CUresult (*GetErrorString)(CUresult error, const char **text);
  CUresult (*DeviceGetCount)(int *count);
  CUresult (*DeviceGet)(CUdevice *device, int ordinal);
  CUresult (*DeviceGetName)(char *name, int room, CUdevice device);
  CUresult (*DeviceGetAttribute)(int *value, int attribute, CUdevice device);
  CUresult (*DeviceTotalMem)(size_t *bytes, CUdevice device);
  CUresult (*DevicePrimaryCtxRetain)(CUcontext *context, CUdevice device);
  CUresult (*DevicePrimaryCtxRelease)(CUdevice device);
  CUresult (*CtxPushCurrent)(CUcontext context);
  CUresult (*CtxPopCurrent)(CUcontext *context);
  CUresult (*MemGetInfo)(size_t *available, size_t *total);
  CUresult (*MemAlloc)(CUdeviceptr *address, size_t bytes);
  CUresult (*MemFree)(CUdeviceptr address);
  CUresult (*MemcpyHtoDAsync)(CUdeviceptr to, const void *from, size_t bytes, CUstream stream);
  CUresult (*MemcpyDtoHAsync)(void *to, CUdeviceptr from, size_t bytes, CUstream stream);
  CUresult (*MemcpyDtoDAsync)(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream);
  CUresult (*ModuleLoadDataEx)(CUmodule *module, const void *image, unsigned n, int *options, void **values);
  CUresult (*ModuleUnload)(CUmodule module);
  CUresult (*ModuleGetFunction)(CUfunction *function, CUmodule module, const char *name);
  CUresult (*FuncGetAttribute)(int *value, int attribute, CUfunction function);
  CUresult (*StreamCreate)(CUstream *stream, unsigned flags);
  CUresult (*StreamDestroy)(CUstream stream);
  CUresult (*StreamSynchronize)(CUstream stream);
  CUresult (*LaunchKernel)(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                           void **extra);
} cu;

/* In the order of the struct; of several versions of a function the one that cuda.h means. */
static const char *const symbols[] = {
    "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuDeviceGetCount", "cuDeviceGet",
    "cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem_v2", "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuMemGetInfo_v2", "cuMemAlloc_v2",
    "cuMemFree_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2", "cuModuleLoadDataEx",
    "cuModuleUnload", "cuModuleGetFunction", "cuFuncGetAttribute", "cuStreamCreate", "cuStreamDestroy_v2",
    "cuStreamSynchronize", "cuLaunchKernel", NULL,
};
_Static_assert(sizeof cu / sizeof(void *) == sizeof symbols / sizeof *symbols - 1, "one name for each function");

typedef struct {
  kedge_device base;
  CUdevice device;
  CUcontext context;
  int max_block[3], max_grid[3];
} cuda_device;

typedef struct { /* kernels, in the module's order */
  CUmodule code;       /* NULL where a kernel before has the same text */
  CUfunction function;
  int max_threads;
} cuda_kernel;

typedef struct {
  kedge_program base;
  cuda_kernel kernels[];
} cuda_program;

typedef struct {
  kedge_queue base;
  CUstream stream;
} cuda_queue;

/* ---- Failures ----------------------------------------------------------------------------------------------- */

static int32_t failed(int32_t status, CUresult result, const char *what) {
  const char *name = NULL, *text = NULL;
  cu.GetErrorName(result, &name);
  cu.GetErrorString(result, &text);
  return kedge_fail(status, "%s: %s (%s)", what, text == NULL ? "unknown error" : text, name == NULL ? "?" : name);
}

/* A failure of something in a queue. If the device faulted, synchronize, which follows, fails as well. */
static int32_t queue_failed(CUresult result, const char *what) {
  return failed(result == CUDA_ERROR_OUT_OF_MEMORY ? KEDGE_E_MEMORY : KEDGE_E_KERNEL, result, what);
}

/* ---- The driver and its devices ------------------------------------------------------------------------------ */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int n_devices;
static char why_none[512];

static void load_driver(void) {
  static const char *const names[] = {"libcuda.so.1", "libcuda.so", NULL};
  void *functions[sizeof symbols / sizeof *symbols - 1];
  kedge_text text = {.used = 0};
  const char *reason = kedge_load_driver(names, symbols, functions);
  if (reason != NULL) {
    kedge_text_add(&text, "there is no CUDA driver: %s", reason);
  } else {
    memcpy(&cu, functions, sizeof cu);
    CUresult result = cu.Init(0);
    if (result == CUDA_SUCCESS) result = cu.DeviceGetCount(&n_devices);
    if (result != CUDA_SUCCESS) {
      n_devices = 0;
      failed(KEDGE_E_LOAD, result, "the CUDA driver cannot be used");
      kedge_text_add(&text, "%s", kedge_last_error());
    }
  }
  memcpy(why_none, text.data, sizeof why_none);
}

static int32_t count(void) {
  pthread_once(&once, load_driver);
  if (n_devices == 0 && why_none[0] != '\0') kedge_fail(KEDGE_E_LOAD, "%s", why_none);
  return n_devices;
}

static CUresult attributes(CUdevice device, int first, int n, int *values) {
  CUresult result = CUDA_SUCCESS;
  for (int i = 0; i < n && result == CUDA_SUCCESS; i++) {
    result = cu.DeviceGetAttribute(&values[i], first + i, device);
  }
  return result;
}

/* fp16, fp64 and every architecture whose code runs on this one; code for sm_90a runs on sm_90 alone, and so on. */
static char *features_of(int capability) {
  static const int architectures[] = {50, 52, 53, 60, 61, 62, 70,  72,  75,  80,
                                      86, 87, 88, 89, 90, 100, 103, 110, 120, 121};
  kedge_text text = {.used = 0};
  kedge_text_add(&text, "%sfp64", capability >= 53 ? "fp16," : "");
  for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++) {
    if (architectures[i] < capability) kedge_text_add(&text, ",sm_%d", architectures[i]);
  }
  kedge_text_add(&text, ",sm_%d", capability);
  if (capability >= 90) kedge_text_add(&text, ",sm_%da", capability);
  return strdup(text.data);
}

static int32_t describe(int32_t id, kedge_device_properties *properties) {
  CUdevice device;
  char name[256] = "";
  int version = 0, threads = 0, shared = 0, processors = 0, capability[2] = {0, 0};
  size_t memory = 0;
  CUresult result = cu.DeviceGet(&device, id);
  if (result == CUDA_SUCCESS) result = cu.DeviceGetName(name, sizeof name, device);
  if (result == CUDA_SUCCESS) result = cu.DriverGetVersion(&version);
  if (result == CUDA_SUCCESS) result = cu.DeviceTotalMem(&memory, device);
  if (result == CUDA_SUCCESS) result = attributes(device, MAX_THREADS, 1, &threads);
  if (result == CUDA_SUCCESS) result = attributes(device, SHARED_MEMORY, 1, &shared);
  if (result == CUDA_SUCCESS) result = attributes(device, MULTIPROCESSORS, 1, &processors);
  if (result == CUDA_SUCCESS) result = attributes(device, MAJOR, 2, capability);
  if (result != CUDA_SUCCESS) return failed(KEDGE_E_LOAD, result, "the CUDA device does not say what it is");
  kedge_text arch = {.used = 0}, driver = {.used = 0};
  kedge_text_add(&arch, "sm_%d", capability[0] * 10 + capability[1]);
  kedge_text_add(&driver, "CUDA %d.%d", version / 1000, version % 1000 / 10);
  properties->name = strdup(name);
  properties->arch = strdup(arch.data);
  properties->driver_version = strdup(driver.data);
  properties->features = features_of(capability[0] * 10 + capability[1]);
  properties->global_memory = properties->max_allocation = memory;
  properties->local_memory = (uint64_t)shared;
  properties->max_group = threads;
  properties->compute_units = processors;
  bool done = properties->name != NULL && properties->arch != NULL && properties->driver_version != NULL &&
              properties->features != NULL;
  return done ? KEDGE_OK : kedge_fail(KEDGE_E_MEMORY, "out of memory");
}

/* A fault stays with the process: the driver gives it back for every call, also after all contexts are gone. */
static _Atomic bool faulted;

static int32_t open_device(int32_t id, kedge_device **device) {
  if (atomic_load(&faulted)) {
    return kedge_fail(KEDGE_E_LOAD, "a CUDA device faulted earlier: %s", kedge_cuda_driver.after_fault);
  }
  cuda_device *opened = calloc(1, sizeof *opened);
  if (opened == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  CUresult result = cu.DeviceGet(&opened->device, id);
  if (result == CUDA_SUCCESS) result = attributes(opened->device, MAX_BLOCK_X, 3, opened->max_block);
  if (result == CUDA_SUCCESS) result = attributes(opened->device, MAX_GRID_X, 3, opened->max_grid);
  if (result == CUDA_SUCCESS) result = cu.DevicePrimaryCtxRetain(&opened->context, opened->device);
  if (result == CUDA_SUCCESS) {
    *device = &opened->base;
    return KEDGE_OK;
  }
  free(opened);
  int32_t status = result == CUDA_ERROR_OUT_OF_MEMORY ? KEDGE_E_MEMORY : KEDGE_E_LOAD;
  return failed(status, result, "the CUDA device cannot be opened");
}

static void close_device(kedge_device *device) {
  cuda_device *d = (cuda_device *)device;
  cu.DevicePrimaryCtxRelease(d->device);
  free(d);
}

static int32_t enter(kedge_device *device) {
  CUresult result = cu.CtxPushCurrent(((cuda_device *)device)->context);
  return result == CUDA_SUCCESS ? KEDGE_OK : failed(KEDGE_E_KERNEL, result, "the CUDA context cannot be made current");
}

static void leave(kedge_device *device) {
  (void)device;
  CUcontext popped;
  cu.CtxPopCurrent(&popped);
}

/* ---- Memory ------------------------------------------------------------------------------------------------- */

static int32_t allocate(kedge_device *device, uint64_t bytes, void **address) {
  CUdeviceptr made = 0;
  CUresult result = bytes <= SIZE_MAX ? cu.MemAlloc(&made, (size_t)bytes) : CUDA_ERROR_OUT_OF_MEMORY;
  *address = (void *)(uintptr_t)made;
  if (result == CUDA_SUCCESS) return KEDGE_OK;
  if (result != CUDA_ERROR_OUT_OF_MEMORY) return failed(KEDGE_E_KERNEL, result, "no device memory");
  size_t available = 0, total = 0;
  cu.MemGetInfo(&available, &total);
  return kedge_fail(KEDGE_E_MEMORY, "out of device memory: %llu bytes wanted, %s has %llu of %llu left",
                    (unsigned long long)bytes, device->properties->name, (unsigned long long)available,
                    (unsigned long long)total);
}

static int32_t release(kedge_device *device, void *address) {
  (void)device;
  CUresult result = cu.MemFree((uintptr_t)address);
  return result == CUDA_SUCCESS ? KEDGE_OK : failed(KEDGE_E_ARGUMENT, result, "device memory cannot be freed");
}

static int32_t copy(kedge_queue *queue, void *to, const void *from, uint64_t bytes, kedge_copy_direction direction) {
  CUstream stream = ((cuda_queue *)queue)->stream;
  size_t size = (size_t)bytes;
  CUresult result = CUDA_SUCCESS;
  if (direction == KEDGE_COPY_TO_DEVICE) {
    result = cu.MemcpyHtoDAsync((uintptr_t)to, from, size, stream);
  } else if (direction == KEDGE_COPY_FROM_DEVICE) {
    result = cu.MemcpyDtoHAsync(to, (uintptr_t)from, size, stream);
  } else {
    result = cu.MemcpyDtoDAsync((uintptr_t)to, (uintptr_t)from, size, stream);
  }
  return result == CUDA_SUCCESS ? KEDGE_OK : queue_failed(result, "a copy failed");
}

/* ---- Kernels ------------------------------------------------------------------------------------------------ */

static int32_t load_code(const kedge_device *device, const kedge_device_kernel *kernel, CUmodule *module) {
  char log[3072] = "";
  int options[] = {JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES};
  void *values[] = {log, (void *)(uintptr_t)(sizeof log - 1)};
  CUresult result = cu.ModuleLoadDataEx(module, kernel->code, 2, options, values);
  if (result == CUDA_SUCCESS) return KEDGE_OK;
  *module = NULL;
  int32_t status = failed(KEDGE_E_LOAD, result, "the CUDA driver refuses the code");
  return kedge_fail_within(status, "kernel %s on %s: %s", kernel->name, device->properties->name, log);
}

static int32_t find_function(const kedge_device_kernel *kernel, CUmodule code, cuda_kernel *found) {
  CUresult result = cu.ModuleGetFunction(&found->function, code, kernel->name);
  if (result == CUDA_SUCCESS) result = cu.FuncGetAttribute(&found->max_threads, FUNC_MAX_THREADS, found->function);
  if (result == CUDA_SUCCESS) return KEDGE_OK;
  failed(KEDGE_E_LOAD, result, "the code has no such kernel");
  return kedge_fail_within(KEDGE_E_LOAD, "kernel %s", kernel->name);
}

static void unload(kedge_program *program) {
  cuda_program *p = (cuda_program *)program;
  for (int32_t i = 0; i < p->base.module->n_kernels; i++) {
    if (p->kernels[i].code != NULL) cu.ModuleUnload(p->kernels[i].code);
  }
  free(p);
}

static int32_t load(kedge_device *device, const kedge_module_desc *module, kedge_program **program) {
  cuda_program *p = calloc(1, sizeof *p + sizeof *p->kernels * (size_t)module->n_kernels);
  if (p == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  p->base.module = module;
  int32_t status = KEDGE_OK;
  for (int32_t i = 0; i < module->n_kernels && status == KEDGE_OK; i++) {
    const kedge_device_kernel *kernel = module->kernels[i];
    CUmodule code = NULL;
    for (int32_t j = 0; j < i && code == NULL; j++) {
      if (module->kernels[j]->code == kernel->code) code = p->kernels[j].code;
    }
    if (code == NULL) {
      status = load_code(device, kernel, &p->kernels[i].code);
      code = p->kernels[i].code;
    }
    if (status == KEDGE_OK) status = find_function(kernel, code, &p->kernels[i]);
  }
  if (status != KEDGE_OK) {
    unload(&p->base);
    return status;
  }
  *program = &p->base;
  return KEDGE_OK;
}

/* ---- Queues ------------------------------------------------------------------------------------------------- */

static int32_t begin(kedge_device *device, const kedge_program *program, kedge_queue **queue) {
  cuda_queue *made = calloc(1, sizeof *made);
  if (made == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  made->base.device = device;
  made->base.program = program;
  CUresult result = cu.StreamCreate(&made->stream, STREAM_NON_BLOCKING);
  if (result != CUDA_SUCCESS) {
    free(made);
    return failed(result == CUDA_ERROR_OUT_OF_MEMORY ? KEDGE_E_MEMORY : KEDGE_E_LOAD, result, "no CUDA stream");
  }
  *queue = &made->base;
  return KEDGE_OK;
}

static void end(kedge_queue *queue) {
  cuda_queue *q = (cuda_queue *)queue;
  cu.StreamSynchronize(q->stream);
  cu.StreamDestroy(q->stream);
  free(q);
}

static int32_t check_sizes(const cuda_device *device, const kedge_launch *launch, const cuda_kernel *kernel) {
  int64_t threads = 1;
  for (int axis = 0; axis < 3; axis++) {
    if (launch->block[axis] > device->max_block[axis] || launch->grid[axis] > device->max_grid[axis]) {
      bool block = launch->block[axis] > device->max_block[axis];
      return kedge_fail(KEDGE_E_FEATURE, "kernel %s: %lld %s along %c, %s allows at most %d", launch->kernel->name,
                        (long long)(block ? launch->block[axis] : launch->grid[axis]),
                        block ? "threads of a block" : "blocks", "xyz"[axis], device->base.properties->name,
                        block ? device->max_block[axis] : device->max_grid[axis]);
    }
    threads *= launch->block[axis]; /* each is at most an int: three of them overflow nothing that is let through */
    if (threads > kernel->max_threads) {
      return kedge_fail(KEDGE_E_FEATURE, "kernel %s: a block of %lld x %lld x %lld threads, %s allows it at most %d",
                        launch->kernel->name, (long long)launch->block[0], (long long)launch->block[1],
                        (long long)launch->block[2], device->base.properties->name, kernel->max_threads);
    }
  }
  return KEDGE_OK;
}

static int32_t launch(kedge_queue *queue, const kedge_launch *launch, int32_t index) {
  cuda_queue *q = (cuda_queue *)queue;
  const cuda_kernel *kernel = &((const cuda_program *)queue->program)->kernels[index];
  int32_t status = check_sizes((const cuda_device *)queue->device, launch, kernel);
  if (status != KEDGE_OK) return status;
  void *parameters[2 * KEDGE_MAX_PARAMETERS];
  int32_t n = launch->kernel->n_buffers + launch->kernel->n_scalars;
  for (int32_t i = 0; i < n; i++) parameters[i] = (void *)&launch->args[i]; /* addresses and values are 64 bits wide */
  const int64_t *grid = launch->grid, *block = launch->block;
  CUresult result = cu.LaunchKernel(kernel->function, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2],
                                    (unsigned)block[0], (unsigned)block[1], (unsigned)block[2], 0, q->stream,
                                    parameters, NULL);
  if (result == CUDA_SUCCESS) return KEDGE_OK;
  status = queue_failed(result, "the launch failed");
  return kedge_fail_within(status, "kernel %s on %s", launch->kernel->name, queue->device->properties->name);
}

static int32_t synchronize(kedge_queue *queue) {
  CUresult result = cu.StreamSynchronize(((cuda_queue *)queue)->stream);
  if (result == CUDA_SUCCESS) return KEDGE_OK;
  queue->faulted = true; /* whatever it was, nobody knows how far the stream came */
  if (result != CUDA_ERROR_OUT_OF_MEMORY) atomic_store(&faulted, true);
  int32_t status = queue_failed(result, "the device failed");
  return kedge_fail_within(status, "%s", queue->device->properties->name);
}

const kedge_driver kedge_cuda_driver = {
    .name = "CUDA",
    .device_type = kDLCUDA,
    .after_fault = "only a new process can use CUDA again",
    .count = count,
    .describe = describe,
    .open = open_device,
    .close = close_device,
    .enter = enter,
    .leave = leave,
    .allocate = allocate,
    .release = release,
    .load = load,
    .unload = unload,
    .begin = begin,
    .end = end,
    .copy = copy,
    .launch = launch,
    .synchronize = synchronize,
};
