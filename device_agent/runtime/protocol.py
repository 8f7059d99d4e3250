"""The runner's wire format, as pure functions: frames, tensors, and the payload of each message.

The same layout is read and written by `frame.c` and `runner.c`; docs/decisions/0002-runner-protocol.md describes
it. Everything is little-endian. Nothing here does input or output.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple, Union

from kedge.rpc import abi
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact.place import Found
from kedge.rpc.types import StepSamples, TimeOptions

PROTOCOL_VERSION = 5
MAGIC = 0x4647444B  # "KDGF"

# Message types.
HELLO = 1
OPEN = 2
CALL = 3
TIME = 4
CANCEL = 5
ERROR = 6
RESULT = 7
BYE = 8
DEVICES = 9
KEEP = 10
FETCH = 11
RELEASE = 12
CLOSE = 13
FILL = 14

#: Flag of a frame: the data of its tensors lies in the file whose descriptor comes with it.
FLAG_SHARED = 1

#: Options of a call.
CALL_DISCARD_OUTPUTS = 1
CALL_SHARED_OUTPUTS = 2
CALL_KEEP_OUTPUTS = 4

HEADER = struct.Struct("<IHHQQ")
_TENSOR = struct.Struct("<BBHIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SIZES = struct.Struct("<4Q")

Buffer = Union[bytes, bytearray, memoryview]


class ProtocolError(Exception):
    """Bytes that are not what the protocol says."""


@dataclass(frozen=True)
class Header:
    """The start of every frame."""

    type: int
    flags: int
    request: int
    length: int

    def pack(self) -> bytes:
        """Its 24 bytes."""
        return HEADER.pack(MAGIC, self.type, self.flags, self.request, self.length)

    @staticmethod
    def unpack(data: Buffer) -> Header:
        """Read 24 bytes; raises ProtocolError when they do not start a frame."""
        magic, kind, flags, request, length = HEADER.unpack(data)
        if magic != MAGIC:
            raise ProtocolError(f"a frame starts with {magic:#010x} instead of {MAGIC:#010x}")
        return Header(kind, flags, request, length)


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """How many bytes a dense tensor has; raises ValueError where none has this shape, KeyError for an unknown dtype."""
    size = abi.dtype_size(dtype)
    for dim in shape:
        size *= dim
    if len(shape) > abi.MAX_NDIM or any(dim < 0 for dim in shape):
        raise ValueError(f"{list(shape)} is not the shape of a tensor (at most {abi.MAX_NDIM} dims)")
    return size


@dataclass(frozen=True)
class Tensor:
    """A dense row-major array: numpy's name of its dtype, its shape, its bytes (little-endian).

    Raises ValueError when the bytes do not fit the shape.
    """

    dtype: str
    shape: Tuple[int, ...]
    data: Buffer

    def __post_init__(self) -> None:
        expected = bytes_of(self.dtype, self.shape)
        if memoryview(self.data).nbytes != expected:
            held = memoryview(self.data).nbytes
            raise ValueError(f"{self.dtype}{list(self.shape)} takes {expected} bytes, but {held} were given")

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return memoryview(self.data).nbytes


@dataclass(frozen=True)
class Kept:
    """A tensor that stays in its runner, by its handle there."""

    handle: int
    dtype: str
    shape: Tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return bytes_of(self.dtype, self.shape)


#: What a function can be given: a tensor's content, or one that the runner has.
Given = Union[Tensor, Kept]


@dataclass(frozen=True)
class Hello:
    """What a runner says first."""

    protocol: int
    abi_version: int
    pid: int
    page_size: int
    num_cpus: int
    shared_memory: bool
    features: Tuple[str, ...]
    machine: str


@dataclass(frozen=True)
class PortInfo:
    """An input or output of a loaded function."""

    name: str
    dtype: str
    ndim: int


@dataclass(frozen=True)
class FunctionInfo:
    """A function of a loaded module."""

    name: str
    inputs: Tuple[PortInfo, ...]
    outputs: Tuple[PortInfo, ...]


@dataclass(frozen=True)
class ModuleInfo:
    """What a runner found in a lib.so."""

    target: str
    features: Tuple[str, ...]
    functions: Tuple[FunctionInfo, ...]
    #: Names it in later requests.
    module: int = 0


@dataclass(frozen=True)
class TimeResult:
    """What timing gave: nanoseconds of one call per sample, each averaged over `number` calls."""

    samples_ns: Tuple[float, ...]
    number: int
    resolution_ns: int
    profile: Optional[StepSamples] = None


class Cursor:
    """Reads a payload piece by piece; running off its end is a ProtocolError."""

    def __init__(self, data: Buffer) -> None:
        self.data = memoryview(data)
        self.at = 0

    def at_end(self) -> bool:
        """Whether everything has been read."""
        return self.at == len(self.data)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        end = self.at + size
        if size < 0 or end > len(self.data):
            raise ProtocolError(f"a frame ends {end - len(self.data)} bytes too early")
        piece, self.at = self.data[self.at : end], end
        return piece

    def unpack(self, layout: struct.Struct) -> Tuple[int, ...]:
        """The next values by a struct layout."""
        return layout.unpack(self.take(layout.size))

    def u32(self) -> int:
        """The next 32-bit number."""
        return self.unpack(_U32)[0]

    def text(self) -> str:
        """The next length-prefixed string."""
        return bytes(self.take(self.u32())).decode("utf-8", "replace")


def pack_text(text: str) -> bytes:
    """A length-prefixed string."""
    data = text.encode("utf-8", "surrogateescape")
    return _U32.pack(len(data)) + data


def align(offset: int) -> int:
    """The next multiple of the ABI's alignment."""
    return (offset + abi.ALIGNMENT - 1) // abi.ALIGNMENT * abi.ALIGNMENT


