"""`kedge devices`: those of a tracker, or of this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kedge
from kedge.cli import output
from kedge.cli.place import build_runner, require_tracker
from kedge.rpc.cores import cpu_list

if TYPE_CHECKING:
    from kedge.rpc.artifact.place import Found
    from kedge.rpc.types import NoiseFloor


def devices(
    selector: Annotated[
        str, typer.Argument(metavar="SELECTOR", help="Only devices that match, e.g. 'arch=aarch64'.")
    ] = "",
    gone: Annotated[
        bool, typer.Option("--gone", help="Also those that are off, and when they were last seen.")
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Instead: what kernels can run on here, with the names that --on takes.")
    ] = False,
    tracker: output.TrackerOption = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Also what holds the code of jobs on each, and how noisy timings are there."
        ),
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """List the devices of a tracker, or with --local the CPU and the GPUs of this machine.

    Exits with 1 when a tracker has none.

    Examples:

      kedge devices --tracker 127.0.0.1:9190

      kedge devices 'arch=aarch64,mem_mb>=2048' --json

      kedge devices --gone

      kedge devices -v

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
            "=device", "state", "arch", "CPU", ">cores", ">memory", "GPUs", "target", "labels", "detail"
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
        for device in found if verbose else ():
            output.stdout().print("\n".join(_more(device)), soft_wrap=True)
    if not found:
        asked = f"no device matches {selector!r}" if selector else "no device is connected"
        hint = "'kedge tracker token create --role enrol' lets a device join; --gone lists those that left"
        output.stderr().print(f"{asked}\nhint: {hint}", soft_wrap=True)
        raise typer.Exit(1)


def _more(device: Any) -> list[str]:
    """What `--verbose` says of a device beyond its row."""
    held = device.info.confinement
    if held is None:
        first = f"{device.info.name}: its agent is older and does not say what holds the code of jobs"
        return [first, *map(_noise_text, device.noise)]
    lines = [f"{device.info.name}: jobs are held by {held}"]
    if held.measuring_cpus:
        lines.append(f"  cores kept for timings: {cpu_list(held.measuring_cpus)}")
    return [*lines, *(f"  not by {missing}" for missing in held.missing), *map(_noise_text, device.noise)]


def _noise_text(floor: NoiseFloor) -> str:
    """A device's noise with its age and conditions, or why it counts no more."""
    threads = f"{floor.num_threads} thread{'s' if floor.num_threads != 1 else ''}"
    age = output.age_text(time.time() - floor.measured_unix_ms / 1000)
    under = ", ".join(part for part in (floor.software, floor.governor) if part)
    stale = f"; stale: {floor.stale}" if floor.stale else ""
    compared = f"{floor.comparisons} compared, the last {age} ago, {under}{stale}"
    return f"  noise of timings with {threads} on {floor.on}: {floor.relative:.2%} ({compared})"


def _show_here(as_json: bool) -> None:
    """This machine's GPUs, and why there are none of a kind; a driver that fails is an error after the others."""
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
