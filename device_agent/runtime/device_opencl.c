/* device_opencl.c: GPUs and other devices through OpenCL 1.2.
 *
 * Nothing of OpenCL is needed to build: what is used of its headers is declared here, from the specification.
 *
 * A buffer of OpenCL 1.2 has no address, but compiled code computes with addresses: addresses.c gives each one.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "device.h"

typedef int32_t cl_int;
typedef uint32_t cl_uint;
typedef uint64_t cl_bits; /* cl_bitfield, and cl_ulong */
typedef intptr_t cl_property;
typedef struct cl_platform *cl_platform_id;
typedef struct cl_device *cl_device_id;
typedef struct cl_context_ *cl_context;
typedef struct cl_queue *cl_command_queue;
typedef struct cl_memory *cl_mem;
typedef struct cl_program_ *cl_program;
typedef struct cl_kernel_ *cl_kernel;
typedef struct cl_event_ *cl_event;

enum { CL_SUCCESS = 0, CL_MEM_OBJECT_ALLOCATION_FAILURE = -4, CL_OUT_OF_RESOURCES = -5, CL_OUT_OF_HOST_MEMORY = -6 };
enum { CL_TYPE_GPU = 4, CL_MEM_READ_WRITE = 1, CL_FALSE = 0 };
#define CL_TYPE_ALL 0xFFFFFFFFu
enum { /* cl_device_info */
  CL_DEVICE_TYPE = 0x1000, CL_DEVICE_COMPUTE_UNITS = 0x1002, CL_DEVICE_GROUP = 0x1004, CL_DEVICE_ITEMS = 0x1005,
  CL_DEVICE_MAX_ALLOCATION = 0x1010, CL_DEVICE_GLOBAL_MEMORY = 0x101F, CL_DEVICE_LOCAL_MEMORY = 0x1023,
  CL_DEVICE_AVAILABLE = 0x1027, CL_DEVICE_COMPILER = 0x1028, CL_DEVICE_NAME = 0x102B, CL_DRIVER_VERSION = 0x102D,
  CL_DEVICE_EXTENSIONS = 0x1030, CL_DEVICE_DOUBLE = 0x1032, CL_DEVICE_C_VERSION = 0x103D
};
enum { CL_PROGRAM_BUILD_LOG = 0x1183, CL_KERNEL_NUM_ARGS = 0x1191, CL_KERNEL_GROUP = 0x11B0 };

