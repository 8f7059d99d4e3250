"""kedge.local(): this machine as a device, each artifact in a runner of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kedge.artifact import Artifact
from kedge.isolated import LocalDevice
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
