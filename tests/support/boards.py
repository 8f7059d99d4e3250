"""Emulated ARM boards for tests: one of each architecture per test process, over one user land in `.cache/`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.deploy.emulated import EmulatedBoard
from kedge.deploy.ssh import Destination, resolve

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache"


def require(arch: str) -> None:
    """Skip, with the reason, where this machine cannot emulate the board; under CI that is a failure."""
    missing = EmulatedBoard.missing_requirements(arch)
    if missing is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must be able to emulate boards: {missing}")
    pytest.skip(missing)


def destination(board: EmulatedBoard) -> Destination:
    """How to log in to the board."""
    return resolve(board.alias, config=board.ssh_config_path)


def _board(arch: str) -> Iterator[EmulatedBoard]:
    require(arch)
    with EmulatedBoard(arch, CACHE) as board:
        yield board


@pytest.fixture(scope="session")
def arm64() -> Iterator[EmulatedBoard]:
    """A 64-bit ARM board. What a test installs there it must remove."""
    yield from _board("arm64")


@pytest.fixture(scope="session")
def armhf() -> Iterator[EmulatedBoard]:
    """A 32-bit ARM board with hard float and NEON."""
    yield from _board("armhf")


@pytest.fixture(scope="session", params=["arm64", "armhf"])
def board(request: pytest.FixtureRequest) -> EmulatedBoard:
    """Each of the boards in turn."""
    found: EmulatedBoard = request.getfixturevalue(request.param)
    return found
