"""Interactive sessions: a real tracker, a real agent and its runner, over TLS."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import DeviceTensor, Fleet, connect
from kedge.rpc.client.access import Access
from kedge.rpc.errors import InputError, JobError
from kedge.rpc.outcome import OutcomeKind
from kedge.rpc.security import credentials
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.types import Deadlines, DeviceState, Job, JobState, SessionTask
from support.agents import AgentProcess, descendants, runs, wait_for
from support.handmade import artifact

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


def started(tracker: RunningTracker, access: Access, runner: Path, folder: Path, name: str) -> AgentProcess:
    environment = {**os.environ, "KEDGE_JOIN": str(access.enrol_token(name)[0])}
    process = AgentProcess(str(tracker.address), runner, folder, name=name, env=environment, secure=True)
    process.wait_ready()
    return process


def state_of(fleet: Fleet, name: str = "here") -> DeviceState:
    return next(device.state for device in fleet.devices(include_gone=True) if device.info.name == name)


def sessions(fleet: Fleet) -> list[Job]:
    return [job for job in fleet.jobs() if isinstance(job.spec.task, SessionTask)]


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


def test_a_runner_that_ends_between_two_requests(fleet: Fleet, agent: AgentProcess, made: Artifact) -> None:
    """The next request finds that out, be it while it lets go of tensors that nobody has any more."""
    with fleet.session("here") as device:
        m, kept = device.load(made), device.tensor(X)
        device.forget(kept._handle)
        (runner_pid,) = descendants(agent.process.pid)
        os.kill(runner_pid, signal.SIGKILL)
        wait_for(lambda: not runs(runner_pid), "the runner to end")
        with pytest.raises(JobError, match="its runner ended") as caught:
            m["add"]({"x": X})
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
        device.upload(tmp_path / "data.bin")
    with fleet.session("here") as device:
        assert device.files() == {}
    assert not list((agent.data_dir / "jobs").iterdir())
