"""The tracker's mind: devices, jobs and leases as a state machine without sockets, threads, clocks or randomness.

Every method takes the time (Unix milliseconds that never go back) and returns `Effects`: facts to store, and messages
to send once those are stored. `restore` builds the state again from what was stored.

    queued --device--> assigned --JobStarted--> running --JobFinished--> done
       ^------ never began ----'                   '-- lease ran out, deadline, cancelled --> done

When a device fails, its job goes to another one, until `max_device_faults` have failed with it: then the job is to
blame, and ends.

A lease is (job, epoch). The epoch grows with every assignment, and a message under another one changes nothing, so a
stale agent can harm nothing. A lease begins when its assignment leaves, which is not before it is stored; it is renewed
by every heartbeat that names it and outlives a lost connection for `lease_ms`.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kedge.rpc import messages as m
from kedge.rpc.errors import NoDeviceError, UsageError
from kedge.rpc.limits import check_number
from kedge.rpc.names import check_name
from kedge.rpc.noise import Noise
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import accepts, local_protocol
from kedge.rpc.selector import labels_of, parse
from kedge.rpc.status import QueueFullError
from kedge.rpc.tracker.devices import Breaker, Device, Key, Quarantine, Roster, Suspicion, conditions_of, unseen_device
from kedge.rpc.tracker.estimate import Durations, Wait, waits
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
    NoiseKept,
    ReservationEnded,
    Reserved,
    Serviced,
    ServiceEnded,
    Stored,
    ToAgent,
)
from kedge.rpc.tracker.scheduler import Queue, Shares, Want
from kedge.rpc.types import (
    Deadlines,
    DeviceFault,
    DeviceStatus,
    Job,
    JobResult,
    JobSpec,
    JobState,
    Lease,
    NoiseSample,
    Protocol,
    Reservation,
    SessionTask,
    Task,
)

#: So many, in so many lines, can be told anew how long they wait whenever one of them starts.
_FEW_JOBS = 500
_FEW_LINES = 50
#: Later than any time.
_NEVER = 1 << 62
#: So many leases of one job may have been handed out, and not stored, when a tracker is killed; devices that name
#: higher ones are not believed.
_UNSTORED_EPOCHS = 16
#: Alarms that are of no use any more are dropped when they are more than all others, and this many.
_SPARE_ALARMS = 64
#: Outcomes that may be the device's doing as well as the artifact's: nobody can tell from one job.
_SUSPICIOUS = (OutcomeKind.TIMEOUT, OutcomeKind.CRASH, OutcomeKind.LOAD_ERROR, OutcomeKind.OUT_OF_MEMORY)


@dataclass(frozen=True, slots=True)
class Settings:
    """The tracker's times and limits. `deadlines` fills in what a job leaves open."""

    heartbeat_interval_ms: int = 3_000
    silence_ms: int = 10_000
    lease_ms: int = 15_000
    #: Without a word from its client a session ends; and however much is said, after this time.
    session_lease_ms: int = 10_000
    longest_session_ms: int = 12 * 3_600_000
    cancel_grace_ms: int = 10_000
    deadline_slack_ms: int = 5_000
    deadlines: Deadlines = field(
        default_factory=lambda: Deadlines(queue_ms=600_000, transfer_ms=300_000, load_ms=60_000, run_ms=300_000)
    )
    #: No job may ask for more.
    longest: Deadlines = field(
        default_factory=lambda: Deadlines(
            queue_ms=30 * 86_400_000, transfer_ms=86_400_000, load_ms=86_400_000, run_ms=7 * 86_400_000
        )
    )
    max_requeues: int = 2
    #: After so many devices that failed with it, a job is not given to another one.
    max_device_faults: int = 2
    #: So many jobs in a row that fail for the device's sake put it into quarantine, at first for so long; and so many
    #: that end badly for any reason, if their users and artifacts all differ.
    quarantine_after: int = 3
    quarantine_ms: int = 60_000
    longest_quarantine_ms: int = 3_600_000
    fair_half_life_ms: int = 600_000
    max_queued_per_user: int = 20_000
    #: Of inputs within specs, which are in memory until their jobs are done; those of further jobs become blobs.
    max_carried_bytes_per_user: int = 256 << 20
    #: Selectors, and needs of artifacts, that differ.
    max_wants_per_user: int = 1_000
    #: Where all users together have so many, each may only have an equal share of it: a plan looks at all of them.
    max_wants: int = 5_000
    max_reservation_ms: int = 7 * 86_400_000
    max_reservation_ahead_ms: int = 366 * 86_400_000
    max_reservations_per_user: int = 16
    remembered_jobs: int = 100_000
    remembered_devices: int = 1_000


@dataclass(slots=True)
class _Job:
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
        return isinstance(self.spec.task, SessionTask)

    @property
    def is_under_way(self) -> bool:
        """A session whose client has the device: what is there is nowhere else."""
        return self.is_session and self.stage is Stage.RUN

    @property
    def id(self) -> str:
        return self.accepted.job_id

    @property
    def spec(self) -> JobSpec:
        return self.accepted.spec

    @property
    def key(self) -> Key:
        return self.id, self.epoch

    @property
    def state(self) -> JobState:
        if self.assigned is None:
            return JobState.QUEUED
        return JobState.RUNNING if self.started else JobState.ASSIGNED


