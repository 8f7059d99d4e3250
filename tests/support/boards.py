"""Emulated ARM boards for tests: one of each architecture per test process, over one user land in the cache.

And programs of other architectures without a board, with the C library of such a user land.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.compiler.target import parse
from kedge.compiler.toolchain import cache_dir
from kedge.deploy.emulated import EmulatedBoard
from kedge.deploy.emulated.sources import host_distribution
from kedge.deploy.emulated.userland import fetch_userland
from kedge.deploy.ssh import Destination, resolve
from support import native

ROOT = Path(__file__).resolve().parent.parent.parent
#: Where `kedge demo` keeps user lands, and `kedge deploy` what it sends: nothing is fetched twice.
BOARDS_CACHE = cache_dir() / "boards"
DEPLOY_CACHE = cache_dir() / "deploy"
#: By Debian's names of architectures.
TRIPLES = {"arm64": "aarch64-linux-gnu", "armhf": "armv7-linux-gnueabihf", "riscv64": "riscv64-linux-gnu"}
_EMULATORS = {"arm64": "qemu-aarch64-static", "armhf": "qemu-arm-static", "riscv64": "qemu-riscv64-static"}


def require(arch: str) -> None:
    """Skip, with the reason, where this machine cannot emulate the board; under CI that is a failure."""
    missing = EmulatedBoard.missing_requirements(arch)
    if missing is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must be able to emulate boards: {missing}")
    pytest.skip(missing)


def emulated_command(arch: str) -> list[str]:
    """What runs a program of that architecture here; skips, and in CI fails, where there is no emulator."""
    found = shutil.which(_EMULATORS[arch])
    if found is None:
        missing = f"{_EMULATORS[arch]} not found: sudo apt-get install qemu-user-static"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return [found, "-L", str(_system_root(arch))]


def zig(arch: str) -> tuple[str, ...]:
    """The C compiler for that architecture."""
    return native.zig_cc(parse(f"llvm -mtriple={TRIPLES[arch]}").host.arch)


def _system_root(arch: str) -> Path:
    """A folder with that architecture's C library: the board's user land, or Debian's cross library for RISC-V."""
    if arch in ("arm64", "armhf"):
        return fetch_userland(BOARDS_CACHE, arch, host_distribution(arch))
    root = fetch_userland(BOARDS_CACHE, "amd64", host_distribution("amd64"), packages=("libc6-riscv64-cross",))
    return root / "usr" / "riscv64-linux-gnu"


def destination(board: EmulatedBoard) -> Destination:
    """How to log in to the board."""
    return resolve(board.alias, config=board.ssh_config_path)


def _board(arch: str) -> Iterator[EmulatedBoard]:
    require(arch)
    with EmulatedBoard(arch, BOARDS_CACHE) as board:
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
