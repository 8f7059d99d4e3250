/* module.c: models, from a shared object or linked into the program. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

/* ---- Is it sound? ------------------------------------------------------------------------------------------- */

static int32_t check_ports(const kedge_function_desc *function, const char *kind, const kedge_port *ports,
                           int32_t n_ports) {
  if (n_ports < 0 || (n_ports > 0 && ports == NULL)) {
    return kedge_fail(KEDGE_E_LOAD, "function %s has %d %ss and no list of them", function->name, n_ports, kind);
  }
  for (int32_t i = 0; i < n_ports; i++) {
    const kedge_port *port = &ports[i];
    if (port->name == NULL || port->ndim < 0 || port->ndim > KEDGE_MAX_NDIM || (port->ndim > 0 && port->shape == NULL) ||
        port->dtype.bits == 0 || port->dtype.lanes == 0) {
      return kedge_fail(KEDGE_E_LOAD, "function %s: %s %d is malformed", function->name, kind, i);
    }
    for (int32_t d = 0; d < port->ndim; d++) {
      const char *reason = kedge_expr_check(&port->shape[d], function->n_symbols);
      if (reason != NULL) {
        return kedge_fail(KEDGE_E_LOAD, "function %s: dim %d of %s %s %s", function->name, d, kind, port->name, reason);
      }
    }
  }
  return KEDGE_OK;
}

static int32_t check_function(const kedge_function_desc *function) {
  if (function == NULL || function->struct_size < sizeof *function || function->name == NULL ||
      function->entry == NULL || function->n_symbols < 0 || (function->n_symbols > 0 && function->symbols == NULL) || function->n_steps < 0 ||
      function->n_steps > KEDGE_MAX_STEPS || function->n_equalities < 0 ||
      (function->n_equalities > 0 && function->equalities == NULL)) {
    return kedge_fail(KEDGE_E_LOAD, "a function's descriptor is malformed");
  }
  int32_t status = check_ports(function, "input", function->inputs, function->n_inputs);
  if (status == KEDGE_OK) status = check_ports(function, "output", function->outputs, function->n_outputs);
  if (status != KEDGE_OK) return status;
  for (int32_t i = 0; i < function->n_symbols; i++) {
    const kedge_symbol *symbol = &function->symbols[i];
    if (symbol->name == NULL || symbol->input < 0 || symbol->input >= function->n_inputs || symbol->dim < 0 ||
        symbol->dim >= function->inputs[symbol->input].ndim) {
      return kedge_fail(KEDGE_E_LOAD, "function %s: symbol %d is bound by no input", function->name, i);
    }
  }
  const char *reason = kedge_expr_check(&function->arena_size, function->n_symbols);
  if (reason != NULL) return kedge_fail(KEDGE_E_LOAD, "function %s: its arena size %s", function->name, reason);
  for (int64_t i = 0; i < function->n_equalities; i++) {
    const kedge_equality *equality = &function->equalities[i];
    reason = kedge_expr_check(&equality->a, function->n_symbols);
    if (reason == NULL) reason = kedge_expr_check(&equality->b, function->n_symbols);
    if (reason == NULL && equality->of == NULL) reason = "is nobody's";
    if (reason != NULL) {
      return kedge_fail(KEDGE_E_LOAD, "function %s: equality %lld %s", function->name, (long long)i, reason);
    }
  }
  return KEDGE_OK;
}

static int32_t check_kernels(const kedge_module_desc *module) {
  int32_t type = module->device_type;
  if (type != kDLCPU && type != kDLCUDA && type != kDLOpenCL) {
    return kedge_fail(KEDGE_E_LOAD, "the module runs on devices of type %d, which this runtime does not know", type);
  }
  if (module->n_kernels < 0 || (module->n_kernels > 0 && module->kernels == NULL)) {
    return kedge_fail(KEDGE_E_LOAD, "the module has %d kernels and no list of them", module->n_kernels);
  }
  for (int32_t i = 0; i < module->n_kernels; i++) {
    const kedge_device_kernel *kernel = module->kernels[i];
    if (kernel == NULL || kernel->struct_size < sizeof *kernel || kernel->name == NULL || kernel->code == NULL ||
        kernel->features == NULL || kernel->n_buffers < 0 || kernel->n_scalars < 0 ||
        kernel->n_buffers > KEDGE_MAX_PARAMETERS || kernel->n_scalars > KEDGE_MAX_PARAMETERS) {
      return kedge_fail(KEDGE_E_LOAD, "kernel %d of the module is malformed", i);
    }
  }
  return KEDGE_OK;
}

