"""`kedge deploy board`: an agent on a board, over SSH."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli import output
from kedge.cli.arguments import check_log_format
from kedge.cli.ending import ended_in_order
from kedge.cli.place import require_tracker


def deploy_board(
    host: Annotated[str, typer.Argument(metavar="USER@HOST[:PORT]", help="The board; ~/.ssh/config is honoured.")],
    tracker: output.TrackerOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The device's name.", show_default="the board's host name")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; repeatable.")
    ] = None,
    require_signer: Annotated[
        list[str] | None,
        typer.Option(
            "--require-signer",
            metavar="KEY",
            help="Run only what this key signed; needs 'cryptography' there; repeatable.",
        ),
    ] = None,
    measure_cores: Annotated[
        str | None,
        typer.Option("--measure-cores", metavar="LIST", help="The board's cores kept for timings, such as 2-3."),
    ] = None,
    log_format: output.LogFormatOption = "text",
    identity: Annotated[Path | None, typer.Option("-i", "--identity", help="The private key to log in with.")] = None,
    known_hosts: Annotated[
        Path | None,
        typer.Option("--known-hosts", help="Host keys to check against.", show_default="~/.ssh/known_hosts"),
    ] = None,
    service: Annotated[
        bool, typer.Option("--service/--no-service", help="Have the board start the agent whenever it has started.")
    ] = True,
    uninstall: Annotated[
        bool, typer.Option("--uninstall", help="Stop the agent and remove every trace of it.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Only say whether the agent runs, and whether a restart brings it back.")
    ] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds until the tracker must see it.")] = 60,
    as_json: output.JsonFlag = False,
) -> None:
    """Install the agent on a board over SSH, start it, and wait until the tracker sees it.

    The board needs Python 3.9 or newer and an SSH server; no root, no compiler and no packages. After a restart of the
    board systemd starts the agent, as a unit of the user's, and 30 s after a crash, too; or where that does not work
    cron, at the board's start only.

    Examples:

      kedge deploy board pi@192.168.1.20 --tracker 192.168.1.2:9190 --label rack=a

      kedge deploy board pi@192.168.1.20 --tracker 192.168.1.2:9190 --require-signer "$(kedge signer)" --log-format json

      kedge deploy board pi@192.168.1.20 --tracker 192.168.1.2:9190 --measure-cores 2-3

      kedge deploy board pi@192.168.1.20 --status --json

      kedge deploy board pi@192.168.1.20 --uninstall
    """
    from kedge.deploy.errors import DeploymentInterrupted
    from kedge.deployment import Login, deploy, look, parse_labels, remove

    check_log_format(log_format)
    login = Login(host, identity, known_hosts)
    with ended_in_order(), output.progress(f"deploy {host}") as report:
        hint = None
        answer: dict[str, Any]
        if status:
            report("asking the board")
            found = look(login)
            runs = f"runs (process {found.pid})" if found.pid is not None else "does not run"
            agent = f"the agent {found.name} for the tracker at {found.tracker} {runs}; {found.boot}"
            text = f"{host}: {agent}" if found.installed else f"{host}: no agent is installed"
            answer = asdict(found)
        elif uninstall:
            report("removing the agent")
            answer = {"removed": remove(login)}
            text = f"{host}: the agent is removed" if answer["removed"] else f"{host}: there was no agent to remove"
        else:
            labels = parse_labels(label or [])
            address = require_tracker(tracker)
            try:
                device, done = deploy(
                    login,
                    address,
                    name=name,
                    labels=labels,
                    signers=require_signer or [],
                    measure_cores=measure_cores,
                    log_format=log_format,
                    service=service,
                    timeout_s=timeout,
                    progress=report,
                )
            except DeploymentInterrupted as interrupt:
                output.stderr().print(f"{host}: broken off; {interrupt}", soft_wrap=True)
                raise
            text = (
                f"{host}: device {device.info.name!r} is connected ({device.info.arch}, target {device.info.target}); "
                f"{done.boot}"
            )
            answer = {"name": done.name, "target": device.info.target, "pid": done.pid, "boot": asdict(done.boot)}
            if service and done.boot.by is None:
                hint = f"hint: have the board run at its start: {done.start_command}"
    if as_json:
        output.emit_json(answer)
    else:
        output.stdout().print(text, soft_wrap=True)
    if hint:
        output.stderr().print(hint, soft_wrap=True)
