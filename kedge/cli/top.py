"""`kedge top`: devices and unfinished jobs, live."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

import kedge
from kedge.cli import output
from kedge.cli.ending import ended_in_order
from kedge.cli.jobs import jobs_table
from kedge.cli.place import require_tracker
from kedge.rpc.errors import ConnectError
from kedge.rpc.types import DeviceState, DeviceStatus, Job, JobState

_HELD = (JobState.ASSIGNED, JobState.RUNNING)
_STYLES = {
    DeviceState.IDLE: "green",
    DeviceState.BUSY: "bold cyan",
    DeviceState.GONE: "dim",
    DeviceState.MAINTENANCE: "yellow",
    DeviceState.QUARANTINED: "bold red",
}
#: Jobs of either kind, held by devices or waiting, that are looked at; the picture says where there are more.
_MOST_JOBS = 1_000


def top(
    selector: Annotated[str, typer.Argument(metavar="SELECTOR", help="Only devices that match.")] = "",
    interval: Annotated[float, typer.Option("--interval", min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and exit; so do pipes and files.")] = False,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Watch devices and the jobs that wait or run; Ctrl-C ends it.

    Examples:

      kedge top --tracker 127.0.0.1:9190

      kedge top 'arch=aarch64' --once
    """
    address = require_tracker(tracker)
    with kedge.connect(address) as fleet:
        devices, jobs = _look(fleet, selector)
        if as_json:
            output.emit_json({"devices": [d.to_json() for d in devices], "jobs": [job.to_json() for job in jobs]})
            return
        console = output.stdout()
        if once or not console.is_terminal:
            console.print(_picture(address, devices, jobs, None))
            return
        # Around the whole: whoever sees the first picture may press Ctrl-C at once.
        with (
            contextlib.suppress(KeyboardInterrupt),
            ended_in_order(),
            _screen(_picture(address, devices, jobs, console.height)) as live,
        ):
            stopped = threading.Event()
            while not stopped.wait(interval):
                live.update(_next(fleet, address, selector, live.console.height), refresh=True)


@contextmanager
def _screen(first: RenderableType) -> Iterator[Live]:
    """The whole terminal, given back as it was."""
    live = Live(first, console=output.stdout(), screen=True, auto_refresh=False)
    try:
        # Its own `with` would leave the screen as it is where Ctrl-C comes while this shows the first picture.
        live.start(refresh=True)
        yield live
    finally:
        live.stop()


def _look(fleet: Any, selector: str) -> tuple[Sequence[DeviceStatus], Sequence[Job]]:
    held = fleet.jobs(limit=_MOST_JOBS, states=_HELD)
    # Who came first is next in line, more or less.
    waiting = fleet.jobs(limit=_MOST_JOBS, states=(JobState.QUEUED,), oldest_first=True)
    return fleet.devices(selector, include_gone=True), [*held, *waiting]


def _next(fleet: Any, address: str, selector: str, height: int) -> RenderableType:
    """The picture now; a tracker that is away is waited for, and the picture says so."""
    try:
        return _picture(address, *_look(fleet, selector), height)
    except ConnectError as error:
        return Text(f"{time.strftime('%H:%M:%S')}  {error}", style="red")


def _picture(address: str, devices: Sequence[DeviceStatus], jobs: Sequence[Job], height: int | None) -> RenderableType:
    """Devices above, jobs below: those that run, then those that wait, in the order in which they may start."""
    states = Counter(device.state for device in devices)
    said = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    running = [job for job in jobs if job.state is not JobState.QUEUED]
    waiting = sorted((job for job in jobs if job.state is JobState.QUEUED), key=lambda job: job.position)
    head = Text(f"{address}  {time.strftime('%H:%M:%S')}  devices: {said}  jobs: {_count(running)} running, ")
    head.append(f"{_count(waiting)} waiting")
    room = None if height is None else max(2, height - 5)
    shown_devices = list(devices) if room is None else list(devices)[: max(1, room // 2)]
    left = None if room is None else max(1, room - len(shown_devices))
    shown_jobs = (running + waiting)[:left]
    parts: list[RenderableType] = [head, Text(), _device_table(shown_devices)]
    hidden = len(devices) - len(shown_devices)
    if hidden:
        parts.append(Text(f"… and {hidden} more devices", style="dim"))
    return Group(*parts, Text(), jobs_table(shown_jobs))


def _count(jobs: Sequence[Job]) -> str:
    return f"{len(jobs)}{'+' if len(jobs) == _MOST_JOBS else ''}"


def _device_table(devices: Sequence[DeviceStatus]) -> Table:
    table = output.table("=device", "state", "job", ">load", ">°C", ">MHz", ">memory free", "detail")
    for device in devices:
        health = device.health
        state = Text(device.state, style=_STYLES.get(device.state, ""))
        job = device.running_job_id or "-"
        numbers = ["-"] * 4
        if health is not None:
            memory = health.memory_available_bytes
            numbers = [
                _number(health.load_1min, 2),
                _number(health.temperature_celsius, 0),
                _number(health.frequency_mhz, 0),
                "-" if memory is None else output.size_text(memory),
            ]
        table.add_row(device.info.name, state, job, *numbers, output.device_detail(device))
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
