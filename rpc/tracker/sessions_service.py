"""The two ends of interactive sessions: what one says is handed to the other, unread, and little of it at a time.

A session is a job, so the state machine decides who gets which device, and when it ends. Here are its streams: the
client's, which is the session's lease, and that of the device's agent.

    client --Attach--> [at most a few frames] --Serve--> agent
           <---------  [at most a few frames] <---------

Whoever does not read holds up the other end through gRPC's flow control, and nobody else.
"""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

import grpc

from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc import convert
from kedge.rpc.errors import KedgeError, PermissionDeniedError
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import to_status
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.grants import Grants
from kedge.rpc.tracker.handlers import GONE, to_the_end
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.interceptor import who
from kedge.rpc.tracker.security.principal import Principal, caller
from kedge.rpc.tracker.session_way import Stream, Way
from kedge.rpc.tracker.shell import Shell, unknown_job
from kedge.rpc.types import Job, JobState, SessionTask

log = logging.getLogger("kedge.tracker")
Context = grpc.aio.ServicerContext[Any, Any]

#: What is being written to an end that leaves has so long to be on its way.
_LAST_WRITE_S = 2.0
#: A client that is done waits so long for its device to be free, no longer.
_END_S = 10.0
#: How often a client's lease is renewed while its device holds up what it says, and for how long at most either holds
#: up the other: a frame of 1 MiB has that time, and a client that has stopped behind one does not keep its device.
_HELD_UP_S = 1.0
_LONGEST_HELD_UP_S = 60.0


class _Relay:
    """What is on its way between the two ends of one session."""

    def __init__(self) -> None:
        self.to_client: Way[pb.ClientEvent] = Way()
        self.to_device: Way[pb.DeviceEvent] = Way()
        #: The stream that the client is at; setting the event has it end in favour of a newer one.
        self.client: asyncio.Event | None = None
        self.has_device = False
        #: Set once a device is there, with what each stream of the client's begins with: from then on it may speak.
        self.begun = asyncio.Event()
        self.ready = pb.ClientEvent()
        #: It has: the stream that it is at is the only one.
        self.spoken = False
        #: The client has read nothing for so long that it is told nothing any more.
        self.deaf = False
        #: The client is there no more, or the job is over: the device has nobody to talk to.
        self.over = asyncio.Event()