static int32_t check_module(const kedge_module_desc *module) {
  if (module->magic != KEDGE_MODULE_MAGIC) return kedge_fail(KEDGE_E_LOAD, "this is not a module that kedge compiled");
  if (module->abi_version != KEDGE_ABI_VERSION) {
    return kedge_fail(KEDGE_E_ABI, "the module speaks ABI %u, this runtime speaks %u: compile it again", module->abi_version,
                      KEDGE_ABI_VERSION);
  }
  if (module->struct_size < sizeof *module || module->target == NULL || module->features == NULL ||
      module->n_functions < 1 || module->functions == NULL) {
    return kedge_fail(KEDGE_E_LOAD, "the module's descriptor is malformed");
  }
  kedge_text missing = {.used = 0};
  if (!kedge_has_features(module->features, kedge_cpu_features(), &missing)) {
    return kedge_fail(KEDGE_E_FEATURE, "the module was compiled for %s and needs CPU features this machine lacks: %s",
                      module->target, missing.data);
  }
  for (int32_t i = 0; i < module->n_functions; i++) {
    int32_t status = check_function(module->functions[i]);
    if (status != KEDGE_OK) return status;
  }
  return check_kernels(module);
}

/* ---- Opening ------------------------------------------------------------------------------------------------ */

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* since Linux 6.1 */
#endif

static bool huge_pages_are_off(void) {
  char text[64] = "";
  int file = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
  if (file < 0) return true;
  ssize_t length = read(file, text, sizeof text - 1);
  close(file);
  return length <= 0 || strstr(text, "[never]") != NULL;
}

/* Weights that a compiler has just written lie in small pages, which a product with few rows reads at two thirds of the
 * speed: its time is that of memory, and of the TLB. A wish, not a need: older kernels and files refuse. */
static void prefer_huge_pages(const void *data, uint64_t size) {
  if (huge_pages_are_off()) return; /* the kernel does it all the same */
  uintptr_t first = ((uintptr_t)data + KEDGE_HUGE_PAGE - 1) / KEDGE_HUGE_PAGE * KEDGE_HUGE_PAGE;
  uintptr_t end = ((uintptr_t)data + (uintptr_t)size) / KEDGE_HUGE_PAGE * KEDGE_HUGE_PAGE;
  if (first < end) madvise((void *)first, end - first, MADV_COLLAPSE);
}

static int32_t lend_weights(kedge_model *model, const void *data) {
  if (model->module->weights_size > 0 && (data == NULL || (uintptr_t)data % KEDGE_ALIGNMENT != 0)) {
    return kedge_fail(KEDGE_E_ARGUMENT, "the module needs weights at a multiple of %d bytes", KEDGE_ALIGNMENT);
  }
  model->weights = data;
  return KEDGE_OK;
}

static int32_t map_weights(kedge_model *model, const kedge_open_options *options) {
  uint64_t size = model->module->weights_size, offset = options->weights_offset, end;
  if (size == 0) return KEDGE_OK;
  if (options->weights_data != NULL) {
    int32_t status = lend_weights(model, options->weights_data);
    if (status == KEDGE_OK) prefer_huge_pages(options->weights_data, size);
    return status;
  }
  const char *path = options->weights_path;
  if (path == NULL) return kedge_fail(KEDGE_E_LOAD, "the module needs %llu bytes of weights", (unsigned long long)size);
  if (offset % KEDGE_ALIGNMENT != 0 || __builtin_add_overflow(offset, size, &end)) {
    return kedge_fail(KEDGE_E_ARGUMENT, "weights_offset %llu is not a multiple of %d", (unsigned long long)offset,
                      KEDGE_ALIGNMENT);
  }
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return kedge_fail(KEDGE_E_LOAD, "cannot read weights %s: %s", path, strerror(errno));
  struct stat info;
  if (fstat(file, &info) != 0 || (uint64_t)info.st_size < end) { /* mapping past its end would be a SIGBUS later */
    close(file);
    return kedge_fail(KEDGE_E_LOAD, "weights %s end before byte %llu", path, (unsigned long long)end);
  }
  uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = offset / page * page;
  size_t length = (size_t)(end - start);
  void *mapping = length == end - start ? mmap(NULL, length, PROT_READ, MAP_PRIVATE, file, (off_t)start) : MAP_FAILED;
  int problem = errno;
  close(file);
  if (mapping == MAP_FAILED) {
    return kedge_fail(problem == ENOMEM ? KEDGE_E_MEMORY : KEDGE_E_LOAD, "cannot map %llu bytes of weights %s: %s",
                      (unsigned long long)size, path, strerror(problem));
  }
  madvise(mapping, length, MADV_WILLNEED); /* the first call should not wait for the disk */
  model->mapping = mapping;
  model->mapping_size = length;
  model->weights = (const uint8_t *)mapping + (offset - start);
  return KEDGE_OK;
}

