"""A machine's clock that is set while a tracker runs on it: nothing that it keeps grows old by that."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kedge.rpc.client import connect
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.toys import device_info, make_artifact

#: Two jobs are kept, and each for a day; that is looked at all the time.
TRACKER = """
import asyncio, pathlib, sys
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.server import serve

async def main():
    keep = Retention(jobs=2, days=1, least_s=0, every_s=0.01)
    async with serve("127.0.0.1", 0, pathlib.Path(sys.argv[1]), insecure_loopback=True, keep=keep) as serving:
        print(serving.address, flush=True)
        await serving.stopped

asyncio.run(main())
"""
DAYS_40 = 40 * 86_400


@pytest.fixture
def clock_file(tmp_path: Path) -> Path:
    (tmp_path / "clock").write_bytes(bytes(8))
    return tmp_path / "clock"


@pytest.fixture
def tracker(tmp_path: Path, clock: Path, clock_file: Path) -> Iterator[str]:
    environment = {**os.environ, "LD_PRELOAD": str(clock), "KEDGE_TEST_CLOCK": str(clock_file)}
    command = [sys.executable, "-c", TRACKER, str(tmp_path / "tracker")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def test_jobs_are_as_old_as_they_are(tracker: str, clock_file: Path) -> None:
    artifact, x = make_artifact(), np.arange(8, dtype=np.float32).reshape(2, 4)
    with connect(tracker) as fleet, FakeAgent(fleet.address, device_info(), work=echo):
        first, second = (fleet.run(artifact, {"x": x}) for _ in range(2))
        assert first.wait().outcome.ok and second.wait().outcome.ok
        with clock_file.open("r+b") as file:
            file.write(DAYS_40.to_bytes(8, "little"))
        third = fleet.run(artifact, {"x": x})
        wait_for(lambda: first.id not in [job.id for job in fleet.jobs()], "the first to be forgotten")
        assert [job.id for job in fleet.jobs()] == [third.id, second.id]
