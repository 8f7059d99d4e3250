"""Running the `kedge` command as users do: in a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kedge.data import digits_model
from support.commands import Kedge, kedge_command


@pytest.fixture(scope="session")
def kedge() -> Kedge:
    """`kedge("run", path)` gives the finished process; its output must not hold a traceback."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            kedge_command(*arguments), capture_output=True, text=True, timeout=120, check=False, **options
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def digits(kedge: Kedge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model, compiled for this machine by the command line."""
    path = tmp_path_factory.mktemp("cli") / "digits.kdg"
    done = kedge("compile", digits_model(), "-o", path)
    assert done.returncode == 0, done.stderr
    return path
