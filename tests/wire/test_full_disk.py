"""A full disk under a tracker: what it refused does not go on, what it accepted is not lost, readers are answered."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kedge.protos.v1 import fleet_pb2
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet, connect
from kedge.rpc.errors import KedgeError
from kedge.rpc.tracker.security.owners import FileOwners
from kedge.rpc.tracker.security.principal import Principal, Role
from kedge.rpc.types import JobState
from support.agents import wait_for
from support.fake_agent import FakeAgent
from support.toys import device_info, spec_message

X = np.arange(8, dtype=np.float32).reshape(2, 4)
#: Leases are short beside the patience with the disk, unless a test wants them longer; agents may be silent for longer
#: than any test lasts.
TRACKER = """
import asyncio, pathlib, sys
from kedge.rpc.tracker.server import serve
from kedge.rpc.tracker.settings import Settings

async def main():
    settings = Settings(silence_ms=120_000, lease_ms=int(sys.argv[2]), deadline_slack_ms=100)
    async with serve("127.0.0.1", 0, pathlib.Path(sys.argv[1]), settings, insecure_loopback=True) as serving:
        print(serving.address, flush=True)
        await serving.stopped

asyncio.run(main())
"""


class Tracker:
    """A tracker in a process of its own, whose files the kernel lets grow, or not."""

    def __init__(self, folder: Path, lease_ms: int) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", TRACKER, str(folder), str(lease_ms)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.popen.stdout is not None
        self.address = self.popen.stdout.readline().strip()

    @contextmanager
    def full(self) -> Iterator[None]:
        """As long as this lasts, nothing can be written."""
        usual = resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE, (1, usual[1]))
        try:
            yield
        finally:
            resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE, usual)


@pytest.fixture(params=[800])
def tracker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tracker]:
    started = Tracker(tmp_path / "tracker", request.param)
    yield started
    started.popen.kill()
    started.popen.communicate()


@pytest.fixture
def fleet(tracker: Tracker) -> Iterator[Fleet]:
    with connect(tracker.address) as connected:
        yield connected


def test_what_is_refused_by_a_disk_that_is_known_to_be_full_never_runs_and_what_was_accepted_does(
    tracker: Tracker, fleet: Fleet, artifact: Artifact
) -> None:
    request = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact), idempotency_key="refused")
    stub: Any = fleet._stub
    with FakeAgent(fleet.address, device_info()) as agent:
        first, second = fleet.run(artifact, {"x": X}), fleet.run(artifact, {"x": X})
        assigned = agent.expect(m.AssignJob)
        with tracker.full():
            agent.finish(assigned)
            next_one = agent.expect(m.AssignJob)  # it was accepted before, and need not wait for the disk
            assert (next_one.lease.job_id, next_one.lease.epoch) == (second.id, 1)
            agent.finish(next_one)
            for _ in range(2):
                with pytest.raises(grpc.RpcError, match="cannot store jobs now"):
                    stub.SubmitJob(request, timeout=60)
            answer = stub.ListJobs(fleet_pb2.ListJobsRequest(), timeout=60)
            assert {job.id for job in answer.jobs} == {first.id, second.id}
            assert stub.GetJob(fleet_pb2.GetJobRequest(job_id=first.id), timeout=60).id == first.id
            assert agent.heard_nothing()
        assert [agent.expect(m.ResultAccepted).job_id for _ in range(2)] == [first.id, second.id]
        assert second.wait().outcome.ok and first.wait().outcome.ok
        assert {job.id: job.state for job in fleet.jobs()} == dict.fromkeys((first.id, second.id), JobState.DONE)
        assert agent.heard_nothing()
        again = stub.SubmitJob(request, timeout=60)
        assert not again.existed
        assert agent.expect(m.AssignJob).lease.job_id == again.job.id


@pytest.mark.parametrize("tracker", [60_000], indirect=True)
def test_the_first_job_that_a_full_disk_refuses_is_called_off_and_its_device_goes_on(
    tracker: Tracker, fleet: Fleet, artifact: Artifact
) -> None:
    with FakeAgent(fleet.address, device_info()) as agent:
        fleet.run(artifact, {"x": X}, device="nobody")  # once that is stored, so is what the tracker notes of the agent
        with tracker.full():
            with pytest.raises(grpc.RpcError, match="cannot store jobs now"):
                fleet._stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=spec_message(artifact)), timeout=60)
            refused = agent.expect(m.AssignJob)
            assert agent.expect(m.AbortJob).lease.job_id == refused.lease.job_id, "while the disk is still full"
            agent.finish(refused)
        assert agent.expect(m.ResultAccepted).stale
        accepted: list[str] = []

        def submitted() -> bool:
            with suppress(KedgeError):
                accepted.append(fleet.run(artifact, {"x": X}).id)
            return bool(accepted)

        wait_for(submitted, "the tracker to find that there is room")
        assert [agent.expect(m.AssignJob).lease.job_id] == accepted
        assert [listed.id for listed in fleet.jobs(states=(JobState.ASSIGNED,))] == accepted
        assert refused.lease.job_id not in {listed.id for listed in fleet.jobs()}


def test_whose_blob_it_is_counts_once_it_is_kept(tmp_path: Path) -> None:
    owners, ann = FileOwners(tmp_path / "owners"), Principal("ann", Role.SUBMIT)
    (tmp_path / "owners" / ann.owner).write_text("in the way of the folder")
    for _ in range(2):
        with pytest.raises(OSError, match=ann.owner):
            owners.add(ann.owner, "a" * 64)
        assert not owners.has(ann, "a" * 64)
    (tmp_path / "owners" / ann.owner).unlink()
    owners.add(ann.owner, "a" * 64)
    assert FileOwners(tmp_path / "owners").has(ann, "a" * 64)
