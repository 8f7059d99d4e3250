"""Worker processes that compile kernels side by side, and when they are worth their start.

LLVM's binding serializes its calls and Python its own, so threads would gain nothing. Workers are new processes, not
forks, and never import the user's script: a script needs no guard around its main part. Each is sent a kernel at a
time, whole: schedule, code generation and LLVM all happen there.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias, cast

from kedge.compiler.cache import KernelObject
from kedge.compiler.errors import CompileError, WorkerError
from kedge.compiler.kernels import compile_kernel
from kedge.compiler.lower.program import Draft
from kedge.compiler.target.host import usable_threads
from kedge.compiler.worker import Job, Reply, Request, dumps, read_frame, write_frame

__all__ = ["Job", "Workers", "worker_limit"]

VARIABLE = "KEDGE_COMPILE_WORKERS"
#: Bytes that a worker may take while it compiles a large kernel.
WORKER_BYTES = 400 << 20
#: A worker needs about 0.2 s to start; drafts take 0.03 to 0.4 s each, the longer their text the more.
_DRAFT_S, _CHARACTER_S, _WORTH_S = 0.03, 1e-5, 1.0
#: The paths of the process that starts a worker lead it to the same kedge.
_START = "import sys; sys.path[:] = {path!r}; from kedge.compiler.worker import main; main()"
#: Where Ctrl-C cannot interrupt a wait (Windows), it is seen this often.
_WAIT_S = 0.5

#: Ctrl-C in a terminal goes to a whole group of processes; what starts a worker decides when it ends.
_APART: dict[str, Any]
if sys.platform == "win32":
    _APART = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    _APART = {"process_group": 0}

Started: TypeAlias = Callable[[Job], None]
#: A job began, or ended, or cannot be done.
_Event: TypeAlias = Job | Reply | Exception


def worker_limit() -> int:
    """How many workers there may be: KEDGE_COMPILE_WORKERS, or one for each CPU as far as memory goes.

    Raises:
        CompileError: the variable is set, and to no number of at least 1.
    """
    text = os.environ.get(VARIABLE, "")
    if text:
        if not (text.isascii() and text.isdecimal() and int(text)):
            raise CompileError(
                f"{VARIABLE} is {text!r}, which is no number of processes",
                hint="set it to 1 (no workers) or more, or unset it",
            )
        return int(text)
    memory = available_bytes()
    return max(1, min(usable_threads(), usable_threads() if memory is None else memory // WORKER_BYTES))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that could be taken now without swapping, the control group's limit included; None if nobody says."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = root / "sys/fs/cgroup"
        found.append(max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())))
    return min(found, default=None)


def expected_s(jobs: Iterable[Job]) -> float:
    """About how long drafts take one after the other."""
    return sum(_DRAFT_S + _CHARACTER_S * _length(job) for job in jobs)


def _length(job: Job) -> int:
    return len(job.kernel.form) if isinstance(job.kernel, Draft) else 0


class Workers:
    """The workers of one compile, started when there is enough to do for them, and ended with the `with`.

    `limit` is how many there may be (None: `worker_limit`); with 1 everything happens in this process. `worth_s` is
    how long a list of jobs must be expected to take for workers to be started.
    """

    def __init__(self, limit: int | None = None, worth_s: float = _WORTH_S) -> None:
        self._limit = limit
        self._worth_s = worth_s
        self._running: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._waiting: collections.deque[tuple[Job, bytes]] = collections.deque()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.clear()
        for worker in self._running:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._running:
            worker.close()
        self._running.clear()
        self._threads.clear()

    def compile(self, jobs: Sequence[Job], started: Started) -> Iterator[KernelObject]:
        """The kernels of `jobs` as they get done, in any order; `started(job)` is called in this thread.

        What a worker prints, logs and warns of appears here.

        Raises:
            CompileError: as `compile_kernel`, the same class with the same hint.
            WorkerError: a worker could not be started, or ended before its work was done.
        """
        # What comes with a schedule stays here: it may name instructions that only this process knows.
        drafts = [job for job in jobs if isinstance(job.kernel, Draft)]
        limit = worker_limit() if self._limit is None else self._limit
        sent: dict[str, tuple[Job, bytes]] = {}
        if min(limit, len(drafts)) > 1 and (self._running or expected_s(drafts) >= self._worth_s):
            for job in sorted(drafts, key=_length, reverse=True):
                request = _pickled(job)
                if request is not None:
                    sent[job.symbol] = (job, request)
            yield from self._compile_shared(list(sent.values()), min(limit, len(sent)), started)
        for job in jobs:
            if job.symbol not in sent:
                started(job)
                yield compile_kernel(job.kernel, job.target, job.symbol)

    def _compile_shared(
        self, jobs: Sequence[tuple[Job, bytes]], count: int, started: Started
    ) -> Iterator[KernelObject]:
        while len(self._running) < count:
            self._running.append(_Worker())
        self._waiting.extend(jobs)
        events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        for worker in self._running[:count]:
            thread = threading.Thread(target=self._serve, args=(worker, events), name="kedge-worker", daemon=True)
            self._threads.append(thread)
            thread.start()
        left = len(jobs)
        while left:
            event = _next(events)
            if isinstance(event, Job):
                started(event)
            elif isinstance(event, Reply):
                yield _unpacked(event)
                left -= 1
            else:
                raise event

    def _serve(self, worker: _Worker, events: queue.SimpleQueue[_Event]) -> None:
        """Give a worker one job after the other. What goes wrong is an event too: the other thread waits for one."""
        try:
            while self._waiting:
                with contextlib.suppress(IndexError):  # another worker took the last one
                    job, request = self._waiting.popleft()
                    events.put(job)
                    events.put(worker.ask(job, request))
        except Exception as error:  # noqa: BLE001 - the other thread raises it
            events.put(error)


def _pickled(job: Job) -> bytes | None:
    """The request for a job; None where its expressions are deeper than pickling follows, though compiling may."""
    try:
        return dumps(Request(job, sys.getrecursionlimit()))
    except RecursionError:
        return None


def _next(events: queue.SimpleQueue[_Event]) -> _Event:
    while True:
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=_WAIT_S)


def _unpacked(reply: Reply) -> KernelObject:
    """The kernel of a reply; what was said on the way is said here."""
    sys.stderr.write(reply.printed)
    for record in reply.logged:
        logging.getLogger(record.name).handle(record)
    for warning, filename, line in reply.warned:
        warnings.warn_explicit(warning, None, filename, line)
    if isinstance(reply.result, Exception):
        raise reply.result
    return reply.result


class _Worker:
    """One process, and the pipes to it."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **_APART)
        except OSError as error:
            raise WorkerError(f"cannot start a worker process: {error}", hint=f"set {VARIABLE}=1") from error

    def ask(self, job: Job, request: bytes) -> Reply:
        """What the worker makes of a job, which `request` holds. Raises WorkerError where it ends instead."""
        process = self._process
        requests, replies = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        try:
            write_frame(requests, request)
            frame = read_frame(replies)
        except OSError:
            frame = None
        if frame is None:
            process.kill()
            raise _ended(job, process.wait())
        reply: Reply = pickle.loads(frame)
        return reply

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close the pipes to the process, which has ended."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it did not read is lost, as it should be
                    stream.close()


def _ended(job: Job, status: int) -> WorkerError:
    what = f"{job.kernel.func.name} for {job.target.label}"
    how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
    memory = "there may be too little memory for it; " if status == -9 else ""
    return WorkerError(
        f"the process that was compiling {what} {how}",
        hint=f"{memory}{VARIABLE}=1 compiles one kernel after the other, without such processes",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