/* To dlopen a name without a slash is no path: it would look in the system's folders instead of this one. */
static void *open_library(const char *path) {
  if (strchr(path, '/') != NULL) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
  char here[NAME_MAX + 3];
  snprintf(here, sizeof here, "./%s", path);
  return dlopen(here, RTLD_NOW | RTLD_LOCAL);
}

static int32_t load(kedge_model *model, const kedge_open_options *options) {
  model->library = open_library(options->lib_path);
  if (model->library == NULL) return kedge_fail(KEDGE_E_LOAD, "cannot load %s: %s", options->lib_path, dlerror());
  model->module = dlsym(model->library, KEDGE_MODULE_SYMBOL);
  if (model->module == NULL) {
    return kedge_fail(KEDGE_E_LOAD, "%s is not a module that kedge compiled: it exports no %s", options->lib_path,
                      KEDGE_MODULE_SYMBOL);
  }
  int32_t status = check_module(model->module);
  return status == KEDGE_OK ? map_weights(model, options) : status;
}

static void free_model(kedge_model *model) {
  if (model->mapping != NULL) munmap(model->mapping, model->mapping_size);
  if (model->library != NULL) dlclose(model->library);
  pthread_mutex_destroy(&model->lock);
  free(model);
}

static kedge_model *new_model(void) {
  kedge_model *model = calloc(1, sizeof *model);
  if (model == NULL) return NULL;
  atomic_init(&model->references, 1);
  pthread_mutex_init(&model->lock, NULL);
  return model;
}

int32_t kedge_open(const kedge_open_options *options, kedge_model **model) {
  kedge_clear_error();
  if (options == NULL || model == NULL || options->struct_size < sizeof *options || options->lib_path == NULL) {
    return kedge_fail(KEDGE_E_ARGUMENT, "kedge_open: options, lib_path and model are required");
  }
  *model = NULL;
  kedge_model *opened = new_model();
  if (opened == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  int32_t status = load(opened, options);
  if (status != KEDGE_OK) {
    free_model(opened);
    return status;
  }
  *model = opened;
  return KEDGE_OK;
}

int32_t kedge_open_linked(const kedge_module_desc *module, const void *weights, kedge_model **model) {
  kedge_clear_error();
  if (module == NULL || model == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "kedge_open_linked: module and model");
  *model = NULL;
  int32_t status = check_module(module);
  if (status != KEDGE_OK) return status;
  kedge_model *opened = new_model();
  if (opened == NULL) return kedge_fail(KEDGE_E_MEMORY, "out of memory");
  opened->module = module;
  status = lend_weights(opened, weights);
  if (status == KEDGE_OK) {
    *model = opened;
  } else {
    free_model(opened);
  }
  return status;
}

void kedge_model_retain(kedge_model *model) { atomic_fetch_add_explicit(&model->references, 1, memory_order_relaxed); }

void kedge_close(kedge_model *model) {
  if (model != NULL && atomic_fetch_sub_explicit(&model->references, 1, memory_order_acq_rel) == 1) free_model(model);
}

/* ---- Asking ------------------------------------------------------------------------------------------------- */

const kedge_module_desc *kedge_describe(const kedge_model *model) { return model == NULL ? NULL : model->module; }

int32_t kedge_function_index(const kedge_model *model, const char *name) {
  if (model == NULL || name == NULL) return -1;
  for (int32_t i = 0; i < model->module->n_functions; i++) {
    if (strcmp(model->module->functions[i]->name, name) == 0) return i;
  }
  return -1;
}
