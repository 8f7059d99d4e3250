"""What the shell completes by asking the tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer

import kedge
from kedge.rpc.errors import KedgeError
from kedge.rpc.types import JobState


def completed(ask: Callable[[Any], Iterable[str]]) -> Callable[[typer.Context, str], list[str]]:
    """Completes what the tracker knows. Where it cannot be asked there is nothing to offer: nobody sees an error."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        tracker = context.params.get("tracker")
        if not tracker:
            return []
        try:
            with kedge.connect(tracker) as fleet:
                return sorted(word for word in ask(fleet) if word.startswith(incomplete))
        except KedgeError:
            return []

    return complete


def device_names(fleet: Any) -> list[str]:
    """Of all devices, those that are off among them."""
    return [device.info.name for device in fleet.devices(include_gone=True)]


def job_ids(fleet: Any) -> list[str]:
    """Of jobs that are not done."""
    unfinished = tuple(state for state in JobState if state is not JobState.DONE)
    return [job.id for job in fleet.jobs(states=unfinished)]


def recent_job_ids(fleet: Any) -> list[str]:
    """Of the newest jobs, done or not."""
    return [job.id for job in fleet.jobs()]


def reservation_ids(fleet: Any) -> list[str]:
    """Of reservations that have not ended."""
    every = fleet.devices(include_gone=True)
    return [item.id for device in every for item in (device.reservation, *device.upcoming) if item is not None]
