"""The three gRPC services, thin: translate, ask the shell or the blob store, translate back."""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc

from kedge.protos.v1 import agent_pb2, blobs_pb2, fleet_pb2, types_pb2
from kedge.rpc import convert
from kedge.rpc.blobs import BlobError, BlobWriter, CorruptBlobError, MissingBlobError
from kedge.rpc.errors import KedgeError, LimitError, PermissionDeniedError
from kedge.rpc.limits import MAX_PRIORITY, check_noise, check_number
from kedge.rpc.messages import AgentBody, Hello, JobFinished, TrackerBody
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import ProtocolError, check_peer, local_protocol
from kedge.rpc.status import TrackerAwayError, UnknownReservationError, to_status
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.brief import without_inputs
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.facts import JobAccepted
from kedge.rpc.tracker.fleetmates import ALONE, Fleetmates
from kedge.rpc.tracker.handlers import GONE, to_the_end, typed_errors, typed_stream_errors
from kedge.rpc.tracker.observer import SILENT, Observer
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.interceptor import who
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.principal import Principal, Role, caller, owner_of
from kedge.rpc.tracker.sessions import Grants
from kedge.rpc.tracker.shell import Shell, unknown_job
from kedge.rpc.transport import CHUNK_BYTES
from kedge.rpc.types import MAX_LISTED, Blob, DeviceStatus, Job, JobResult, JobState, TrackerStatus

log = logging.getLogger("kedge.tracker")
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

#: What is being written to an agent that leaves has so long to be on its way.
_LAST_WRITE_S = 2.0
#: The next chunk of an upload has so long: on the slowest of links it takes as long. Until then there is room for all
#: that was announced.
_CHUNK_S = 60.0
#: Chunks of one upload that may wait in memory for the disk.
_GATHERED_CHUNKS = 8
_MAX_WAIT_MS = 60_000


