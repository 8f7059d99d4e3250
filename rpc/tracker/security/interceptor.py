"""What stands before every handler: who calls, may they, have they too much under way already, can it be read at all.

Messages are read only after their sender was admitted: no stranger gets to feed the parser.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kedge.rpc.errors import AuthenticationError, KedgeError, LimitError
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import to_status
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.ca import serial_of
from kedge.rpc.tracker.security.devices import Devices
from kedge.rpc.tracker.security.principal import LOCAL, Principal, Role, check_rule, enter
from kedge.rpc.tracker.security.tokens import Tokens

Context = grpc.aio.ServicerContext[Any, Any]
#: Says who makes a call; raises AuthenticationError.
Authenticate = Callable[[Context], Principal]

_BEARER = "Bearer "


class Gate(grpc.aio.ServerInterceptor):
    """Admits calls, one gate per listener. `most_calls` is how many one principal may have under way."""

    def __init__(self, authenticate: Authenticate, audit: Audit, most_calls: int) -> None:
        self._authenticate = authenticate
        self._audit = audit
        self._most_calls = most_calls
        self._calls: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler with the gate before it."""
        handler: Any = await continuation(details)
        if handler is None:
            return None
        kinds = {
            "unary_unary": grpc.unary_unary_rpc_method_handler,
            "unary_stream": grpc.unary_stream_rpc_method_handler,
            "stream_unary": grpc.stream_unary_rpc_method_handler,
            "stream_stream": grpc.stream_stream_rpc_method_handler,
        }
        for kind, make in kinds.items():
            inner = getattr(handler, kind)
            if inner is not None:
                read = _each if kind.startswith("stream") else _one
                guarded = self._guarded(details.method, inner, partial(read, handler.request_deserializer))
                return make(guarded, None, handler.response_serializer)
        raise TypeError(f"{details.method} has no handler of a known kind")

    def _guarded(
        self, method: str, inner: Callable[[Any, Context], Any], read: Callable[[Any], Any]
    ) -> Callable[[Any, Context], Any]:
        if inspect.isasyncgenfunction(inner):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                with self._under_way(await self._admit(method, context), context) as problem:
                    await _abort_if(problem, context)
                    async for response in inner(await _read(read, request, context), context):
                        yield response

            return stream

        async def call(request: Any, context: Context) -> Any:
            with self._under_way(await self._admit(method, context), context) as problem:
                await _abort_if(problem, context)
                return await inner(await _read(read, request, context), context)

        return call

    async def _admit(self, method: str, context: Context) -> Principal:
        try:
            principal = self._authenticate(context)
        except AuthenticationError as error:
            self._audit.refused("call refused", method=method, peer=context.peer(), reason=error.message)
            await _abort_if(error, context)
            raise AssertionError("abort always raises") from error
        try:
            check_rule(principal, method)
        except KedgeError as error:
            self._audit.refused("call refused", method=method, reason=error.message, **who(principal, context))
            await _abort_if(error, context)
        enter(principal)
        return principal

    @contextmanager
    def _under_way(self, principal: Principal, context: Context) -> Iterator[KedgeError | None]:
        """Count the call; gives an error where it is one too many."""
        problem = None
        if self._calls[principal.owner] >= self._most_calls and not principal.trusted:
            problem = LimitError(
                f"{principal.name!r} has {self._most_calls} calls under way, and more are not accepted",
                hint="wait for some of them to end",
            )
            self._audit.refused("too many calls", **who(principal, context))
        self._calls[principal.owner] += 1
        try:
            yield problem
        finally:
            self._calls[principal.owner] -= 1
            if not self._calls[principal.owner]:
                del self._calls[principal.owner]


def _one(deserialize: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return deserialize(raw)
    except DecodeError as error:
        raise ProtocolError("a message that cannot be read") from error


async def _each(deserialize: Callable[[bytes], Any], raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for message in raw:
        yield _one(deserialize, message)


async def _read(read: Callable[[Any], Any], raw: Any, context: Context) -> Any:
    """The request; a stream of them is read as it comes."""
    try:
        return read(raw)
    except ProtocolError as error:
        await _abort_if(error, context)
        raise AssertionError("abort always raises") from error


async def _abort_if(error: KedgeError | None, context: Context) -> None:
    if error is not None:
        code, details, metadata = to_status(error)
        await context.abort(code, details, metadata)


def who(principal: Principal, context: Context) -> dict[str, str]:
    """Whom an audited act is ascribed to."""
    token = {"token": principal.token_id} if principal.token_id else {}
    return {"by": principal.name, "role": principal.role.value, **token, "peer": context.peer()}


def trust(_context: Context) -> Principal:
    """Everybody on this machine is let in: --insecure-loopback."""
    return LOCAL


def by_token(tokens: Tokens) -> Authenticate:
    """Clients have a token each."""

    def authenticate(context: Context) -> Principal:
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if not given:
            raise AuthenticationError(
                "this call came without a token",
                hint="join the tracker first: kedge join '…', or an agent's --join '…'",
            )
        text = given[0] if isinstance(given[0], str) else given[0].decode(errors="replace")
        if len(given) > 1 or not text.startswith(_BEARER):
            raise AuthenticationError("the authorization of this call is no token")
        token = tokens.check(text[len(_BEARER) :])
        return Principal(token.user, token.role, token.id)

    return authenticate


def by_certificate(devices: Devices, now_s: Callable[[], float]) -> Authenticate:
    """Agents have a certificate each, whose chain and purpose TLS has checked."""
    described = lru_cache(1_000)(serial_of)

    def authenticate(context: Context) -> Principal:
        found = context.auth_context()
        names, certificates = found.get("x509_common_name", ()), found.get("x509_pem_cert", ())
        name, pem = next(iter(names), b""), next(iter(certificates), b"")
        if not name or not pem:
            raise AuthenticationError("this call came without a certificate")
        serial, expires_s = described(bytes(pem))
        if now_s() >= expires_s:
            raise AuthenticationError("the certificate of this device has expired", hint="enrol it again: --join '…'")
        devices.check(name.decode(errors="replace"), serial)
        return Principal(name.decode(), Role.AGENT, serial)

    return authenticate
