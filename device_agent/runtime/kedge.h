/* kedge.h: the one ABI between compiled models, the runtime, and everything that calls them.
 *
 * A compiled model (`lib.so`) exports one symbol, `kedge_module`, a constant `kedge_module_desc` that says what is
 * inside. The runtime loads it, checks it against the CPU, maps the weights, binds symbolic dims and calls. Tensors
 * are DLPack's. Every struct that may grow starts with its size; a reader uses no field beyond that size.
 *
 * The Python mirror is rpc/abi.py; a test compares the two.
 */
#ifndef KEDGE_H_
#define KEDGE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KEDGE_ABI_VERSION 4u
#define KEDGE_MODULE_MAGIC 0x4547444Bu /* "KDGE" */
#define KEDGE_MODULE_SYMBOL "kedge_module"
#define KEDGE_ALIGNMENT 64 /* of weights, arena and every planned buffer, in bytes */
#define KEDGE_MAX_NDIM 8
#define KEDGE_MAX_PARAMETERS 256 /* buffers, and scalars, of a device kernel */
#define KEDGE_MAX_STEPS 1048576  /* of a function */
#define KEDGE_ROOFS 4            /* working sets that kedge_time reads: 256 KiB, 2 MiB, 16 MiB, 128 MiB */

#if defined(__GNUC__)
#define KEDGE_API __attribute__((visibility("default")))
#else
#define KEDGE_API
#endif

/* ---- DLPack 1.x, the part that is used; an application's own <dlpack/dlpack.h> wins ------------------------- */
#ifndef DLPACK_DLPACK_H_
#define DLPACK_DLPACK_H_
typedef enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLOpenCL = 4 } DLDeviceType;
typedef struct {
  int32_t device_type;
  int32_t device_id;
} DLDevice;
typedef enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 } DLDataTypeCode;
typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; NULL means dense row-major */
  uint64_t byte_offset;
} DLTensor;
#endif

/* ---- Status ------------------------------------------------------------------------------------------------- */
typedef enum {
  KEDGE_OK = 0,
  KEDGE_E_ARGUMENT = 1,  /* a null pointer, a bad index, a count that does not match */
  KEDGE_E_INPUT = 2,     /* an input of the wrong dtype, rank, shape or layout */
  KEDGE_E_LOAD = 3,      /* a file that cannot be read, mapped or linked */
  KEDGE_E_ABI = 4,       /* a module of another ABI version */
  KEDGE_E_FEATURE = 5,   /* the CPU or the device lacks a feature that the module requires */
  KEDGE_E_MEMORY = 6,    /* an allocation failed, or a size overflows */
  KEDGE_E_CANCELLED = 7, /* kedge_cancel was called */
  KEDGE_E_KERNEL = 8     /* a kernel reported a failure */
} kedge_status;

/* The calling thread's last failure as one line of text; empty when there was none. */
KEDGE_API const char *kedge_last_error(void);
KEDGE_API const char *kedge_status_name(int32_t status);
KEDGE_API uint32_t kedge_abi_version(void);

/* ---- What a compiled module exports ------------------------------------------------------------------------- */

/* Size expressions are postfix programs over int64, evaluated with overflow checks. */
typedef enum {
  KEDGE_EXPR_CONST = 0,  /* push value */
  KEDGE_EXPR_SYMBOL = 1, /* push symbol number `value` */
  KEDGE_EXPR_ADD = 2,
  KEDGE_EXPR_SUB = 3,
  KEDGE_EXPR_MUL = 4,
  KEDGE_EXPR_FLOORDIV = 5,
  KEDGE_EXPR_FLOORMOD = 6,
  KEDGE_EXPR_MIN = 7,
  KEDGE_EXPR_MAX = 8
} kedge_expr_opcode;

typedef struct {
  int64_t opcode;
  int64_t value;
} kedge_expr_op;

typedef struct {
  const kedge_expr_op *ops;
  int64_t n_ops; /* at most 64; the stack is at most 32 deep */
} kedge_expr;

typedef struct { /* a named input or output */
  const char *name;
  const kedge_expr *shape; /* ndim expressions */
  int32_t ndim;
  DLDataType dtype;
} kedge_port;

typedef struct { /* a free dim, bound by dim `dim` of input `input`; others that use it are checked against it */
  const char *name;
  int64_t lower; /* inclusive */
  int64_t upper; /* inclusive; INT64_MAX when free */
  int32_t input;
  int32_t dim;
} kedge_symbol;

typedef struct { /* two sizes that must be equal, or a call is refused: `of` names the operators that need it */
  kedge_expr a;
  kedge_expr b;
  const char *of;
} kedge_equality;

