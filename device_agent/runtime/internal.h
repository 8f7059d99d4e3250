/* internal.h: what the files of the runtime tell each other. Nothing here is part of the ABI. */
#ifndef KEDGE_INTERNAL_H_
#define KEDGE_INTERNAL_H_

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kedge.h"

#ifndef KEDGE_EXPOSE_INTERNALS /* tests look inside */
#pragma GCC visibility push(hidden)
#endif

/* ---- error.c ------------------------------------------------------------------------------------------------ */
/* Records the text for kedge_last_error and returns status. */
int32_t kedge_fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same, followed by ": " and the text of the failure before. */
int32_t kedge_fail_within(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));
void kedge_clear_error(void);
typedef struct { /* a failure's text while cleaning up, which may fail as well */
  char text[4096];
} kedge_kept_error;
void kedge_keep_error(kedge_kept_error *kept);
void kedge_restore_error(const kedge_kept_error *kept);
/* kedge_runtime_api.fail */
int32_t kedge_fail_external(struct kedge_frame *frame, const char *what, int32_t status, const char *why);

/* A line of text that is cut, never overrun. */
typedef struct {
  char data[512];
  size_t used;
} kedge_text;
void kedge_text_add(kedge_text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- clock.c: the only place that asks for the time, so that tests can put another one in its place ---------- */
int64_t kedge_now_ns(void);
int64_t kedge_clock_resolution_ns(void);
void kedge_sleep_ns(int64_t duration_ns);

enum { KEDGE_HUGE_PAGE = 2 << 20 };

/* ---- sync.c: sleeping until a word changes ------------------------------------------------------------------- */
void kedge_wait_while(_Atomic uint32_t *word, uint32_t value); /* may return early */
void kedge_wake_one(_Atomic uint32_t *word);
static inline void kedge_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#else
  __asm__ volatile("" ::: "memory");
#endif
}

/* ---- expr.c ------------------------------------------------------------------------------------------------- */
/* Why a program cannot be evaluated with that many symbols, or NULL when it can. */
const char *kedge_expr_check(const kedge_expr *expr, int32_t n_symbols);
/* Evaluates a checked program; false on overflow or a division by zero. */
bool kedge_expr_uses(const kedge_expr *expr, int64_t symbol);
bool kedge_expr_eval(const kedge_expr *expr, const int64_t *symbols, int64_t *value);
/* Adds the program to text as people write it: "N*4". */
void kedge_expr_print(const kedge_expr *expr, const kedge_symbol *symbols, kedge_text *text);

/* ---- tensor.c ----------------------------------------------------------------------------------------------- */
void kedge_dtype_print(DLDataType dtype, kedge_text *text);
/* Bytes of a dense tensor; false when they overflow, or when a dim is negative. */
bool kedge_tensor_bytes(const DLTensor *tensor, uint64_t *bytes);
bool kedge_tensor_is_dense(const DLTensor *tensor);

/* ---- devices: see device.h ---------------------------------------------------------------------------------- */
typedef struct kedge_queue kedge_queue;
typedef struct kedge_placement kedge_placement;
/* kedge_runtime_api.launch */
int32_t kedge_launch_kernel(kedge_frame *frame, const kedge_launch *launch);

/* ---- module.c ----------------------------------------------------------------------------------------------- */
struct kedge_model {
  _Atomic int32_t references;
  const kedge_module_desc *module;
  const uint8_t *weights;
  void *library; /* of dlopen, or NULL */
  void *mapping; /* of mmap, or NULL */
  size_t mapping_size;
  pthread_mutex_t lock;        /* of placements */
  kedge_placement *placements; /* one for each device that has contexts of this model */
};
void kedge_model_retain(kedge_model *model);
/* Whether all of a comma-separated list of features is in another; else *missing holds those that are not. */
bool kedge_has_features(const char *required, const char *available, kedge_text *missing);

