/* device.h: devices as the rest of the runtime sees them. Nothing here is part of the ABI.
 *
 * A driver is a table of functions; there is one for the CPU, one for CUDA and one for OpenCL. Those of GPUs load the
 * vendor's library when they are first asked, so a machine without one loses nothing, and nothing links with it.
 * Each driver's own structs begin with the ones below.
 *
 * Functions return a kedge_status and leave the reason with kedge_fail; those that cannot fail return nothing.
 */
#ifndef KEDGE_DEVICE_H_
#define KEDGE_DEVICE_H_

#include "internal.h"

#ifndef KEDGE_EXPOSE_INTERNALS
#pragma GCC visibility push(hidden)
#endif

typedef struct kedge_device { /* an open device; one per process, shared by all that use it */
  const struct kedge_driver *driver;
  const kedge_device_properties *properties;
  int32_t id;
  int32_t references; /* under the lock of device.c */
  struct kedge_device *next;
} kedge_device;

typedef struct kedge_program { /* a module's kernels on a device; immutable, shared by contexts */
  const kedge_module_desc *module;
} kedge_program;

struct kedge_queue { /* a context's; what is put into it happens in order */
  kedge_device *device;
  const kedge_program *program; /* or NULL */
  int32_t next_kernel;          /* see kedge_find_kernel */
  bool faulted;                 /* the device failed at something that was in here: it takes nothing more */
};

typedef struct kedge_driver {
  const char *name; /* as people write it */
  int32_t device_type;
  const char *after_fault; /* what can be done then */

  int32_t (*count)(void); /* devices; 0 without a driver, and kedge_last_error says why */
  /* Fills in all but struct_size, for an id below count; the strings are never freed. */
  int32_t (*describe)(int32_t id, kedge_device_properties *properties);
  int32_t (*open)(int32_t id, kedge_device **device); /* driver, properties and references are filled in later */
  void (*close)(kedge_device *device);
  /* Around all of what follows, by the thread that calls it. NULL where threads need no preparation. */
  int32_t (*enter)(kedge_device *device);
  void (*leave)(kedge_device *device);

  int32_t (*allocate)(kedge_device *device, uint64_t bytes, void **address); /* bytes > 0; at KEDGE_ALIGNMENT */
  int32_t (*release)(kedge_device *device, void *address);
  /* Whether a call may use these bytes (> 0) in place. NULL: any. */
  bool (*holds)(kedge_device *device, const void *address, uint64_t bytes);

  int32_t (*load)(kedge_device *device, const kedge_module_desc *module, kedge_program **program);
  void (*unload)(kedge_program *program);

  int32_t (*begin)(kedge_device *device, const kedge_program *program, kedge_queue **queue); /* program may be NULL */
  void (*end)(kedge_queue *queue); /* waits for it */
  /* Enqueues; memory of the host stays untouched until synchronize. bytes > 0. */
  int32_t (*copy)(kedge_queue *queue, void *to, const void *from, uint64_t bytes, kedge_copy_direction direction);
  /* Enqueues a launch whose grid and block are positive; `index` of its kernel in the module. */
  int32_t (*launch)(kedge_queue *queue, const kedge_launch *launch, int32_t index);
  int32_t (*synchronize)(kedge_queue *queue);
} kedge_driver;

extern const kedge_driver kedge_cpu_driver, kedge_cuda_driver, kedge_opencl_driver;

/* ---- device.c ----------------------------------------------------------------------------------------------- */
/* The driver for a DLDeviceType, or NULL. */
const kedge_driver *kedge_find_driver(int32_t device_type);
/* Whether this process was forked from one that had loaded the driver: nothing of it may be called any more. */
bool kedge_is_left_behind(const kedge_driver *driver);
int32_t kedge_check_fork(const kedge_driver *driver); /* KEDGE_OK, or the refusal of such a driver */
int32_t kedge_device_open(DLDevice which, kedge_device **device);
void kedge_device_close(kedge_device *device);
int32_t kedge_device_enter(kedge_device *device);
void kedge_device_leave(kedge_device *device);
/* dlopens the first of a NULL-ended list of names, and looks up NULL-ended `symbols` into `functions`, all of which are
 * pointers. Returns why not, or NULL. The library stays for good. */
const char *kedge_load_driver(const char *const *names, const char *const *symbols, void **functions);
/* Whether the device has what all kernels of the module ask for. */
int32_t kedge_check_features(const kedge_device *device, const kedge_module_desc *module);
/* The index of a kernel in the queue's module, or -1; entries launch in the module's order, mostly. */
int32_t kedge_find_kernel(kedge_queue *queue, const kedge_device_kernel *kernel);

/* ---- addresses.c: addresses for memory that has none --------------------------------------------------------- */
typedef struct { /* addresses that stand for an object */
  uintptr_t start;
  size_t reserved; /* from the system */
  uint64_t bytes;
  void *object;
} kedge_range;

typedef struct { /* safe from any thread */
  pthread_mutex_t lock;
  kedge_range *ranges; /* by start */
  size_t n_ranges, room;
} kedge_addresses;
void kedge_addresses_init(kedge_addresses *table);
void kedge_addresses_destroy(kedge_addresses *table); /* of an empty one */
/* The first of `bytes` addresses that stand for an object (not NULL), at a page; NULL when there are none left. */
void *kedge_new_address(kedge_addresses *table, size_t bytes, void *object);
/* The object for which all of `bytes` addresses stand, and how far into it the first is. 0 bytes may be at its end. */
bool kedge_find_address(kedge_addresses *table, const void *address, uint64_t bytes, void **object, uint64_t *offset);
/* Takes back the addresses that begin here, and returns their object; NULL when none do. */
void *kedge_free_address(kedge_addresses *table, void *address);
/* The first address of some object, or NULL when there is none. */
void *kedge_any_address(kedge_addresses *table);

/* ---- placement.c: what all contexts of a model on a device share --------------------------------------------- */
struct kedge_placement {
  kedge_device *device;
  kedge_program *program; /* NULL on the CPU */
  void *weights;          /* a device address, or NULL */
  int32_t references;     /* under the model's lock */
  kedge_placement *next;
};
int32_t kedge_place(kedge_model *model, DLDevice device, kedge_placement **placement);
void kedge_unplace(kedge_model *model, kedge_placement *placement);

#ifndef KEDGE_EXPOSE_INTERNALS
#pragma GCC visibility pop
#endif
#endif
