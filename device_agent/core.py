"""What the agent decides: a state machine without sockets, threads or clocks. `agent.py` acts.

Every method takes the time in seconds of any steady clock and returns the actions to take, in order. The messages
are the protocol's own; nothing is translated here.

    waiting --Open--> greeting --Welcome--> ready --lost--> waiting ... --stop--> stopped

A lease is held from AssignJob until ResultAccepted names its job: through reconnects, and through a restart of the
tracker. One job runs at a time; an assignment that arrives while another job still winds down waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple, Union

from kedge.protos.v1 import agent_pb2, types_pb2

FIRST_DELAY_S = 0.2
LAST_DELAY_S = 5.0
#: A connection that lasted this long was a good one: the next attempt starts with a short delay again.
STABLE_S = 5.0
GREETING_S = 10.0


@dataclass(frozen=True)
class Open:
    """Dial the tracker; `connected` or `disconnected` tells how it went."""


@dataclass(frozen=True)
class Send:
    """Put a message on the stream. The shell adds the device's health to a heartbeat."""

    message: agent_pb2.AgentMessage


@dataclass(frozen=True)
class Close:
    """Drop the connection; the core expects no `disconnected` for it."""


@dataclass(frozen=True)
class StartJob:
    """Begin a job; `progress` and finally `finished` report on it."""

    lease: types_pb2.Lease
    spec: types_pb2.JobSpec


@dataclass(frozen=True)
class CancelJob:
    """End the running job soon; it still reports `finished`."""

    lease: types_pb2.Lease
    reason: str


@dataclass(frozen=True)
class Exit:
    """The agent is done. `failed` when it was not asked to."""

    reason: str
    failed: bool


Action = Union[Open, Send, Close, StartJob, CancelJob, Exit]
Key = Tuple[str, int]


def key(lease: types_pb2.Lease) -> Key:
    """A lease's identity: the job and the epoch."""
    return lease.job_id, lease.epoch


@dataclass
class _Job:
    lease: types_pb2.Lease
    spec: types_pb2.JobSpec
    stage: int = types_pb2.STAGE_UNSPECIFIED
    cancelling: bool = False


