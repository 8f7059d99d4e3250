"""`kedge tracker start`, `kedge agent start`, `kedge devices`."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kedge
from kedge.cli import output
from kedge.cli.arguments import parse_bytes
from kedge.cli.devices import build_runner, require_tracker
from kedge.rpc.cores import cpu_list
from kedge.rpc.errors import UsageError
from kedge.rpc.logs import FORMATS
from kedge.rpc.names import check_name

if TYPE_CHECKING:
    from kedge.deployment import Joining
    from kedge.rpc.artifact.place import Found
    from kedge.rpc.types import NoiseFloor

DEFAULT_PORT = 9190


def state_dir() -> Path:
    """Where trackers and agents keep what outlives them, unless told otherwise (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kedge"


InsecureFlag = Annotated[
    bool,
    typer.Option("--insecure-loopback", help="Plaintext, without asking who is there; on this machine only."),
]


LogFormatOption = Annotated[
    str, typer.Option("--log-format", metavar="text|json", help="The log on stderr: lines, or JSON objects.")
]


def check_log_format(text: str) -> str:
    """The value of `--log-format`; raises UsageError where it is none."""
    if text not in FORMATS:
        raise UsageError(f"--log-format {text!r}", hint=f"one of {', '.join(FORMATS)}")
    return text


def tracker_start(
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port for clients and for joining; 0: any free one.")
    ] = DEFAULT_PORT,
    agents_port: Annotated[
        int | None,
        typer.Option("--agents-port", min=0, max=65535, help="The port for agents; 0: any.", show_default="--port + 1"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Jobs, results and blobs.", show_default="~/.local/state/kedge/tracker"),
    ] = None,
    blob_quota: Annotated[
        str | None,
        typer.Option(
            "--blob-quota",
            metavar="SIZE",
            help="Keep at most so many bytes of blobs; the longest unused go first, outputs of jobs last.",
            show_default="three quarters of the disk space that is free for them",
        ),
    ] = None,
    user_quota: Annotated[
        str | None,
        typer.Option(
            "--blob-quota-per-user",
            metavar="SIZE",
            help="Of that, what one user's jobs and uploads may have.",
            show_default="half of it",
        ),
    ] = None,
    keep_jobs: Annotated[
        int, typer.Option("--keep-jobs", min=1, help="Forget the oldest jobs that are done when there are more.")
    ] = 100_000,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0.01, help="Forget jobs that were done so many days ago.")
    ] = 30.0,
    keep_size: Annotated[
        str,
        typer.Option("--keep-size", metavar="SIZE", help="The same where they and their results take more than this."),
    ] = "32GiB",
    insecure_loopback: InsecureFlag = False,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="HOST:PORT", help="Metrics for Prometheus there.", show_default="none"),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            metavar="URL",
            envvar="KEDGE_DATABASE",
            help="A PostgreSQL database, which several trackers may share.",
            show_default="a file in the data folder",
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option("--join", metavar="STRING", help="With --database: join its trackers, once."),
    ] = None,
    peers_port: Annotated[
        int | None,
        typer.Option(
            "--peers-port",
            min=0,
            max=65535,
            help="With --database: the port for other trackers.",
            show_default="--port + 3",
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise", metavar="HOST", help="With --database: how other trackers reach this.", show_default="--host"
        ),
    ] = None,
    log_format: LogFormatOption = "text",
) -> None:
    """Start the tracker in the foreground; Ctrl-C stops it, and jobs and results survive.

    A new tracker makes a certificate authority and a token for its owner, and prints a command that lets one device
    join. Clients have tokens ('kedge tracker token create'), agents have certificates, all connections are encrypted.

    Examples:

      kedge tracker start --host 0.0.0.0

      kedge tracker start --port 0 --data-dir /srv/kedge

      kedge tracker start --keep-jobs 20000 --keep-days 7 --keep-size 8GiB --blob-quota 50GiB --metrics 127.0.0.1:9192

      kedge tracker start --blob-quota 500GiB --blob-quota-per-user 100GiB

      kedge tracker start --host 0.0.0.0 --database postgresql://kedge@db.lab/kedge --join 'kedge1.…'
    """
    from kedge.rpc.security.join import parse_join
    from kedge.rpc.tracker.main import run
    from kedge.rpc.tracker.retention import Retention
    from kedge.rpc.tracker.security.folder import Limits
    from kedge.rpc.transport import parse_address

    if database is None and (join is not None or peers_port is not None or advertise is not None):
        raise UsageError(
            "--join, --peers-port and --advertise are for one of several trackers", hint="name their --database"
        )
    if insecure_loopback and join is not None:
        raise UsageError("--insecure-loopback: there is nothing to join", hint="leave --join out")
    options: dict[str, Any] = {
        "agents_port": agents_port,
        "insecure_loopback": insecure_loopback,
        "metrics": parse_address(metrics) if metrics else None,
        "blob_quota": None if blob_quota is None else parse_bytes(blob_quota),
        "limits": Limits(max_user_bytes=None if user_quota is None else parse_bytes(user_quota)),
        "keep": Retention(keep_jobs, keep_days, parse_bytes(keep_size)),
        "database": database,
        "join": None if join is None else parse_join(join),
        "peers_port": peers_port,
        "advertise": advertise,
    }
    folder = data_dir or state_dir() / "tracker"
    raise typer.Exit(run(host, port, folder, log_format=check_log_format(log_format), **options))


