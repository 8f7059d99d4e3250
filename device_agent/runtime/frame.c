/* frame.c: reading and writing frames, over a Unix socket (which can pass descriptors) or a pair of pipes. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "runner.h"

static pthread_mutex_t write_lock = PTHREAD_MUTEX_INITIALIZER; /* both threads reply */

/* ---- Reading ------------------------------------------------------------------------------------------------ */

static ssize_t receive(const channel *from, void *into, size_t size, int *file) {
  if (!from->is_socket) return read(from->in, into, size);
  union {
    struct cmsghdr align;
    char room[CMSG_SPACE(sizeof(int))];
  } control;
  struct iovec piece = {into, size};
  struct msghdr message = {
      .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
  ssize_t got = recvmsg(from->in, &message, MSG_CMSG_CLOEXEC);
  struct cmsghdr *first = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
  if (first != NULL && first->cmsg_level == SOL_SOCKET && first->cmsg_type == SCM_RIGHTS) {
    int received;
    memcpy(&received, CMSG_DATA(first), sizeof received);
    if (*file >= 0) close(*file);
    *file = received;
  }
  return got;
}

/* How much arrived before the end or an error: all of it when the other end behaves. */
static size_t read_all(const channel *from, void *into, size_t size, int *file) {
  size_t filled = 0;
  while (filled < size) {
    ssize_t got = receive(from, (uint8_t *)into + filled, size - filled, file);
    if (got > 0) filled += (size_t)got;
    if (got == 0 || (got < 0 && errno != EINTR)) break;
  }
  return filled;
}

static bool skip(const channel *from, uint64_t size, int *file) {
  uint8_t scratch[4096];
  while (size > 0) {
    size_t piece = size < sizeof scratch ? (size_t)size : sizeof scratch;
    if (read_all(from, scratch, piece, file) != piece) return false;
    size -= piece;
  }
  return true;
}

frame_result frame_read(const channel *from, frame *into) {
  *into = (frame){.file = -1};
  size_t got = read_all(from, &into->header, sizeof into->header, &into->file);
  if (got == 0) return FRAME_END;
  if (got != sizeof into->header || into->header.magic != RUNNER_MAGIC) return FRAME_BROKEN;
  uint64_t length = into->header.length;
  void *memory = NULL;
  if (length > (uint64_t)PTRDIFF_MAX || posix_memalign(&memory, KEDGE_ALIGNMENT, length > 0 ? (size_t)length : 1) != 0) {
    return skip(from, length, &into->file) ? FRAME_READ : FRAME_BROKEN;
  }
  into->payload = memory;
  return read_all(from, memory, (size_t)length, &into->file) == length ? FRAME_READ : FRAME_BROKEN;
}

void frame_free(frame *f) {
  free(f->payload);
  if (f->file >= 0) close(f->file);
  *f = (frame){.file = -1};
}

void cursor_take(cursor *c, void *into, size_t size) {
  if (c->broken || size > c->size - c->at) {
    c->broken = true;
    memset(into, 0, size);
    return;
  }
  memcpy(into, c->data + c->at, size);
  c->at += size;
}

uint32_t cursor_u32(cursor *c) {
  uint32_t value;
  cursor_take(c, &value, sizeof value);
  return value;
}

uint64_t cursor_u64(cursor *c) {
  uint64_t value;
  cursor_take(c, &value, sizeof value);
  return value;
}

char *cursor_text(cursor *c) {
  size_t size = cursor_u32(c);
  if (c->broken || size > c->size - c->at) {
    c->broken = true;
    return NULL;
  }
  char *text = malloc(size + 1);
  if (text == NULL) return NULL;
  cursor_take(c, text, size);
  text[size] = '\0';
  return text;
}

/* ---- Writing ------------------------------------------------------------------------------------------------ */

void bytes_add(bytes *to, const void *data, size_t size) {
  if (to->failed || size == 0) return;
  if (to->room - to->size < size) {
    size_t room = (to->size + size) * 2;
    uint8_t *grown = realloc(to->data, room);
    if (grown == NULL) {
      to->failed = true;
      return;
    }
    to->data = grown;
    to->room = room;
  }
  memcpy(to->data + to->size, data, size);
  to->size += size;
}

void bytes_u32(bytes *to, uint32_t value) { bytes_add(to, &value, sizeof value); }

void bytes_u64(bytes *to, uint64_t value) { bytes_add(to, &value, sizeof value); }

void bytes_text(bytes *to, const char *text) {
  size_t size = strlen(text);
  bytes_u32(to, (uint32_t)size);
  bytes_add(to, text, size);
}

void bytes_pad(bytes *to, size_t alignment) {
  static const uint8_t zeros[KEDGE_ALIGNMENT];
  bytes_add(to, zeros, (alignment - to->size % alignment) % alignment);
}

static ssize_t send_pieces(const channel *to, struct iovec *pieces, size_t count, int file) {
  if (!to->is_socket) return writev(to->out, pieces, (int)count);
  union {
    struct cmsghdr align;
    char room[CMSG_SPACE(sizeof(int))];
  } control;
  struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
  if (file >= 0) {
    memset(&control, 0, sizeof control);
    message.msg_control = control.room;
    message.msg_controllen = sizeof control.room;
    struct cmsghdr *first = CMSG_FIRSTHDR(&message);
    first->cmsg_level = SOL_SOCKET;
    first->cmsg_type = SCM_RIGHTS;
    first->cmsg_len = CMSG_LEN(sizeof file);
    memcpy(CMSG_DATA(first), &file, sizeof file);
  }
  return sendmsg(to->out, &message, MSG_NOSIGNAL);
}

bool frame_write(const channel *to, uint16_t type, uint64_t request, const bytes *head, const void *tail,
                 size_t tail_size, int file) {
  frame_header header = {RUNNER_MAGIC, type, file >= 0 ? FLAG_SHARED : 0, request, head->size + tail_size};
  struct iovec pieces[] = {{&header, sizeof header}, {head->data, head->size}, {(void *)tail, tail_size}};
  size_t first = 0, count = sizeof pieces / sizeof *pieces;
  bool sent = true;
  pthread_mutex_lock(&write_lock);
  while (first < count && sent) {
    ssize_t wrote = send_pieces(to, pieces + first, count - first, file);
    if (wrote < 0) {
      sent = errno == EINTR;
      continue;
    }
    file = -1; /* went with the first byte */
    for (size_t left = (size_t)wrote; first < count && left >= pieces[first].iov_len; first++) {
      left -= pieces[first].iov_len;
      wrote -= (ssize_t)pieces[first].iov_len;
    }
    if (first < count) {
      pieces[first].iov_base = (uint8_t *)pieces[first].iov_base + wrote;
      pieces[first].iov_len -= (size_t)wrote;
    }
  }
  pthread_mutex_unlock(&write_lock);
  return sent;
}
