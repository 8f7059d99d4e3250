/* runner.h: the frames of the runner's protocol and what its two files share.
 *
 * The protocol is described in docs/decisions/0002-runner-protocol.md; protocol.py is its other end.
 */
#ifndef KEDGE_RUNNER_H_
#define KEDGE_RUNNER_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kedge.h"

#define RUNNER_PROTOCOL_VERSION 3u
#define RUNNER_MAGIC 0x4647444Bu /* "KDGF" */

enum {
  MESSAGE_HELLO = 1,
  MESSAGE_OPEN = 2,
  MESSAGE_CALL = 3,
  MESSAGE_TIME = 4,
  MESSAGE_CANCEL = 5,
  MESSAGE_ERROR = 6,
  MESSAGE_RESULT = 7,
  MESSAGE_BYE = 8,
  MESSAGE_DEVICES = 9
};
enum { FLAG_SHARED = 1 };                                      /* of a frame */
enum { CALL_DISCARD_OUTPUTS = 1, CALL_SHARED_OUTPUTS = 2 };    /* of a call */

/* ---- frame.c ------------------------------------------------------------------------------------------------ */

typedef struct { /* as on the wire, little-endian as all targets are */
  uint32_t magic;
  uint16_t type;
  uint16_t flags;
  uint64_t request;
  uint64_t length; /* of the payload that follows */
} frame_header;
_Static_assert(sizeof(frame_header) == 24, "the header has no padding");

typedef struct {
  frame_header header;
  uint8_t *payload; /* header.length bytes at KEDGE_ALIGNMENT, or NULL when there was no memory for them */
  int file;         /* the descriptor that came along, or -1; the reader's */
} frame;

typedef struct { /* the two ends may be the same descriptor */
  int in, out;
  bool is_socket; /* descriptors can be passed */
} channel;

typedef enum { FRAME_READ, FRAME_END, FRAME_BROKEN } frame_result;

/* Reads one frame; what it holds is then the caller's. FRAME_END: the other end closed between two frames. */
frame_result frame_read(const channel *from, frame *into);
void frame_free(frame *f);

typedef struct { /* bytes that grow; `failed` once memory ran out */
  uint8_t *data;
  size_t size, room;
  bool failed;
} bytes;
void bytes_add(bytes *to, const void *data, size_t size);
void bytes_u32(bytes *to, uint32_t value);
void bytes_u64(bytes *to, uint64_t value);
void bytes_text(bytes *to, const char *text);
void bytes_pad(bytes *to, size_t alignment);

/* Writes a frame whose payload is head and then tail; file, if not -1, goes along. False when the end is gone. */
bool frame_write(const channel *to, uint16_t type, uint64_t request, const bytes *head, const void *tail,
                 size_t tail_size, int file);

typedef struct { /* reads a payload; `broken` once it ran off the end */
  const uint8_t *data;
  size_t size, at;
  bool broken;
} cursor;
void cursor_take(cursor *c, void *into, size_t size);
uint32_t cursor_u32(cursor *c);
uint64_t cursor_u64(cursor *c);
char *cursor_text(cursor *c); /* a new string, or NULL when broken or out of memory */

/* ---- runner_requests.c -------------------------------------------------------------------------------------- */

typedef struct session { /* what is loaded */
  kedge_model *model;
  kedge_context *context;
  void (*done)(const struct session *); /* called before the reply is written: the next request may follow it at once */
} session;

/* Handles an open, call, time or devices and writes its reply. */
void handle_request(const channel *to, session *s, const frame *request);
void write_error(const channel *to, uint64_t request, int32_t status, const char *text);
bool shared_memory_works(void);

/* ---- sandbox.c ---------------------------------------------------------------------------------------------- */

/* From now on no new processes, no sockets, nothing that reaches another process. False with errno: there are no
 * filters (EINVAL, ENOSYS), or this process may not set one. */
bool kedge_confine_calls(void);

#endif
