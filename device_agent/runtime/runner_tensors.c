/* runner_tensors.c: the tensors that stay in the runner between requests, by handle.
 *
 * Each has a mapping of its own, read-only once it is whole: code that writes to its inputs ends here, and does not
 * change what later calls see.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"
#include "runner.h"

/* Each has a mapping, of which a process may have some 65,000. */
enum { MAX_TENSORS = 16384 };

kept_tensor *tensor_new(const DLTensor *like) {
  uint64_t size;
  if (!kedge_tensor_bytes(like, &size) || size > PTRDIFF_MAX) {
    kedge_fail(KEDGE_E_MEMORY, "the size of a tensor overflows");
    return NULL;
  }
  kept_tensor *t = calloc(1, sizeof *t);
  if (t == NULL) {
    kedge_fail(KEDGE_E_MEMORY, "out of memory");
    return NULL;
  }
  t->tensor = *like;
  t->tensor.device = (DLDevice){kDLCPU, 0};
  t->tensor.byte_offset = 0;
  t->tensor.strides = NULL;
  t->tensor.data = NULL;
  t->tensor.shape = t->shape;
  if (like->ndim > 0) memcpy(t->shape, like->shape, sizeof *t->shape * (size_t)like->ndim);
  t->size = (size_t)size;
  if (t->size == 0) return t;
  void *memory = mmap(NULL, t->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    kedge_fail(KEDGE_E_MEMORY, "cannot allocate %zu bytes for a tensor", t->size);
    free(t);
    return NULL;
  }
  t->tensor.data = memory;
  return t;
}

void tensor_destroy(kept_tensor *t) {
  if (t == NULL) return;
  if (t->size > 0) munmap(t->tensor.data, t->size);
  free(t);
}

int32_t tensor_fill(kept_tensor *t, const void *data, size_t size) {
  if (size > t->size - t->filled) {
    return kedge_fail(KEDGE_E_ARGUMENT, "%zu bytes come for a tensor that lacks %zu", size, t->size - t->filled);
  }
  if (size > 0) memcpy((uint8_t *)t->tensor.data + t->filled, data, size);
  t->filled += size;
  return t->filled == t->size ? tensor_protect(t) : KEDGE_OK;
}

int32_t tensor_protect(kept_tensor *t) {
  t->filled = t->size;
  if (t->size > 0 && mprotect(t->tensor.data, t->size, PROT_READ) != 0) {
    return kedge_fail(KEDGE_E_MEMORY, "cannot protect a tensor: %s", strerror(errno));
  }
  return KEDGE_OK;
}

int32_t tensors_keep(tensor_store *store, kept_tensor *t) {
  if (store->count == MAX_TENSORS) return kedge_fail(KEDGE_E_MEMORY, "%d tensors are kept already", MAX_TENSORS);
  if (store->count == store->room) {
    size_t room = store->room > 0 ? 2 * store->room : 16;
    kept_tensor **items = realloc(store->items, room * sizeof *items);
    if (items == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
    store->items = items;
    store->room = room;
  }
  t->handle = ++store->last;
  store->items[store->count++] = t;
  return KEDGE_OK;
}

/* Where a handle is, or would be. */
static size_t place_of(const tensor_store *store, uint64_t handle) {
  size_t low = 0, high = store->count;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (store->items[middle]->handle < handle) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

kept_tensor *tensors_find(const tensor_store *store, uint64_t handle) {
  size_t at = place_of(store, handle);
  return at < store->count && store->items[at]->handle == handle ? store->items[at] : NULL;
}

bool tensors_release(tensor_store *store, uint64_t handle) {
  size_t at = place_of(store, handle);
  if (at == store->count || store->items[at]->handle != handle) return false;
  tensor_destroy(store->items[at]);
  store->count--;
  memmove(store->items + at, store->items + at + 1, sizeof *store->items * (store->count - at));
  return true;
}