struct kedge_frame;

/* A chunk of a parallel loop: iterations [begin, end). Non-zero stops the call with KEDGE_E_KERNEL. */
typedef int32_t (*kedge_loop_body)(void *closure, int64_t begin, int64_t end);

/* A module may run on a GPU (kedge_module_desc.device_type). Its entries are native code for the host all the same:
 * they run over the frame, compute the sizes of grids and call `launch`, which takes kernels in OpenCL C or PTX. Every
 * pointer of such a frame (inputs, outputs, arena, weights) is then a device address: entries compute with it, launches
 * take it, and nobody on the host looks behind it.
 *
 * A kernel's parameters are its buffers and then its scalars.
 *   CUDA:   each buffer is one 64-bit address, each scalar one 64-bit signed integer.
 *   OpenCL: each buffer is two parameters, `__global uchar *base, ulong offset`, since there a buffer has no address of
 *           its own; base is aligned to KEDGE_ALIGNMENT or better. Each scalar is a `long`.
 */
typedef struct { /* a constant of the module */
  uint64_t struct_size;
  const char *name;     /* the entry point in `code`; no other kernel of the module has it */
  const char *code;     /* OpenCL C or PTX text, which ends in NUL; kernels may share one (the same pointer) */
  uint64_t code_size;   /* bytes, without the NUL */
  const char *features; /* what the device must have, comma-separated: fp64, fp16, an OpenCL extension, sm_90, sm_90a */
  int32_t n_buffers;
  int32_t n_scalars;
} kedge_device_kernel;

typedef struct {
  uint64_t struct_size;
  const kedge_device_kernel *kernel; /* one that the module lists */
  int64_t grid[3];                   /* groups (blocks) along x, y and z; a zero anywhere: there is nothing to do */
  int64_t block[3];                  /* items (threads) of a group */
  const int64_t *args;               /* n_buffers device addresses, then n_scalars values; read before it returns */
} kedge_launch;

typedef struct { /* what compiled code may call; it imports nothing else */
  uint64_t struct_size;
  /* Runs body over [0, extent) on the pool's threads, in one chunk for each, and returns when all of it is done. After
   * a failure, or kedge_cancel, no further chunk begins. */
  int32_t (*parallel_for)(struct kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent);
  /* The same in chunks of `chunk` >= 1 iterations, each handed to whoever is free. */
  int32_t (*parallel_for_dynamic)(struct kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent,
                                  int64_t chunk);
  /* Enqueues a kernel behind those before it; called by the entry's own thread only, with the very frame it was given.
   * What the driver refuses at once is the result, what fails later ends the call: the entry just goes on. */
  int32_t (*launch)(struct kedge_frame *frame, const kedge_launch *launch);
  /* Says for kedge_last_error that external code failed: `what` names it and its operators, `status` is what it gave,
   * `why` its own words or NULL. Who says so first is heard. Returns what the entry must return, a kedge_status. */
  int32_t (*fail)(struct kedge_frame *frame, const char *what, int32_t status, const char *why);
  /* Writes the time to the frame's marks: number 0 before the first step, n after n steps. Only where there are any. */
  void (*mark)(struct kedge_frame *frame, int64_t number);
} kedge_runtime_api;

typedef struct kedge_frame { /* one call, as compiled code sees it; all fields are pointers or 64 bits wide */
  uint64_t struct_size;
  const kedge_runtime_api *api;
  void *pool;
  void *const *inputs;    /* data of each input, aligned to its element size */
  void *const *outputs;   /* data of each output */
  const int64_t *symbols; /* values of the function's symbols */
  uint8_t *arena;         /* arena_size bytes at KEDGE_ALIGNMENT */
  const uint8_t *weights; /* start of the weights' data at KEDGE_ALIGNMENT, or NULL */
  const volatile int32_t *cancel;
  int64_t *marks; /* n_steps + 1 times in nanoseconds, which the entry marks; NULL where nobody asks for them */
} kedge_frame;

typedef int32_t (*kedge_entry)(kedge_frame *frame); /* returns a kedge_status */

typedef struct {
  uint64_t struct_size;
  const char *name;
  kedge_entry entry;
  const kedge_port *inputs;
  const kedge_port *outputs;
  const kedge_symbol *symbols;
  kedge_expr arena_size; /* bytes */
  int32_t n_inputs;
  int32_t n_outputs;
  int32_t n_symbols;
  int32_t n_steps; /* what the entry runs one after the other, at most KEDGE_MAX_STEPS; each is marked */
  const kedge_equality *equalities;
  int64_t n_equalities;
} kedge_function_desc;

