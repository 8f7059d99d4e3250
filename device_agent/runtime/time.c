/* time.c: timing a function natively. The names and meanings are those of TVM's time_evaluator. */
#include <stdlib.h>
#include <string.h>

#include "device.h"

enum { SLEEP_SLICE_NS = 5000000 }; /* how late a cancel may be noticed while cooling down */
enum { LINE = 64 };

typedef struct {
  kedge_context *context;
  const kedge_time_options *options;
  void *flush; /* cache_flush_bytes on the device, or NULL */
  int64_t number;
  int64_t n_steps;
  double *steps; /* of the sample that is taken, in nanoseconds of one call; NULL without a profile */
} run;

void kedge_mark(kedge_frame *frame, int64_t number) { frame->marks[number] = kedge_now_ns(); }

static void add_steps(const run *r) {
  const int64_t *marks = r->context->frame.marks;
  for (int64_t i = 0; i < r->n_steps; i++) r->steps[i] += (double)(marks[i + 1] - marks[i]);
}

static int32_t call_many(run *r, int64_t count) {
  int32_t status = KEDGE_OK;
  for (int64_t i = 0; i < count && status == KEDGE_OK; i++) {
    status = kedge_enter(r->context);
    if (r->steps != NULL && status == KEDGE_OK) add_steps(r);
  }
  return kedge_drain(r->context, status);
}

static int32_t touch_lines(void *closure, int64_t begin, int64_t end) {
  volatile uint8_t *memory = closure;
  for (int64_t line = begin; line < end; line++) memory[line * LINE] = (uint8_t)(memory[line * LINE] + 1);
  return 0;
}

/* Touches every line, so that whatever the caches held is gone; on the CPU each thread its part, since the threads have
 * caches of their own. A GPU copies one half over the other. */
static int32_t flush_caches(const run *r) {
  kedge_queue *queue = r->context->queue;
  int64_t bytes = r->options->cache_flush_bytes, half = bytes / 2;
  if (queue->device->driver->device_type == kDLCPU) {
    kedge_frame *frame = &r->context->frame;
    return frame->api->parallel_for(frame, touch_lines, r->flush, (bytes + LINE - 1) / LINE);
  }
  if (half == 0) return KEDGE_OK;
  int32_t status = queue->device->driver->copy(queue, (uint8_t *)r->flush + half, r->flush, (uint64_t)half,
                                               KEDGE_COPY_ON_DEVICE);
  return kedge_drain(r->context, status);
}

/* `number` calls and how long they took: all of them between two looks at the clock, or, where the caches are flushed
 * before each of them, each by itself. */
static int32_t time_calls(run *r, int64_t *duration) {
  int64_t batch = r->flush != NULL ? 1 : r->number;
  *duration = 0;
  for (int64_t done = 0; done < r->number; done += batch) {
    int32_t status = r->flush != NULL ? flush_caches(r) : KEDGE_OK;
    if (status != KEDGE_OK) return status;
    int64_t start = kedge_now_ns();
    status = call_many(r, batch);
    *duration += kedge_now_ns() - start;
    if (status != KEDGE_OK) return status;
  }
  return KEDGE_OK;
}

/* The number of calls that should last min_repeat_ns, given that `number` lasted `elapsed`. */
static int64_t grown(int64_t number, int64_t elapsed, int64_t wanted) {
  double by_time = elapsed > 0 ? (double)wanted / ((double)elapsed / (double)number) + 1.0 : 0.0;
  double by_factor = (double)number * 1.618 + 1.0; /* at least, or a jittering clock could make it creep */
  double next = by_time > by_factor ? by_time : by_factor;
  return next < 1e15 ? (int64_t)next : (int64_t)1e15;
}

static int32_t repeat_calls(run *r, double *sample) {
  const kedge_time_options *options = r->options;
  int64_t zeros = 0;
  for (;;) {
    if (r->steps != NULL) memset(r->steps, 0, sizeof *r->steps * (size_t)r->n_steps);
    int64_t duration, start = kedge_now_ns();
    int32_t status = time_calls(r, &duration);
    if (status != KEDGE_OK) return status;
    *sample = (double)duration / (double)r->number;
    /* With the flushes, which may take thousands of times as long: who waits for the repeat waits for them, too. */
    int64_t elapsed = kedge_now_ns() - start;
    if (elapsed >= options->min_repeat_ns) return KEDGE_OK;
    if (duration <= 0 && ++zeros >= options->limit_zero_time_iterations) return KEDGE_OK;
    r->number = grown(r->number, elapsed, options->min_repeat_ns);
  }
}

static int32_t take_sample(run *r, double *sample) {
  int32_t status = repeat_calls(r, sample);
  if (r->steps != NULL) {
    for (int64_t i = 0; i < r->n_steps; i++) r->steps[i] /= (double)r->number;
  }
  return status;
}

