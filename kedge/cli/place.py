"""Where a command runs an artifact: this machine, isolated in a runner, or a device of a tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Terms:
    """What a command says of its jobs on a device; deadlines of stages in seconds, None is the tracker's default."""

    priority: int = 0
    queue_s: float | None = None
    transfer_s: float | None = None
    load_s: float | None = None
    run_s: float | None = None

    @property
    def deadlines(self) -> Deadlines:
        """As jobs have them."""
        return Deadlines(
            queue_ms=_milliseconds(self.queue_s),
            transfer_ms=_milliseconds(self.transfer_s),
            load_ms=_milliseconds(self.load_s),
            run_ms=_milliseconds(self.run_s),
        )

    def option(self) -> str | None:
        """One that was given; None where none was."""
        stages = {
            "--queue-timeout": self.queue_s,
            "--transfer-timeout": self.transfer_s,
            "--load-timeout": self.load_s,
            "--timeout": self.run_s,
        }
        given = (name for name, seconds in stages.items() if seconds is not None)
        return "--priority" if self.priority else next(given, None)


def _milliseconds(seconds: float | None) -> int:
    """A deadline as jobs have it: at least 1; 0 where none was given."""
    return 0 if seconds is None else max(1, round(seconds * 1000))


def require_device(context: typer.Context, selector: str | None, terms: Terms) -> None:
    """Raise UsageError where a tracker was typed but no device: whoever names a tracker does not mean this machine.

    A tracker from the environment says nothing of the kind. The terms of jobs say something to devices alone.
    """
    option = terms.option()
    if selector is None and option is not None:
        raise UsageError(
            f"{option} without --device: here nothing waits, and nothing ends a run but Ctrl-C",
            hint=f"add --device SELECTOR, or drop {option}",
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
    terms: Terms,
    on: str = "",
) -> Iterator[Any]:
    """A device that `selector` chooses and that can run the artifact, or this machine where there is no selector.

    `terms` are those of each job on a device, `on` says where kernels run (see `place`). SIGTERM cancels
    what runs, as Ctrl-C does.
    """
    if selector is None:
        build_runner(report)
        with ended_in_order(), kedge.local(threads=threads, device=on) as device:
            yield device
        return
    address = require_tracker(tracker)
    report(f"asking {address} for {selector}")
    with (
        ended_in_order(),
        kedge.connect(address) as fleet,
        watching(report) as tell,
        fleet.pin(
            selector,
            artifact=artifact,
            threads=threads,
            deadlines=terms.deadlines,
            on=on,
            priority=terms.priority,
            progress=tell,
        ) as device,
    ):
        report(f"sending the job to {device.name}")
        yield device


def build_runner(report: output.Report) -> Path:
    """The native runner of this machine; its first build takes seconds, and says so."""
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime

    return build_runtime(parse("native"), progress=report).runner
