"""Interactive sessions: a real tracker, a real agent and its runner, over TLS."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import pytest

from kedge.protos.v1 import fleet_pb2, sessions_pb2_grpc, types_pb2
from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc import convert
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import DeviceTensor, Fleet, aio, connect, plan
from kedge.rpc.client.access import Access
from kedge.rpc.client.session_link import SessionLink
from kedge.rpc.errors import ConnectError, InputError, JobError, NoDeviceError, PermissionDeniedError
from kedge.rpc.outcome import OutcomeKind
from kedge.rpc.security import credentials
from kedge.rpc.status import NotReadyError, UnknownJobError
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.transport import Address, Tls
from kedge.rpc.types import MAX_PROFILE_SAMPLES, MAX_SAMPLES, Blob, Deadlines, DeviceState, Job, JobState, TimeOptions
from support.agents import AgentProcess, at_work, runs, wait_for
from support.doubling import gpu_artifact, opencl_device
from support.handmade import artifact
from support.memory import forget_peak, peak_bytes
from support.proxy import Proxy, Trap

from .conftest import FUNCTIONS

X = np.arange(4, dtype=np.float32)
#: 12 MiB: more than one message takes, and more than the streams hold on their way.
LARGE = np.arange(3 << 20, dtype=np.float32)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTracker]:
    with start(port=0, data_dir=tmp_path_factory.mktemp("sessions") / "tracker") as running:
        yield running


@pytest.fixture(scope="module")
def access(tracker: RunningTracker) -> Iterator[Access]:
    with Access(tracker.address, credentials.find(tracker.address).tls) as access:
        yield access


@pytest.fixture(scope="module")
def fleet(tracker: RunningTracker) -> Iterator[Fleet]:
    with connect(tracker.address) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def made(module: bytes) -> Artifact:
    return artifact(module, FUNCTIONS)


@pytest.fixture(scope="module")
def agent(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    with started(tracker, access, runner, tmp_path_factory.mktemp("here") / "agent", "here") as process:
        yield process


def started(
    tracker: RunningTracker,
    access: Access,
    runner: Path,
    folder: Path,
    name: str,
    *arguments: str,
    joins: bool = True,
) -> AgentProcess:
    environment = {**os.environ, "KEDGE_JOIN": str(access.enrol_token(name)[0])} if joins else None
    process = AgentProcess(str(tracker.address), runner, folder, *arguments, name=name, env=environment, secure=True)
    process.wait_ready()
    return process


def state_of(fleet: Fleet, name: str = "here") -> DeviceState:
    return next(device.state for device in fleet.devices(include_gone=True) if device.info.name == name)


def outcome(fleet: Fleet, session_id: str) -> OutcomeKind:
    wait_for(lambda: fleet.job(session_id).status().state is JobState.DONE, "the session to be done")
    result = fleet.job(session_id).status().result
    assert result is not None
    return result.outcome.kind


# ---- What one does there -------------------------------------------------------------------------------------------


def test_calls_tensors_and_artifacts(fleet: Fleet, agent: AgentProcess, module: bytes, made: Artifact) -> None:
    other = artifact(module, FUNCTIONS, weight=100.0)
    with fleet.session("here") as device:
        assert (device.name, state_of(fleet)) == ("here", DeviceState.BUSY)
        m, n = device.load(made), device.load(other)
        np.testing.assert_array_equal(m.run({"x": X}, function="add")["y"], X + 1)
        np.testing.assert_array_equal(m["weigh"]({"x": X})["y"], X + 10)
        np.testing.assert_array_equal(n["weigh"]({"x": X})["y"], X + 100)
        x = device.tensor(X)
        assert (x.dtype, x.shape, x.nbytes) == (np.float32, (4,), 16)
        kept = m.run({"x": x}, function="weigh", keep=True)["y"]
        assert isinstance(kept, DeviceTensor)
        # A tensor of one artifact is the input of the other, and never left the device.
        np.testing.assert_array_equal(n["weigh"]({"x": kept})["y"], X + 110)
        np.testing.assert_array_equal(kept.numpy(), X + 10)
        timing = m.time({"x": kept}, function="add", repeat=3)
        assert len(timing.samples_ns) == 3
        m.close()
        np.testing.assert_array_equal(n["add"]({"x": kept})["y"], X + 11)
        with pytest.raises(JobError, match="not on the device any more"):
            m.run({"x": X}, function="add")
    assert outcome(fleet, device.id) is OutcomeKind.OK
    assert state_of(fleet) is DeviceState.IDLE
    with pytest.raises(JobError, match="is over: ok"):
        device.tensor(X)


def test_state_stays_from_call_to_call(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here") as device:
        m = device.load(made)
        state = device.tensor(np.zeros(4, np.float32))
        for _ in range(25):
            state = m["add"]({"x": state}, keep=True)["y"]  # the one before is garbage, and freed with the next call
        np.testing.assert_array_equal(state.numpy(), np.full(4, 25, np.float32))


def test_a_session_on_a_gpu(
    fleet: Fleet, tracker: RunningTracker, access: Access, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    opencl_device(runner)
    x = np.arange(1 << 20, dtype=np.float32)
    with (
        started(tracker, access, runner, tmp_path / "gpu", "gpu"),
        fleet.session("name=gpu") as device,
    ):
        assert device.info.accelerators
        doubling, on_cpu = device.load(gpu_artifact()), device.load(made)
        np.testing.assert_array_equal(doubling.run({"x": x})["y"], 2 * x + 1)
        there = device.tensor(x)
        kept = doubling.run({"x": there}, keep=True)["y"]
        np.testing.assert_array_equal(doubling.run({"x": kept})["y"], 4 * x + 3)
        np.testing.assert_array_equal(on_cpu["add"]({"x": kept})["y"], 2 * x + 2)
        np.testing.assert_array_equal(doubling.run({"x": kept})["y"], 4 * x + 3)
        assert len(doubling.time({"x": there}, repeat=3).samples_ns) == 3


def test_large_tensors_both_ways(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here") as device:
        m = device.load(made)
        there = device.tensor(LARGE)
        np.testing.assert_array_equal(m["add"]({"x": LARGE})["y"], LARGE + 1)
        kept = m["add"]({"x": there}, keep=True)["y"]
        np.testing.assert_array_equal(kept.numpy(), LARGE + 1)
        result = m["add"]({"x": kept})["y"]
        result[0] = 7  # the caller's own
        np.testing.assert_array_equal(kept.numpy(), LARGE + 1)


def test_a_large_tensor_is_on_the_device_once(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    """It goes to the runner as it comes, and to the client as it leaves: the agent holds pieces of it."""
    array = np.ones(24 << 20, np.float32)
    with fleet.session("here") as device:
        m = device.load(made)
        before = {pid: forget_peak(pid) for pid in (agent.process.pid,)}
        before |= {pid: peak_bytes(pid) for pid in at_work(agent.process.pid)}

        def grown() -> float:
            """By how many such tensors the agent and its runner have been larger than before."""
            return sum(peak_bytes(pid) - size for pid, size in before.items()) / array.nbytes

        kept = device.tensor(array)
        assert 1 <= grown() < 1.4
        assert kept.numpy()[-1] == 1
        assert grown() < 1.4
        kept.free()
        m["add"]({"x": array}, keep=True)  # an input and an output
        assert 2 <= grown() < 2.4


def test_tensors_that_are_gone(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here") as device:
        m = device.load(made)
        x = device.tensor(X)
        x.free()
        x.free()
        with pytest.raises(InputError, match="was freed"):
            m["add"]({"x": x})
        with pytest.raises(InputError, match=r"has dtype float64, expected"):
            m["add"]({"x": device.tensor(X.astype(np.float64))})
    with fleet.session("here") as device, pytest.raises(InputError, match=r"is on session .* not on session"):
        device.load(made)["add"]({"x": foreign(fleet, device)})


def foreign(fleet: Fleet, device: Any) -> DeviceTensor:
    """A tensor of another session: `device` gave the same number to one of its own."""

    class Elsewhere:
        def fetch(self, tensor: DeviceTensor) -> Any:
            raise AssertionError

        def forget(self, handle: int) -> None:
            """It was never there."""

        free = fetch

        def __str__(self) -> str:
            return "session of another time"

    own = device.tensor(X)
    return DeviceTensor(Elsewhere(), own._handle, "float32", (4,))  # type: ignore[arg-type]


def test_a_crash_ends_its_runner_and_not_the_session(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here") as device:
        m, kept = device.load(made), device.tensor(X)
        with pytest.raises(JobError, match="its runner ended, and all artifacts and tensors in it are gone") as caught:
            m["crash"]({"x": X})
        assert caught.value.outcome == "crash"
        with pytest.raises(JobError, match="load it again"):
            m["add"]({"x": X})
        with pytest.raises(JobError, match="its runner ended"):
            kept.numpy()
        del kept
        m = device.load(made)
        np.testing.assert_array_equal(m["add"]({"x": device.tensor(X)})["y"], X + 1)
        with pytest.raises(JobError) as caught:
            m["hog"]({"x": X})
        assert caught.value.outcome == "out_of_memory"
        np.testing.assert_array_equal(m["add"]({"x": X})["y"], X + 1)
    assert outcome(fleet, device.id) is OutcomeKind.OK


@pytest.mark.parametrize("x", [X, LARGE], ids=["small", "large"])
def test_a_runner_that_ends_between_two_requests(
    fleet: Fleet, agent: AgentProcess, made: Artifact, x: np.ndarray[Any, Any]
) -> None:
    """The next request finds that out, be it while it lets go of tensors that nobody has any more."""
    with fleet.session("here") as device:
        m, kept = device.load(made), device.tensor(X)
        device.forget(kept._handle)
        (runner_pid,) = at_work(agent.process.pid)
        os.kill(runner_pid, signal.SIGKILL)
        wait_for(lambda: not runs(runner_pid), "the runner to end")
        with pytest.raises(JobError, match="its runner ended") as caught:
            m["add"]({"x": x})
        assert caught.value.outcome == "crash"
        np.testing.assert_array_equal(device.load(made)["add"]({"x": X})["y"], X + 1)
    assert outcome(fleet, device.id) is OutcomeKind.OK


def test_a_call_that_takes_too_long(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here", deadlines=Deadlines(run_ms=200)) as device:
        m = device.load(made)
        with pytest.raises(JobError) as caught:
            m["spin"]({"x": X})
        assert caught.value.outcome == "timeout"
        np.testing.assert_array_equal(device.load(made)["add"]({"x": X})["y"], X + 1)


def test_calling_off(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here") as device:
        m = device.load(made)
        failures: list[JobError] = []

        def spin() -> None:
            with pytest.raises(JobError) as caught:
                m["spin"]({"x": X})
            failures.append(caught.value)

        thread = threading.Thread(target=spin)
        thread.start()

        def over() -> bool:
            device.call_off()
            return not thread.is_alive()

        wait_for(over, "the call to end")
        assert [failure.outcome for failure in failures] == ["cancelled"]
        np.testing.assert_array_equal(device.load(made)["add"]({"x": X})["y"], X + 1)


def test_files(fleet: Fleet, agent: AgentProcess, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data.bin").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    with fleet.session("here") as device:
        device.upload(tmp_path / "data.bin")
        device.upload(str(tmp_path / "empty"), name="nothing")
        assert device.files() == {"data.bin": len(data), "nothing": 0}
        assert device.download("data.bin", tmp_path / "back").read_bytes() == data
        device.upload(tmp_path / "empty", name="data.bin")
        assert device.download("data.bin", tmp_path / "back").read_bytes() == b""
        device.remove("nothing")
        assert device.files() == {"data.bin": 0}
        for name in ("../data.bin", "/etc/passwd", ".hidden", "a/b", "", "x" * 200):
            with pytest.raises(JobError, match="not the name of a session's file"):
                device.download(name, tmp_path / "never")
        with pytest.raises(JobError, match="not the name of a session's file"):
            device.upload(tmp_path / "data.bin", name="../up")
        with pytest.raises(JobError, match="has no file 'absent'"):
            device.download("absent", tmp_path / "never")
        assert not (tmp_path / "never").exists()
        with pytest.raises(InputError, match=f"{tmp_path / 'absent'}: no such file") as missing:
            device.upload(tmp_path / "absent")
        assert missing.value.hint
        with pytest.raises(InputError, match=f"cannot read {tmp_path}: Is a directory"):
            device.upload(tmp_path)
        device.upload(tmp_path / "data.bin")
    with fleet.session("here") as device:
        assert device.files() == {}
    assert not list((agent.data_dir / "jobs").iterdir())


def test_arrays_that_cannot_travel(fleet: Fleet, agent: AgentProcess) -> None:
    with fleet.session("here") as device:
        with pytest.raises(InputError, match="a tensor cannot have dtype complex64"):
            device.tensor(np.zeros(3, np.complex64))
        strided = np.arange(12, dtype=np.int32).reshape(3, 4).T
        np.testing.assert_array_equal(device.tensor(strided).numpy(), strided)
        scalar = device.tensor(np.float32(3))
        assert scalar.numpy().shape == () and float(scalar.numpy()) == 3


class Packing:
    """An array that takes until `may_end` is set to be packed."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __dlpack__(self, **options: Any) -> Any:
        self.begun.set()
        self.may_end.wait()
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_asyncio(fleet: Fleet, agent: AgentProcess, made: Artifact, tracker: RunningTracker, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    async def main() -> str:
        async with await aio.connect(tracker.address) as fleet, fleet.session("here") as device:
            m = await device.load(made)
            x = await device.tensor(X)
            kept = (await m["weigh"]({"x": x}, keep=True))["y"]
            np.testing.assert_array_equal(await kept.numpy(), X + 10)
            np.testing.assert_array_equal((await m.run({"x": kept}, "add"))["y"], X + 11)
            assert len((await m.time({"x": X}, "add", repeat=3)).samples_ns) == 3
            await kept.free()
            await device.upload(tmp_path / "file")
            with pytest.raises(InputError, match=f"{tmp_path / 'absent'}: no such file"):
                await device.upload(tmp_path / "absent")
            assert await device.files() == {"file": 7}
            assert (await device.download("file", tmp_path / "back")).read_bytes() == b"content"
            # A call that is cancelled is called off on the device: otherwise the next one would wait for ever.
            spinning = asyncio.create_task(m.run({"x": X}, "spin"))
            await asyncio.wait([spinning], timeout=0.3)
            spinning.cancel()
            with pytest.raises(asyncio.CancelledError):
                await spinning
            m = await device.load(made)
            np.testing.assert_array_equal((await m.run({"x": X}, "add"))["y"], X + 1)
            # One that is cancelled while its inputs are packed is never sent, and the runner stays as it is.
            slow = Packing(X)
            packing = asyncio.create_task(m.run({"x": slow}, "spin"))
            await asyncio.to_thread(slow.begun.wait)
            packing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await packing
            slow.may_end.set()
            async with asyncio.timeout(60):
                np.testing.assert_array_equal((await m.run({"x": X}, "add"))["y"], X + 1)
            return device.id

    session_id = asyncio.run(main())
    assert outcome(fleet, session_id) is OutcomeKind.OK


# ---- Who has the device --------------------------------------------------------------------------------------------


def test_a_session_waits_in_the_queue_and_others_wait_for_it(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    seen: list[Job] = []
    got = threading.Event()
    done = threading.Event()

    def second() -> None:
        with fleet.session("here", progress=seen.append):
            got.set()
            assert done.wait(60)

    with fleet.session("here") as first:
        thread = threading.Thread(target=second)
        thread.start()
        wait_for(lambda: seen and seen[-1].position, "the second one to be told that it waits")
        job = fleet.run(made, {"x": X}, function="add", device="here")
        assert seen[-1].detail == "1 matching device is busy"
        # What only looks is not kept waiting.
        status = next(device for device in fleet.devices("here") if device.info.name == "here")
        assert (status.state, status.running_job_id) == (DeviceState.BUSY, first.id)
        assert not got.is_set() and job.status().state is JobState.QUEUED
    assert got.wait(60)
    assert job.status().state is JobState.QUEUED
    done.set()
    thread.join(60)
    assert not thread.is_alive()
    np.testing.assert_array_equal(job.wait(60)["y"], X + 1)


def test_nobody_gets_a_device_that_is_not_there(fleet: Fleet, agent: AgentProcess) -> None:
    with pytest.raises(NoDeviceError, match="no connected device matches 'rack=z'"):
        fleet.session("rack=z")
    with pytest.raises(InputError, match="lease_s"):
        fleet.session("here", lease_s=0)
    with fleet.session("here"), pytest.raises(JobError) as caught:
        fleet.session("here", deadlines=Deadlines(queue_ms=100))
    assert caught.value.outcome == "timeout"


def test_a_session_can_be_cancelled(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    with fleet.session("here") as device:
        m = device.load(made)
        runners = at_work(agent.process.pid)
        assert runners
        fleet.job(device.id).cancel()
        with pytest.raises(JobError) as caught:
            while True:
                m["add"]({"x": X})
        assert caught.value.outcome == "cancelled"
    assert outcome(fleet, device.id) is OutcomeKind.CANCELLED
    wait_for(lambda: state_of(fleet) is DeviceState.IDLE, "the device to be free")
    assert not any(runs(pid) for pid in runners)


def test_a_session_is_its_users_alone(
    fleet: Fleet, agent: AgentProcess, access: Access, tracker: RunningTracker, made: Artifact
) -> None:
    tokens = {name: access.create_token(role, name)[1] for name, role in (("ann", "submit"), ("bob", "submit"))}
    users = {name: Fleet(tracker.address, Tls(join.ca, token=join.token)) for name, join in tokens.items()}
    ann, bob = users["ann"], users["bob"]
    with ann.session("here") as device:
        for other in (bob, fleet):  # an administrator is no exception
            with pytest.raises(UnknownJobError):
                SessionLink(other._channel, other.address, device.id, 10).wait()
        device.tensor(X)
        with pytest.raises(PermissionDeniedError, match="has a client already"):
            SessionLink(ann._channel, ann.address, device.id, 10).wait()
        # What others have sent cannot be loaded by its name.
        packed = plan.pack(made)
        bob._ensure_uploaded(packed)
        with pytest.raises(NotReadyError, match="blobs are missing"):
            device._link.grant(packed.blob)
        np.testing.assert_array_equal(device.load(made)["add"]({"x": X})["y"], X + 1)
        assert [job.id for job in bob.jobs()] == []
    job = bob.run(made, {"x": X}, function="add", device="here")
    job.wait(60)
    with pytest.raises(UnknownJobError):  # a job that is no session
        SessionLink(bob._channel, bob.address, job.id, 10).wait()
    for user in users.values():
        user.close()


def test_signers_are_asked_for_in_sessions_too(
    tracker: RunningTracker, access: Access, fleet: Fleet, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    stranger = "ab" * 32
    with started(tracker, access, runner, tmp_path / "strict", "strict", "--require-signer", stranger):
        with fleet.session("strict") as device, pytest.raises(JobError, match="sign"):
            device.load(made)
        assert outcome(fleet, device.id) is OutcomeKind.OK


# ---- What goes wrong -----------------------------------------------------------------------------------------------

CLIENT = """
import sys
from kedge.rpc.client import connect
from kedge.rpc.transport import parse_address

fleet = connect(parse_address(sys.argv[1]))
device = fleet.session(sys.argv[2], lease_s=float(sys.argv[3]))
print(device.id, flush=True)
try:
    for _ in sys.stdin:
        print(sorted(device.files()), flush=True)
except Exception as error:
    print(type(error).__name__, error.outcome, flush=True)
"""


class Client:
    """A process that holds a session and asks for its files whenever it is told to."""

    def __init__(self, tracker: RunningTracker, lease_s: float, name: str = "here") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(tracker.address), name, str(lease_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.session_id = self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_killed_client_frees_the_device(fleet: Fleet, agent: AgentProcess, tracker: RunningTracker) -> None:
    client = Client(tracker, lease_s=60)
    assert client.ask() == "[]"
    began = time.monotonic()
    client.end()
    assert outcome(fleet, client.session_id) is OutcomeKind.CANCELLED
    wait_for(lambda: state_of(fleet) is DeviceState.IDLE, "the device to be free")
    assert time.monotonic() - began < 45, "its end is noticed long before the lease is over"
    assert not at_work(agent.process.pid)


def test_a_stopped_client_loses_the_device_with_its_lease(
    fleet: Fleet, agent: AgentProcess, tracker: RunningTracker
) -> None:
    client = Client(tracker, lease_s=2)
    assert client.ask() == "[]"
    os.kill(client.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert outcome(fleet, client.session_id) is OutcomeKind.CANCELLED
    wait_for(lambda: state_of(fleet) is DeviceState.IDLE, "the device to be free")
    assert time.monotonic() - began > 1
    said = fleet.job(client.session_id).status().result
    assert said is not None and "nothing was heard of its client for 2 s" in said.outcome.message
    with fleet.session("here"):
        os.kill(client.process.pid, signal.SIGCONT)
        assert client.ask() == "JobError cancelled"
    client.end()


def test_a_client_that_lives_keeps_its_lease(fleet: Fleet, agent: AgentProcess, tracker: RunningTracker) -> None:
    """Three leases long nothing is asked, and the session is still there."""
    with fleet.session("here", lease_s=1.5) as device:  # busy machines may stand still for part of a second
        ended = device._link._over.wait(4.5)
        assert not ended and device.files() == {}


def test_a_killed_agent_is_a_lost_device(
    tracker: RunningTracker, access: Access, fleet: Fleet, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    with started(tracker, access, runner, tmp_path / "lost", "lost") as process:
        device = fleet.session("lost")
        m = device.load(made)
        m["add"]({"x": X})
        process.stop(signal.SIGKILL)
    with pytest.raises(JobError, match="was lost in the middle of the session") as caught:
        m["add"]({"x": X})
    assert caught.value.outcome == "device_lost"
    device.close()
    assert outcome(fleet, device.id) is OutcomeKind.DEVICE_LOST
    with (
        started(tracker, access, runner, tmp_path / "lost", "lost", joins=False),
        fleet.session("lost") as device,
    ):
        np.testing.assert_array_equal(device.load(made)["add"]({"x": X})["y"], X + 1)


def test_an_agent_that_stops_says_so(strict: RunningTracker, runner: Path, made: Artifact, tmp_path: Path) -> None:
    """In order, which is no fault of the device, whichever of its connections is heard first."""
    tls = credentials.find(strict.address).tls
    with Access(strict.address, tls) as access, Fleet(strict.address, tls) as fleet:
        with started(strict, access, runner, tmp_path / "leaves", "leaves") as process:
            device = fleet.session("leaves")
            m = device.load(made)
            process.stop(signal.SIGTERM)
            with pytest.raises(JobError, match="the agent stopped") as caught:
                m["add"]({"x": X})
        assert caught.value.outcome == "device_lost"
        device.close()
        assert outcome(fleet, device.id) is OutcomeKind.DEVICE_LOST
        assert not list((tmp_path / "leaves" / "jobs").iterdir())
        with started(strict, access, runner, tmp_path / "leaves", "leaves", joins=False):
            assert state_of(fleet, "leaves") is DeviceState.IDLE


def test_a_connection_that_is_cut_in_mid_stream(fleet: Fleet, agent: AgentProcess, tracker: RunningTracker) -> None:
    with Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy:
        tls = credentials.find(tracker.address).tls
        with Fleet(Address("127.0.0.1", proxy.port), tls) as through:
            device = through.session("here")
            trap = proxy.set(Trap("abort", "up", 5 << 20))
            with pytest.raises(ConnectError, match="is over, as its connection broke") as caught:
                device.tensor(LARGE)
            assert trap.sprung.is_set() and caught.value.hint is not None
            with pytest.raises(ConnectError):
                device.files()
            device.close()
    assert outcome(fleet, device.id) is OutcomeKind.CANCELLED
    wait_for(lambda: state_of(fleet) is DeviceState.IDLE, "the device to be free")


def test_a_client_that_is_cut_off_loses_the_device_with_its_lease(
    fleet: Fleet, agent: AgentProcess, tracker: RunningTracker
) -> None:
    """Nothing is carried any more, and no end of a connection is told either."""
    with Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy:
        tls = credentials.find(tracker.address).tls
        with Fleet(Address("127.0.0.1", proxy.port), tls) as through:
            device = through.session("here", lease_s=1)
            proxy.stall()
            assert outcome(fleet, device.id) is OutcomeKind.CANCELLED
            wait_for(lambda: state_of(fleet) is DeviceState.IDLE, "the device to be free")
            proxy.flow()
            device.close()


# ---- Whose fault it is ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTracker]:
    """A tracker that gives a device no more jobs after a single fault of its own."""
    folder = tmp_path_factory.mktemp("strict") / "tracker"
    with start(port=0, data_dir=folder, settings=Settings(quarantine_after=1)) as running:
        yield running


@pytest.fixture(scope="module")
def watched(strict: RunningTracker, runner: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tls = credentials.find(strict.address).tls
    folder = tmp_path_factory.mktemp("watched") / "agent"
    with (
        Access(strict.address, tls) as access,
        started(strict, access, runner, folder, "watched"),
        Fleet(strict.address, tls) as fleet,
    ):
        yield fleet


PUT = pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[8], streamed_bytes=8))
NONSENSE = {
    "no request": [b"\xff\xff\xff"],
    "a stray piece": [pb.SessionRequest(id=1, piece=b"x").SerializeToString()],
    "another request among the pieces": [
        pb.SessionRequest(id=1, put=PUT).SerializeToString(),
        pb.SessionRequest(id=2, list_files=pb.ListFiles()).SerializeToString(),
    ],
    "too many bytes": [
        pb.SessionRequest(id=1, put=PUT).SerializeToString(),
        pb.SessionRequest(id=1, piece=bytes(9)).SerializeToString(),
    ],
}


@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE)
def test_what_a_client_says_is_no_fault_of_the_device(watched: Fleet, said: list[bytes]) -> None:
    device = watched.session("watched")
    for data in said:
        device._link._frames.put(pb.ClientFrame(data=data))
    assert outcome(watched, device.id) is OutcomeKind.BAD_REQUEST
    wait_for(lambda: state_of(watched, "watched") is DeviceState.IDLE, "the device to be free")
    with pytest.raises(JobError) as caught:
        device.files()
    assert caught.value.outcome == "bad_request"
    device.close()


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (pb.SessionRequest(), "does not know"),
        (pb.SessionRequest(time=pb.TimeFunction(options=types_pb2.TimeOptions(repeat=700_000))), "artifact is not on"),
        (pb.SessionRequest(load=pb.LoadArtifact(num_threads=-1)), "threads is -1"),
        (pb.SessionRequest(load=pb.LoadArtifact(transfer_ms=2**63 - 1)), "the deadline of stage"),
        (pb.SessionRequest(put=pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[4], streamed_bytes=0))), "tensor ''"),
        (pb.SessionRequest(remove_file=pb.RemoveFile(name="x" * (4 << 20))), "not the name of a session's file"),
    ],
    ids=["unknown", "no artifact", "threads", "deadline", "no bytes", "a long name"],
)
def test_requests_that_are_refused(watched: Fleet, request_: pb.SessionRequest, why: str) -> None:
    with watched.session("watched") as device:
        with pytest.raises(JobError, match=why) as caught:
            device._link.ask(request_)
        assert caught.value.outcome == "bad_request"
        assert device.files() == {}
    assert outcome(watched, device.id) is OutcomeKind.OK


def test_more_samples_than_a_message_takes(watched: Fleet, made: Artifact) -> None:
    with watched.session("watched") as device:
        m, x = device.load(made), device.tensor(X)
        for profile, repeat in ((False, MAX_SAMPLES + 1), (True, MAX_PROFILE_SAMPLES + 1)):
            with pytest.raises(InputError, match="repeat"):  # before it is sent
                m._time({"x": X}, "add", TimeOptions(repeat=repeat, profile=profile))
            wanted = pb.TimeFunction(
                artifact=m._number,
                function="add",
                inputs=[pb.Value(name="x", handle=x._handle)],
                options=types_pb2.TimeOptions(number=1, repeat=repeat, profile=profile),
            )
            with pytest.raises(JobError, match="repeat"):
                device._link.ask(pb.SessionRequest(time=wanted))
        assert len(m.time({"x": X}, "add", repeat=10_000, min_repeat_ms=0).samples_ns) == 10_000
    assert state_of(watched, "watched") is DeviceState.IDLE


# ---- Calling off ---------------------------------------------------------------------------------------------------


def test_calling_off_what_is_being_sent(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    """The session, and what it has on the device, are there afterwards."""
    size = 64 << 20
    request = pb.SessionRequest(put=pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[size], streamed_bytes=size)))
    with fleet.session("here") as device:
        kept = device.tensor(X)
        sent = []

        def pieces() -> Iterator[bytes]:
            for _ in range(size >> 20):
                sent.append(1)
                device.call_off()
                yield bytes(1 << 20)

        with pytest.raises(JobError) as caught:
            device._link.ask(request, pieces())
        assert caught.value.outcome == "cancelled" and len(sent) == 1

        def broken() -> Iterator[bytes]:
            yield bytes(1 << 20)
            raise OSError("the file is gone")

        with pytest.raises(OSError, match="the file is gone"):
            device._link.ask(request, broken())
        np.testing.assert_array_equal(device.load(made)["add"]({"x": kept})["y"], X + 1)
    assert outcome(fleet, device.id) is OutcomeKind.OK


