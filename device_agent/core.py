"""What the agent decides: a state machine without sockets, threads or clocks. `agent.py` acts.

Every method takes the time in seconds of any steady clock and returns the actions to take, in order. The messages
are those of `kedge.rpc.messages`, which also states the rules that both ends keep.

    waiting --Open--> greeting --Welcome--> ready --lost--> waiting ... --stop--> stopped

A lease is held from AssignJob until ResultAccepted names its job: through reconnects, through a restart of the tracker,
and, once the job has ended, through a restart of the agent, which keeps results. One job runs at a time; an assignment
that arrives while another job still winds down waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterable, List, Optional, Tuple, Union

from kedge.rpc import messages as m
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.types import JobResult, JobSpec, Lease

FIRST_DELAY_S = 0.2
LAST_DELAY_S = 5.0
#: A connection that lasted this long was a good one: the next attempt starts with a short delay again.
STABLE_S = 5.0
GREETING_S = 10.0
#: Stages shorter than this are not worth a message: the result says how long they took.
TELL_S = 0.02


@dataclass(frozen=True)
class Open:
    """Dial the tracker; `connected` or `disconnected` tells how it went."""


@dataclass(frozen=True)
class Send:
    """Put a message on the stream. The shell adds the device's health to a greeting and to a heartbeat."""

    message: m.AgentBody


@dataclass(frozen=True)
class Close:
    """Drop the connection; the core expects no `disconnected` for it."""


@dataclass(frozen=True)
class StartJob:
    """Begin a job; `progress` and finally `finished` report on it."""

    lease: Lease
    spec: JobSpec


@dataclass(frozen=True)
class CancelJob:
    """End the running job soon; it still reports `finished`."""

    lease: Lease
    reason: str


@dataclass(frozen=True)
class Keep:
    """Make a result durable, while it is sent."""

    finished: m.JobFinished


@dataclass(frozen=True)
class Forget:
    """A result that was kept is needed no longer."""

    lease: Lease


@dataclass(frozen=True)
class Exit:
    """The agent is done. `failed` when the tracker refused it."""

    reason: str
    failed: bool


Action = Union[Open, Send, Close, StartJob, CancelJob, Keep, Forget, Exit]
Key = Tuple[str, int]


def key(lease: Lease) -> Key:
    """A lease's identity: the job and the epoch."""
    return lease.job_id, lease.epoch


@dataclass
class _Job:
    lease: Lease
    spec: JobSpec
    stage: Optional[Stage] = None
    cancelling: bool = False
    tell_at: Optional[float] = None  # when the tracker is told of the stage; None: it knows
    superseded: bool = False  # by a newer lease of the same job: its result is nobody's


