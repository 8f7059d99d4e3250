/* placement.c: a model's kernels and weights on a device, once for all of its contexts there. */
#include <stdlib.h>
#include <string.h>

#include "device.h"

/* Through a queue of its own, since no context has one yet. */
static int32_t send_weights(const kedge_model *model, kedge_placement *placement) {
  kedge_device *device = placement->device;
  const kedge_driver *driver = device->driver;
  uint64_t bytes = model->module->weights_size;
  if (bytes == 0) return KEDGE_OK;
  int32_t status = driver->allocate(device, bytes, &placement->weights);
  if (status != KEDGE_OK) return status;
  kedge_queue *queue = NULL;
  status = driver->begin(device, NULL, &queue);
  if (status != KEDGE_OK) return status;
  status = driver->copy(queue, placement->weights, model->weights, bytes, KEDGE_COPY_TO_DEVICE);
  if (status == KEDGE_OK) status = driver->synchronize(queue);
  driver->end(queue);
  return status;
}

static int32_t fill(const kedge_model *model, kedge_placement *placement) {
  kedge_device *device = placement->device;
  if (device->driver->device_type == kDLCPU) {
    placement->weights = (void *)model->weights; /* lent; nobody writes to it */
    return KEDGE_OK;
  }
  int32_t status = kedge_check_features(device, model->module);
  if (status == KEDGE_OK) status = kedge_device_enter(device);
  if (status != KEDGE_OK) return status;
  status = device->driver->load(device, model->module, &placement->program);
  if (status == KEDGE_OK) status = send_weights(model, placement);
  kedge_device_leave(device);
  return status;
}

static void free_placement(kedge_placement *placement) {
  kedge_device *device = placement->device;
  if (device != NULL && device->driver->device_type != kDLCPU) {
    bool entered = kedge_device_enter(device) == KEDGE_OK; /* else what is there went with the device */
    if (placement->weights != NULL) device->driver->release(device, placement->weights);
    if (placement->program != NULL) device->driver->unload(placement->program);
    if (entered) kedge_device_leave(device);
  }
  if (device != NULL) kedge_device_close(device);
  free(placement);
}

static int32_t place_locked(kedge_model *model, DLDevice which, kedge_placement **placement) {
  for (kedge_placement *p = model->placements; p != NULL; p = p->next) {
    if (p->device->id != which.device_id) continue; /* the type is the module's, always */
    p->references++;
    *placement = p;
    return KEDGE_OK;
  }
  kedge_placement *made = calloc(1, sizeof *made);
  if (made == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  int32_t status = kedge_device_open(which, &made->device);
  if (status == KEDGE_OK) status = fill(model, made);
  if (status != KEDGE_OK) {
    kedge_kept_error why;
    kedge_keep_error(&why);
    free_placement(made);
    kedge_restore_error(&why);
    return status;
  }
  made->references = 1;
  made->next = model->placements;
  model->placements = *placement = made;
  return KEDGE_OK;
}

int32_t kedge_place(kedge_model *model, DLDevice device, kedge_placement **placement) {
  int32_t status = kedge_check_fork(kedge_find_driver(device.device_type));
  if (status != KEDGE_OK) return status;
  pthread_mutex_lock(&model->lock); /* also while it is built: others wait for the one that builds */
  status = place_locked(model, device, placement);
  pthread_mutex_unlock(&model->lock);
  return status;
}

void kedge_unplace(kedge_model *model, kedge_placement *placement) {
  pthread_mutex_lock(&model->lock);
  if (--placement->references == 0) {
    kedge_placement **at = &model->placements;
    while (*at != placement) at = &(*at)->next;
    *at = placement->next;
    free_placement(placement);
  }
  pthread_mutex_unlock(&model->lock);
}
