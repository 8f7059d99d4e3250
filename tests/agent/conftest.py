"""What the agent's tests share: the runner of this machine, and a module that misbehaves on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.compiler.target import parse
from kedge.compiler.toolchain import build_runtime
from kedge.device_agent.cache import ArtifactCache
from kedge.device_agent.cage import Cage, choose_user
from kedge.device_agent.jobs import Board
from kedge.device_agent.probe import probe
from kedge.device_agent.runner import Runner
from kedge.rpc.artifact import Artifact
from kedge.rpc.blobs import BlobStore
from kedge.rpc.errors import ConnectError
from kedge.rpc.types import Blob
from support import handmade
from support.postgres import postgres
from support.python39 import python39

__all__ = ["postgres", "python39"]

#: In the order of tests/agent/module.c.
FUNCTIONS = (
    "add", "crash", "leave", "spin", "refuse", "hog", "litter", "weigh", "pry", "reach", "eat", "swarm",
    "linger",
)  # fmt: skip


@pytest.fixture(scope="session")
def runner() -> Path:
    """kedge-runner for this machine."""
    return build_runtime(parse("native")).runner


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lib.so of module.c for this machine."""
    out = tmp_path_factory.mktemp("module") / "lib.so"
    return handmade.compile_module(Path(__file__).with_name("module.c"), out).read_bytes()


class Remote:
    """A tracker's blobs in a folder; `gate` holds transfers up, `away` makes them fail as a lost tracker would."""

    def __init__(self, root: Path) -> None:
        self.store = BlobStore(root)
        self.gate = threading.Event()
        self.gate.set()
        self.away = 0
        self.fetched: list[str] = []
        self.interrupted = threading.Event()
        self.waiting = threading.Event()

    def publish(self, made: Artifact) -> Blob:
        for _, data in made.blobs():
            self.store.put(data)
        return self.store.put(made.manifest.to_json())

    def download(self, blob: Blob, store: BlobStore) -> Path:
        self._pass()
        data = self.store.read(blob.digest)
        self.fetched.append(blob.digest)
        with store.begin(blob) as writer:
            writer.append(data)
            writer.commit()
        return store.path(blob.digest)

    def upload(self, blob: Blob, source: bytes | memoryview) -> None:
        self._pass()
        assert self.store.put(source) == blob

    def interrupt(self) -> None:
        self.interrupted.set()
        self.gate.set()

    def _pass(self) -> None:
        if self.away:
            self.away -= 1
            raise ConnectError("the tracker went away")
        self.waiting.set()
        assert self.gate.wait(60)
        if self.interrupted.is_set():
            raise ConnectError("interrupted")


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "remote")


@pytest.fixture
def board(tmp_path: Path, runner: Path, remote: Remote) -> Iterator[Board]:
    with Runner(runner) as started:
        device = probe("here", started.hello.features)
    home = tmp_path / "agent"
    scratch = home / "jobs"
    scratch.mkdir(mode=0o700, parents=True)
    home.chmod(0o700)
    with Cage.build(runner, home, scratch, choose_user(None)) as cage:
        yield Board(device, runner, 2, ArtifactCache(home / "cache", 1 << 28), scratch, remote, cage=cage)
    assert list((home / "loaded").iterdir()) == []
