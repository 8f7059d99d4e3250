"""The tree of commands. Each module of this folder holds the commands of one idea."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

import kedge
from kedge.cli import (
    access,
    agent,
    board,
    comparing,
    compiling,
    demo,
    devices,
    doctor,
    jobs,
    running,
    scheduling,
    top,
    tracker,
)

app = typer.Typer(
    name="kedge",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tracker_app = typer.Typer(no_args_is_help=True, help="The tracker: where agents and clients meet.")
agent_app = typer.Typer(no_args_is_help=True, help="The agent: offers this machine to a tracker.")
deploy_app = typer.Typer(no_args_is_help=True, help="Put agents on boards over SSH.")
token_app = typer.Typer(no_args_is_help=True, help="Tokens: who may do what on a tracker.")
app.add_typer(tracker_app, name="tracker")
tracker_app.add_typer(token_app, name="token")
app.add_typer(agent_app, name="agent")
app.add_typer(deploy_app, name="deploy")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kedge {kedge.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile machine-learning models on a host, run and time them on remote devices.

    Start with [bold]kedge demo[/bold]; when something does not work, [bold]kedge doctor[/bold] says what to fix.
    """


def _add(group: typer.Typer, name: str, command: Callable[..., None]) -> None:
    """Add a command whose help is its docstring, without the ends of lines in paragraphs: a terminal has its own."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    group.command(name, help="\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs))(command)


_add(app, "demo", demo.demo)
_add(app, "compile", compiling.compile_)
_add(app, "inspect", compiling.inspect)
_add(app, "run", running.run)
_add(app, "bench", running.bench)
_add(app, "validate", running.validate)
_add(app, "compare", comparing.compare)
_add(app, "devices", devices.devices)
_add(app, "jobs", jobs.jobs)
_add(app, "result", jobs.result)
_add(app, "top", top.top)
_add(app, "cancel", scheduling.cancel)
_add(app, "drain", scheduling.drain)
_add(app, "resume", scheduling.resume)
_add(app, "reserve", scheduling.reserve)
_add(app, "release", scheduling.release)
_add(app, "doctor", doctor.doctor)
_add(app, "join", access.join)
_add(app, "signer", access.signer)
_add(tracker_app, "start", tracker.start)
_add(tracker_app, "status", tracker.status)
_add(tracker_app, "move-database", tracker.move_database)
_add(tracker_app, "enrolled", access.enrolled)
_add(tracker_app, "revoke", access.revoke)
_add(token_app, "create", access.token_create)
_add(token_app, "list", access.token_list)
_add(token_app, "revoke", access.token_revoke)
_add(agent_app, "start", agent.start)
_add(deploy_app, "board", board.deploy_board)