static struct {
  cl_int (*GetPlatformIDs)(cl_uint room, cl_platform_id *platforms, cl_uint *count);
  cl_int (*GetDeviceIDs)(cl_platform_id platform, cl_bits type, cl_uint room, cl_device_id *devices, cl_uint *count);
  cl_int (*GetDeviceInfo)(cl_device_id device, cl_uint what, size_t room, void *value, size_t *size);
  cl_context (*CreateContext)(const cl_property *properties, cl_uint n, const cl_device_id *devices,
                              void (*notify)(const char *, const void *, size_t, void *), void *user, cl_int *error);
  cl_int (*ReleaseContext)(cl_context context);
  cl_command_queue (*CreateCommandQueue)(cl_context context, cl_device_id device, cl_bits properties, cl_int *error);
  cl_int (*ReleaseCommandQueue)(cl_command_queue queue);
  cl_mem (*CreateBuffer)(cl_context context, cl_bits flags, size_t size, void *host, cl_int *error);
  cl_int (*ReleaseMemObject)(cl_mem memory);
  cl_program (*CreateProgramWithSource)(cl_context context, cl_uint n, const char **texts, const size_t *sizes,
                                        cl_int *error);
  cl_int (*BuildProgram)(cl_program program, cl_uint n, const cl_device_id *devices, const char *options,
                         void (*notify)(cl_program, void *), void *user);
  cl_int (*GetProgramBuildInfo)(cl_program program, cl_device_id device, cl_uint what, size_t room, void *value,
                                size_t *size);
  cl_int (*ReleaseProgram)(cl_program program);
  cl_kernel (*CreateKernel)(cl_program program, const char *name, cl_int *error);
  cl_int (*GetKernelInfo)(cl_kernel kernel, cl_uint what, size_t room, void *value, size_t *size);
  cl_int (*GetKernelWorkGroupInfo)(cl_kernel kernel, cl_device_id device, cl_uint what, size_t room, void *value,
                                   size_t *size);
  cl_int (*SetKernelArg)(cl_kernel kernel, cl_uint index, size_t size, const void *value);
  cl_int (*ReleaseKernel)(cl_kernel kernel);
  cl_int (*EnqueueWriteBuffer)(cl_command_queue queue, cl_mem to, cl_uint blocking, size_t offset, size_t size,
                               const void *from, cl_uint n, const cl_event *after, cl_event *event);
  cl_int (*EnqueueReadBuffer)(cl_command_queue queue, cl_mem from, cl_uint blocking, size_t offset, size_t size,
                              void *to, cl_uint n, const cl_event *after, cl_event *event);
  cl_int (*EnqueueCopyBuffer)(cl_command_queue queue, cl_mem from, cl_mem to, size_t from_offset, size_t to_offset,
                              size_t size, cl_uint n, const cl_event *after, cl_event *event);
  cl_int (*EnqueueNDRangeKernel)(cl_command_queue queue, cl_kernel kernel, cl_uint dims, const size_t *offset,
                                 const size_t *global, const size_t *local, cl_uint n, const cl_event *after,
                                 cl_event *event);
  cl_int (*WaitForEvents)(cl_uint n, const cl_event *events);
  cl_int (*ReleaseEvent)(cl_event event);
  cl_int (*Flush)(cl_command_queue queue);
  cl_int (*Finish)(cl_command_queue queue);
} cl;

static const char *const symbols[] = {
    "clGetPlatformIDs", "clGetDeviceIDs", "clGetDeviceInfo", "clCreateContext", "clReleaseContext",
    "clCreateCommandQueue", "clReleaseCommandQueue", "clCreateBuffer", "clReleaseMemObject",
    "clCreateProgramWithSource", "clBuildProgram", "clGetProgramBuildInfo", "clReleaseProgram", "clCreateKernel",
    "clGetKernelInfo", "clGetKernelWorkGroupInfo", "clSetKernelArg", "clReleaseKernel", "clEnqueueWriteBuffer",
    "clEnqueueReadBuffer", "clEnqueueCopyBuffer", "clEnqueueNDRangeKernel", "clWaitForEvents", "clReleaseEvent",
    "clFlush", "clFinish", NULL,
}; /* in the order of the struct */
_Static_assert(sizeof cl / sizeof(void *) == sizeof symbols / sizeof *symbols - 1, "one name for each function");

typedef struct {
  kedge_device base;
  cl_device_id device;
  cl_context context;
  size_t max_group, max_items[3];
  kedge_addresses addresses; /* of its buffers */
} opencl_device;

typedef struct {
  kedge_program base;
  cl_program program; /* NULL where there are no kernels */
} opencl_program;

typedef struct {
  cl_kernel kernel;
  size_t max_group;
} opencl_kernel;

enum { BACKLOG = 512 }; /* launches between two marks; at most twice as many are not done */

typedef struct {
  kedge_queue base;
  cl_command_queue queue;
  cl_event mark;    /* the last launch that was a multiple of BACKLOG, or NULL */
  int32_t launches; /* since then */
  int32_t n_kernels;
  opencl_kernel kernels[]; /* in the module's order; a queue's own, since setting an argument changes a kernel */
} opencl_queue;

/* ---- Failures ----------------------------------------------------------------------------------------------- */

