"""The jobs that are not done, and what is remembered of those that are. Pure; times are Unix milliseconds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kedge.rpc.outcome import Stage
from kedge.rpc.tracker.facts import JobAccepted, JobAssigned, LeaseKey
from kedge.rpc.tracker.scheduler import Queue, Want
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.types import DeviceFault, JobSpec, JobState, SessionTask, Task

#: Later than any time.
_NEVER = 1 << 62


@dataclass(slots=True)
class LiveJob:
    """A job that is not done."""

    accepted: JobAccepted
    want: Want
    queued_ms: int
    epoch: int = 0
    #: The highest that a device has named. A tracker that was killed may have handed out one that it had not stored.
    named_epoch: int = 0
    assigned: JobAssigned | None = None
    #: None after a restart of the tracker: nobody knows until the agent says.
    started: bool | None = False
    stage: Stage | None = None
    stage_ms: int = 0
    #: The assignment has left for its device, and the lease runs.
    sent: bool = False
    lease_ms: int = 0
    assigned_ms: int = 0
    requeues: int = 0
    faults: tuple[DeviceFault, ...] = ()
    cancelling: str | None = None
    cancel_ms: int = 0
    #: A session's client was heard of.
    client_ms: int = 0

    @property
    def is_session(self) -> bool:
        """A client holds the device with it, and nothing is computed without that client."""
        return isinstance(self.spec.task, SessionTask)

    @property
    def is_under_way(self) -> bool:
        """A session whose client has the device: what is there is nowhere else."""
        return self.is_session and self.stage is Stage.RUN

    @property
    def id(self) -> str:
        """Of the job."""
        return self.accepted.job_id

    @property
    def spec(self) -> JobSpec:
        """What it does."""
        return self.accepted.spec

    @property
    def key(self) -> LeaseKey:
        """Its newest lease."""
        return self.id, self.epoch

    @property
    def state(self) -> JobState:
        """Queued, assigned or running."""
        if self.assigned is None:
            return JobState.QUEUED
        return JobState.RUNNING if self.started else JobState.ASSIGNED

    @property
    def told(self) -> list[str]:
        """The devices that failed with it, in words."""
        return [f"device {fault.device}: {fault.reason}" for fault in self.faults]

    @property
    def stage_ends_ms(self) -> int:
        """When the agent is to have ended the stage that the job is in."""
        return self.stage_ms + self.spec.deadlines.of(self.stage or Stage.TRANSFER)

    def client_due_ms(self, rules: Settings) -> int:
        """When a session ends for want of its client; other jobs need none."""
        if not isinstance(self.spec.task, SessionTask):
            return _NEVER
        return self.client_ms + (self.spec.task.lease_ms or rules.session_lease_ms)

    def due_ms(self, rules: Settings) -> int:
        """When something has to happen to the job."""
        if self.assigned is None:
            return min(self.queued_ms + self.spec.deadlines.queue_ms, self.client_due_ms(rules))
        due = min(self.lease_ms, self.stage_ends_ms + rules.deadline_slack_ms)
        if self.cancelling is not None:
            # A session that lasted too long is being called off for that very reason.
            due = self.lease_ms if self.is_under_way else due
            return min(due, self.cancel_ms + rules.cancel_grace_ms)
        return min(due, self.client_due_ms(rules))


class Jobs:
    """Jobs by id, in the order in which they came, with the queue of those that wait.

    Args:
        remembered: so many of those that are done, and so many idempotency keys, are known.
    """

    def __init__(self, remembered: int) -> None:
        self._live: dict[str, LiveJob] = {}
        self.queue = Queue()
        self._remembered = remembered
        #: Ended jobs and the epoch whose result was taken (0: none was).
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._keys: OrderedDict[str, str] = OrderedDict()
        #: False when a key that `of_key` does not know may be stored all the same.
        self.knows_all_keys = True
        #: Bytes that jobs which are not done carry, by user.
        self._carried: Counter[str] = Counter()

    def __iter__(self) -> Iterator[LiveJob]:
        return iter(self._live.values())

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._live

    def __getitem__(self, job_id: str) -> LiveJob:
        return self._live[job_id]

    def get(self, job_id: str) -> LiveJob | None:
        """A job that is not done."""
        return self._live.get(job_id)

    def held_by(self, device: str) -> list[LiveJob]:
        """The jobs that a device has by right."""
        return [job for job in self if job.assigned is not None and job.assigned.device == device]

    def held_under(self, key: LeaseKey, device: str) -> LiveJob | None:
        """The job that a device has by right under this epoch."""
        job_id, epoch = key
        job = self._live.get(job_id)
        if job is None or job.epoch != epoch or job.assigned is None or job.assigned.device != device:
            return None
        return job

    def add(self, accepted: JobAccepted, now: int) -> LiveJob:
        """A job that was accepted; it is not in the queue yet."""
        job = LiveJob(accepted, Want(accepted.spec.selector, accepted.needs, accepted.user), now, client_ms=now)
        self._live[job.id] = job
        self._carried[accepted.user] += carries(accepted.spec)
        return job

    def line_up(self, job: LiveJob) -> None:
        """The job waits, for a device that has not failed with it if it can be."""
        job.want = replace(job.want, avoid=frozenset(fault.device for fault in job.faults))
        self.queue.push(job.id, job.want, job.spec.priority, job.accepted.seq)

    def remove(self, job: LiveJob) -> None:
        """The job is done, or never was: its user's jobs carry less."""
        del self._live[job.id]
        if job.id in self.queue:
            self.queue.remove(job.id)
        user = job.accepted.user
        self._carried[user] -= carries(job.spec)
        if not self._carried[user]:
            del self._carried[user]

    def carried(self, user: str) -> int:
        """Bytes of inputs within the specs of a user's jobs."""
        return self._carried[user]

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def ended(self, job_id: str) -> int:
        """The epoch whose result was taken of a job that is done; 0 where none was."""
        return self._ended.get(job_id, 0)

    def remember_end(self, job_id: str, epoch: int) -> None:
        """A job ended with the result of this epoch; 0 for none."""
        self._ended[job_id] = epoch
        while len(self._ended) > self._remembered:
            self._ended.popitem(last=False)

    def of_key(self, key: str) -> str | None:
        """The job that was submitted under this idempotency key."""
        return self._keys.get(key)

    def remember_key(self, key: str, job_id: str) -> None:
        """A job was submitted under this idempotency key; empty for none."""
        if key:
            self._keys[key] = job_id
        while len(self._keys) > self._remembered:
            self._keys.popitem(last=False)
            self.knows_all_keys = False

    def forget(self, job_ids: Iterable[str] = (), keys: Iterable[str] = ()) -> None:
        """These ended jobs and keys are kept no longer."""
        for job_id in job_ids:
            self._ended.pop(job_id, None)
        for key in keys:
            self._keys.pop(key, None)


def task_kind(task: Task) -> str:
    """What a job does, in a word: "run", "bench"."""
    return type(task).__name__.removesuffix("Task").lower()


def carries(spec: JobSpec) -> int:
    """Bytes of the inputs that are in a spec itself."""
    if isinstance(spec.task, SessionTask):
        return 0
    return sum(len(tensor.data) for tensor in spec.task.inputs if isinstance(tensor.data, bytes))