class FleetService:
    """What clients ask. Others' jobs do not exist, for those who are no administrators."""

    def __init__(self, shell: Shell, catalog: Catalog, audit: Audit, data_dir: Path, mates: Fleetmates = ALONE) -> None:
        self._shell = shell
        self._mates = mates
        self._data_dir = data_dir
        self._catalog = catalog
        self._audit = audit

    @typed_errors
    async def Hello(self, request: fleet_pb2.HelloRequest, _context: Context) -> fleet_pb2.HelloResponse:
        """Exchange protocol versions."""
        check_peer(convert.protocol_from_pb(request.protocol), "the client")
        ours = convert.protocol_to_pb(local_protocol())
        return fleet_pb2.HelloResponse(protocol=ours, tracker_id=self._shell.tracker_id)

    @typed_errors
    async def Status(self, _request: fleet_pb2.StatusRequest, _context: Context) -> fleet_pb2.StatusResponse:
        """How the tracker is, and who asks."""
        principal = caller()
        status = TrackerStatus(
            protocol=local_protocol(),
            unix_ms=self._shell.now_ms,
            user=principal.name,
            role=principal.role.value,
            expires_unix_s=principal.expires_s,
            store_problem=self._shell.store_problem or "",
            disk_free_bytes=shutil.disk_usage(self._data_dir).free,
            agents=self._shell.state.agents(),
            epoch=self._mates.epoch,
            trackers=self._mates.members,
        )
        return convert.tracker_status_to_pb(status)

    @typed_errors
    async def ListDevices(
        self, request: fleet_pb2.ListDevicesRequest, _context: Context
    ) -> fleet_pb2.ListDevicesResponse:
        """Devices by selector, waiting for the first if asked to."""
        wait_s = max(0, min(request.wait_ms, _MAX_WAIT_MS)) / 1000
        found = await self._shell.devices(request.selector, request.include_gone, wait_s)
        return fleet_pb2.ListDevicesResponse(devices=[convert.device_status_to_pb(self._seen(each)) for each in found])

    @typed_errors
    async def SubmitJob(self, request: fleet_pb2.SubmitJobRequest, context: Context) -> fleet_pb2.SubmitJobResponse:
        """Accept a job whose artifact and inputs the caller has sent already."""
        job_id, existed = await self._accept(request, context)
        job = await self._shell.job(job_id)
        return fleet_pb2.SubmitJobResponse(job=convert.job_to_pb(without_inputs(job)), existed=existed)

    @typed_stream_errors
    async def RunJob(
        self, request: fleet_pb2.SubmitJobRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.RunJobResponse]:
        """Accept a job, and say what came of it."""
        job_id, _ = await self._accept(request, context)
        yield fleet_pb2.RunJobResponse(job_id=job_id)
        result = await self._shell.result(job_id)
        if result is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the tracker stops")
        else:
            yield fleet_pb2.RunJobResponse(result=convert.job_result_to_pb(result))

    async def _accept(self, request: fleet_pb2.SubmitJobRequest, context: Context) -> tuple[str, bool]:
        """The id of a job that is stored, and whether it was before."""
        principal = caller()
        spec = convert.job_spec_from_pb(request.spec)
        _check_priority(spec.priority, principal)
        await self._mates.fetch(self._catalog.named_by(spec, principal))
        needs = await self._catalog.check(spec, principal)
        if not self._shell.state.may_carry(spec, principal.name):
            spec = await self._catalog.store_inputs(spec, principal)
        await self._mates.ensure(self._catalog.digests_of(spec))
        key = request.idempotency_key
        if key and not principal.trusted:
            key = f"{principal.name}/{key}"  # one user's keys say nothing of another's jobs
        job_id, existed = await self._shell.submit(spec, needs, key, principal.name)
        if not existed:
            signer = spec.signature.public_key.hex() if spec.signature is not None else ""
            said = {"job": job_id, "artifact": spec.manifest.digest, "selector": spec.selector, "signer": signer}
            self._audit.write("job submitted", **said, **who(principal, context))
        return job_id, existed

    @typed_stream_errors
    async def WatchJob(self, request: fleet_pb2.WatchJobRequest, context: Context) -> AsyncIterator[types_pb2.Job]:
        """The job now, and on every change until it is done."""
        changes = self._shell.watch(request.job_id)
        try:
            job = await self._own_job(request.job_id)
            yield convert.job_to_pb(without_inputs(job))
            while job.state is not JobState.DONE:
                newer = await changes.get()
                if newer is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the tracker stops")
                elif newer != job:
                    job = newer
                    yield convert.job_to_pb(without_inputs(job))
        finally:
            self._shell.unwatch(request.job_id, changes)

    @typed_errors
    async def GetJob(self, request: fleet_pb2.GetJobRequest, _context: Context) -> types_pb2.Job:
        """The job now."""
        return convert.job_to_pb(await self._own_job(request.job_id))

    @typed_errors
    async def ListJobs(self, request: fleet_pb2.ListJobsRequest, _context: Context) -> fleet_pb2.ListJobsResponse:
        """The newest or oldest jobs in brief, of those that are asked for."""
        states = tuple(convert.job_state_from_pb(state) for state in request.states)
        whose = None if caller().sees_all else caller().name
        limit = max(1, min(request.limit or 100, MAX_LISTED))
        wanted = convert.job_filter_from_pb(request)
        response = fleet_pb2.ListJobsResponse(filtered=True)
        async for page in self._shell.jobs(limit, states, whose, oldest_first=request.oldest_first, wanted=wanted):
            response.jobs.extend(convert.job_to_pb(job) for job in page)
        return response

    @typed_errors
    async def CancelJob(self, request: fleet_pb2.CancelJobRequest, context: Context) -> types_pb2.Job:
        """Stop a job."""
        await self._own_job(request.job_id)
        job, stops = await self._shell.cancel(request.job_id, "a client cancelled it")
        if stops:
            self._audit.write("job cancelled", job=job.id, user=job.user, **who(caller(), context))
        return convert.job_to_pb(job)

    @typed_errors
    async def SetMaintenance(
        self, request: fleet_pb2.SetMaintenanceRequest, context: Context
    ) -> types_pb2.DeviceStatus:
        """A device leaves service, or comes back."""
        name = caller().name
        status = await self._shell.set_maintenance(request.device, request.enabled, request.reason, name)
        said = {"device": request.device, "enabled": request.enabled, "reason": request.reason}
        self._audit.write("maintenance", **said, **who(caller(), context))
        return convert.device_status_to_pb(status)

    @typed_errors
    async def Reserve(self, request: fleet_pb2.ReserveRequest, context: Context) -> types_pb2.Reservation:
        """A device for one user."""
        wanted = (request.selector, caller().name, request.from_unix_ms, request.duration_ms, request.reason)
        reservation = await self._shell.reserve(*wanted, shares=not caller().sees_all)
        said = {"device": reservation.device, "reservation": reservation.id, "until_ms": reservation.until_unix_ms}
        self._audit.write("device reserved", **said, **who(caller(), context))
        return convert.reservation_to_pb(reservation)

    @typed_errors
    async def EndReservation(self, request: fleet_pb2.EndReservationRequest, context: Context) -> types_pb2.Reservation:
        """A device for everybody again."""
        reservation = self._shell.state.reservation(request.id)
        if reservation is None or not caller().may_see(reservation.user):
            hint = "'kedge devices --gone' shows them"
            raise UnknownReservationError(f"there is no reservation {request.id!r}", hint=hint)
        await self._shell.end_reservation(request.id)
        self._audit.write("reservation ended", reservation=request.id, **who(caller(), context))
        return convert.reservation_to_pb(reservation)

    @typed_errors
    async def KeepNoise(self, request: fleet_pb2.KeepNoiseRequest, context: Context) -> types_pb2.DeviceStatus:
        """How noisy a device is, as one of its users found."""
        check_noise(request.relative, request.num_threads, request.on)
        check_number("the length of the id", len(request.id), 1, 64, "a number that the client draws")
        # One user's numbers say nothing of another's.
        user = caller().name
        number = f"{user}/{request.id}"
        measured = (request.relative, request.num_threads, request.on)
        status = await self._shell.keep_noise(number, request.device, user, *measured)
        said = {"device": request.device, "relative": request.relative}
        self._audit.write("noise kept", **said, **who(caller(), context))
        return convert.device_status_to_pb(self._seen(status))

    def _seen(self, status: DeviceStatus) -> DeviceStatus:
        """A device without the number of another's job that it runs."""
        job = self._shell.state.job(status.running_job_id) if status.running_job_id else None
        return status if job is None or caller().may_see(job.user) else replace(status, running_job_id="")

    async def _own_job(self, job_id: str) -> Job:
        """A job that is open to the caller; for another's, the error is that of a job that does not exist."""
        job = await self._shell.job(job_id)
        if not caller().may_see(job.user):
            raise unknown_job(job_id)
        return job


