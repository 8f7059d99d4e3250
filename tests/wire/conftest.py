from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet, connect
from kedge.rpc.tracker.server import RunningTracker, start
from support.postgres import postgres
from support.toys import QUICK, make_artifact

__all__ = ["postgres"]


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    return make_artifact()


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[RunningTracker]:
    with start(port=0, data_dir=tmp_path / "tracker", settings=QUICK, insecure_loopback=True) as running:
        yield running


@pytest.fixture
def fleet(tracker: RunningTracker) -> Iterator[Fleet]:
    with connect(tracker.address) as fleet:
        yield fleet
