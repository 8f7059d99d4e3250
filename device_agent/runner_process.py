"""The process of a runner, its socket and its standard error: frames, but not what they mean."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import List, Mapping, Optional, Sequence, Tuple

from kedge.device_agent.cage import Entry
from kedge.device_agent.deadline import Deadline, Expired
from kedge.device_agent.runner_errors import RunnerUnavailable
from kedge.device_agent.runtime import protocol
from kedge.device_agent.runtime.protocol import ProtocolError
from kedge.device_agent.shared_memory import map_shared
from kedge.device_agent.spawner import spawn

log = logging.getLogger("kedge.agent")

#: A frame that claims to be longer is not believed; larger results come in shared memory.
MAX_FRAME_BYTES = 4 << 30
#: How much of the end of the runner's standard error an exception carries.
STDERR_TAIL_BYTES = 4096
#: How often to look whether a silent runner still exists: a process it left behind may hold its socket open.
_ALIVE_CHECK_S = 0.5
#: A frame begins with so many bytes, or with all of it: most replies take one call of the system.
_START_BYTES = 4096
# As plain numbers: with every call, enums would take longer than what they are for.
_NO_SIGNAL, _CLOSE_ON_EXEC, _FILES_CUT = (
    int(flag) for flag in (socket.MSG_NOSIGNAL, socket.MSG_CMSG_CLOEXEC, socket.MSG_CTRUNC)
)
_FILES_ROOM = socket.CMSG_SPACE(8 * 4)
#: Of one message to the runner: the system takes no more.
_MOST_BUFFERS = 1024


class Closed(Exception):
    """The runner closed its end."""


class Cancelled(Exception):
    """`Runner.cancel` was called while a reply was awaited."""


class RunnerProcess:
    """The process, its socket and its standard error; knows frames, but not what they mean.

    It belongs to the process that made it: in the child of a fork it counts as ended, and nothing touches it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        path: Path,
        cwd: Optional[Path],
        entry: Optional[Entry],
        environment: Optional[Mapping[str, str]],
        deadline: Deadline,
    ) -> None:
        self._tail = b""
        #: Whether its control group had no memory left, known once it ended; None where it has no group.
        self.out_of_memory: Optional[bool] = None
        self._group = None if entry is None else entry.group
        self._reap_lock = threading.Lock()
        self._woken = False
        self._returncode: Optional[int] = None
        self._owner = os.getpid()
        with contextlib.ExitStack() as opened:  # closes all of them again where one fails
            opened.callback(self._leave_group)
            try:
                self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                opened.callback(os.close, self._wake_read)
                opened.callback(os.close, self._wake_write)
                self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                opened.callback(self._socket.close)
                with theirs:
                    fds = (theirs.fileno(), *(() if entry is None else entry.fds))
                    command = [*arguments, "--fd", str(theirs.fileno())]
                    self._popen = spawn(command, fds, cwd, environment, deadline)
            except OSError as error:
                built = error.errno in (errno.ENOENT, errno.ENOEXEC, errno.EACCES)
                raise RunnerUnavailable(
                    f"cannot start {path}: {error.strerror}",
                    stage="start",
                    hint="is it built for this machine?" if built else "this device lacks resources",
                ) from error
            opened.pop_all()
        assert self._popen.stderr is not None
        self._stderr = self._popen.stderr
        self._socket.setblocking(False)
        self._socket_fd, self._stderr_fd = self._socket.fileno(), self._stderr.fileno()
        os.set_blocking(self._stderr_fd, False)
        self.pid = self._popen.pid

    @property
    def ended(self) -> bool:
        """Whether it was seen to end; then everything it held is released."""
        return self._returncode is not None or os.getpid() != self._owner

    def send(self, buffers: Sequence[protocol.Buffer], fd: Optional[int], deadline: Deadline) -> None:
        """Write all buffers, the descriptor with the first byte. Cancels wait until the frame is whole."""
        ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        views = [memoryview(buffer) for buffer in buffers]
        while views:
            try:
                sent = self._socket.sendmsg(views[:_MOST_BUFFERS], ancillary, _NO_SIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, cancellable=False)
                continue
            ancillary = []
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]

    def receive(self, deadline: Deadline) -> Tuple[protocol.Header, memoryview, Optional[memoryview]]:
        """The next frame: header, payload, and the file that came with it as memory.

        Raises:
            Cancelled: before the frame began.
        """
        start = memoryview(bytearray(_START_BYTES))
        fds: List[int] = []
        try:
            got = self._fill(start, 0, protocol.HEADER.size, deadline, fds, first=True) - protocol.HEADER.size
            header = protocol.Header.unpack(start[: protocol.HEADER.size])
            if header.length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {header.length} bytes is too long")
            if got > header.length:
                raise ProtocolError(f"{got - header.length} bytes came behind a frame")
            payload = start[protocol.HEADER.size :][: header.length]
            if got < header.length:
                payload = memoryview(bytearray(header.length))
                payload[:got] = start[protocol.HEADER.size :][:got]
                self._fill(payload, got, header.length, deadline, fds, first=False)
            if len(fds) != bool(header.flags & protocol.FLAG_SHARED):
                raise ProtocolError(f"{len(fds)} files came with a frame whose flags are {header.flags}")
            return header, payload, map_shared(fds[0]) if fds else None
        finally:
            for fd in fds:
                os.close(fd)

    def _fill(self, view: memoryview, filled: int, wanted: int, deadline: Deadline, fds: List[int], first: bool) -> int:
        """Read on until at least so many bytes are filled, and say how many are; files that come are added to `fds`."""
        waits = first  # the rest of a frame is there, as a rule, with its beginning
        while filled < wanted:
            if waits:
                self._wait(select.POLLIN, deadline, cancellable=first and filled == 0)
            waits = True
            try:
                size, ancillary, flags, _ = self._socket.recvmsg_into([view[filled:]], _FILES_ROOM, _CLOSE_ON_EXEC)
            except BlockingIOError:
                continue
            if ancillary:
                fds += _received_fds(ancillary)
            if flags & _FILES_CUT:
                raise ProtocolError("a frame brings too many files")
            if size == 0:
                raise Closed
            filled += size
        return filled

    def _wait(self, event: int, deadline: Deadline, cancellable: bool) -> None:
        """Wait until the socket is ready; drain standard error meanwhile, or the runner would block on it."""
        poller = select.poll()
        poller.register(self._socket_fd, event)
        if not self._stderr.closed:
            poller.register(self._stderr_fd, select.POLLIN)
        if cancellable and not deadline.cancelled:
            poller.register(self._wake_read, select.POLLIN)
        while True:
            left_s = deadline.left_s()
            ready = [fd for fd, _ in poller.poll(min(left_s, _ALIVE_CHECK_S) * 1000)]
            if self._stderr_fd in ready and not self._drain_stderr():
                poller.unregister(self._stderr_fd)
            if self._socket_fd in ready:
                return
            if self._wake_read in ready:
                self.clear_wake()
                raise Cancelled
            if not ready and self.has_exited():
                raise Closed
            if not ready and left_s <= 0:
                raise Expired

    def has_exited(self) -> bool:
        """Whether it has ended, not yet reaped."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:  # the program that this is part of reaps all children, or ignores SIGCHLD
            return True

    def wake(self) -> None:
        """Make a waiting `receive` raise Cancelled; from any thread, and nothing once the process was reaped."""
        with self._reap_lock:  # the descriptor's number may belong to somebody else after that
            if self._returncode is None and not self._woken:
                self._woken = True
                os.write(self._wake_write, b"c")

    def clear_wake(self) -> None:
        """Forget a wake that nobody waited for."""
        if self._woken:
            with self._reap_lock:
                self._woken = False
                if self._returncode is None:
                    os.read(self._wake_read, 1)

    def _drain_stderr(self) -> bool:
        """Keep the end of what was written; False at its end."""
        try:
            data = os.read(self._stderr.fileno(), 65536)
        except BlockingIOError:
            return True
        self._tail = (self._tail + data)[-STDERR_TAIL_BYTES:]
        if not data:
            self._stderr.close()
        return bool(data)

    def stderr_tail(self) -> str:
        """The last lines of its standard error so far."""
        with self._reap_lock:
            self._drain_pending()
        return self._tail.decode("utf-8", "replace")

    def signal_group(self) -> None:
        """SIGKILL to the process and all it started; safe at any time, since it is not reaped before."""
        with self._reap_lock:
            if not self.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)

    def end(self, grace_s: float) -> int:
        """Wait until it has exited, kill what is left after `grace_s`, reap; the exit status, or minus the signal."""
        moment, pause = time.monotonic() + grace_s, 0.0002
        while self._returncode is None and time.monotonic() < moment:
            if self.has_exited():
                break
            time.sleep(pause)
            pause = min(pause * 2, 0.01)
        return self.kill()

    def kill(self) -> int:
        """Kill the process group, reap, release; the exit status, or minus the signal. Again: the same answer."""
        if os.getpid() != self._owner:
            return 0
        self.signal_group()
        with self._reap_lock:
            if self._returncode is None:
                returncode = self._popen.wait()
                self._drain_pending()
                self._stderr.close()
                self._socket.close()
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._leave_group()
                self._returncode = returncode
            return self._returncode

    def _leave_group(self) -> None:
        """See whether memory ran out in the control group, end what is left in it, and remove it."""
        if self._group is None:
            return
        group, self._group = self._group, None
        try:
            self.out_of_memory = group.out_of_memory()
            group.remove()
        except OSError as error:
            log.warning("%s cannot be cleared away before the next start: %s", group.path, error)

    def _drain_pending(self) -> None:
        # Not until its end: a process that escaped the group could hold it open for ever.
        poller = select.poll()
        if not self._stderr.closed:
            poller.register(self._stderr, select.POLLIN)
        while not self._stderr.closed and poller.poll(0):
            self._drain_stderr()


def _received_fds(ancillary: Sequence[Tuple[int, int, bytes]]) -> List[int]:
    fds: List[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
    return fds
