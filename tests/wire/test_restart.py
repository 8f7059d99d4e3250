"""The tracker as a process that is killed: what it accepted, and what was reported to it, is still there."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kedge.protos.v1 import fleet_pb2, fleet_pb2_grpc
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import connect
from kedge.rpc.client.plan import pack
from kedge.rpc.transport import Address, open_channel, parse_address
from kedge.rpc.types import DeviceState, JobState
from support.fake_agent import FakeAgent, echo
from support.ports import free_ports
from support.toys import device_info, spec_message

from .test_client import INTERRUPTED

X = np.arange(8, dtype=np.float32).reshape(2, 4)
MAIN = "import sys; from pathlib import Path; from kedge.rpc.tracker.main import run; "
MAIN += "sys.exit(run('127.0.0.1', int(sys.argv[1]), Path(sys.argv[2]), insecure_loopback=True))"


class Process:
    """A tracker in a process of its own."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(port or free_ports()), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.ready = self.popen.stdout.readline()
        assert self.ready, self.popen.communicate()[1]
        self.address: Address = parse_address(self.ready.split()[-1])

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=60)
        return self.popen.returncode, errors


@contextmanager
def tracker(folder: Path, port: int = 0) -> Iterator[Process]:
    process = Process(folder, port)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


def test_ready_line_and_a_graceful_end(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with tracker(tmp_path) as process:
            assert process.ready == f"kedge tracker ready at {process.address}\n"
            with FakeAgent(process.address, device_info()) as agent:
                status, errors = process.end(number)
                agent.ended()
            assert status == 0 and f"stopping: {number.name}" in errors and "Traceback" not in errors


def test_a_tracker_whose_store_fails_stops(tmp_path: Path, artifact: Artifact) -> None:
    """A tracker that cannot keep its promises must not go on making them."""
    with tracker(tmp_path) as process, connect(process.address) as fleet:
        for _, data in pack(artifact).blobs():
            fleet.upload(data)
        process.end(signal.SIGTERM)
    with sqlite3.connect(tmp_path / "tracker.db") as database:
        database.execute("CREATE TRIGGER t BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ABORT, 'broken'); END")
    database.close()
    with tracker(tmp_path) as process, open_channel(process.address) as channel:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        job = stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=spec_message(artifact)), timeout=60).job
        with pytest.raises(grpc.RpcError):
            stub.CancelJob(fleet_pb2.CancelJobRequest(job_id=job.id), timeout=60)
        _, errors = process.popen.communicate(timeout=60)
        assert process.popen.returncode == 1 and "StoreError" in errors and "broken" in errors


def test_a_killed_tracker_has_lost_nothing(tmp_path: Path, artifact: Artifact) -> None:
    agent_args: dict[str, Any] = {"instance_id": "same"}
    with tracker(tmp_path) as process, connect(process.address) as fleet:
        agent = FakeAgent(process.address, device_info(), **agent_args)
        agent.connect()
        done = fleet.run(artifact, {"x": X}, device="bench-1")
        agent.finish(agent.expect(m.AssignJob))
        first = done.wait()
        running = fleet.run(artifact, {"x": X + 1}, device="bench-1")
        assert agent.expect(m.ResultAccepted).job_id == done.id
        held = agent.expect(m.AssignJob)
        agent.say(m.JobStarted(held.lease))
        waiting = fleet.run(artifact, {"x": X + 2}, device="bench-1")
        results: dict[str, Any] = {}
        waiters = [
            threading.Thread(target=lambda j=job: results.update({j.id: j.wait()})) for job in (running, waiting)
        ]
        for waiter in waiters:
            waiter.start()
        process.end(signal.SIGKILL)
        agent.ended()
        agent.drop()
        with tracker(tmp_path, process.address.port) as again:
            assert again.address == process.address
            with connect(again.address) as other:
                states = {job.id: job.state for job in other.jobs()}
                assert states[done.id] is JobState.DONE
                assert states[waiting.id] is JobState.QUEUED
                np.testing.assert_array_equal(other.job(done.id).wait()["x_out"], first["x_out"])
                agent = FakeAgent(again.address, device_info(), **agent_args)
                agent.connect(held.lease)
                agent.finish(held)
                assert agent.expect(m.ResultAccepted) == m.ResultAccepted(running.id, stale=False)
                agent.finish(agent.expect(m.AssignJob))
                for waiter in waiters:
                    waiter.join(60)
                    assert not waiter.is_alive()
                agent.drop()
        np.testing.assert_array_equal(results[running.id]["x_out"], X + 1)
        np.testing.assert_array_equal(results[waiting.id]["x_out"], X + 2)