static void cool_down(const run *r) {
  int64_t left = r->options->cooldown_interval_ns;
  for (; left > 0 && !kedge_is_cancelled(r->context); left -= SLEEP_SLICE_NS) {
    kedge_sleep_ns(left < SLEEP_SLICE_NS ? left : SLEEP_SLICE_NS);
  }
}

static int32_t take_samples(run *r, kedge_time_result *result) {
  const kedge_time_options *options = r->options;
  r->steps = result->step_ns; /* the warm-up's go where the first sample's will be */
  int32_t status = call_many(r, options->warmup);
  for (int64_t i = 0; i < options->repeat && status == KEDGE_OK; i++) {
    if (i > 0 && i % options->repeats_to_cooldown == 0) cool_down(r);
    if (r->steps != NULL) r->steps = result->step_ns + i * r->n_steps;
    status = take_sample(r, &result->samples_ns[i]);
    if (status == KEDGE_OK) result->n_samples = i + 1;
  }
  result->number = r->number;
  return status;
}

static int32_t check_options(const kedge_time_options *o, const kedge_time_result *result) {
  if (o == NULL || result == NULL || o->struct_size < sizeof *o || result->struct_size < sizeof *result ||
      result->samples_ns == NULL) {
    return kedge_fail(KEDGE_E_ARGUMENT, "kedge_time: options, result and room for samples are required");
  }
  if (o->number < 1 || o->repeat < 1 || o->min_repeat_ns < 0 || o->warmup < 0 || o->limit_zero_time_iterations < 0 ||
      o->cooldown_interval_ns < 0 || o->repeats_to_cooldown < 1 || o->cache_flush_bytes < 0 || o->profile < 0) {
    return kedge_fail(KEDGE_E_ARGUMENT, "time options: number, repeat and repeats_to_cooldown start at 1, others at 0");
  }
  if ((o->profile != 0) != (result->step_ns != NULL)) {
    return kedge_fail(KEDGE_E_ARGUMENT, "kedge_time: a profile, and nothing else, needs room for its steps");
  }
  return KEDGE_OK;
}

static int32_t time_bound(run *r, kedge_time_result *result) {
  kedge_device *device = r->context->queue->device;
  if (r->options->cache_flush_bytes > 0) {
    int32_t status = device->driver->allocate(device, (uint64_t)r->options->cache_flush_bytes, &r->flush);
    if (status != KEDGE_OK) return kedge_fail_within(status, "no memory for cache_flush_bytes");
  }
  result->resolution_ns = kedge_clock_resolution_ns();
  int32_t status = take_samples(r, result);
  if (r->flush == NULL) return status;
  kedge_kept_error why;
  kedge_keep_error(&why);
  int32_t released = device->driver->release(device, r->flush);
  if (status != KEDGE_OK) kedge_restore_error(&why);
  return status != KEDGE_OK ? status : released;
}

/* The samples with a profile around them: marks for the entry, then what this machine does at most. */
static int32_t profile_bound(run *r, kedge_time_result *result) {
  kedge_context *context = r->context;
  const kedge_driver *driver = context->queue->device->driver;
  if (driver->device_type != kDLCPU) {
    return kedge_fail(KEDGE_E_ARGUMENT, "a profile times the kernels of a CPU; on %s one only begins when it is launched",
                      driver->name);
  }
  r->n_steps = context->function->n_steps;
  int64_t *marks = calloc((size_t)r->n_steps + 1, sizeof *marks);
  if (marks == NULL) return kedge_fail(KEDGE_E_MEMORY, "no memory for the times of %lld steps", (long long)r->n_steps);
  context->frame.marks = marks;
  int32_t status = time_bound(r, result);
  context->frame.marks = NULL;
  free(marks);
  if (status == KEDGE_OK) result->clock_hz = kedge_core_clock();
  return status == KEDGE_OK ? kedge_read_rates(&context->frame, result->read_bytes_per_s) : status;
}

int32_t kedge_time(kedge_context *context, int32_t function, const DLTensor *args, int32_t n_args, DLTensor *rets,
                   int32_t n_rets, const kedge_time_options *options, kedge_time_result *result) {
  kedge_clear_error();
  if (context == NULL) return kedge_fail(KEDGE_E_ARGUMENT, "kedge_time: context is required");
  int32_t status = check_options(options, result);
  if (status != KEDGE_OK) return status;
  result->n_samples = 0;
  run r = {.context = context, .options = options, .number = options->number};
  kedge_arm(context);
  status = kedge_begin_call(context, function, args, n_args, rets, n_rets);
  if (status == KEDGE_OK) {
    status = options->profile != 0 ? profile_bound(&r, result) : time_bound(&r, result);
    status = kedge_end_call(context, status);
  }
  kedge_disarm(context);
  return status;
}
