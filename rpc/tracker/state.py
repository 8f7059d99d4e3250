"""The tracker's mind: devices, jobs and leases as a state machine without sockets, threads, clocks or randomness.

Every method takes the time (Unix milliseconds that never go back) and returns `Effects`: facts to store, and messages
to send once those are stored. `restore` builds the state again from what was stored. What an event does to a job is in
`lifecycle`, what an agent's message does in `agents`, and what is said of either in `views`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from kedge.rpc import messages as m
from kedge.rpc.errors import NoDeviceError
from kedge.rpc.noise import Noise
from kedge.rpc.outcome import Stage
from kedge.rpc.selector import parse
from kedge.rpc.tracker.admission import Admission
from kedge.rpc.tracker.agents import Agents
from kedge.rpc.tracker.alarms import Alarms
from kedge.rpc.tracker.devices import Roster, conditions_of, offline_device, unseen_device
from kedge.rpc.tracker.estimate import Durations
from kedge.rpc.tracker.facts import (
    DevicesChanged,
    Effects,
    JobAccepted,
    JobChanged,
    JobWithdrawn,
    LeaseKey,
    Needs,
    NoiseKept,
    ReservationEnded,
    Reserved,
    Serviced,
    ServiceEnded,
    Stored,
)
from kedge.rpc.tracker.jobs import Jobs, task_kind
from kedge.rpc.tracker.lifecycle import Lifecycle
from kedge.rpc.tracker.scheduler import Shares, Want
from kedge.rpc.tracker.settings import Settings, seconds
from kedge.rpc.tracker.views import Views
from kedge.rpc.types import DeviceStatus, Job, JobSpec, JobState, Lease, NoiseSample, Protocol, Reservation


class TrackerState:
    """Everything the tracker knows about work that is not done, and about devices."""

    def __init__(self, tracker_id: str, settings: Settings | None = None) -> None:
        rules = settings or Settings()
        self.settings = rules
        self._seq = 0
        self._jobs = Jobs(rules.remembered_jobs)
        self._devices = Roster()
        self._shares = Shares(rules.fair_half_life_ms)
        self._alarms = Alarms(self._jobs.__contains__)
        durations = Durations()
        self._views = Views(self._jobs, self._devices, self._shares, durations)
        self._admission = Admission(rules, self._jobs)
        self._lifecycle = Lifecycle(
            rules, self._jobs, self._devices, self._alarms, self._shares, durations, self._views
        )
        self._agents = Agents(tracker_id, rules, self._jobs, self._devices, self._alarms, self._lifecycle)

    # ---- Questions -------------------------------------------------------------------------------------------------

    def job(self, job_id: str, reasons: dict[Want, str] | None = None) -> Job | None:
        """A job that is not done; None for any other. `reasons` keeps what many jobs wait for, between calls."""
        job = self._jobs.get(job_id)
        return None if job is None else self._views.job(job, reasons)

    def lives(self, job_id: str) -> bool:
        """Whether there is such a job that is not done."""
        return job_id in self._jobs

    def live_jobs(self) -> list[Job]:
        """Every job that is not done."""
        return [self._views.job(job) for job in self._jobs]

    def census(self) -> Counter[tuple[JobState, str]]:
        """How many jobs are not done, by state and kind of task."""
        return Counter((job.state, task_kind(job.spec.task)) for job in self._jobs)

    def job_of_key(self, key: str) -> str | None:
        """The job that was submitted under this idempotency key."""
        return self._jobs.of_key(key)

    def held_by(self, device: str) -> dict[LeaseKey, JobAccepted]:
        """The jobs that a device has by right, by lease."""
        return {job.key: job.accepted for job in self._jobs.held_by(device)}

    def held_under(self, lease: Lease, device: str) -> JobAccepted | None:
        """The job that the device has by right under this lease."""
        job = self._jobs.held_under((lease.job_id, lease.epoch), device)
        return None if job is None else job.accepted

    @property
    def knows_all_keys(self) -> bool:
        """False when a key that `job_of_key` does not know may be stored all the same."""
        return self._jobs.knows_all_keys

    def devices(self, selector: str = "", *, include_gone: bool = False) -> list[DeviceStatus]:
        """Devices by name; raises SelectorError."""
        wanted = parse(selector)
        known = [*self._devices, *(self._devices.unseen() if include_gone else ())]
        found = [device for device in known if wanted.matches(device.labels)]
        found = [device for device in found if include_gone or device.connection is not None]
        return sorted((self._views.device(device) for device in found), key=lambda status: status.info.name)

    def device(self, name: str) -> DeviceStatus:
        """One device, known or not."""
        return self._views.device(self._devices.get(name) or unseen_device(name))

    def agents(self) -> dict[str, Protocol]:
        """What each connected device speaks."""
        return {device.info.name: device.protocol for device in self._devices if device.connection is not None}

    def check_room(self, spec: JobSpec, needs: Needs, user: str) -> None:
        """A user may have one more job like this; raises QueueFullError, and InputError for what no job may have."""
        self._admission.check_room(spec, needs, user)

    def may_carry(self, spec: JobSpec, user: str) -> bool:
        """Whether one more job like this may have its inputs within its spec; else they belong into blobs."""
        return self._admission.may_carry(spec, user)

    def reservations(self) -> list[Reservation]:
        """All that have not ended, the next one first."""
        return sorted(self._devices.reservations, key=lambda item: (item.from_unix_ms, item.device))

    def device_known(self, name: str) -> bool:
        """Whether a device of this name was ever connected, as far as is remembered."""
        return self._devices.get(name) is not None

    def device_named(self, name: str) -> bool:
        """Whether there is such a device: known, or in maintenance or reserved since before the tracker's start."""
        return self.device_known(name) or any(device.info.name == name for device in self._devices.unseen())

    def next_alarm(self) -> int | None:
        """When `tick` has to be called at the latest."""
        return self._alarms.next

    def detail(self, job_id: str) -> str:
        """Why a queued job still waits; empty for any other."""
        job = self._jobs.get(job_id)
        return "" if job is None else self._views.detail(job, {})

    def still_waiting(self, job_id: str, reasons: dict[Want, str]) -> Job | None:
        """A queued job as it is now; None for any other. `reasons` as for `job`."""
        job = self._jobs.get(job_id)
        return None if job is None or job.assigned is not None else self._views.job(job, reasons)

    # ---- Clients ---------------------------------------------------------------------------------------------------

    def submit(self, job_id: str, spec: JobSpec, needs: Needs, key: str, now: int, user: str = "") -> Effects:
        """Accept a job.

        The caller has checked that `job_of_key(key)` is None, that the spec makes sense, and `check_room`.
        """
        effects = self._begin(now)
        self._seq += 1
        spec = replace(spec, deadlines=self._admission.deadlines(spec))
        accepted = JobAccepted(job_id, self._seq, spec, needs, key, now, user)
        effects.facts.append(accepted)
        self._lifecycle.admit(accepted, now)
        self._jobs.remember_key(key, job_id)
        self._lifecycle.schedule(now, effects)
        return effects

    def cancel(self, job_id: str, reason: str, now: int) -> Effects:
        """Stop a job, at once where it waits; a device is asked to. Ended and unknown jobs stay as they are."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is None or job.cancelling is not None:
            return effects
        self._lifecycle.call_off(job, reason, now, effects)
        self._lifecycle.schedule(now, effects)
        return effects

    def withdraw(self, job_id: str, key: str, now: int) -> Effects:
        """Undo `submit`, whose facts are not stored: the client was told that its job is not accepted."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is not None:
            self._lifecycle.withdraw(job, now, effects)
        self._jobs.forget([job_id], [key])
        effects.facts.append(JobWithdrawn(job_id))
        self._lifecycle.schedule(now, effects)
        return effects

    def forget_keys(self, keys: Iterable[str]) -> None:
        """The jobs of these idempotency keys are kept no longer."""
        self._jobs.forget(keys=keys)

    def assignment_leaves(self, lease: Lease, now: int) -> bool:
        """An assignment is about to be sent: its lease begins. False when it must not be: it is stale."""
        self._views.now = now
        job = self._jobs.get(lease.job_id)
        if job is None or job.assigned is None or job.epoch != lease.epoch:
            return False
        job.stage_ms = now
        self._lifecycle.renew(job, now)
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
        self._views.now = now
        job = self._jobs.get(job_id)
        if job is not None:
            job.client_ms = now

    def session_begins(self, job_id: str, epoch: int, now: int) -> Effects:
        """The device is there for the client: from now on the session cannot go to another one."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is not None and job.is_session and job.assigned is not None and job.epoch == epoch:
            job.started, job.stage, job.stage_ms = True, Stage.RUN, now
            self._lifecycle.watch(job)
            effects.sends.append(JobChanged(self._views.job(job)))
        return effects

    def session_broke(self, job_id: str, epoch: int, why: str, now: int) -> Effects:
        """The device's stream ended without a word: what the client had there is lost."""
        effects = self._begin(now)
        job = self._jobs.get(job_id)
        if job is None or job.epoch != epoch or not job.is_under_way or job.cancelling is not None:
            return effects
        self._lifecycle.abort(job, why, effects)
        self._lifecycle.lose_session(job, why, now, effects)
        self._lifecycle.schedule(now, effects)
        return effects

    # ---- Administrators --------------------------------------------------------------------------------------------

    def start_maintenance(self, name: str, reason: str, user: str, now: int) -> Effects:
        """Give the device no more jobs; the one that it has ends in its own time."""
        effects = self._begin(now)
        serviced = Serviced(name, reason, user, now)
        self._devices.serve(serviced)
        effects.facts.append(serviced)
        effects.sends.append(DevicesChanged())
        self._lifecycle.schedule(now, effects)
        return effects

    def end_maintenance(self, name: str, now: int) -> Effects:
        """Give the device jobs again, whether it was in maintenance or in quarantine."""
        effects = self._begin(now)
        self._end_service(name, effects)
        self._lifecycle.schedule(now, effects)
        return effects

    def forget_device(self, name: str, now: int) -> Effects:
        """A device was revoked: it has no more jobs, and is forgotten once it is off, with its reservations at once."""
        effects = self._begin(now)
        self._end_service(name, effects)
        for reservation in [item for item in self._devices.reservations if item.device == name]:
            self._end_reservation(reservation.id, effects)
        self._agents.forget(name, effects)
        self._lifecycle.schedule(now, effects)
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
        end = begin + duration_ms
        reservations = self._devices.reservations
        reservations.check(user, begin, duration_ms, rules, now)
        if shares:
            reservations.check_share(user, begin, end, len(self.agents()))
        without = reservations.exhausted(user, duration_ms, rules) if shares else set()
        device = self._devices.reservable(selector, begin, end, without, now)
        if device is None:
            longest = f"; nobody has one for longer than {seconds(rules.max_reservation_ms)} in all" if without else ""
            raise NoDeviceError(
                f"no device that matches {selector!r} can be reserved for that time{longest}",
                hint="'kedge devices' shows which there are, and whose they are",
            )
        reservation = Reservation(reservation_id, device.info.name, user, begin, end, reason)
        self._devices.reservations.add(reservation)
        self._watch_reservation(reservation)
        effects.facts.append(Reserved(reservation))
        effects.sends.append(DevicesChanged())
        self._lifecycle.schedule(now, effects)
        return reservation, effects

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
        return self._devices.reservations.get(reservation_id)

    def end_reservation(self, reservation_id: str, now: int) -> Effects:
        """Everybody may have the device again."""
        effects = self._begin(now)
        if self._devices.reservations.get(reservation_id) is not None:
            self._end_reservation(reservation_id, effects)
            self._lifecycle.schedule(now, effects)
        return effects

    # ---- Agents ----------------------------------------------------------------------------------------------------

    def connect(self, connection: int, hello: m.Hello, now: int) -> Effects:
        """An agent's first message on a new connection."""
        effects = self._begin(now)
        self._agents.connect(connection, hello, now, effects)
        self._lifecycle.schedule(now, effects)
        return effects

    def receive(self, connection: int, body: m.AgentBody, now: int) -> Effects:
        """Any later message of an agent. One from a connection that was given up changes nothing."""
        effects = self._begin(now)
        self._agents.receive(connection, body, now, effects)
        self._lifecycle.schedule(now, effects)
        return effects

    def disconnect(self, connection: int, now: int) -> Effects:
        """A connection ended. The agent's leases run on for a while: it may come back."""
        effects = self._begin(now)
        self._agents.disconnect(connection, now, effects)
        self._lifecycle.schedule(now, effects)
        return effects

    def _begin(self, now: int) -> Effects:
        """An event at this time begins."""
        self._views.now = now
        return Effects()

    # ---- Time ------------------------------------------------------------------------------------------------------

    def tick(self, now: int) -> Effects:
        """Do what is due: deadlines, leases, cancellations that nobody confirmed, connections gone silent."""
        effects = self._begin(now)
        for kind, name in self._alarms.due(now):
            if kind == "job" and name in self._jobs:
                self._lifecycle.check(self._jobs[name], now, effects)
            elif kind == "device":
                self._agents.check(name, now, effects)
            elif kind == "fleet":
                self._check_fleet(now, effects)
        self._shares.forget(now)
        self._lifecycle.schedule(now, effects)
        return effects

    # ---- Restart ---------------------------------------------------------------------------------------------------

    def restore(self, stored: Stored, now: int) -> None:
        """Take over what an earlier tracker stored: jobs that are not done, ended ones, idempotency keys.

        Assigned jobs keep their lease for `lease_ms` from now: their agents reconnect and name it.
        """
        self._views.now = now
        self._seq = stored.last_seq
        for record in sorted(stored.records, key=lambda record: record.accepted.seq):
            accepted = record.accepted
            job = self._jobs.add(accepted, now)
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
                self._lifecycle.renew(job, now)
            else:
                self._jobs.line_up(job)
                self._lifecycle.watch(job)
        for serviced in stored.serviced:
            self._devices.serve(serviced)
        for reservation in stored.reservations:
            self._devices.reservations.add(reservation)
            self._watch_reservation(reservation)
        self._devices.noise = Noise(stored.noise)
        for seen in stored.devices:
            self._devices.add(offline_device(seen.info, seen.seen_ms))
        for job_id, epoch in stored.ended:
            self._jobs.remember_end(job_id, epoch)
        self._jobs.knows_all_keys = stored.all_keys
        for key, job_id in stored.keys:
            self._jobs.remember_key(key, job_id)

    def _check_fleet(self, now: int, effects: Effects) -> None:
        """A quarantine or a reservation begins or ends."""
        for reservation in self._devices.reservations.expired(now):
            self._end_reservation(reservation.id, effects)
        effects.sends.append(DevicesChanged())

    def _end_service(self, name: str, effects: Effects) -> None:
        """Whatever the administrators, or its failures, have kept the device from work for is over."""
        if not self._devices.in_service(name):
            effects.facts.append(ServiceEnded(name))
        self._devices.end_service(name)
        effects.sends.append(DevicesChanged())

    def _end_reservation(self, reservation_id: str, effects: Effects) -> None:
        self._devices.reservations.end(reservation_id)
        effects.facts.append(ReservationEnded(reservation_id))
        effects.sends.append(DevicesChanged())

    def _watch_reservation(self, reservation: Reservation) -> None:
        for when in (reservation.from_unix_ms, reservation.until_unix_ms):
            self._alarms.set(when, "fleet", "")
