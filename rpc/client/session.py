"""A device of one's own for a while: artifacts, tensors and files that stay there between calls.

with fleet.session("key=rpi4") as device:
    m = device.load(artifact)
    state = device.tensor(np.zeros((1, 64), np.float32))
    for token in tokens:
        out = m.run({"token": token, "state": state}, keep=True)   # both outputs stay on the device
        state = out["state"]
    print(out["logits"].numpy())
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc import convert
from kedge.rpc.client import plan
from kedge.rpc.client.inputs import Array, arrange_given, dense, shaped
from kedge.rpc.client.plan import ArtifactOrPath, OnDevice, Packed
from kedge.rpc.client.profile import Profile, profile_of, profile_options
from kedge.rpc.client.session_link import SessionLink, pieces_of
from kedge.rpc.client.tensors import DeviceTensor
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import InputError
from kedge.rpc.limits import check_time_options
from kedge.rpc.status import NotReadyError
from kedge.rpc.transport import CHUNK_BYTES
from kedge.rpc.types import Deadlines, DeviceInfo, plan_inline


class Session(OnDevice):
    """A device that is this client's alone until `close`; a context manager.

    Safe from several threads, which take turns. It ends on its own with the device, with the connection to the tracker,
    and when this process is stopped or cut off for longer than the lease. Everything on the device ends with it.
    """

    def __init__(
        self,
        link: SessionLink,
        session_id: str,
        info: DeviceInfo,
        threads: int,
        deadlines: Deadlines,
        on: str,
        send: Callable[[Packed, bool], None],
        signing_key: bytes | None,
    ) -> None:
        #: Its number among the tracker's jobs.
        self.id = session_id
        #: What the agent says about the device.
        self.info = info
        self._link = link
        self._threads = threads
        self._deadlines = deadlines
        self._on = on
        self._send = send
        self._signing_key = signing_key
        self._finalizer = weakref.finalize(self, SessionLink.abort, link)

    def __repr__(self) -> str:
        return f"<Session {self.id} on {self.info.name}{'' if self._link.alive else ', over'}>"

    def __str__(self) -> str:
        return f"session {self.id} on {self.info.name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the device back, and wait until it is free (12 s at most). May be called again."""
        if self._finalizer.detach() is not None:
            self._link.close()

    # ---- Artifacts ----

    def load(self, artifact: ArtifactOrPath) -> SessionModel:
        """Load an artifact, or a `.kdg` file, beside those that are loaded already; its parts are sent once per device.

        Raises:
            IncompatibleTargetError: the device cannot run it.
            JobError: loading it failed; the outcome is "load_error", "crash", "timeout", "out_of_memory", …
            ConnectError: the connection broke, and the session with it.
        """
        packed = plan.pack(artifact)
        plan.check_device(packed, self.info, self._on)
        with self._link.larger() as unwanted:
            return self._load(packed, unwanted)

    def _load(self, packed: Packed, unwanted: threading.Event) -> SessionModel:
        self._send(packed, False)
        self._link.check(unwanted)
        try:
            self._link.grant(packed.blob)
        except NotReadyError:  # the tracker has dropped some of it meanwhile
            self._send(packed, True)
            self._link.grant(packed.blob)
        wanted = pb.LoadArtifact(
            manifest=convert.blob_to_pb(packed.blob),
            on=self._on,
            num_threads=self._threads,
            transfer_ms=self._deadlines.transfer_ms,
            load_ms=self._deadlines.load_ms,
        )
        signature = plan.signature_of(packed, self._signing_key)
        if signature is not None:
            wanted.signature.public_key, wanted.signature.signature = signature.public_key, signature.signature
        try:
            loaded = self._link.ask(pb.SessionRequest(load=wanted), unwanted=unwanted).loaded
        finally:
            self._link.withdraw(packed.blob)  # the device has all of it, or will not have it
        return SessionModel(self, packed, loaded.artifact, loaded.device)

    # ---- Tensors ----

    def tensor(self, value: Any) -> DeviceTensor:
        """Copy an array (numpy, torch, anything with DLPack) to the device, where it stays.

        Raises InputError, JobError, ConnectError.
        """
        array = dense(value)
        described, buffers = _values([("", array.dtype.name, array)], self)
        put = pb.PutTensor(tensor=described[0])
        reply = self._link.ask(pb.SessionRequest(put=put), pieces_of(buffers))
        return self._kept(reply.tensor)

    def fetch(self, tensor: DeviceTensor) -> Array:
        """See `DeviceTensor.numpy`."""
        taken = _Arrays()
        request = pb.SessionRequest(fetch=pb.FetchTensor(handle=tensor.handle_in(self)))
        reply = self._link.ask(request, (), lambda reply: taken.expect([reply.tensor]), taken.take)
        return taken.arrays([reply.tensor])[0]

    def free(self, tensor: DeviceTensor) -> None:
        """See `DeviceTensor.free`; when the session is over, there is nothing left to be freed."""
        if self._link.alive:
            try:
                self._link.ask(pb.SessionRequest(free=pb.FreeTensors(handles=[tensor._handle])))
            except BaseException:
                self.forget(tensor._handle)  # called off: the device may not have heard of it
                raise

    def forget(self, handle: int) -> None:
        """For the garbage collector: free a tensor with the next request."""
        self._link.forget(handle)

    def _kept(self, value: pb.Value) -> DeviceTensor:
        return DeviceTensor(self, value.handle, value.dtype, tuple(value.shape))

    # ---- Files ----

    def upload(self, path: str | Path, name: str | None = None) -> None:
        """Copy a file into the session's folder, which is the working directory of what artifacts run.

        Args:
            path: of the file here.
            name: there, by default as here: letters, digits, dots, dashes, underscores. What had the name is replaced.

        Raises:
            InputError: the file cannot be opened, or no session's file can have this name.
            JobError: the device has no room for it.
            OSError: reading it breaks off.
        """
        source = Path(path)
        with _opened(source) as file:
            size = file.seek(0, 2)
            file.seek(0)
            wanted = pb.PutFile(file=pb.SessionFile(name=name or source.name, size_bytes=size))
            self._link.ask(pb.SessionRequest(put_file=wanted), _file_pieces(file, size))

    def download(self, name: str, path: str | Path | None = None) -> Path:
        """Copy a file of the session's folder to `path`, by default to its name in this directory; returns where it is.

        The file is there whole or not at all. Raises JobError where there is none of that name, OSError.
        """
        target = Path(path) if path is not None else Path(name)
        target = target / name if target.is_dir() else target
        wanted = pb.SessionRequest(fetch_file=pb.FetchFile(name=name))
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            write: Any = file.write
            try:
                self._link.ask(wanted, (), lambda reply: reply.files.files[0].size_bytes, write)
                file.flush()
                Path(file.name).replace(target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        return target

    def files(self) -> dict[str, int]:
        """The files of the session's folder with their sizes in bytes, those that artifacts wrote among them."""
        reply = self._link.ask(pb.SessionRequest(list_files=pb.ListFiles()))
        return {file.name: file.size_bytes for file in reply.files.files}

    def remove(self, name: str) -> None:
        """Remove a file of the session's folder; raises JobError where there is none of that name."""
        self._link.ask(pb.SessionRequest(remove_file=pb.RemoveFile(name=name)))

    def call_off(self) -> None:
        """Stop the call that another thread has in flight: it raises JobError with the outcome "cancelled"."""
        self._link.call_off()


class SessionModel:
    """An artifact in a session. A crash of its code is a JobError, and ends its runner, not the session."""

    def __init__(self, session: Session, packed: Packed, number: int, device: str) -> None:
        #: Where the kernels run: "cpu", "opencl:0", "cuda:1".
        self.device = device
        self._session = session
        self._packed = packed
        self._number = number

    def __getitem__(self, function: str) -> Callable[..., Mapping[str, Any]]:
        """A function of the artifact, to be called with its inputs as `run` is; raises ArtifactError."""
        self._packed.manifest.function(function)
        return lambda inputs, keep=False: self.run(inputs, function=function, keep=keep)

    def run(self, inputs: Mapping[str, Any], function: str = "", *, keep: bool = False) -> dict[str, Any]:
        """Call a function once and return its outputs by name.

        Args:
            inputs: arrays by name, tensors that are on the device already (`Session.tensor`, `keep`) among them.
            function: of the artifact; "" is its only one, or "main".
            keep: leave the outputs on the device: they are returned as `DeviceTensor`s, to be inputs of later calls.

        Raises:
            InputError: naming the input, what was expected and what was given.
            JobError: the outcome is "crash", "timeout", "out_of_memory", "cancelled", …
            ConnectError: the connection broke, and the session with it.
        """
        declared = self._packed.manifest.function(function)
        values, buffers = self._inputs(function, inputs)
        wanted = pb.CallFunction(
            artifact=self._number,
            function=declared.name,
            inputs=values,
            keep=keep,
            run_ms=self._session._deadlines.run_ms,
        )
        taken = _Arrays()
        reply = self._session._link.ask(
            pb.SessionRequest(call=wanted),
            pieces_of(buffers),
            lambda reply: taken.expect(reply.called.outputs),
            taken.take,
        )
        outputs = reply.called.outputs
        if keep:
            return {value.name: self._session._kept(value) for value in outputs}
        return dict(zip((value.name for value in outputs), taken.arrays(outputs), strict=True))

    def time(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Timing:
        """Time a function natively, in the session's runner; `options` and errors as of `kedge.local()`'s `time`."""
        return self._time(inputs, function, plan.time_options(**options))

    def profile(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Profile:
        """Time every kernel of a function; `options` as for `time`, with min_repeat_ms=10.

        Raises InputError, JobError, ConnectError; ArtifactError where the artifact does not say what its kernels are.
        """
        timing = self._time(inputs, function, profile_options(**options))
        return profile_of(self._packed.manifest, function, shaped(inputs), timing)

    def close(self) -> None:
        """Unload it; tensors that it computed stay. May be called again."""
        if self._session._link.alive:
            self._session._link.ask(pb.SessionRequest(unload=pb.UnloadArtifact(artifact=self._number)))

    def _time(self, inputs: Mapping[str, Any], function: str, options: Any) -> Timing:
        check_time_options(options)
        declared = self._packed.manifest.function(function)
        values, buffers = self._inputs(function, inputs)
        wanted = pb.TimeFunction(
            artifact=self._number,
            function=declared.name,
            inputs=values,
            options=convert.time_options_to_pb(options),
            run_ms=self._session._deadlines.run_ms,
        )
        reply = self._session._link.ask(pb.SessionRequest(time=wanted), pieces_of(buffers))
        return Timing(convert.measurement_from_pb(reply.measured))

    def _inputs(self, function: str, inputs: Mapping[str, Any]) -> tuple[list[pb.Value], list[memoryview]]:
        declared = self._packed.manifest.function(function)
        given = arrange_given(declared, inputs)
        named = [(port.name, port.dtype, each) for port, each in zip(declared.inputs, given, strict=True)]
        return _values(named, self._session)


def _values(
    named: Sequence[tuple[str, str, Array | DeviceTensor]], home: Session
) -> tuple[list[pb.Value], list[memoryview]]:
    """Tensors, by name and dtype, as they travel, and the bytes of the large ones, which follow their message."""
    arrays = [each for _, _, each in named if not isinstance(each, DeviceTensor)]
    inline = iter(plan_inline(array.nbytes for array in arrays))
    values, buffers = [], []
    for name, dtype, each in named:
        value = pb.Value(name=name, dtype=dtype, shape=each.shape)
        if isinstance(each, DeviceTensor):
            value.handle = each.handle_in(home)
        elif next(inline):
            value.inline = each.tobytes()
        else:
            value.streamed_bytes = each.nbytes
            buffers.append(each.reshape(-1).view(np.uint8).data)
        values.append(value)
    return values, buffers


class _Arrays:
    """Takes the bytes that follow a reply."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0

    def expect(self, values: Any) -> int:
        """How many come, for these values; room is made for them."""
        self._data = bytearray(sum(value.streamed_bytes for value in values))
        return len(self._data)

    def take(self, piece: bytes) -> None:
        """The next ones."""
        self._data[self._at : self._at + len(piece)] = piece
        self._at += len(piece)

    def arrays(self, values: Any) -> list[Array]:
        """The values as arrays, each writable."""
        found, at = [], 0
        whole = memoryview(self._data)
        for value in values:
            data: bytearray | memoryview
            if value.WhichOneof("data") == "streamed_bytes":
                data, at = whole[at : at + value.streamed_bytes], at + value.streamed_bytes
            else:
                data = bytearray(value.inline)
            found.append(np.frombuffer(data, np.dtype(value.dtype)).reshape(tuple(value.shape)))
        return found


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", hint="name a file of this machine") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name a file that this user may read") from error


def _file_pieces(file: BinaryIO, size: int) -> Any:
    """A file in chunks; one that shrinks meanwhile cannot be sent."""
    left = size
    while left:
        piece = file.read(min(left, CHUNK_BYTES))
        if not piece:
            raise InputError("the file shrank while it was sent", hint="send it again once it is whole")
        left -= len(piece)
        yield piece
