"""The tree of commands. Each module of this folder holds the commands of one idea."""

from __future__ import annotations

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


app.command("demo")(demo.demo)
app.command("compile")(compiling.compile_)
app.command("inspect")(compiling.inspect)
app.command("run")(running.run)
app.command("bench")(running.bench)
app.command("validate")(running.validate)
app.command("compare")(comparing.compare)
app.command("devices")(devices.devices)
app.command("jobs")(jobs.jobs)
app.command("result")(jobs.result)
app.command("top")(top.top)
app.command("cancel")(scheduling.cancel)
app.command("drain")(scheduling.drain)
app.command("resume")(scheduling.resume)
app.command("reserve")(scheduling.reserve)
app.command("release")(scheduling.release)
app.command("doctor")(doctor.doctor)
app.command("join")(access.join)
app.command("signer")(access.signer)
tracker_app.command("start")(tracker.start)
tracker_app.command("status")(tracker.status)
tracker_app.command("move-database")(tracker.move_database)
tracker_app.command("enrolled")(access.enrolled)
tracker_app.command("revoke")(access.revoke)
token_app.command("create")(access.token_create)
token_app.command("list")(access.token_list)
token_app.command("revoke")(access.token_revoke)
agent_app.command("start")(agent.start)
deploy_app.command("board")(board.deploy_board)
