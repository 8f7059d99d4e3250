"""Where a command runs an artifact: this machine, isolated in a runner, or a device of a tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

import kedge
from kedge.cli import output
from kedge.cli.ending import ended_in_order
from kedge.cli.waiting import watching
from kedge.rpc.artifact.place import parse_device
from kedge.rpc.errors import ConnectError, InputError, UsageError
from kedge.rpc.types import Deadlines


def require_tracker(tracker: str | None) -> str:
    """The tracker's address; raises ConnectError where none was named."""
    if not tracker:
        raise ConnectError("no tracker is named", hint="add --tracker HOST:PORT, or set KEDGE_TRACKER")
    return tracker


def require_device(context: typer.Context, selector: str | None, timeout_s: float | None = None) -> None:
    """Raise UsageError where a tracker was typed but no device: whoever names a tracker does not mean this machine.

    A tracker from the environment says nothing of the kind. A timeout says something to devices alone.
    """
    if selector is None and timeout_s is not None:
        raise UsageError(
            "--timeout without --device: on this machine nothing ends a run but Ctrl-C",
            hint="add --device SELECTOR, or drop --timeout",
        )
    source = context.get_parameter_source("tracker")
    if selector is None and source is not None and source.name == "COMMANDLINE":
        raise UsageError(
            "--tracker without --device: which device is meant?",
            hint="add --device SELECTOR ('kedge devices' lists them); without --tracker it runs on this machine",
        )


def check_on(text: str) -> str:
    """The value of `--on`; raises UsageError where it names no device."""
    try:
        parse_device(text)
    except InputError as error:
        raise UsageError(f"--on: {error.message}", hint=error.hint) from error
    return text


@contextmanager
def open_device(
    artifact: kedge.Artifact,
    selector: str | None,
    tracker: str | None,
    threads: int,
    report: output.Report,
    timeout_s: float | None = None,
    on: str = "",
) -> Iterator[Any]:
    """A device that `selector` chooses and that can run the artifact, or this machine where there is no selector.

    `timeout_s` is the deadline of each run on a device, `on` says where kernels run (see `place`). SIGTERM cancels
    what runs, as Ctrl-C does.
    """
    if selector is None:
        build_runner(report)
        with ended_in_order(), kedge.local(threads=threads, device=on) as device:
            yield device
        return
    address = require_tracker(tracker)
    report(f"asking {address} for {selector}")
    deadlines = Deadlines(run_ms=max(1, round((timeout_s or 0) * 1000))) if timeout_s is not None else None
    with (
        ended_in_order(),
        kedge.connect(address) as fleet,
        fleet.pin(selector, artifact=artifact, threads=threads, deadlines=deadlines, on=on) as device,
    ):
        report(f"sending the job to {device.name}")
        with watching(fleet, device.name, report):
            yield device


def build_runner(report: output.Report) -> Path:
    """The native runner of this machine; its first build takes seconds, and says so."""
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime

    return build_runtime(parse("native"), progress=report).runner
