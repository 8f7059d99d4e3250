"""Running the `kedge` command as users do, in a process of its own; and in this one, where only its words matter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kedge.cli import main
from kedge.data import digits_model
from support.commands import Kedge, kedge_command


@pytest.fixture(scope="session")
def kedge() -> Kedge:
    """`kedge("run", path)` gives the finished process; its output must not hold a traceback."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            kedge_command(*arguments), capture_output=True, text=True, timeout=300, check=False, **options
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def kedge_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Kedge:
    """The same without a process: most of a short command's time goes to starting Python and importing kedge.

    Not for what becomes another program (`agent start`) or stays until a signal ends it.
    """
    monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")  # which the command sets, for good

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = ["kedge", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        done = subprocess.CompletedProcess(words, main(), *capfd.readouterr())
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