class AgentCore:
    """The agent's side of one stream, and of the work it holds.

    Args:
        hello: the greeting; its `running` is filled in at every connection.
        jitter: draws from [0, 1), so that a fleet does not reconnect in step.
    """

    def __init__(self, hello: agent_pb2.AgentHello, *, jitter: Callable[[], float]) -> None:
        self._hello = hello
        self._jitter = jitter
        self._phase = "new"
        self._running: Optional[_Job] = None
        self._waiting: List[_Job] = []
        self._results: Dict[str, agent_pb2.JobFinished] = {}
        self._attempt = 0
        self._alarm: Optional[float] = None
        self._heartbeat_s = 0.0
        self._ready_since = 0.0
        self._request_id = 0

    @property
    def phase(self) -> str:
        """new, waiting, greeting, ready or stopped."""
        return self._phase

    @property
    def running(self) -> Optional[types_pb2.Lease]:
        """The lease of the job that runs."""
        return None if self._running is None else self._running.lease

    def alarm(self) -> Optional[float]:
        """When to call `tick` at the latest; None while there is nothing to wait for."""
        return self._alarm

    def held(self) -> List[types_pb2.Lease]:
        """Every lease that is not settled: running, waiting, or finished and not yet accepted."""
        jobs = ([self._running] if self._running is not None else []) + self._waiting
        return [job.lease for job in jobs] + [finished.lease for finished in self._results.values()]

    # ---- what happens ------------------------------------------------------------------------------------------

    def start(self, now: float) -> List[Action]:
        """Begin: dial."""
        return self._dial(now)

    def connected(self, now: float) -> List[Action]:
        """The stream is open: greet, naming the work that is held."""
        if self._phase != "greeting":
            return []
        hello = agent_pb2.AgentHello()
        hello.CopyFrom(self._hello)
        hello.running.extend(self.held())
        self._request_id = 0
        self._alarm = now + GREETING_S
        return [self._send(hello=hello)]

    def disconnected(self, now: float) -> List[Action]:
        """The stream broke or never opened: wait a while, then dial again."""
        if self._phase in ("stopped", "waiting"):
            return []
        return self._wait(now)

    def tick(self, now: float) -> List[Action]:
        """The alarm: dial, give up on a greeting, or send a heartbeat."""
        if self._alarm is None or now < self._alarm:
            return []
        if self._phase == "waiting":
            return self._dial(now)
        if self._phase == "greeting":
            return [Close(), *self._wait(now)]
        self._alarm = now + self._heartbeat_s
        return [self._send(heartbeat=agent_pb2.Heartbeat(running=self.held()))]

    def received(self, message: agent_pb2.TrackerMessage, now: float) -> List[Action]:
        """A message from the tracker. One that this version does not know is ignored."""
        if self._phase not in ("greeting", "ready"):
            return []
        body = message.WhichOneof("body")
        if body == "welcome":
            return self._welcomed(message.welcome, now)
        if body == "refused":
            return self._refused(message.refused, now)
        if self._phase != "ready":
            return []
        if body == "assign_job":
            return self._assigned(message.assign_job)
        if body == "abort_job":
            return self._aborted(message.abort_job)
        if body == "result_accepted":
            self._results.pop(message.result_accepted.job_id, None)
        return []

    def progress(self, lease: types_pb2.Lease, stage: int) -> List[Action]:
        """The running job entered a stage."""
        if self._running is None or key(self._running.lease) != key(lease):
            return []
        self._running.stage = stage
        if self._phase != "ready":
            return []
        return [self._send(job_progress=agent_pb2.JobProgress(lease=lease, stage=types_pb2.Stage.ValueType(stage)))]

    def finished(self, lease: types_pb2.Lease, result: types_pb2.JobResult) -> List[Action]:
        """The running job ended. Its result is kept until the tracker has it."""
        if self._running is None or key(self._running.lease) != key(lease):
            raise ValueError(f"job {lease.job_id} is not the one that runs")
        self._running = None
        actions: List[Action] = []
        if not any(job.lease.job_id == lease.job_id for job in self._waiting):
            actions += self._report(lease, result)
        return actions + self._next()

    def stop(self, reason: str) -> List[Action]:
        """Leave on purpose: tell the tracker, end the job, exit."""
        return self._stop(reason, failed=False)

    # ---- how it is handled -------------------------------------------------------------------------------------

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

    def _welcomed(self, welcome: agent_pb2.Welcome, now: float) -> List[Action]:
        self._phase, self._ready_since = "ready", now
        self._heartbeat_s = max(welcome.heartbeat_interval_ms, 100) / 1000
        self._alarm = now + self._heartbeat_s
        actions: List[Action] = [self._send(job_finished=finished) for finished in self._results.values()]
        job = self._running
        if job is not None:
            actions.append(self._send(job_started=agent_pb2.JobStarted(lease=job.lease)))
            if job.stage:
                stage = types_pb2.Stage.ValueType(job.stage)
                actions.append(self._send(job_progress=agent_pb2.JobProgress(lease=job.lease, stage=stage)))
        return actions

    def _refused(self, refused: agent_pb2.Refused, now: float) -> List[Action]:
        if refused.retry:
            self._attempt = 16
            return [Close(), *self._wait(now)]
        return self._stop(f"the tracker refused this agent: {refused.reason}", failed=True)

    def _assigned(self, assign: agent_pb2.AssignJob) -> List[Action]:
        lease = assign.lease
        held = next((other for other in self.held() if other.job_id == lease.job_id), None)
        if held is not None and held.epoch >= lease.epoch:
            return self._remind(lease) if held.epoch == lease.epoch else []
        actions: List[Action] = []
        # The same job under a newer lease: what the older one did, or does, counts no longer.
        self._results.pop(lease.job_id, None)
        self._waiting = [job for job in self._waiting if job.lease.job_id != lease.job_id]
        if self._running is not None and self._running.lease.job_id == lease.job_id:
            actions += self._cancel(self._running, "the job was assigned anew")
        self._waiting.append(_Job(lease, assign.spec))
        return actions + self._next()

    def _remind(self, lease: types_pb2.Lease) -> List[Action]:
        """The tracker assigned what this agent has already: say how far it is."""
        finished = self._results.get(lease.job_id)
        if finished is not None:
            return [self._send(job_finished=finished)]
        if self._running is not None and key(self._running.lease) == key(lease):
            return [self._send(job_started=agent_pb2.JobStarted(lease=lease))]
        return []

    def _aborted(self, abort: agent_pb2.AbortJob) -> List[Action]:
        lease = abort.lease
        for job in self._waiting:
            if job.lease.job_id == lease.job_id and lease.epoch >= job.lease.epoch:
                self._waiting.remove(job)
                return self._report(job.lease, cancelled(abort.reason))
        job = self._running
        if job is not None and job.lease.job_id == lease.job_id and lease.epoch >= job.lease.epoch:
            return self._cancel(job, abort.reason)
        return []

    def _cancel(self, job: _Job, reason: str) -> List[Action]:
        if job.cancelling:
            return []
        job.cancelling = True
        return [CancelJob(job.lease, reason)]

    def _report(self, lease: types_pb2.Lease, result: types_pb2.JobResult) -> List[Action]:
        finished = agent_pb2.JobFinished(lease=lease, result=result)
        self._results[lease.job_id] = finished
        return [self._send(job_finished=finished)] if self._phase == "ready" else []

    def _next(self) -> List[Action]:
        if self._running is not None or not self._waiting or self._phase == "stopped":
            return []
        self._running = job = self._waiting.pop(0)
        actions: List[Action] = [StartJob(job.lease, job.spec)]
        if self._phase == "ready":
            actions.append(self._send(job_started=agent_pb2.JobStarted(lease=job.lease)))
        return actions

    def _stop(self, reason: str, *, failed: bool) -> List[Action]:
        if self._phase == "stopped":
            return []
        actions: List[Action] = []
        if self._running is not None:
            actions += self._cancel(self._running, reason)
        if self._phase == "ready" and not failed:
            actions.append(self._send(goodbye=agent_pb2.Goodbye(reason=reason)))
        self._phase, self._alarm = "stopped", None
        return [*actions, Close(), Exit(reason, failed)]

    def _send(self, **body: object) -> Send:
        self._request_id += 1
        return Send(agent_pb2.AgentMessage(request_id=self._request_id, **body))  # type: ignore[arg-type]


def cancelled(reason: str) -> types_pb2.JobResult:
    """The result of a job that was called off before it began."""
    outcome = types_pb2.Outcome(kind=types_pb2.OUTCOME_KIND_CANCELLED, message=reason)
    return types_pb2.JobResult(outcome=outcome)