INTERRUPTED_ASYNC = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from kedge.rpc.client import aio
from support.toys import make_artifact
async def main():
    async with await aio.connect(sys.argv[1]) as fleet, fleet.pin("bench-1") as device:
        model = await device.load(make_artifact())
        await model.run({"x": np.zeros((1, 4), np.float32)})
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("script", [INTERRUPTED, INTERRUPTED_ASYNC], ids=["sync", "asyncio"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_ctrl_c_is_not_held_up_by_a_tracker_that_is_gone(tmp_path: Path, script: str, how: signal.Signals) -> None:
    with tracker(tmp_path) as process:
        agent = FakeAgent(process.address, device_info())
        agent.connect()
        arguments = [str(process.address), str(Path(__file__).parents[1]), "session"]
        client = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        agent.expect(m.AssignJob)
        process.popen.send_signal(how)
        began = time.monotonic()
        client.send_signal(signal.SIGINT)
        output, errors = client.communicate(timeout=60)
        assert (client.returncode, errors, output) == (0, "", "interrupted\n")
        assert time.monotonic() - began < 30, "a call that is waited for takes a minute"
        process.popen.kill()
        agent.drop()


def test_jobs_go_on_after_a_restart_with_nothing_left_to_do(tmp_path: Path, artifact: Artifact) -> None:
    """However it ended: what is done is not live, and still counts."""
    port, done = 0, []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with tracker(tmp_path, port) as process:
            port = process.address.port
            with connect(process.address) as fleet, FakeAgent(process.address, device_info(), work=echo):
                done.append(fleet.run(artifact, {"x": X}, device="bench-1"))
                np.testing.assert_array_equal(done[-1].wait(timeout=60)["x_out"], X)
                assert [job.id for job in fleet.jobs()] == [job.id for job in reversed(done)]
            process.end(end)


def test_kills_at_any_moment_lose_no_accepted_job(tmp_path: Path, artifact: Artifact) -> None:
    """A client submits in a row while the tracker is killed under it; every job that it was promised ends well."""
    port, jobs = 0, []
    for round_ in range(3):
        with tracker(tmp_path, port) as process:
            port = process.address.port
            with connect(process.address) as fleet, FakeAgent(process.address, device_info(), work=echo):
                enough = threading.Event()

                def submit(fleet: Any = fleet, enough: threading.Event = enough, round_: int = round_) -> None:
                    for number in range(12):
                        jobs.append(fleet.run(artifact, {"x": X + len(jobs)}, device="bench-1").id)
                        if number == 2 + 3 * round_:
                            enough.set()

                submitter = threading.Thread(target=submit)
                submitter.start()
                assert enough.wait(60)
                process.end(signal.SIGKILL)
                with tracker(tmp_path, port) as again, FakeAgent(again.address, device_info(), work=echo):
                    submitter.join(60)
                    assert not submitter.is_alive()
                    # This tracker is killed, too: a job that loses its device a second time is given up.
                    for job_id in jobs:
                        fleet.job(job_id).wait(timeout=60, check=False)
    with tracker(tmp_path, port) as process, connect(process.address) as fleet:
        agent = FakeAgent(process.address, device_info(), work=echo)
        with agent:
            ends = [fleet.job(job_id).wait(timeout=60, check=False) for job_id in jobs]
    kinds = [end.outcome.kind.value for end in ends]
    # What ran while the fake agent was cut off, and forgot it, was run again; nothing may vanish.
    assert kinds == ["ok"] * 36
    for number, end in enumerate(ends):
        np.testing.assert_array_equal(end["x_out"], X + number)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_device_that_is_off_is_known_to_the_tracker_that_comes_back(tmp_path: Path, how: signal.Signals) -> None:
    info = device_info("off", rack="a")
    with tracker(tmp_path) as first:
        FakeAgent(first.address, info).connect()
        with connect(first.address) as fleet:
            seen = fleet.wait_for_device("off", timeout=60).last_seen_unix_ms
            for enabled in (True, False):  # what was written before it is on the disk then
                fleet.set_maintenance("off", enabled)
        first.end(how)
    with tracker(tmp_path) as second, connect(second.address) as fleet:
        assert fleet.devices() == []
        (found,) = fleet.devices("rack=a", include_gone=True)
        assert found.info.name == "off" and found.state is DeviceState.GONE and found.last_seen_unix_ms >= seen
