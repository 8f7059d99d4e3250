"""The agent and the real tracker, both as processes: jobs, cancelling, and either of them dying."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kedge.device_agent.results import ResultStore
from kedge.protos.v1 import fleet_pb2, fleet_pb2_grpc
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import blob_of
from kedge.rpc.client import Fleet as Client
from kedge.rpc.errors import ConnectError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.transport import open_channel, parse_address
from kedge.rpc.types import (
    BenchTask,
    Blob,
    Deadlines,
    DeviceState,
    DeviceStatus,
    Job,
    JobResult,
    JobSpec,
    JobState,
    Lease,
    RunTask,
    Tensor,
    TimeOptions,
    Verdict,
)
from support.agents import AgentProcess, at_work, descendants, name_of, runs, wait_for
from support.handmade import artifact
from support.ports import free_ports
from support.python39 import Python39

from .conftest import FUNCTIONS

#: A tracker whose patience with silent agents is given. An agent that lost it comes back within 5 s.
TRACKER = """
import asyncio, pathlib, signal, sys
from kedge.rpc.tracker.server import serve
from kedge.rpc.tracker.settings import Settings

async def main():
    settings = Settings(heartbeat_interval_ms=200, lease_ms=int(sys.argv[3]))
    folder = pathlib.Path(sys.argv[2])
    async with serve("127.0.0.1", int(sys.argv[1]), folder, settings, insecure_loopback=True) as serving:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.stopped.set_result, "SIGTERM")
        print(serving.address.port, flush=True)
        await serving.stopped