def tracker_status(tracker: output.TrackerOption = None, as_json: output.JsonFlag = False) -> None:
    """Show the trackers that share a database: who leads, in which epoch, who is gone.

    Examples:

      kedge tracker status --tracker a:9190,b:9190
    """
    with kedge.connect(require_tracker(tracker)) as fleet:
        found = fleet.status()
    if as_json:
        output.emit_json({"epoch": found.epoch, "trackers": [asdict(each) for each in found.trackers]})
        return
    if not found.trackers:
        output.stdout().print(f"the tracker at {tracker} is the only one, with a database of its own", soft_wrap=True)
        return
    table = output.table("tracker", "address", "state", ">up", ">seen", "software")
    newest_ms = max(each.seen_unix_ms for each in found.trackers)
    for each in found.trackers:
        state = "gone" if each.gone else f"leads, epoch {found.epoch}" if each.leads else "follows"
        up, seen = (
            output.age_text((newest_ms - moment) / 1000) for moment in (each.started_unix_ms, each.seen_unix_ms)
        )
        table.add_row(each.name, each.address, state, "-" if each.gone else up, seen, each.software)
    output.show(table)


def agent_start(
    tracker: output.TrackerOption = None,
    join: Annotated[
        str | None, typer.Option("--join", metavar="STRING", envvar="KEDGE_JOIN", help="Enrol with this join string.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The device's name.", show_default="the host name")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; repeatable.")
    ] = None,
    threads: output.ThreadsOption = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Its identity and cache.", show_default="~/.local/state/kedge/agent/NAME"),
    ] = None,
    runner: Annotated[
        Path | None, typer.Option("--runner", help="The native runner.", show_default="built for this machine")
    ] = None,
    require_signer: Annotated[
        list[str] | None,
        typer.Option("--require-signer", metavar="KEY", help="Run only what this key signed; repeatable."),
    ] = None,
    measure_cores: Annotated[
        str | None,
        typer.Option("--measure-cores", metavar="LIST", help="Cores kept for timings and sessions, such as 2-3."),
    ] = None,
    runner_user: Annotated[
        str | None,
        typer.Option(
            "--runner-user",
            metavar="NAME",
            help="Whom jobs run as when root starts the agent; 'root' keeps them root.",
            show_default="kedge-runner, or a number that is nobody's",
        ),
    ] = None,
    log_format: LogFormatOption = "text",
) -> None:
    """Offer this machine to a tracker, in the foreground; Ctrl-C stops the agent.

    A device is enrolled once, with a join string, or by an administrator of the tracker who runs this with --tracker.

    Examples:

      kedge agent start --join 'kedge1.…'

      kedge agent start --tracker 127.0.0.1:9190 --name bench-1 --label rack=a --threads 2 --measure-cores 2-3
    """
    from kedge.deployment import parse_labels
    from kedge.rpc.security.join import parse_join
    from kedge.rpc.transport import parse_trackers

    check_log_format(log_format)
    parse_labels(label or [])
    if tracker:
        parse_trackers(tracker)
    if join is not None:
        parse_join(join)
    device = check_name(name or platform.node())
    how = _how_to_join(tracker, join, device, data_dir or state_dir() / "agent" / device)
    if runner is None:
        with output.progress("agent") as report:
            runner = build_runner(report)
    arguments = ["--runner", str(runner), "--threads", str(threads), "--log-format", log_format, *how.arguments]
    arguments += ["--tracker", tracker] if tracker else []
    arguments += ["--data-dir", str(data_dir)] if data_dir else []
    arguments += ["--runner-user", runner_user] if runner_user else []
    arguments += ["--measure-cores", measure_cores] if measure_cores else []
    arguments += ["--name", device]
    for option, values in (("--label", label), ("--require-signer", require_signer)):
        for item in values or ():
            arguments += [option, item]
    # The agent replaces this process: it needs none of what the command line has imported. Without -P, a queue.py in
    # the folder where it is started would take the place of Python's.
    command = [sys.executable, "-P", "-m", "kedge.device_agent", *arguments]
    os.execve(sys.executable, command, {**os.environ, **how.environment})


def _how_to_join(tracker: str | None, join: str | None, device: str, data_dir: Path) -> Joining:
    """What an agent is told: a join string, nothing where it is enrolled already, or that there is none to be had."""
    from kedge.deployment import Joining, joining
    from kedge.rpc.errors import AuthenticationError, ConnectError
    from kedge.rpc.security import credentials, identity
    from kedge.rpc.transport import parse_trackers

    if join is not None:
        return Joining(join)
    address = parse_trackers(tracker) if tracker is not None else None
    known = identity.load(data_dir, device, address)
    if tracker is None or address is None:
        if known is None:
            raise ConnectError(
                "no tracker is named, and this device is not enrolled",
                hint="--join '…' with a join string; an administrator of the tracker may use --tracker HOST:PORT",
            )
        return Joining(enrolled=True)
    try:
        tls = credentials.find(address).tls
    except (AuthenticationError, ConnectError):
        if known is None:
            raise
        return Joining(enrolled=True)
    if tls is not None and known is not None and known.ca.encode() == tls.ca:
        return Joining(enrolled=True)
    return joining(tracker, device)


def devices(
    selector: Annotated[
        str, typer.Argument(metavar="SELECTOR", help="Only devices that match, e.g. 'arch=aarch64'.")
    ] = "",
    gone: Annotated[bool, typer.Option("--gone", help="Also those that are no longer connected.")] = False,
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
