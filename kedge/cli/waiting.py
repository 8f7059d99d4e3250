"""What a command waits for while its job is on its way: a device that is busy, or away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kedge.cli import output
from kedge.rpc.errors import KedgeError
from kedge.rpc.types import Job, JobState

INTERVAL_S = 1.0
#: How long the end waits for a question that is still open.
_JOIN_S = 2.0
_UNFINISHED = tuple(state for state in JobState if state is not JobState.DONE)


@contextmanager
def watching(fleet: Any, device: str, report: output.Report) -> Iterator[None]:
    """Report, once a second, where a job is that is submitted inside for this device alone."""
    before = {job.id for job in fleet.jobs(states=_UNFINISHED)}
    stopped = threading.Event()

    def look() -> None:
        while not stopped.wait(INTERVAL_S):
            try:
                jobs = fleet.jobs(states=_UNFINISHED)
            except (KedgeError, ValueError):  # the tracker went away, or the connection was closed meanwhile
                continue
            text = state_text(device, ours(jobs, before, device))
            if text and not stopped.is_set():
                report(text)

    thread = threading.Thread(target=look, name="kedge-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_JOIN_S)


def wait_text(job: Job) -> str:
    """Of a queued job: its place and about when it starts, as far as they are known; ", number 3 in line"."""
    place = f", number {job.position} in line" if job.position > 1 else ""
    return place + (f", about {output.age_text(job.eta_ms / 1000)}" if job.eta_ms else "")


def ours(jobs: list[Job], before: set[str], device: str) -> Job | None:
    """The oldest job for this device alone that was not there before: newer ones wait behind it."""
    new = [job for job in jobs if job.id not in before and job.spec.selector == device]
    return min(new, key=lambda job: job.submitted_unix_ms, default=None)


def state_text(device: str, job: Job | None) -> str | None:
    """Where the job is and what keeps it there, in words; None where there is nothing to say of it."""
    if job is None:
        return None
    if job.state is JobState.QUEUED:
        return f"queued for {device}" + (f": {job.detail}" if job.detail else "") + wait_text(job)
    return f"{device}: {job.stage}" if job.stage is not None else f"sent to {device}"
