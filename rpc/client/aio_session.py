"""The asyncio twin of `kedge.rpc.client.session`: the same session, its calls made in a thread of its own.

A session answers one call at a time, so one thread is what it needs. A call that is cancelled is called off on the
device, as Ctrl-C does for the synchronous one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kedge.rpc.client import session as sync
from kedge.rpc.client import threads
from kedge.rpc.client.inputs import Array
from kedge.rpc.client.plan import ArtifactOrPath, OnDevice, Packed
from kedge.rpc.client.profile import Profile
from kedge.rpc.client.session_link import SessionLink
from kedge.rpc.client.tensors import DeviceTensor as SyncTensor
from kedge.rpc.client.timing import Timing
from kedge.rpc.types import Deadlines, DeviceInfo

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attached:
    """A session's stream, and the device at its other end."""

    link: SessionLink
    info: DeviceInfo


class Session(OnDevice):
    """A device that is this client's alone; see the synchronous `Session`, whose errors these methods raise."""

    def __init__(
        self,
        attached: Attached,
        session_id: str,
        threads: int,
        deadlines: Deadlines,
        on: str,
        send: Callable[[Packed, bool], None],
        signing_key: bytes | None,
    ) -> None:
        #: What the agent says about the device.
        self.info = attached.info
        #: Its number among the tracker's jobs.
        self.id = session_id
        self._link = attached.link
        self._inner = sync.Session(attached.link, session_id, attached.info, threads, deadlines, on, send, signing_key)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kedge-session-calls")

    def __repr__(self) -> str:
        return repr(self._inner)

    async def close(self) -> None:
        """Give the device back, and wait until it is free. May be called again."""
        await threads.do(self._inner.close, "kedge-session-close")
        self._thread.shutdown(wait=False)

    async def load(self, artifact: ArtifactOrPath) -> SessionModel:
        """Load an artifact, or a `.kdg` file, beside those that are loaded already."""
        return SessionModel(self, await self._do(self._inner.load, artifact))

    async def tensor(self, value: Any) -> DeviceTensor:
        """Copy an array to the device, where it stays."""
        return DeviceTensor(self, await self._do(self._inner.tensor, value))

    async def upload(self, path: str | Path, name: str | None = None) -> None:
        """Copy a file into the session's folder."""
        await self._do(self._inner.upload, path, name)

    async def download(self, name: str, path: str | Path | None = None) -> Path:
        """Copy a file of the session's folder to here; returns where it is."""
        return await self._do(self._inner.download, name, path)

    async def files(self) -> dict[str, int]:
        """The files of the session's folder with their sizes in bytes."""
        return await self._do(self._inner.files)

    async def remove(self, name: str) -> None:
        """Remove a file of the session's folder."""
        await self._do(self._inner.remove, name)

    async def _do(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """One call, in its turn."""
        unwanted = threading.Event()

        def in_thread() -> T:
            with self._link.unless(unwanted):
                return call(*arguments, **named)

        work = self._thread.submit(in_thread)
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            unwanted.set()  # its inputs may still be packed, and nothing of it sent
            if work.running():
                self._inner.call_off()
            raise


class DeviceTensor:
    """A tensor on a session's device; its functions take it as an input. See the synchronous `DeviceTensor`."""

    def __init__(self, session: Session, inner: SyncTensor) -> None:
        self.dtype = inner.dtype
        self.shape = inner.shape
        self._session = session
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self._inner.nbytes

    async def numpy(self) -> Array:
        """A copy of its content, on this machine."""
        return await self._session._do(self._inner.numpy)

    async def free(self) -> None:
        """Free its memory on the device now. May be called again."""
        await self._session._do(self._inner.free)


class SessionModel:
    """An artifact that is loaded in a session; see the synchronous `SessionModel`."""

    def __init__(self, session: Session, inner: sync.SessionModel) -> None:
        #: Where the kernels run: "cpu", "opencl:0", "cuda:1".
        self.device = inner.device
        self._session = session
        self._inner = inner

    def __getitem__(self, function: str) -> Callable[..., Any]:
        """A function of the artifact, to be called with its inputs as `run` is, and awaited; raises ArtifactError."""
        self._inner[function]
        return lambda inputs, keep=False: self.run(inputs, function, keep=keep)

    async def run(self, inputs: Mapping[str, Any], function: str = "", *, keep: bool = False) -> dict[str, Any]:
        """Call a function once and return its outputs by name: arrays, or with `keep` tensors that stay there."""
        outputs = await self._session._do(self._inner.run, _unwrapped(inputs), function, keep=keep)
        return {
            name: DeviceTensor(self._session, value) if isinstance(value, SyncTensor) else value
            for name, value in outputs.items()
        }

    async def time(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Timing:
        """Time a function natively, in the session's runner."""
        return await self._session._do(self._inner.time, _unwrapped(inputs), function, **options)

    async def profile(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Profile:
        """Time every kernel of a function."""
        return await self._session._do(self._inner.profile, _unwrapped(inputs), function, **options)

    async def close(self) -> None:
        """Unload it; tensors that it computed stay."""
        await self._session._do(self._inner.close)


def _unwrapped(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value._inner if isinstance(value, DeviceTensor) else value for name, value in inputs.items()}