asyncio.run(main())
"""


class Fleet:
    """A tracker that can be killed and started again on its port, and a client of it."""

    def __init__(self, data_dir: Path, lease_ms: int) -> None:
        self._data_dir = data_dir
        self._lease_ms = lease_ms
        self._keys = 0
        self.port = free_ports()
        self.start()
        self.channel = open_channel(parse_address(self.address))
        self._stub: Any = cast(Any, fleet_pb2_grpc).FleetStub(self.channel)
        self.blobs = BlobClient(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-c", TRACKER, str(self.port), str(self._data_dir), str(self._lease_ms)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def close(self) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.stop()

    def publish(self, module: bytes) -> Blob:
        made = artifact(module, FUNCTIONS)
        manifest = made.manifest.to_json()
        self.blobs.upload_missing([*made.blobs(), (blob_of(manifest), manifest)])
        return blob_of(manifest)

    def submit(self, spec: JobSpec) -> str:
        self._keys += 1
        request = fleet_pb2.SubmitJobRequest(spec=convert.job_spec_to_pb(spec), idempotency_key=f"key-{self._keys}")
        return str(self._stub.SubmitJob(request, wait_for_ready=True).job.id)

    def job(self, job_id: str) -> Job:
        return convert.job_from_pb(self._stub.GetJob(fleet_pb2.GetJobRequest(job_id=job_id), wait_for_ready=True))

    def wait(self, job_id: str, timeout_s: float = 30.0) -> Job:
        wait_for(lambda: self.job(job_id).state is JobState.DONE, f"job {job_id} to be done", timeout_s)
        return self.job(job_id)

    def wait_stage(self, job_id: str, stage: Stage) -> None:
        wait_for(lambda: self.job(job_id).stage is stage, f"job {job_id} to be in stage {stage.value}")

    def cancel(self, job_id: str) -> None:
        self._stub.CancelJob(fleet_pb2.CancelJobRequest(job_id=job_id))

    def devices(self) -> list[DeviceStatus]:
        found = self._stub.ListDevices(fleet_pb2.ListDevicesRequest(include_gone=True), wait_for_ready=True)
        return [convert.device_status_from_pb(pb) for pb in found.devices]

    def state(self) -> DeviceState | None:
        return next((device.state for device in self.devices()), None)


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "tracker", getattr(request, "param", 15_000))
    yield made
    made.close()


@pytest.fixture
def agent(fleet: Fleet, runner: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(fleet.address, runner, tmp_path / "agent") as started:
        started.wait_ready()
        yield started


def spec(manifest: Blob, function: str, run_ms: int = 0, count: int = 3) -> JobSpec:
    data = struct.pack(f"<{count}f", *range(count))
    task = RunTask((Tensor("x", "float32", (count,), data),))
    return JobSpec(manifest, function, task, "rack!=b", Deadlines(run_ms=run_ms))


def outputs(job: Job) -> tuple[float, ...]:
    assert job.result is not None
    assert job.result.outcome.ok, job.result.outcome
    (y,) = job.result.outputs
    assert isinstance(y.data, bytes)
    return struct.unpack(f"<{len(y.data) // 4}f", y.data)


def kind(job: Job) -> OutcomeKind:
    assert job.result is not None
    return job.result.outcome.kind


def test_run_and_bench(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    manifest = fleet.publish(module)
    assert outputs(fleet.wait(fleet.submit(spec(manifest, "add")))) == (1.0, 2.0, 3.0)
    assert outputs(fleet.wait(fleet.submit(spec(manifest, "weigh")))) == (10.0, 11.0, 12.0)
    x = spec(manifest, "add").task.inputs
    task = BenchTask(x, TimeOptions(repeat=5, min_repeat_ns=100_000), return_outputs=True)
    job = fleet.wait(fleet.submit(JobSpec(manifest, "add", task)))
    assert outputs(job) == (1.0, 2.0, 3.0)
    assert job.result is not None
    measured = job.result.measurement
    assert measured is not None
    assert len(measured.samples_ns) == 5
    assert measured.verdict in (Verdict.VALID, Verdict.SUSPECT)


def test_large_outputs_come_back_as_blobs(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    count = (1 << 20) // 4 + 1
    data = struct.pack("<f", 1.5) * count
    blob = blob_of(data)
    fleet.blobs.upload(blob, data)
    task = RunTask((Tensor("x", "float32", (count,), blob),))
    job = fleet.wait(fleet.submit(JobSpec(fleet.publish(module), "add", task)))
    assert job.result is not None
    assert job.result.outcome.ok, job.result.outcome
    (y,) = job.result.outputs
    assert isinstance(y.data, Blob)
    assert fleet.blobs.read(y.data) == struct.pack("<f", 2.5) * count


def test_what_no_message_can_carry_does_not_take_the_device_along(
    fleet: Fleet, runner: Path, tmp_path: Path, module: bytes
) -> None:
    """The agent's folder has a name that is no text, and the reason of the failure holds it."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    folder.mkdir()
    manifest = fleet.publish(module)
    with AgentProcess(fleet.address, runner, folder / "agent") as agent:
        agent.wait_ready()
        assert outputs(fleet.wait(fleet.submit(spec(manifest, "add")))) == (1.0, 2.0, 3.0)
        (folder / "agent" / "jobs").rename(folder / "away")
        assert kind(fleet.wait(fleet.submit(spec(manifest, "add")))) is OutcomeKind.DEVICE_FAULT
        (folder / "away").rename(folder / "agent" / "jobs")
        assert outputs(fleet.wait(fleet.submit(spec(manifest, "add")))) == (1.0, 2.0, 3.0)


def test_an_agent_whose_parent_ignored_its_children(fleet: Fleet, runner: Path, tmp_path: Path, module: bytes) -> None:
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = (sys.executable, "-c", ignoring, sys.executable)
    with AgentProcess(fleet.address, runner, tmp_path / "agent", command=command) as agent:
        agent.wait_ready()
        manifest = fleet.publish(module)
        assert outputs(fleet.wait(fleet.submit(spec(manifest, "add")))) == (1.0, 2.0, 3.0)
        left = fleet.wait(fleet.submit(spec(manifest, "leave")))
        assert left.result is not None and left.result.outcome.exit_status == 7


