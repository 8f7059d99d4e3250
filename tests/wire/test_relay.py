"""What a tracker that follows says where the one that led does not lead any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kedge.protos.v1 import fleet_pb2, fleet_pb2_grpc
from kedge.rpc.status import TrackerAwayError, from_rpc_error, is_away
from kedge.rpc.tracker import handlers
from kedge.rpc.tracker.health import HealthService
from kedge.rpc.tracker.relay import Relay
from kedge.rpc.transport import Address


class Following(grpc.aio.ServerInterceptor):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        return await self._relay.serve(continuation, details)


async def served(*interceptors: grpc.aio.ServerInterceptor) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(interceptors=interceptors)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def test_a_leader_that_serves_a_call_no_more_is_one_that_is_away() -> None:
    async def ask() -> None:
        relay = Relay(None)
        follower, port = await served(Following(relay))
        stepped_down, its_port = await served()
        await relay.point(Address("127.0.0.1", its_port))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cast(Any, fleet_pb2_grpc).FleetStub(channel).ListJobs(fleet_pb2.ListJobsRequest())
        assert is_away(caught.value) and isinstance(from_rpc_error(caught.value), TrackerAwayError)
        await relay.point(None)
        for server in (follower, stepped_down):
            await server.stop(0)

    asyncio.run(ask())


def test_without_a_leader_its_health_is_its_own() -> None:
    """It says that it serves nothing, and is not away."""

    async def ask() -> None:
        health = HealthService(["kedge.v1.Fleet"])
        health.set_serving(False)
        server = grpc.aio.server(interceptors=[Following(Relay(None))])
        health.add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.stop(0)

    asyncio.run(ask())


class Echo(grpc.aio.ServerInterceptor):
    """A leader that answers with what it was told, and refuses whom it does not know, at once."""

    async def intercept_service(self, _continuation: Any, details: Any) -> Any:
        known = dict(details.invocation_metadata or ()).get("authorization") == "Bearer known"

        async def echo(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            if not known:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown")
            return b"".join([request async for request in requests])

        return grpc.stream_unary_rpc_method_handler(echo)


def test_a_large_spec_has_the_time_that_the_leader_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "FIRST_S", 0.1)

    async def ask() -> None:
        relay = Relay(None)
        follower, port = await served(Following(relay))
        leading, its_port = await served(Echo())
        await relay.point(Address("127.0.0.1", its_port))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            submit = channel.stream_unary("/kedge.v1.Fleet/SubmitJob")
            slow = submit(timeout=60, metadata=(("authorization", "Bearer known"),))
            stranger = submit(timeout=60)
            assert await stranger.code() is grpc.StatusCode.UNAUTHENTICATED
            assert not slow.done()
            await slow.write(b"a large spec")
            await slow.done_writing()
            assert await slow == b"a large spec"
        await relay.point(None)
        for server in (follower, leading):
            await server.stop(0)

    asyncio.run(ask())


class Counting(grpc.aio.ServerInterceptor):
    """A leader that answers nothing, and counts what comes."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def intercept_service(self, _continuation: Any, details: Any) -> Any:
        self.seen.append(details.method)
        return None


def test_callers_that_say_nothing_hold_nothing_at_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "FIRST_S", 0.2)

    async def ask() -> None:
        relay, leader = Relay(None), Counting()
        follower, port = await served(Following(relay))
        leading, its_port = await served(leader)
        await relay.point(Address("127.0.0.1", its_port))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            silent = [channel.stream_stream("/kedge.v1.Agents/Connect")(timeout=60) for _ in range(20)]
            for call in silent:
                assert "within 0.2 s" in await call.details()
            assert leader.seen == []
            said = channel.stream_stream("/kedge.v1.Fleet/Hello")(timeout=60)
            await said.write(b"")
            assert await said.code() is grpc.StatusCode.UNAVAILABLE and leader.seen == ["/kedge.v1.Fleet/Hello"]
        await relay.point(None)
        for server in (follower, leading):
            await server.stop(0)

    asyncio.run(ask())