static const char *name_of(cl_int error) {
  switch (error) {
    case -1: return "CL_DEVICE_NOT_FOUND";
    case -2: return "CL_DEVICE_NOT_AVAILABLE";
    case -3: return "CL_COMPILER_NOT_AVAILABLE";
    case -4: return "CL_MEM_OBJECT_ALLOCATION_FAILURE";
    case -5: return "CL_OUT_OF_RESOURCES";
    case -6: return "CL_OUT_OF_HOST_MEMORY";
    case -11: return "CL_BUILD_PROGRAM_FAILURE";
    case -14: return "CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST";
    case -36: return "CL_INVALID_COMMAND_QUEUE";
    case -45: return "CL_INVALID_PROGRAM_EXECUTABLE";
    case -46: return "CL_INVALID_KERNEL_NAME";
    case -48: return "CL_INVALID_KERNEL";
    case -49: return "CL_INVALID_ARG_INDEX";
    case -50: return "CL_INVALID_ARG_VALUE";
    case -51: return "CL_INVALID_ARG_SIZE";
    case -52: return "CL_INVALID_KERNEL_ARGS";
    case -54: return "CL_INVALID_WORK_GROUP_SIZE";
    case -55: return "CL_INVALID_WORK_ITEM_SIZE";
    case -61: return "CL_INVALID_BUFFER_SIZE";
    case -63: return "CL_INVALID_GLOBAL_WORK_SIZE";
    default: return "an error of OpenCL";
  }
}

static int32_t failed(int32_t status, cl_int error, const char *what) {
  if (error == CL_MEM_OBJECT_ALLOCATION_FAILURE || error == CL_OUT_OF_HOST_MEMORY) status = KEDGE_E_MEMORY;
  return kedge_fail(status, "%s: %s (%d)", what, name_of(error), error);
}

/* ---- The driver and its devices ------------------------------------------------------------------------------ */

