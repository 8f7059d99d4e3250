"""How handlers of gRPC calls end: what they raise on purpose arrives at the other end as what it is."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from kedge.rpc.errors import KedgeError
from kedge.rpc.status import to_status

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

#: What gRPC raises where something is said to a peer that is there no longer.
GONE = (grpc.aio.UsageError, grpc.aio.InternalError)


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
