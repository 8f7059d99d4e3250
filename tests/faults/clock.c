/* Preloaded into a process: its wall clock is off by as many seconds as the file KEDGE_TEST_CLOCK says (8 bytes).
 *
 * The steady clock stays as it is. Absolute times that the process hands to the kernel are turned back, as a kernel
 * whose clock had jumped would understand them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *offset_s;
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static long (*real_syscall)(long, ...);

__attribute__((constructor)) static void begin(void) {
  real_clock_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  real_syscall = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  const char *path = getenv("KEDGE_TEST_CLOCK");
  int file = path != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, 8, PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) offset_s = mapped;
  close(file);
}

static int64_t offset(void) { return offset_s == NULL ? 0 : *offset_s; }

int clock_gettime(clockid_t clock, struct timespec *now) {
  if (real_clock_gettime == NULL) begin();
  int result = real_clock_gettime(clock, now);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
  return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec precise;
  if (clock_gettime(CLOCK_REALTIME, &precise) != 0) return -1;
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out != NULL) *out = now.tv_sec;
  return now.tv_sec;
}

long syscall(long number, ...) {
  if (real_syscall == NULL) begin();
  va_list list;
  va_start(list, number);
  long a = va_arg(list, long), b = va_arg(list, long), c = va_arg(list, long), d = va_arg(list, long);
  long e = va_arg(list, long), f = va_arg(list, long);
  va_end(list);
  struct timespec until;
  if (number == SYS_futex && (b & FUTEX_CLOCK_REALTIME) != 0 && d != 0) {
    until = *(const struct timespec *)d;
    until.tv_sec -= offset();
    if (until.tv_sec < 0) until = (struct timespec){0, 0};
    d = (long)&until;
  }
  return real_syscall(number, a, b, c, d, e, f);
}