def _check_priority(priority: int, principal: Principal) -> None:
    """Priority is strict: with one above all others' a user would have every device, however fair the shares."""
    if principal.role is not Role.ADMIN:
        hint = "less than 0 lets your other jobs and everybody's go first; more than 0 is for administrators"
        check_number("priority", priority, -MAX_PRIORITY, 0, hint)


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


class BlobsService:
    """Uploads and downloads. Files are touched in threads of their own.

    A blob is open to whoever has sent it, to the user whose job it came of, and to a device that holds a job which
    needs it. To everybody else it is not there. One that another tracker of the fleet has is fetched from there.

    `held_by` tells the jobs that a device has.
    """

    def __init__(
        self,
        held_by: Callable[[str], Mapping[Any, JobAccepted]],
        blobs: TrackerBlobs,
        catalog: Catalog,
        owners: Owners,
        grants: Grants,
        threads: ThreadPoolExecutor,
        max_bytes: int,
        observer: Observer = SILENT,
        mates: Fleetmates = ALONE,
    ) -> None:
        self._held_by = held_by
        self._mates = mates
        self._blobs = blobs
        self._catalog = catalog
        self._owners = owners
        self._grants = grants
        self._threads = threads
        self._max_bytes = max_bytes
        self._observer = observer

    @typed_errors
    async def FindMissing(
        self, request: blobs_pb2.FindMissingRequest, _context: Context
    ) -> blobs_pb2.FindMissingResponse:
        """Which of these are not here, or not the caller's."""
        asked = [convert.blob_from_pb(pb) for pb in request.blobs]
        principal = caller()
        if principal.role is not Role.PEER:
            await self._mates.fetch(await self._in_thread(self._owned, asked, principal))
        missing = await self._in_thread(self._catalog.missing, asked, principal)
        self._observer.looked_up(len(set(asked)) - len(missing), len(missing))
        return blobs_pb2.FindMissingResponse(missing=[convert.blob_to_pb(blob) for blob in missing])

    def _owned(self, blobs: Sequence[Blob], principal: Principal) -> list[Blob]:
        return [blob for blob in blobs if self._owners.has(principal, blob.digest)]

    @typed_errors
    async def QueryUpload(
        self, request: blobs_pb2.QueryUploadRequest, _context: Context
    ) -> blobs_pb2.QueryUploadResponse:
        """How much of an upload is here."""
        blob, principal = convert.blob_from_pb(request.blob), caller()
        if not await self._in_thread(self._catalog.missing, [blob], principal):
            return blobs_pb2.QueryUploadResponse(committed_bytes=blob.size, complete=True)
        committed = await self._in_thread(self._blobs.unfinished_bytes, blob, principal.tag)
        return blobs_pb2.QueryUploadResponse(committed_bytes=committed, complete=False)

    @typed_errors
    async def Upload(
        self, requests: AsyncIterator[blobs_pb2.UploadRequest], _context: Context
    ) -> blobs_pb2.UploadResponse:
        """One blob; while some chunks are hashed and written, the next ones gather."""
        principal = caller()
        if principal.role is Role.AGENT and not self._held_by(principal.name):
            raise PermissionDeniedError("a device sends blobs only while it holds a job")
        try:
            first = await anext(requests)
        except StopAsyncIteration:
            raise BlobError("an upload without a message") from None
        blob = convert.blob_from_pb(first.blob)
        if blob.size > self._max_bytes:
            raise LimitError(f"a blob of {blob.size} bytes is not accepted: at most {self._max_bytes}")
        held = ExitStack()

        def begin() -> BlobWriter:
            held.enter_context(self._catalog.allowance.upload(principal, blob))
            return held.enter_context(self._blobs.begin(blob, first.offset_bytes, principal.tag))

        begun = self._threads.submit(begin)
        try:
            writer = await asyncio.wrap_future(begun)
            await self._receive(writer, first.data, requests)
            if principal.role is not Role.PEER:
                await self._mates.copy(blob)
                if not principal.trusted:
                    self._owners.add(principal.owner, blob.digest)
                    await self._in_thread(self._owners.settle)
        finally:
            # A call may be broken off while a thread works for it: the writer is closed all the same, and after that.
            await asyncio.shield(self._start(_end, begun, held))
        self._observer.uploaded(writer.size - first.offset_bytes)
        return blobs_pb2.UploadResponse(committed_bytes=writer.size)

    def _open_to(self, principal: Principal, digest: str) -> bool:
        if self._owners.has(principal, digest):
            return True
        held = self._held_by(principal.name) if principal.role is Role.AGENT else {}
        return any(
            self._grants.allow(accepted.job_id, digest) or digest in self._catalog.digests_of(accepted.spec)
            for accepted in held.values()
        )

    async def _receive(
        self, writer: BlobWriter, first: bytes, requests: AsyncIterator[blobs_pb2.UploadRequest]
    ) -> None:
        gathered = [first] if first else []
        writing: asyncio.Future[None] = self._start(_append, writer, ())
        try:
            async for request in _unbroken(requests):
                gathered.append(request.data)
                if writing.done() or len(gathered) >= _GATHERED_CHUNKS:
                    await writing
                    writing = self._start(_append, writer, gathered)
                    gathered = []
            await writing
            await self._in_thread(_append, writer, gathered)
            await self._in_thread(writer.commit)
        finally:
            await asyncio.wait([writing])

    @typed_stream_errors
    async def Download(
        self, request: blobs_pb2.DownloadRequest, _context: Context
    ) -> AsyncIterator[blobs_pb2.DownloadResponse]:
        """One blob from an offset on; while a chunk is sent, the next one is read.

        A whole blob is verified. One that the disk has damaged is forgotten: whoever has it may upload it again.
        """
        blob = convert.blob_from_pb(request.blob)
        if not self._open_to(caller(), blob.digest):
            raise MissingBlobError(f"blob {blob.digest} of {blob.size} bytes is not on the tracker")
        heard_all = caller().role is Role.PEER or await self._mates.fetch([blob])
        if not self._blobs.has(blob):
            if not heard_all:
                raise TrackerAwayError(f"blob {blob.digest} is not here, and a tracker that may have it is silent")
            raise MissingBlobError(f"blob {blob.digest} of {blob.size} bytes is not on the tracker")
        check_number("offset_bytes", request.offset_bytes, 0, blob.size, "0 is the beginning of the blob")
        with self._blobs.open(blob.digest) as file:
            file.seek(request.offset_bytes)
            digest = hashlib.sha256()

            def read() -> bytes:
                data = file.read(CHUNK_BYTES)
                digest.update(data)
                return data

            reading = self._start(read)
            try:
                while data := await reading:
                    reading = self._start(read)
                    yield blobs_pb2.DownloadResponse(data=data)
                    self._observer.downloaded(len(data))
            finally:
                await asyncio.wait([reading])
        if request.offset_bytes == 0 and digest.hexdigest() != blob.digest:
            self._blobs.discard(blob.digest)
            raise CorruptBlobError(f"blob {blob.digest} was damaged on the tracker's disk", hint="upload it again")

    def _start(self, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._start(work, *arguments)


async def _unbroken(requests: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same chunks; raises TrackerAwayError, upon which a client goes on with its upload, where none comes."""
    while True:
        try:
            async with asyncio.timeout(_CHUNK_S):
                request = await anext(requests)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise TrackerAwayError(f"the tracker ends an upload of which nothing came for {_CHUNK_S:g} s") from error
        yield request


def _end(begun: Future[BlobWriter], held: ExitStack) -> None:
    """Wait until the writer is there, or not, and close what was opened for it."""
    wait([begun])
    held.close()


def _append(writer: BlobWriter, chunks: Sequence[bytes]) -> None:
    for chunk in chunks:
        writer.append(chunk)
