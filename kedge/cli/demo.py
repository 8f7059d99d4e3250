"""`kedge demo`: the main job as one readable table."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from kedge.cli import output
from kedge.cli.ending import ended_in_order


def demo(
    arm: Annotated[bool, typer.Option("--arm/--no-arm", help="Also run on an emulated ARM board.")] = True,
    as_json: output.JsonFlag = False,
) -> None:
    """Run the main job: compile a trained digits classifier for every device, dispatch, run, check and time it.

    Starts a tracker, an agent on this machine and, where qemu is there, an emulated ARM board that the agent is
    deployed to over SSH. Exits with 1 when a device is wrong or missing. Nothing is left running.

    Examples:

      kedge demo

      kedge demo --no-arm --json
    """
    from kedge.demo.scenario import run_demo

    console, started = output.stderr(), time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - started:5.1f} s] {line}", soft_wrap=True)

    with ended_in_order():
        rows = run_demo(say, arm=arm)
    if as_json:
        output.emit_json([row.to_json() for row in rows])
    else:
        table = output.table(
            "device",
            "arch",
            ">artifact",
            ">accuracy",
            ">max |error|",
            ">median",
            "95 % interval",
            "verdict",
            "result",
        )
        for row in rows:
            timing = row.timing
            table.add_row(
                row.device,
                row.arch,
                output.size_text(row.artifact_bytes) if row.artifact_bytes else "-",
                "-" if row.accuracy is None else f"{row.accuracy:.2%}",
                "-" if row.max_error is None else f"{row.max_error:.1e}",
                "-" if timing is None else f"{timing.median_ms * 1e3:.1f} µs",
                "-" if timing is None else _interval(timing.interval_ms()),
                "-" if timing is None else timing.verdict,
                Text("ok", style="green") if row.ok else Text(f"{row.problem}", style="red"),
            )
        output.show(table)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0] * 1e3:.1f} – {interval[1] * 1e3:.1f} µs"