typedef struct {
  const char *name;
  uint64_t offset; /* bytes from the start of the weights' data; a multiple of KEDGE_ALIGNMENT */
  uint64_t size;   /* bytes */
} kedge_weight_desc;

typedef struct {
  uint32_t magic;
  uint32_t abi_version;
  uint64_t struct_size;
  const char *target;   /* the target string it was compiled for */
  const char *features; /* required CPU features beyond the architecture's baseline, comma-separated */
  const kedge_function_desc *const *functions;
  const kedge_weight_desc *weights;
  uint64_t weights_size; /* bytes of weight data; 0 when there are none */
  int32_t n_functions;
  int32_t n_weights;
  int32_t device_type; /* DLDeviceType that its functions run on: kDLCPU, kDLCUDA or kDLOpenCL */
  int32_t n_kernels;
  const kedge_device_kernel *const *kernels; /* all that its entries launch; none on the CPU */
} kedge_module_desc;

/* ---- Models and contexts ------------------------------------------------------------------------------------ */
typedef struct kedge_model kedge_model;     /* shared and immutable; safe from any thread */
typedef struct kedge_context kedge_context; /* arena, pool and state; one per thread */

typedef struct {
  uint64_t struct_size;
  const char *lib_path;     /* the variant's lib.so */
  const char *weights_path; /* the file that holds the weights; NULL when there are none */
  uint64_t weights_offset;  /* byte offset of the weight data in that file; a multiple of KEDGE_ALIGNMENT */
  /* Or the data itself, at KEDGE_ALIGNMENT; it stays the caller's and outlives the model. Anonymous memory is moved into
   * huge pages, where the system has them: what processes are to share is opened before they are forked. */
  const void *weights_data;
} kedge_open_options;

KEDGE_API int32_t kedge_open(const kedge_open_options *options, kedge_model **model);
/* The same for a module that is linked into the program; `weights` stays the caller's. */
KEDGE_API int32_t kedge_open_linked(const kedge_module_desc *module, const void *weights, kedge_model **model);
KEDGE_API void kedge_close(kedge_model *model); /* the last context keeps it alive */
KEDGE_API const kedge_module_desc *kedge_describe(const kedge_model *model);
/* The index of a function, or -1. */
KEDGE_API int32_t kedge_function_index(const kedge_model *model, const char *name);

typedef struct {
  uint64_t struct_size;
  int32_t num_threads; /* 0: as many as this process may use; one where the module runs on a GPU */
  int32_t reserved;
} kedge_context_options;

/* The device must be of the module's device_type. For a GPU its driver is loaded now, and the module's kernels and
 * weights go to the device: once, for all contexts of the model on it. KEDGE_E_LOAD: there is no driver or no such
 * device, or it refuses the code (the text has its compiler's log); KEDGE_E_FEATURE: it lacks what the kernels need.
 * A GPU's driver does not survive a fork: in a child of a process that had loaded it, nothing on a GPU begins
 * (KEDGE_E_KERNEL), and destroying a context there leaves what it has on the device to the parent. */
KEDGE_API int32_t kedge_context_create(kedge_model *model, DLDevice device, const kedge_context_options *options,
                                       kedge_context **context);
KEDGE_API void kedge_context_destroy(kedge_context *context); /* waits for what it has begun on the device */

/* Fills in ndim, dtype and shape[] of every result for these arguments; each rets[i].shape has KEDGE_MAX_NDIM room. */
KEDGE_API int32_t kedge_infer(kedge_context *context, int32_t function, const DLTensor *args, int32_t n_args,
                              DLTensor *rets, int32_t n_rets);
/* Makes the memory that a call with arguments of these shapes needs beside its tensors, so that the call makes none. */
KEDGE_API int32_t kedge_prepare(kedge_context *context, int32_t function, const DLTensor *args, int32_t n_args,
                                DLTensor *rets, int32_t n_rets);
/* With a module for a GPU, tensors on the CPU are copied to and from memory that the context keeps there; those on its
 * own device (OpenCL: memory of kedge_device_alloc) are used where they are, and whoever writes them on a stream of
 * their own has waited for it. The call returns when the device is done. After a failure or a cancel no output is
 * copied back. A fault of the device is KEDGE_E_KERNEL, and the context can then only be destroyed; CUDA cannot be used
 * by this process again. */
KEDGE_API int32_t kedge_call(kedge_context *context, int32_t function, const DLTensor *args, int32_t n_args,
                             DLTensor *rets, int32_t n_rets);