/* ---- pool.c ------------------------------------------------------------------------------------------------- */
typedef struct { /* a context's share in the process's pool; kedge_frame.pool points to one */
  int32_t num_threads;
} kedge_team;
/* Starts the threads that the team needs; num_threads 0 means as many as this process may use. */
int32_t kedge_team_init(kedge_team *team, int32_t num_threads);
/* CPUs that this process may run on, or fewer where its control groups allow less of their time. */
int32_t kedge_usable_cpus(void);
/* quota.c: how many CPUs' time the control groups of this process allow, rounded up, as /proc and /sys below `root`
 * tell; INT32_MAX without a limit. */
int32_t kedge_cpu_quota(const char *root);
extern const kedge_runtime_api kedge_api;

/* ---- time.c ------------------------------------------------------------------------------------------------- */
/* kedge_runtime_api.mark */
void kedge_mark(kedge_frame *frame, int64_t number);

/* ---- roof.c ------------------------------------------------------------------------------------------------- */
/* The clock of this thread's core in Hz. */
double kedge_core_clock(void);
/* Bytes that the frame's team reads in a second of each working set (see KEDGE_ROOFS). */
int32_t kedge_read_rates(kedge_frame *frame, double rates[KEDGE_ROOFS]);

/* ---- context.c ---------------------------------------------------------------------------------------------- */
typedef struct { /* the place of an input or output on the device, where the caller has it on the host */
  void *address;
  uint64_t room;  /* bytes at address */
  void *host;     /* the caller's data in this call; NULL when there is nothing to copy */
  uint64_t bytes; /* of it */
} kedge_slot;

struct kedge_context {
  kedge_model *model;
  kedge_placement *placement;
  kedge_queue *queue;
  kedge_team team;
  _Atomic int32_t cancel;
  void **inputs;
  void **outputs;
  int64_t *symbols;
  uint8_t *arena;
  uint64_t arena_size;
  const kedge_function_desc *function; /* of the call that runs */
  kedge_frame frame;                   /* of the call that runs; compiled code gets this very one */
  kedge_slot *slots;                   /* max_inputs of inputs, then those of outputs; none on the CPU */
  int32_t n_slots, max_inputs;
};
static inline kedge_context *kedge_context_of(kedge_frame *frame) {
  return (kedge_context *)(void *)((char *)frame - offsetof(kedge_context, frame));
}

/* From now on kedge_cancel holds for the next call too; a call arms and disarms by itself. */
void kedge_arm(kedge_context *context);
void kedge_disarm(kedge_context *context);
bool kedge_is_cancelled(const kedge_context *context);
/* Checks arguments and results, binds symbols, grows the arena, begins to copy inputs to the device: the context's
 * frame is ready to be entered, any number of times, until kedge_end_call. After a failure there is nothing to end. */
int32_t kedge_begin_call(kedge_context *context, int32_t function, const DLTensor *args, int32_t n_args, DLTensor *rets,
                         int32_t n_rets);
/* Runs the entry once; on a GPU that means that its launches are enqueued. */
int32_t kedge_enter(kedge_context *context);
/* Copies outputs back if `status` is KEDGE_OK, and waits for the device. Returns the first failure. */
int32_t kedge_end_call(kedge_context *context, int32_t status);
/* Waits for the device. Returns `status` and leaves its text if it is a failure, else how the device fared. */
int32_t kedge_drain(kedge_context *context, int32_t status);
/* KEDGE_OK, or the refusal of a context whose device faulted, or whose driver stayed with the parent of a fork. */
int32_t kedge_check_queue(const kedge_context *context);

/* ---- staging.c ---------------------------------------------------------------------------------------------- */
/* Gives the arguments that are on the host (slot.host is set) room on the device: their data is there from now on. */
int32_t kedge_stage(kedge_context *context, const kedge_function_desc *function);
int32_t kedge_copy_in(kedge_context *context, const kedge_function_desc *function);
int32_t kedge_copy_out(kedge_context *context, const kedge_function_desc *function);
void kedge_free_staging(kedge_context *context);

#ifndef KEDGE_EXPOSE_INTERNALS
#pragma GCC visibility pop
#endif
#endif
