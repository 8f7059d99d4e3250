/* runner.c: kedge-runner, the process in which native code from an artifact runs.
 *
 * It limits itself before it loads anything. One thread reads frames, so that a cancel or the end of the stream is
 * seen while the other runs a request. It ends with its parent, or with the stream.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "internal.h"
#include "runner.h"

enum { EXIT_BROKEN = 2, EXIT_SETUP = 3 };
enum { READER_STACK = 256 << 10 };

static const char usage[] =
    "usage: kedge-runner (--fd N | --stdio) [--cpus A,B,...] [--limit-memory BYTES] [--limit-cpu-s SECONDS]\n"
    "                    [--limit-files COUNT] [--limit-file-size BYTES] [--limit-processes COUNT] [--sandbox]\n"
    "                    [--group FD] [--user UID:GID[:GID...]] [--user-space FD] [--network FD] [--ruleset FD]\n"
    "       kedge-runner --build-cage FD [--readable PATH]... [--writable PATH]...\n"
    "Runs compiled kedge models for the process at the other end of a Unix socket or of its standard streams.\n";

typedef struct {
  int fd; /* -1: the standard streams */
  const char *cpus;
  int64_t memory, cpu_s, files, file_size, processes; /* -1: no limit */
  bool sandbox;
  cage cage;
} arguments;

static channel stream = {.in = -1, .out = -1, .is_socket = false};

static _Noreturn void refuse(int32_t status, const char *what, const char *why) {
  char text[512];
  snprintf(text, sizeof text, "%s: %s", what, why);
  if (stream.out >= 0) write_error(&stream, 0, status, text);
  fprintf(stderr, "kedge-runner: %s\n", text);
  exit(EXIT_SETUP);
}

/* ---- Setting up --------------------------------------------------------------------------------------------- */

static int64_t number(const char *option, const char *text) {
  char *end;
  errno = 0;
  long long value = text == NULL ? -1 : strtoll(text, &end, 10);
  if (text == NULL || errno != 0 || end == text || *end != '\0' || value < 0) refuse(KEDGE_E_ARGUMENT, option, "needs a number");
  return value;
}

static int descriptor(const char *option, const char *text) {
  int64_t fd = number(option, text);
  if (fd > INT_MAX) refuse(KEDGE_E_ARGUMENT, option, "needs a descriptor");
  return (int)fd;
}

/* An option that names what surrounds this process; false: it is another one. */
static bool parse_cage(cage *c, const char *option, const char *value) {
  if (strcmp(option, "--group") == 0) {
    c->group = descriptor(option, value);
  } else if (strcmp(option, "--user-space") == 0) {
    c->user_space = descriptor(option, value);
  } else if (strcmp(option, "--network") == 0) {
    c->network = descriptor(option, value);
  } else if (strcmp(option, "--ruleset") == 0) {
    c->ruleset = descriptor(option, value);
  } else if (strcmp(option, "--user") == 0 && value != NULL) {
    c->user = value;
  } else {
    return false;
  }
  return true;
}

static arguments parse(int argc, char **argv) {
  arguments a = {.fd = -2, .memory = -1, .cpu_s = -1, .files = -1, .file_size = -1, .processes = -1};
  a.cage = (cage){.group = -1, .user_space = -1, .network = -1, .ruleset = -1};
  for (int i = 1; i < argc; i++) {
    const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(option, "--help") == 0) {
      fputs(usage, stdout);
      exit(0);
    }
    if (strcmp(option, "--stdio") == 0) {
      a.fd = -1;
      continue;
    }
    if (strcmp(option, "--sandbox") == 0) {
      a.sandbox = true;
      continue;
    }
    if (strcmp(option, "--fd") == 0) {
      int64_t fd = number(option, value);
      a.fd = fd <= INT_MAX ? (int)fd : -2;
    } else if (strcmp(option, "--cpus") == 0 && value != NULL) {
      a.cpus = value;
    } else if (strcmp(option, "--limit-memory") == 0) {
      a.memory = number(option, value);
    } else if (strcmp(option, "--limit-cpu-s") == 0) {
      a.cpu_s = number(option, value);
    } else if (strcmp(option, "--limit-files") == 0) {
      a.files = number(option, value);
    } else if (strcmp(option, "--limit-file-size") == 0) {
      a.file_size = number(option, value);
    } else if (strcmp(option, "--limit-processes") == 0) {
      a.processes = number(option, value);
    } else if (!parse_cage(&a.cage, option, value)) {
      refuse(KEDGE_E_ARGUMENT, option, "unknown option; try --help");
    }
    i++;
  }
  if (a.fd == -2) refuse(KEDGE_E_ARGUMENT, "--fd N or --stdio", "one of them is required");
  return a;
}