class TrackerState:
    """Everything the tracker knows about work that is not done, and about devices."""

    def __init__(self, tracker_id: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._tracker_id = tracker_id
        self._jobs: dict[str, _Job] = {}
        self._devices = Roster()
        rules = self.settings
        self._quarantine = Quarantine(rules.quarantine_after, rules.quarantine_ms, rules.longest_quarantine_ms)
        self._shares = Shares(self.settings.fair_half_life_ms)
        self._durations = Durations()
        self._known_waits: tuple[tuple[int, int], dict[str, Wait]] | None = None
        #: Of the newest event: questions are answered as of then, and whatever changes by itself has an alarm.
        self._now = 0
        self._connections: dict[int, str] = {}
        self._queue = Queue()
        self._seq = 0
        #: Ended jobs and the epoch whose result was taken (0: none was).
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._keys: OrderedDict[str, str] = OrderedDict()
        self._knows_all_keys = True
        self._alarms: list[tuple[int, str, str]] = []
        #: How many were of use when they were last looked through.
        self._kept_alarms = 0
        #: The version of the queue that was last looked through for jobs that can start.
        self._planned = 0
        #: Bytes that jobs which are not done carry, by user.
        self._carried: Counter[str] = Counter()

    # ---- Questions -------------------------------------------------------------------------------------------------

    def job(self, job_id: str, reasons: dict[Want, str] | None = None) -> Job | None:
        """A job that is not done; None for any other. `reasons` keeps what many jobs wait for, between calls."""
        job = self._jobs.get(job_id)
        return None if job is None else self._snapshot(job, reasons)

    def lives(self, job_id: str) -> bool:
        """Whether there is such a job that is not done."""
        return job_id in self._jobs

    def live_jobs(self) -> list[Job]:
        """Every job that is not done."""
        return [self._snapshot(job) for job in self._jobs.values()]

    def census(self) -> Counter[tuple[JobState, str]]:
        """How many jobs are not done, by state and kind of task."""
        return Counter((job.state, task_kind(job.spec.task)) for job in self._jobs.values())

    def job_of_key(self, key: str) -> str | None:
        """The job that was submitted under this idempotency key."""
        return self._keys.get(key)

    def held_by(self, device: str) -> dict[Key, JobAccepted]:
        """The jobs that a device has by right, by lease."""
        jobs = (job for job in self._jobs.values() if job.assigned is not None and job.assigned.device == device)
        return {job.key: job.accepted for job in jobs}

    def held_under(self, lease: Lease, device: str) -> JobAccepted | None:
        """The job that the device has by right under this lease."""
        job = self._jobs.get(lease.job_id)
        if job is None or job.epoch != lease.epoch or job.assigned is None or job.assigned.device != device:
            return None
        return job.accepted

    @property
    def knows_all_keys(self) -> bool:
        """False when a key that `job_of_key` does not know may be stored all the same."""
        return self._knows_all_keys

    def devices(self, selector: str = "", *, include_gone: bool = False) -> list[DeviceStatus]:
        """Devices by name; raises SelectorError."""
        wanted = parse(selector)
        known = [*self._devices, *(self._devices.unseen() if include_gone else ())]
        found = [device for device in known if wanted.matches(device.labels)]
        found = [device for device in found if include_gone or device.connection is not None]
        return sorted((self._status(device) for device in found), key=lambda status: status.info.name)

    def device(self, name: str) -> DeviceStatus:
        """One device, known or not."""
        return self._status(self._devices.get(name) or unseen_device(name))

    def agents(self) -> dict[str, Protocol]:
        """What each connected device speaks."""
        return {device.info.name: device.protocol for device in self._devices if device.connection is not None}

    def check_room(self, spec: JobSpec, needs: Needs, user: str) -> None:
        """A user may have one more job like this; raises QueueFullError, and InputError for what no job may have."""
        rules, whose, longest = self.settings, user or "this user", self._longest(spec)
        for name in Deadlines.__dataclass_fields__:
            given, most = getattr(spec.deadlines, name), getattr(longest, name)
            check_number(f"the deadline {name}", given, 0, most, "0 means the tracker's default")
        if self._queue.count(user) >= rules.max_queued_per_user:
            raise QueueFullError(
                f"{rules.max_queued_per_user} jobs of {whose} wait already", hint="wait, or cancel some"
            )
        most, has = rules.max_wants_per_user, self._queue.count_wants(user)
        if self._queue.lines >= rules.max_wants:
            most = min(most, rules.max_wants // self._queue.users_with(user))
        if has >= most and not self._queue.has(Want(spec.selector, needs, user)):
            raise QueueFullError(
                f"jobs of {whose} wait for {has} different selections of devices already, and may for {most} now",
                hint="wait for some of them to start, or submit jobs with the same selector",
            )

    def may_carry(self, spec: JobSpec, user: str) -> bool:
        """Whether one more job like this may have its inputs within its spec; else they belong into blobs."""
        return self._carried[user] + _carries(spec) <= self.settings.max_carried_bytes_per_user

    def _longest(self, spec: JobSpec) -> Deadlines:
        """What the deadlines of such a job may be."""
        rules = self.settings
        is_session = isinstance(spec.task, SessionTask)
        return replace(rules.longest, run_ms=rules.longest_session_ms) if is_session else rules.longest

    def reservations(self) -> list[Reservation]:
        """All that have not ended, the next one first."""
        return sorted(self._devices.reservations(), key=lambda item: (item.from_unix_ms, item.device))

    def device_known(self, name: str) -> bool:
        """Whether a device of this name was ever connected, as far as is remembered."""
        return self._devices.get(name) is not None

    def device_named(self, name: str) -> bool:
        """Whether there is such a device: known, or in maintenance or reserved since before the tracker's start."""
        return self.device_known(name) or any(device.info.name == name for device in self._devices.unseen())

    def next_alarm(self) -> int | None:
        """When `tick` has to be called at the latest."""
        return self._alarms[0][0] if self._alarms else None

    def detail(self, job_id: str) -> str:
        """Why a queued job still waits; empty for any other."""
        job = self._jobs.get(job_id)
        return "" if job is None else self._detail(job, {})

    def still_waiting(self, job_id: str, reasons: dict[Want, str]) -> Job | None:
        """A queued job as it is now; None for any other. `reasons` as for `job`."""
        job = self._jobs.get(job_id)
        return None if job is None or job.assigned is not None else self._snapshot(job, reasons)

    def _detail(self, job: _Job, reasons: dict[Want, str]) -> str:
        if job.assigned is not None:
            return ""
        if job.cancelling is not None:
            return "being cancelled"
        if job.want not in reasons:
            reasons[job.want] = self._devices.why_waiting(job.want, self._now)
        return "; ".join([*_told(job.faults), reasons[job.want]])

    # ---- Clients ---------------------------------------------------------------------------------------------------

    def submit(self, job_id: str, spec: JobSpec, needs: Needs, key: str, now: int, user: str = "") -> Effects:
        """Accept a job.

        The caller has checked that `job_of_key(key)` is None, that the spec makes sense, and `check_room`.
        """
        effects = self._begin(now)
        self._seq += 1
        longest = self._longest(spec)
        default = self.settings.deadlines
        if isinstance(spec.task, SessionTask):
            default = replace(default, run_ms=longest.run_ms)
        deadlines = Deadlines(
            *(
                getattr(spec.deadlines, name) or min(getattr(default, name), getattr(longest, name))
                for name in Deadlines.__dataclass_fields__
            )
        )
        accepted = JobAccepted(job_id, self._seq, replace(spec, deadlines=deadlines), needs, key, now, user)
        effects.facts.append(accepted)
        self._admit(accepted, now)
        self._remember_key(key, job_id)
        self._schedule(now, effects)
        return effects

    def cancel(self, job_id: str, reason: str, now: int) -> Effects:
        """Stop a job, at once where it waits; a device is asked to. Ended and unknown jobs stay as they are."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is None or job.cancelling is not None:
            return effects
        self._call_off(job, reason, now, effects)
        self._schedule(now, effects)
        return effects

    def _call_off(self, job: _Job, reason: str, now: int, effects: Effects) -> None:
        if not job.sent:
            self._take_back(job, now, effects)
            self._end(job, OutcomeKind.CANCELLED, Stage.QUEUE, reason, now, effects)
            return
        job.cancelling, job.cancel_ms = reason, now
        effects.facts.append(JobCancelling(job.id, reason))
        self._abort(job, reason, effects)
        self._watch_job(job)
        effects.sends.append(JobChanged(self._snapshot(job)))

    def withdraw(self, job_id: str, key: str, now: int) -> Effects:
        """Undo `submit`, whose facts are not stored: the client was told that its job is not accepted."""
        effects = self._begin(now)
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._take_back(job, now, effects)
            self._leave(job, now)
            self._put_down(job)
        if job_id in self._queue:
            self._queue.remove(job_id)
        self._ended.pop(job_id, None)
        self._keys.pop(key, None)
        effects.facts.append(JobWithdrawn(job_id))
        self._schedule(now, effects)
        return effects

    def forget_keys(self, keys: Iterable[str]) -> None:
        """The jobs of these idempotency keys are kept no longer."""
        for key in keys:
            self._keys.pop(key, None)

    def assignment_leaves(self, lease: Lease, now: int) -> bool:
        """An assignment is about to be sent: its lease begins. False when it must not be: it is stale."""
        self._now = now
        job = self._jobs.get(lease.job_id)
        if job is None or job.assigned is None or job.epoch != lease.epoch:
            return False
        job.stage_ms = now
        self._renew(job, now)
        return True

    # ---- Sessions --------------------------------------------------------------------------------------------------

    def session_of(self, job_id: str, epoch: int) -> tuple[str, JobAccepted] | None:
        """The device that holds a session under this epoch by right, and whose session it is."""
        job = self._jobs.get(job_id)
        if job is None or not job.is_session or job.assigned is None or job.epoch != epoch:
            return None
        return job.assigned.device, job.accepted

    def session_heard(self, job_id: str, now: int) -> None:
        """Its client said something: the lease of the session lasts from now on."""
        self._now = now
        job = self._jobs.get(job_id)
        if job is not None:
            job.client_ms = now

    def session_begins(self, job_id: str, epoch: int, now: int) -> Effects:
        """The device is there for the client: from now on the session cannot go to another one."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is not None and job.is_session and job.assigned is not None and job.epoch == epoch:
            job.started, job.stage, job.stage_ms = True, Stage.RUN, now
            self._watch_job(job)
            effects.sends.append(JobChanged(self._snapshot(job)))
        return effects

    def session_broke(self, job_id: str, epoch: int, why: str, now: int) -> Effects:
        """The device's stream ended without a word: what the client had there is lost."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is None or job.epoch != epoch or not job.is_under_way or job.cancelling is not None:
            return effects
        self._abort(job, why, effects)
        self._lose_session(job, why, now, effects)
        self._schedule(now, effects)
        return effects

    def _lose_session(self, job: _Job, why: str, now: int, effects: Effects, *, meant: bool = False) -> None:
        if not meant:
            self._blame(job, why, now, effects)
        self._end(job, OutcomeKind.DEVICE_LOST, job.stage, why, now, effects)

    # ---- Administrators --------------------------------------------------------------------------------------------

    def start_maintenance(self, name: str, reason: str, user: str, now: int) -> Effects:
        """Give the device no more jobs; the one that it has ends in its own time."""
        effects = self._begin(now)
        serviced = Serviced(name, reason, user, now)
        self._devices.serve(serviced)
        effects.facts.append(serviced)
        effects.sends.append(DevicesChanged())
        self._schedule(now, effects)
        return effects

    def end_maintenance(self, name: str, now: int) -> Effects:
        """Give the device jobs again, whether it was in maintenance or in quarantine."""
        effects = self._begin(now)
        if not self._devices.in_service(name):
            effects.facts.append(ServiceEnded(name))
        self._devices.end_service(name)
        effects.sends.append(DevicesChanged())
        self._schedule(now, effects)
        return effects

    def reserve(
        self,
        reservation_id: str,
        selector: str,
        user: str,
        begin: int,
        duration_ms: int,
        reason: str,
        now: int,
        *,
        shares: bool = True,
    ) -> tuple[Reservation, Effects]:
        """Keep a device that matches for one user's jobs.

        Who `shares`, as all do but administrators, leaves half of the connected devices to the others at any time, and
        has none for longer in all than one reservation may last.

        Raises:
            SelectorError: the selector makes no sense.
            NoDeviceError: no device matches that is free to be reserved then.
            UsageError: for too long, in the past or a far future, or one more than a user may have.
        """
        effects, rules = self._begin(now), self.settings
        begin = begin or now
        if begin > now + rules.max_reservation_ahead_ms:
            days = rules.max_reservation_ahead_ms // 86_400_000
            raise UsageError("a reservation begins too late", hint=f"it may begin within {days} days from now")
        if not 0 < duration_ms <= rules.max_reservation_ms or begin + duration_ms <= now:
            longest = _seconds(rules.max_reservation_ms)
            raise UsageError("a reservation has to end in the future", hint=f"it may last up to {longest}")
        mine = sum(item.user == user for item in self._devices.reservations())
        if mine >= rules.max_reservations_per_user:
            raise UsageError(f"{user} has {mine} reservations already", hint="end one of them first")
        end = begin + duration_ms
        if shares:
            self._check_share(user, begin, end)
        had = self._devices.reserved_ms(user) if shares else Counter()
        without = {name for name, ms in had.items() if ms + duration_ms > rules.max_reservation_ms}
        device = self._devices.reservable(selector, begin, end, without, now)
        if device is None:
            longest = f"; nobody has one for longer than {_seconds(rules.max_reservation_ms)} in all" if without else ""
            raise NoDeviceError(
                f"no device that matches {selector!r} can be reserved for that time{longest}",
                hint="'kedge devices' shows which there are, and whose they are",
            )
        reservation = Reservation(reservation_id, device.info.name, user, begin, begin + duration_ms, reason)
        self._devices.reserve(reservation)
        self._watch_reservation(reservation)
        effects.facts.append(Reserved(reservation))
        effects.sends.append(DevicesChanged())
        self._schedule(now, effects)
        return reservation, effects

    def _check_share(self, user: str, begin: int, end: int) -> None:
        """Whether the user may have one more device then."""
        mine = {item.device for item in self._devices.reserved_within(begin, end) if item.user == user}
        connected = sum(device.connection is not None for device in self._devices)
        if len(mine) >= max(1, (connected + 1) // 2):
            raise UsageError(
                f"{user} has {len(mine)} of {connected} devices reserved for that time already",
                hint="half of them are for the others: end a reservation, or ask an administrator for one",
            )

    def keep_noise(
        self, number: str, name: str, user: str, relative: float, num_threads: int, on: str, now: int
    ) -> Effects:
        """Remember what a comparison said of a device that is known; what was said under the same number is kept."""
        effects, device = self._begin(now), self._devices[name]
        sample = NoiseSample(number, name, user, relative, num_threads, on, *conditions_of(device), now)
        if sample.id not in {each.id for each in self._devices.noise.of(name)}:
            effects.facts.append(NoiseKept(sample, self._devices.noise.keep(sample)))
        return effects

    def reservation(self, reservation_id: str) -> Reservation | None:
        """One that has not ended."""
        return self._devices.reservation(reservation_id)

    def end_reservation(self, reservation_id: str, now: int) -> Effects:
        """Everybody may have the device again."""
        effects = self._begin(now)
        if self._devices.reservation(reservation_id) is not None:
            self._end_reservation(reservation_id, effects)
            self._schedule(now, effects)
        return effects

    # ---- Agents ----------------------------------------------------------------------------------------------------

    def connect(self, connection: int, hello: m.Hello, now: int) -> Effects:
        """An agent's first message on a new connection."""
        effects = self._begin(now)
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
        device = Device(hello.device, hello.instance_id, labels_of(hello.device), connection, now, now)
        device.protocol = hello.protocol
        # Older agents do not say it before their first heartbeat.
        device.health = hello.health or (known.health if known is not None else None)
        self._devices.add(device)
        self._connections[connection] = name
        welcome = m.Welcome(local_protocol(), self._tracker_id, self.settings.heartbeat_interval_ms)
        effects.sends.append(ToAgent(connection, welcome))
        self._take_stock(device, hello, now, effects)
        self._alarm(now + self.settings.silence_ms, "device", name)
        effects.sends.append(DevicesChanged())
        self._schedule(now, effects)
        return effects

    def receive(self, connection: int, body: m.AgentBody, now: int) -> Effects:
        """Any later message of an agent. One from a connection that was given up changes nothing."""
        effects = self._begin(now)
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
        effects = self._begin(now)
        name = self._connections.get(connection)
        if name is not None:
            self._part(self._devices[name], now, effects)
            self._schedule(now, effects)
        return effects

    def _begin(self, now: int) -> Effects:
        """An event at this time begins."""
        self._now = now
        return Effects()

    # ---- Time ------------------------------------------------------------------------------------------------------

    def tick(self, now: int) -> Effects:
        """Do what is due: deadlines, leases, cancellations that nobody confirmed, connections gone silent."""
        effects = self._begin(now)
        while self._alarms and self._alarms[0][0] <= now:
            _, kind, name = heapq.heappop(self._alarms)
            if kind == "job" and name in self._jobs:
                self._check_job(self._jobs[name], now, effects)
            elif kind == "device":
                self._check_device(name, now, effects)
            elif kind == "fleet":
                self._check_fleet(now, effects)
        self._shares.forget(now)
        self._schedule(now, effects)
        return effects

    # ---- Restart ---------------------------------------------------------------------------------------------------

    def restore(self, stored: Stored, now: int) -> None:
        """Take over what an earlier tracker stored: jobs that are not done, ended ones, idempotency keys.

        Assigned jobs keep their lease for `lease_ms` from now: their agents reconnect and name it.
        """
        self._now = now
        self._seq = stored.last_seq
        for record in sorted(stored.records, key=lambda record: record.accepted.seq):
            accepted = record.accepted
            job = self._admit(accepted, now, queued=False)
            job.queued_ms, job.requeues = accepted.submitted_ms, 0
            if record.requeued is not None:
                again = record.requeued
                job.queued_ms, job.requeues, job.faults = again.queued_ms, again.requeues, again.faults
            # Nobody could take it while the tracker was away: it waits at least until the agents are back. The clock
            # may have been set back meanwhile.
            waits_until = now + self.settings.lease_ms
            job.queued_ms = max(min(job.queued_ms, now), waits_until - accepted.spec.deadlines.queue_ms)
            job.epoch, job.assigned, job.cancelling = record.epoch, record.assigned, record.cancelling
            if record.assigned is not None:
                job.started, job.stage, job.stage_ms = None, Stage.TRANSFER, now
                job.cancel_ms, job.assigned_ms = now, now
                if job.is_session and job.cancelling is None:
                    job.cancelling = "the tracker was restarted, which no session outlives"
                self._shares.begin(accepted.user)
                self._renew(job, now)
            else:
                self._line_up(job)
                self._watch_job(job)
        for serviced in stored.serviced:
            self._devices.serve(serviced)
        for reservation in stored.reservations:
            self._devices.reserve(reservation)
            self._watch_reservation(reservation)
        self._devices.noise = Noise(stored.noise)
        for job_id, epoch in stored.ended:
            self._remember_end(job_id, epoch)
        self._knows_all_keys = stored.all_keys
        for key, job_id in stored.keys:
            self._remember_key(key, job_id)

    # ---- Devices ---------------------------------------------------------------------------------------------------

    def _refusal(self, hello: m.Hello, known: Device | None) -> m.Refused | None:
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

    def _take_stock(self, device: Device, hello: m.Hello, now: int, effects: Effects) -> None:
        """After a (re)connection: renew the leases that the agent still holds, give up those that it does not."""
        device.holding = {(lease.job_id, lease.epoch) for lease in hello.running}
        for job_id, epoch in sorted(device.holding):
            job = self._current(device, job_id, epoch)
            if job is None:
                self._call_back(device, Lease(job_id, epoch), effects)
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

    def _heartbeat(self, device: Device, beat: m.Heartbeat, now: int, effects: Effects) -> None:
        before, device.health = device.health, beat.health
        if before is None or before.problems != beat.health.problems:
            effects.sends.append(DevicesChanged())
        listed = {(lease.job_id, lease.epoch) for lease in beat.running}
        device.settled &= listed
        for job_id, epoch in sorted(listed - device.settled):
            job = self._current(device, job_id, epoch)
            if job is not None:
                self._renew(job, now)
            else:
                self._call_back(device, Lease(job_id, epoch), effects)
        was_idle = device.idle
        # An assignment that crossed this heartbeat on the wire is not in it, and still stands.
        crossed = {key for key in device.holding - listed if self._current(device, *key) is not None}
        device.holding = (listed - device.settled) | crossed
        self._mark(device, was_idle, now, effects)

    def _call_back(self, device: Device, lease: Lease, effects: Effects) -> None:
        """A device has a lease that is not current: nothing under it counts, and no later one is mistaken for it."""
        job = self._jobs.get(lease.job_id)
        if job is not None and lease.epoch <= job.epoch + _UNSTORED_EPOCHS:
            job.named_epoch = max(job.named_epoch, lease.epoch)
        effects.sends.append(ToAgent(_connection(device), m.AbortJob(lease, "the lease is not current")))

    def _goodbye(self, device: Device, goodbye: m.Goodbye, now: int, effects: Effects) -> None:
        self._part(device, now, effects)
        why = f"the agent stopped ({goodbye.reason})" if goodbye.reason else "the agent stopped"
        for job in [job for job in self._jobs.values() if self._owns(device, job)]:
            self._give_up(job, job.started is False, why, now, effects, meant=True)

    def _part(self, device: Device, now: int, effects: Effects) -> None:
        """The device is no longer connected."""
        del self._connections[_connection(device)]
        device.connection, device.seen_ms = None, now
        effects.sends.append(DevicesChanged())
        self._devices.forget(self.settings.remembered_devices)

    def _mark(self, device: Device, was_idle: bool, now: int, effects: Effects) -> None:
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

    def _check_fleet(self, now: int, effects: Effects) -> None:
        """A quarantine or a reservation begins or ends."""
        for reservation in self._devices.expired(now):
            self._end_reservation(reservation.id, effects)
        effects.sends.append(DevicesChanged())

    def _end_reservation(self, reservation_id: str, effects: Effects) -> None:
        self._devices.end_reservation(reservation_id)
        effects.facts.append(ReservationEnded(reservation_id))
        effects.sends.append(DevicesChanged())

    def _watch_reservation(self, reservation: Reservation) -> None:
        for when in (reservation.from_unix_ms, reservation.until_unix_ms):
            self._alarm(when, "fleet", "")

    # ---- Jobs ------------------------------------------------------------------------------------------------------

    def _admit(self, accepted: JobAccepted, now: int, *, queued: bool = True) -> _Job:
        job = _Job(accepted, Want(accepted.spec.selector, accepted.needs, accepted.user), now, client_ms=now)
        self._jobs[job.id] = job
        self._carried[accepted.user] += _carries(accepted.spec)
        if queued:
            self._line_up(job)
            self._watch_job(job)
        return job

    def _line_up(self, job: _Job) -> None:
        job.want = replace(job.want, avoid=frozenset(fault.device for fault in job.faults))
        self._queue.push(job.id, job.want, job.spec.priority, job.accepted.seq)

    def _schedule(self, now: int, effects: Effects) -> None:
        """Start what can start, where the queue or the devices have changed since nothing more could."""
        if self._planned == self._queue.version and not any(isinstance(send, DevicesChanged) for send in effects.sends):
            return
        self._devices.expect(self._queue.lines)
        idle = [device.info.name for device in self._devices.available(now)] if len(self._queue) else []

        def takers(want: Want, names: Sequence[str]) -> list[str]:
            return self._devices.takers(want, names, now)

        plan = self._queue.assign(idle, takers, self._shares, now) if idle else []
        self._planned = self._queue.version
        for job_id, name in plan:
            job, device = self._jobs[job_id], self._devices[name]
            job.epoch = max(job.epoch, job.named_epoch) + 1
            job.assigned = JobAssigned(job_id, name, device.instance_id, job.epoch)
            job.sent, job.started, job.stage, job.stage_ms = False, False, Stage.TRANSFER, now
            job.assigned_ms = now
            self._shares.begin(job.accepted.user)
            device.holding.add(job.key)
            effects.facts.append(job.assigned)
            lease = Lease(job_id, job.epoch, self.settings.lease_ms)
            effects.sends.append(ToAgent(_connection(device), m.AssignJob(lease, job.spec)))
            effects.sends += [JobChanged(self._snapshot(job)), DevicesChanged()]

    def _progress(self, device: Device, lease: Lease, stage: Stage, now: int, effects: Effects) -> None:
        job = self._current(device, lease.job_id, lease.epoch)
        if job is None:
            return
        self._renew(job, now)
        if (job.started and job.stage is stage) or job.is_under_way:
            return
        job.started, job.stage, job.stage_ms = True, stage, now
        self._watch_job(job)
        effects.sends.append(JobChanged(self._snapshot(job)))

    def _finished(self, device: Device, finished: m.JobFinished, now: int, effects: Effects) -> None:
        lease = finished.lease
        key = (lease.job_id, lease.epoch)
        was_idle = device.idle
        device.holding.discard(key)
        device.settled.add(key)
        job = self._current(device, *key)
        stale = job is None and self._ended.get(lease.job_id, 0) != lease.epoch
        if job is not None:
            self._report(job, device, finished.result, now, effects)
        effects.sends.append(ToAgent(_connection(device), m.ResultAccepted(lease.job_id, stale)))
        self._mark(device, was_idle, now, effects)

    def _report(self, job: _Job, device: Device, result: JobResult, now: int, effects: Effects) -> None:
        """What an agent says came of a job: the end of it, unless the device itself was at fault."""
        name, outcome = device.info.name, result.outcome
        if outcome.kind is OutcomeKind.DEVICE_FAULT and job.cancelling is None:
            self._device_failed(job, outcome.kind, outcome.stage, outcome.message, now, effects)
            return
        if outcome.kind in _SUSPICIOUS and job.cancelling is None:
            self._suspect(job, outcome.kind, now, effects)
            if (outcome.kind, outcome.stage) == (OutcomeKind.TIMEOUT, Stage.TRANSFER):
                # Its link is the device's: another one may have a better one.
                self._try_again(job, outcome.kind, outcome.stage, outcome.message, now, effects)
                return
        if outcome.ok:
            self._devices.breaker(name).success()
            self._durations.learn(job.spec, now - job.assigned_ms)
        self._finish(job, replace(result, device=name), job.epoch, now, effects)

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
        elif job.cancelling is None and now >= self._client_due(job):
            why = f"nothing was heard of its client for {_seconds(self._client_due(job) - job.client_ms)}"
            self._call_off(job, why, now, effects)
        elif job.assigned is None:
            why = f"it waited {_seconds(job.spec.deadlines.queue_ms)} ({self._devices.why_waiting(job.want, now)})"
            kind = OutcomeKind.DEVICE_LOST if job.faults else OutcomeKind.TIMEOUT
            self._end(job, kind, Stage.QUEUE, "; ".join([*_told(job.faults), why]), now, effects)
        elif job.cancelling is not None and now >= job.cancel_ms + self.settings.cancel_grace_ms:
            why = f"{job.cancelling} (the device did not confirm)"
            self._end(job, OutcomeKind.CANCELLED, job.stage, why, now, effects)
        elif now >= job.lease_ms:
            why = "nothing was heard of it for as long as its lease lasts"
            self._give_up(job, job.started is False, why, now, effects)
        elif job.is_under_way:
            longest = _seconds(job.spec.deadlines.run_ms)
            self._call_off(job, f"it lasted {longest}, which is as long as it may", now, effects)
        elif job.lease_ms - self.settings.lease_ms <= self._stage_ends(job):
            # Nothing was heard of it since: the agent may have ended it in time, and its lease decides.
            self._alarm(job.lease_ms, "job", job.id)
        else:
            stage = job.stage or Stage.TRANSFER
            limit = _seconds(job.spec.deadlines.of(stage))
            self._abort(job, f"the {stage} deadline passed", effects)
            why = f"stage {stage} took longer than {limit}, and the agent did not end it"
            self._blame(job, why, now, effects)
            self._end(job, OutcomeKind.TIMEOUT, stage, why, now, effects)

    def _give_up(
        self, job: _Job, never_began: bool, why: str, now: int, effects: Effects, *, meant: bool = False
    ) -> None:
        """The device that had the job left, on purpose (`meant`) or not: queue it again, or call it lost."""
        assert job.assigned is not None
        if job.cancelling is not None:
            self._end(job, OutcomeKind.CANCELLED, job.stage, job.cancelling, now, effects)
        elif job.is_under_way:
            self._lose_session(job, why, now, effects, meant=meant)
        elif (never_began or meant) and (job.requeues < self.settings.max_requeues or not job.sent):
            if job.sent and not meant:
                self._blame(job, why, now, effects)
            job.requeues += job.sent
            self._requeue(job, now, effects)
        else:
            self._device_failed(job, OutcomeKind.DEVICE_LOST, job.stage, why, now, effects)

    def _device_failed(
        self, job: _Job, kind: OutcomeKind, stage: Stage | None, why: str, now: int, effects: Effects
    ) -> None:
        """The device was at fault."""
        self._blame(job, why, now, effects)
        self._try_again(job, kind, stage, why, now, effects)

    def _try_again(
        self, job: _Job, kind: OutcomeKind, stage: Stage | None, why: str, now: int, effects: Effects
    ) -> None:
        """Another device shall have the job, unless too many have failed with it: then it is to blame itself.

        Where no other one may have it, the same device is tried again, and failing twice is no excuse for that.
        """
        assert job.assigned is not None
        if job.is_under_way:
            self._end(job, kind, stage, why, now, effects)
            return
        job.faults += (DeviceFault(job.assigned.device, why),)
        if len(job.faults) < self.settings.max_device_faults:
            self._requeue(job, now, effects)
            return
        told = _told(job.faults)
        failed = len({fault.device for fault in job.faults})
        if failed > 1:
            told.append(f"after {failed} devices that failed with it, the job is not given to another one")
            self._forgive(job, effects)
        elif len(told) > 1:
            told.append(f"it was tried {len(told)} times there, as no other device could have it")
        self._end(job, kind, stage, "; ".join(told), now, effects)

    def _forgive(self, job: _Job, effects: Effects) -> None:
        """It was not the devices that failed."""
        for fault in job.faults:
            self._devices.breaker(fault.device).forgive(job.id)
            effects.sends.append(DevicesChanged())

    def _blame(self, job: _Job, why: str, now: int, effects: Effects) -> None:
        """Count a failure against the device that has the job."""
        assert job.assigned is not None
        breaker = self._devices.breaker(job.assigned.device)
        self._watch_breaker(breaker, breaker.fault(job.id, why, now, self._quarantine), effects)

    def _suspect(self, job: _Job, kind: OutcomeKind, now: int, effects: Effects) -> None:
        """The job ended badly on the device that has it, for reasons that may be either's."""
        assert job.assigned is not None
        breaker = self._devices.breaker(job.assigned.device)
        failure = Suspicion(job.accepted.user, job.spec.manifest.digest, kind)
        self._watch_breaker(breaker, breaker.suspect(job.id, failure, now, self._quarantine), effects)

    def _watch_breaker(self, breaker: Breaker, opened: bool, effects: Effects) -> None:
        if opened:
            self._alarm(breaker.until_ms, "fleet", "")
            effects.sends.append(DevicesChanged())

    def _requeue(self, job: _Job, now: int, effects: Effects) -> None:
        """The job waits again, for another device if it can be."""
        self._take_back(job, now, effects)
        self._leave(job, now)
        job.assigned, job.sent, job.started, job.stage, job.queued_ms = None, False, False, None, now
        effects.facts.append(JobRequeued(job.id, now, job.requeues, job.faults))
        self._line_up(job)
        self._watch_job(job)
        effects.sends.append(JobChanged(self._snapshot(job)))

    def _take_back(self, job: _Job, now: int, effects: Effects) -> None:
        """The device that had the job, if any, is free again."""
        if job.assigned is not None:
            self._release(self._devices.get(job.assigned.device), job.key, now, effects)

    def _leave(self, job: _Job, now: int) -> None:
        """Its user no longer holds a device with it."""
        if job.assigned is not None:
            self._shares.end(job.accepted.user, now - job.assigned_ms, now)

    def _release(self, device: Device | None, key: Key, now: int, effects: Effects) -> None:
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
        self._put_down(job)
        if result.outcome.kind is OutcomeKind.CANCELLED:
            # Whoever calls a job off before a second device has tried it must not leave the first one in the wrong.
            self._forgive(job, effects)
        if job.id in self._queue:
            self._queue.remove(job.id)
        self._leave(job, now)
        self._remember_end(job.id, epoch)
        effects.facts.append(JobDone(job.id, result, now, job.faults))
        submitted = job.accepted.submitted_ms
        done = Job(
            id=job.id,
            spec=job.spec,
            state=JobState.DONE,
            device=result.device,
            result=result,
            submitted_unix_ms=submitted,
            finished_unix_ms=now,
            user=job.accepted.user,
            faults=job.faults,
        )
        effects.sends.append(JobChanged(done))

    def _put_down(self, job: _Job) -> None:
        """Its user's jobs carry less."""
        self._carried[job.accepted.user] -= _carries(job.spec)
        if not self._carried[job.accepted.user]:
            del self._carried[job.accepted.user]

    def _abort(self, job: _Job, reason: str, effects: Effects) -> None:
        """Ask the device to stop a job, if it can be reached."""
        device = self._devices.get(job.assigned.device) if job.assigned else None
        if device is not None and device.connection is not None:
            effects.sends.append(ToAgent(device.connection, m.AbortJob(Lease(job.id, job.epoch), reason)))

    def _current(self, device: Device, job_id: str, epoch: int) -> _Job | None:
        """The job that this device holds under this epoch by right."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.epoch == epoch and self._owns(device, job) else None

    def _owns(self, device: Device, job: _Job) -> bool:
        return job.assigned is not None and job.assigned.device == device.info.name

    # ---- Deadlines -------------------------------------------------------------------------------------------------

    def _due(self, job: _Job) -> int:
        """When something has to happen to the job."""
        if job.assigned is None:
            return min(job.queued_ms + job.spec.deadlines.queue_ms, self._client_due(job))
        due = min(job.lease_ms, self._stage_ends(job) + self.settings.deadline_slack_ms)
        if job.cancelling is not None:
            # A session that lasted too long is being called off for that very reason.
            due = job.lease_ms if job.is_under_way else due
            return min(due, job.cancel_ms + self.settings.cancel_grace_ms)
        return min(due, self._client_due(job))

    def _stage_ends(self, job: _Job) -> int:
        """When the agent is to have ended the stage that the job is in."""
        return job.stage_ms + job.spec.deadlines.of(job.stage or Stage.TRANSFER)

    def _client_due(self, job: _Job) -> int:
        """When a session ends for want of its client; other jobs need none."""
        if not isinstance(job.spec.task, SessionTask):
            return _NEVER
        return job.client_ms + (job.spec.task.lease_ms or self.settings.session_lease_ms)

    def _watch_job(self, job: _Job) -> None:
        self._alarm(self._due(job), "job", job.id)

    def _alarm(self, when: int, kind: str, name: str) -> None:
        """Look at a job or a device then; what is looked at too early is looked at again."""
        heapq.heappush(self._alarms, (when, kind, name))
        if len(self._alarms) > 2 * self._kept_alarms + _SPARE_ALARMS:
            self._drop_alarms()

    def _drop_alarms(self) -> None:
        """Keep the first alarm of each job and device that is there, and all of the fleet's."""
        first: dict[tuple[str, str], int] = {}
        for when, kind, name in sorted(self._alarms, reverse=True):
            if kind != "job" or name in self._jobs:
                first[kind, name] = when
        fleet = {when for when, kind, _ in self._alarms if kind == "fleet"}
        kept = [(when, kind, name) for (kind, name), when in first.items() if kind != "fleet"]
        self._alarms = [*kept, *((when, "fleet", "") for when in fleet)]
        heapq.heapify(self._alarms)
        self._kept_alarms = len(self._alarms)

    # ---- Pictures --------------------------------------------------------------------------------------------------

    def _snapshot(self, job: _Job, reasons: dict[Want, str] | None = None) -> Job:
        state, device = job.state, "" if job.assigned is None else job.assigned.device
        stage = job.stage if state is JobState.RUNNING else None
        accepted = job.accepted
        wait = self._waits().get(job.id) if state is JobState.QUEUED else None
        return Job(
            id=job.id,
            spec=job.spec,
            state=state,
            stage=stage,
            device=device,
            submitted_unix_ms=accepted.submitted_ms,
            detail=self._detail(job, {} if reasons is None else reasons),
            user=accepted.user,
            position=0 if wait is None else wait.position,
            eta_ms=None if wait is None else wait.eta_ms,
            faults=job.faults,
        )

    def _status(self, device: Device) -> DeviceStatus:
        running = next((job_id for job_id, epoch in device.holding if self._current(device, job_id, epoch)), "")
        return self._devices.status(device, running, self._now)

    def _waits(self) -> dict[str, Wait]:
        """How long every queued job may wait: as of now, or where many wait, as of a few seconds ago."""
        few = len(self._queue) <= _FEW_JOBS and self._queue.lines <= _FEW_LINES
        age = (self._queue.version if few else 0), self._now // (1_000 if few else 5_000)
        if self._known_waits is None or self._known_waits[0] != age:
            order, working = self._queue.order(self._shares, self._now), self._devices.working(self._now)

            def usable(want: Want) -> frozenset[str]:
                return frozenset(self._devices.takers(want, working, self._now))

            self._known_waits = age, waits(order, usable, self._free_in, self._takes)
        return self._known_waits[1]

    def _free_in(self, name: str) -> float | None:
        device = self._devices[name]
        holder = next((job for key in device.holding if (job := self._current(device, *key))), None)
        if holder is None:
            return 0.0
        expected = self._durations.expect(holder.spec)
        return None if expected is None else max(0.0, expected - (self._now - holder.assigned_ms))

    def _takes(self, job_id: str) -> float | None:
        return self._durations.expect(self._jobs[job_id].spec)

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


def task_kind(task: Task) -> str:
    """What a job does, in a word: "run", "bench"."""
    return type(task).__name__.removesuffix("Task").lower()


def _carries(spec: JobSpec) -> int:
    """Bytes of the inputs that are in a spec itself."""
    if isinstance(spec.task, SessionTask):
        return 0
    return sum(len(tensor.data) for tensor in spec.task.inputs if isinstance(tensor.data, bytes))


def _connection(device: Device) -> int:
    assert device.connection is not None
    return device.connection


def _told(faults: tuple[DeviceFault, ...]) -> list[str]:
    return [f"device {fault.device}: {fault.reason}" for fault in faults]


def _seconds(ms: int) -> str:
    return f"{ms / 1000:g} s"
