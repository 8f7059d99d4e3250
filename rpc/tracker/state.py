"""The tracker's mind: devices, jobs and leases as a state machine without sockets, threads, clocks or randomness.

Every method takes the time (Unix milliseconds that never go back) and returns `Effects`: facts to store, and messages
to send once those are stored. `restore` builds the state again from what was stored.

    queued --device--> assigned --JobStarted--> running --JobFinished--> done
       ^------ never began ----'                   '-- lease ran out, deadline, cancelled --> done

A lease is (job, epoch). The epoch grows with every assignment, and a message under another one changes nothing, so a
stale agent can harm nothing. A lease begins when its assignment leaves, which is not before it is stored; it is renewed
by every heartbeat that names it and outlives a lost connection for `lease_ms`. A device is idle when it is connected
and holds no lease, wanted or not.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from kedge.rpc import messages as m
from kedge.rpc.errors import UsageError
from kedge.rpc.names import check_name
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import accepts, local_protocol
from kedge.rpc.selector import Selector, labels_of, parse
from kedge.rpc.tracker.facts import (
    CloseAgent,
    DevicesChanged,
    Effects,
    JobAccepted,
    JobAssigned,
    JobCancelling,
    JobChanged,
    JobDone,
    JobRequeued,
    JobWithdrawn,
    Needs,
    Stored,
    ToAgent,
)
from kedge.rpc.tracker.scheduler import Queue, Want
from kedge.rpc.types import (
    Deadlines,
    DeviceInfo,
    DeviceState,
    DeviceStatus,
    Job,
    JobResult,
    JobSpec,
    JobState,
    Lease,
)

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """The tracker's times and limits. `deadlines` fills in what a job leaves open."""

    heartbeat_interval_ms: int = 3_000
    silence_ms: int = 10_000
    lease_ms: int = 15_000
    cancel_grace_ms: int = 10_000
    deadline_slack_ms: int = 5_000
    deadlines: Deadlines = field(
        default_factory=lambda: Deadlines(queue_ms=600_000, transfer_ms=300_000, load_ms=60_000, run_ms=300_000)
    )
    max_requeues: int = 2
    remembered_jobs: int = 100_000
    remembered_devices: int = 1_000


@dataclass(slots=True)
class _Job:
    accepted: JobAccepted
    want: Want
    queued_ms: int
    epoch: int = 0
    assigned: JobAssigned | None = None
    #: None after a restart of the tracker: nobody knows until the agent says.
    started: bool | None = False
    stage: Stage | None = None
    stage_ms: int = 0
    #: The assignment has left for its device, and the lease runs.
    sent: bool = False
    lease_ms: int = 0
    requeues: int = 0
    cancelling: str | None = None
    cancel_ms: int = 0

    @property
    def id(self) -> str:
        return self.accepted.job_id

    @property
    def spec(self) -> JobSpec:
        return self.accepted.spec

    @property
    def key(self) -> Key:
        return self.id, self.epoch


@dataclass(slots=True)
class _Device:
    info: DeviceInfo
    instance_id: str
    labels: dict[str, str]
    connection: int | None
    seen_ms: int
    idle_ms: int
    #: Leases that the agent holds or was given, wanted or not.
    holding: set[Key] = field(default_factory=set)
    #: Results that were taken, until a heartbeat no longer names them.
    settled: set[Key] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        return self.connection is not None and not self.holding