def pack_tensors(tensors: Sequence[Tensor]) -> Tuple[bytes, List[int], int]:
    """The descriptors of `tensors`, the offset of each in the data section, and the section's size."""
    head, offsets, end = [_U32.pack(len(tensors))], [], 0
    for tensor in tensors:
        start = align(end)
        code, bits = abi.dtype_code(tensor.dtype)
        head.append(_TENSOR.pack(code, bits, 1, len(tensor.shape), start, tensor.nbytes))
        head.append(struct.pack(f"<{len(tensor.shape)}q", *tensor.shape))
        offsets.append(start)
        end = start + tensor.nbytes
    return b"".join(head), offsets, end


def unpack_tensors(cursor: Cursor, section: Union[memoryview, None]) -> List[Tensor]:
    """Read descriptors, then cut their data out of `section`, or out of the frame itself where that is None."""
    entries = []
    for _ in range(cursor.u32()):
        code, bits, lanes, ndim, offset, nbytes = cursor.unpack(_TENSOR)
        if ndim > abi.MAX_NDIM:
            raise ProtocolError(f"a tensor has {ndim} dims")
        shape = struct.unpack(f"<{ndim}q", cursor.take(8 * ndim))
        try:
            entries.append((abi.dtype_name(code, bits, lanes), shape, offset, nbytes))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
    data = cursor.data[align(cursor.at) :] if section is None else section
    tensors = []
    for dtype, shape, offset, nbytes in entries:
        if offset + nbytes > len(data):
            raise ProtocolError(f"a tensor's data ends at {offset + nbytes}, its section at {len(data)}")
        try:
            tensors.append(Tensor(dtype, shape, data[offset : offset + nbytes]))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
    return tensors


def unpack_hello(payload: Buffer) -> Hello:
    """Read the payload of a hello; raises ProtocolError for another protocol version."""
    cursor = Cursor(payload)
    version = cursor.u32()
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the runner speaks protocol {version}, this kedge speaks {PROTOCOL_VERSION}")
    abi_version, pid, page, cpus, shared = (cursor.u32() for _ in range(5))
    return Hello(version, abi_version, pid, page, cpus, bool(shared), _features(cursor.text()), cursor.text())


def pack_open(
    lib: str, weights: str, weights_offset: int, threads: int, device: Tuple[int, int] = (abi.DEVICE_CPU, 0)
) -> bytes:
    """The payload of an open; an empty `weights` means that there are none, `device` is (DLDeviceType, id)."""
    where = struct.pack("<ii", *device)
    return struct.pack("<IQ", threads, weights_offset) + pack_text(lib) + pack_text(weights) + where


def pack_devices(device_type: int) -> bytes:
    """The payload of a question about the devices of a DLDeviceType."""
    return struct.pack("<i", device_type)


def unpack_devices(payload: Buffer, kind: str) -> Found:
    """Read the devices of `kind`."""
    cursor = Cursor(payload)
    found = []
    for _ in range(cursor.u32()):
        index, name, driver, arch = cursor.u32(), cursor.text(), cursor.text(), cursor.text()
        features = _features(cursor.text())
        found.append(Accelerator(kind, index, name, driver, arch, features, *cursor.unpack(_SIZES)))
    return Found(tuple(found), cursor.text())


def unpack_open_result(payload: Buffer) -> ModuleInfo:
    """Read what was loaded."""
    cursor = Cursor(payload)
    module = cursor.u32()
    target, features = cursor.text(), _features(cursor.text())
    functions = []
    for _ in range(cursor.u32()):
        name = cursor.text()
        inputs = tuple(_port(cursor) for _ in range(cursor.u32()))
        outputs = tuple(_port(cursor) for _ in range(cursor.u32()))
        functions.append(FunctionInfo(name, inputs, outputs))
    return ModuleInfo(target, features, tuple(functions), module)


