/* cage.c: what is put around a runner before it loads anything: a control group, a network and a view of the files.
 *
 * What all runners of an agent share is made once (`--build-cage`) and handed to the agent as descriptors: an empty
 * network namespace, where needed in a user namespace, and a Landlock ruleset. Each runner enters them, which costs
 * microseconds; making them anew would cost more than the runner's own start. What holds against whom is in
 * docs/decisions/0015-confinement.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "internal.h"
#include "runner.h"

/* Calls that did not exist when the headers were written have their numbers here; they are the same everywhere. */
enum { NR_CLONE3 = 435, NR_LANDLOCK_CREATE = 444, NR_LANDLOCK_ADD = 445, NR_LANDLOCK_RESTRICT = 446 };
enum { GET_TID_ADDRESS = 40 };
#define INTO_CGROUP 0x200000000ULL

/* ---- The control group ---------------------------------------------------------------------------------------- */

typedef struct {
  uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
} clone_arguments;

/* A fork whose child is born in the group: moving a process that lives makes the kernel wait, for milliseconds. */
static pid_t fork_into(int group) {
  clone_arguments a = {.flags = INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)group};
  int *tid = NULL; /* where the C library keeps this thread's id, as its own fork would renew it */
  if (prctl(GET_TID_ADDRESS, &tid, 0, 0, 0) == 0 && tid != NULL) {
    a.flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
    a.child_tid = (uint64_t)(uintptr_t)tid;
  }
  return (pid_t)syscall(NR_CLONE3, &a, sizeof a);
}

/* Ends as the child ends, so that whoever started this learns it. */
static _Noreturn void follow(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) _exit(1);
  }
  if (!WIFSIGNALED(status)) _exit(WEXITSTATUS(status));
  struct rlimit none = {0, 0};
  setrlimit(RLIMIT_CORE, &none);
  signal(WTERMSIG(status), SIG_DFL);
  kill(getpid(), WTERMSIG(status));
  _exit(128 + WTERMSIG(status));
}

bool kedge_enter_group(const cage *c, int fd) {
  if (c->group < 0) return true;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  signal(SIGINT, SIG_IGN); /* Ctrl-C is for whoever started this */
  pid_t parent = getpid(), child = fork_into(c->group);
  if (child < 0) return false;
  if (child > 0) {
    if (fd >= 0) close(fd); /* its end is seen when the child's is closed */
    follow(child);
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  close(c->group);
  return true;
}

/* ---- Entering what is there ------------------------------------------------------------------------------------- */

const char *kedge_enter_namespaces(const cage *c) {
  if (c->user_space >= 0 && (setns(c->user_space, CLONE_NEWUSER) != 0 || close(c->user_space) != 0)) return "--user-space";
  if (c->network >= 0 && (setns(c->network, CLONE_NEWNET) != 0 || close(c->network) != 0)) return "--network";
  return NULL;
}

/* Numbers with colons between: user, group, then further groups. */
static bool change_user(const char *text) {
  enum { MOST_GROUPS = 64 };
  gid_t groups[MOST_GROUPS];
  unsigned long found[2] = {0, 0};
  size_t count = 0, n_groups = 0;
  for (const char *at = text; *at != '\0'; count++) {
    char *end;
    errno = 0;
    unsigned long value = strtoul(at, &end, 10);
    if (end == at || errno != 0 || value > UINT32_MAX - 1 || (*end != ':' && *end != '\0') || n_groups == MOST_GROUPS) {
      errno = EINVAL;
      return false;
    }
    if (count < 2) found[count] = value;
    else groups[n_groups++] = (gid_t)value;
    at = end + (*end == ':');
  }
  if (count < 2 || found[0] == 0) {
    errno = EINVAL;
    return false;
  }
  uid_t user = (uid_t)found[0];
  gid_t group = (gid_t)found[1];
  return setgroups(n_groups, groups) == 0 && setresgid(group, group, group) == 0 && setresuid(user, user, user) == 0;
}

/* Inside a user namespace a process begins with all capabilities over it. */
static bool drop_capabilities(void) {
  struct {
    uint32_t version;
    int pid;
  } head = {0x20080522, 0};
  uint32_t none[6] = {0};
  return syscall(SYS_capset, &head, none) == 0;
}

const char *kedge_become_nobody(const cage *c) {
  if (c->user != NULL && !change_user(c->user)) return "--user";
  if ((c->user != NULL || c->user_space >= 0) && !drop_capabilities()) return "capabilities";
  return NULL;
}

const char *kedge_confine_files(const cage *c) {
  if (c->ruleset < 0) return NULL;
  if (syscall(NR_LANDLOCK_RESTRICT, c->ruleset, 0) != 0 || close(c->ruleset) != 0) return "--ruleset";
  return NULL;
}

/* ---- Making it -------------------------------------------------------------------------------------------------- */

enum { /* Landlock's rights, by bit */
  WRITE_FILE = 1, READ_FILE = 2, READ_FOLDER = 3, REMOVE_FOLDER = 4, REMOVE_FILE = 5, MAKE_FOLDER = 7, MAKE_FILE = 8,
  MAKE_PIPE = 10, MAKE_LINK = 12, REFER = 13, TRUNCATE = 14
};
#define RIGHT(bit) ((uint64_t)1 << (bit))
#define READ (RIGHT(READ_FILE) | RIGHT(READ_FOLDER))
#define WRITE (RIGHT(WRITE_FILE) | RIGHT(REMOVE_FOLDER) | RIGHT(REMOVE_FILE) | RIGHT(MAKE_FOLDER) | RIGHT(MAKE_FILE) | \
               RIGHT(MAKE_PIPE) | RIGHT(MAKE_LINK) | RIGHT(REFER) | RIGHT(TRUNCATE))
