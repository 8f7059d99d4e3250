"""How much of what a message may say: one table for every request, checked before anything is done with it.

A field without an entry has the bound of its kind, so that one which is added is bounded by itself. Trackers check what
clients and agents say; agents check their results before they say them.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from typing import Any, Dict, Mapping, Type

from google.protobuf.message import Message

from kedge.rpc.abi import MAX_PARAMETERS
from kedge.rpc.errors import LimitError, UsageError
from kedge.rpc.transport import CHUNK_BYTES, MAX_RESULT_BYTES, MAX_SESSION_FRAME_BYTES, MAX_SPEC_BYTES
from kedge.rpc.types import INLINE_TENSOR_BYTES, MAX_SAMPLES

#: Characters of a text, bytes of raw data, and items of a list, where no entry says otherwise.
TEXT, BYTES, ITEMS = 1_000, 1_000, 1_000
#: A whole number, up or down: what databases take.
INTEGER = 1 << 62

#: By field: characters, bytes or items; by message: its bytes in all.
BOUNDS: Mapping[str, int] = {
    "kedge.v1.SubmitJobRequest.idempotency_key": 128,
    "kedge.v1.FindMissingRequest.blobs": 10_000,
    "kedge.v1.UploadRequest.data": CHUNK_BYTES,
    "kedge.v1.ClientFrame.data": MAX_SESSION_FRAME_BYTES,
    "kedge.v1.DeviceFrame.data": MAX_SESSION_FRAME_BYTES,
    "kedge.v1.JobSpec": MAX_SPEC_BYTES,
    **dict.fromkeys(
        (f"kedge.v1.{name}.selector" for name in ("JobSpec", "ListDevicesRequest", "ReserveRequest")), 3_000
    ),
    "kedge.v1.RunTask.inputs": MAX_PARAMETERS,
    "kedge.v1.BenchTask.inputs": MAX_PARAMETERS,
    "kedge.v1.Tensor.inline": INLINE_TENSOR_BYTES,
    "kedge.v1.AgentHello": 64 << 10,
    "kedge.v1.Heartbeat": 64 << 10,
    "kedge.v1.JobFinished": MAX_RESULT_BYTES,
    "kedge.v1.JobResult.outputs": MAX_PARAMETERS,
    "kedge.v1.Outcome.message": 64 << 10,
    "kedge.v1.Measurement.samples_ns": MAX_RESULT_BYTES // 8,
    "kedge.v1.Profile.Step.samples_ns": MAX_SAMPLES,
    "kedge.v1.Profile.steps": 20_000,
}
#: What an artifact's own output may be part of.
_ANY_CHARACTER = "kedge.v1.Outcome.message"


def check(message: Message) -> None:
    """Refuse a message with more in it than may be.

    Raises:
        LimitError: a field, or the whole, is larger than its bound.
        UsageError: a text has a zero character, which databases do not take.
    """
    kind = type(message)
    known = _KNOWN.get(kind)
    if known is None:
        known = _KNOWN[kind] = _Known(message.DESCRIPTOR)
    if known.most is not None and message.ByteSize() > known.most:
        raise _too_much(known.name, f"{message.ByteSize()} bytes", known.most)
    names = known.names
    for field, value in message.ListFields():
        _check(names[field], value)


class _Known:
    """What there is to know of a kind of message: protobuf makes a field, and its name, anew for whoever asks."""

    def __init__(self, descriptor: Any) -> None:
        self.name: str = descriptor.full_name
        self.most = BOUNDS.get(self.name)
        self.names: Dict[Any, str] = {field: field.full_name for field in descriptor.fields}


_KNOWN: Dict[Type[Message], _Known] = {}


def cut(name: str, text: str) -> str:
    """A text for people, no longer than the field of this name may be; what it is cut by shows."""
    most = BOUNDS.get(name, TEXT)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _check(name: str, value: Any) -> None:
    kind = type(value)
    if kind is str:
        if len(value) > BOUNDS.get(name, TEXT):
            raise _too_much(name, f"{len(value)} characters", BOUNDS.get(name, TEXT))
        if "\0" in value and name != _ANY_CHARACTER:
            raise UsageError(f"{_short(name)} has a zero character in it")
    elif kind is bytes:
        if len(value) > BOUNDS.get(name, BYTES):
            raise _too_much(name, f"{len(value)} bytes", BOUNDS.get(name, BYTES))
    elif kind is int:
        if abs(value) > INTEGER:
            raise _too_much(name, f"the value {value}", INTEGER)
    elif kind is not float and kind is not bool:
        if isinstance(value, Message):
            check(value)
        else:
            _check_items(name, value)


def _check_items(name: str, items: Any) -> None:
    """Of a list or a map; numbers with a point are bounded by being few."""
    if len(items) > BOUNDS.get(name, ITEMS):
        raise _too_much(name, f"{len(items)} items", BOUNDS.get(name, ITEMS))
    is_map = isinstance(items, MappingABC)
    for item in items:
        if isinstance(item, float):
            return
        _check(f"{name}.key" if is_map else name, item)
        if is_map:
            _check(f"{name}.value", items[item])


def _short(name: str) -> str:
    return name[len("kedge.v1.") :] if name.startswith("kedge.v1.") else name


def _too_much(name: str, has: str, most: int) -> LimitError:
    return LimitError(f"{_short(name)} has {has}, and at most {most} are accepted", hint="send less of it")
