"""`Runner`: one `kedge-runner` process, the modules and tensors in it, behind calls that always come back.

Native code from an artifact runs in that process and nowhere else. Every call has a deadline; a runner that misses
it is asked to cancel, given a moment, then killed with everything it started, and always reaped. What can go wrong
is one small tree of exceptions under `RunnerError`. The protocol is in docs/decisions/0002-runner-protocol.md.

Standard library only, Python 3.9, Linux.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import queue
import select
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union

from kedge.device_agent.cage import Cage, Entry
from kedge.device_agent.runtime import protocol
from kedge.device_agent.runtime.protocol import (
    FunctionInfo,
    Given,
    Hello,
    Kept,
    ModuleInfo,
    PortInfo,
    ProtocolError,
    Tensor,
    TimeResult,
    bytes_of,
)
from kedge.rpc import abi
from kedge.rpc.artifact.place import DEVICE_TYPES, Found
from kedge.rpc.errors import KedgeError
from kedge.rpc.types import TimeOptions

__all__ = [
    "FunctionInfo",
    "Given",
    "Hello",
    "Kept",
    "Limits",
    "ModuleInfo",
    "PortInfo",
    "Runner",
    "RunnerCancelled",
    "RunnerCrashed",
    "RunnerError",
    "RunnerOutOfMemory",
    "RunnerRefused",
    "RunnerTimeout",
    "RunnerUnavailable",
    "Tensor",
    "TimeOptions",
    "TimeResult",
    "bytes_of",
]

log = logging.getLogger("kedge.agent")

#: Tensors that add up to more than this travel in shared memory where the runner can map it.
SHARED_MEMORY_BYTES = 256 << 10
#: Tensors that stay are copied into the runner, and out of it, in pieces of so many bytes.
PIECE_BYTES = 1 << 20
#: A frame that claims to be longer is not believed; larger results come in shared memory.
MAX_FRAME_BYTES = 4 << 30
#: How much of the end of the runner's standard error an exception carries.
STDERR_TAIL_BYTES = 4096
_T = TypeVar("_T")
_DEFAULT_TIMING = TimeOptions()
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
#: How long the rest of a reply may take to be read that was there when its deadline had passed.
_LAST_CALL_S = 0.5
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # fcntl names them only where the C library did when Python was built
_SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 2, 4, 8
_SEALED = _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE


class RunnerError(KedgeError):
    """Base of what can go wrong with a runner; `stage` is "start", "load" or "run"."""

    def __init__(self, message: str, *, stage: str, hint: Optional[str] = None) -> None:
        super().__init__(message, hint=hint)
        self.stage = stage


class RunnerUnavailable(RunnerError):
    """There is no runner at that path that starts and speaks this protocol: the device's fault, not the artifact's."""


class RunnerCrashed(RunnerError):
    """The process ended on its own, or broke the protocol and was killed.

    `signal` is the number of the signal that ended it, or 0; `exit_status` its status, or 0; `stderr` the end of
    what it wrote there.
    """

    def __init__(self, message: str, *, stage: str, signal_number: int, exit_status: int, stderr: str) -> None:
        super().__init__(message, stage=stage)
        self.signal = signal_number
        self.exit_status = exit_status
        self.stderr = stderr


class RunnerTimeout(RunnerError):
    """A call missed its deadline, or used up its CPU seconds. `alive` says whether the runner can be used again."""

    def __init__(self, message: str, *, stage: str, alive: bool) -> None:
        super().__init__(message, stage=stage)
        self.alive = alive


class RunnerOutOfMemory(RunnerError):
    """An allocation failed under the memory limit, or the kernel's out-of-memory killer ended the process."""


class RunnerRefused(RunnerError):
    """The runtime refused; `status` is its kedge_status. The runner can be used again."""

    def __init__(self, message: str, *, stage: str, status: int) -> None:
        super().__init__(message, stage=stage)
        self.status = status


class RunnerCancelled(RunnerRefused):
    """`cancel` was called. The runner can be used again unless `alive` says that it had to be killed."""

    def __init__(self, message: str, *, stage: str, alive: bool) -> None:
        super().__init__(message, stage=stage, status=abi.E_CANCELLED)
        self.alive = alive


