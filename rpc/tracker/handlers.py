"""How handlers of gRPC calls begin and end: with a message in time, and with what they raise on purpose."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc

from kedge.rpc.errors import KedgeError
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import to_status
from kedge.rpc.transport import MAX_SPEC_BYTES

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

#: What gRPC raises where something is said to a peer that is there no longer.
GONE = (grpc.aio.UsageError, grpc.aio.InternalError)
#: Within so long a call has to say something (every call of kedge's own does at once).
FIRST_S = 10.0
#: The message of a call that has one may be a job's whole spec, over a link of 20 KB/s.
ONLY_S = FIRST_S + MAX_SPEC_BYTES / 20_000


async def first_of(messages: AsyncIterator[T], within_s: float | None = None) -> T | None:
    """The first message of a call, None where it has none; raises ProtocolError where it is not there in time, whole.

    `within_s` is by default what strangers have, whose first messages are small.
    """
    within_s = FIRST_S if within_s is None else within_s
    try:
        async with asyncio.timeout(within_s):
            return await anext(messages)
    except StopAsyncIteration:
        return None
    except TimeoutError as error:
        raise ProtocolError(f"a call has to begin with a message within {within_s:g} s") from error


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """What a handler still has to do when it is cancelled, also where it is cancelled again: by the gate, which
    ends the call, and by gRPC, as its peer broke it off at the same moment. CancelledError comes out afterwards."""
    working, again = asyncio.create_task(work), None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            again = error
    if again is not None:
        raise again
    return working.result()


def typed_errors(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """A unary handler whose KedgeErrors arrive at the client as what they are."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Context) -> T:
        try:
            return await method(self, request, context)
        except KedgeError as error:
            code, details, metadata = to_status(error)
            await context.abort(code, details, metadata)
            raise AssertionError("abort always raises") from error

    return wrapped


def typed_stream_errors(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """The same for a handler that streams its responses."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Context) -> AsyncIterator[T]:
        try:
            async for response in method(self, request, context):
                yield response
        except KedgeError as error:
            code, details, metadata = to_status(error)
            await context.abort(code, details, metadata)

    return wrapped
