"""`kedge doctor`: every hop from the compiler to a device, and what to fix."""

from __future__ import annotations

import typer
from rich.text import Text

from kedge.cli import output


def doctor(
    device: output.DeviceOption = None,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Check this installation, the tracker and a device, and say what to fix. Exits with 1 when something is broken.

    Here: packages, cache, compiler and toolchain, runner, GPUs. With --tracker also the way there: network,
    credentials, TLS, versions, what you may do and until when, clocks, the tracker's store and disk, and every device
    that is connected. With --device one of them runs a job.

    Examples:

      kedge doctor

      kedge doctor --tracker tracker:9190 --device arch=aarch64
    """
    from kedge.diagnosis import diagnose

    with output.progress("doctor") as report:
        findings = diagnose(tracker, device, progress=report)
    if as_json:
        output.emit_json([finding.to_json() for finding in findings])
    else:
        colours = {"ok": "green", "note": "yellow", "broken": "red"}
        table = output.table("", "check", "found", "what to do")
        for finding in findings:
            table.add_row(
                Text(finding.status, style=colours[finding.status]), finding.check, finding.found, finding.remedy
            )
        output.show(table)
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)
