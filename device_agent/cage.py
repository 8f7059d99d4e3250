"""What stands around every runner of an agent: who it runs as, what it may read, its network, its control group.

Made once when the agent starts, from what this system allows; what it does not allow is named in `missing` and told to
the fleet. Each runner then enters it within microseconds. Which attacker each part holds is in docs/security.md.
Standard library only.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import pwd
import shutil
import socket
import stat
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

from kedge.device_agent.cgroups import Group, Groups, GroupsUnavailableError
from kedge.rpc.errors import KedgeError, UsageError
from kedge.rpc.types import Confinement

#: The user that runners of an agent of root's run as, where the system has it...
USER = "kedge-runner"
#: ... and the numbers that stand for it where it has not, one for each agent on the machine: processes are counted, and
#: told apart, by user. Debian and systemd give them to nobody.
SPARE_IDS = range(61167, 61184)
#: Without control groups processes are counted by user, whose others may be too.
SHARED_PROCESSES = 1024
#: The folder with what another user's runner is shown; a session's files do not begin with a dot.
_SHOWN = ".shown"
#: Folders whose content is somebody's or passes: artifacts see nothing of them. (Of /dev they see `_DEVICES`.)
_HIDDEN = (
    "/boot", "/dev", "/home", "/lost+found", "/media", "/mnt", "/root", "/run", "/srv", "/tmp", "/var",
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_BUILD_S = 30.0
_MESSAGE_BYTES = 1024


class CageError(KedgeError):
    """What surrounds runners cannot be made, though it was asked for."""


@dataclass(frozen=True)
class User:
    """Whom runners run as; `groups` are those of the user's own, for devices such as GPUs."""

    name: str
    uid: int
    gid: int
    groups: Tuple[int, ...] = ()


def choose_user(name: Optional[str]) -> Optional[User]:
    """Whom runners run as; None: as the agent itself.

    Args:
        name: a user's name; None takes USER, or a number that nobody has where the system does not know it. "root" says
            that runners of an agent of root's are to stay root.

    Raises:
        UsageError: there is no such user, or this process may not become another.
    """
    if os.geteuid() != 0:
        if name is None or _is_own(name):
            return None
        raise UsageError(
            f"--runner-user {name}: only an agent that root started can run jobs as another user",
            hint="start it as root, or leave the option out",
        )
    if name == "root":
        return None
    try:
        entry = pwd.getpwnam(name or USER)
    except KeyError:
        if name is not None:
            raise UsageError(
                f"--runner-user {name}: there is no such user", hint=f"useradd --system --shell /bin/false {name}"
            ) from None
        spare = _claim_spare()
        return User(str(spare), spare, spare)
    if entry.pw_uid == 0:
        raise UsageError(f"--runner-user {name}: that is root by another name", hint="--runner-user root says so")
    groups = [group for group in os.getgrouplist(entry.pw_name, entry.pw_gid) if group != entry.pw_gid]
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups))


#: The open file that says that a number is this process's while it lives, as a descriptor: it is never closed.
_claims: Dict[int, int] = {}


def _claim_spare(folder: Path = Path("/run")) -> int:
    """A number that no other agent's runners have; raises UsageError where there is none left."""
    numbers: List[int] = [*_claims, *SPARE_IDS]
    for number in numbers:
        if number in _claims:
            return number
        try:
            fd = os.open(folder / f"kedge-runner-{number}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"cannot say in {folder} which number this agent's runners have: {error.strerror}",
                hint="name a user with --runner-user",
            ) from error
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)  # another agent's
        else:
            _claims[number] = fd
            return number
    raise UsageError(
        f"there are {len(SPARE_IDS)} agents of root's on this machine already, as many as there are spare users",
        hint="name a user with --runner-user",
    )


def _is_own(name: str) -> bool:
    try:
        return pwd.getpwnam(name).pw_uid == os.geteuid()
    except KeyError:
        return False


@dataclass(frozen=True)
class Entry:
    """One runner's way into the cage: options of kedge-runner, the descriptors that they name, and its group."""

    arguments: Tuple[str, ...]
    fds: Tuple[int, ...]
    group: Optional[Group]


