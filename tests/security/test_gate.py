"""Calls that end for two reasons at once."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest

from kedge.rpc.status import TrackerAwayError
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.interceptor import Gate
from kedge.rpc.tracker.security.principal import LOCAL

METHOD = "/kedge.v1.Fleet/GetJob"


class _Handlers(grpc.GenericRpcHandler):
    """One method, which ends its call in its own words; `closing` is told when it is about to."""

    def __init__(self, closing: asyncio.Event) -> None:
        self._closing = closing

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def handler(_request: bytes, context: Any) -> bytes:
            self._closing.set()
            await context.abort(grpc.StatusCode.NOT_FOUND, "its own words")
            return b""

        return grpc.unary_unary_rpc_method_handler(handler, bytes) if details.method == METHOD else None


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
            async with asyncio.timeout(20):
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
