"""`Runner`: one `kedge-runner` process, the modules and tensors in it, behind calls that always come back.

Native code from an artifact runs in that process and nowhere else. Every call has a deadline; a runner that misses
it is asked to cancel, given a moment, then killed with everything it started, and always reaped. What can go wrong
is one small tree of exceptions under `RunnerError`. The protocol is in docs/decisions/0002-runner-protocol.md.

Standard library only, Python 3.9, Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union

from kedge.device_agent.cage import Cage, Entry
from kedge.device_agent.deadline import Deadline, Expired
from kedge.device_agent.runner_errors import (
    RunnerCancelled,
    RunnerCrashed,
    RunnerError,
    RunnerOutOfMemory,
    RunnerRefused,
    RunnerTimeout,
    RunnerUnavailable,
)
from kedge.device_agent.runner_process import Cancelled, Closed, RunnerProcess
from kedge.device_agent.runtime import protocol
from kedge.device_agent.runtime.protocol import Given, Hello, Kept, ModuleInfo, ProtocolError, Tensor, TimeResult
from kedge.device_agent.shared_memory import NoRoomError, shared_file
from kedge.rpc import abi
from kedge.rpc.artifact.place import DEVICE_TYPES, Found
from kedge.rpc.types import TimeOptions

#: Tensors that add up to more than this travel in shared memory where the runner can map it.
SHARED_MEMORY_BYTES = 256 << 10
#: Tensors that stay are copied into the runner, and out of it, in pieces of so many bytes.
PIECE_BYTES = 1 << 20
_T = TypeVar("_T")
_DEFAULT_TIMING = TimeOptions()


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
        deadline = Deadline(time.monotonic() + start_deadline_s)
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
            self._process = RunnerProcess(arguments, self.path, self._cwd, entry, environment, deadline)
        except Expired:
            why = f"{self.path} had not begun after {start_deadline_s:g} s"
            raise RunnerUnavailable(why, stage="start", hint="does the disk that it lies on answer?") from None
        self._finalizer = weakref.finalize(self, RunnerProcess.kill, self._process)
        started(self)
        self.hello = self._receive_hello(deadline, start_deadline_s)

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
        absolute = str(Path(path).absolute())
        within = f"{self._cwd}/"
        return f"./{absolute[len(within) :]}" if self._cwd is not None and absolute.startswith(within) else absolute

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
                deadline = Deadline(time.monotonic() + self._grace_s)
                with contextlib.suppress(OSError, Expired, Closed):
                    self._process.send([protocol.Header(protocol.BYE, 0, 0, 0).pack()], None, deadline)
                self._process.end(self._grace_s)
        finally:
            self._lock.release()
        self._finalizer.detach()

    # ---- one request and its reply ------------------------------------------------------------------------------

    def _receive_hello(self, deadline: Deadline, deadline_s: float) -> Hello:
        try:
            header, payload, _ = self._process.receive(deadline)
            if header.type == protocol.ERROR:
                raise ProtocolError(protocol.unpack_error(payload)[1])
            if header.type != protocol.HELLO:
                raise ProtocolError(f"its first message has type {header.type}")
            hello = protocol.unpack_hello(payload)
            if hello.abi_version != abi.ABI_VERSION:
                raise ProtocolError(f"it speaks ABI {hello.abi_version}, this kedge speaks {abi.ABI_VERSION}")
        except Expired:
            self._process.kill()
            raise RunnerUnavailable(f"{self.path} said nothing for {deadline_s:g} s", stage="start") from None
        except (Closed, OSError) as error:
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
            deadline = Deadline(time.monotonic() + deadline_s)
            with self._flight_lock:
                self._process.clear_wake()
                self._in_flight = True
            try:
                return self._exchange(kind, head, tensors, data, deadline, stage, deadline_s)
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
        deadline: Deadline,
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
                self._process.send(buffers, fd, deadline)
            finally:
                if fd is not None:
                    os.close(fd)
            whole = True
            return self._reply(deadline, stage)
        except Expired:
            if deadline.cancelled and not whole:
                self._process.kill()
            if deadline.cancelled:
                raise self._after_cancel(stage, whole) from None
            alive = whole and self._settle()
            if not alive:
                self._process.kill()
            raise RunnerTimeout(f"{stage} took longer than {deadline_s:g} s", stage=stage, alive=alive) from None
        except NoRoomError as error:
            raise self._cannot("take over the results", stage, error.reason) from error
        except (Closed, OSError) as error:
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
            return [header.pack() + head], shared_file(tensors, offsets, size)
        start = protocol.align(len(head))
        header = protocol.Header(kind, 0, self._request_id, start + size)
        buffers: List[protocol.Buffer] = [header.pack() + head + b"\0" * (start - len(head))]
        at = 0
        for tensor, offset in zip(tensors, offsets):
            buffers += [b"\0" * (offset - at), memoryview(tensor.data).cast("B")] if tensor.nbytes else []
            at = offset + tensor.nbytes if tensor.nbytes else at
        buffers.append(b"\0" * (size - at))
        return buffers, None

    def _reply(self, deadline: Deadline, stage: str) -> Tuple[memoryview, Optional[memoryview]]:
        while True:
            try:
                header, payload, section = self._process.receive(deadline)
            except Cancelled:
                self._send_cancel(deadline)
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

    def _send_cancel(self, deadline: Deadline) -> None:
        deadline.moment = min(deadline.moment, time.monotonic() + self._grace_s)
        deadline.cancelled = True
        header = protocol.Header(protocol.CANCEL, 0, self._request_id, 0)
        self._process.send([header.pack()], None, deadline)

    def _settle(self) -> bool:
        """After a missed deadline: cancel, and say whether the runner answered in time and can be used again."""
        deadline = Deadline(0.0)
        try:
            deadline.moment = time.monotonic() + self._grace_s
            self._send_cancel(deadline)
            while True:
                with contextlib.suppress(Cancelled):
                    header, _, _ = self._process.receive(deadline)
                    return header.request == self._request_id
        except (Expired, Closed, NoRoomError, OSError, ProtocolError):
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


def _environment(cage: Optional[Cage], cwd: Optional[Path]) -> Optional[Mapping[str, str]]:
    """The environment of a runner in a cage: what it keeps for a while goes into its working directory."""
    if cage is None or cwd is None:
        return None
    if cage.user is None:
        return {**os.environ, "TMPDIR": str(cwd)}
    return {**os.environ, "TMPDIR": ".", "HOME": "."}


def _oom_kills() -> int:
    """How many processes the kernel has ended for want of memory so far; 0 where it does not say."""
    try:
        with open("/proc/vmstat", "rb", buffering=0) as file:  # noqa: PTH123 - of every job, and a Path takes longer
            text = file.read()
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