static void open_stream(int fd) {
  if (fd >= 0) {
    struct stat info;
    if (fstat(fd, &info) != 0) refuse(KEDGE_E_ARGUMENT, "--fd", strerror(errno));
    stream = (channel){fd, fd, S_ISSOCK(info.st_mode)};
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return;
  }
  stream = (channel){fcntl(0, F_DUPFD_CLOEXEC, 3), fcntl(1, F_DUPFD_CLOEXEC, 3), false};
  int nowhere = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (stream.in < 0 || stream.out < 0 || nowhere < 0) refuse(KEDGE_E_ARGUMENT, "--stdio", strerror(errno));
  dup2(nowhere, 0);
  dup2(2, 1); /* whatever a model prints must not end up among the frames */
  close(nowhere);
}

static void limit(int resource, const char *option, int64_t value, int64_t hard) {
  if (value < 0) return;
  struct rlimit now, wanted = {(rlim_t)value, (rlim_t)hard};
  if (getrlimit(resource, &now) != 0) refuse(KEDGE_E_ARGUMENT, option, strerror(errno));
  if (now.rlim_max != RLIM_INFINITY && wanted.rlim_max > now.rlim_max) wanted.rlim_max = now.rlim_max;
  if (wanted.rlim_cur > wanted.rlim_max) wanted.rlim_cur = wanted.rlim_max;
  if (setrlimit(resource, &wanted) != 0) refuse(KEDGE_E_ARGUMENT, option, strerror(errno));
}

static void choose_cpus(const char *list) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const char *at = list; *at != '\0';) {
    char *end;
    long cpu = strtol(at, &end, 10);
    if (end == at || cpu < 0 || cpu >= CPU_SETSIZE || (*end != ',' && *end != '\0')) {
      refuse(KEDGE_E_ARGUMENT, "--cpus", "needs numbers with commas between");
    }
    CPU_SET((size_t)cpu, &set);
    at = end + (*end == ',');
  }
  if (sched_setaffinity(0, sizeof set, &set) != 0) refuse(KEDGE_E_ARGUMENT, "--cpus", strerror(errno));
}

/* When memory runs out, this process should end first, not the agent or the system. A system may not allow it. */
static void offer_to_oom_killer(void) {
  int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (file < 0) return;
  ssize_t ignored = write(file, "1000", 4);
  (void)ignored;
  close(file);
}

static void check(const char *failed) {
  if (failed != NULL) refuse(KEDGE_E_ARGUMENT, failed, strerror(errno));
}

static void confine(const arguments *a) {
  pid_t parent = getppid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  offer_to_oom_killer();
  check(kedge_enter_namespaces(&a->cage));
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) refuse(KEDGE_E_ARGUMENT, "no_new_privs", strerror(errno));
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  signal(SIGINT, SIG_IGN); /* Ctrl-C is for whoever started this */
  mallopt(M_ARENA_MAX, 1); /* each further arena would take 64 MiB of the address space that is limited below */
  limit(RLIMIT_CORE, "core files", 0, 0);
  limit(RLIMIT_AS, "--limit-memory", a->memory, a->memory);
  limit(RLIMIT_CPU, "--limit-cpu-s", a->cpu_s, a->cpu_s < INT64_MAX ? a->cpu_s + 1 : a->cpu_s);
  limit(RLIMIT_NOFILE, "--limit-files", a->files, a->files);
  limit(RLIMIT_FSIZE, "--limit-file-size", a->file_size, a->file_size);
  limit(RLIMIT_NPROC, "--limit-processes", a->processes, a->processes);
  if (a->cpus != NULL) choose_cpus(a->cpus);
  check(kedge_become_nobody(&a->cage));
  prctl(PR_SET_PDEATHSIG, SIGKILL); /* a change of user forgets it */
  if (getppid() != parent) _exit(EXIT_SETUP);
  prctl(PR_SET_DUMPABLE, 0); /* no core files, no crash handlers: a crash is an outcome here */
  check(kedge_confine_files(&a->cage));
  /* EINVAL: the kernel, or the emulator in its place, has no filters. */
  if (a->sandbox && !kedge_confine_calls() && errno != EINVAL && errno != ENOSYS) {
    refuse(KEDGE_E_ARGUMENT, "--sandbox", strerror(errno));
  }
}

