"""How a tracker that follows serves: it hands every call on to the one that leads, as bytes, and its answers back.

Nothing is read here, and nobody is admitted: the leader decides, as if the call had come to it. It is told who calls:
a client by its token, as the client sent it; a device by the certificate with which it came through this tracker's
handshake. The leader believes that from a tracker of its own authority alone (mutual TLS).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import TrackerAwayError, to_status, was_said
from kedge.rpc.tracker import handlers
from kedge.rpc.tracker.handlers import GONE, first_of
from kedge.rpc.tracker.health import HEALTH
from kedge.rpc.tracker.listeners import Details, Find
from kedge.rpc.tracker.relayed import AGENTS_PORT_KEY, CERTIFICATE_KEY, PEER_KEY
from kedge.rpc.tracker.security.principal import RULES
from kedge.rpc.transport import Address, Tls, open_aio_channel

Context = grpc.aio.ServicerContext[Any, Any]

#: More than any leader has: it is the one who ends a call.
_LONGER_S = 2 * handlers.ONLY_S
_AUTHORIZATION = "authorization"
_HEALTH = f"/{HEALTH}/"
#: Services with a connection of their own: blobs must not hold up heartbeats, nor clients' calls keep agents out.
_APART = ("/kedge.v1.Blobs", "/kedge.v1.Agents")


class Relay:
    """The way to the leader; `tls` is this tracker's, None in plaintext on loopback. Belongs to one event loop."""

    def __init__(self, tls: Tls | None, agents_port: Callable[[], int] = lambda: 0) -> None:
        self._tls = tls
        self._agents_port = agents_port
        self._leader: Address | None = None
        #: By service, and the others': a connection has room for so many calls, and no more.
        self._channels: dict[str, grpc.aio.Channel] = {}

    @property
    def leader(self) -> Address | None:
        """Where calls go; None while nobody leads."""
        return self._leader

    async def point(self, leader: Address | None) -> None:
        """From now on calls go there; those that are under way to another one end."""
        if leader == self._leader:
            return
        self._leader = leader
        old, self._channels = self._channels, {}
        if leader is not None:
            self._channels = {service: open_aio_channel(leader, self._tls) for service in (*_APART, "")}
        for channel in old.values():
            await channel.close()

    async def serve(self, native: Find, details: Details) -> Any:
        """Whatever the call is, it is relayed; what no tracker serves is not.

        While nobody leads, nobody can be admitted: then whoever asks for this tracker's health is told.
        """
        method = str(details.method)
        if self._leader is None and method.startswith(_HEALTH):
            return await native(details)
        if method not in RULES:
            return None

        async def relay(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            async for answer in self._pass(method, requests, context):
                yield answer

        return grpc.stream_stream_rpc_method_handler(relay)

    async def _pass(self, method: str, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        try:
            async with _begun(method, requests) as messages:
                async for answer in self._hand_on(method, messages, context):
                    yield answer
        except ProtocolError as error:
            await context.abort(*to_status(error))

    async def _hand_on(self, method: str, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        service = method.rpartition("/")[0]
        channel = self._channels.get(service if service in _APART else "")
        if channel is None:
            await _abort(context, "no tracker of this fleet leads at the moment; one will within seconds")
            return
        call: Any = channel.stream_stream(method)(metadata=self._who_calls(context), timeout=context.time_remaining())
        _heed_the_answer(call)
        sending = asyncio.create_task(_send(requests, call))
        try:
            async for answer in call:
                yield answer
            context.set_trailing_metadata(tuple(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not was_said(error.trailing_metadata()):
                await _abort(context, "the tracker that led does not answer; another one will lead within seconds")
                return
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                # Whoever leads serves it: the one that is asked follows by now.
                await _abort(context, "the tracker that led follows now")
                return
            said = tuple((key, value) for key, value in error.trailing_metadata() if not key.startswith("grpc-status"))
            await context.abort(error.code(), error.details() or "", said)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not the caller broke it off, but this end of the way: the leader is another one by now.
            await _abort(context, "the tracker that led went away")
        finally:
            sending.cancel()
            call.cancel()

    def _who_calls(self, context: Context) -> tuple[tuple[str, Any], ...]:
        said: list[tuple[str, Any]] = [(PEER_KEY, context.peer()), (AGENTS_PORT_KEY, str(self._agents_port()))]
        said += [(key, value) for key, value in context.invocation_metadata() or () if key == _AUTHORIZATION]
        certificates = context.auth_context().get("x509_pem_cert", ())
        said += [(CERTIFICATE_KEY, bytes(pem)) for pem in list(certificates)[:1]]
        return tuple(said)


@asynccontextmanager
async def _begun(method: str, requests: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """The same messages, once the first is there: nothing is held at the leader for callers that say nothing.

    Only the leader knows whom to admit, and refuses others as soon as it hears of them. Where the first message is the
    only one it may be large, and its link slow: if it does not come soon, the leader is told of the call without it,
    and decides for how long it waits for whom it knows.
    """
    alone = not _streams(method)
    first = asyncio.ensure_future(first_of(requests, _LONGER_S if alone else None))

    async def all_of_them() -> AsyncIterator[bytes]:
        message = await first
        if message is not None:
            yield message
            async for message in requests:
                yield message

    try:
        await asyncio.wait([first], timeout=handlers.FIRST_S if alone else None)
        if first.done():
            first.result()
        yield all_of_them()
    finally:
        first.cancel()


@lru_cache(maxsize=None)
def _streams(method: str) -> bool:
    """Whether the caller may say more than one thing."""
    _, service, name = method.split("/")
    return bool(descriptor_pool.Default().FindMethodByName(f"{service}.{name}").client_streaming)


class _Unhurried:
    """gRPC's inner call, whose status is what the leader says, also where a message could not be sent any more."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def set_internal_error(self, _why: str) -> None:
        """The status that comes says better what it was: the leader refused the call, or is gone."""


def _heed_the_answer(call: Any) -> None:
    """A leader that refuses a call does so while messages are on their way to it.

    gRPC's asyncio client ends such a call as "Internal error from Core" when sending fails before the status has come.
    It has no switch for that (grpcio 1.85), so the part that ends it is replaced.
    """
    inner = getattr(call, "_cython_call", None)
    if inner is not None:
        call._cython_call = _Unhurried(inner)


async def _send(requests: AsyncIterator[bytes], call: Any) -> None:
    """The caller's messages; how the call ends is told by the answers' side."""
    try:
        async for request in requests:
            await call.write(request)
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, *GONE):
        return


async def _abort(context: Context, why: str) -> None:
    code, details, metadata = to_status(TrackerAwayError(why))
    await context.abort(code, details, metadata)
