"""The runtime built for this machine, and hand-written modules to run on it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from kedge.compiler.target import parse
from kedge.compiler.toolchain import RuntimeFiles, build_runtime
from kedge.device_agent.runner import Runner
from support import native


@pytest.fixture(scope="session")
def runtime() -> RuntimeFiles:
    return build_runtime(parse("native"))


@pytest.fixture(scope="session")
def arithmetic() -> Path:
    return native.module("arithmetic")


@pytest.fixture(scope="session")
def misbehaving() -> Path:
    return native.module("misbehaving")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose bytes from 64 on are the weights of `arithmetic`: 0.0 to 15.0."""
    path = tmp_path_factory.mktemp("weights") / "weights.bin"
    path.write_bytes(b"\xff" * 64 + struct.pack("<16f", *range(16)))
    return path


@pytest.fixture
def loaded(runtime: RuntimeFiles, arithmetic: Path, weights: Path) -> Iterator[Runner]:
    """A runner with `arithmetic` open, two threads."""
    with Runner(runtime.runner, threads=2) as runner:
        runner.open(arithmetic, weights, 64)
        yield runner


def children() -> set[int]:
    """The process ids of this process's children, zombies too."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def descriptors() -> dict[str, str]:
    """The open descriptors of this process and what they are."""
    return {path.name: os.readlink(path) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)}  # noqa: PTH115


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaks descriptors or processes."""
    fds, processes = descriptors(), children()
    yield
    assert children() <= processes
    left = {fd: what for fd, what in descriptors().items() if fd not in fds}
    assert not left
