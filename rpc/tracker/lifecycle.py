"""What happens to a job between its submission and its end. Pure.

    queued --device--> assigned --JobStarted--> running --JobFinished--> done
       ^------ never began ----'                   '-- lease ran out, deadline, cancelled --> done

When a device fails, its job goes to another one, until `max_device_faults` have failed with it: then the job is to
blame, and ends.

A lease is (job, epoch). The epoch grows with every assignment, and a message under another one changes nothing, so a
stale agent can harm nothing. A lease begins when its assignment leaves, which is not before it is stored; it is renewed
by every heartbeat that names it and outlives a lost connection for `lease_ms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.rpc import messages as m
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.tracker.alarms import Alarms
from kedge.rpc.tracker.breaker import Breaker, Quarantine, Suspicion
from kedge.rpc.tracker.devices import Device, Roster, connection_of
from kedge.rpc.tracker.estimate import Durations
from kedge.rpc.tracker.facts import (
    DevicesChanged,
    Effects,
    JobAccepted,
    JobAssigned,
    JobCancelling,
    JobChanged,
    JobDone,
    JobRequeued,
    LeaseKey,
    ToAgent,
)
from kedge.rpc.tracker.jobs import Jobs, LiveJob
from kedge.rpc.tracker.scheduler import Shares, Want
from kedge.rpc.tracker.settings import Settings, seconds
from kedge.rpc.tracker.views import Views
from kedge.rpc.types import DeviceFault, Job, JobResult, JobState, Lease

#: Outcomes that may be the device's doing as well as the artifact's: nobody can tell from one job.
_SUSPICIOUS = (OutcomeKind.TIMEOUT, OutcomeKind.CRASH, OutcomeKind.LOAD_ERROR, OutcomeKind.OUT_OF_MEMORY)


class Lifecycle:
    """Moves jobs from state to state; what follows from it is added to the event's `effects`."""

    def __init__(
        self,
        rules: Settings,
        jobs: Jobs,
        devices: Roster,
        alarms: Alarms,
        shares: Shares,
        durations: Durations,
        views: Views,
    ) -> None:
        self._rules = rules
        self._jobs = jobs
        self._devices = devices
        self._alarms = alarms
        self._shares = shares
        self._durations = durations
        self._views = views
        self._quarantine = Quarantine(rules.quarantine_after, rules.quarantine_ms, rules.longest_quarantine_ms)
        #: The version of the queue that was last looked through for jobs that can start.
        self._planned = 0

    def admit(self, accepted: JobAccepted, now: int) -> None:
        """A new job waits."""
        job = self._jobs.add(accepted, now)
        self._jobs.line_up(job)
        self.watch(job)

    def schedule(self, now: int, effects: Effects) -> None:
        """Start what can start, where the queue or the devices have changed since nothing more could."""
        queue = self._jobs.queue
        if self._planned == queue.version and not any(isinstance(send, DevicesChanged) for send in effects.sends):
            return
        self._devices.expect(queue.lines)
        idle = [device.info.name for device in self._devices.available(now)] if len(queue) else []

        def takers(want: Want, names: Sequence[str]) -> list[str]:
            return self._devices.takers(want, names, now)

        plan = queue.assign(idle, takers, self._shares, now) if idle else []
        self._planned = queue.version
        for job_id, name in plan:
            job, device = self._jobs[job_id], self._devices[name]
            job.epoch = max(job.epoch, job.named_epoch) + 1
            job.assigned = JobAssigned(job_id, name, device.instance_id, job.epoch)
            job.sent, job.started, job.stage, job.stage_ms = False, False, Stage.TRANSFER, now
            job.assigned_ms = now
            self._shares.begin(job.accepted.user)
            device.holding.add(job.key)
            effects.facts.append(job.assigned)
            lease = Lease(job_id, job.epoch, self._rules.lease_ms)
            effects.sends.append(ToAgent(connection_of(device), m.AssignJob(lease, job.spec)))
            effects.sends += [JobChanged(self._views.job(job)), DevicesChanged()]

    def progress(self, device: Device, lease: Lease, stage: Stage, now: int, effects: Effects) -> None:
        """A device is in this stage of a job, if the lease is its own."""
        job = self._jobs.held_under((lease.job_id, lease.epoch), device.info.name)
        if job is None:
            return
        self.renew(job, now)
        if (job.started and job.stage is stage) or job.is_under_way:
            return
        job.started, job.stage, job.stage_ms = True, stage, now
        self.watch(job)
        effects.sends.append(JobChanged(self._views.job(job)))

    def report(self, job: LiveJob, device: Device, result: JobResult, now: int, effects: Effects) -> None:
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

    def renew(self, job: LiveJob, now: int) -> None:
        """The device has the lease: it lasts from now on."""
        begins = not job.sent
        job.sent, job.lease_ms = True, now + self._rules.lease_ms
        if begins:
            self.watch(job)

    def check(self, job: LiveJob, now: int, effects: Effects) -> None:
        """Do what is due: deadlines, leases, cancellations that nobody confirmed."""
        if job.assigned is not None and not job.sent:
            return
        due = job.due_ms(self._rules)
        if now < due:
            self._alarms.set(due, "job", job.id)
        elif job.cancelling is None and now >= job.client_due_ms(self._rules):
            why = f"nothing was heard of its client for {seconds(job.client_due_ms(self._rules) - job.client_ms)}"
            self.call_off(job, why, now, effects)
        elif job.assigned is None:
            why = f"it waited {seconds(job.spec.deadlines.queue_ms)} ({self._devices.why_waiting(job.want, now)})"
            kind = OutcomeKind.DEVICE_LOST if job.faults else OutcomeKind.TIMEOUT
            self._end(job, kind, Stage.QUEUE, "; ".join([*job.told, why]), now, effects)
        elif job.cancelling is not None and now >= job.cancel_ms + self._rules.cancel_grace_ms:
            why = f"{job.cancelling} (the device did not confirm)"
            self._end(job, OutcomeKind.CANCELLED, job.stage, why, now, effects)
        elif now >= job.lease_ms:
            why = "nothing was heard of it for as long as its lease lasts"
            self.give_up(job, job.started is False, why, now, effects)
        elif job.is_under_way:
            longest = seconds(job.spec.deadlines.run_ms)
            self.call_off(job, f"it lasted {longest}, which is as long as it may", now, effects)
        elif job.lease_ms - self._rules.lease_ms <= job.stage_ends_ms:
            # Nothing was heard of it since: the agent may have ended it in time, and its lease decides.
            self._alarms.set(job.lease_ms, "job", job.id)
        else:
            stage = job.stage or Stage.TRANSFER
            limit = seconds(job.spec.deadlines.of(stage))
            self.abort(job, f"the {stage} deadline passed", effects)
            why = f"stage {stage} took longer than {limit}, and the agent did not end it"
            self._blame(job, why, now, effects)
            self._end(job, OutcomeKind.TIMEOUT, stage, why, now, effects)

    def call_off(self, job: LiveJob, reason: str, now: int, effects: Effects) -> None:
        """Stop a job, at once where it waits; a device is asked to."""
        if not job.sent:
            self._take_back(job, now, effects)
            self._end(job, OutcomeKind.CANCELLED, Stage.QUEUE, reason, now, effects)
            return
        job.cancelling, job.cancel_ms = reason, now
        effects.facts.append(JobCancelling(job.id, reason))
        self.abort(job, reason, effects)
        self.watch(job)
        effects.sends.append(JobChanged(self._views.job(job)))

    def withdraw(self, job: LiveJob, now: int, effects: Effects) -> None:
        """The job never was. A device that has begun it is told, and free once it has ended it."""
        self._jobs.remove(job)
        if job.sent:
            self.abort(job, "the tracker could not store it", effects)
        else:
            self._take_back(job, now, effects)
        self._leave(job, now)

    def give_up(
        self, job: LiveJob, never_began: bool, why: str, now: int, effects: Effects, *, meant: bool = False
    ) -> None:
        """The device that had the job left, on purpose (`meant`) or not: queue it again, or call it lost."""
        assert job.assigned is not None
        if job.cancelling is not None:
            self._end(job, OutcomeKind.CANCELLED, job.stage, job.cancelling, now, effects)
        elif job.is_under_way:
            self.lose_session(job, why, now, effects, meant=meant)
        elif (never_began or meant) and (job.requeues < self._rules.max_requeues or not job.sent):
            if job.sent and not meant:
                self._blame(job, why, now, effects)
            job.requeues += job.sent
            self._requeue(job, now, effects)
        else:
            self._device_failed(job, OutcomeKind.DEVICE_LOST, job.stage, why, now, effects)

    def lose_session(self, job: LiveJob, why: str, now: int, effects: Effects, *, meant: bool = False) -> None:
        """What a session's client had on its device is gone."""
        if not meant:
            self._blame(job, why, now, effects)
        self._end(job, OutcomeKind.DEVICE_LOST, job.stage, why, now, effects)

    def _device_failed(
        self, job: LiveJob, kind: OutcomeKind, stage: Stage | None, why: str, now: int, effects: Effects
    ) -> None:
        """The device was at fault."""
        self._blame(job, why, now, effects)
        self._try_again(job, kind, stage, why, now, effects)

    def _try_again(
        self, job: LiveJob, kind: OutcomeKind, stage: Stage | None, why: str, now: int, effects: Effects
    ) -> None:
        """Another device shall have the job, unless too many have failed with it: then it is to blame itself.

        Where no other one may have it, the same device is tried again, and failing twice is no excuse for that.
        """
        assert job.assigned is not None
        if job.is_under_way:
            self._end(job, kind, stage, why, now, effects)
            return
        job.faults += (DeviceFault(job.assigned.device, why),)
        if len(job.faults) < self._rules.max_device_faults:
            self._requeue(job, now, effects)
            return
        told = job.told
        failed = len({fault.device for fault in job.faults})
        if failed > 1:
            told.append(f"after {failed} devices that failed with it, the job is not given to another one")
            self._forgive(job, effects)
        elif len(told) > 1:
            told.append(f"it was tried {len(told)} times there, as no other device could have it")
        self._end(job, kind, stage, "; ".join(told), now, effects)

    def _forgive(self, job: LiveJob, effects: Effects) -> None:
        """It was not the devices that failed."""
        for fault in job.faults:
            self._devices.breaker(fault.device).forgive(job.id)
            effects.sends.append(DevicesChanged())

    def _blame(self, job: LiveJob, why: str, now: int, effects: Effects) -> None:
        """Count a failure against the device that has the job."""
        assert job.assigned is not None
        breaker = self._devices.breaker(job.assigned.device)
        self._watch_breaker(breaker, breaker.fault(job.id, why, now, self._quarantine), effects)

    def _suspect(self, job: LiveJob, kind: OutcomeKind, now: int, effects: Effects) -> None:
        """The job ended badly on the device that has it, for reasons that may be either's."""
        assert job.assigned is not None
        breaker = self._devices.breaker(job.assigned.device)
        failure = Suspicion(job.accepted.user, job.spec.manifest.digest, kind)
        self._watch_breaker(breaker, breaker.suspect(job.id, failure, now, self._quarantine), effects)

    def _watch_breaker(self, breaker: Breaker, opened: bool, effects: Effects) -> None:
        if opened:
            self._alarms.set(breaker.until_ms, "fleet", "")
            effects.sends.append(DevicesChanged())

    def _requeue(self, job: LiveJob, now: int, effects: Effects) -> None:
        """The job waits again, for another device if it can be."""
        self._take_back(job, now, effects)
        self._leave(job, now)
        job.assigned, job.sent, job.started, job.stage, job.queued_ms = None, False, False, None, now
        effects.facts.append(JobRequeued(job.id, now, job.requeues, job.faults))
        self._jobs.line_up(job)
        self.watch(job)
        effects.sends.append(JobChanged(self._views.job(job)))

    def _take_back(self, job: LiveJob, now: int, effects: Effects) -> None:
        """The device that had the job, if any, is free again."""
        if job.assigned is not None:
            self._release(self._devices.get(job.assigned.device), job.key, now, effects)

    def _leave(self, job: LiveJob, now: int) -> None:
        """Its user no longer holds a device with it."""
        if job.assigned is not None:
            self._shares.end(job.accepted.user, now - job.assigned_ms, now)

    def _release(self, device: Device | None, key: LeaseKey, now: int, effects: Effects) -> None:
        if device is not None:
            was_idle = device.idle
            device.holding.discard(key)
            self.mark(device, was_idle, now, effects)

    def mark(self, device: Device, was_idle: bool, now: int, effects: Effects) -> None:
        """The device may have become idle, or busy."""
        if device.idle != was_idle:
            device.idle_ms = now
            effects.sends.append(DevicesChanged())

    def _end(self, job: LiveJob, kind: OutcomeKind, stage: Stage | None, why: str, now: int, effects: Effects) -> None:
        """The tracker's own verdict on a job."""
        device = job.assigned.device if job.assigned else ""
        self._finish(job, JobResult(Outcome(kind, stage, message=why), device=device), 0, now, effects)

    def _finish(self, job: LiveJob, result: JobResult, epoch: int, now: int, effects: Effects) -> None:
        self._jobs.remove(job)
        if result.outcome.kind is OutcomeKind.CANCELLED:
            # Whoever calls a job off before a second device has tried it must not leave the first one in the wrong.
            self._forgive(job, effects)
        self._leave(job, now)
        self._jobs.remember_end(job.id, epoch)
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

    def abort(self, job: LiveJob, reason: str, effects: Effects) -> None:
        """Ask the device to stop a job, if it can be reached."""
        device = self._devices.get(job.assigned.device) if job.assigned else None
        if device is not None and device.connection is not None:
            effects.sends.append(ToAgent(device.connection, m.AbortJob(Lease(job.id, job.epoch), reason)))

    def watch(self, job: LiveJob) -> None:
        """Look at the job when it is due."""
        self._alarms.set(job.due_ms(self._rules), "job", job.id)
