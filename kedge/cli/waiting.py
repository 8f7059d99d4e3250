"""What a command waits for while its job is on its way: a device that is busy, or away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kedge.cli import output
from kedge.rpc.types import Job, JobState

INTERVAL_S = 1.0


@contextmanager
def watching(report: output.Report) -> Iterator[Callable[[Job], None]]:
    """What the changes of jobs are told to, one after the other: once a second it is reported where the job is."""
    stopped = threading.Event()
    last: Job | None = None

    def tell(job: Job) -> None:
        nonlocal last
        last = job

    def look() -> None:
        while not stopped.wait(INTERVAL_S):
            if last is not None and last.state is not JobState.DONE:
                report(state_text(last))

    thread = threading.Thread(target=look, name="kedge-watch", daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        stopped.set()
        thread.join()


def wait_text(job: Job) -> str:
    """Of a queued job: its place and about when it starts, as far as they are known; ", number 3 in line"."""
    place = f", number {job.position} in line" if job.position > 1 else ""
    return place + (f", about {output.age_text(job.eta_ms / 1000)}" if job.eta_ms else "")


def state_text(job: Job) -> str:
    """Where a job for one device is that is not done, and what keeps it there, in words."""
    device = job.spec.selector
    if job.state is JobState.QUEUED:
        return f"queued for {device}" + (f": {job.detail}" if job.detail else "") + wait_text(job)
    return f"{device}: {job.stage}" if job.stage is not None else f"sent to {device}"
