/* error.c: the calling thread's last failure. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

static _Thread_local char last_error[sizeof(kedge_kept_error)]; /* a compiler's log may be long */

static void to_one_line(void) {
  for (char *c = last_error; *c != '\0'; c++) { /* one line, whatever dlerror or a name holds */
    if (*c == '\n' || *c == '\r') *c = ' ';
  }
}

int32_t kedge_fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  to_one_line();
  return status;
}

static void append(const char *text) {
  size_t used = strlen(last_error), length = strlen(text), room = sizeof last_error - 1 - used;
  if (length > room) length = room;
  memcpy(last_error + used, text, length);
  last_error[used + length] = '\0';
}

int32_t kedge_fail_within(int32_t status, const char *format, ...) {
  kedge_kept_error before;
  kedge_keep_error(&before);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  append(": ");
  append(before.text);
  to_one_line();
  return status;
}

int32_t kedge_fail_external(struct kedge_frame *frame, const char *what, int32_t status, const char *why) {
  static const char prefix[] = "external function ";
  (void)frame;
  bool typed = status == KEDGE_E_MEMORY || status == KEDGE_E_CANCELLED;
  int32_t result = typed ? status : KEDGE_E_KERNEL;
  if (strncmp(last_error, prefix, sizeof prefix - 1) == 0) return result;
  char said[sizeof last_error]; /* by a parallel loop of it, say */
  snprintf(said, sizeof said, "%s", last_error);
  if (why == NULL && said[0] != '\0') why = said;
  if (why == NULL && typed) why = kedge_status_name(status);
  if (why != NULL) return kedge_fail(result, "%s%s failed: %s", prefix, what, why);
  return kedge_fail(result, "%s%s returned %d", prefix, what, status);
}

void kedge_clear_error(void) { last_error[0] = '\0'; }

void kedge_keep_error(kedge_kept_error *kept) { memcpy(kept->text, last_error, strlen(last_error) + 1); }

void kedge_restore_error(const kedge_kept_error *kept) { memcpy(last_error, kept->text, strlen(kept->text) + 1); }

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
