/* device.c: the table of open devices, memory on them, and launches. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

enum { N_DRIVERS = 3 };
static const kedge_driver *const drivers[N_DRIVERS] = {&kedge_cpu_driver, &kedge_cuda_driver, &kedge_opencl_driver};

const kedge_driver *kedge_find_driver(int32_t device_type) {
  for (int i = 0; i < N_DRIVERS; i++) {
    if (drivers[i]->device_type == device_type) return drivers[i];
  }
  return NULL;
}

const char *kedge_load_driver(const char *const *names, const char *const *symbols, void **functions) {
  static _Thread_local char reason[512];
  kedge_text text = {.used = 0};
  void *library = NULL;
  for (int i = 0; names[i] != NULL && library == NULL; i++) {
    library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) kedge_text_add(&text, "%s%s", i > 0 ? "; " : "", dlerror());
  }
  for (int i = 0; symbols[i] != NULL && library != NULL; i++) {
    functions[i] = dlsym(library, symbols[i]);
    if (functions[i] != NULL) continue;
    kedge_text_add(&text, "the library lacks %s", symbols[i]);
    dlclose(library);
    library = NULL;
  }
  if (library != NULL) return NULL;
  memcpy(reason, text.data, sizeof reason);
  return reason;
}

/* ---- Which there are ---------------------------------------------------------------------------------------- */

typedef struct known { /* asked once per process, so that the strings can be handed out for good */
  struct known *next;
  DLDevice which;
  kedge_device_properties properties;
} known;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of both lists */
static known *described;
static kedge_device *opened;

/* ---- After a fork ------------------------------------------------------------------------------------------- */

/* A driver's threads, and its connection to the device, stay with the process that loaded it: whoever calls it in a
 * child waits forever (PoCL), or is refused without a reason (CUDA). */
static _Atomic bool loaded[N_DRIVERS], left_behind[N_DRIVERS];

static void leave_drivers_behind(void) { /* in the child of a fork */
  for (int i = 0; i < N_DRIVERS; i++) {
    if (loaded[i]) left_behind[i] = true;
  }
  pthread_mutex_init(&lock, NULL); /* another thread of the parent may have held it, which opens a device for long */
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, leave_drivers_behind); }

static int32_t count_devices(const kedge_driver *driver) {
  static pthread_once_t watched = PTHREAD_ONCE_INIT;
  if (driver->device_type != kDLCPU) {
    pthread_once(&watched, watch_forks);
    for (int i = 0; i < N_DRIVERS; i++) {
      if (drivers[i] == driver) loaded[i] = true;
    }
  }
  return driver->count();
}

bool kedge_is_left_behind(const kedge_driver *driver) {
  for (int i = 0; i < N_DRIVERS; i++) {
    if (drivers[i] == driver) return left_behind[i];
  }
  return false;
}

int32_t kedge_check_fork(const kedge_driver *driver) {
  if (!kedge_is_left_behind(driver)) return KEDGE_OK;
  return kedge_fail(KEDGE_E_KERNEL,
                    "this process was forked from one that had loaded the %s driver, which cannot be used here: start "
                    "it anew instead (multiprocessing's \"spawn\"), or look for devices only after the fork",
                    driver->name);
}

/* ---- Asking ------------------------------------------------------------------------------------------------- */

static int32_t find_driver(DLDevice which, const kedge_driver **driver) {
  *driver = kedge_find_driver(which.device_type);
  if (*driver == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "there are no devices of type %d", which.device_type);
  kedge_clear_error();
  int32_t count = count_devices(*driver);
  if (which.device_id >= 0 && which.device_id < count) return KEDGE_OK;
  if (count > 0) {
    return kedge_fail(KEDGE_E_LOAD, "there is no %s device %d: this machine has %d", (*driver)->name, which.device_id,
                      count);
  }
  if (kedge_last_error()[0] != '\0') return KEDGE_E_LOAD; /* the driver has said why */
  return kedge_fail(KEDGE_E_LOAD, "this machine has no %s device", (*driver)->name);
}

