"""`kedge agent start`."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kedge.cli import output
from kedge.cli.arguments import check_log_format, state_dir
from kedge.cli.place import build_runner
from kedge.rpc.names import check_name

if TYPE_CHECKING:
    from kedge.deployment import Joining


def start(
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
    log_format: output.LogFormatOption = "text",
) -> None:
    """Offer this machine to a tracker, in the foreground; Ctrl-C stops the agent.

    A device is enrolled once, with a join string, or by an administrator of the tracker who runs this with --tracker.

    Examples:

      kedge agent start --join 'kedge1.…'

      kedge agent start --tracker 127.0.0.1:9190 --name bench-1 --label rack=a --threads 2 --measure-cores 2-3
    """
    from kedge.deployment import parse_labels
    from kedge.device_agent.cores import parse_cores
    from kedge.rpc.security.join import parse_join
    from kedge.rpc.security.signing import parse_signers
    from kedge.rpc.transport import parse_trackers

    # What is wrong here is said before a token is made for the device, which nobody would spend.
    check_log_format(log_format)
    parse_labels(label or [])
    parse_signers(require_signer or [])
    if measure_cores:
        parse_cores(measure_cores, os.sched_getaffinity(0))
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
