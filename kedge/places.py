"""Where artifacts are compared: every timing in a runner of its own, and what is known of the noise there."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from kedge.device_agent.health import read_health
from kedge.isolated import LocalDevice
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import PinnedDevice
from kedge.rpc.errors import KedgeError
from kedge.rpc.noise import Conditions, Noise, floor_for
from kedge.rpc.protocol import local_protocol
from kedge.rpc.types import NoiseFloor, NoiseSample

#: The only device of a machine's own file, and its only user.
_HERE = "here"


class Place(Protocol):
    """A device as `kedge.comparison` needs it."""

    @property
    def name(self) -> str:
        """How people call it."""

    def loaded(self, artifact: Artifact) -> AbstractContextManager[Any]:
        """The artifact, to be timed once, in a runner that nothing ran in before."""

    def noise(self, num_threads: int, on: str) -> NoiseFloor | None:
        """How far times of equal code were apart there; None where nobody has compared."""

    def keep_noise(self, relative: float, num_threads: int, on: str) -> None:
        """Remember that for later comparisons; raises KedgeError."""


class OnDevice:
    """A device of a fleet, whose tracker remembers its noise for all users. Every timing is a job."""

    def __init__(self, device: PinnedDevice) -> None:
        self._device = device

    @property
    def name(self) -> str:
        """The device's name."""
        return self._device.name

    @contextmanager
    def loaded(self, artifact: Artifact) -> Iterator[Any]:
        """The artifact there; raises as `PinnedDevice.load`."""
        yield self._device.load(artifact)

    def noise(self, num_threads: int, on: str) -> NoiseFloor | None:
        """What the tracker says of it; raises ConnectError."""
        found = self._device.fleet.devices(self.name)
        return floor_for(found[0].noise, num_threads, on) if found else None

    def keep_noise(self, relative: float, num_threads: int, on: str) -> None:
        """Tell the tracker; raises ConnectError, and PermissionDeniedError to those who may not submit jobs."""
        self._device.fleet.keep_noise(self.name, relative, num_threads=num_threads, on=on)


class ThisMachine:
    """This machine, which no tracker knows: its noise is remembered in the file `path`.

    `on` is as for `kedge.local(device=…)`.
    """

    name = _HERE

    def __init__(self, path: Path, threads: int = 1, on: str = "") -> None:
        self._path, self._threads, self._on = path, threads, on

    @contextmanager
    def loaded(self, artifact: Artifact) -> Iterator[Any]:
        """The artifact in a new runner; raises as `kedge.local()` and its `load`."""
        with LocalDevice(threads=self._threads, device=self._on) as device:
            yield device.load(artifact)

    def noise(self, num_threads: int, on: str) -> NoiseFloor | None:
        """What the file says; raises KedgeError where it is not what `keep_noise` writes."""
        return floor_for(self._read().floors(_HERE, _conditions(), _now_ms()), num_threads, on)

    def keep_noise(self, relative: float, num_threads: int, on: str) -> None:
        """Write the file anew, whole or not at all; raises KedgeError where it cannot be written."""
        kept, number = self._read(), secrets.token_hex(16)
        kept.keep(NoiseSample(number, _HERE, _HERE, relative, num_threads, on, *_conditions(), _now_ms()))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump([asdict(sample) for sample in kept.of(_HERE)], file)
            Path(file.name).replace(self._path)
        except OSError as error:
            raise KedgeError(f"cannot keep the noise of this machine in {self._path}: {error.strerror}") from error

    def _read(self) -> Noise:
        try:
            return Noise(NoiseSample(**sample) for sample in json.loads(self._path.read_text()))
        except FileNotFoundError:
            return Noise()
        except (OSError, ValueError, TypeError) as error:
            raise KedgeError(
                f"cannot read the noise of this machine in {self._path}: {error}", hint="remove that file"
            ) from error


def _conditions() -> Conditions:
    from kedge.compiler.target import parse

    governor = read_health(Path(tempfile.gettempdir())).governor
    return Conditions(str(parse("native")), local_protocol().software, governor)


def _now_ms() -> int:
    return round(time.time() * 1000)