def test_a_crash_and_a_timeout_do_not_harm_the_next_job(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    manifest = fleet.publish(module)
    ids = [fleet.submit(spec(manifest, name, run_ms=500)) for name in ("crash", "spin", "hog", "add")]
    jobs = [fleet.wait(job_id) for job_id in ids]
    assert [kind(job) for job in jobs] == [
        OutcomeKind.CRASH,
        OutcomeKind.TIMEOUT,
        OutcomeKind.OUT_OF_MEMORY,
        OutcomeKind.OK,
    ]
    assert jobs[0].result is not None
    assert jobs[0].result.outcome.signal == signal.SIGSEGV
    assert jobs[1].result is not None
    assert jobs[1].result.outcome.stage is Stage.RUN


def test_cancelling_a_running_job_frees_the_device(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    manifest = fleet.publish(module)
    lingering = fleet.submit(spec(manifest, "linger"))
    fleet.wait_stage(lingering, Stage.RUN)
    fleet.cancel(lingering)
    assert kind(fleet.wait(lingering)) is OutcomeKind.CANCELLED
    assert outputs(fleet.wait(fleet.submit(spec(manifest, "add")))) == (1.0, 2.0, 3.0)
    wait_for(lambda: not at_work(agent.process.pid), "the job's runner to be gone")


@pytest.mark.parametrize("fleet", [5_000], indirect=True)
def test_a_job_that_takes_its_agents_down_is_lost_after_the_second(
    agent: AgentProcess, fleet: Fleet, module: bytes, runner: Path
) -> None:
    manifest = fleet.publish(module)
    lingering = fleet.submit(spec(manifest, "linger"))
    fleet.wait_stage(lingering, Stage.RUN)
    below = descendants(agent.process.pid)
    agent.stop(signal.SIGKILL)
    wait_for(lambda: fleet.job(lingering).state is JobState.QUEUED, "the job to wait for a device again")
    wait_for(lambda: not any(runs(pid) for pid in below), "the runner to end with its agent")
    with AgentProcess(fleet.address, runner, agent.data_dir) as second:
        second.wait_ready()
        fleet.wait_stage(lingering, Stage.RUN)
        second.stop(signal.SIGKILL)
    assert kind(fleet.wait(lingering)) is OutcomeKind.DEVICE_LOST
    with AgentProcess(fleet.address, runner, agent.data_dir) as third:
        third.wait_ready()
        assert outputs(fleet.wait(fleet.submit(spec(manifest, "add")))) == (1.0, 2.0, 3.0)


def test_a_result_survives_the_death_of_tracker_and_agent(
    agent: AgentProcess, fleet: Fleet, module: bytes, runner: Path
) -> None:
    lingering = fleet.submit(spec(fleet.publish(module), "linger", run_ms=1_000))
    fleet.wait_stage(lingering, Stage.RUN)
    fleet.stop(signal.SIGKILL)
    results = agent.data_dir / "results"
    wait_for(lambda: list(results.glob("*.result")), "the agent to keep the result")
    agent.stop(signal.SIGKILL)
    fleet.start()
    with AgentProcess(fleet.address, runner, agent.data_dir) as successor:
        successor.wait_ready()
        job = fleet.wait(lingering)
        assert kind(job) is OutcomeKind.TIMEOUT and job.faults == ()
        assert job.result is not None and Stage.RUN in [item.stage for item in job.result.stage_times]
        wait_for(lambda: list(results.iterdir()) == [], "the result to be forgotten")


def test_a_kept_result_that_no_tracker_takes_any_more_is_replaced(fleet: Fleet, runner: Path, tmp_path: Path) -> None:
    """Brought as it is on every connection, it would end them all."""
    results = tmp_path / "data" / "results"
    named = Tensor("y" * 1_001, "int8", (1,), b"1")
    ResultStore(results).keep(m.JobFinished(Lease("j", 2), JobResult(Outcome(OutcomeKind.OK), (named,))))
    with AgentProcess(fleet.address, runner, tmp_path / "data") as agent:
        agent.wait_ready()
        agent.wait_log("the result of this job cannot be sent: Tensor.name has 1001 characters")
        wait_for(lambda: list(results.iterdir()) == [], "the tracker to take what is said instead")


def test_a_damaged_result_is_removed_and_its_job_runs_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")
    finished = m.JobFinished(Lease("j", 2), JobResult(Outcome(OutcomeKind.OK)))
    store.keep(finished)
    (tmp_path / "results" / "k-1.result").write_bytes(b"\xff torn")
    (tmp_path / "results" / "tmp4711").write_bytes(b"half")
    assert ResultStore(tmp_path / "results").load() == [finished]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["j-2.result"]
    store.forget(finished.lease)
    store.forget(finished.lease)
    assert store.load() == []


def test_work_survives_a_restart_of_the_tracker(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    """Before and after the restart it is the same runner, and the tracker still has a say in it."""
    lingering = fleet.submit(spec(fleet.publish(module), "linger"))
    fleet.wait_stage(lingering, Stage.RUN)
    below = descendants(agent.process.pid)
    fleet.stop(signal.SIGKILL)
    fleet.start()
    wait_for(lambda: fleet.state() is DeviceState.BUSY, "the agent to come back with its job")
    fleet.wait_stage(lingering, Stage.RUN)
    assert descendants(agent.process.pid) == below != []
    fleet.cancel(lingering)
    job = fleet.wait(lingering)
    assert kind(job) is OutcomeKind.CANCELLED
    assert job.result is not None
    assert job.result.device == "here"
    wait_for(lambda: fleet.state() is DeviceState.IDLE, "the device to be idle")


def test_a_result_made_while_the_tracker_was_away_arrives(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    lingering = fleet.submit(spec(fleet.publish(module), "linger", run_ms=700))
    fleet.wait_stage(lingering, Stage.RUN)
    fleet.stop(signal.SIGKILL)
    agent.wait_log(r"job \S+: timeout in stage run")
    fleet.start()
    assert kind(fleet.wait(lingering)) is OutcomeKind.TIMEOUT


def test_a_transfer_survives_a_restart_of_the_tracker(agent: AgentProcess, fleet: Fleet, module: bytes) -> None:
    """48 MB of input, the tracker killed while they are on their way."""
    count = 12 << 20
    data = struct.pack("<f", 0.5) * count
    blob = blob_of(data)
    fleet.blobs.upload(blob, data)
    task = RunTask((Tensor("x", "float32", (count,), blob),), discard_outputs=True)
    partial = agent.data_dir / "cache" / "blobs" / "partial" / blob.digest
    job_id = ""

    def submit() -> None:
        nonlocal job_id
        job_id = fleet.submit(JobSpec(fleet.publish(module), "add", task))

    submitter = threading.Thread(target=submit)
    submitter.start()
    wait_for(partial.exists, "the transfer to begin")
    submitter.join()
    fleet.stop(signal.SIGKILL)
    fleet.start()
    job = fleet.wait(job_id)
    assert job.result is not None
    assert job.result.outcome.ok, job.result.outcome


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="cores are kept where there are several")
def test_cores_that_are_kept_for_timings(fleet: Fleet, runner: Path, tmp_path: Path, module: bytes) -> None:
    """All of the agent's threads are elsewhere; a job that never ends shows where jobs are."""
    *others, kept = sorted(os.sched_getaffinity(0))
    arguments = ("--measure-cores", str(kept))
    with AgentProcess(fleet.address, runner, tmp_path / "agent", *arguments) as agent:
        agent.wait_ready()
        manifest = fleet.publish(module)
        allowed = []
        for path in Path(f"/proc/{agent.process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # gRPC's threads end when they like
                allowed.append(os.sched_getaffinity(int(path.name)))
        assert allowed and allowed == [{*others}] * len(allowed)
        (device,) = fleet.devices()
        info = device.info
        assert info.num_cores == len(others) + 1
        assert info.confinement is not None and info.confinement.measuring_cpus == (kept,)
        run = spec(manifest, "add")
        timed = replace(run, task=BenchTask(run.task.inputs, TimeOptions(repeat=3, min_repeat_ns=1_000_000)))
        job = fleet.wait(fleet.submit(timed))
        assert job.result is not None and job.result.measurement is not None
        assert job.result.measurement.pinning is not None
        assert job.result.measurement.pinning.cpus == (kept,)
        assert job.result.measurement.pinning.reserved
        assert job.result.measurement.num_threads == 1
        endless = fleet.submit(spec(manifest, "spin"))
        fleet.wait_stage(endless, Stage.RUN)
        (runner_pid,) = [pid for pid in descendants(agent.process.pid) if name_of(pid) == "kedge-job"]
        assert os.sched_getaffinity(runner_pid) == {*others}
        fleet.cancel(endless)
        too_many = fleet.wait(fleet.submit(replace(timed, num_threads=2)))
        assert kind(too_many) is OutcomeKind.BAD_REQUEST


def test_an_agent_that_leaves_is_gone_at_once(agent: AgentProcess, fleet: Fleet) -> None:
    assert fleet.state() is DeviceState.IDLE
    assert agent.stop() == 0
    assert fleet.state() is DeviceState.GONE
    assert sorted(path.name for path in agent.data_dir.iterdir()) == ["cache", "jobs", "loaded", "lock", "results"]
    assert list((agent.data_dir / "jobs").iterdir()) == []


def test_a_second_agent_of_the_same_name_is_told(agent: AgentProcess, fleet: Fleet, runner: Path) -> None:
    with AgentProcess(fleet.address, runner, agent.data_dir.parent / "other") as second:
        second.wait_log("refused this agent: another device is connected as 'here'")
        agent.stop()
        second.wait_ready()
        assert fleet.state() is DeviceState.IDLE


@pytest.mark.board
def test_an_agent_on_python_3_9(fleet: Fleet, runner: Path, tmp_path: Path, module: bytes, python39: Python39) -> None:
    package = tmp_path / "tree" / "kedge"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    root = Path(__file__).resolve().parent.parent.parent
    for floor in ("protos", "rpc", "device_agent"):
        (package / floor).symlink_to(root / floor)
    environment = python39.environment(package.parent)
    with AgentProcess(
        fleet.address, runner, tmp_path / "agent", name="old", command=python39.command, env=environment
    ) as agent:
        agent.wait_ready()
        manifest = fleet.publish(module)
        assert outputs(fleet.wait(fleet.submit(spec(manifest, "weigh")))) == (10.0, 11.0, 12.0)
        assert kind(fleet.wait(fleet.submit(spec(manifest, "crash")))) is OutcomeKind.CRASH
        assert agent.stop() == 0
        assert "Traceback" not in agent.log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_does_not_outlive_its_tracker_and_one_that_waits_does(
    fleet: Fleet, agent: AgentProcess, number: int
) -> None:
    agent.wait_ready()
    names: list[str] = []

    def wait_for_the_device() -> None:
        with Client(parse_address(fleet.address), None) as client, client.session("here") as device:
            names.extend([device.id, *device.files()])

    with Client(parse_address(fleet.address), None) as client:
        device = client.session("here")
        waiting = threading.Thread(target=wait_for_the_device)
        waiting.start()
        wait_for(lambda: len(client.jobs()) == 2, "the second session to wait")
        fleet.stop(number)
        with pytest.raises(ConnectError, match="is over, as its connection broke"):
            device.files()
        fleet.start()
        assert ended(fleet.wait(device.id)).kind is OutcomeKind.CANCELLED
        waiting.join(60)
        assert not waiting.is_alive() and len(names) == 1 and names != [device.id]
        assert ended(fleet.wait(names[0])).kind is OutcomeKind.OK
        device.close()
    wait_for(lambda: fleet.state() is DeviceState.IDLE, "the device to be free")
    assert not descendants(agent.process.pid)


def ended(job: Job) -> Outcome:
    assert job.result is not None
    return job.result.outcome