class TrackerState:
    """Everything the tracker knows about work that is not done, and about devices."""

    def __init__(self, tracker_id: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._tracker_id = tracker_id
        self._jobs: dict[str, _Job] = {}
        self._devices: dict[str, _Device] = {}
        self._connections: dict[int, str] = {}
        self._queue = Queue()
        self._seq = 0
        #: Ended jobs and the epoch whose result was taken (0: none was).
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._keys: OrderedDict[str, str] = OrderedDict()
        self._knows_all_keys = True
        self._alarms: list[tuple[int, str, str]] = []
        self._selectors: dict[str, Selector] = {}
        self._fits: dict[Want, dict[str, bool]] = {}

    # ---- Questions -------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> Job | None:
        """A job that is not done; None for any other."""
        job = self._jobs.get(job_id)
        return None if job is None else self._snapshot(job)

    def live_jobs(self) -> list[Job]:
        """Every job that is not done."""
        return [self._snapshot(job) for job in self._jobs.values()]

    def job_of_key(self, key: str) -> str | None:
        """The job that was submitted under this idempotency key."""
        return self._keys.get(key)

    @property
    def knows_all_keys(self) -> bool:
        """False when a key that `job_of_key` does not know may be stored all the same."""
        return self._knows_all_keys

    def devices(self, selector: str = "", *, include_gone: bool = False) -> list[DeviceStatus]:
        """Devices by name; raises SelectorError."""
        wanted = parse(selector)
        found = [device for device in self._devices.values() if wanted.matches(device.labels)]
        found = [device for device in found if include_gone or device.connection is not None]
        return sorted((self._status(device) for device in found), key=lambda status: status.info.name)

    def next_alarm(self) -> int | None:
        """When `tick` has to be called at the latest."""
        return self._alarms[0][0] if self._alarms else None

    def detail(self, job_id: str) -> str:
        """Why a queued job still waits; empty for any other."""
        job = self._jobs.get(job_id)
        if job is None or job.assigned is not None:
            return ""
        if job.cancelling is not None:
            return "being cancelled"
        return self._why_waiting(job.want)

    # ---- Clients ---------------------------------------------------------------------------------------------------

    def submit(self, job_id: str, spec: JobSpec, needs: Needs, key: str, now: int) -> Effects:
        """Accept a job. The caller has checked that `job_of_key(key)` is None and that the spec makes sense."""
        effects = Effects()
        self._seq += 1
        given, default = spec.deadlines, self.settings.deadlines
        deadlines = Deadlines(
            given.queue_ms or default.queue_ms,
            given.transfer_ms or default.transfer_ms,
            given.load_ms or default.load_ms,
            given.run_ms or default.run_ms,
        )
        accepted = JobAccepted(job_id, self._seq, replace(spec, deadlines=deadlines), needs, key, now)
        effects.facts.append(accepted)
        self._admit(accepted, now)
        self._remember_key(key, job_id)
        self._schedule(now, effects)
        return effects

    def cancel(self, job_id: str, reason: str, now: int) -> Effects:
        """Stop a job, at once where it waits; a device is asked to. Ended and unknown jobs stay as they are."""
        effects = Effects()
        job = self._jobs.get(job_id)
        if job is None or job.cancelling is not None:
            return effects
        if not job.sent:
            self._take_back(job, now, effects)
            self._end(job, OutcomeKind.CANCELLED, Stage.QUEUE, reason, now, effects)
            self._schedule(now, effects)
            return effects
        job.cancelling, job.cancel_ms = reason, now
        effects.facts.append(JobCancelling(job_id, reason))
        self._abort(job, reason, effects)
        self._watch_job(job)
        effects.sends.append(JobChanged(self._snapshot(job)))
        return effects

    def withdraw(self, job_id: str, key: str, now: int) -> Effects:
        """Undo `submit`, whose facts are not stored: the client was told that its job is not accepted."""
        effects = Effects()
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._take_back(job, now, effects)
        if job_id in self._queue:
            self._queue.remove(job_id)
        self._ended.pop(job_id, None)
        self._keys.pop(key, None)
        effects.facts.append(JobWithdrawn(job_id))
        self._schedule(now, effects)
        return effects

    def assignment_leaves(self, lease: Lease, now: int) -> bool:
        """An assignment is stored and about to be sent: its lease begins. False when it must not be: it is stale."""
        job = self._jobs.get(lease.job_id)
        if job is None or job.assigned is None or job.epoch != lease.epoch:
            return False
        job.stage_ms = now
        self._renew(job, now)
        return True

    # ---- Agents ----------------------------------------------------------------------------------------------------

    def connect(self, connection: int, hello: m.Hello, now: int) -> Effects:
        """An agent's first message on a new connection."""
        effects = Effects()
        name = hello.device.name
        known = self._devices.get(name)
        refusal = self._refusal(hello, known)
        if refusal is not None:
            effects.sends += [ToAgent(connection, refusal), CloseAgent(connection)]
            return effects
        if known is not None and known.connection is not None:
            # The same agent again: its old connection is dead, though nobody has noticed yet.
            effects.sends.append(CloseAgent(known.connection))
            del self._connections[known.connection]
        device = _Device(hello.device, hello.instance_id, labels_of(hello.device), connection, now, now)
        self._devices[name] = device
        self._connections[connection] = name
        for fits in self._fits.values():
            fits.pop(name, None)
        welcome = m.Welcome(local_protocol(), self._tracker_id, self.settings.heartbeat_interval_ms)
        effects.sends.append(ToAgent(connection, welcome))
        self._take_stock(device, hello, now, effects)
        self._alarm(now + self.settings.silence_ms, "device", name)
        effects.sends.append(DevicesChanged())
        self._schedule(now, effects)
        return effects

    def receive(self, connection: int, body: m.AgentBody, now: int) -> Effects:
        """Any later message of an agent. One from a connection that was given up changes nothing."""
        effects = Effects()
        name = self._connections.get(connection)
        if name is None:
            return effects
        device = self._devices[name]
        device.seen_ms = now
        if isinstance(body, m.Heartbeat):
            self._heartbeat(device, body, now, effects)
        elif isinstance(body, m.JobStarted):
            self._progress(device, body.lease, Stage.TRANSFER, now, effects)
        elif isinstance(body, m.JobProgress):
            self._progress(device, body.lease, body.stage, now, effects)
        elif isinstance(body, m.JobFinished):
            self._finished(device, body, now, effects)
        elif isinstance(body, m.Goodbye):
            self._goodbye(device, body, now, effects)
        else:
            refused = m.Refused("a second hello on one connection")
            effects.sends += [ToAgent(connection, refused), CloseAgent(connection)]
            self._part(device, now, effects)
        self._schedule(now, effects)
        return effects

    def disconnect(self, connection: int, now: int) -> Effects:
        """A connection ended. The agent's leases run on for a while: it may come back."""
        effects = Effects()
        name = self._connections.get(connection)
        if name is not None:
            self._part(self._devices[name], now, effects)
        return effects

    # ---- Time ------------------------------------------------------------------------------------------------------

    def tick(self, now: int) -> Effects:
        """Do what is due: deadlines, leases, cancellations that nobody confirmed, connections gone silent."""
        effects = Effects()
        while self._alarms and self._alarms[0][0] <= now:
            _, kind, name = heapq.heappop(self._alarms)
            if kind == "job" and name in self._jobs:
                self._check_job(self._jobs[name], now, effects)
            elif kind == "device":
                self._check_device(name, now, effects)
        self._schedule(now, effects)
        return effects

    # ---- Restart ---------------------------------------------------------------------------------------------------

    def restore(self, stored: Stored, now: int) -> None:
        """Take over what an earlier tracker stored: jobs that are not done, ended ones, idempotency keys.

        Assigned jobs keep their lease for `lease_ms` from now: their agents reconnect and name it.
        """
        self._seq = stored.last_seq
        for record in sorted(stored.records, key=lambda record: record.accepted.seq):
            accepted = record.accepted
            job = self._admit(accepted, now, queued=record.assigned is None)
            job.queued_ms, job.requeues = accepted.submitted_ms, 0
            if record.requeued is not None:
                job.queued_ms, job.requeues = record.requeued.queued_ms, record.requeued.requeues
            # Nobody could take it while the tracker was away: it waits at least until the agents are back.
            job.queued_ms = max(job.queued_ms, now + self.settings.lease_ms - accepted.spec.deadlines.queue_ms)
            job.epoch, job.assigned, job.cancelling = record.epoch, record.assigned, record.cancelling
            if record.assigned is not None:
                job.started, job.stage, job.stage_ms = None, Stage.TRANSFER, now
                job.cancel_ms = now
                self._renew(job, now)
            else:
                self._watch_job(job)
        for job_id, epoch in stored.ended:
            self._remember_end(job_id, epoch)
        self._knows_all_keys = stored.all_keys
        for key, job_id in stored.keys:
            self._remember_key(key, job_id)

    # ---- Devices ---------------------------------------------------------------------------------------------------

    def _refusal(self, hello: m.Hello, known: _Device | None) -> m.Refused | None:
        name = hello.device.name
        if not accepts(hello.protocol.version):
            ours = local_protocol().version
            reason = f"it speaks protocol {hello.protocol.version}, this tracker {ours}; update the older one"
            return m.Refused(reason)
        try:
            check_name(name)
        except UsageError as error:
            return m.Refused(f"{error.message}: {error.hint}")
        if known is not None and known.connection is not None and known.instance_id != hello.instance_id:
            return m.Refused(f"another device is connected as {name!r}; start this one with another --name", retry=True)
        return None

    def _take_stock(self, device: _Device, hello: m.Hello, now: int, effects: Effects) -> None:
        """After a (re)connection: renew the leases that the agent still holds, give up those that it does not."""
        device.holding = {(lease.job_id, lease.epoch) for lease in hello.running}
        for job_id, epoch in sorted(device.holding):
            job = self._current(device, job_id, epoch)
            if job is None:
                lease = Lease(job_id, epoch)
                effects.sends.append(ToAgent(_connection(device), m.AbortJob(lease, "the lease is not current")))
                continue
            self._renew(job, now)
            self._watch_job(job)
            if job.cancelling is not None:
                self._abort(job, job.cancelling, effects)
        for job in [job for job in self._jobs.values() if self._owns(device, job) and job.key not in device.holding]:
            same = job.assigned is not None and job.assigned.instance_id == hello.instance_id
            # An agent holds a lease until its result is accepted: one that does not know it never received it.
            never_began = not job.started if same else job.started is False
            self._give_up(job, never_began, "the agent was restarted", now, effects)

    def _heartbeat(self, device: _Device, beat: m.Heartbeat, now: int, effects: Effects) -> None:
        listed = {(lease.job_id, lease.epoch) for lease in beat.running}
        device.settled &= listed
        for job_id, epoch in sorted(listed - device.settled):
            job = self._current(device, job_id, epoch)
            if job is not None:
                self._renew(job, now)
            else:
                lease = Lease(job_id, epoch)
                effects.sends.append(ToAgent(_connection(device), m.AbortJob(lease, "the lease is not current")))
        was_idle = device.idle
        # An assignment that crossed this heartbeat on the wire is not in it, and still stands.
        crossed = {key for key in device.holding - listed if self._current(device, *key) is not None}
        device.holding = (listed - device.settled) | crossed
        self._mark(device, was_idle, now, effects)

    def _goodbye(self, device: _Device, goodbye: m.Goodbye, now: int, effects: Effects) -> None:
        self._part(device, now, effects)
        why = f"the agent stopped ({goodbye.reason})" if goodbye.reason else "the agent stopped"
        for job in [job for job in self._jobs.values() if self._owns(device, job)]:
            self._give_up(job, job.started is False, why, now, effects)

    def _part(self, device: _Device, now: int, effects: Effects) -> None:
        """The device is no longer connected."""
        del self._connections[_connection(device)]
        device.connection, device.seen_ms = None, now
        effects.sends.append(DevicesChanged())
        gone = [name for name, other in self._devices.items() if other.connection is None]
        for name in gone[: max(0, len(gone) - self.settings.remembered_devices)]:
            del self._devices[name]

    def _mark(self, device: _Device, was_idle: bool, now: int, effects: Effects) -> None:
        if device.idle != was_idle:
            device.idle_ms = now
            effects.sends.append(DevicesChanged())

    def _check_device(self, name: str, now: int, effects: Effects) -> None:
        device = self._devices.get(name)
        if device is None or device.connection is None:
            return
        due = device.seen_ms + self.settings.silence_ms
        if now >= due:
            effects.sends.append(CloseAgent(device.connection))
            self._part(device, now, effects)
        else:
            self._alarm(due, "device", name)

    # ---- Jobs ------------------------------------------------------------------------------------------------------

    def _admit(self, accepted: JobAccepted, now: int, *, queued: bool = True) -> _Job:
        job = _Job(accepted, Want(accepted.spec.selector, accepted.needs), now)
        self._jobs[job.id] = job
        if queued:
            self._queue.push(job.id, job.want, accepted.spec.priority, accepted.seq)
            self._watch_job(job)
        return job

    def _schedule(self, now: int, effects: Effects) -> None:
        if not len(self._queue):
            return
        idle = sorted((d for d in self._devices.values() if d.idle), key=lambda d: (d.idle_ms, d.info.name))
        if not idle:
            return
        for job_id, name in self._queue.assign([device.info.name for device in idle], self._matches):
            job, device = self._jobs[job_id], self._devices[name]
            job.epoch += 1
            job.assigned = JobAssigned(job_id, name, device.instance_id, job.epoch)
            job.sent, job.started, job.stage, job.stage_ms = False, False, Stage.TRANSFER, now
            device.holding.add(job.key)
            effects.facts.append(job.assigned)
            lease = Lease(job_id, job.epoch, self.settings.lease_ms)
            effects.sends.append(ToAgent(_connection(device), m.AssignJob(lease, job.spec)))
            effects.sends += [JobChanged(self._snapshot(job)), DevicesChanged()]

    def _progress(self, device: _Device, lease: Lease, stage: Stage, now: int, effects: Effects) -> None:
        job = self._current(device, lease.job_id, lease.epoch)
        if job is None:
            return
        self._renew(job, now)
        if job.started and job.stage is stage:
            return
        job.started, job.stage, job.stage_ms = True, stage, now
        self._watch_job(job)
        effects.sends.append(JobChanged(self._snapshot(job)))

    def _finished(self, device: _Device, finished: m.JobFinished, now: int, effects: Effects) -> None:
        lease = finished.lease
        key = (lease.job_id, lease.epoch)
        was_idle = device.idle
        device.holding.discard(key)
        device.settled.add(key)
        job = self._current(device, *key)
        stale = job is None and self._ended.get(lease.job_id, 0) != lease.epoch
        if job is not None:
            self._finish(job, replace(finished.result, device=device.info.name), job.epoch, now, effects)
        effects.sends.append(ToAgent(_connection(device), m.ResultAccepted(lease.job_id, stale)))
        self._mark(device, was_idle, now, effects)

    def _renew(self, job: _Job, now: int) -> None:
        """The device has the lease: it lasts from now on."""
        begins = not job.sent
        job.sent, job.lease_ms = True, now + self.settings.lease_ms
        if begins:
            self._watch_job(job)

    def _check_job(self, job: _Job, now: int, effects: Effects) -> None:
        if job.assigned is not None and not job.sent:
            return
        due = self._due(job)
        if now < due:
            self._alarm(due, "job", job.id)
        elif job.assigned is None:
            why = f"it waited {_seconds(job.spec.deadlines.queue_ms)} ({self._why_waiting(job.want)})"
            self._end(job, OutcomeKind.TIMEOUT, Stage.QUEUE, why, now, effects)
        elif job.cancelling is not None and now >= job.cancel_ms + self.settings.cancel_grace_ms:
            why = f"{job.cancelling} (the device did not confirm)"
            self._end(job, OutcomeKind.CANCELLED, job.stage, why, now, effects)
        elif now >= job.lease_ms:
            why = "nothing was heard of it for as long as its lease lasts"
            self._give_up(job, job.started is False, why, now, effects)
        else:
            stage = job.stage or Stage.TRANSFER
            limit = _seconds(job.spec.deadlines.of(stage))
            self._abort(job, f"the {stage} deadline passed", effects)
            why = f"stage {stage} took longer than {limit}, and the agent did not end it"
            self._end(job, OutcomeKind.TIMEOUT, stage, why, now, effects)

    def _give_up(self, job: _Job, never_began: bool, why: str, now: int, effects: Effects) -> None:
        """The device that had the job cannot be relied on any more: queue it again, or call it lost."""
        assert job.assigned is not None
        name = job.assigned.device
        device = self._devices.get(name)
        if job.cancelling is not None:
            self._end(job, OutcomeKind.CANCELLED, job.stage, job.cancelling, now, effects)
        elif never_began and (job.requeues < self.settings.max_requeues or not job.sent):
            self._release(device, job.key, now, effects)
            job.requeues += job.sent
            job.assigned, job.sent, job.started, job.stage, job.queued_ms = None, False, False, None, now
            effects.facts.append(JobRequeued(job.id, now, job.requeues))
            self._queue.push(job.id, job.want, job.spec.priority, job.accepted.seq)
            self._watch_job(job)
            effects.sends.append(JobChanged(self._snapshot(job)))
        else:
            self._release(device, job.key, now, effects)
            self._end(job, OutcomeKind.DEVICE_LOST, job.stage, f"device {name}: {why}", now, effects)

    def _take_back(self, job: _Job, now: int, effects: Effects) -> None:
        """The device of an assignment that never left is free again."""
        if job.assigned is not None:
            self._release(self._devices.get(job.assigned.device), job.key, now, effects)

    def _release(self, device: _Device | None, key: Key, now: int, effects: Effects) -> None:
        if device is not None:
            was_idle = device.idle
            device.holding.discard(key)
            self._mark(device, was_idle, now, effects)

    def _end(self, job: _Job, kind: OutcomeKind, stage: Stage | None, why: str, now: int, effects: Effects) -> None:
        """The tracker's own verdict on a job."""
        device = job.assigned.device if job.assigned else ""
        self._finish(job, JobResult(Outcome(kind, stage, message=why), device=device), 0, now, effects)

    def _finish(self, job: _Job, result: JobResult, epoch: int, now: int, effects: Effects) -> None:
        del self._jobs[job.id]
        if job.id in self._queue:
            self._queue.remove(job.id)
        self._remember_end(job.id, epoch)
        effects.facts.append(JobDone(job.id, result, now))
        submitted = job.accepted.submitted_ms
        done = Job(job.id, job.spec, JobState.DONE, None, result.device, result, submitted, now)
        effects.sends.append(JobChanged(done))

    def _abort(self, job: _Job, reason: str, effects: Effects) -> None:
        """Ask the device to stop a job, if it can be reached."""
        device = self._devices.get(job.assigned.device) if job.assigned else None
        if device is not None and device.connection is not None:
            effects.sends.append(ToAgent(device.connection, m.AbortJob(Lease(job.id, job.epoch), reason)))

    def _current(self, device: _Device, job_id: str, epoch: int) -> _Job | None:
        """The job that this device holds under this epoch by right."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.epoch == epoch and self._owns(device, job) else None

    def _owns(self, device: _Device, job: _Job) -> bool:
        return job.assigned is not None and job.assigned.device == device.info.name

    # ---- Deadlines -------------------------------------------------------------------------------------------------

    def _due(self, job: _Job) -> int:
        """When something has to happen to the job."""
        if job.assigned is None:
            return job.queued_ms + job.spec.deadlines.queue_ms
        stage = job.stage or Stage.TRANSFER
        due = min(job.lease_ms, job.stage_ms + job.spec.deadlines.of(stage) + self.settings.deadline_slack_ms)
        return due if job.cancelling is None else min(due, job.cancel_ms + self.settings.cancel_grace_ms)

    def _watch_job(self, job: _Job) -> None:
        self._alarm(self._due(job), "job", job.id)

    def _alarm(self, when: int, kind: str, name: str) -> None:
        """Look at a job or a device then; what is looked at too early is looked at again."""
        heapq.heappush(self._alarms, (when, kind, name))

    # ---- Matching --------------------------------------------------------------------------------------------------

    def _matches(self, want: Want, name: str) -> bool:
        if len(self._fits) > 1_000:
            self._fits.clear()
        fits = self._fits.setdefault(want, {})
        if name not in fits:
            device = self._devices[name]
            fits[name] = self._selector(want.selector).matches(device.labels) and can_run(want.needs, device.info)
        return fits[name]

    def _selector(self, text: str) -> Selector:
        if text not in self._selectors:
            if len(self._selectors) > 1_000:
                self._selectors.clear()
            self._selectors[text] = parse(text)
        return self._selectors[text]

    def _why_waiting(self, want: Want) -> str:
        here = [device for device in self._devices.values() if device.connection is not None]
        if not here:
            return "no device is connected"
        selector = self._selector(want.selector)
        chosen = [device for device in here if selector.matches(device.labels)]
        if not chosen:
            gone = sum(selector.matches(d.labels) for d in self._devices.values() if d.connection is None)
            return f"no connected device matches {want.selector!r}" + (f" ({gone} that left would)" if gone else "")
        able = [device for device in chosen if can_run(want.needs, device.info)]
        if not able:
            archs = ", ".join(sorted({str(need) for need in want.needs}))
            names = ", ".join(f"{d.info.name} is {_machine(d.info)}" for d in chosen[:3])
            return f"no matching device can run the artifact (it is for {archs}; {names})"
        return "1 matching device is busy" if len(able) == 1 else f"{len(able)} matching devices are busy"

    # ---- Pictures --------------------------------------------------------------------------------------------------

    def _snapshot(self, job: _Job) -> Job:
        if job.assigned is None:
            state, device = JobState.QUEUED, ""
        else:
            state, device = (JobState.RUNNING if job.started else JobState.ASSIGNED), job.assigned.device
        stage = job.stage if state is JobState.RUNNING else None
        submitted, detail = job.accepted.submitted_ms, self.detail(job.id)
        return Job(job.id, job.spec, state, stage, device, None, submitted, 0, detail)

    def _status(self, device: _Device) -> DeviceStatus:
        state = DeviceState.IDLE if device.idle else DeviceState.BUSY
        if device.connection is None:
            state = DeviceState.GONE
        running = next((job_id for job_id, epoch in device.holding if self._current(device, job_id, epoch)), "")
        return DeviceStatus(device.info, state, device.seen_ms, running)

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _remember_end(self, job_id: str, epoch: int) -> None:
        self._ended[job_id] = epoch
        while len(self._ended) > self.settings.remembered_jobs:
            self._ended.popitem(last=False)

    def _remember_key(self, key: str, job_id: str) -> None:
        if key:
            self._keys[key] = job_id
        while len(self._keys) > self.settings.remembered_jobs:
            self._keys.popitem(last=False)
            self._knows_all_keys = False


def can_run(needs: Needs, info: DeviceInfo) -> bool:
    """Has the device the architecture, the CPU features and the GPU of any variant?"""
    return any(need.is_met_by(info) for need in needs)


def _machine(info: DeviceInfo) -> str:
    kinds = sorted({gpu.kind for gpu in info.accelerators})
    return f"{info.arch} with {', '.join(kinds)}" if kinds else info.arch


def _connection(device: _Device) -> int:
    assert device.connection is not None
    return device.connection


def _seconds(ms: int) -> str:
    return f"{ms / 1000:g} s"
