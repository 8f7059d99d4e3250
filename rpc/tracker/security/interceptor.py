"""What stands before every handler: who calls, may they, have they too much under way already, can it be read at all.

Messages are taken off the wire only after their sender was admitted: no stranger gets to fill the memory, or to feed
the parser. What is in them is bounded (`kedge.rpc.bounds`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kedge.protos.v1.agent_pb2 import AgentMessage
from kedge.rpc import convert
from kedge.rpc.bounds import TEXT, check
from kedge.rpc.errors import AuthenticationError, KedgeError, LimitError
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import Metadata, TrackerAwayError, to_status
from kedge.rpc.tracker.handlers import GONE, ONLY_S, first_of
from kedge.rpc.tracker.relayed import AGENTS_PORT_KEY, CERTIFICATE_KEY, PEER_KEY
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.ca import PEER_NAME, described
from kedge.rpc.tracker.security.devices import Devices
from kedge.rpc.tracker.security.principal import LOCAL, Principal, Role, check_rule, enter
from kedge.rpc.tracker.security.tokens import Tokens
from kedge.rpc.types import JobResult

Context = grpc.aio.ServicerContext[Any, Any]
#: Says who makes a call; raises AuthenticationError.
Authenticate = Callable[[Context], Principal]

log = logging.getLogger("kedge.tracker")

_AUTHORIZATION = "authorization"
_BEARER = "Bearer "


@dataclass(slots=True, eq=False)
class _Call:
    """One call that is under way; `ended` says why it must not go on."""

    principal: Principal
    task: asyncio.Task[Any]
    #: While what it sends is on its way, its task is gRPC's own.
    inside: bool = True
    ended: KedgeError | None = None

    def end(self, error: KedgeError) -> None:
        """Stop it, at its next message at the latest."""
        self.ended = error
        if self.inside:
            self.task.cancel()


#: Takes what is said in a call: the message of one that has one, or an iterator.
_Read = Callable[[AsyncIterator[bytes], _Call], Awaitable[Any]]


async def _abort(context: Context, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
    try:
        await context.abort(code, details, metadata)
    except grpc.aio.UsageError:
        # The handler was about to end the call in words of its own when it was ended: those are on their way.
        raise asyncio.CancelledError from None


class Gate(grpc.aio.ServerInterceptor):
    """Admits calls, one gate per listener. `most_calls` is how many one principal may have under way."""

    def __init__(
        self, authenticate: Authenticate, audit: Audit, most_calls: int, now_s: Callable[[], float] = time.time
    ) -> None:
        self._authenticate = authenticate
        self._audit = audit
        self._most_calls = most_calls
        self._now_s = now_s
        self._calls: dict[str, set[_Call]] = defaultdict(set)

    def end(self, owner: str, token_id: str, error: KedgeError) -> None:
        """End what a principal has under way, by this token or (empty) by any; but not the call that asks for it."""
        for call in list(self._calls.get(owner, ())):
            if token_id in ("", call.principal.token_id) and call.task is not asyncio.current_task():
                call.end(error)

    def close(self, error: KedgeError) -> None:
        """End whatever is under way with this."""
        for calls in list(self._calls.values()):
            for call in list(calls):
                call.end(error)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler with the gate before it.

        For gRPC every call streams its messages: of others it reads the one that they have, however large it is and
        however long it takes, before anybody is asked who sends it.
        """
        handler: Any = await continuation(details)
        if handler is None:
            return None
        found = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        inner = next(each for each in found if each is not None)
        read = partial(_each if handler.request_streaming else _only, handler.request_deserializer)
        streams = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return make(self._guarded(details.method, inner, read), None, handler.response_serializer)

    def _guarded(self, method: str, inner: Callable[[Any, Context], Any], read: _Read) -> Callable[[Any, Context], Any]:
        if inspect.isasyncgenfunction(inner):

            async def stream(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
                async with self._passed(method, context) as under_way:
                    async for response in inner(await read(messages, under_way), context):
                        under_way.inside = False
                        yield response
                        under_way.inside = True
                        if under_way.ended is not None:
                            raise under_way.ended

            return stream

        async def call(messages: AsyncIterator[bytes], context: Context) -> Any:
            async with self._passed(method, context) as under_way:
                return await inner(await read(messages, under_way), context)

        return call

    @asynccontextmanager
    async def _passed(self, method: str, context: Context) -> AsyncIterator[_Call]:
        """Let a call through; what goes wrong inside is what it ends with, and says nothing of the tracker's inside."""
        try:
            principal = self._admit(method, context)
            task = asyncio.current_task()
            assert task is not None
            call = _Call(principal, task)
            calls = self._calls[principal.owner]
            calls.add(call)
            timer = None
            if principal.expires_s:
                error = AuthenticationError("the token or certificate of this call has expired meanwhile")
                left_s = max(0.0, principal.expires_s - self._now_s())
                timer = asyncio.get_running_loop().call_later(left_s, call.end, error)
            try:
                yield call
            except asyncio.CancelledError:
                if call.ended is None:
                    raise
                task.uncancel()
                raise call.ended from None
            finally:
                if timer is not None:
                    timer.cancel()
                calls.discard(call)
                if not calls:
                    self._calls.pop(principal.owner, None)
        except KedgeError as error:
            await _abort(context, *to_status(error))
        except (grpc.aio.AbortError, *GONE):
            raise
        except Exception:
            log.exception("%s failed", method)
            await _abort(context, grpc.StatusCode.INTERNAL, "the tracker failed; its log says how")

    def _admit(self, method: str, context: Context) -> Principal:
        try:
            principal = self._authenticate(context)
        except AuthenticationError as error:
            self._audit.refused("call refused", method=method, peer=context.peer(), reason=error.message)
            raise
        try:
            check_rule(principal, method)
            if len(self._calls.get(principal.owner, ())) >= self._most_calls and not principal.trusted:
                raise LimitError(
                    f"{principal.name!r} has {self._most_calls} calls under way, and more are not accepted",
                    hint="wait for some of them to end",
                )
        except KedgeError as error:
            self._audit.refused("call refused", method=method, reason=error.message, **who(principal, context))
            raise
        enter(principal)
        return principal


async def _only(deserialize: Callable[[bytes], Any], messages: AsyncIterator[bytes], _: _Call) -> Any:
    """The message of a call that has one."""
    message = await first_of(messages, ONLY_S)
    if message is None:
        raise ProtocolError("a call without a message")
    return _one(deserialize, message)


async def _each(deserialize: Callable[[bytes], Any], messages: AsyncIterator[bytes], call: _Call) -> AsyncIterator[Any]:
    """The messages of a call that may have many, none of them once it must not go on: it may be held up in saying
    something to a caller that does not read."""

    async def read() -> AsyncIterator[Any]:
        first = await first_of(messages)
        if first is not None:
            yield _one(deserialize, first)
            async for message in messages:
                if call.ended is not None:
                    raise call.ended
                yield _one(deserialize, message)

    return read()


def _one(deserialize: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        message = deserialize(raw)
    except DecodeError as error:
        raise ProtocolError("a message that cannot be read") from error
    try:
        check(message)
    except KedgeError as error:
        if not isinstance(message, AgentMessage) or message.WhichOneof("body") != "job_finished":
            raise
        _put_refusal(message, error)
    return message


def _put_refusal(message: AgentMessage, error: KedgeError) -> None:
    """In place of a result why it is not taken: its agent brings it on every connection until it was accepted."""
    log.warning("job %s: its result is refused: %s", message.job_finished.lease.job_id[:TEXT], error.message)
    why = f"the result of this job is not accepted: {error.message}"
    refusal = JobResult(Outcome(OutcomeKind.BAD_REQUEST, message=why))
    message.job_finished.result.CopyFrom(convert.job_result_to_pb(refusal))
    check(message)


def who(principal: Principal, context: Context) -> dict[str, str]:
    """Whom an audited act is ascribed to."""
    token = {"token": principal.token_id} if principal.token_id else {}
    by = {"by": principal.name, "role": principal.role.value, **token}
    said = dict(context.invocation_metadata() or ()) if _is_peer(context) else {}
    if PEER_KEY in said:
        return {**by, "peer": str(said[PEER_KEY]), "through": context.peer()}
    return {**by, "peer": context.peer()}


def agents_port_of(context: Context, own: int) -> int:
    """Where the tracker that a caller talks to serves agents: `own`, or that of the tracker that relays the call."""
    said = dict(context.invocation_metadata() or ()) if _is_peer(context) else {}
    return int(said[AGENTS_PORT_KEY]) if AGENTS_PORT_KEY in said else own


def _is_peer(context: Context) -> bool:
    """Whether another tracker makes the call: what it says of the caller is true."""
    return next(iter(context.auth_context().get("x509_common_name", ())), b"") == PEER_NAME.encode()


def trust(_context: Context) -> Principal:
    """Everybody on this machine is let in: --insecure-loopback."""
    return LOCAL


def by_token(tokens: Tokens) -> Authenticate:
    """Clients have a token each."""

    def authenticate(context: Context) -> Principal:
        given = [value for key, value in context.invocation_metadata() or () if key == _AUTHORIZATION]
        if not given:
            raise AuthenticationError(
                "this call came without a token",
                hint="join the tracker first: kedge join '…', or an agent's --join '…'",
            )
        text = given[0] if isinstance(given[0], str) else given[0].decode(errors="replace")
        if len(given) > 1 or not text.startswith(_BEARER):
            raise AuthenticationError("the authorization of this call is no token")
        token = tokens.check(text[len(_BEARER) :])
        return Principal(token.user, token.role, token.id, expires_s=token.expires_s)

    return authenticate


def by_certificate(devices: Devices, now_s: Callable[[], float]) -> Authenticate:
    """Agents have a certificate each, whose chain and purpose TLS has checked."""
    known = _Certificates(devices, now_s)

    def authenticate(context: Context) -> Principal:
        certificates = context.auth_context().get("x509_pem_cert", ())
        pem = next(iter(certificates), b"")
        if not pem:
            raise AuthenticationError("this call came without a certificate")
        return known.principal(bytes(pem))

    return authenticate


def by_peer(tokens: Tokens | None, devices: Devices | None, now_s: Callable[[], float]) -> Authenticate:
    """Another tracker, whose certificate TLS has checked: for a client or a device that came to it, or for itself.

    Without `tokens` and `devices`, of a tracker that does not lead, it speaks only for itself.
    """
    known = None if devices is None else _Certificates(devices, now_s)
    client = None if tokens is None else by_token(tokens)

    def authenticate(context: Context) -> Principal:
        if not _is_peer(context):
            raise AuthenticationError("only the fleet's other trackers are served here")
        said = dict(context.invocation_metadata() or ())
        if not {CERTIFICATE_KEY, _AUTHORIZATION, PEER_KEY} & said.keys():
            return Principal("tracker", Role.PEER)
        if known is None or client is None:
            raise TrackerAwayError("this tracker does not lead any more")
        pem = said.get(CERTIFICATE_KEY)
        return known.principal(pem) if isinstance(pem, bytes) else client(context)

    return authenticate


class _Certificates:
    """Who the holders of certificates are, which this fleet's authority has signed."""

    def __init__(self, devices: Devices, now_s: Callable[[], float]) -> None:
        self._devices = devices
        self._now_s = now_s
        self._described = lru_cache(1_000)(described)

    def principal(self, pem: bytes) -> Principal:
        """The device; raises AuthenticationError where its certificate is not good any more."""
        name, serial, expires_s = self._described(pem)
        if self._now_s() >= expires_s:
            raise AuthenticationError("the certificate of this device has expired", hint="enrol it again: --join '…'")
        self._devices.check(name, serial)
        return Principal(name, Role.AGENT, serial, expires_s=expires_s)