@dataclass(frozen=True)
class Limits:
    """What the process may use; None means no limit of its own.

    `memory_bytes` bounds what a cage's control group holds in memory; where there is none, the whole address space:
    code, mapped weights, thread stacks and arena, which emulators (qemu-user) do not enforce. `processes` counts
    threads too, and needs a control group or a user of its own. `sandbox` refuses new processes, sockets, and whatever
    reaches other processes, where the kernel has seccomp filters (emulators do not).
    """

    memory_bytes: Optional[int] = None
    cpu_s: Optional[int] = None
    open_files: Optional[int] = None
    file_size_bytes: Optional[int] = None
    processes: Optional[int] = None
    sandbox: bool = False

    def arguments(self) -> List[str]:
        """The command-line options of kedge-runner."""
        named = (
            ("--limit-memory", self.memory_bytes),
            ("--limit-cpu-s", self.cpu_s),
            ("--limit-files", self.open_files),
            ("--limit-file-size", self.file_size_bytes),
        )
        words = [word for name, value in named if value is not None for word in (name, str(value))]
        return [*words, "--sandbox"] if self.sandbox else words


class _Expired(Exception):
    """The moment in `_Limit` has passed."""


class _Closed(Exception):
    """The runner closed its end."""


@dataclass
class _Limit:
    """Until when a request may take; a cancel moves the moment and says so."""

    moment: float
    cancelled: bool = False
    #: Once the moment has passed: until when may be taken what has come already.
    last_call: Optional[float] = None

    def left_s(self) -> float:
        """How long may be waited, in seconds: 0 for a look at what is there; raises _Expired after that."""
        now = time.monotonic()
        if now < self.moment:
            return self.moment - now
        # This process may have been the one that slept: a reply in time is not late because it was read late.
        self.last_call = now + _LAST_CALL_S if self.last_call is None else self.last_call
        if now > self.last_call:
            raise _Expired
        return 0.0


