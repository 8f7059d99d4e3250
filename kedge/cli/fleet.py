"""`kedge tracker start`, `kedge agent start`, `kedge devices`, `kedge jobs`."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import kedge
from kedge.cli import output
from kedge.cli.devices import build_runner, require_tracker
from kedge.cli.waiting import wait_text

if TYPE_CHECKING:
    from kedge.rpc.artifact.place import Found

DEFAULT_PORT = 9190


def state_dir() -> Path:
    """Where trackers and agents keep what outlives them, unless told otherwise (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kedge"


def tracker_start(
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0: any free one.")] = DEFAULT_PORT,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Jobs, results and blobs.", show_default="~/.local/state/kedge/tracker"),
    ] = None,
) -> None:
    """Start the tracker in the foreground; Ctrl-C stops it, and jobs and results survive.

    The wire has neither encryption nor authentication yet: listen beyond loopback only on a network you trust.

    Examples:

      kedge tracker start

      kedge tracker start --port 0 --data-dir /srv/kedge
    """
    from kedge.rpc.tracker.main import run

    raise typer.Exit(run(host, port, data_dir or state_dir() / "tracker"))


def agent_start(
    tracker: output.TrackerOption = None,
    name: Annotated[str | None, typer.Option("--name", help="The device's name.", show_default="the host name")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; repeatable.")
    ] = None,
    threads: output.ThreadsOption = 0,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Its cache.", show_default="~/.local/state/kedge/agent/NAME")
    ] = None,
    runner: Annotated[
        Path | None, typer.Option("--runner", help="The native runner.", show_default="built for this machine")
    ] = None,
) -> None:
    """Offer this machine to a tracker, in the foreground; Ctrl-C stops the agent.

    Examples:

      kedge agent start --tracker 127.0.0.1:9190

      kedge agent start --tracker tracker:9190 --name bench-1 --label rack=a --threads 2
    """
    from kedge.deployment import parse_labels

    address = require_tracker(tracker)
    parse_labels(label or [])
    if runner is None:
        with output.progress("agent") as report:
            runner = build_runner(report)
    arguments = ["--tracker", address, "--runner", str(runner), "--threads", str(threads)]
    arguments += ["--data-dir", str(data_dir)] if data_dir else []
    arguments += ["--name", name] if name else []
    for item in label or ():
        arguments += ["--label", item]
    # The agent replaces this process: it needs none of what the command line has imported. Without -P, a queue.py in
    # the folder where it is started would take the place of Python's.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "kedge.device_agent", *arguments])


def devices(
    selector: Annotated[
        str, typer.Argument(metavar="SELECTOR", help="Only devices that match, e.g. 'arch=aarch64'.")
    ] = "",
    gone: Annotated[bool, typer.Option("--gone", help="Also those that are no longer connected.")] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Instead: what kernels can run on here, with the names that --on takes.")
    ] = False,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """List the devices of a tracker, or with --local the CPU and the GPUs of this machine.

    Exits with 1 when a tracker has none.

    Examples:

      kedge devices --tracker 127.0.0.1:9190

      kedge devices 'arch=aarch64,mem_mb>=2048' --json

      kedge devices --local
    """
    if local:
        _show_here(as_json)
        return
    with kedge.connect(require_tracker(tracker)) as fleet:
        found = fleet.devices(selector, include_gone=gone)
    if as_json:
        output.emit_json([device.to_json() for device in found])
    elif found:
        table = output.table(
            "device", "state", "arch", "CPU", ">cores", ">memory", "GPUs", "target", "labels", "detail"
        )
        for device in found:
            info = device.info
            labels = ", ".join(f"{key}={value}" for key, value in sorted(info.labels.items()))
            memory = output.size_text(info.memory_bytes)
            table.add_row(
                info.name,
                device.state,
                info.arch,
                info.cpu_name,
                str(info.num_cores),
                memory,
                "; ".join(f"{gpu.device} {gpu.name}" for gpu in info.accelerators) or "-",
                output.target_text(info.target),
                labels,
                output.device_detail(device),
            )
        output.show(table)
    if not found:
        asked = f"no device matches {selector!r}" if selector else "no device is connected"
        hint = f"on a device: kedge agent start --tracker {tracker}; --gone lists those that left"
        output.stderr().print(f"{asked}\nhint: {hint}", soft_wrap=True)
        raise typer.Exit(1)


def _show_here(as_json: bool) -> None:
    """This machine's GPUs, and why there are none of a kind; a driver that fails is an error after the others."""
    from dataclasses import asdict

    from kedge.isolated import gpus
    from kedge.rpc.artifact.place import GPU_KINDS
    from kedge.rpc.errors import JobError

    found: dict[str, Found] = {}
    failed: JobError | None = None
    with output.progress("devices") as report:
        build_runner(report)
        report("asking the drivers")
        for kind in GPU_KINDS:
            try:
                found[kind] = gpus(kind)
            except JobError as error:
                failed = failed or error
    if as_json:
        output.emit_json([asdict(gpu) for one in found.values() for gpu in one.accelerators])
    else:
        _show_found(found)
    if failed is not None:
        raise failed


def _show_found(found: Mapping[str, Found]) -> None:
    table = output.table("device", "name", "driver", "generation", ">memory", ">units", ">threads", ">shared")
    table.add_row("cpu", platform.machine(), "-", "-", "-", "-", "-", "-")
    for gpu in (gpu for one in found.values() for gpu in one.accelerators):
        sizes = (str(gpu.compute_units), str(gpu.max_threads), output.size_text(gpu.shared_bytes))
        memory = output.size_text(gpu.memory_bytes)
        table.add_row(gpu.device, gpu.name, gpu.driver, gpu.arch, memory, *sizes)
    output.show(table)
    for kind, one in found.items():
        if one.reason:
            output.stderr().print(f"{kind}: {one.reason}", soft_wrap=True)


def jobs(
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="How many, newest first.")] = 20,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """List the jobs of a tracker, newest first.

    Examples:

      kedge jobs --tracker 127.0.0.1:9190

      kedge jobs --limit 100 --json
    """
    with kedge.connect(require_tracker(tracker)) as fleet:
        found = fleet.jobs(limit=limit)
    if as_json:
        output.emit_json([job.to_json() for job in found])
        return
    if not found:
        output.stderr().print(f"no job was submitted to {tracker} yet", soft_wrap=True)
        return
    output.show(jobs_table(found))


def jobs_table(found: Sequence[Any]) -> Table:
    """Jobs for people: what they do, where they are, and what keeps them or came of them."""
    table = output.table("job", "user", "task", "state", "outcome", "device", ">age", "detail")
    for job in found:
        age = output.age_text(time.time() - job.submitted_unix_ms / 1000)
        user, device = job.user or "-", job.device or "-"
        table.add_row(job.id, user, _task(job), job.state, _outcome(job), device, age, _detail(job))
    return table


def _outcome(job: Any) -> str:
    return job.result.outcome.kind if job.result is not None else "-"


def _task(job: Any) -> str:
    from kedge.rpc.types import BenchTask

    kind = "bench" if isinstance(job.spec.task, BenchTask) else "run"
    return f"{kind} {job.spec.function}"


def _detail(job: Any) -> str:
    """Why it waits and for how long, or the first line of why it failed."""
    if job.detail:
        return f"{job.detail.partition(chr(10))[0]}{wait_text(job)}"
    said: str = job.result.outcome.message if job.result is not None else ""
    return said.partition("\n")[0]
