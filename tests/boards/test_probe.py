"""Which Python of a board is used: looked for by a shell, as on the board."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from kedge.deploy.errors import BoardUnsuitableError
from kedge.deploy.probe import locate
from kedge.deploy.ssh import Completed, Connection


class Here:
    """Runs commands on this machine, with the programs of one folder and no others."""

    destination = "board@here"

    def __init__(self, programs: Path) -> None:
        self._programs = programs

    def add(self, name: str, text: str) -> None:
        program = self._programs / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    def run(self, command: Sequence[str], *, stdin: bytes = b"") -> Completed:
        shell = ["/bin/sh", *command[1:]]
        environment = {**os.environ, "PATH": str(self._programs)}
        done = subprocess.run(shell, input=stdin, capture_output=True, env=environment, check=False)
        return Completed(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


#: A Python that is too old: it tells its version, and fails where it is asked whether that is enough.
OLD = 'case "$2" in *print*) echo 3.7;; *) exit 1;; esac'


def test_without_a_python_it_says_what_there_is(here: Here) -> None:
    with pytest.raises(BoardUnsuitableError, match=r"has no Python 3.9 or newer \(found: none at all\)"):
        locate(cast(Connection, here), "~/agent")
    here.add("python3", OLD)
    with pytest.raises(BoardUnsuitableError, match=r"has no Python 3.9 or newer \(found: python3=3.7\)"):
        locate(cast(Connection, here), "~/agent")


def test_a_newer_one_beside_one_that_is_too_old_is_found(here: Here) -> None:
    here.add("python3", OLD)
    here.add("python3.12", f'exec {sys.executable} "$@"')
    place = locate(cast(Connection, here), "~/agent")
    assert place.python == os.path.realpath(sys.executable) and place.directory == str(Path.home() / "agent")


def test_a_python_that_does_is_started_twice(here: Here, tmp_path: Path) -> None:
    """Small boards take half a second for each start: it says whether it is new enough, and then it answers."""
    started = tmp_path / "started"
    here.add("python3", f'echo once >> {started}\nexec {sys.executable} "$@"')
    locate(cast(Connection, here), "~/agent")
    assert started.read_text().splitlines() == ["once", "once"]
