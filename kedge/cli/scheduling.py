"""`kedge cancel`, `kedge drain`, `kedge resume`, `kedge reserve`, `kedge release`: who gets which device."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

import kedge
from kedge.cli import output
from kedge.cli.arguments import parse_duration, parse_moment
from kedge.cli.completion import completed, device_names, job_ids, reservation_ids
from kedge.cli.place import require_tracker
from kedge.rpc.errors import KedgeError, PermissionDeniedError
from kedge.rpc.status import UnknownJobError
from kedge.rpc.types import Job, Reservation

DeviceName = Annotated[
    str, typer.Argument(metavar="DEVICE", help="The device's name.", autocompletion=completed(device_names))
]


def cancel(
    job: Annotated[
        list[str],
        typer.Argument(metavar="JOB…", help="Ids, as 'kedge jobs' shows.", autocompletion=completed(job_ids)),
    ],
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Stop jobs: at once where they wait, otherwise their device is asked to. What is done stays as it is.

    Examples:

      kedge cancel 3f2a9c0b1d22 --tracker 127.0.0.1:9190
    """
    stopped: list[Job] = []
    first: KedgeError | None = None
    with kedge.connect(require_tracker(tracker)) as fleet:
        for job_id in job:
            try:
                one = fleet.job(job_id).cancel()
            except (UnknownJobError, PermissionDeniedError) as error:
                # What is said of one says nothing of the others; the first is told again, with its remedy.
                if len(job) > 1:
                    output.stderr().print(f"{job_id}: {error.message}", soft_wrap=True)
                first = first or error
                continue
            stopped.append(one)
            if not as_json:
                how = one.result.outcome.kind if one.result is not None else f"{one.device} was asked to stop it"
                output.stdout().print(f"{one.id}: {how}", soft_wrap=True)
    if as_json:
        output.emit_json([one.to_json() for one in stopped])
    if first is not None:
        raise first


def drain(
    device: DeviceName,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever waits for it.")] = "maintenance",
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Give a device no more jobs; the one that it runs ends in its own time. `kedge resume` puts it back.

    Examples:

      kedge drain rpi4-2 --reason 'new SD card'
    """
    _set_maintenance(device, True, reason, tracker, as_json)


def resume(device: DeviceName, tracker: output.TrackerOption = None, as_json: output.JsonFlag = False) -> None:
    """Give a device jobs again, whether it was drained or in quarantine.

    Examples:

      kedge resume rpi4-2
    """
    _set_maintenance(device, False, "", tracker, as_json)


def _set_maintenance(device: str, enabled: bool, reason: str, tracker: str | None, as_json: bool) -> None:
    with kedge.connect(require_tracker(tracker)) as fleet:
        status = fleet.set_maintenance(device, enabled, reason)
    if as_json:
        output.emit_json(status.to_json())
        return
    busy = f", once job {status.running_job_id} has ended" if enabled and status.running_job_id else ""
    output.stdout().print(f"{status.info.name}: {status.state}{busy}", soft_wrap=True)


def reserve(
    selector: Annotated[str, typer.Argument(metavar="SELECTOR", help="Which device: by name or labels.")],
    duration: Annotated[str, typer.Option("--for", metavar="DURATION", help="90s, 30min, 2h, 1d.")] = "1h",
    begin: Annotated[
        str,
        typer.Option("--from", metavar="TIME", help="14:00, or '2026-11-27 14:00' [default: now]", show_default=False),
    ] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever waits for it.")] = "",
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Keep one device that matches for your own jobs; what runs there for others ends in its own time.

    `kedge devices` shows reservations, those that have not begun as well, and --gone those of devices that are off.
    Half of the devices are for the others, unless you are an administrator.

    Examples:

      kedge reserve rpi4-2 --from 11:30 --for 2h --reason 'demo at noon'

      kedge reserve 'arch=aarch64,mem_mb>=2048' --for 30min --json
    """
    seconds = parse_duration(duration)
    begin_s = parse_moment(begin, datetime.now()) if begin else 0.0
    with kedge.connect(require_tracker(tracker)) as fleet:
        _show(fleet.reserve(selector, seconds, begin_unix_s=begin_s, reason=reason), as_json, "")


def release(
    reservation: Annotated[
        str,
        typer.Argument(metavar="ID", help="As 'kedge reserve' printed.", autocompletion=completed(reservation_ids)),
    ],
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Give a reserved device back before its time is over.

    Examples:

      kedge release 5d1f0a77c3e2
    """
    with kedge.connect(require_tracker(tracker)) as fleet:
        _show(fleet.end_reservation(reservation), as_json, "released: ")


def _show(reservation: Reservation, as_json: bool, prefix: str) -> None:
    if as_json:
        output.emit_json(reservation.to_json())
        return
    begins, until = output.clock_text(reservation.from_unix_ms), output.clock_text(reservation.until_unix_ms)
    output.stdout().print(
        f"{prefix}{reservation.device} from {begins} until {until}, reservation {reservation.id}", soft_wrap=True
    )
