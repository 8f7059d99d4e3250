/* linked_main.c: calls function 0 of the module that is linked into this program, once per batch size.
 *
 * usage: linked_main WEIGHTS_FILE OFFSET < INPUT > OUTPUT
 * Reads one float32 tensor (int64 ndim, int64 shape[ndim], data) after another, writes each result the same way.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kedge.h"

extern const kedge_module_desc kedge_module;

static void check(int32_t status, const char *what) {
  if (status == KEDGE_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, kedge_status_name(status), kedge_last_error());
  exit(3);
}

static void *aligned(size_t size) {
  void *p = aligned_alloc(KEDGE_ALIGNMENT, (size + KEDGE_ALIGNMENT) / KEDGE_ALIGNMENT * KEDGE_ALIGNMENT);
  if (p == NULL) exit(4);
  return p;
}

static size_t count(const DLTensor *t) {
  size_t n = 1;
  for (int32_t i = 0; i < t->ndim; i++) n *= (size_t)t->shape[i];
  return n;
}

static void *read_weights(const char *path, long offset, uint64_t size) {
  FILE *file = fopen(path, "rb");
  void *data = aligned(size);
  if (file == NULL || fseek(file, offset, SEEK_SET) != 0 || fread(data, 1, size, file) != size) exit(5);
  fclose(file);
  return data;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  void *weights = NULL;
  if (kedge_module.weights_size > 0) weights = read_weights(argv[1], atol(argv[2]), kedge_module.weights_size);
  kedge_model *model;
  check(kedge_open_linked(&kedge_module, weights, &model), "open");
  kedge_context_options options = {.struct_size = sizeof options, .num_threads = 2};
  kedge_context *context;
  check(kedge_context_create(model, (DLDevice){kDLCPU, 0}, &options, &context), "context");

  int64_t ndim, shape[KEDGE_MAX_NDIM], result_shape[KEDGE_MAX_NDIM];
  while (fread(&ndim, sizeof ndim, 1, stdin) == 1) {
    if (fread(shape, sizeof *shape, (size_t)ndim, stdin) != (size_t)ndim) return 6;
    DLTensor x = {.device = {kDLCPU, 0}, .ndim = (int32_t)ndim, .dtype = {kDLFloat, 32, 1}, .shape = shape};
    x.data = aligned(count(&x) * sizeof(float));
    if (fread(x.data, sizeof(float), count(&x), stdin) != count(&x)) return 6;
    DLTensor y = {.device = {kDLCPU, 0}, .shape = result_shape};
    check(kedge_infer(context, 0, &x, 1, &y, 1), "infer");
    y.data = aligned(count(&y) * sizeof(float));
    check(kedge_call(context, 0, &x, 1, &y, 1), "call");
    int64_t rank = y.ndim;
    fwrite(&rank, sizeof rank, 1, stdout);
    fwrite(y.shape, sizeof *y.shape, (size_t)rank, stdout);
    fwrite(y.data, sizeof(float), count(&y), stdout);
    free(x.data);
    free(y.data);
  }
  kedge_context_destroy(context);
  kedge_close(model);
  free(weights);
  return 0;
}
