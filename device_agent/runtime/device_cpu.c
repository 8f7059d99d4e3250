/* device_cpu.c: the CPU as a device. Its addresses are pointers, and everything is done at once. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "device.h"

static int32_t count(void) { return 1; }

static int32_t describe(int32_t id, kedge_device_properties *properties) {
  (void)id;
  static struct utsname system; /* once per process, under the lock of device.c */
  long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (uname(&system) != 0 || pages < 0 || page < 0) return kedge_fail(KEDGE_E_LOAD, "this system tells nothing of itself");
  properties->name = "CPU";
  properties->driver_version = system.release;
  properties->arch = system.machine;
  properties->features = kedge_cpu_features();
  properties->global_memory = (uint64_t)pages * (uint64_t)page;
  properties->local_memory = 0;
  properties->max_allocation = PTRDIFF_MAX;
  properties->max_group = 1;
  properties->compute_units = kedge_usable_cpus();
  return KEDGE_OK;
}

static int32_t open_device(int32_t id, kedge_device **device) {
  (void)id;
  *device = calloc(1, sizeof **device);
  return *device != NULL ? KEDGE_OK : kedge_fail(KEDGE_E_MEMORY, "out of memory");
}

static void close_device(kedge_device *device) { free(device); }

static int32_t allocate(kedge_device *device, uint64_t bytes, void **address) {
  (void)device;
  size_t alignment = bytes >= 2 * KEDGE_HUGE_PAGE ? KEDGE_HUGE_PAGE : KEDGE_ALIGNMENT;
  if (bytes > PTRDIFF_MAX || posix_memalign(address, alignment, (size_t)bytes) != 0) {
    *address = NULL;
    return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  }
  /* Fewer TLB misses; a wish, not a need. */
  if (alignment == KEDGE_HUGE_PAGE) madvise(*address, (size_t)bytes, MADV_HUGEPAGE);
  return KEDGE_OK;
}

static int32_t release(kedge_device *device, void *address) {
  (void)device;
  free(address);
  return KEDGE_OK;
}

static int32_t begin(kedge_device *device, const kedge_program *program, kedge_queue **queue) {
  *queue = calloc(1, sizeof **queue);
  if (*queue == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  (*queue)->device = device;
  (*queue)->program = program;
  return KEDGE_OK;
}

static void end(kedge_queue *queue) { free(queue); }

static int32_t copy(kedge_queue *queue, void *to, const void *from, uint64_t bytes, kedge_copy_direction direction) {
  (void)queue;
  (void)direction;
  memmove(to, from, (size_t)bytes);
  return KEDGE_OK;
}

static int32_t synchronize(kedge_queue *queue) {
  (void)queue;
  return KEDGE_OK;
}

const kedge_driver kedge_cpu_driver = {
    .name = "CPU",
    .device_type = kDLCPU,
    .after_fault = "start a new process",
    .count = count,
    .describe = describe,
    .open = open_device,
    .close = close_device,
    .allocate = allocate,
    .release = release,
    .begin = begin,
    .end = end,
    .copy = copy,
    .synchronize = synchronize, /* no load and no launch: kernels of the CPU are functions that the entry calls */
};