@pytest.mark.parametrize("when", ["before it is sent", "as it is sent"])
def test_calling_off_what_has_only_been_begun(
    fleet: Fleet, agent: AgentProcess, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The device hears of it after the request, or of neither: it would wait for the rest of the tensor else."""
    size = 4 << 20
    request = pb.SessionRequest(put=pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[size], streamed_bytes=size)))
    with fleet.session("here") as device:
        link, unwanted = device._link, threading.Event()
        with monkeypatch.context() as patch:
            if when == "before it is sent":
                patch.setattr(link, "check", lambda _event: device.call_off())
            else:
                put = link._put
                patch.setattr(link, "_put", lambda frame: (device.call_off(), patch.undo(), put(frame)))
            with pytest.raises(JobError) as caught:
                link.ask(request, iter([bytes(size)]), unwanted=unwanted)
        assert caught.value.outcome == "cancelled"
        np.testing.assert_array_equal(device.tensor(X).numpy(), X)
    assert outcome(fleet, device.id) is OutcomeKind.OK


def test_a_tensor_whose_free_was_called_off_is_freed_with_the_next_call(fleet: Fleet, agent: AgentProcess) -> None:
    with fleet.session("here") as device:
        link, unwanted = device._link, threading.Event()
        x = device.tensor(X)
        unwanted.set()
        with link.unless(unwanted), pytest.raises(JobError, match="called it off"):  # as a cancelled task of asyncio's
            x.free()
        request = pb.SessionRequest(list_files=pb.ListFiles())
        link.ask(request)
        assert list(request.freed) == [x._handle]
        fetched = pb.SessionRequest(fetch=pb.FetchTensor(handle=x._handle))
        with pytest.raises(JobError, match="it was freed"):
            link.ask(fetched)


def test_calling_off_a_load_while_it_is_sent_to_the_tracker(
    fleet: Fleet, agent: AgentProcess, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet.session("here") as device:
        send = device._send
        with monkeypatch.context() as patch:
            patch.setattr(device, "_send", lambda packed, again: (send(packed, again), device.call_off()))
            with pytest.raises(JobError) as caught:
                device.load(made)
        assert caught.value.outcome == "cancelled"
        np.testing.assert_array_equal(device.load(made)["add"]({"x": X})["y"], X + 1)


def test_sessions_that_wait_do_not_keep_the_one_that_has_the_device(
    fleet: Fleet, agent: AgentProcess, tracker: RunningTracker
) -> None:
    """However few threads the loop's executor has."""

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waits = asyncio.Event()

        async def second(fleet: aio.Fleet) -> None:
            async with fleet.session("here", progress=lambda job: waits.set()):
                pass

        async with await aio.connect(tracker.address) as fleet:
            async with fleet.session("here"):
                task = asyncio.create_task(second(fleet))
                await waits.wait()
            await task

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(bounded())


# ---- Waiting -------------------------------------------------------------------------------------------------------


def test_who_waits_may_lose_the_connection(fleet: Fleet, agent: AgentProcess) -> None:
    def attach(job_id: str) -> SessionLink:
        return SessionLink(fleet._channel, fleet.address, job_id, 10)

    with fleet.session("here"):
        spec = plan.session_request("here", Deadlines(), 0, 0, "", 10)
        job_id = fleet._stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=convert.job_spec_to_pb(spec))).job.id
        lost = attach(job_id)
        assert isinstance(lost._states.get(10), Job)
        lost.abort()
        half_open = attach(job_id)
        assert isinstance(half_open._states.get(10), Job)
        back = attach(job_id)
        with pytest.raises(PermissionDeniedError, match="came back on another connection"):
            half_open.wait()
        assert isinstance(back._states.get(10), Job)
        assert fleet.job(job_id).status().state is JobState.QUEUED
    assert back.wait().name == "here"
    back.close()
    assert outcome(fleet, job_id) is OutcomeKind.OK