def pack_inputs(inputs: Sequence[Given]) -> Tuple[bytes, List[Tensor]]:
    """Which inputs the runner has already, and those whose tensors follow."""
    handles = [given.handle if isinstance(given, Kept) else 0 for given in inputs]
    by_value = [given for given in inputs if isinstance(given, Tensor)]
    return struct.pack(f"<I{len(handles)}Q", len(handles), *handles), by_value


def pack_call(module: int, function: int, options: int) -> bytes:
    """The start of a call's payload; inputs follow."""
    return struct.pack("<III", module, function, options)


def pack_keep(dtype: str, shape: Sequence[int]) -> bytes:
    """The start of the payload that makes room for a tensor; its first bytes follow."""
    code, bits = abi.dtype_code(dtype)
    head = _TENSOR.pack(code, bits, 1, len(shape), 0, bytes_of(dtype, shape))
    return head + struct.pack(f"<{len(shape)}q", *shape)


def unpack_keep(payload: Buffer) -> int:
    """The handle of the tensor that there is room for."""
    return Cursor(payload).unpack(_U64)[0]


def pack_fill(handle: int) -> bytes:
    """The start of the payload that brings a tensor's next bytes, which follow."""
    return _U64.pack(handle)


def pack_fetch(handle: int, offset: int, size: int) -> bytes:
    """The payload of a request for some bytes of a kept tensor."""
    return struct.pack("<QQQ", handle, offset, size)


def pack_release(handles: Sequence[int]) -> bytes:
    """The payload of a request to release kept tensors."""
    return struct.pack(f"<I{len(handles)}Q", len(handles), *handles)


def pack_close(module: int) -> bytes:
    """The payload of a request to close a module."""
    return _U32.pack(module)


def unpack_kept_call(payload: Buffer) -> Tuple[int, List[Kept]]:
    """The duration of a call in nanoseconds, and its outputs, which stay."""
    cursor = Cursor(payload)
    duration = cursor.unpack(_U64)[0]
    found = []
    for _ in range(cursor.u32()):
        handle = cursor.unpack(_U64)[0]
        code, bits, lanes, ndim, _, nbytes = cursor.unpack(_TENSOR)
        if ndim > abi.MAX_NDIM:
            raise ProtocolError(f"a tensor has {ndim} dims")
        shape = struct.unpack(f"<{ndim}q", cursor.take(8 * ndim))
        try:
            kept = Kept(handle, abi.dtype_name(code, bits, lanes), shape)
            expected = kept.nbytes
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if expected != nbytes:
            raise ProtocolError(f"a kept {kept.dtype}{list(shape)} has {nbytes} bytes")
        found.append(kept)
    return duration, found


def unpack_call_result(payload: Buffer, section: Union[memoryview, None]) -> Tuple[int, List[Tensor]]:
    """The call's duration in nanoseconds, and its outputs."""
    cursor = Cursor(payload)
    duration = cursor.unpack(_U64)[0]
    return duration, unpack_tensors(cursor, section)


def pack_time(module: int, function: int, options: TimeOptions) -> bytes:
    """The start of a time's payload; inputs follow."""
    o = options
    return struct.pack(
        "<II9q", module, function, o.number, o.repeat, o.min_repeat_ns, o.warmup, o.limit_zero_time_iterations,
        o.cooldown_interval_ns, o.repeats_to_cooldown, o.cache_flush_bytes, int(o.profile),
    )  # fmt: skip


def unpack_time_result(payload: Buffer) -> TimeResult:
    """Read the samples, and a profile where one was asked for."""
    cursor = Cursor(payload)
    number, resolution = cursor.unpack(struct.Struct("<qq"))
    count, n_steps = cursor.u32(), cursor.u32()

    def doubles(length: int) -> Tuple[float, ...]:
        return struct.unpack(f"<{length}d", cursor.take(8 * length))

    samples = doubles(count)
    if cursor.at_end():
        return TimeResult(samples, number, resolution)
    clock, rates, steps = doubles(1)[0], doubles(abi.ROOFS), doubles(count * n_steps)
    by_step = tuple(steps[step::n_steps] for step in range(n_steps))
    return TimeResult(samples, number, resolution, StepSamples(by_step, clock, rates))


def unpack_error(payload: Buffer) -> Tuple[int, str]:
    """The kedge_status and the text of an error."""
    cursor = Cursor(payload)
    status = cursor.unpack(struct.Struct("<i"))[0]
    return status, cursor.text()


def _port(cursor: Cursor) -> PortInfo:
    name = cursor.text()
    code, bits, lanes, ndim = cursor.unpack(struct.Struct("<BBHI"))
    try:
        return PortInfo(name, abi.dtype_name(code, bits, lanes), ndim)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def _features(text: str) -> Tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
