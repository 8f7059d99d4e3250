"""What any field of any request may hold: found in the descriptors, so that one which is added is bounded by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kedge.protos.v1 import agent_pb2, blobs_pb2, fleet_pb2, types_pb2
from kedge.rpc import bounds
from kedge.rpc.errors import LimitError, UsageError
from support.services import rpcs

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
Path = tuple[FieldDescriptor, ...]


def fields(message: Descriptor, seen: tuple[Descriptor, ...] = ()) -> Iterator[Path]:
    """The way to every field of a message, and of those within it."""
    for field in message.fields:
        yield (field,)
        inner = field.message_type
        if inner is not None and inner not in seen and not inner.GetOptions().map_entry:
            yield from ((field, *rest) for rest in fields(inner, (*seen, inner)))


def build(request: Any, path: Path, put: Any) -> Any:
    """A request whose field at the end of the path is what `put` makes of it."""
    holder = request()
    at = holder
    for field in path[:-1]:
        at = getattr(at, field.name).add() if field.is_repeated else getattr(at, field.name)
        at.SetInParent()
    put(at, path[-1])
    return holder


def requests() -> list[tuple[str, Any, Path]]:
    found = {rpc.request.DESCRIPTOR.full_name: rpc.request for rpc in rpcs()}
    ways = [(name, cls, path) for name, cls in sorted(found.items()) for path in fields(cls.DESCRIPTOR)]
    return [(f"{name}:{'.'.join(field.name for field in path)}", cls, path) for name, cls, path in ways]


WAYS = requests()


def too_long(field: FieldDescriptor) -> list[Any]:
    """Values of one item that no field of this kind may have."""
    if field.type == field.TYPE_STRING:
        return ["x" * (bounds.BOUNDS.get(field.full_name, bounds.TEXT) + 1)]
    if field.type == field.TYPE_BYTES:
        return [b"x" * (bounds.BOUNDS.get(field.full_name, bounds.BYTES) + 1)]
    if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
        return [bounds.INTEGER + 1]
    return []


def set_one(at: Any, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        getattr(at, field.name).append(value)
    else:
        setattr(at, field.name, value)


def test_no_text_no_bytes_and_no_number_is_without_a_bound() -> None:
    assert len(WAYS) > 200
    tried = 0
    for _, request, path in WAYS:
        for value in too_long(path[-1]):
            message = build(request, path, lambda at, field, value=value: set_one(at, field, value))
            with pytest.raises(LimitError, match=re.escape(path[-1].containing_type.name)):
                bounds.check(message)
            tried += 1
    assert tried > 50


def many(at: Any, field: FieldDescriptor) -> None:
    """One item more than the list may have, each as small as can be."""
    count = bounds.BOUNDS.get(field.full_name, bounds.ITEMS) + 1
    items = getattr(at, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for number in range(count):
            items[str(number)] = ""
    elif field.message_type is not None:
        items.MergeFrom([field.message_type._concrete_class()] * count)
    elif field.type == field.TYPE_STRING:
        items.extend([""] * count)
    else:
        items.extend([0] * count)


def test_no_list_is_without_a_bound() -> None:
    lists = [(name, request, path) for name, request, path in WAYS if path[-1].is_repeated]
    assert len(lists) > 20
    for _, request, path in lists:
        with pytest.raises(LimitError):
            bounds.check(build(request, path, many))


def test_labels_are_bounded_by_key_and_by_value() -> None:
    for labels in ({"k" * 1_001: "v"}, {"k": "v" * 1_001}):
        with pytest.raises(LimitError, match=r"DeviceInfo\.labels"):
            bounds.check(agent_pb2.AgentHello(device=types_pb2.DeviceInfo(labels=labels)))


def test_many_fields_that_are_small_each_are_bounded_together() -> None:
    labels = {f"{number}": "v" * 900 for number in range(100)}
    with pytest.raises(LimitError, match=r"AgentHello has 9[0-9]{4} bytes"):
        bounds.check(agent_pb2.AgentHello(device=types_pb2.DeviceInfo(labels=labels)))


def test_every_bound_is_of_something_that_is_there() -> None:
    reached = {path[-1].full_name for _, _, path in WAYS}
    reached |= {path[-1].message_type.full_name for _, _, path in WAYS if path[-1].message_type is not None}
    assert not bounds.BOUNDS.keys() - reached


def test_what_databases_do_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match=re.escape("ReserveRequest.reason has a zero character")):
        bounds.check(fleet_pb2.ReserveRequest(reason="a\0b"))
    crashed = types_pb2.Outcome(message="what a program wrote: \0")
    bounds.check(agent_pb2.JobFinished(result=types_pb2.JobResult(outcome=crashed)))


def test_what_is_usual_passes() -> None:
    blobs = [types_pb2.Blob(digest="a" * 64, size_bytes=1 << 40)] * 10_000
    request = fleet_pb2.SubmitJobRequest(idempotency_key="k" * 128)
    request.spec.run.inputs.add(name="x", inline=bytes(1 << 20), shape=[1 << 20])
    for message in (
        request,
        blobs_pb2.FindMissingRequest(blobs=blobs),
        agent_pb2.Heartbeat(),
        fleet_pb2.HelloRequest(),
    ):
        bounds.check(message)


@pytest.mark.parametrize(
    "request_of",
    [
        lambda text: fleet_pb2.ListDevicesRequest(selector=text),
        lambda text: fleet_pb2.ReserveRequest(selector=text),
        lambda text: fleet_pb2.SubmitJobRequest(spec=types_pb2.JobSpec(selector=text)),
    ],
)
def test_a_selector_may_name_hundreds_of_boards(request_of: Any) -> None:
    names = ",".join(f"board-{number:03}" for number in range(290))
    bounds.check(request_of(f"key in ({names})"))
    with pytest.raises(LimitError, match="at most 3000"):
        bounds.check(request_of(f"key in ({names},{names})"))
