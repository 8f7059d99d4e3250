/* watch_opencl.c: stands between the runtime and the real libOpenCL.so.1, which REAL_OPENCL names.
 *
 * It counts what is created and released, and lets chosen calls fail: `watch_opencl_fail(name, error, after)` makes the
 * call of that name that comes after `after` others fail, once. WATCH_OPENCL_EXTENSIONS are the extensions of every
 * device. Arguments are handed on as they came: each is an integer
 * or a pointer, which the calling conventions of 64-bit machines pass alike.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
typedef uintptr_t word;
typedef word (*function)(word, word, word, word, word, word, word, word, word);
#define PARAMETERS word a, word b, word c, word d, word e, word f, word g, word h, word i
#define ARGUMENTS a, b, c, d, e, f, g, h, i

static int alive, failing, after;
static char failing_name[64];

static function real(const char *name) {
  static void *library;
  if (library == NULL) library = dlopen(getenv("REAL_OPENCL"), RTLD_NOW | RTLD_LOCAL);
  function found = library == NULL ? NULL : (function)dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "watch_opencl: no %s: %s\n", name, dlerror());
    abort();
  }
  return found;
}

API void watch_opencl_fail(const char *name, int error, int others) {
  snprintf(failing_name, sizeof failing_name, "%s", name);
  failing = error;
  after = others;
}

API int watch_opencl_alive(void) { return __atomic_load_n(&alive, __ATOMIC_SEQ_CST); }

/* The error that this call should end with, or 0. */
static int fails(const char *name) {
  if (failing == 0 || strcmp(name, failing_name) != 0 || after-- > 0) return 0;
  int error = failing;
  failing = 0;
  return error;
}

static void count(int by) { __atomic_fetch_add(&alive, by, __ATOMIC_SEQ_CST); }

#define CALL(name)                                     \
  API word name(PARAMETERS) {                          \
    int error = fails(#name);                          \
    if (error != 0) return (word)(int64_t)error;       \
    return real(#name)(ARGUMENTS);                     \
  }
#define CREATE(name, error_out)                                      \
  API word name(PARAMETERS) {                                        \
    int error = fails(#name);                                        \
    if (error != 0) return *(int32_t *)(error_out) = error, (word)0; \
    word made = real(#name)(ARGUMENTS);                              \
    if (made != 0) count(1);                                         \
    return made;                                                     \
  }
#define RELEASE(name)              \
  API word name(PARAMETERS) {      \
    count(-1);                     \
    return real(#name)(ARGUMENTS); \
  }

CALL(clGetPlatformIDs)
CALL(clGetDeviceIDs)
CREATE(clCreateContext, f)
RELEASE(clReleaseContext)
CREATE(clCreateCommandQueue, d)
RELEASE(clReleaseCommandQueue)
CREATE(clCreateBuffer, e)
RELEASE(clReleaseMemObject)
CREATE(clCreateProgramWithSource, e)
CALL(clBuildProgram)
CALL(clGetProgramBuildInfo)
RELEASE(clReleaseProgram)
CREATE(clCreateKernel, c)
CALL(clGetKernelInfo)
CALL(clGetKernelWorkGroupInfo)
CALL(clSetKernelArg)
RELEASE(clReleaseKernel)
CALL(clEnqueueWriteBuffer)
CALL(clEnqueueReadBuffer)
CALL(clEnqueueCopyBuffer)
CALL(clWaitForEvents)
RELEASE(clReleaseEvent)
CALL(clFlush)

API word clGetDeviceInfo(PARAMETERS) { /* (device, what, room, value, size) */
  const char *extensions = getenv("WATCH_OPENCL_EXTENSIONS");
  if ((uint32_t)b != 0x1030 || extensions == NULL) {
    int error = fails("clGetDeviceInfo");
    return error == 0 ? real("clGetDeviceInfo")(ARGUMENTS) : (word)(int64_t)error;
  }
  size_t size = strlen(extensions) + 1;
  if (e != 0) *(size_t *)e = size;
  if (d != 0 && c >= size) memcpy((char *)d, extensions, size);
  return 0;
}

API word clFinish(PARAMETERS) { /* what was enqueued is done all the same: nobody may touch its memory later */
  word result = real("clFinish")(ARGUMENTS);
  int error = fails("clFinish");
  return error == 0 ? result : (word)(int64_t)error;
}

API word clEnqueueNDRangeKernel(PARAMETERS) {
  int error = fails("clEnqueueNDRangeKernel");
  if (error != 0) return (word)(int64_t)error;
  word result = real("clEnqueueNDRangeKernel")(ARGUMENTS);
  if ((int32_t)result == 0 && i != 0) count(1); /* an event */
  return result;
}