static void say_hello(void) {
  struct utsname name;
  bytes head = {0};
  bytes_u32(&head, RUNNER_PROTOCOL_VERSION);
  bytes_u32(&head, kedge_abi_version());
  bytes_u32(&head, (uint32_t)getpid());
  bytes_u32(&head, (uint32_t)sysconf(_SC_PAGESIZE));
  bytes_u32(&head, (uint32_t)kedge_usable_cpus());
  bytes_u32(&head, stream.is_socket && shared_memory_works());
  bytes_text(&head, kedge_cpu_features());
  bytes_text(&head, uname(&name) == 0 ? name.machine : "");
  bool sent = !head.failed && frame_write(&stream, MESSAGE_HELLO, 0, &head, NULL, 0, -1);
  free(head.data);
  if (!sent) exit(EXIT_SETUP);
}

/* ---- Serving ------------------------------------------------------------------------------------------------ */

static session held;

static struct {
  pthread_mutex_t lock;
  pthread_cond_t arrived;
  bool waiting, busy; /* a request waits to be begun; one waits or runs */
  frame request;
  kedge_context *context; /* that it runs in, if any */
} desk = {.lock = PTHREAD_MUTEX_INITIALIZER, .arrived = PTHREAD_COND_INITIALIZER};

static void cancel_request(uint64_t request) {
  pthread_mutex_lock(&desk.lock);
  if (desk.busy && desk.request.header.request == request) kedge_cancel(desk.context);
  pthread_mutex_unlock(&desk.lock);
}

/* Hands a request to the other thread; armed here, so that a cancel right behind it finds something to cancel. What is
 * held belongs to the other thread while it is busy, and to this one otherwise. */
static bool enqueue(const frame *f) {
  pthread_mutex_lock(&desk.lock);
  bool free_desk = !desk.busy;
  if (free_desk) {
    desk.request = *f;
    desk.waiting = desk.busy = true;
    desk.context = context_of(&held, f);
    if (desk.context != NULL) kedge_arm(desk.context);
    pthread_cond_signal(&desk.arrived);
  }
  pthread_mutex_unlock(&desk.lock);
  return free_desk;
}

/* After the request ran, before its reply is written. */
static void leave_desk(void) {
  pthread_mutex_lock(&desk.lock);
  desk.busy = false;
  if (desk.context != NULL) kedge_disarm(desk.context);
  desk.context = NULL;
  pthread_mutex_unlock(&desk.lock);
}

static bool is_request(uint16_t type) {
  return type == MESSAGE_OPEN || type == MESSAGE_CALL || type == MESSAGE_TIME ||
         (type >= MESSAGE_DEVICES && type < MESSAGE_END);
}

static void *read_frames(void *unused) {
  (void)unused;
  for (;;) {
    frame f;
    frame_result result = frame_read(&stream, &f);
    if (result == FRAME_BROKEN) {
      fprintf(stderr, "kedge-runner: what came is not a frame\n");
      _exit(EXIT_BROKEN);
    }
    if (result == FRAME_END || f.header.type == MESSAGE_BYE) _exit(0);
    uint16_t type = f.header.type;
    if (type == MESSAGE_CANCEL) {
      cancel_request(f.header.request);
      frame_free(&f);
    } else if (!is_request(type)) {
      write_error(&stream, f.header.request, KEDGE_E_ARGUMENT, "unknown message");
      frame_free(&f);
    } else if (!enqueue(&f)) {
      write_error(&stream, f.header.request, KEDGE_E_ARGUMENT, "another request runs; one at a time");
      frame_free(&f);
    }
  }
  return NULL;
}

static void start_reader(void) {
  pthread_t thread;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, READER_STACK);
  int problem = pthread_create(&thread, &attributes, read_frames, NULL);
  if (problem != 0) refuse(KEDGE_E_MEMORY, "cannot start a thread", strerror(problem));
}

static _Noreturn void serve(void) {
  for (bool waits = true;; waits = false) {
    pthread_mutex_lock(&desk.lock);
    while (!desk.waiting) pthread_cond_wait(&desk.arrived, &desk.lock);
    desk.waiting = false;
    frame request = desk.request;
    pthread_mutex_unlock(&desk.lock);

    if (waits) prctl(PR_SET_NAME, "kedge-job"); /* ps tells it from one that waits for its first request */
    handle_request(&stream, &held, &request);
    frame_free(&request);
  }
}

int main(int argc, char **argv) {
  if (argc > 2 && strcmp(argv[1], "--build-cage") == 0) {
    return kedge_build_cage(descriptor(argv[1], argv[2]), argc - 3, argv + 3);
  }
  arguments a = parse(argc, argv);
  if (!kedge_enter_group(&a.cage, a.fd)) refuse(KEDGE_E_ARGUMENT, "--group", strerror(errno));
  open_stream(a.fd);
  confine(&a);
  held.done = leave_desk;
  start_reader(); /* a new thread may wait for a core: it does while the CPU is asked what it can do */
  say_hello();
  serve();
}