class SessionsService:
    """Both ends of all sessions. A session is its user's alone: to others, administrators included, it is not there."""

    def __init__(self, shell: Shell, catalog: Catalog, grants: Grants, audit: Audit) -> None:
        self._shell = shell
        self._catalog = catalog
        self._grants = grants
        self._audit = audit
        self._relays: dict[str, _Relay] = {}

    # ---- The client's end ----

    async def Attach(self, requests: AsyncIterator[pb.ClientFrame], context: Context) -> None:
        """One client, from before it has its device until its session ends."""
        await _told(self._attach(requests, context), context)

    async def _attach(self, requests: AsyncIterator[pb.ClientFrame], context: Context) -> None:
        first = await _first(requests, "attach")
        principal = caller()
        job = await self._session(first.attach.job_id, principal)
        relay = self._relays.setdefault(job.id, _Relay())
        if relay.client is not None:
            if relay.spoken:
                raise PermissionDeniedError(f"session {job.id} has a client already", hint="open a session of your own")
            relay.client.set()  # a client whose connection was cut without a word is there once more
        mine = relay.client = asyncio.Event()
        self._shell.session_heard(job.id)
        self._audit.write("session attached", job=job.id, **who(principal, context))
        try:
            await self._serve_client(job.id, relay, mine, requests, context)
        finally:
            if relay.client is mine:
                relay.client = None
                self._grants.end(job.id)
                # One that still waits may come back, for as long as its lease lasts.
                if relay.begun.is_set():
                    relay.over.set()
                    self._shell.session_left(job.id, "its client went away")
            self._audit.write("session left", job=job.id, **who(principal, context))
            self._tidy(job.id, relay)

    async def _session(self, job_id: str, principal: Principal) -> Job:
        job = await self._shell.job(job_id)
        mine = principal.trusted or job.user == principal.name
        if not mine or not isinstance(job.spec.task, SessionTask):
            raise unknown_job(job_id)
        return job

    async def _serve_client(
        self,
        job_id: str,
        relay: _Relay,
        replaced: asyncio.Event,
        requests: AsyncIterator[pb.ClientFrame],
        context: Context,
    ) -> None:
        changes = self._shell.watch(job_id)
        stream: Stream[pb.ClientEvent] = Stream(context)

        async def speak() -> None:
            await relay.begun.wait()
            await stream.write(relay.ready)
            await relay.to_client.lead_to(stream)

        async def watch() -> None:
            """Until the job is done."""
            job = await self._shell.job(job_id)
            while job.state is not JobState.DONE:
                if job.state is not JobState.RUNNING:
                    await stream.write(pb.ClientEvent(waiting=convert.job_to_pb(job)))
                newer = await changes.get()
                if newer is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the tracker stops")
                else:
                    job = newer
            assert job.result is not None
            ended = pb.SessionEnded(outcome=convert.outcome_to_pb(job.result.outcome))
            await stream.write(pb.ClientEvent(ended=ended))

        watching = asyncio.create_task(watch())
        listening = asyncio.create_task(self._hear_client(job_id, relay, requests))
        speaking = asyncio.create_task(speak())
        tasks = (watching, listening, speaking, stream.broken, asyncio.create_task(replaced.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if listening.done() and not listening.cancelled() and listening.exception() is None and listening.result():
                await asyncio.wait([watching], timeout=_END_S)
        finally:
            self._shell.unwatch(job_id, changes)
            await to_the_end(_settle(tasks, stream))
        if replaced.is_set():
            raise PermissionDeniedError(f"the client of session {job_id} came back on another connection")
        for task in (listening, watching, speaking, stream.broken):
            if task.done() and not task.cancelled() and task.exception() is not None:
                _raise(task.exception())

    async def _hear_client(self, job_id: str, relay: _Relay, requests: AsyncIterator[pb.ClientFrame]) -> bool:
        """Hand on what the client says, to the end of its stream; whether it said that it is done."""
        principal = caller()
        async for frame in requests:
            self._shell.session_heard(job_id)
            said = frame.WhichOneof("body")
            relay.spoken |= said != "renew"
            if said == "data":
                if not relay.begun.is_set():
                    raise ProtocolError("a session's client said something before its device was there")
                await self._hand_over(job_id, relay, pb.DeviceEvent(data=frame.data))
            elif said == "grant":
                await relay.to_client.put(pb.ClientEvent(granted=await self._grant(job_id, frame.grant, principal)))
            elif said == "withdraw":
                self._grants.withdraw(job_id, frame.withdraw.manifest.digest)
            elif said == "close":
                await self._hand_over(job_id, relay, pb.DeviceEvent(close=frame.close))
                if not relay.has_device:
                    self._shell.session_left(job_id, "its client gave up waiting")
                return True
            elif said != "renew":
                raise ProtocolError(f"a session's client said {said or 'nothing'}")
        return False

    async def _hand_over(self, job_id: str, relay: _Relay, event: pb.DeviceEvent) -> None:
        """Hand an event on. While the device does not take it, the client's lease is not its own to renew."""
        if relay.to_device.put_nowait(event):
            return
        putting = asyncio.ensure_future(relay.to_device.put(event))
        try:
            held_up_s = 0.0
            while not (await asyncio.wait([putting], timeout=_HELD_UP_S))[0]:
                held_up_s += _HELD_UP_S
                if held_up_s <= _LONGEST_HELD_UP_S:
                    self._shell.session_heard(job_id)
        finally:
            putting.cancel()

    async def _grant(self, job_id: str, grant: pb.GrantArtifact, principal: Principal) -> pb.ArtifactGranted:
        manifest = convert.blob_from_pb(grant.manifest)
        try:
            self._grants.add(job_id, manifest.digest, await self._catalog.members_for(manifest, principal))
        except KedgeError as error:
            return pb.ArtifactGranted(problem=error.message or "refused", hint=error.hint or "")
        by = {"by": principal.name, "role": principal.role.value}
        self._audit.write("artifact granted", job=job_id, artifact=manifest.digest, **by)
        return pb.ArtifactGranted()

    # ---- The device's end ----

    async def Serve(self, requests: AsyncIterator[pb.DeviceFrame], context: Context) -> None:
        """The agent that has the session's job, until the session ends."""
        await _told(self._serve(requests, context), context)

    async def _serve(self, requests: AsyncIterator[pb.DeviceFrame], context: Context) -> None:
        first = await _first(requests, "serve")
        lease, principal = convert.lease_from_pb(first.serve), caller()
        held = self._shell.state.session_of(lease.job_id, lease.epoch)
        if held is None or (not principal.trusted and held[0] != principal.name):
            raise PermissionDeniedError("this device holds no such session")
        relay = self._relays.setdefault(lease.job_id, _Relay())
        if relay.has_device:
            raise PermissionDeniedError("this session has its device already")
        relay.has_device = True
        ended_itself = False
        try:
            ended_itself = await self._serve_device(held[0], relay, requests, context, lease.job_id, lease.epoch)
        finally:
            if not ended_itself:
                why = f"device {held[0]} was lost in the middle of the session"
                self._shell.session_broke(lease.job_id, lease.epoch, why)
            relay.has_device = False
            self._tidy(lease.job_id, relay)

    async def _serve_device(
        self,
        device: str,
        relay: _Relay,
        requests: AsyncIterator[pb.DeviceFrame],
        context: Context,
        job_id: str,
        epoch: int,
    ) -> bool:
        """Until one side ends it; whether that was done in order."""
        info = self._shell.state.device(device).info
        self._shell.session_begins(job_id, epoch)
        relay.ready = pb.ClientEvent(ready=pb.SessionReady(device=convert.device_info_to_pb(info)))
        relay.begun.set()
        stream: Stream[pb.DeviceEvent] = Stream(context)

        async def listen() -> bool:
            async for frame in requests:
                said = frame.WhichOneof("body")
                if said == "done":
                    return True
                if said != "data":
                    raise ProtocolError(f"a session's device said {said or 'nothing'}")
                await self._tell_client(job_id, relay, pb.ClientEvent(data=frame.data))
            return False

        listening = asyncio.create_task(listen())
        speaking = asyncio.create_task(relay.to_device.lead_to(stream))
        tasks = (listening, speaking, stream.broken, asyncio.create_task(relay.over.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await to_the_end(_settle(tasks, stream))
        for task in tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                _raise(task.exception())
        in_order = listening.done() and not listening.cancelled() and listening.exception() is None
        return relay.over.is_set() or (in_order and listening.result())

    async def _tell_client(self, job_id: str, relay: _Relay, event: pb.ClientEvent) -> None:
        """Hand on what the device says. A client that reads nothing for long has no use for its device."""
        if relay.deaf:
            return
        if relay.to_client.put_nowait(event):
            return
        try:
            async with asyncio.timeout(_LONGEST_HELD_UP_S):
                await relay.to_client.put(event)
        except TimeoutError:
            relay.deaf = True
            why = f"its client read nothing of what its device said for {_LONGEST_HELD_UP_S:g} s"
            self._shell.session_left(job_id, why)

    def _tidy(self, job_id: str, relay: _Relay) -> None:
        if relay.client is None and not relay.has_device and self._relays.get(job_id) is relay:
            del self._relays[job_id]


async def _told(handling: Coroutine[Any, Any, None], context: Context) -> None:
    """What a handler raises on purpose arrives at the other end as what it is."""
    try:
        await handling
    except KedgeError as error:
        code, details, metadata = to_status(error)
        await context.abort(code, details, metadata)


async def _first(requests: AsyncIterator[Any], wanted: str) -> Any:
    try:
        frame = await anext(requests)
    except StopAsyncIteration as error:
        raise ProtocolError(f"a session's stream begins with {wanted!r}") from error
    if frame.WhichOneof("body") != wanted:
        raise ProtocolError(f"a session's stream begins with {wanted!r}")
    return frame


async def _settle(tasks: Iterable[asyncio.Future[Any]], stream: Stream[Any]) -> None:
    """End what still goes on. gRPC never ends a call whose handler returns in the middle of a write."""
    await stream.settle(_LAST_WRITE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _raise(error: BaseException | None) -> None:
    """An end that vanished is no error of the tracker's: the state machine knows what it means."""
    if error is not None and not isinstance(error, (*GONE, grpc.RpcError, asyncio.InvalidStateError)):
        raise error