enum { MAX_PLATFORMS = 16, MAX_DEVICES = 64 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static cl_device_id devices[MAX_DEVICES]; /* GPUs first, else as the platforms name them */
static int n_devices;
static char why_none[512];

static void list_devices(bool gpus) {
  cl_platform_id platforms[MAX_PLATFORMS];
  cl_uint n_platforms = 0;
  /* A failure is how it says that there are none. */
  if (cl.GetPlatformIDs(MAX_PLATFORMS, platforms, &n_platforms) != CL_SUCCESS) return;
  for (cl_uint p = 0; p < n_platforms && p < MAX_PLATFORMS; p++) {
    cl_device_id found[MAX_DEVICES];
    cl_uint count = 0;
    if (cl.GetDeviceIDs(platforms[p], CL_TYPE_ALL, MAX_DEVICES, found, &count) != CL_SUCCESS) continue; /* none here */
    for (cl_uint d = 0; d < count && d < MAX_DEVICES && n_devices < MAX_DEVICES; d++) {
      cl_bits type = 0;
      cl_int error = cl.GetDeviceInfo(found[d], CL_DEVICE_TYPE, sizeof type, &type, NULL);
      if (error == CL_SUCCESS && ((type & CL_TYPE_GPU) != 0) == gpus) devices[n_devices++] = found[d];
    }
  }
}

static void load_driver(void) {
  static const char *const names[] = {"libOpenCL.so.1", "libOpenCL.so", "libGLES_mali.so", NULL};
  void *functions[sizeof symbols / sizeof *symbols - 1];
  const char *reason = kedge_load_driver(names, symbols, functions);
  kedge_text text = {.used = 0};
  if (reason != NULL) {
    kedge_text_add(&text, "there is no OpenCL driver: %s", reason);
  } else {
    memcpy(&cl, functions, sizeof cl);
    list_devices(true);
    list_devices(false);
    if (n_devices == 0) kedge_text_add(&text, "OpenCL finds no device: is the driver of the device installed?");
  }
  memcpy(why_none, text.data, sizeof why_none);
}

static int32_t count(void) {
  pthread_once(&once, load_driver);
  if (n_devices == 0) kedge_fail(KEDGE_E_LOAD, "%s", why_none);
  return n_devices;
}

/* A new string, or NULL. */
static char *text_info(cl_device_id device, cl_uint what) {
  size_t size = 0;
  if (cl.GetDeviceInfo(device, what, 0, NULL, &size) != CL_SUCCESS) return NULL;
  char *text = calloc(size + 1, 1);
  if (text == NULL || cl.GetDeviceInfo(device, what, size, text, NULL) == CL_SUCCESS) return text;
  free(text);
  return NULL;
}

/* fp16 and fp64 where it has them, then its extensions. */
static char *features_of(cl_device_id device, bool has_double) {
  char *extensions = text_info(device, CL_DEVICE_EXTENSIONS), *rest;
  char *features = extensions == NULL ? NULL : calloc(strlen(extensions) + sizeof "fp16,fp64,", 1);
  if (features != NULL) {
    if (strstr(extensions, "cl_khr_fp16") != NULL) strcat(features, "fp16");
    if (has_double) strcat(features, features[0] == '\0' ? "fp64" : ",fp64");
    for (char *name = strtok_r(extensions, " ", &rest); name != NULL; name = strtok_r(NULL, " ", &rest)) {
      if (features[0] != '\0') strcat(features, ",");
      strcat(features, name);
    }
  }
  free(extensions);
  return features;
}

static int32_t describe(int32_t id, kedge_device_properties *properties) {
  cl_device_id device = devices[id];
  cl_uint units = 0;
  size_t group = 0;
  cl_bits global = 0, local = 0, allocation = 0, doubles = 0;
  cl_int error = cl.GetDeviceInfo(device, CL_DEVICE_COMPUTE_UNITS, sizeof units, &units, NULL);
  if (error == CL_SUCCESS) error = cl.GetDeviceInfo(device, CL_DEVICE_GROUP, sizeof group, &group, NULL);
  if (error == CL_SUCCESS) error = cl.GetDeviceInfo(device, CL_DEVICE_GLOBAL_MEMORY, sizeof global, &global, NULL);
  if (error == CL_SUCCESS) error = cl.GetDeviceInfo(device, CL_DEVICE_LOCAL_MEMORY, sizeof local, &local, NULL);
  if (error == CL_SUCCESS) {
    error = cl.GetDeviceInfo(device, CL_DEVICE_MAX_ALLOCATION, sizeof allocation, &allocation, NULL);
  }
  if (error != CL_SUCCESS) return failed(KEDGE_E_LOAD, error, "the OpenCL device does not say what it is");
  /* Optional in 1.2: a device that does not know the question has none. */
  if (cl.GetDeviceInfo(device, CL_DEVICE_DOUBLE, sizeof doubles, &doubles, NULL) != CL_SUCCESS) doubles = 0;
  properties->name = text_info(device, CL_DEVICE_NAME);
  properties->driver_version = text_info(device, CL_DRIVER_VERSION);
  properties->arch = text_info(device, CL_DEVICE_C_VERSION);
  properties->features = features_of(device, doubles != 0);
  properties->global_memory = global;
  properties->local_memory = local;
  properties->max_allocation = allocation;
  properties->max_group = (int64_t)group;
  properties->compute_units = units;
  bool done = properties->name != NULL && properties->driver_version != NULL && properties->arch != NULL &&
              properties->features != NULL;
  return done ? KEDGE_OK : kedge_fail(KEDGE_E_LOAD, "the OpenCL device does not say what it is");
}

static int32_t open_device(int32_t id, kedge_device **device) {
  cl_uint available = 0, compiler = 0;
  cl_int error = cl.GetDeviceInfo(devices[id], CL_DEVICE_AVAILABLE, sizeof available, &available, NULL);
  if (error == CL_SUCCESS) error = cl.GetDeviceInfo(devices[id], CL_DEVICE_COMPILER, sizeof compiler, &compiler, NULL);
  if (error == CL_SUCCESS && !(available && compiler)) {
    return kedge_fail(KEDGE_E_LOAD, "OpenCL device %d %s", id, available ? "has no compiler" : "is not available");
  }
  opencl_device *opened = calloc(1, sizeof *opened);
  if (opened == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  opened->device = devices[id];
  size_t group = sizeof opened->max_group, items = sizeof opened->max_items;
  if (error == CL_SUCCESS) error = cl.GetDeviceInfo(opened->device, CL_DEVICE_GROUP, group, &opened->max_group, NULL);
  if (error == CL_SUCCESS) error = cl.GetDeviceInfo(opened->device, CL_DEVICE_ITEMS, items, opened->max_items, NULL);
  if (error == CL_SUCCESS) opened->context = cl.CreateContext(NULL, 1, &opened->device, NULL, NULL, &error);
  if (error != CL_SUCCESS) {
    free(opened);
    return failed(KEDGE_E_LOAD, error, "the OpenCL device cannot be opened");
  }
  kedge_addresses_init(&opened->addresses);
  *device = &opened->base;
  return KEDGE_OK;
}

static void close_device(kedge_device *device) {
  opencl_device *d = (opencl_device *)device;
  /* What its users forgot. */
  for (void *left; (left = kedge_any_address(&d->addresses)) != NULL;) {
    cl.ReleaseMemObject(kedge_free_address(&d->addresses, left));
  }
  kedge_addresses_destroy(&d->addresses);
  cl.ReleaseContext(d->context);
  free(d);
}

/* ---- Memory ------------------------------------------------------------------------------------------------- */

/* The buffer that `bytes` from an address on are in, and where. */
static bool find(opencl_device *device, const void *address, uint64_t bytes, cl_mem *memory, uint64_t *offset) {
  void *object = NULL;
  bool found = kedge_find_address(&device->addresses, address, bytes, &object, offset);
  *memory = object;
  return found;
}

static bool holds(kedge_device *device, const void *address, uint64_t bytes) {
  cl_mem memory;
  uint64_t offset;
  return find((opencl_device *)device, address, bytes, &memory, &offset);
}

static int32_t no_memory(const kedge_device *device, uint64_t bytes, const char *why) {
  const kedge_device_properties *p = device->properties;
  unsigned long long wanted = bytes, most = p->max_allocation, all = p->global_memory;
  return kedge_fail(KEDGE_E_MEMORY,
                    "out of device memory: %llu bytes wanted, %s has %llu and gives at most %llu at once: %s", wanted,
                    p->name, all, most, why);
}

static int32_t allocate(kedge_device *device, uint64_t bytes, void **address) {
  opencl_device *d = (opencl_device *)device;
  *address = NULL;
  if (bytes > device->properties->max_allocation || bytes > SIZE_MAX / 2) return no_memory(device, bytes, "too much");
  cl_int error;
  cl_mem memory = cl.CreateBuffer(d->context, CL_MEM_READ_WRITE, (size_t)bytes, NULL, &error);
  if (error != CL_SUCCESS) return no_memory(device, bytes, name_of(error));
  *address = kedge_new_address(&d->addresses, (size_t)bytes, memory);
  if (*address != NULL) return KEDGE_OK;
  cl.ReleaseMemObject(memory);
  return no_memory(device, bytes, "no room in this process's address space");
}

static int32_t release(kedge_device *device, void *address) {
  cl_mem memory = kedge_free_address(&((opencl_device *)device)->addresses, address);
  if (memory == NULL) {
    return kedge_fail(KEDGE_E_ARGUMENT, "%p is not the start of memory on OpenCL device %d", address, device->id);
  }
  cl_int error = cl.ReleaseMemObject(memory);
  return error == CL_SUCCESS ? KEDGE_OK : failed(KEDGE_E_KERNEL, error, "device memory cannot be freed");
}

static int32_t copy(kedge_queue *queue, void *to, const void *from, uint64_t bytes, kedge_copy_direction direction) {
  opencl_queue *q = (opencl_queue *)queue;
  opencl_device *device = (opencl_device *)queue->device;
  cl_mem target = NULL, source = NULL;
  uint64_t target_at = 0, source_at = 0;
  bool ok = direction == KEDGE_COPY_FROM_DEVICE || find(device, to, bytes, &target, &target_at);
  ok = ok && (direction == KEDGE_COPY_TO_DEVICE || find(device, from, bytes, &source, &source_at));
  if (!ok) {
    return kedge_fail(KEDGE_E_ARGUMENT, "%llu bytes that are not in one piece of memory on OpenCL device %d",
                      (unsigned long long)bytes, device->base.id);
  }
  size_t size = (size_t)bytes, t = (size_t)target_at, s = (size_t)source_at;
  cl_int error = CL_SUCCESS;
  if (direction == KEDGE_COPY_TO_DEVICE) {
    error = cl.EnqueueWriteBuffer(q->queue, target, CL_FALSE, t, size, from, 0, NULL, NULL);
  } else if (direction == KEDGE_COPY_FROM_DEVICE) {
    error = cl.EnqueueReadBuffer(q->queue, source, CL_FALSE, s, size, to, 0, NULL, NULL);
  } else {
    error = cl.EnqueueCopyBuffer(q->queue, source, target, s, t, size, 0, NULL, NULL);
  }
  return error == CL_SUCCESS ? KEDGE_OK : failed(KEDGE_E_KERNEL, error, "a copy failed");
}

/* ---- Kernels ------------------------------------------------------------------------------------------------ */

static int32_t build_failed(const kedge_device *device, cl_program program, cl_int error) {
  size_t size = 0;
  cl_device_id id = ((const opencl_device *)device)->device;
  char *log = NULL;
  cl_int known = cl.GetProgramBuildInfo(program, id, CL_PROGRAM_BUILD_LOG, 0, NULL, &size);
  if (known == CL_SUCCESS) log = calloc(size + 1, 1);
  if (log != NULL) cl.GetProgramBuildInfo(program, id, CL_PROGRAM_BUILD_LOG, size, log, NULL);
  int32_t status = kedge_fail(KEDGE_E_LOAD, "%s cannot build the module's kernels: %s: %s", device->properties->name,
                              name_of(error), log == NULL ? "(no log)" : log);
  free(log);
  return status;
}

static void unload(kedge_program *program) {
  opencl_program *p = (opencl_program *)program;
  if (p->program != NULL) cl.ReleaseProgram(p->program);
  free(p);
}

/* One program of all texts: building takes long to begin. */
static int32_t build(kedge_device *device, const kedge_module_desc *module, opencl_program *into) {
  opencl_device *d = (opencl_device *)device;
  const char **texts = calloc((size_t)module->n_kernels, sizeof *texts);
  size_t *sizes = calloc((size_t)module->n_kernels, sizeof *sizes);
  int32_t status = texts != NULL && sizes != NULL ? KEDGE_OK : kedge_fail(KEDGE_E_MEMORY, "out of memory");
  cl_uint n = 0;
  for (int32_t i = 0; i < module->n_kernels && status == KEDGE_OK; i++) {
    const kedge_device_kernel *kernel = module->kernels[i];
    cl_uint same = 0;
    while (same < n && texts[same] != kernel->code) same++;
    if (same < n) continue;
    texts[n] = kernel->code;
    sizes[n++] = (size_t)kernel->code_size;
  }
  if (status == KEDGE_OK) {
    cl_int error;
    into->program = cl.CreateProgramWithSource(d->context, n, texts, sizes, &error);
    if (error != CL_SUCCESS) {
      into->program = NULL;
      status = failed(KEDGE_E_LOAD, error, "OpenCL does not take the module's kernels");
    } else {
      error = cl.BuildProgram(into->program, 1, &d->device, "-cl-std=CL1.2", NULL, NULL);
      if (error != CL_SUCCESS) status = build_failed(device, into->program, error);
    }
  }
  free(texts);
  free(sizes);
  return status;
}

static int32_t load(kedge_device *device, const kedge_module_desc *module, kedge_program **program) {
  opencl_program *p = calloc(1, sizeof *p);
  if (p == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  p->base.module = module;
  int32_t status = module->n_kernels > 0 ? build(device, module, p) : KEDGE_OK;
  if (status == KEDGE_OK) {
    *program = &p->base;
  } else {
    unload(&p->base);
  }
  return status;
}

static int32_t make_kernel(const opencl_device *device, const opencl_program *program, int32_t i, opencl_kernel *into) {
  const kedge_device_kernel *kernel = program->base.module->kernels[i];
  cl_int error;
  cl_kernel made = cl.CreateKernel(program->program, kernel->name, &error);
  into->kernel = error == CL_SUCCESS ? made : NULL;
  cl_uint n_args = 0, expected = (cl_uint)(2 * kernel->n_buffers + kernel->n_scalars);
  if (error == CL_SUCCESS) error = cl.GetKernelInfo(made, CL_KERNEL_NUM_ARGS, sizeof n_args, &n_args, NULL);
  if (error == CL_SUCCESS) {
    error = cl.GetKernelWorkGroupInfo(made, device->device, CL_KERNEL_GROUP, sizeof into->max_group, &into->max_group,
                                      NULL);
  }
  if (error != CL_SUCCESS) {
    int32_t status = failed(KEDGE_E_LOAD, error, "OpenCL does not make it from the module's code");
    return kedge_fail_within(status, "kernel %s", kernel->name);
  }
  if (n_args == expected) return KEDGE_OK;
  return kedge_fail(KEDGE_E_LOAD, "kernel %s has %u parameters, its descriptor promises %u", kernel->name, n_args,
                    expected);
}

/* ---- Queues ------------------------------------------------------------------------------------------------- */

static void end(kedge_queue *queue) {
  opencl_queue *q = (opencl_queue *)queue;
  cl.Finish(q->queue);
  if (q->mark != NULL) cl.ReleaseEvent(q->mark);
  for (int32_t i = 0; i < q->n_kernels; i++) {
    if (q->kernels[i].kernel != NULL) cl.ReleaseKernel(q->kernels[i].kernel);
  }
  cl.ReleaseCommandQueue(q->queue);
  free(q);
}

static int32_t begin(kedge_device *device, const kedge_program *program, kedge_queue **queue) {
  opencl_device *d = (opencl_device *)device;
  int32_t n = program == NULL ? 0 : program->module->n_kernels, status = KEDGE_OK;
  opencl_queue *q = calloc(1, sizeof *q + sizeof *q->kernels * (size_t)n);
  if (q == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  cl_int error;
  q->base.device = device;
  q->base.program = program;
  q->n_kernels = n;
  q->queue = cl.CreateCommandQueue(d->context, d->device, 0, &error);
  if (error != CL_SUCCESS) {
    free(q);
    return failed(KEDGE_E_LOAD, error, "no OpenCL queue");
  }
  for (int32_t i = 0; i < n && status == KEDGE_OK; i++) {
    status = make_kernel(d, (const opencl_program *)program, i, &q->kernels[i]);
  }
  if (status == KEDGE_OK) {
    *queue = &q->base;
  } else {
    end(&q->base);
  }
  return status;
}

static int32_t check_sizes(const opencl_device *device, const kedge_launch *launch, size_t max_group, size_t *global,
                           size_t *local) {
  const char *name = launch->kernel->name, *gpu = device->base.properties->name;
  const int64_t *block = launch->block;
  uint64_t items = 1;
  for (int axis = 0; axis < 3; axis++) {
    if ((uint64_t)block[axis] > device->max_items[axis]) {
      return kedge_fail(KEDGE_E_FEATURE, "kernel %s: groups of %lld items along %c, %s allows at most %zu", name,
                        (long long)block[axis], "xyz"[axis], gpu, device->max_items[axis]);
    }
    if (__builtin_mul_overflow(items, (uint64_t)block[axis], &items)) items = UINT64_MAX;
    local[axis] = (size_t)block[axis];
    if ((uint64_t)launch->grid[axis] > SIZE_MAX ||
        __builtin_mul_overflow((size_t)launch->grid[axis], local[axis], &global[axis])) {
      return kedge_fail(KEDGE_E_FEATURE, "kernel %s: %lld groups along %c are too many", name,
                        (long long)launch->grid[axis], "xyz"[axis]);
    }
  }
  if (items <= max_group) return KEDGE_OK;
  return kedge_fail(KEDGE_E_FEATURE, "kernel %s: a group of %lld x %lld x %lld items, %s allows it at most %zu", name,
                    (long long)block[0], (long long)block[1], (long long)block[2], gpu, max_group);
}

static int32_t set_arguments(opencl_device *device, cl_kernel kernel, const kedge_launch *launch) {
  int32_t n_buffers = launch->kernel->n_buffers, n_scalars = launch->kernel->n_scalars;
  cl_uint at = 0;
  cl_int error = CL_SUCCESS;
  for (int32_t i = 0; i < n_buffers && error == CL_SUCCESS; i++) {
    void *address = (void *)(uintptr_t)launch->args[i];
    cl_mem memory = NULL; /* of nothing: an empty tensor, an arena of no bytes */
    uint64_t offset = 0;
    if (address != NULL && !find(device, address, 0, &memory, &offset)) {
      return kedge_fail(KEDGE_E_KERNEL, "kernel %s: buffer %d at %p is no memory of OpenCL device %d",
                        launch->kernel->name, i, address, device->base.id);
    }
    error = cl.SetKernelArg(kernel, at++, sizeof memory, &memory);
    if (error == CL_SUCCESS) error = cl.SetKernelArg(kernel, at++, sizeof offset, &offset);
  }
  for (int32_t i = 0; i < n_scalars && error == CL_SUCCESS; i++) {
    error = cl.SetKernelArg(kernel, at++, sizeof *launch->args, &launch->args[n_buffers + i]);
  }
  if (error == CL_SUCCESS) return KEDGE_OK;
  int32_t status = failed(KEDGE_E_KERNEL, error, "OpenCL does not take an argument");
  return kedge_fail_within(status, "kernel %s, parameter %u", launch->kernel->name, at - 1);
}

/* A queue has no end, but memory has, and a cancel should not wait for thousands of launches. */
static cl_int bound_backlog(opencl_queue *q, cl_event event) {
  cl_event before = q->mark;
  q->mark = event;
  q->launches = 0;
  cl_int error = cl.Flush(q->queue);
  if (before == NULL) return error;
  if (error == CL_SUCCESS) error = cl.WaitForEvents(1, &before);
  cl.ReleaseEvent(before);
  return error;
}

static int32_t launch(kedge_queue *queue, const kedge_launch *launch, int32_t index) {
  opencl_queue *q = (opencl_queue *)queue;
  opencl_device *device = (opencl_device *)queue->device;
  size_t global[3], local[3];
  int32_t status = check_sizes(device, launch, q->kernels[index].max_group, global, local);
  if (status == KEDGE_OK) status = set_arguments(device, q->kernels[index].kernel, launch);
  if (status != KEDGE_OK) return status;
  cl_event event = NULL;
  bool marks = ++q->launches >= BACKLOG;
  cl_int error = cl.EnqueueNDRangeKernel(q->queue, q->kernels[index].kernel, 3, NULL, global, local, 0, NULL,
                                         marks ? &event : NULL);
  if (error == CL_SUCCESS && marks) error = bound_backlog(q, event);
  if (error == CL_SUCCESS) return KEDGE_OK;
  status = failed(KEDGE_E_KERNEL, error, "the launch failed");
  return kedge_fail_within(status, "kernel %s on %s", launch->kernel->name, device->base.properties->name);
}

static int32_t synchronize(kedge_queue *queue) {
  opencl_queue *q = (opencl_queue *)queue;
  cl_int error = cl.Finish(q->queue);
  q->launches = 0;
  if (q->mark != NULL) cl.ReleaseEvent(q->mark);
  q->mark = NULL;
  if (error == CL_SUCCESS) return KEDGE_OK;
  queue->faulted = true; /* whatever it was, nobody knows how far the queue came */
  int32_t status = failed(KEDGE_E_KERNEL, error, "the device failed");
  return kedge_fail_within(status, "%s", queue->device->properties->name);
}

const kedge_driver kedge_opencl_driver = {
    .name = "OpenCL",
    .device_type = kDLOpenCL,
    .after_fault = "destroy its contexts (close its models), create new ones",
    .count = count,
    .describe = describe,
    .open = open_device,
    .close = close_device,
    .allocate = allocate,
    .release = release,
    .holds = holds,
    .load = load,
    .unload = unload,
    .begin = begin,
    .end = end,
    .copy = copy,
    .launch = launch,
    .synchronize = synchronize,
};