class Cage:
    """What surrounds the runners of one agent. `missing` says in words what does not, and why."""

    def __init__(
        self,
        fds: Dict[str, int],
        scratch: Path,
        loaded: Path,
        user: Optional[User],
        groups: Optional[Groups],
        missing: Sequence[str],
    ) -> None:
        self._fds = fds
        self._loaded = loaded
        self._scratch = _identity(scratch)
        self.user = user
        self.groups = groups
        self.missing = tuple(missing)

    @classmethod
    def build(
        cls, runner: Path, data_dir: Path, scratch: Path, user: Optional[User], *, root: Path = Path("/")
    ) -> Cage:
        """Make what this system allows.

        Args:
            runner: the kedge-runner, which makes it.
            data_dir: the agent's, of which runners see nothing but `scratch`.
            scratch: the folder of jobs' folders, in which runners may write.
            user: whom runners run as.
            root: where control groups are looked up.

        Raises:
            CageError: the runner cannot be asked, or the data folder not be used.
        """
        loaded = data_dir / "loaded"
        try:
            remove_tree(loaded)
            loaded.mkdir()
        except OSError as error:
            raise CageError(f"cannot empty {loaded}: {error.strerror}", hint="remove it by hand") from error
        fds, missing = _build(runner, data_dir, (scratch, *_DEVICES), (loaded,))
        if user is not None and "u" in fds:
            # Another user has no number inside a user namespace of this one's.
            for letter in ("u", "n"):
                os.close(fds.pop(letter))
            missing.append("network: this agent is root without the right to make one (CAP_SYS_ADMIN)")
        groups = None
        try:
            groups = Groups.claim(data_dir, root=root)
        except GroupsUnavailableError as error:
            missing.append(f"memory by control group: {error.message} ({error.hint})")
        return cls(fds, scratch, loaded, user, groups, missing)

    def __enter__(self) -> Cage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forgo_groups(self, reason: str) -> None:
        """Do without control groups, where the system's turn out not to take runners."""
        self.groups, self.missing = None, (*self.missing, f"memory by control group: {reason}")

    def enter(
        self,
        *,
        sandbox: bool,
        memory_bytes: Optional[int],
        processes: Optional[int],
        cpus: Optional[Sequence[int]],
    ) -> Entry:
        """The way in for one runner, with limits that its control group keeps.

        `sandbox`: it gets the closed view of files too, and no groups of its user's: those are for drivers.

        Raises:
            OSError: the group cannot be made.
        """
        words: List[str] = []
        fds: List[int] = []

        def hand_over(option: str, fd: int) -> None:
            words.extend((option, str(fd)))
            fds.append(fd)

        for option, letter in (("--user-space", "u"), ("--network", "n"), ("--ruleset", "r")):
            if letter in self._fds and (sandbox or letter != "r"):
                hand_over(option, self._fds[letter])
        if self.user is not None:
            numbers = (self.user.uid, self.user.gid, *(() if sandbox else self.user.groups))
            words += ["--user", ":".join(str(number) for number in numbers)]
        group = None
        if self.groups is not None:
            group = self.groups.make(memory_bytes, processes, cpus)
            hand_over("--group", group.fd)
        elif memory_bytes is not None and sandbox:
            words += ["--limit-memory", str(memory_bytes)]
        if self.user is not None and processes is not None and self.groups is None:
            words += ["--limit-processes", str(processes + SHARED_PROCESSES)]
        return Entry(tuple(words), tuple(fds), group)

    def guards_files(self, *, gpus: bool) -> bool:
        """Whether no runner can write to the agent's files; the closed view is not for drivers of `gpus`."""
        return self.user is not None or ("r" in self._fds and not gpus)

    def furnish(self, scratch: Path) -> None:
        """Give a job's folder to the user that runners run as; raises OSError, also where the folder that it lies in is
        not the one that was closed around."""
        if _identity(scratch.parent) != self._scratch:
            raise OSError(errno.ESTALE, "another folder took its place; restart the agent", str(scratch.parent))
        shown = self._shown(scratch)
        shown.mkdir()
        shown.chmod(0o755)
        if self.user is not None:
            os.chown(str(scratch), self.user.uid, self.user.gid)

    def admit(self, path: Path, scratch: Path, name: str) -> Path:
        """Show a file of the agent's to the runner of a job, as `name`; where to find it.

        It is a link, which another user cannot write through. The agent's own user could: its runners find the link in
        a folder that they may only read.

        Raises:
            OSError: there is no room, the disk does not let it, or the runner has meddled with the folder.
        """
        shown = self._shown(scratch)
        with self._opened(shown) as fd:
            if self.user is not None:
                mode = stat.S_IMODE(path.stat().st_mode)
                if not mode & stat.S_IROTH:  # no folder that leads to it is open to others
                    path.chmod(mode | stat.S_IROTH)
            _link(path, name, fd)
        return shown / name

    def withdraw(self, scratch: Path, name: str) -> None:
        """Take back what was admitted as `name`; raises OSError as `admit` does."""
        with self._opened(self._shown(scratch)) as fd:
            os.unlink(name, dir_fd=fd)

    @contextmanager
    def _opened(self, folder: Path) -> Iterator[int]:
        """A folder with what a job's runner is shown."""
        fd = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise OSError(errno.EPERM, "is not the folder that was made for it", str(folder))
            yield fd
        finally:
            os.close(fd)

    def _shown(self, scratch: Path) -> Path:
        return scratch / _SHOWN if self.user is not None else self._loaded / scratch.name

    def clear(self, scratch: Path) -> None:
        """Take back what was admitted for a job, and remove its folder; raises OSError."""
        remove_tree(self._loaded / scratch.name)
        remove_tree(scratch)

    def describe(self, pid: int, measuring_cpus: Sequence[int] = ()) -> Confinement:
        """What holds a runner; `pid` is one that entered with `sandbox`. A runner that cannot enter does not start."""
        status = _status(pid)
        return Confinement(
            memory="cgroup" if self.groups is not None else "address space",
            user="" if self.user is None or status.get("Uid", "").split()[:1] == ["0"] else self.user.name,
            network="n" in self._fds,
            files="r" in self._fds,
            calls=status.get("Seccomp", "").strip() == "2",
            measuring_cpus=tuple(measuring_cpus),
            missing=self.missing,
        )

    def close(self) -> None:
        """Give back what was made; runners that are in it stay in it."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        if self.groups is not None:
            with contextlib.suppress(OSError):  # a runner is still there: the next agent clears it away
                self.groups.close()


def readable(data_dir: Path, root: Path = Path("/")) -> List[str]:
    """What artifacts may read below `root`: all but `_HIDDEN` and the data folder, wherever that lies."""
    hidden = [root / name.lstrip("/") for name in _HIDDEN] + [data_dir.resolve()]
    shown = [str(path) for path in _around(root, hidden)]
    # The owner's own choice of where libraries lie.
    return [*dict.fromkeys(shown)] + [
        path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path.startswith("/")
    ]


def _around(folder: Path, hidden: Sequence[Path]) -> Iterator[Path]:
    """Everything in a folder that neither is hidden nor leads to something hidden, and the same of what leads there."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        path = entry.resolve()
        if any(path == one or one in path.parents for one in hidden):
            continue
        if any(path in one.parents for one in hidden):
            if not entry.is_symlink():
                yield from _around(path, hidden)
            continue
        yield path