class Runner:
    """A running `kedge-runner`.

    Calls block, one at a time; `cancel` and `close` may come from any thread. After RunnerCrashed, or where an
    exception's `alive` is False, the process is gone and reaped, and every further call raises RunnerUnavailable.

    Args:
        path: the kedge-runner executable for this machine.
        threads: of the kernels; 0 means as many as the process may use.
        limits: what the process may use, set before it loads anything.
        cpus: the CPUs it may run on; None means those of this process.
        cwd: its working directory.
        cage: what surrounds it; None: nothing but its limits.
        started: is told of it once its process is there, which has said nothing yet; from then on `kill` ends it.
        start_deadline_s: seconds until it must have said hello.
        grace_s: seconds between a cancel (or an end of file) and SIGKILL.

    Raises:
        RunnerUnavailable: it does not start, or speaks another protocol or ABI.
    """

    def __init__(
        self,
        path: Union[str, Path],
        threads: int = 0,
        limits: Limits = Limits(),
        cpus: Optional[Sequence[int]] = None,
        cwd: Optional[Union[str, Path]] = None,
        start_deadline_s: float = 30.0,
        grace_s: float = 0.5,
        cage: Optional[Cage] = None,
        started: Callable[[Runner], None] = lambda _: None,
    ) -> None:
        limit = _Limit(time.monotonic() + start_deadline_s)
        self.path = Path(path)
        self.threads = threads
        self.limits = limits
        #: Nanoseconds that the last `call` spent in native code.
        self.last_call_ns = 0
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._flight_lock = threading.Lock()
        self._in_flight = False
        self._request_id = 0
        self._oom_kills = _oom_kills()
        self._cwd = None if cwd is None else Path(cwd).absolute()
        entry = None if cage is None else self._enter(cage, cpus)
        own = limits if entry is None else replace(limits, memory_bytes=None)
        arguments = [str(self.path), *own.arguments(), *(() if entry is None else entry.arguments)]
        if cpus is not None:
            arguments += ["--cpus", ",".join(str(cpu) for cpu in cpus)]
        environment = _environment(cage, self._cwd)
        try:
            self._process = _Process(arguments, self.path, self._cwd, entry, environment, limit)
        except _Expired:
            why = f"{self.path} had not begun after {start_deadline_s:g} s"
            raise RunnerUnavailable(why, stage="start", hint="does the disk that it lies on answer?") from None
        self._finalizer = weakref.finalize(self, _Process.kill, self._process)
        started(self)
        self.hello = self._receive_hello(limit, start_deadline_s)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.alive else "ended"
        return f"<Runner {self.path} {state}>"

    def _enter(self, cage: Cage, cpus: Optional[Sequence[int]]) -> Entry:
        limits = self.limits
        try:
            return cage.enter(
                sandbox=limits.sandbox, memory_bytes=limits.memory_bytes, processes=limits.processes, cpus=cpus
            )
        except OSError as error:
            where = error.filename or "its control group"
            raise RunnerUnavailable(f"cannot make {where}: {error.strerror}", stage="start") from error

    def _seen(self, path: Union[str, Path]) -> str:
        """A path as the runner is told it: relative where it lies in its working directory, as its user may not be let
        into the folders that lead there."""
        absolute = Path(path).absolute()
        if self._cwd is not None and self._cwd in absolute.parents:
            return f"./{absolute.relative_to(self._cwd)}"
        return str(absolute)

    @property
    def pid(self) -> int:
        """The id of its process group and session: its own, or that of the process that brought it into its group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can take another call."""
        return not self._process.ended

    @property
    def exited(self) -> bool:
        """Whether the process has ended, be it that no call has noticed."""
        return self._process.ended or self._process.has_exited()

    def open(
        self,
        lib: Union[str, Path],
        weights: Optional[Union[str, Path]] = None,
        weights_offset: int = 0,
        deadline_s: float = 60.0,
        *,
        device: Tuple[int, int] = (abi.DEVICE_CPU, 0),
        threads: Optional[int] = None,
    ) -> ModuleInfo:
        """Load a lib.so, map its weights, and make it ready on `device`, a DLDeviceType and an id.

        Several may be open; `ModuleInfo.module` names this one, and the first one's is 0. `threads` is for this module,
        by default as of the runner.

        Raises:
            RunnerRefused: E_LOAD, E_ABI or E_FEATURE with the reason, or E_ARGUMENT when too many are open.
            RunnerCrashed, RunnerTimeout, RunnerOutOfMemory: loading did that.
        """
        self._oom_kills = _oom_kills()  # of those before, while it waited, none was its own
        path = "" if weights is None else self._seen(weights)
        wanted = self.threads if threads is None else threads
        head = protocol.pack_open(self._seen(lib), path, weights_offset, wanted, device)
        payload, _ = self._request(protocol.OPEN, head, None, deadline_s, "load")
        return self._decode("load", lambda: protocol.unpack_open_result(payload))

    def devices(self, kind: str, deadline_s: float = 60.0) -> Found:
        """The GPUs of `kind`, "opencl" or "cuda", of this machine; the first question loads their driver.

        Raises:
            RunnerCrashed, RunnerTimeout: the driver did that.
        """
        head = protocol.pack_devices(DEVICE_TYPES[kind])
        payload, _ = self._request(protocol.DEVICES, head, None, deadline_s, "load")
        return self._decode("load", lambda: protocol.unpack_devices(payload, kind))

    def call(
        self,
        function_index: int,
        inputs: Sequence[Given],
        deadline_s: float = 60.0,
        *,
        module: int = 0,
        discard_outputs: bool = False,
    ) -> List[Tensor]:
        """Call a function; returns its outputs, or nothing with `discard_outputs`.

        Raises:
            RunnerRefused: E_ARGUMENT, E_INPUT or E_KERNEL with the reason.
            RunnerCancelled: `cancel` was called.
            RunnerCrashed, RunnerTimeout, RunnerOutOfMemory: the call did that.
        """
        options = protocol.CALL_DISCARD_OUTPUTS if discard_outputs else 0
        options |= self._sharing()
        payload, section = self._run(
            protocol.CALL, protocol.pack_call(module, function_index, options), inputs, deadline_s
        )
        duration, outputs = self._decode("run", lambda: protocol.unpack_call_result(payload, section))
        self.last_call_ns = duration
        return outputs

    def call_keeping(
        self, function_index: int, inputs: Sequence[Given], deadline_s: float = 60.0, *, module: int = 0
    ) -> List[Kept]:
        """Call a function whose outputs stay in the runner until they are released; raises like `call`."""
        head = protocol.pack_call(module, function_index, protocol.CALL_KEEP_OUTPUTS)
        payload, _ = self._run(protocol.CALL, head, inputs, deadline_s)
        duration, kept = self._decode("run", lambda: protocol.unpack_kept_call(payload))
        self.last_call_ns = duration
        return kept

    def time(
        self,
        function_index: int,
        inputs: Sequence[Given],
        options: TimeOptions = _DEFAULT_TIMING,
        deadline_s: float = 300.0,
        *,
        module: int = 0,
    ) -> TimeResult:
        """Time a function by the runtime's native loop; raises like `call`."""
        head = protocol.pack_time(module, function_index, options)
        payload, _ = self._run(protocol.TIME, head, inputs, deadline_s)
        return self._decode("run", lambda: protocol.unpack_time_result(payload))

    def keep(self, tensor: Tensor, deadline_s: float = 60.0) -> Kept:
        """Copy a tensor into the runner, where it stays until it is released; `deadline_s` is for each piece of it.

        Raises:
            RunnerRefused, RunnerCrashed, RunnerTimeout, RunnerOutOfMemory.
        """
        data = memoryview(tensor.data).cast("B") if tensor.nbytes else memoryview(b"")
        kept = self.reserve(tensor.dtype, tensor.shape, data[:PIECE_BYTES], deadline_s)
        for at in range(PIECE_BYTES, len(data), PIECE_BYTES):
            self.fill(kept, data[at : at + PIECE_BYTES], deadline_s)
        return kept

    def reserve(self, dtype: str, shape: Sequence[int], first: protocol.Buffer = b"", deadline_s: float = 60.0) -> Kept:
        """Room for a tensor, with its first bytes; it can be used once `fill` has brought the others.

        Raises like `keep`, and ValueError or KeyError where there is no such tensor.
        """
        head = protocol.pack_keep(dtype, shape)
        payload, _ = self._request(protocol.KEEP, head, None, deadline_s, "run", first)
        return Kept(self._decode("run", lambda: protocol.unpack_keep(payload)), dtype, tuple(shape))

    def fill(self, kept: Kept, piece: protocol.Buffer, deadline_s: float = 60.0) -> None:
        """The next bytes of a tensor that there is room for; raises like `keep`."""
        self._request(protocol.FILL, protocol.pack_fill(kept.handle), None, deadline_s, "run", piece)

    def fetch(self, kept: Kept, deadline_s: float = 60.0) -> Tensor:
        """The content of a tensor that stays; `deadline_s` is for each piece of it. Raises like `keep`."""
        data = bytearray(kept.nbytes)
        for at in range(0, max(1, len(data)), PIECE_BYTES):  # of one without bytes it is asked whether it is there
            data[at : at + PIECE_BYTES] = self.fetch_piece(kept, at, deadline_s)
        return Tensor(kept.dtype, kept.shape, data)

    def fetch_piece(self, kept: Kept, at: int, deadline_s: float = 60.0) -> memoryview:
        """PIECE_BYTES of a tensor that stays, or as many as there are from `at` on; raises like `keep`."""
        size = min(PIECE_BYTES, kept.nbytes - at)
        payload, _ = self._request(protocol.FETCH, protocol.pack_fetch(kept.handle, at, size), None, deadline_s, "run")
        if len(payload) != size:
            self._process.kill()
            raise self._broke_protocol("run", f"{len(payload)} bytes came of {size}")
        return payload

    def release(self, handles: Sequence[int], deadline_s: float = 60.0) -> None:
        """Free tensors that stayed; all of them, or none where the runner does not know one. Raises like `keep`."""
        self._request(protocol.RELEASE, protocol.pack_release(handles), None, deadline_s, "run")

    def close_module(self, module: int, deadline_s: float = 60.0) -> None:
        """Unload a module; tensors that it computed stay. Raises like `keep`."""
        self._request(protocol.CLOSE, protocol.pack_close(module), None, deadline_s, "load")

    def cancel(self) -> None:
        """End the call that another thread has in flight, if any: it raises RunnerCancelled within `grace_s`.

        Code that does not notice the cancel in that time is killed with its runner.
        """
        with self._flight_lock:
            if self._in_flight:
                self._process.wake()

    def kill(self) -> None:
        """End the process at once; a call in flight raises RunnerCrashed with SIGKILL."""
        self._process.signal_group()
        self.cancel()

    def close(self) -> None:
        """Say bye, and see that it is gone; never raises, never waits longer than `grace_s` and a kill."""
        if self._process.ended:
            self._finalizer.detach()
            return
        if not self._lock.acquire(timeout=0):
            self.kill()
            self._lock.acquire()
        try:
            if not self._process.ended:
                limit = _Limit(time.monotonic() + self._grace_s)
                with contextlib.suppress(OSError, _Expired, _Closed):
                    self._process.send([protocol.Header(protocol.BYE, 0, 0, 0).pack()], None, limit)
                self._process.end(self._grace_s)
        finally:
            self._lock.release()
        self._finalizer.detach()

    # ---- one request and its reply ------------------------------------------------------------------------------

    def _receive_hello(self, limit: _Limit, deadline_s: float) -> Hello:
        try:
            header, payload, _ = self._process.receive(limit)
            if header.type == protocol.ERROR:
                raise ProtocolError(protocol.unpack_error(payload)[1])
            if header.type != protocol.HELLO:
                raise ProtocolError(f"its first message has type {header.type}")
            hello = protocol.unpack_hello(payload)
            if hello.abi_version != abi.ABI_VERSION:
                raise ProtocolError(f"it speaks ABI {hello.abi_version}, this kedge speaks {abi.ABI_VERSION}")
        except _Expired:
            self._process.kill()
            raise RunnerUnavailable(f"{self.path} said nothing for {deadline_s:g} s", stage="start") from None
        except (_Closed, OSError) as error:
            ending = self._process.end(self._grace_s)
            text = f"{self.path} ended before it said hello ({_describe(ending)}): {self._process.stderr_tail()}"
            raise RunnerUnavailable(text.rstrip(": \n"), stage="start") from error
        except ProtocolError as error:
            self._process.kill()
            raise RunnerUnavailable(f"{self.path} cannot be used: {error}", stage="start") from error
        except BaseException:
            self._process.kill()
            raise
        return hello

    def _sharing(self) -> int:
        return protocol.CALL_SHARED_OUTPUTS if self.hello.shared_memory else 0

    def _run(
        self, kind: int, head: bytes, inputs: Sequence[Given], deadline_s: float
    ) -> Tuple[memoryview, Optional[memoryview]]:
        kept, by_value = protocol.pack_inputs(inputs)
        return self._request(kind, head + kept, by_value, deadline_s, "run")

    def _request(
        self,
        kind: int,
        head: bytes,
        tensors: Optional[Sequence[Tensor]],
        deadline_s: float,
        stage: str,
        data: protocol.Buffer = b"",
    ) -> Tuple[memoryview, Optional[memoryview]]:
        with self._lock:
            if self._process.ended:
                raise RunnerUnavailable(f"the runner {self.path} has ended; start a new one", stage=stage)
            self._request_id += 1
            limit = _Limit(time.monotonic() + deadline_s)
            with self._flight_lock:
                self._process.clear_wake()
                self._in_flight = True
            try:
                return self._exchange(kind, head, tensors, data, limit, stage, deadline_s)
            except ProtocolError as error:
                self._process.kill()
                raise self._broke_protocol(stage, str(error)) from error
            except RunnerError:
                raise
            except BaseException:  # an interrupt in mid-frame: what follows on the socket cannot be told apart
                self._process.kill()
                raise
            finally:
                with self._flight_lock:
                    self._in_flight = False

    def _exchange(
        self,
        kind: int,
        head: bytes,
        tensors: Optional[Sequence[Tensor]],
        data: protocol.Buffer,
        limit: _Limit,
        stage: str,
        deadline_s: float,
    ) -> Tuple[memoryview, Optional[memoryview]]:
        whole = False
        try:
            buffers, fd = self._frame(kind, head, tensors, data)
        except OSError as error:  # nothing was sent: the runner has no part in it
            raise self._cannot("hand over the inputs", stage, error) from error
        try:
            try:
                self._process.send(buffers, fd, limit)
            finally:
                if fd is not None:
                    os.close(fd)
            whole = True
            return self._reply(limit, stage)
        except _Expired:
            if limit.cancelled and not whole:
                self._process.kill()
            if limit.cancelled:
                raise self._after_cancel(stage, whole) from None
            alive = whole and self._settle()
            if not alive:
                self._process.kill()
            raise RunnerTimeout(f"{stage} took longer than {deadline_s:g} s", stage=stage, alive=alive) from None
        except _NoRoom as error:
            raise self._cannot("take over the results", stage, error.reason) from error
        except (_Closed, OSError) as error:
            raise self._ended(stage) from error

    def _cannot(self, what: str, stage: str, reason: OSError) -> RunnerUnavailable:
        return RunnerUnavailable(f"cannot {what}: {reason.strerror}", stage=stage, hint="this device lacks resources")

    def _frame(
        self, kind: int, head: bytes, tensors: Optional[Sequence[Tensor]], data: protocol.Buffer
    ) -> Tuple[List[protocol.Buffer], Optional[int]]:
        """The buffers of a request, and the file that holds its tensors where they are large; None: it has none."""
        if tensors is None:
            header = protocol.Header(kind, 0, self._request_id, len(head) + len(data))
            return [header.pack() + head, *([data] if data else [])], None
        descriptors, offsets, size = protocol.pack_tensors(tensors)
        head += descriptors
        if size > SHARED_MEMORY_BYTES and self.hello.shared_memory:
            header = protocol.Header(kind, protocol.FLAG_SHARED, self._request_id, len(head))
            return [header.pack() + head], _shared_file(tensors, offsets, size)
        start = protocol.align(len(head))
        header = protocol.Header(kind, 0, self._request_id, start + size)
        buffers: List[protocol.Buffer] = [header.pack() + head + b"\0" * (start - len(head))]
        at = 0
        for tensor, offset in zip(tensors, offsets):
            buffers += [b"\0" * (offset - at), memoryview(tensor.data).cast("B")] if tensor.nbytes else []
            at = offset + tensor.nbytes if tensor.nbytes else at
        buffers.append(b"\0" * (size - at))
        return buffers, None

    def _reply(self, limit: _Limit, stage: str) -> Tuple[memoryview, Optional[memoryview]]:
        while True:
            try:
                header, payload, section = self._process.receive(limit)
            except _Cancel:
                self._send_cancel(limit)
                continue
            if header.request != self._request_id or header.type not in (protocol.RESULT, protocol.ERROR):
                raise ProtocolError(f"message {header.type} for request {header.request} is no reply")
            if header.type == protocol.RESULT:
                return payload, section
            status, text = protocol.unpack_error(payload)
            if status == abi.E_CANCELLED:
                raise RunnerCancelled(f"{stage} was cancelled", stage=stage, alive=True)
            if status == abi.E_MEMORY:
                raise RunnerOutOfMemory(text, stage=stage)
            # A GPU's driver may say nowhere else why it takes no code.
            tail = self._process.stderr_tail().strip() if status == abi.E_LOAD else ""
            raise RunnerRefused(f"{text}: {tail}" if tail else text, stage=stage, status=status)

    def _send_cancel(self, limit: _Limit) -> None:
        limit.moment = min(limit.moment, time.monotonic() + self._grace_s)
        limit.cancelled = True
        header = protocol.Header(protocol.CANCEL, 0, self._request_id, 0)
        self._process.send([header.pack()], None, limit)

    def _settle(self) -> bool:
        """After a missed deadline: cancel, and say whether the runner answered in time and can be used again."""
        limit = _Limit(0.0)
        try:
            limit.moment = time.monotonic() + self._grace_s
            self._send_cancel(limit)
            while True:
                with contextlib.suppress(_Cancel):
                    header, _, _ = self._process.receive(limit)
                    return header.request == self._request_id
        except (_Expired, _Closed, _NoRoom, OSError, ProtocolError):
            return False

    def _after_cancel(self, stage: str, whole: bool) -> RunnerCancelled:
        self._process.kill()
        reason = "" if whole else " before its request was sent"
        return RunnerCancelled(f"{stage} was cancelled{reason}; its runner was killed", stage=stage, alive=False)

    # ---- how it ended -------------------------------------------------------------------------------------------

    def _ended(self, stage: str) -> RunnerError:
        """The process closed its end: find out how it ended, and name it."""
        ending = self._process.end(self._grace_s)
        number = -ending if ending < 0 else 0
        if number == signal.SIGXCPU:
            seconds = self.limits.cpu_s
            return RunnerTimeout(f"{stage} used up its {seconds} CPU seconds", stage=stage, alive=False)
        grouped = self._process.out_of_memory
        if number == signal.SIGKILL and (_oom_kills() > self._oom_kills if grouped is None else grouped):
            return RunnerOutOfMemory(f"the kernel ended the runner during {stage}: out of memory", stage=stage)
        return self._crashed(stage, f"the runner ended during {stage} ({_describe(ending)})", ending)

    def _broke_protocol(self, stage: str, reason: str) -> RunnerError:
        return self._crashed(stage, f"the runner broke the protocol during {stage} and was killed: {reason}", -9)

    def _crashed(self, stage: str, message: str, ending: int) -> RunnerCrashed:
        tail = self._process.stderr_tail()
        return RunnerCrashed(
            f"{message}: {tail.strip()}" if tail.strip() else message,
            stage=stage,
            signal_number=-ending if ending < 0 else 0,
            exit_status=max(ending, 0),
            stderr=tail,
        )

    def _decode(self, stage: str, read: Callable[[], _T]) -> _T:
        try:
            return read()
        except ProtocolError as error:
            self._process.kill()
            raise self._broke_protocol(stage, str(error)) from error


