/* error.c: the calling thread's last failure. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

static _Thread_local char last_error[1024];

int32_t kedge_fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  for (char *c = last_error; *c != '\0'; c++) { /* one line, whatever dlerror or a name holds */
    if (*c == '\n' || *c == '\r') *c = ' ';
  }
  return status;
}

void kedge_clear_error(void) { last_error[0] = '\0'; }

const char *kedge_last_error(void) { return last_error; }

const char *kedge_status_name(int32_t status) {
  static const char *const names[] = {
      "ok",        "bad argument",        "bad input",     "load error", "wrong ABI",
      "missing feature", "out of memory", "cancelled", "kernel failure",
  };
  if (status < 0 || (size_t)status >= sizeof names / sizeof *names) return "unknown status";
  return names[status];
}

uint32_t kedge_abi_version(void) { return KEDGE_ABI_VERSION; }

void kedge_text_add(kedge_text *text, const char *format, ...) {
  size_t room = sizeof text->data - text->used;
  va_list arguments;
  va_start(arguments, format);
  int written = vsnprintf(text->data + text->used, room, format, arguments);
  va_end(arguments);
  if (written > 0) text->used += (size_t)written < room ? (size_t)written : room - 1;
}
