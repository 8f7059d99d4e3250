/* runner.h: the frames of the runner's protocol and what its files share.
 *
 * The protocol is described in docs/decisions/0002-runner-protocol.md; protocol.py is its other end.
 */
#ifndef KEDGE_RUNNER_H_
#define KEDGE_RUNNER_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kedge.h"

#define RUNNER_PROTOCOL_VERSION 5u
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
  MESSAGE_DEVICES = 9,
  MESSAGE_KEEP = 10,
  MESSAGE_FETCH = 11,
  MESSAGE_RELEASE = 12,
  MESSAGE_CLOSE = 13,
  MESSAGE_FILL = 14,
  MESSAGE_END /* one beyond the last */
};
enum { FLAG_SHARED = 1 };                                      /* of a frame */
/* Of a call. */
enum { CALL_DISCARD_OUTPUTS = 1, CALL_SHARED_OUTPUTS = 2, CALL_KEEP_OUTPUTS = 4 };

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

/* ---- runner_tensors.c --------------------------------------------------------------------------------------- */

typedef struct { /* a tensor that stays, in memory of its own that nobody can write to once it is whole */
  uint64_t handle;
  DLTensor tensor; /* its shape is the one below, its data the mapping */
  int64_t shape[KEDGE_MAX_NDIM];
  size_t size;   /* of the mapping; 0: there is none */
  size_t filled; /* so many of its first bytes are there */
} kept_tensor;

typedef struct { /* by handle, which grows and is never given out twice */
  kept_tensor **items;
  size_t count, room;
  uint64_t last;
} tensor_store;

/* A tensor like this one, with writable memory; not in the store yet. NULL with the error set. */
kept_tensor *tensor_new(const DLTensor *like);
void tensor_destroy(kept_tensor *t);
/* Its next bytes; with the last ones it is whole. */
int32_t tensor_fill(kept_tensor *t, const void *data, size_t size);
/* All of it is there: from now on it is read-only. */
int32_t tensor_protect(kept_tensor *t);
/* From now on the store's, whole or not yet. */
int32_t tensors_keep(tensor_store *store, kept_tensor *t);
kept_tensor *tensors_find(const tensor_store *store, uint64_t handle);
bool tensors_release(tensor_store *store, uint64_t handle);

/* ---- runner_requests.c -------------------------------------------------------------------------------------- */

enum { MAX_MODULES = 64 };

typedef struct { /* a free place has no model */
  uint32_t id;
  kedge_model *model;
  kedge_context *context;
} loaded_module;

typedef struct { /* what is loaded, and what is kept */
  loaded_module modules[MAX_MODULES];
  uint32_t n_opened; /* so far: the next one's id */
  tensor_store tensors;
  void (*done)(void); /* called before the reply is written: the next request may follow it at once */
} session;

/* The context that a request runs in; NULL where it runs in none. */
kedge_context *context_of(const session *s, const frame *request);
/* Handles a request of any type but cancel and bye, and writes its reply. */
void handle_request(const channel *to, session *s, const frame *request);
void write_error(const channel *to, uint64_t request, int32_t status, const char *text);
bool shared_memory_works(void);

/* ---- sandbox.c ---------------------------------------------------------------------------------------------- */

/* From now on no new processes, no sockets, nothing that reaches another process. False with errno: there are no
 * filters (EINVAL, ENOSYS), or this process may not set one. */
bool kedge_confine_calls(void);

/* ---- cage.c --------------------------------------------------------------------------------------------------- */

typedef struct { /* descriptors, or -1 where there is none; `user` may be NULL */
  int group, user_space, network, ruleset;
  const char *user; /* "user:group[:more groups]" in numbers */
} cage;

/* Goes on as a child that is in the control group; the parent closes `fd`, if not -1, and ends as the child ends. */
bool kedge_enter_group(const cage *c, int fd);

/* In this order, each before the other threads: the option that failed (and errno), or NULL. The first needs the
 * rights that the second gives away; the last needs no_new_privs. */
const char *kedge_enter_namespaces(const cage *c);
const char *kedge_become_nobody(const cage *c);
const char *kedge_confine_files(const cage *c);

/* Makes what can be entered, from `--readable PATH` and `--writable PATH`, and sends the descriptors over the socket
 * `to`, with a line for each: r (ruleset), u (user namespace), n (network), or ! and why there is none. */
int kedge_build_cage(int to, int argc, char **argv);

#endif
