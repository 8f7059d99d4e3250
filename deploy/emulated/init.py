"""The supervisor and the first process of an emulated board. A script of its own: nothing but the standard library.

`python -I init.py CONFIG.json` makes a mount, PID, IPC and host-name namespace (inside a user namespace where the
caller is not root), lays a writable file system in memory over the shared user land, and serves SSH: one real
`sshd -i` per connection, as systemd's `ssh.socket` does it. So the listening socket is bound to a free port before
anything else, and there is no moment at which the port is known but refuses connections.

It prints `listening PORT` and then lives until its standard input is closed. Killing the namespace's first process
makes the kernel kill every process of the board and unmount everything; the folder in memory goes with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
PR_SET_PDEATHSIG = 1
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
BOARD_UID = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise `OSError` that names `what` if a C call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def describe(error: OSError) -> str:
    """One line: what failed, on what, and why."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(_libc.mount(*arguments), f"mount {kind or 'bind'} {source} on {target}")


def enter_namespaces(hostname: str) -> bool:
    """Leave the host's mounts, processes and name behind. Returns whether a user namespace was needed for that."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC
    uid, gid = os.getuid(), os.getgid()
    unprivileged = uid != 0
    check(_libc.unshare(flags | (CLONE_NEWUSER if unprivileged else 0)), "unshare")
    if unprivileged:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{BOARD_UID} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{BOARD_UID} {gid} 1")
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    name = hostname.encode()
    check(_libc.sethostname(name, len(name)), "sethostname")
    return unprivileged


def build_root(userland: str, memory: str, size_mb: int, unprivileged: bool) -> str:
    """A writable view of `userland`, its changes kept in a file system in memory of at most `size_mb`."""
    mount("tmpfs", memory, "tmpfs", MS_NOSUID, f"size={size_mb}m,mode=0755")
    upper, work, root = (f"{memory}/{name}" for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        Path(folder).mkdir()
    lower = os.open(userland, os.O_PATH | os.O_DIRECTORY)
    # By descriptor: a path may hold colons and commas, which are separators here.
    layers = f"lowerdir=/proc/self/fd/{lower},upperdir={upper},workdir={work}"
    mount("overlay", root, "overlay", MS_NOSUID, layers + (",userxattr" if unprivileged else ""))
    os.close(lower)
    return root


def mount_devices(root: str, size_mb: int) -> None:
    """/dev with the harmless devices only, pseudo-terminals, and /dev/shm and an empty /tmp of at most `size_mb` each.

    Left to itself, a file system in memory grows to half of the host's.
    """
    mount("tmpfs", f"{root}/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "size=1m,mode=0755")
    for name in DEVICES:
        Path(f"{root}/dev/{name}").touch()
        mount(f"/dev/{name}", f"{root}/dev/{name}", "", MS_BIND)
    for link, target in (
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("ptmx", "pts/ptmx"),
    ):
        Path(f"{root}/dev/{link}").symlink_to(target)
    for name in ("shm", "pts"):
        Path(f"{root}/dev/{name}").mkdir()
    mount("tmpfs", f"{root}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size_mb}m,mode=1777")
    mount("devpts", f"{root}/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size_mb}m,mode=1777")


def mount_proc(root: str, cpuinfo: str | None) -> None:
    """/proc of the board's own processes; the emulator shows the host's processor there, so cover it."""
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if cpuinfo:
        mount(cpuinfo, f"{root}/proc/cpuinfo", "", MS_BIND)


def write_files(root: str, files: dict[str, list[Any]]) -> None:
    """Write `path -> [text, mode, owned by the board's user]` into the board's file system."""
    for name, (text, mode, owned) in files.items():
        path = Path(root + name)
        missing = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        if owned:
            for each in (path, *missing):
                os.chown(each, BOARD_UID, BOARD_UID)


def serve_connection(connection: socket.socket, root: str, config: dict[str, Any], unprivileged: bool) -> NoReturn:
    """Become the SSH server of one connection, as the board's unprivileged user."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target, source in ((0, connection.fileno()), (1, connection.fileno()), (2, log)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.chroot(root)
    os.chdir("/")
    if not unprivileged:
        os.setgroups([])
        os.setgid(BOARD_UID)
        os.setuid(BOARD_UID)
    os.execve(config["server"][0], config["server"], config["environment"])


def reap(_number: int, _frame: object) -> None:
    """Collect every process that ended: the first process inherits all orphans of the board."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def first_process(listener: socket.socket, config: dict[str, Any], unprivileged: bool) -> NoReturn:
    """Process 1 of the board: mounts, then accepts SSH connections for ever."""
    # If the supervisor dies in any way, so does the board.
    check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    # What is mounted from here on lives and dies with this process, and not with the supervisor.
    check(_libc.unshare(CLONE_NEWNS), "unshare")
    root = build_root(config["userland"], config["memory"], config["size_mb"], unprivileged)
    mount_devices(root, config["size_mb"])
    mount_proc(root, config["cpuinfo"])
    write_files(root, config["files"])
    signal.signal(signal.SIGCHLD, reap)
    sys.stdout.write(f"listening {listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        connection, _peer = listener.accept()
        if os.fork() == 0:
            try:
                serve_connection(connection, root, config, unprivileged)
            except OSError as error:
                sys.stderr.write(f"emulated board: {config['server'][0]}: {error}\n")
            os._exit(1)
        connection.close()


def supervise(config: dict[str, Any]) -> int:
    """Start the first process and wait until it ends or standard input is closed; remove what is left."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=32)
    unprivileged = enter_namespaces(config["hostname"])
    board = os.fork()
    if board == 0:
        try:
            first_process(listener, config, unprivileged)
        except OSError as error:
            sys.stderr.write(f"{describe(error)}\n")
            sys.stderr.flush()
        os._exit(1)
    listener.close()
    ended = os.pidfd_open(board)
    select.select([sys.stdin.fileno(), ended], [], [])
    os.kill(board, signal.SIGKILL)
    # Returns only when every process of the namespace is gone.
    os.waitpid(board, 0)
    shutil.rmtree(config["folder"], ignore_errors=True)
    return 0


def probe(memory: str) -> int:
    """Try everything that needs a permission; returns 0 if all of it is allowed here."""
    unprivileged = enter_namespaces("probe")
    child = os.fork()
    if child == 0:
        try:
            root = build_root("/usr", memory, 1, unprivileged)
            mount("proc", f"{root}/bin", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except OSError as error:
            sys.stderr.write(f"{describe(error)}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    """Run a board, or (`--probe FOLDER`) only try whether this user may make one here."""
    try:
        if sys.argv[1] == "--probe":
            return probe(sys.argv[2])
        return supervise(json.loads(Path(sys.argv[1]).read_text()))
    except OSError as error:
        sys.stderr.write(f"{describe(error)}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
