"""Control groups (version 2) for runners: one each, with its own limits, killed and removed as a whole.

    parent/                 this agent's own group, or the root of the hierarchy where the agent is root
      kedge-KEY/            KEY is of the data folder, so that a killed agent's groups are found again
        job-1/              memory.max, memory.swap.max, memory.oom.group, pids.max, cpuset.cpus

A group that is not the root cannot both hold processes and hand controllers down: an agent that is alone in its group
(a service unit with Delegate=yes, a container) moves into a child of it. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from kedge.rpc.errors import KedgeError

#: What must be there; the second list is used where it is.
NEEDED = ("memory", "pids")
WELCOME = ("cpuset",)
#: How long killed processes may take to be gone.
_GONE_S = 5.0


class GroupsUnavailableError(KedgeError):
    """This process cannot make control groups with limits here."""


class Group:
    """A control group for one runner, held open: `fd` is its folder's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(str(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def out_of_memory(self) -> bool:
        """Whether the kernel ended a process of the group for want of memory under the group's limit."""
        events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        return int(events.get("oom_kill", "0")) > 0

    def remove(self) -> None:
        """Kill what is in it, wait until all of it is gone, and remove it.

        Raises:
            OSError: something in it does not end, or it cannot be removed.
        """
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        _remove(self.path)


class Groups:
    """The groups of one agent, below `base`; `cpuset` says whether cores can be enforced."""

    def __init__(self, base: Path, cpuset: bool) -> None:
        self.base = base
        self.cpuset = cpuset
        self._lock = threading.Lock()
        self._count = 0

    @classmethod
    def claim(cls, data_dir: Path, *, root: Path = Path("/")) -> Groups:
        """Find where this process may make groups, clear away what an earlier agent with the same data folder left.

        Args:
            data_dir: the agent's; nobody else may use it meanwhile.
            root: where /proc and the hierarchy are looked up.

        Raises:
            GroupsUnavailableError: with the reason, and what would help.
        """
        mount, own = _find(root)
        parent = _parent(mount, own)
        offered = _words(parent / "cgroup.controllers")
        lacking = [name for name in NEEDED if name not in offered]
        if lacking:
            raise GroupsUnavailableError(
                f"{parent} has no controller for {' and '.join(lacking)}",
                hint="boot with control groups of version 2 (on a Raspberry Pi: cgroup_enable=memory)",
            )
        key = hashlib.sha256(os.fsencode(str(data_dir.resolve()))).hexdigest()[:12]
        base = parent / f"kedge-{key}"
        cpuset = "cpuset" in offered
        wanted = [*NEEDED, *(name for name in WELCOME if name in offered)]
        try:
            if base.exists():
                for group in [*base.iterdir()]:
                    if group.is_dir():
                        _remove(group)
                base.rmdir()
            if any(name not in _words(parent / "cgroup.subtree_control") for name in wanted):
                _step_aside(parent)
                _enable(parent, wanted)
            base.mkdir()
            _enable(base, wanted)
        except OSError as error:
            raise GroupsUnavailableError(
                f"{error.filename or parent}: {error.strerror}",
                hint="start the agent as root, or as a systemd unit with Delegate=yes",
            ) from error
        return cls(base, cpuset)

    def make(
        self, memory_bytes: Optional[int], processes: Optional[int], cpus: Optional[Sequence[int]] = None
    ) -> Group:
        """A new group with these limits, None meaning none; raises OSError."""
        with self._lock:
            self._count += 1
            path = self.base / f"job-{self._count}"
        path.mkdir()
        try:
            if memory_bytes is not None:
                _write(path / "memory.max", str(memory_bytes))
                with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                    _write(path / "memory.swap.max", "0")
            _write(path / "memory.oom.group", "1")
            if processes is not None:
                _write(path / "pids.max", str(processes))
            if cpus is not None and self.cpuset:
                _write(path / "cpuset.cpus", ",".join(str(cpu) for cpu in cpus))
            return Group(path)
        except BaseException:
            path.rmdir()
            raise

    def close(self) -> None:
        """Remove the agent's own folder of groups; raises OSError where one is still in use."""
        self.base.rmdir()


def _find(root: Path) -> Tuple[Path, Path]:
    """The mounted hierarchy, and this process's group in it."""
    mounts = [line.split() for line in _read(root / "proc/self/mountinfo").splitlines()]
    found = [fields for fields in mounts if "-" in fields and fields[fields.index("-") + 1] == "cgroup2"]
    if not found:
        raise GroupsUnavailableError(
            "no control groups of version 2 are mounted", hint="mount -t cgroup2 none /sys/fs/cgroup, or a newer system"
        )
    top, mount = found[0][3], root / found[0][4].lstrip("/")
    lines = _read(root / "proc/self/cgroup").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    if top != "/" and path.startswith(top):
        path = path[len(top) :]
    own = mount / path.lstrip("/")
    return mount, own if own.is_dir() else mount


def _parent(mount: Path, own: Path) -> Path:
    """Below which group this process may make its own: where it is alone, or the root of the hierarchy."""
    if not (own / "cgroup.type").exists():  # only the root has none
        return own
    if {*_words(own / "cgroup.procs")} <= {str(os.getpid())}:
        return own
    if os.geteuid() == 0 and not (mount / "cgroup.type").exists():
        return mount
    raise GroupsUnavailableError(
        f"other processes are in this agent's control group {own}",
        hint="start it as root, or as a systemd unit with Delegate=yes",
    )


def _step_aside(parent: Path) -> None:
    """Move this process into a child of its group, which then holds no process itself."""
    if str(os.getpid()) not in _words(parent / "cgroup.procs") or not (parent / "cgroup.type").exists():
        return
    aside = parent / "kedge-agent"
    aside.mkdir(exist_ok=True)
    _write(aside / "cgroup.procs", str(os.getpid()))


def _enable(group: Path, controllers: Sequence[str]) -> None:
    _write(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))


def _remove(path: Path) -> None:
    """Kill what is in a group and remove it."""
    try:
        _write(path / "cgroup.kill", "1")
    except FileNotFoundError:  # before Linux 5.14
        _write(path / "pids.max", "0")  # or what is forked after the look would go on
        for word in _words(path / "cgroup.procs"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)
    _await_empty(path)
    path.rmdir()


def _await_empty(path: Path) -> None:
    """Return once no process is in the group; the kernel says when that changes."""
    ends = time.monotonic() + _GONE_S
    with (path / "cgroup.events").open() as events:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            left = ends - time.monotonic()
            if left <= 0:
                raise OSError(errno.EBUSY, "processes in it do not end", str(path))
            poller.poll(left * 1000)
            events.seek(0)


def _write(path: Path, text: str) -> None:
    fd = os.open(str(path), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def _words(path: Path) -> List[str]:
    return _read(path).split()


def _read(path: Path) -> str:
    """The text of a kernel file, "" where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