class _Cancel(Exception):
    """`Runner.cancel` was called while a reply was awaited."""


class _NoRoom(Exception):
    """A reply came whole, but this process cannot map its file."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Process:
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
        limit: _Limit,
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
                    self._popen = _spawn(command, fds, cwd, environment, limit)
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

    def send(self, buffers: Sequence[protocol.Buffer], fd: Optional[int], limit: _Limit) -> None:
        """Write all buffers, the descriptor with the first byte. Cancels wait until the frame is whole."""
        ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        views = [memoryview(buffer) for buffer in buffers]
        while views:
            try:
                sent = self._socket.sendmsg(views[:_MOST_BUFFERS], ancillary, _NO_SIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, limit, cancellable=False)
                continue
            ancillary = []
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]

    def receive(self, limit: _Limit) -> Tuple[protocol.Header, memoryview, Optional[memoryview]]:
        """The next frame: header, payload, and the file that came with it as memory.

        Raises:
            _Cancel: before the frame began.
        """
        start = memoryview(bytearray(_START_BYTES))
        fds: List[int] = []
        try:
            got = self._fill(start, 0, protocol.HEADER.size, limit, fds, first=True) - protocol.HEADER.size
            header = protocol.Header.unpack(start[: protocol.HEADER.size])
            if header.length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {header.length} bytes is too long")
            if got > header.length:
                raise ProtocolError(f"{got - header.length} bytes came behind a frame")
            payload = start[protocol.HEADER.size :][: header.length]
            if got < header.length:
                payload = memoryview(bytearray(header.length))
                payload[:got] = start[protocol.HEADER.size :][:got]
                self._fill(payload, got, header.length, limit, fds, first=False)
            if len(fds) != bool(header.flags & protocol.FLAG_SHARED):
                raise ProtocolError(f"{len(fds)} files came with a frame whose flags are {header.flags}")
            return header, payload, _map_shared(fds[0]) if fds else None
        finally:
            for fd in fds:
                os.close(fd)

    def _fill(self, view: memoryview, filled: int, wanted: int, limit: _Limit, fds: List[int], first: bool) -> int:
        """Read on until at least so many bytes are filled, and say how many are; files that come are added to `fds`."""
        waits = first  # the rest of a frame is there, as a rule, with its beginning
        while filled < wanted:
            if waits:
                self._wait(select.POLLIN, limit, cancellable=first and filled == 0)
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
                raise _Closed
            filled += size
        return filled

    def _wait(self, event: int, limit: _Limit, cancellable: bool) -> None:
        """Wait until the socket is ready; drain standard error meanwhile, or the runner would block on it."""
        poller = select.poll()
        poller.register(self._socket_fd, event)
        if not self._stderr.closed:
            poller.register(self._stderr_fd, select.POLLIN)
        if cancellable and not limit.cancelled:
            poller.register(self._wake_read, select.POLLIN)
        while True:
            left_s = limit.left_s()
            ready = [fd for fd, _ in poller.poll(min(left_s, _ALIVE_CHECK_S) * 1000)]
            if self._stderr_fd in ready and not self._drain_stderr():
                poller.unregister(self._stderr_fd)
            if self._socket_fd in ready:
                return
            if self._wake_read in ready:
                self.clear_wake()
                raise _Cancel
            if not ready and self.has_exited():
                raise _Closed
            if not ready and left_s <= 0:
                raise _Expired

    def has_exited(self) -> bool:
        """Whether it has ended, not yet reaped."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:  # the program that this is part of reaps all children, or ignores SIGCHLD
            return True

    def wake(self) -> None:
        """Make a waiting `receive` raise _Cancel; from any thread, and nothing once the process was reaped."""
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