class AgentCore:
    """The agent's side of one stream, and of the work it holds.

    Args:
        hello: the greeting; its `running` is filled in at every connection.
        jitter: draws from [0, 1), so that a fleet does not reconnect in step.
        results: what an earlier agent kept.
    """

    def __init__(self, hello: m.Hello, *, jitter: Callable[[], float], results: Iterable[m.JobFinished] = ()) -> None:
        self._hello = hello
        self._jitter = jitter
        self._phase = "new"
        self._running: Optional[_Job] = None
        self._waiting: List[_Job] = []
        self._results: Dict[str, m.JobFinished] = {finished.lease.job_id: finished for finished in results}
        self._attempt = 0
        self._alarm: Optional[float] = None
        self._heartbeat_s = 0.0
        self._ready_since = 0.0

    @property
    def phase(self) -> str:
        """new, waiting, greeting, ready or stopped."""
        return self._phase

    @property
    def running(self) -> Optional[Lease]:
        """The lease of the job that runs."""
        return None if self._running is None else self._running.lease

    def alarm(self) -> Optional[float]:
        """When to call `tick` at the latest; None while there is nothing to wait for."""
        running = self._running
        if self._alarm is None or self._phase != "ready" or running is None or running.tell_at is None:
            return self._alarm
        return min(self._alarm, running.tell_at)

    def held(self) -> Tuple[Lease, ...]:
        """Every lease that is not settled: running, waiting, or finished and not yet accepted."""
        jobs = [job for job in (self._running, *self._waiting) if job is not None and not job.superseded]
        return (*(job.lease for job in jobs), *(finished.lease for finished in self._results.values()))

    # ---- what happens ------------------------------------------------------------------------------------------

    def start(self, now: float) -> List[Action]:
        """Begin: dial."""
        return self._dial(now)

    def connected(self, now: float) -> List[Action]:
        """The stream is open: greet, naming the work that is held."""
        if self._phase != "greeting":
            return []
        self._alarm = now + GREETING_S
        return [Send(replace(self._hello, running=self.held()))]

    def disconnected(self, now: float) -> List[Action]:
        """The stream broke or never opened: wait a while, then dial again."""
        if self._phase in ("stopped", "waiting"):
            return []
        return self._wait(now)

    def tick(self, now: float) -> List[Action]:
        """The alarm: dial, give up on a greeting, tell the running job's stage, or send a heartbeat."""
        told = self._told(now)
        if self._alarm is None or now < self._alarm:
            return told
        if self._phase == "waiting":
            return self._dial(now)
        if self._phase == "greeting":
            return [Close(), *self._wait(now)]
        self._alarm = now + self._heartbeat_s
        return [*told, Send(m.Heartbeat(running=self.held()))]

    def received(self, message: m.TrackerBody, now: float) -> List[Action]:
        """A message from the tracker."""
        if self._phase not in ("greeting", "ready"):
            return []
        if isinstance(message, m.Welcome):
            return self._welcomed(message, now)
        if isinstance(message, m.Refused):
            return self._refused(message, now)
        if self._phase != "ready":
            return []
        if isinstance(message, m.AssignJob):
            return self._assigned(message)
        if isinstance(message, m.AbortJob):
            return self._aborted(message)
        return self._forget(message.job_id)

    def progress(self, lease: Lease, stage: Stage, now: float) -> List[Action]:
        """The running job entered a stage; the tracker is told if it takes its time there."""
        if self._running is None or key(self._running.lease) != key(lease):
            return []
        if stage is Stage.TRANSFER and self._running.stage is None:
            return []  # JobStarted says that
        self._running.stage, self._running.tell_at = stage, now + TELL_S
        return []

    def finished(self, finished: m.JobFinished) -> List[Action]:
        """The running job ended. Its result is kept until the tracker has it."""
        lease = finished.lease
        if self._running is None or key(self._running.lease) != key(lease):
            raise ValueError(f"job {lease.job_id} is not the one that runs")
        superseded, self._running = self._running.superseded, None
        actions = [] if superseded else self._report(finished)
        return actions + self._next()

    def stop(self, reason: str) -> List[Action]:
        """Leave on purpose: tell the tracker, end the job, exit."""
        return self._stop(reason, failed=False)

    def refused(self, reason: str) -> List[Action]:
        """The tracker will not have this device, whenever it asks: end the job, exit."""
        return self._stop(reason, failed=True)

    # ---- how it is handled -------------------------------------------------------------------------------------

    def _told(self, now: float) -> List[Action]:
        running = self._running
        if running is None or running.tell_at is None or now < running.tell_at or self._phase != "ready":
            return []
        running.tell_at = None
        if running.superseded or running.stage is None:
            return []
        return [Send(m.JobProgress(running.lease, running.stage))]

    def _dial(self, now: float) -> List[Action]:
        self._phase, self._alarm = "greeting", now + GREETING_S
        return [Open()]

    def _wait(self, now: float) -> List[Action]:
        if self._phase == "ready" and now - self._ready_since >= STABLE_S:
            self._attempt = 0
        delay = min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._attempt, 16))
        self._attempt += 1
        self._phase = "waiting"
        self._alarm = now + delay * (0.5 + 0.5 * self._jitter())
        return []

    def _welcomed(self, welcome: m.Welcome, now: float) -> List[Action]:
        self._phase, self._ready_since = "ready", now
        self._heartbeat_s = max(welcome.heartbeat_interval_ms, 100) / 1000
        self._alarm = now + self._heartbeat_s
        actions: List[Action] = [Send(finished) for finished in self._results.values()]
        running = self._running
        if running is not None and not running.superseded:
            actions.append(Send(m.JobStarted(running.lease)))
            if running.stage:
                running.tell_at = None
                actions.append(Send(m.JobProgress(running.lease, running.stage)))
        return actions

    def _refused(self, refused: m.Refused, now: float) -> List[Action]:
        if refused.retry:
            self._attempt = 16
            return [Close(), *self._wait(now)]
        return self._stop(f"the tracker refused this agent: {refused.reason}", failed=True)

    def _assigned(self, assign: m.AssignJob) -> List[Action]:
        lease = assign.lease
        held = next((other for other in self.held() if other.job_id == lease.job_id), None)
        if held is not None and held.epoch >= lease.epoch:
            return self._remind(lease) if held.epoch == lease.epoch else []
        actions: List[Action] = []
        # The same job under a newer lease: what the older one did, or does, counts no longer.
        actions += self._forget(lease.job_id)
        self._waiting = [job for job in self._waiting if job.lease.job_id != lease.job_id]
        if self._running is not None and self._running.lease.job_id == lease.job_id:
            self._running.superseded = True
            actions += self._cancel(self._running, "the job was assigned anew")
        self._waiting.append(_Job(lease, assign.spec))
        return actions + self._next()

    def _remind(self, lease: Lease) -> List[Action]:
        """The tracker assigned what this agent has already: say how far it is."""
        finished = self._results.get(lease.job_id)
        if finished is not None:
            return [Send(finished)]
        if self._running is not None and key(self._running.lease) == key(lease):
            return [Send(m.JobStarted(lease))]
        return []

    def _aborted(self, abort: m.AbortJob) -> List[Action]:
        lease = abort.lease
        for job in self._waiting:
            if job.lease.job_id == lease.job_id and lease.epoch >= job.lease.epoch:
                self._waiting.remove(job)
                return self._report(cancelled(job.lease, abort.reason))
        running = self._running
        if running is not None and running.lease.job_id == lease.job_id and lease.epoch >= running.lease.epoch:
            return self._cancel(running, abort.reason)
        finished = self._results.get(lease.job_id)
        if finished is not None and lease.epoch >= finished.lease.epoch:
            # Nobody wants it any more: what keeps it from being taken must not occupy the device.
            return self._report(cancelled(finished.lease, abort.reason))
        return []

    def _cancel(self, job: _Job, reason: str) -> List[Action]:
        if job.cancelling:
            return []
        job.cancelling = True
        return [CancelJob(job.lease, reason)]

    def _report(self, finished: m.JobFinished) -> List[Action]:
        self._results[finished.lease.job_id] = finished
        return [*([Send(finished)] if self._phase == "ready" else []), Keep(finished)]

    def _forget(self, job_id: str) -> List[Action]:
        finished = self._results.pop(job_id, None)
        return [] if finished is None else [Forget(finished.lease)]

    def _next(self) -> List[Action]:
        if self._running is not None or not self._waiting or self._phase == "stopped":
            return []
        job = self._waiting.pop(0)
        self._running = job
        # The word leaves first: later its sending would take the interpreter from the job's first steps.
        told: List[Action] = [Send(m.JobStarted(job.lease))] if self._phase == "ready" else []
        return [*told, StartJob(job.lease, job.spec)]

    def _stop(self, reason: str, *, failed: bool) -> List[Action]:
        if self._phase == "stopped":
            return []
        actions: List[Action] = []
        if self._running is not None:
            actions += self._cancel(self._running, reason)
        if self._phase == "ready" and not failed:
            actions.append(Send(m.Goodbye(reason)))
        self._phase, self._alarm = "stopped", None
        return [*actions, Close(), Exit(reason, failed)]


def cancelled(lease: Lease, reason: str) -> m.JobFinished:
    """The end of a job that was called off before it began."""
    return m.JobFinished(lease, JobResult(Outcome(OutcomeKind.CANCELLED, message=reason)))
