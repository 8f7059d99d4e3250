"""The service of the agents' streams: translate, tell the shell, translate back."""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kedge.protos.v1 import agent_pb2
from kedge.rpc import convert
from kedge.rpc.errors import KedgeError, PermissionDeniedError
from kedge.rpc.messages import AgentBody, Hello, JobFinished, TrackerBody
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import to_status
from kedge.rpc.tracker.handlers import GONE, to_the_end
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.interceptor import who
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.principal import Principal, caller, owner_of
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.types import Blob, JobResult

log = logging.getLogger("kedge.tracker")
Context = grpc.aio.ServicerContext[Any, Any]

#: What is being written to an agent that leaves has so long to be on its way.
_LAST_WRITE_S = 2.0


class AgentsService:
    """The agents' streams. An agent speaks for the device in its certificate, and for no other."""

    def __init__(self, shell: Shell, owners: Owners, audit: Audit) -> None:
        self._shell = shell
        self._owners = owners
        self._audit = audit

    async def Connect(self, requests: AsyncIterator[agent_pb2.AgentMessage], context: Context) -> None:
        """One agent, from its hello to the end of its stream."""
        try:
            await self._talk(await self._greeted(requests, context), requests, context)
        except KedgeError as error:
            code, details, metadata = to_status(error)
            await context.abort(code, details, metadata)

    async def _greeted(self, requests: AsyncIterator[agent_pb2.AgentMessage], context: Context) -> Hello:
        try:
            hello = convert.agent_message_from_pb(await anext(requests))
        except (StopAsyncIteration, KedgeError) as error:
            raise ProtocolError(f"an agent has to say hello first ({error!r})") from error
        if not isinstance(hello, Hello):
            raise ProtocolError("an agent has to say hello first")
        principal = caller()
        if not principal.trusted and hello.device.name != principal.name:
            self._audit.refused("device refused", device=hello.device.name, **who(principal, context))
            raise PermissionDeniedError(
                f"the certificate is that of {principal.name!r}, and the agent calls itself {hello.device.name!r}",
                hint="start it under the name that it was enrolled with, or enrol it under this one",
            )
        return hello

    async def _talk(self, hello: Hello, requests: AsyncIterator[agent_pb2.AgentMessage], context: Context) -> None:
        out: asyncio.Queue[TrackerBody | None] = asyncio.Queue()
        principal, name = caller(), hello.device.name
        connection = self._shell.agent_connected(hello, out.put_nowait)
        self._audit.write("device connected", device=name, **who(principal, context))
        about = {"device": name}
        log.info("device %s says hello (%s)", name, hello.protocol.software, extra=about)
        listening = asyncio.create_task(self._listen(connection, requests, principal))
        talking = asyncio.create_task(self._speak(out, context))

        async def hang_up() -> None:
            listening.cancel()
            while not out.empty():
                out.get_nowait()
            out.put_nowait(None)
            # gRPC never ends a call whose handler returns in the middle of a write.
            await asyncio.wait([talking], timeout=_LAST_WRITE_S)
            talking.cancel()
            ends = await asyncio.gather(listening, talking, return_exceptions=True)
            self._shell.agent_left(connection)
            self._audit.write("device disconnected", device=name, **who(principal, context))
            log.info("device %s: its connection ended", name, extra=about)
            for end in ends:
                if isinstance(end, KedgeError):
                    log.warning("device %s: %s", name, end, extra=about)
                elif isinstance(end, Exception) and not isinstance(end, GONE):
                    log.error("device %s", name, exc_info=end, extra=about)

        try:
            await asyncio.wait([listening, talking], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await to_the_end(hang_up())

    async def _listen(
        self, connection: int, requests: AsyncIterator[agent_pb2.AgentMessage], principal: Principal
    ) -> None:
        async for message in requests:
            body = convert.agent_message_from_pb(message)
            if isinstance(body, JobFinished) and not principal.trusted:
                body = self._vetted(body, principal)
            if body is not None:
                self._shell.agent_said(connection, body)

    def _vetted(self, finished: JobFinished, principal: Principal) -> AgentBody:
        """A result whose blobs the device has sent itself, open to the job's user from now on.

        Without this, an agent could hand any blob of any user to its job's user by naming it.
        """
        named = {tensor.data.digest for tensor in finished.result.outputs if isinstance(tensor.data, Blob)}
        accepted = self._shell.state.held_under(finished.lease, principal.name) if named else None
        if accepted is None:
            return finished  # there is nothing to vet, or it is stale, and nothing of it is used
        foreign = sorted(digest for digest in named if not self._owners.has(principal, digest))
        if foreign:
            text = f"the device named outputs that it has not sent: {', '.join(foreign[:3])}"
            self._audit.write("result refused", device=principal.name, job=finished.lease.job_id, reason=text)
            return JobFinished(finished.lease, JobResult(Outcome(OutcomeKind.DEVICE_FAULT, message=text)))
        for digest in named:
            self._owners.add(owner_of(accepted.user), digest)
        return finished

    async def _speak(self, out: asyncio.Queue[TrackerBody | None], context: Context) -> None:
        number = 0
        while (body := await out.get()) is not None:
            number += 1
            await context.write(convert.tracker_message_to_pb(body, number))