/* From any thread: the running call, and only it, ends with KEDGE_E_CANCELLED at the next kernel. On a GPU, that is
 * the next launch, and the call returns once the device is done with those before it. */
KEDGE_API void kedge_cancel(kedge_context *context);

/* ---- Timing ------------------------------------------------------------------------------------------------- */
typedef struct { /* the names and meanings of TVM's time_evaluator */
  uint64_t struct_size;
  int64_t number;        /* calls in one repeat, grown until it takes min_repeat_ns, flushes included */
  int64_t repeat;        /* samples */
  int64_t min_repeat_ns; /* 0: `number` stays as it is */
  int64_t warmup;        /* untimed calls before the first sample */
  int64_t limit_zero_time_iterations; /* give up growing `number` after so many repeats that took no time */
  int64_t cooldown_interval_ns;       /* pause between groups of repeats, never after the warm-up */
  int64_t repeats_to_cooldown;        /* repeats in a group */
  int64_t cache_flush_bytes;          /* walk over so much memory before every timed call; each is timed by itself then */
  int64_t profile;                    /* not 0: time every step of the function too, and what the machine can do */
} kedge_time_options;

typedef struct {
  uint64_t struct_size;
  double *samples_ns;  /* room for `repeat` values: nanoseconds of one call, averaged over `number` calls */
  int64_t number;      /* what was used in the end */
  int64_t n_samples;   /* how many were taken */
  int64_t resolution_ns; /* of the clock */
  double *step_ns;       /* a profile's: room for `repeat` rows of the function's n_steps values; else NULL */
  double clock_hz;       /* a profile's: of a busy core, by a chain of additions of one cycle each; 0: the clock stood still */
  double read_bytes_per_s[KEDGE_ROOFS]; /* a profile's: by all threads together; 0: no memory for a working set */
} kedge_time_result;

/* On a GPU, what is timed is the `number` calls and, at the end of each repeat, one wait for the device. Tensors on the
 * CPU are copied there before the warm-up and back after the last sample. Profiles are of the CPU only. */
KEDGE_API int32_t kedge_time(kedge_context *context, int32_t function, const DLTensor *args, int32_t n_args,
                             DLTensor *rets, int32_t n_rets, const kedge_time_options *options,
                             kedge_time_result *result);

/* ---- Devices ------------------------------------------------------------------------------------------------ */
/* All of this holds for the CPU too, where an address is a pointer, so that one piece of code serves every device. */

typedef struct { /* strings stay valid until the process ends */
  uint64_t struct_size;
  const char *name;
  const char *driver_version;
  const char *arch;     /* "sm_90"; on OpenCL its version of OpenCL C; "x86_64" */
  const char *features; /* what kernels may ask for, comma-separated: fp16, fp64, OpenCL's extensions, sm_90 … */
  uint64_t global_memory;  /* bytes */
  uint64_t local_memory;   /* bytes that a group shares */
  uint64_t max_allocation; /* bytes of one buffer */
  int64_t max_group;       /* items (threads) of a group */
  int64_t compute_units;
} kedge_device_properties;

/* How many devices of a DLDeviceType there are; 0 where there is no driver. */
KEDGE_API int32_t kedge_device_count(int32_t device_type);
/* OpenCL's devices are numbered over all platforms, GPUs first. */
KEDGE_API int32_t kedge_device_info(int32_t device_type, int32_t device_id, kedge_device_properties *properties);

typedef enum { KEDGE_COPY_TO_DEVICE = 1, KEDGE_COPY_FROM_DEVICE = 2, KEDGE_COPY_ON_DEVICE = 3 } kedge_copy_direction;

/* Memory of the context's device, usable by all contexts on that device. It is freed before the last one of them is
 * destroyed. OpenCL: addresses can be computed with, but nothing is there for the host. */
KEDGE_API int32_t kedge_device_alloc(kedge_context *context, uint64_t bytes, void **address);
KEDGE_API int32_t kedge_device_free(kedge_context *context, void *address);
/* Returns when it is done. Two pieces of memory on the device must not overlap. */
KEDGE_API int32_t kedge_device_copy(kedge_context *context, void *to, const void *from, uint64_t bytes,
                                    int32_t direction);
/* Waits for what the context has begun on its device, and tells whether it failed. */
KEDGE_API int32_t kedge_device_synchronize(kedge_context *context);

/* ---- The machine -------------------------------------------------------------------------------------------- */
/* CPU features that this machine has, in LLVM's names, comma-separated and sorted; a static string. */
KEDGE_API const char *kedge_cpu_features(void);

#ifdef __cplusplus
}
#endif
#endif
