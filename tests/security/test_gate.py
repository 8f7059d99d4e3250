"""What the gate takes of a call before anybody is admitted, and calls that end for two reasons at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kedge.protos.v1 import fleet_pb2
from kedge.rpc.errors import AuthenticationError
from kedge.rpc.status import TrackerAwayError
from kedge.rpc.tracker import handlers
from kedge.rpc.tracker.security import interceptor
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.interceptor import Gate
from kedge.rpc.tracker.security.principal import LOCAL, Principal, Role
from kedge.rpc.transport import MAX_SPEC_BYTES

METHOD = "/kedge.v1.Fleet/GetJob"


class _Handlers(grpc.GenericRpcHandler):
    """One method, which ends its call in its own words; `closing` is told when it is about to."""

    def __init__(self, closing: asyncio.Event) -> None:
        self._closing = closing

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def handler(_request: fleet_pb2.GetJobRequest, context: Any) -> bytes:
            self._closing.set()
            await context.abort(grpc.StatusCode.NOT_FOUND, "its own words")
            return b""

        return (
            grpc.unary_unary_rpc_method_handler(handler, fleet_pb2.GetJobRequest.FromString)
            if details.method == METHOD
            else None
        )


def test_a_call_that_its_handler_ends_too_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> grpc.RpcError:
        inside = asyncio.Event()
        gate = Gate(lambda _: LOCAL, Audit(tmp_path / "audit.jsonl"), 10)
        server = grpc.aio.server(interceptors=[gate])
        server.add_generic_rpc_handlers((_Handlers(inside),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(METHOD)(b"")
            async with asyncio.timeout(60):
                await inside.wait()
            gate.close(TrackerAwayError("this tracker leads no more"))
            with pytest.raises(grpc.RpcError) as caught:
                await call
        await server.stop(None)
        return caught.value

    with caplog.at_level(logging.ERROR):
        error = asyncio.run(scene())
    assert error.code() is grpc.StatusCode.NOT_FOUND and error.details() == "its own words"
    assert caplog.records == []


class _Echo(grpc.GenericRpcHandler):
    """One method that answers what it was asked; `asked` counts."""

    asked = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def handler(request: fleet_pb2.GetJobRequest, _context: Any) -> fleet_pb2.GetJobRequest:
            self.asked += 1
            return request

        read, write = fleet_pb2.GetJobRequest.FromString, fleet_pb2.GetJobRequest.SerializeToString
        return grpc.unary_unary_rpc_method_handler(handler, read, write) if details.method == METHOD else None


def test_nothing_of_a_strangers_message_is_waited_for(tmp_path: Path) -> None:
    """A call is refused while its message, however large, has not even begun."""

    def nobody(_context: Any) -> Principal:
        raise AuthenticationError("a stranger")

    async def scene() -> None:
        async with served(Gate(nobody, Audit(tmp_path / "audit.jsonl"), 10), _Echo()) as channel:
            call = channel.stream_unary(METHOD)()
            async with asyncio.timeout(60):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scene())


def test_who_is_known_and_says_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "ONLY_S", 0.2)

    async def scene() -> None:
        echo = _Echo()
        async with served(Gate(lambda _: LOCAL, Audit(tmp_path / "audit.jsonl"), 10), echo) as channel:
            silent = channel.stream_unary(METHOD)()
            async with asyncio.timeout(60):
                assert await silent.code() is grpc.StatusCode.FAILED_PRECONDITION
            empty = channel.stream_unary(METHOD)()
            await empty.done_writing()
            assert await empty.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert echo.asked == 0
            message = fleet_pb2.GetJobRequest(job_id="j").SerializeToString()
            assert await channel.unary_unary(METHOD)(message) == message

    asyncio.run(scene())


def test_a_large_message_has_the_time_that_it_takes_on_a_slow_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time in which a call has to say something is that of small messages."""
    monkeypatch.setattr(handlers, "FIRST_S", 0.05)

    async def scene() -> None:
        async with served(Gate(lambda _: LOCAL, Audit(tmp_path / "audit.jsonl"), 10), _Echo()) as channel:
            call = channel.stream_unary(METHOD)()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await asyncio.shield(call.code())
            message = fleet_pb2.GetJobRequest(job_id="j").SerializeToString()
            await call.write(message)
            await call.done_writing()
            assert await call == message

    asyncio.run(scene())
    assert interceptor.ONLY_S > MAX_SPEC_BYTES / 50_000


def test_a_message_with_too_much_in_it_is_refused_at_the_door(tmp_path: Path) -> None:
    async def scene() -> None:
        echo = _Echo()
        async with served(Gate(lambda _: LOCAL, Audit(tmp_path / "audit.jsonl"), 10), echo) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary(METHOD)(fleet_pb2.GetJobRequest(job_id="j" * 1_001).SerializeToString())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "GetJobRequest.job_id has 1001 characters" in (caught.value.details() or "")
        assert echo.asked == 0

    asyncio.run(scene())


@asynccontextmanager
async def served(gate: Gate, handler: grpc.GenericRpcHandler) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[gate])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


class _Hearing(grpc.GenericRpcHandler):
    """A stream that says one thing, which takes for ever, and hears meanwhile."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[str] = asyncio.Queue()
        self.why: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def hear(requests: AsyncIterator[fleet_pb2.GetJobRequest]) -> None:
            try:
                async for request in requests:
                    self.heard.put_nowait(request.job_id)
            except AuthenticationError as error:
                self.why.set_result(error)

        async def handler(requests: AsyncIterator[fleet_pb2.GetJobRequest], _context: Any) -> AsyncIterator[bytes]:
            hearing = asyncio.create_task(hear(requests))
            yield bytes(12 << 20)  # more than anybody takes who does not read
            await hearing

        return grpc.stream_stream_rpc_method_handler(handler, fleet_pb2.GetJobRequest.FromString)


def test_who_does_not_read_is_not_heard_any_more_either_once_the_call_has_to_end(tmp_path: Path) -> None:
    """Its handler is held up in saying something, and cannot be told."""

    async def scene() -> None:
        hearing = _Hearing()
        ann = Principal("ann", Role.SUBMIT, "t1")
        gate = Gate(lambda _: ann, Audit(tmp_path / "audit.jsonl"), 10)
        async with served(gate, hearing) as channel, asyncio.timeout(60):
            call = channel.stream_stream("/kedge.v1.Fleet/RunJobs")()
            for number in ("one", "two"):
                await call.write(fleet_pb2.GetJobRequest(job_id=number).SerializeToString())
                assert await hearing.heard.get() == number
            gate.end(ann.owner, "t1", AuthenticationError("revoked"))
            await call.write(fleet_pb2.GetJobRequest(job_id="three").SerializeToString())
            assert str(await hearing.why) == "revoked" and hearing.heard.empty()
            call.cancel()

    asyncio.run(scene())