def test_who_lost_the_connection_just_when_the_device_was_there_has_it_all_the_same(
    fleet: Fleet, agent: AgentProcess
) -> None:
    def attach(job_id: str) -> SessionLink:
        return SessionLink(fleet._channel, fleet.address, job_id, 30)

    spec = plan.session_request("here", Deadlines(), 0, 0, "", 30)
    job_id = fleet._stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=convert.job_spec_to_pb(spec))).job.id
    half_open = attach(job_id)
    assert half_open.wait().name == "here"  # as far as the tracker knows: what it was told may never have arrived
    back = attach(job_id)
    try:
        assert back.wait().name == "here"
        with pytest.raises(PermissionDeniedError, match="came back on another connection"):
            half_open.ask(pb.SessionRequest())
        with pytest.raises(NotReadyError):
            back.grant(Blob("0" * 64, 1))
        with pytest.raises(PermissionDeniedError, match="has a client already"):
            attach(job_id).wait()
    finally:
        back.close()
    assert outcome(fleet, job_id) is OutcomeKind.OK


def test_a_client_that_does_not_read_is_no_fault_of_the_device(watched: Fleet) -> None:
    spec = plan.session_request("watched", Deadlines(), 0, 0, "", 60)
    job_id = watched._stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=convert.job_spec_to_pb(spec))).job.id
    says: SimpleQueue[pb.ClientFrame | None] = SimpleQueue()
    call = cast(Any, sessions_pb2_grpc.SessionsStub)(watched._channel).Attach(iter(says.get, None))
    says.put(pb.ClientFrame(attach=pb.AttachSession(job_id=job_id)))
    while next(call).WhichOneof("body") != "ready":
        pass
    size = 32 << 20
    put = pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[size], streamed_bytes=size))
    wanted = [pb.SessionRequest(id=1, put=put)]
    wanted += [pb.SessionRequest(id=1, piece=bytes(1 << 20))] * 32
    wanted += [pb.SessionRequest(id=2, fetch=pb.FetchTensor(handle=1))]
    for request in wanted:
        says.put(pb.ClientFrame(data=request.SerializeToString()))
    says.put(pb.ClientFrame(data=b"\xff\xff"))
    try:
        assert outcome(watched, job_id) is OutcomeKind.BAD_REQUEST
        wait_for(lambda: state_of(watched, "watched") is DeviceState.IDLE, "the device to be free")
    finally:
        call.cancel()
        says.put(None)
