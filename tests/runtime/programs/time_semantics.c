/* time_semantics.c: kedge_time under a clock that only the kernel moves. In place of clock.c.
 *
 * Arguments: number repeat min_repeat_ns warmup limit_zero cooldown_interval_ns repeats_to_cooldown cache_flush_bytes
 *            kernel_ns cancel_at_call cancel_at_sleep profile. The function has two steps, of a quarter and of the
 *            rest of kernel_ns. Prints what happened as JSON. "order" has a letter for each thing that happened, in turn:
 *            c for a call, f for a flush of the caches, s for a sleep.
 */
#include <stdio.h>
#include <stdlib.h>

#include "device.h"
#include "module.h"

static int64_t now = 1000, kernel_ns, calls, cancel_at_call, sleeps, slept_ns, cancel_at_sleep, calls_at_sleep[1000];
static kedge_context *context;
static char order[1 << 16];
static int64_t n_order;
static kedge_runtime_api api;
static kedge_driver driver;

static void happened(char what) {
  if (n_order < (int64_t)sizeof order - 1) order[n_order++] = what;
}

/* Of the flushes: the function has no loop. They take as long as a thousand calls. */
static int32_t parallel_for(kedge_frame *frame, kedge_loop_body body, void *closure, int64_t extent) {
  happened('f');
  now += 1000 * kernel_ns;
  return kedge_api.parallel_for(frame, body, closure, extent);
}

/* The memory to walk over is the last thing that is wanted before the first flush. */
static int32_t allocate(kedge_device *device, uint64_t bytes, void **address) {
  context->frame.api = &api;
  return kedge_cpu_driver.allocate(device, bytes, address);
}

int64_t kedge_now_ns(void) { return now; }
int64_t kedge_clock_resolution_ns(void) { return 10; }
void kedge_sleep_ns(int64_t duration_ns) {
  if (sleeps < 1000) calls_at_sleep[sleeps] = calls;
  sleeps++;
  happened('s');
  slept_ns += duration_ns;
  now += duration_ns;
  if (sleeps == cancel_at_sleep) kedge_cancel(context);
}

static int32_t run_main(kedge_frame *f) {
  happened('c');
  if (f->marks != NULL) f->api->mark(f, 0);
  now += kernel_ns / 4;
  if (f->marks != NULL) f->api->mark(f, 1);
  now += kernel_ns - kernel_ns / 4;
  if (f->marks != NULL) f->api->mark(f, 2);
  if (++calls == cancel_at_call) kedge_cancel(context);
  return KEDGE_OK;
}
static const kedge_function_desc main_function = {
    .struct_size = sizeof(kedge_function_desc), .name = "main", .entry = run_main, .arena_size = EXPR(CONST(0)), .n_steps = 2};
MODULE(&main_function);

int main(int argc, char **argv) {
  int64_t a[12];
  if (argc != 13) return 2;
  for (int i = 0; i < 12; i++) a[i] = atoll(argv[i + 1]);
  kernel_ns = a[8];
  cancel_at_call = a[9];
  cancel_at_sleep = a[10];
  kedge_model *model;
  kedge_context_options options = {.struct_size = sizeof options, .num_threads = 1};
  if (kedge_open_linked(&kedge_module, NULL, &model) != KEDGE_OK) return 3;
  if (kedge_context_create(model, (DLDevice){kDLCPU, 0}, &options, &context) != KEDGE_OK) return 4;
  api = kedge_api;
  api.parallel_for = parallel_for;
  driver = kedge_cpu_driver;
  driver.allocate = allocate;
  context->queue->device->driver = &driver;
  kedge_time_options time = {sizeof time, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[11]};
  double *samples = calloc((size_t)(a[1] > 0 ? a[1] : 1), sizeof *samples);
  kedge_time_result result = {.struct_size = sizeof result, .samples_ns = samples};
  if (a[11] == 1) result.step_ns = calloc(2 * (size_t)a[1], sizeof *result.step_ns); /* 2: a profile without room */
  int32_t status = kedge_time(context, 0, NULL, 0, NULL, 0, &time, &result);
  printf("{\"status\": %d, \"number\": %lld, \"resolution\": %lld, \"calls\": %lld, \"slept\": %lld, \"samples\": [",
         status, (long long)result.number, (long long)result.resolution_ns, (long long)calls, (long long)slept_ns);
  for (int64_t i = 0; i < result.n_samples; i++) printf("%s%.3f", i > 0 ? ", " : "", samples[i]);
  printf("], \"steps\": [");
  int64_t n_steps = result.step_ns == NULL ? 0 : 2 * result.n_samples;
  for (int64_t i = 0; i < n_steps; i++) printf("%s%.3f", i > 0 ? ", " : "", result.step_ns[i]);
  printf("], \"calls_at_sleep\": [");
  for (int64_t i = 0; i < sleeps && i < 1000; i++) printf("%s%lld", i > 0 ? ", " : "", (long long)calls_at_sleep[i]);
  printf("], \"order\": \"%s\"}\n", order);
  kedge_context_destroy(context);
  kedge_close(model);
  free(samples);
  free(result.step_ns);
  return 0;
}
