"""Jobs and devices as whoever asks is told of them. Pure."""

from __future__ import annotations

from kedge.rpc.tracker.devices import Device, Roster
from kedge.rpc.tracker.estimate import Durations, Wait, waits
from kedge.rpc.tracker.jobs import Jobs, LiveJob
from kedge.rpc.tracker.scheduler import Shares, Want
from kedge.rpc.types import DeviceStatus, Job, JobState

#: So many, in so many lines, can be told anew how long they wait whenever one of them starts.
_FEW_JOBS = 500
_FEW_LINES = 50


class Views:
    """What there is to say of jobs and devices, as of the newest event."""

    def __init__(self, jobs: Jobs, devices: Roster, shares: Shares, durations: Durations) -> None:
        self._jobs = jobs
        self._devices = devices
        self._shares = shares
        self._durations = durations
        self._known_waits: tuple[tuple[int, int], dict[str, Wait]] | None = None
        #: Of the newest event: questions are answered as of then, and whatever changes by itself has an alarm.
        self.now = 0

    def job(self, job: LiveJob, reasons: dict[Want, str] | None = None) -> Job:
        """The job for whoever asks; `reasons` keeps what many jobs wait for, between calls."""
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
            detail=self.detail(job, {} if reasons is None else reasons),
            user=accepted.user,
            position=0 if wait is None else wait.position,
            eta_ms=None if wait is None else wait.eta_ms,
            faults=job.faults,
        )

    def detail(self, job: LiveJob, reasons: dict[Want, str]) -> str:
        """Why a queued job still waits; empty for any other."""
        if job.assigned is not None:
            return ""
        if job.cancelling is not None:
            return "being cancelled"
        if job.want not in reasons:
            reasons[job.want] = self._devices.why_waiting(job.want, self.now)
        return "; ".join([*job.told, reasons[job.want]])

    def device(self, device: Device) -> DeviceStatus:
        """The device for whoever asks."""
        running = next((key[0] for key in device.holding if self._jobs.held_under(key, device.info.name)), "")
        return self._devices.status(device, running, self.now)

    def _waits(self) -> dict[str, Wait]:
        """How long every queued job may wait: as of now, or where many wait, as of a few seconds ago."""
        queue = self._jobs.queue
        few = len(queue) <= _FEW_JOBS and queue.lines <= _FEW_LINES
        age = (queue.version if few else 0), self.now // (1_000 if few else 5_000)
        if self._known_waits is None or self._known_waits[0] != age:
            order, working = queue.order(self._shares, self.now), self._devices.working(self.now)

            def usable(want: Want) -> frozenset[str]:
                return frozenset(self._devices.takers(want, working, self.now))

            self._known_waits = age, waits(order, usable, self._free_in, self._takes)
        return self._known_waits[1]

    def _free_in(self, name: str) -> float | None:
        device = self._devices[name]
        holder = next((job for key in device.holding if (job := self._jobs.held_under(key, name))), None)
        if holder is None:
            return 0.0
        expected = self._durations.expect(holder.spec)
        return None if expected is None else max(0.0, expected - (self.now - holder.assigned_ms))

    def _takes(self, job_id: str) -> float | None:
        return self._durations.expect(self._jobs[job_id].spec)
