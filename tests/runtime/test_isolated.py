"""kedge.local(): this machine as a device, with all artifacts in one runner."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kedge.artifact import Artifact
from kedge.isolated import LocalDevice
from kedge.rpc.client import DeviceTensor
from kedge.rpc.errors import ArtifactError, InputError, JobError

from .conftest import ARITHMETIC, artifact_of

pytestmark = pytest.mark.usefixtures("nothing_left")
X = np.ones((2, 8), np.float32)


@pytest.fixture
def device() -> Iterator[LocalDevice]:
    with LocalDevice(threads=1) as opened:
        yield opened


def test_run(device: LocalDevice, arithmetic_artifact: Artifact) -> None:
    model = device.load(arithmetic_artifact)
    result = model.run({"x": X})["y"]
    np.testing.assert_array_equal(result, [[56, 64, 56, 64]] * 2)
    result[:] = 0  # writable, and DLPack
    np.testing.assert_array_equal(np.from_dlpack(result), result)
    joined = model.run({"a": np.zeros(0, np.float32), "b": np.zeros((2, 0), np.float32)}, function="join")
    assert joined["c"].shape == (2, 0)


def test_large_arrays(device: LocalDevice, arithmetic_artifact: Artifact) -> None:
    result = device.load(arithmetic_artifact).run({"x": np.ones((1 << 16, 8), np.float32)})["y"]
    result += 1
    np.testing.assert_array_equal(result, np.tile(np.float32([57, 65, 57, 65]), (1 << 16, 1)))


def test_time(device: LocalDevice, arithmetic_artifact: Artifact) -> None:
    timing = device.load(arithmetic_artifact).time({"x": X}, repeat=6, min_repeat_ms=0.1)
    assert timing.repeat == 6
    assert timing.measurement.before is not None
    assert timing.measurement.num_threads == 1
    assert timing.protocol.min_repeat_ns == 100_000
    pinning = timing.measurement.pinning
    assert pinning is not None and pinning.cpus == tuple(sorted(os.sched_getaffinity(0))) and not pinning.reserved


def test_mistakes(device: LocalDevice, arithmetic_artifact: Artifact) -> None:
    model = device.load(arithmetic_artifact)
    with pytest.raises(InputError, match="did you mean 'x'"):
        model.run({"xx": X})
    with pytest.raises(InputError, match="which is 4 in dim 1"):
        model.run({"a": np.zeros(2, np.float32), "b": np.zeros((1, 3), np.float32)}, function="join")
    with pytest.raises(ArtifactError, match="has no function 'other'"):
        model.run({"x": X}, function="other")
    with pytest.raises(JobError) as caught:
        model.run({"a": np.zeros(3, np.float32)}, function="huge")
    assert caught.value.outcome == "out_of_memory"


def test_outcomes(device: LocalDevice, misbehaving_artifact: Artifact) -> None:
    for function, timeout_s, outcome in (("segfault", 30, "crash"), ("forever", 0.1, "timeout")):
        model = device.load(misbehaving_artifact)
        with pytest.raises(JobError) as caught:
            model.run({}, function=function, timeout_s=timeout_s)
        assert caught.value.outcome == outcome
        with pytest.raises(JobError, match="new runner"):
            model.run({}, function=function)


def test_cancel(device: LocalDevice, misbehaving_artifact: Artifact) -> None:
    model = device.load(misbehaving_artifact)
    outcomes: list[str] = []

    def call() -> None:
        try:
            model.run({}, function="slow")
        except JobError as error:
            outcomes.append(error.outcome)

    thread = threading.Thread(target=call)
    thread.start()
    while thread.is_alive():
        model.cancel()
        thread.join(0.001)
    assert outcomes == ["cancelled"]


def test_a_broken_artifact(device: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ArtifactError, match="cannot load"):
        device.load(artifact_of(b"not ELF", ARITHMETIC))
    assert list(tmp_path.iterdir()) == []


# ---- What stays ----------------------------------------------------------------------------------------------------


def test_tensors_stay_and_are_shared(device: LocalDevice, arithmetic_artifact: Artifact) -> None:
    m, n = device.load(arithmetic_artifact), device.load(arithmetic_artifact)
    x = device.tensor(X)
    assert (x.dtype, x.shape, x.nbytes) == (np.float32, X.shape, X.nbytes)
    wanted = m.run({"x": X})["y"]
    kept = m.run({"x": x}, keep=True)["y"]
    assert isinstance(kept, DeviceTensor) and kept.shape == wanted.shape
    np.testing.assert_array_equal(kept.numpy(), wanted)
    np.testing.assert_array_equal(n["main"]({"x": x})["y"], wanted)
    assert len(n.time({"x": x}, repeat=3).samples_ns) == 3
    m.close()
    m.close()
    np.testing.assert_array_equal(kept.numpy(), wanted)
    np.testing.assert_array_equal(n.run({"x": x})["y"], wanted)
    with pytest.raises(JobError, match="was unloaded"):
        m.run({"x": X})


def test_tensors_that_nobody_has_are_freed(device: LocalDevice, arithmetic_artifact: Artifact) -> None:
    m = device.load(arithmetic_artifact)
    x = device.tensor(X)
    for _ in range(5):
        m.run({"x": x}, keep=True)
    m.run({"x": x})
    assert len(device._tensors) == 1
    x.free()
    x.free()
    assert device._tensors == {}
    with pytest.raises(InputError, match="was freed"):
        m.run({"x": x})
    with LocalDevice(threads=1) as other, pytest.raises(InputError, match="is on this machine, not on this machine"):
        other.load(arithmetic_artifact).run({"x": device.tensor(X)})


def test_a_crash_takes_what_was_in_its_runner(
    device: LocalDevice, misbehaving_artifact: Artifact, arithmetic_artifact: Artifact
) -> None:
    m, kept = device.load(arithmetic_artifact), device.tensor(X)
    with pytest.raises(JobError) as caught:
        device.load(misbehaving_artifact).run({}, function="segfault")
    assert caught.value.outcome == "crash"
    with pytest.raises(JobError, match="its runner ended"):
        kept.numpy()
    with pytest.raises(JobError, match="runner of this artifact has ended") as caught:
        m.run({"x": X})
    assert caught.value.hint == "load the artifact again for a new runner"
    del kept, caught
    again = device.load(arithmetic_artifact).run({"x": device.tensor(X)})["y"]
    np.testing.assert_array_equal(again, [[56, 64, 56, 64]] * 2)