def _link(path: Path, name: str, folder: int) -> None:
    """Link a file into an open folder, or copy it where that cannot be; what has the name there goes."""
    try:
        try:
            os.link(str(path), name, dst_dir_fd=folder)
        except FileExistsError:  # seldom: it is tried first
            os.unlink(name, dir_fd=folder)
            os.link(str(path), name, dst_dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):  # another disk, or one without links
            raise
        made = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder)
        with os.fdopen(made, "wb") as copy, path.open("rb") as original:
            shutil.copyfileobj(original, copy)


def _identity(folder: Path) -> Tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there, with all that its owner closed to others and to itself; raises OSError."""
    try:
        shutil.rmtree(str(folder))
    except FileNotFoundError:
        return
    except PermissionError:
        _make_writable(folder)
        shutil.rmtree(str(folder))


def _make_writable(folder: Path) -> None:
    folder.chmod(0o700)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _make_writable(entry)


def _build(
    runner: Path, data_dir: Path, writable: Sequence[Union[str, Path]], shown: Sequence[Path]
) -> Tuple[Dict[str, int], List[str]]:
    """The descriptors by letter, and what there is not; asks the runner, which knows how."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [str(runner), "--build-cage", str(theirs.fileno())]
    for path in (*readable(data_dir), *shown):
        command += ["--readable", str(path)]
    for path in writable:
        command += ["--writable", str(path)]
    with ours:
        with theirs:
            try:
                done = subprocess.run(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    timeout=_BUILD_S,
                    check=False,
                )
            except OSError as error:
                hint = "is it built for this machine?"
                raise CageError(f"cannot start {runner}: {error.strerror}", hint=hint) from error
            except subprocess.TimeoutExpired as error:
                raise CageError(f"{runner} does not say what this system allows: {error}") from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip()
            raise CageError(
                f"{runner} could not say what this system allows: {text or f'exit status {done.returncode}'}",
                hint="is it of this version? 'kedge deploy board' brings the one that fits",
            )
        text, fds = _receive(ours)
    found: Dict[str, int] = {}
    missing = []
    for line in text.splitlines():
        if line.startswith("!"):
            missing.append(line[1:])
        else:
            found[line] = fds.pop(0)
    return found, missing


def _receive(link: socket.socket) -> Tuple[str, List[int]]:
    fds = array.array("i")
    data, ancillary, _, _ = link.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data.decode(errors="replace"), list(fds)


def _status(pid: int) -> Dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
