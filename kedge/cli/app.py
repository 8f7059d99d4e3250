"""The tree of commands. Each module of this folder holds the commands of one idea.

A module is imported when one of its commands may be called: most of a short command's time is imports.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Final

import typer

import kedge

#: What is typed after `kedge`, in the order of help -> the module of this folder, and the function in it.
COMMANDS: Final[Mapping[str, str]] = {
    "demo": "demo.demo",
    "compile": "compiling.compile_",
    "inspect": "compiling.inspect",
    "run": "running.run",
    "bench": "running.bench",
    "validate": "running.validate",
    "compare": "comparing.compare",
    "devices": "devices.devices",
    "jobs": "jobs.jobs",
    "result": "jobs.result",
    "top": "top.top",
    "cancel": "scheduling.cancel",
    "drain": "scheduling.drain",
    "resume": "scheduling.resume",
    "reserve": "scheduling.reserve",
    "release": "scheduling.release",
    "doctor": "doctor.doctor",
    "cache clear": "caching.clear",
    "join": "access.join",
    "signer": "access.signer",
    "tracker start": "tracker.start",
    "tracker status": "tracker.status",
    "tracker move-database": "tracker.move_database",
    "tracker enrolled": "access.enrolled",
    "tracker revoke": "access.revoke",
    "tracker token create": "access.token_create",
    "tracker token list": "access.token_list",
    "tracker token revoke": "access.token_revoke",
    "agent start": "agent.start",
    "deploy board": "board.deploy_board",
}
_GROUPS: Final[Mapping[str, str]] = {
    "tracker": "The tracker: where agents and clients meet.",
    "tracker token": "Tokens: who may do what on a tracker.",
    "agent": "The agent: offers this machine to a tracker.",
    "deploy": "Put agents on boards over SSH.",
    "cache": "What was compiled, and is kept for the next time.",
}
#: Groups that do something without a further word.
_ACTING: Final[Mapping[str, str]] = {"cache": "caching.cache"}


def tree(words: Sequence[str] = ()) -> typer.Typer:
    """The commands that `words`, the arguments of `kedge`, may call: those that begin with the first, else all."""
    first = words[0] if words else ""
    app = typer.Typer(
        name="kedge",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    if first == "--version":  # said before any command is looked for
        return app
    named = [path for path in COMMANDS if path.split()[0] == first] or list(COMMANDS)
    apps = {"": app}
    for path, text in _GROUPS.items():
        above, _, name = path.rpartition(" ")
        if any(each.startswith(f"{path} ") for each in named):
            apps[path] = typer.Typer(no_args_is_help=path not in _ACTING, help=text)
            if path in _ACTING:
                act = _imported(_ACTING[path])
                apps[path].callback(invoke_without_command=True, help=_help(act))(act)
            apps[above].add_typer(apps[path], name=name)
    for path in named:
        above, _, name = path.rpartition(" ")
        command = _imported(COMMANDS[path])
        apps[above].command(name, help=_help(command))(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kedge {kedge.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile machine-learning models on a host, run and time them on remote devices.

    Start with [bold]kedge demo[/bold]; when something does not work, [bold]kedge doctor[/bold] says what to fix.
    """


def _imported(place: str) -> Callable[..., None]:
    module, _, function = place.partition(".")
    command: Callable[..., None] = getattr(import_module(f"kedge.cli.{module}"), function)
    return command


def _help(command: Callable[..., None]) -> str:
    """Of a command: its docstring, without the ends of lines in paragraphs, since a terminal has its own."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
