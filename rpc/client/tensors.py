"""Tensors that stay on a device between calls, on this machine or elsewhere."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from kedge.rpc.errors import InputError


class Home(Protocol):
    """Where tensors stay."""

    def fetch(self, tensor: DeviceTensor) -> np.ndarray[Any, Any]:
        """A copy of its content."""

    def free(self, tensor: DeviceTensor) -> None:
        """Free it now."""

    def forget(self, handle: int) -> None:
        """Free it some time; called by the garbage collector, from any thread, so nothing may be waited for."""


class DeviceTensor:
    """A tensor on a device. Functions that run there take it as an input, without sending it.

    It lasts until `free`, until nothing refers to it any more, or until its session or runner ends. Its content never
    changes.
    """

    def __init__(self, home: Home, handle: int, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.shape = shape
        self._home = home
        self._handle = handle
        self._freed = False

    def __repr__(self) -> str:
        where = "freed" if self._freed else f"on {self._home}"
        return f"<DeviceTensor {self.dtype.name}{list(self.shape)} {where}>"

    @property
    def ndim(self) -> int:
        """How many dims it has."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy of its content, on this machine; raises InputError once it was freed, JobError, ConnectError."""
        self.handle_in(self._home)
        return self._home.fetch(self)

    def free(self) -> None:
        """Free its memory on the device now. May be called again."""
        if not self._freed:
            self._freed = True
            self._home.free(self)

    def handle_in(self, home: Home) -> int:
        """Its number there; raises InputError for one that was freed, or is elsewhere."""
        if self._freed:
            raise InputError(f"this tensor ({self.dtype.name}{list(self.shape)}) was freed", hint="make a new one")
        if self._home is not home:
            raise InputError(
                f"this tensor is on {self._home}, not on {home}", hint="fetch it with .numpy(), and send it there"
            )
        return self._handle

    def __del__(self) -> None:
        if not getattr(self, "_freed", True):
            self._freed = True
            self._home.forget(self._handle)
