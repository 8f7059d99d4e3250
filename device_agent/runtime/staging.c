/* staging.c: memory on the device for arguments that the caller has on the CPU. */
#include "device.h"

static kedge_slot *input_slot(const kedge_context *context, int32_t i) { return &context->slots[i]; }
static kedge_slot *output_slot(const kedge_context *context, int32_t i) {
  return &context->slots[context->max_inputs + i];
}

/* Grown when needed, kept for the next call. */
static int32_t make_room(kedge_device *device, kedge_slot *slot) {
  if (slot->bytes <= slot->room) return KEDGE_OK;
  int32_t status = KEDGE_OK;
  if (slot->address != NULL) status = device->driver->release(device, slot->address);
  slot->address = NULL;
  slot->room = 0;
  if (status == KEDGE_OK) status = device->driver->allocate(device, slot->bytes, &slot->address);
  if (status == KEDGE_OK) slot->room = slot->bytes;
  return status;
}

static int32_t stage(kedge_device *device, kedge_slot *slot, const char *kind, const kedge_port *port, void **data) {
  if (slot->host == NULL) return KEDGE_OK;
  int32_t status = make_room(device, slot);
  *data = slot->address;
  return status == KEDGE_OK ? status : kedge_fail_within(status, "%s %s", kind, port->name);
}

int32_t kedge_stage(kedge_context *context, const kedge_function_desc *function) {
  kedge_device *device = context->queue->device;
  int32_t status = KEDGE_OK;
  for (int32_t i = 0; i < function->n_inputs && status == KEDGE_OK; i++) {
    status = stage(device, input_slot(context, i), "input", &function->inputs[i], &context->inputs[i]);
  }
  for (int32_t i = 0; i < function->n_outputs && status == KEDGE_OK; i++) {
    status = stage(device, output_slot(context, i), "output", &function->outputs[i], &context->outputs[i]);
  }
  return status;
}

int32_t kedge_copy_in(kedge_context *context, const kedge_function_desc *function) {
  kedge_queue *queue = context->queue;
  int32_t status = KEDGE_OK;
  for (int32_t i = 0; i < function->n_inputs && status == KEDGE_OK; i++) {
    const kedge_slot *slot = input_slot(context, i);
    if (slot->host == NULL) continue;
    status = queue->device->driver->copy(queue, slot->address, slot->host, slot->bytes, KEDGE_COPY_TO_DEVICE);
  }
  return status;
}

int32_t kedge_copy_out(kedge_context *context, const kedge_function_desc *function) {
  kedge_queue *queue = context->queue;
  int32_t status = KEDGE_OK;
  for (int32_t i = 0; i < function->n_outputs && status == KEDGE_OK; i++) {
    const kedge_slot *slot = output_slot(context, i);
    if (slot->host == NULL) continue;
    status = queue->device->driver->copy(queue, slot->host, slot->address, slot->bytes, KEDGE_COPY_FROM_DEVICE);
  }
  return status;
}

void kedge_free_staging(kedge_context *context) {
  kedge_device *device = context->queue->device;
  for (int32_t i = 0; i < context->n_slots; i++) {
    if (context->slots[i].address != NULL) device->driver->release(device, context->slots[i].address);
  }
}
