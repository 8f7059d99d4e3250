"""The runtime built for this machine, and hand-written modules to run on it."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.artifact import Artifact
from kedge.compiler.target import parse
from kedge.compiler.toolchain import RuntimeFiles, build_runtime
from kedge.device_agent.runner import Runner
from kedge.rpc import abi
from kedge.rpc.artifact import Function, Manifest, Port, Symbol, Variant, make_member
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
    while True:
        try:
            return {
                int(pid)
                for task in Path("/proc/self/task").iterdir()
                for pid in (task / "children").read_text().split()
            }
        except (FileNotFoundError, ProcessLookupError):  # a thread ended; what it started is another's child now
            continue


#: What gRPC's threads open whenever they like, where tests before these have used it in this process. Nothing of ours
#: opens such descriptors.
GRPC_OPENS = ("anon_inode:[eventfd]", "anon_inode:[eventpoll]")


def descriptors() -> dict[str, str]:
    """The open descriptors of this process and what they are, without gRPC's."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this loop, or one that a thread closes meanwhile
            found[path.name] = str(path.readlink())
    return {fd: what for fd, what in found.items() if what not in GRPC_OPENS}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaks descriptors or processes."""
    fds, processes = descriptors(), children()
    yield
    assert children() <= processes
    left = {fd: what for fd, what in descriptors().items() if fd not in fds}
    assert not left


N = Symbol("N", 1, 1 << 20)
ANY_N, ANY_M = Symbol("N"), Symbol("M")
ARITHMETIC = (
    Function("main", (Port("x", "float32", ("N", 8)),), (Port("y", "float32", ("N", 4)),), (N,)),
    Function(
        "join",
        (Port("a", "float32", ("N",)), Port("b", "float32", ("M", "N*2"))),
        (Port("c", "int64", ("N + M", "2*N")),),
        (ANY_N, ANY_M),
    ),
    Function("ramp", (Port("a", "float32", ("N",)),), (Port("out", "float32", ("N", 64)),), (N,)),
    Function("fail", (), ()),
    Function("huge", (Port("a", "float32", ("N",)),), (Port("out", "float32", ("N*4611686018427387903", 4)),), (N,)),
)
MISBEHAVING = (
    *(Function(name, (), ()) for name in ("segfault", "forever", "slow", "big_arena", "quit", "chatter", "orphan")),
    Function("scribble", (Port("x", "float32", ("N",)),), (), (ANY_N,)),
    Function("copy", (Port("x", "float32", ("N",)),), (Port("y", "float32", ("N",)),), (ANY_N,)),
    Function("grow", (), ()),
    Function("escape", (Port("x", "float32", ("N",)),), (Port("y", "float32", ("N",)),), (ANY_N,)),
    Function("give_up", (), ()),
)


def artifact_of(
    lib: bytes,
    functions: tuple[Function, ...],
    weights: bytes | memoryview | None = None,
    weights_offset: int = 0,
    features: tuple[str, ...] = (),
    arch: str = os.uname().machine,
) -> Artifact:
    """An artifact around a hand-written module."""
    members = {"lib.so": lib} | ({} if weights is None else {"weights.bin": weights})
    name = None if weights is None else "weights.bin"
    variant = Variant("c", arch, f"{arch}-linux-gnu", features, "lib.so", name, weights_offset)
    entries = tuple(make_member(name, data) for name, data in members.items())
    return Artifact(Manifest("handmade", abi.ABI_VERSION, "by hand", functions, (variant,), entries), members)


@pytest.fixture(scope="session")
def arithmetic_artifact(arithmetic: Path, weights: Path) -> Artifact:
    return artifact_of(arithmetic.read_bytes(), ARITHMETIC, weights.read_bytes(), 64)


@pytest.fixture(scope="session")
def misbehaving_artifact(misbehaving: Path) -> Artifact:
    return artifact_of(misbehaving.read_bytes(), MISBEHAVING)
