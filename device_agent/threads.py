"""What passes between the agent's threads: jobs to the one that does them, their stages, and whatever else happens."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from typing import Callable, Deque, Generic, Iterator, Optional, Tuple, TypeVar

from kedge.device_agent import core
from kedge.rpc.outcome import Stage
from kedge.rpc.types import Lease

log = logging.getLogger("kedge.agent")

Event = TypeVar("Event")


class Strand(Generic[Event]):
    """Handles events one at a time, in the order in which they came; safe from several threads.

    One thread, the strand's own, calls `step` again and again. It handles what was put with `post`. What is put with
    `dispatch` is handled by the thread that puts it, before the call returns, unless another event is being handled or
    waits: to wake a thread takes longer than most events do, and the one that woke it goes on at the same time.

    Args:
        handle: what to do with an event. What it raises where it was dispatched is raised by the next `step`.
        alarm: when `step` is to return at the latest, by `clock`; None: not before there is an event.
        clock: the time in seconds.
    """

    def __init__(
        self, handle: Callable[[Event], None], alarm: Callable[[], Optional[float]], clock: Callable[[], float]
    ) -> None:
        self._handle = handle
        self._alarm = alarm
        self._clock = clock
        self._lock = threading.Lock()
        #: What was posted, and a ring of the bell for each, and for whatever else the strand's thread must look at.
        self._posted: Deque[Event] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        #: Guarded by the lock: when the strand's thread wakes by itself, what a dispatched event has raised, `close`.
        self._wakes_at: Optional[float] = None
        self._failure: Optional[BaseException] = None
        self._closed = False

    def post(self, event: Event) -> None:
        """Have the strand's own thread handle it; may be called from a signal handler, too."""
        self._posted.append(event)
        self._bell.put(None)

    def dispatch(self, event: Event) -> None:
        """Handle it here and now where that keeps the order, else have the strand's thread do it."""
        if not self._lock.acquire(blocking=False):
            self.post(event)
            return
        try:
            if self._closed:
                return
            if self._posted or self._failure is not None:
                self.post(event)
                return
            try:
                self._handle(event)
            except BaseException as failure:  # noqa: BLE001 - it ends the strand's thread, as if that had met it
                self._failure = failure
            if self._failure is not None or self._is_sooner(self._alarm()):
                self._bell.put(None)
        finally:
            self._lock.release()

    def step(self, after: Callable[[], None]) -> None:
        """Wait for an event, or for the alarm; handle one, and call `after`."""
        with self._lock:
            alarm = self._wakes_at = self._alarm()
        with contextlib.suppress(queue.Empty):
            self._bell.get(timeout=None if alarm is None else max(0.0, alarm - self._clock()))
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._posted:
                self._handle(self._posted.popleft())
            after()

    def close(self) -> None:
        """Handle nothing any more; returns once nothing is being handled. What was posted is dropped."""
        with self._lock:
            self._closed = True

    def _is_sooner(self, alarm: Optional[float]) -> bool:
        return alarm is not None and (self._wakes_at is None or alarm < self._wakes_at)


class Worker:
    """One thread that does what it is given, one after the other. It begins with the first."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Optional[Callable[[], None]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, work: Callable[[], None]) -> None:
        """Have it done after all that was put before; what it raises is logged, and the next is done all the same."""
        self._work.put(work)
        if self._thread.ident is None:
            self._thread.start()

    def end(self, patience_s: float) -> None:
        """Wait, no longer than this, until all is done; take no more. Only who puts may call it."""
        self._work.put(None)
        if self._thread.ident is not None:
            self._thread.join(patience_s)

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if work is None:
                return
            try:
                work()
            except Exception:
                log.exception("%s failed", self._thread.name)
            del work  # what it holds is not kept until there is more to do


class Stages:
    """The stages that a job enters, from its thread to the agent's.

    Those of its first moments wake nobody: a short job has none that the tracker is told of, and its thread would wait
    for the one that is woken. The agent looks at `look_at` by itself; from then on every stage wakes it.
    """

    def __init__(self, lease: Lease, wake: Callable[[], None], clock: Callable[[], float]) -> None:
        self.lease = lease
        self._wake = wake
        self._clock = clock
        #: When to `take` at the latest; None: whenever one is woken.
        self.look_at: Optional[float] = clock() + core.TELL_S
        self._entered: Deque[Tuple[Stage, float]] = deque()

    def enter(self, stage: Stage) -> None:
        """In the job's thread: it has begun."""
        self._entered.append((stage, self._clock()))
        if self.look_at is None:  # asked after it was appended: either this wakes, or the look to come finds it
            self._wake()

    def take(self) -> Iterator[Tuple[Stage, float]]:
        """What was entered since, and when."""
        if self.look_at is not None and self._clock() >= self.look_at:
            self.look_at = None
        while self._entered:
            yield self._entered.popleft()