#define OF_A_FILE (RIGHT(WRITE_FILE) | RIGHT(READ_FILE) | RIGHT(TRUNCATE))

typedef struct {
  uint64_t files, network, scoped;
} ruleset_rights;

typedef struct __attribute__((packed)) {
  uint64_t allowed;
  int32_t parent;
} path_rule;

/* What each version of Landlock can refuse: all of it is. */
static ruleset_rights rights_of(long version) {
  ruleset_rights r = {RIGHT(13) - 1, 0, 0};
  if (version >= 2) r.files |= RIGHT(REFER);
  if (version >= 3) r.files |= RIGHT(TRUNCATE);
  if (version >= 4) r.network = 3; /* TCP: bind, connect */
  if (version >= 6) r.scoped = 3;  /* abstract sockets of others, signals to others */
  return r;
}

/* What cannot be opened is left out: it is refused then. */
static bool allow(int ruleset, const char *path, uint64_t rights) {
  int fd = open(path, O_PATH | O_CLOEXEC);
  if (fd < 0) return true;
  struct stat info;
  bool done = fstat(fd, &info) == 0;
  if (done) {
    path_rule rule = {S_ISDIR(info.st_mode) ? rights : rights & OF_A_FILE, fd};
    done = syscall(NR_LANDLOCK_ADD, ruleset, 1, &rule, 0) == 0;
  }
  close(fd);
  return done;
}

static int build_ruleset(int argc, char **argv) {
  long version = syscall(NR_LANDLOCK_CREATE, NULL, 0, 1);
  if (version < 1) return -1;
  ruleset_rights rights = rights_of(version);
  size_t size = version >= 6 ? 24 : version >= 4 ? 16 : 8;
  int ruleset = (int)syscall(NR_LANDLOCK_CREATE, &rights, size, 0);
  for (int i = 0; ruleset >= 0 && i + 1 < argc; i++) {
    uint64_t wanted = strcmp(argv[i], "--readable") == 0 ? READ : strcmp(argv[i], "--writable") == 0 ? READ | WRITE : 0;
    if (wanted == 0 || allow(ruleset, argv[i + 1], wanted & rights.files)) continue;
    int problem = errno;
    close(ruleset);
    errno = problem;
    return -1;
  }
  return ruleset;
}

typedef struct {
  int fds[3];
  size_t count;
  char text[512];
} offer;

static void put(offer *o, char letter, int fd, const char *what) {
  size_t used = strlen(o->text);
  if (fd >= 0) {
    o->fds[o->count++] = fd;
    snprintf(o->text + used, sizeof o->text - used, "%c\n", letter);
  } else {
    snprintf(o->text + used, sizeof o->text - used, "!%s: %s\n", what, strerror(errno));
  }
}

static void put_network(offer *o) {
  if (unshare(CLONE_NEWNET) != 0) {
    if (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0) {
      put(o, 'n', -1, "network");
      return;
    }
    int user_space = open("/proc/self/ns/user", O_RDONLY | O_CLOEXEC);
    put(o, 'u', user_space, "network");
    if (user_space < 0) return;
  }
  put(o, 'n', open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), "network");
}

static bool send_offer(int to, const offer *o) {
  union {
    struct cmsghdr head;
    char room[CMSG_SPACE(sizeof o->fds)];
  } control = {0};
  struct iovec body = {(void *)(uintptr_t)o->text, strlen(o->text)};
  struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1};
  if (o->count > 0) {
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE(o->count * sizeof(int));
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(o->count * sizeof(int));
    memcpy(CMSG_DATA(rights), o->fds, o->count * sizeof(int));
  }
  return sendmsg(to, &message, MSG_NOSIGNAL) >= 0;
}

int kedge_build_cage(int to, int argc, char **argv) {
  offer o = {.count = 0};
  put(&o, 'r', build_ruleset(argc, argv), "files");
  put_network(&o);
  return send_offer(to, &o) ? 0 : 1;
}