static int32_t describe(const kedge_driver *driver, DLDevice which, const kedge_device_properties **properties) {
  for (known *k = described; k != NULL; k = k->next) {
    if (k->which.device_type != which.device_type || k->which.device_id != which.device_id) continue;
    *properties = &k->properties;
    return KEDGE_OK;
  }
  known *k = calloc(1, sizeof *k);
  if (k == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  k->which = which;
  k->properties.struct_size = sizeof k->properties;
  int32_t status = driver->describe(which.device_id, &k->properties);
  if (status != KEDGE_OK) {
    free(k);
    return status;
  }
  k->next = described;
  described = k;
  *properties = &k->properties;
  return KEDGE_OK;
}

int32_t kedge_device_count(int32_t device_type) {
  kedge_clear_error();
  const kedge_driver *driver = kedge_find_driver(device_type);
  return driver == NULL ? 0 : count_devices(driver);
}

int32_t kedge_device_info(int32_t device_type, int32_t device_id, kedge_device_properties *properties) {
  kedge_clear_error();
  if (properties == NULL || properties->struct_size < sizeof *properties) {
    return kedge_fail(KEDGE_E_ARGUMENT, "kedge_device_info: properties with their size are required");
  }
  DLDevice which = {device_type, device_id};
  const kedge_driver *driver;
  const kedge_device_properties *found = NULL;
  int32_t status = find_driver(which, &driver);
  if (status != KEDGE_OK) return status;
  pthread_mutex_lock(&lock);
  status = describe(driver, which, &found);
  pthread_mutex_unlock(&lock);
  if (status == KEDGE_OK) *properties = *found;
  return status;
}

/* ---- Opening ------------------------------------------------------------------------------------------------ */

static int32_t open_locked(const kedge_driver *driver, DLDevice which, kedge_device **device) {
  for (kedge_device *d = opened; d != NULL; d = d->next) {
    if (d->driver != driver || d->id != which.device_id) continue;
    d->references++;
    *device = d;
    return KEDGE_OK;
  }
  const kedge_device_properties *properties;
  int32_t status = describe(driver, which, &properties);
  if (status == KEDGE_OK) status = driver->open(which.device_id, device);
  if (status != KEDGE_OK) return status;
  kedge_device base = {driver, properties, which.device_id, 1, opened};
  **device = base;
  opened = *device;
  return KEDGE_OK;
}

int32_t kedge_device_open(DLDevice which, kedge_device **device) {
  const kedge_driver *driver;
  int32_t status = find_driver(which, &driver);
  if (status != KEDGE_OK) return status;
  pthread_mutex_lock(&lock);
  status = open_locked(driver, which, device);
  pthread_mutex_unlock(&lock);
  return status;
}

void kedge_device_close(kedge_device *device) {
  pthread_mutex_lock(&lock); /* held to the end: who opens it anew must find it closed */
  if (--device->references == 0) {
    kedge_device **at = &opened;
    while (*at != device) at = &(*at)->next;
    *at = device->next;
    device->driver->close(device);
  }
  pthread_mutex_unlock(&lock);
}

int32_t kedge_device_enter(kedge_device *device) {
  return device->driver->enter == NULL ? KEDGE_OK : device->driver->enter(device);
}

void kedge_device_leave(kedge_device *device) {
  if (device->driver->leave != NULL) device->driver->leave(device);
}

int32_t kedge_check_features(const kedge_device *device, const kedge_module_desc *module) {
  for (int32_t i = 0; i < module->n_kernels; i++) {
    kedge_text missing = {.used = 0};
    const kedge_device_kernel *kernel = module->kernels[i];
    if (kedge_has_features(kernel->features, device->properties->features, &missing)) continue;
    return kedge_fail(KEDGE_E_FEATURE, "%s device %d, %s (%s), lacks what kernel %s needs: %s", device->driver->name,
                      device->id, device->properties->name, device->properties->arch, kernel->name, missing.data);
  }
  return KEDGE_OK;
}

/* ---- Launching ---------------------------------------------------------------------------------------------- */

int32_t kedge_find_kernel(kedge_queue *queue, const kedge_device_kernel *kernel) {
  const kedge_module_desc *module = queue->program == NULL ? NULL : queue->program->module;
  int32_t count = module == NULL ? 0 : module->n_kernels;
  for (int32_t tried = 0, i = queue->next_kernel; tried < count; tried++, i++) {
    if (i >= count) i = 0;
    if (module->kernels[i] != kernel) continue;
    queue->next_kernel = i + 1;
    return i;
  }
  return -1;
}

int32_t kedge_launch_kernel(kedge_frame *frame, const kedge_launch *launch) {
  kedge_queue *queue = kedge_context_of(frame)->queue;
  int32_t index = kedge_find_kernel(queue, launch->kernel);
  if (index < 0) return kedge_fail(KEDGE_E_KERNEL, "a launch of a kernel that its module does not list");
  bool nothing = false;
  for (int axis = 0; axis < 3; axis++) {
    if (launch->grid[axis] < 0 || launch->block[axis] < 1) {
      return kedge_fail(KEDGE_E_KERNEL, "kernel %s: a grid of %lld and groups of %lld along %c", launch->kernel->name,
                        (long long)launch->grid[axis], (long long)launch->block[axis], "xyz"[axis]);
    }
    nothing = nothing || launch->grid[axis] == 0;
  }
  return nothing ? KEDGE_OK : queue->device->driver->launch(queue, launch, index);
}

/* ---- Memory for users --------------------------------------------------------------------------------------- */

/* The device of a context that can take something, entered. */
static int32_t enter(kedge_context *context, kedge_device **device) {
  kedge_clear_error();
  if (context == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "a context is required");
  *device = context->queue->device;
  int32_t status = kedge_check_queue(context);
  return status == KEDGE_OK ? kedge_device_enter(*device) : status;
}

int32_t kedge_device_alloc(kedge_context *context, uint64_t bytes, void **address) {
  kedge_device *device;
  if (address == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "kedge_device_alloc: room for the address is required");
  *address = NULL;
  int32_t status = enter(context, &device);
  if (status != KEDGE_OK) return status;
  status = device->driver->allocate(device, bytes > 0 ? bytes : 1, address);
  kedge_device_leave(device);
  return status;
}

int32_t kedge_device_free(kedge_context *context, void *address) {
  kedge_device *device;
  kedge_clear_error();
  if (context == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "a context is required");
  if (address == NULL) return KEDGE_OK;
  device = context->queue->device; /* also after a fault: what was allocated must not leak */
  int32_t status = kedge_check_fork(device->driver);
  if (status == KEDGE_OK) status = kedge_device_enter(device);
  if (status != KEDGE_OK) return status;
  status = device->driver->release(device, address);
  kedge_device_leave(device);
  return status;
}

static bool overlap(const void *a, const void *b, uint64_t bytes) {
  return (uintptr_t)a - (uintptr_t)b < bytes || (uintptr_t)b - (uintptr_t)a < bytes;
}

int32_t kedge_device_copy(kedge_context *context, void *to, const void *from, uint64_t bytes, int32_t direction) {
  kedge_device *device;
  int32_t status = enter(context, &device);
  if (status != KEDGE_OK) return status;
  if (direction < KEDGE_COPY_TO_DEVICE || direction > KEDGE_COPY_ON_DEVICE) {
    status = kedge_fail(KEDGE_E_ARGUMENT, "kedge_device_copy: there is no direction %d", direction);
  } else if (bytes > 0 && (to == NULL || from == NULL)) {
    status = kedge_fail(KEDGE_E_ARGUMENT, "kedge_device_copy: from and to are required");
  } else if (direction == KEDGE_COPY_ON_DEVICE && overlap(to, from, bytes)) {
    status = kedge_fail(KEDGE_E_ARGUMENT, "kedge_device_copy: from and to overlap");
  } else if (bytes > 0) {
    status = device->driver->copy(context->queue, to, from, bytes, (kedge_copy_direction)direction);
    status = kedge_drain(context, status);
  }
  kedge_device_leave(device);
  return status;
}

int32_t kedge_device_synchronize(kedge_context *context) {
  kedge_device *device;
  int32_t status = enter(context, &device);
  if (status != KEDGE_OK) return status;
  status = kedge_drain(context, KEDGE_OK);
  kedge_device_leave(device);
  return status;
}
