/* sandbox.c: what the code of an artifact may not ask of the kernel: new processes, sockets, other processes.
 *
 * A seccomp filter (seccomp(2), Linux 3.5), without privileges, inherited by all threads and never taken off. It is a
 * list of what is refused, not of what is allowed: libraries and kernels differ in what they call, and refusing too much
 * would break artifacts on some boards only. What it is for is in docs/decisions/0009-the-fleet.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"
#include "runner.h"

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#elif defined(__arm__)
#define ARCH AUDIT_ARCH_ARM
#elif defined(__riscv) && __riscv_xlen == 64
#define ARCH AUDIT_ARCH_RISCV64
#endif

#ifdef ARCH

/* Calls that did not exist when the headers were written have their numbers here; they are the same everywhere. */
enum { NR_IO_URING_SETUP = 425, NR_PIDFD_OPEN = 434, NR_CLONE3 = 435 };

/* Refused whatever their arguments are. */
static const uint32_t refused[] = {
    __NR_execve,      __NR_execveat,    __NR_socket,        __NR_ptrace,          __NR_process_vm_readv,
    __NR_process_vm_writev, __NR_kill,  __NR_tkill,         __NR_rt_sigqueueinfo, __NR_rt_tgsigqueueinfo,
    __NR_unshare,     __NR_setns,       __NR_mount,         __NR_umount2,         __NR_pivot_root,
    __NR_chroot,      __NR_bpf,         __NR_perf_event_open, __NR_userfaultfd,   __NR_keyctl,
    __NR_add_key,     __NR_request_key, __NR_init_module,   __NR_finit_module,    __NR_delete_module,
    __NR_reboot,      __NR_swapon,      __NR_swapoff,       __NR_kexec_load,      __NR_personality,
    __NR_prlimit64,   NR_PIDFD_OPEN,    __NR_shmget,        __NR_semget,          __NR_msgget,
    __NR_mq_open, /* these four outlive their process */
#ifdef __NR_setrlimit
    __NR_setrlimit,
#endif
#ifdef __NR_fork
    __NR_fork,
#endif
#ifdef __NR_vfork
    __NR_vfork,
#endif
};

enum { REFUSED = sizeof refused / sizeof refused[0], LONGEST = 2 * REFUSED + 32 };

typedef struct {
  struct sock_filter code[LONGEST];
  unsigned short used;
} program;

static void add(program *p, uint16_t code, uint8_t yes, uint8_t no, uint32_t value) {
  p->code[p->used++] = (struct sock_filter){code, yes, no, value};
}

static void load(program *p, size_t offset) { add(p, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset); }
static void give(program *p, uint32_t action) { add(p, BPF_RET | BPF_K, 0, 0, action); }
static void refuse_with(program *p, int error) { give(p, SECCOMP_RET_ERRNO | ((uint32_t)error & SECCOMP_RET_DATA)); }

/* The low half of an argument, on little-endian machines: all that kedge runs on are. */
static size_t argument(int i) { return offsetof(struct seccomp_data, args) + 8 * (size_t)i; }

bool kedge_confine_calls(void) {
  program p = {.used = 0};
  load(&p, offsetof(struct seccomp_data, arch)); /* another architecture's calls have other numbers */
  add(&p, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, ARCH);
  refuse_with(&p, EPERM);
  load(&p, offsetof(struct seccomp_data, nr));
#if defined(__x86_64__)
  add(&p, BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x40000000); /* x32 */
  refuse_with(&p, EPERM);
#endif
  for (size_t i = 0; i < REFUSED; i++) {
    add(&p, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, refused[i]);
    refuse_with(&p, EPERM);
  }
  /* C libraries ask whether there is clone3 and fall back to clone, whose flags a filter can see. */
  const uint32_t absent[] = {NR_CLONE3, NR_IO_URING_SETUP};
  for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++) {
    add(&p, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, absent[i]);
    refuse_with(&p, ENOSYS);
  }
  add(&p, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, __NR_clone); /* threads, and nothing else */
  load(&p, argument(0));
  add(&p, BPF_JMP | BPF_JSET | BPF_K, 1, 0, CLONE_THREAD);
  refuse_with(&p, EPERM);
  give(&p, SECCOMP_RET_ALLOW);
  add(&p, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, __NR_tgkill); /* abort() signals a thread of this process */
  load(&p, argument(0));
  add(&p, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, (uint32_t)getpid());
  refuse_with(&p, EPERM);
  give(&p, SECCOMP_RET_ALLOW);
  give(&p, SECCOMP_RET_ALLOW);
  struct sock_fprog filter = {p.used, p.code};
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}

#else

bool kedge_confine_calls(void) {
  errno = ENOSYS;
  return false;
}

#endif
