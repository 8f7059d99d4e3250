"""What the README says is so: its commands have the options it shows, its Python runs, its exit statuses are ours."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from kedge.cli import EXIT_BUG, EXIT_INTERRUPTED
from kedge.cli.app import tree
from kedge.demo import processes
from kedge.rpc import errors
from kedge.rpc.selector import SelectorError

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of one language; those with language "" hold commands and what they print."""
    found: dict[str, list[str]] = {}
    for at, text in enumerate(re.split(r"^```", README, flags=re.MULTILINE)):
        if at % 2:
            name, _, body = text.partition("\n")
            found.setdefault(name, []).append(body)
    return found[language]


def command_lines() -> list[list[str]]:
    lines = [line.removeprefix("$ ") for line in "\n".join(blocks("")).splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("kedge ")]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    command, rest = typer.main.get_command(tree()), words[1:]
    while rest and (below := getattr(command, "commands", {}).get(rest[0])):
        command, rest = below, rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known
    whole = getattr(command, "invoke_without_command", True) or rest == ["--install-completion"]
    assert whole, f"{words} is no whole command"


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    here = os.uname().machine
    with (
        processes.tracker(tmp_path / "tracker") as address,
        processes.agent(address, "board", tmp_path / "agent"),
    ):
        program = "".join(blocks("python")).replace("tracker:9190", address).replace("arch=aarch64", f"arch={here}")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 0.95
    assert done.stdout.count("verdict: ") == 2


def test_exit_statuses_are_those_of_the_errors() -> None:
    table = README.partition("| status | meaning |")[2].partition("\n\n")[0]
    documented = {int(status) for status in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {kind.exit_status for kind in classes if issubclass(kind, errors.KedgeError)}
    assert documented == raised | {0, SelectorError.exit_status, EXIT_BUG, EXIT_INTERRUPTED}


def lines_of(page: Path) -> list[str]:
    """Its lines outside of code and tables, which cannot be wrapped."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for line in prose.splitlines() if not line.lstrip().startswith("|")]


ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_pages_are_no_wider_than_128_columns(page: Path) -> None:
    assert [line for line in lines_of(page) if len(line) > 128] == []