# ---- starting processes -------------------------------------------------------------------------------------------


class _Spawner:
    """A thread that starts processes, one after the other, and lives as long as this process.

    A runner asks the kernel to kill it when its parent dies, and to the kernel the parent is the *thread* that forked:
    started from a short-lived thread it would die too early.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._wanted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Not a pool's thread: an exec that hangs must not keep this process from ending.
        threading.Thread(target=self._work, name="kedge-runner-spawner", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._wanted.get()()

    def submit(self, start: Callable[[], None]) -> None:
        """Have it call this, which raises nothing."""
        self._wanted.put(start)


_spawner_lock = threading.Lock()
_spawner: Optional[_Spawner] = None


def _spawn(
    command: List[str],
    fds: Sequence[int],
    cwd: Optional[Path],
    environment: Optional[Mapping[str, str]],
    limit: _Limit,
) -> subprocess.Popen[bytes]:
    """Start a runner; raises OSError, and _Expired where its program has not begun until then."""
    global _spawner
    with _spawner_lock:
        if _spawner is None or _spawner.owner != os.getpid():
            _spawner = _Spawner()
        spawner = _spawner

    process: Future[subprocess.Popen[bytes]] = Future()

    def start() -> None:
        if not process.set_running_or_notify_cancel():
            return  # what it was to inherit is closed
        try:
            started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=None if cwd is None else str(cwd),
                env=environment,
                pass_fds=tuple(fds),
                start_new_session=True,
            )
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            process.set_exception(error)
        else:
            process.set_result(started)

    try:
        spawner.submit(start)
        return process.result(limit.left_s())
    except FutureTimeout:
        _discard(process)
        with _spawner_lock:
            if _spawner is spawner:  # what it has started needs it; what comes is started by another one
                _spawner = None
        raise _Expired from None
    except BaseException:  # an interrupt, perhaps: what is being started would belong to nobody
        _discard(process)
        raise


def _discard(process: Future[subprocess.Popen[bytes]]) -> None:
    """Nobody waits for it: it is not started, or killed once it is."""

    def kill(done: Future[subprocess.Popen[bytes]]) -> None:
        if not done.cancelled() and done.exception() is None:
            with done.result() as started:
                started.kill()

    process.cancel()
    process.add_done_callback(kill)


def _environment(cage: Optional[Cage], cwd: Optional[Path]) -> Optional[Mapping[str, str]]:
    """The environment of a runner in a cage: what it keeps for a while goes into its working directory."""
    if cage is None or cwd is None:
        return None
    if cage.user is None:
        return {**os.environ, "TMPDIR": str(cwd)}
    return {**os.environ, "TMPDIR": ".", "HOME": "."}


# ---- shared memory ------------------------------------------------------------------------------------------------


def _shared_file(tensors: Sequence[Tensor], offsets: Sequence[int], size: int) -> int:
    """A sealed memory file with the tensors at their offsets."""
    fd = os.memfd_create("kedge-inputs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        for tensor, offset in zip(tensors, offsets):
            view = memoryview(tensor.data).cast("B") if tensor.nbytes else memoryview(b"")
            while view:
                written = os.pwrite(fd, view[: 1 << 30], offset)
                view, offset = view[written:], offset + written
        # Without seals the runner copies what it would otherwise map: an emulator may not know them.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALED)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map_shared(fd: int) -> memoryview:
    """The content of a file from the runner, writable: mapped if it can neither shrink nor change, else copied.

    Raises:
        ProtocolError: it is no file with results.
        _NoRoom: this process cannot map it.
    """
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_FRAME_BYTES:
        raise ProtocolError(f"a result of mode {state.st_mode:#o} and {state.st_size} bytes")
    if state.st_size == 0:
        return memoryview(b"")
    try:
        sealed = fcntl.fcntl(fd, _F_GET_SEALS) & _SEALED == _SEALED
    except OSError:
        sealed = False
    if not sealed:
        return _copy_file(fd, state.st_size)
    try:
        mapped = mmap.mmap(fd, state.st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise _NoRoom(error) from error
    return memoryview(mapped)


def _copy_file(fd: int, size: int) -> memoryview:
    try:
        copy = memoryview(bytearray(size))
    except MemoryError:
        raise _NoRoom(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))) from None
    at = 0
    while at < size:
        try:
            got = os.preadv(fd, [copy[at : at + (1 << 30)]], at)
        except OSError as error:
            raise ProtocolError(f"the file with the results cannot be read: {error.strerror}") from error
        if got == 0:
            raise ProtocolError("the file with the results shrank")
        at += got
    return copy


def _received_fds(ancillary: Sequence[Tuple[int, int, bytes]]) -> List[int]:
    fds: List[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
    return fds


def _oom_kills() -> int:
    """How many processes the kernel has ended for want of memory so far; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_bytes()
    except OSError:
        return 0
    _, found, rest = text.partition(b"\noom_kill ")
    return int(rest.partition(b"\n")[0]) if found else 0


def _describe(ending: int) -> str:
    if ending >= 0:
        return f"exit status {ending}"
    try:
        return signal.Signals(-ending).name
    except ValueError:
        return f"signal {-ending}"
