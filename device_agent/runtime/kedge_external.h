/* kedge_external.h: what a C function sees that computes a part of a model in place of kedge's own code.
 *
 *   #include "kedge_external.h"
 *
 *   int32_t my_dense(const kedge_external_call *call) {
 *     const DLTensor *x = &call->inputs[0], *w = &call->inputs[1];
 *     float *y = kedge_data(&call->outputs[0]);
 *     ...
 *     return KEDGE_OK;
 *   }
 *
 * Inputs come in the order in which the pattern names its leaves. Shapes are those of this call, also where dims are
 * free, and may be 0 where the model allows it. All tensors are dense and row-major; data is aligned to its element size
 * (weights and intermediate results to KEDGE_ALIGNMENT). Results overlap nothing else, and inputs must not be written
 * to. The function may be entered from several threads at once, one call each.
 *
 * It returns KEDGE_OK, KEDGE_E_MEMORY or KEDGE_E_CANCELLED, or any other number to say that it failed; the caller reads
 * that number with the function's name and its operators. `kedge_external_fail` adds words.
 */
#ifndef KEDGE_EXTERNAL_H_
#define KEDGE_EXTERNAL_H_

#include "kedge.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct { /* a number, or several, that `External(attributes=...)` gave while compiling */
  const char *name;
  const int64_t *ints; /* NULL where they are floats */
  const double *floats;
  int64_t count;
} kedge_external_attribute;

typedef struct { /* one call */
  uint64_t struct_size;
  const char *name;        /* of the function, with the model's operators that it stands for */
  const DLTensor *inputs;  /* `data` is NULL and `ndim` 0 for a leaf that the alternative of the pattern lacks */
  const DLTensor *outputs;
  void *workspace;         /* workspace_size bytes at KEDGE_ALIGNMENT with any contents; NULL when there are none */
  uint64_t workspace_size;
  const kedge_external_attribute *attributes;
  kedge_frame *frame;
  int32_t n_inputs;
  int32_t n_outputs;
  int32_t n_attributes;
  int32_t reserved;
} kedge_external_call;

typedef int32_t (*kedge_external_function)(const kedge_external_call *call);

/* The first element of a tensor. */
static inline void *kedge_data(const DLTensor *tensor) { return (uint8_t *)tensor->data + tensor->byte_offset; }

/* How many elements a tensor has. */
static inline int64_t kedge_size(const DLTensor *tensor) {
  int64_t size = 1;
  for (int32_t d = 0; d < tensor->ndim; d++) size *= tensor->shape[d];
  return size;
}

/* Runs `body` over [0, extent) on the threads that the call may use. Gives KEDGE_OK, or KEDGE_E_KERNEL where a piece
 * gave anything but 0: hand that on. */
static inline int32_t kedge_external_parallel_for(const kedge_external_call *call, kedge_loop_body body, void *closure,
                                                  int64_t extent) {
  return call->frame->api->parallel_for(call->frame, body, closure, extent);
}

/* Whether the caller wants the call to end; a long function looks now and then, and returns KEDGE_E_CANCELLED. */
static inline int32_t kedge_external_cancelled(const kedge_external_call *call) { return *call->frame->cancel != 0; }

/* Says why the function fails, in one line, and gives what to return. Not from inside of a parallel loop. */
static inline int32_t kedge_external_fail(const kedge_external_call *call, const char *why) {
  return call->frame->api->fail(call->frame, call->name, KEDGE_E_KERNEL, why);
}

/* The attribute of that name, or NULL. */
static inline const kedge_external_attribute *kedge_external_find(const kedge_external_call *call, const char *name) {
  for (int32_t i = 0; i < call->n_attributes; i++) {
    const char *a = call->attributes[i].name, *b = name;
    while (*a != '\0' && *a == *b) a++, b++;
    if (*a == *b) return &call->attributes[i];
  }
  return NULL;
}

/* The first number of an attribute, or `otherwise` where there is no attribute of that name. */
static inline double kedge_external_float(const kedge_external_call *call, const char *name, double otherwise) {
  const kedge_external_attribute *found = kedge_external_find(call, name);
  if (found == NULL || found->count == 0) return otherwise;
  return found->floats != NULL ? found->floats[0] : (double)found->ints[0];
}

static inline int64_t kedge_external_int(const kedge_external_call *call, const char *name, int64_t otherwise) {
  const kedge_external_attribute *found = kedge_external_find(call, name);
  if (found == NULL || found->count == 0) return otherwise;
  return found->ints != NULL ? found->ints[0] : (int64_t)found->floats[0];
}

#ifdef __cplusplus
}
#endif
#endif
