"""The three gRPC services, thin: translate, ask the shell or the blob store, translate back."""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from kedge.protos.v1 import agent_pb2, blobs_pb2, fleet_pb2, types_pb2
from kedge.rpc import convert
from kedge.rpc.artifact import Manifest, needs_of
from kedge.rpc.blobs import BlobError, BlobStore, BlobWriter, CorruptBlobError, MissingBlobError
from kedge.rpc.errors import ArtifactError, InputError, KedgeError
from kedge.rpc.limits import check_number, check_spec
from kedge.rpc.messages import Hello, TrackerBody
from kedge.rpc.protocol import ProtocolError, check_peer, local_protocol
from kedge.rpc.selector import parse
from kedge.rpc.status import NotReadyError, UnknownReservationError, to_status
from kedge.rpc.tracker.brief import without_inputs
from kedge.rpc.tracker.facts import Needs
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.transport import CHUNK_BYTES
from kedge.rpc.types import MAX_LISTED, Blob, JobSpec, JobState

log = logging.getLogger("kedge.tracker")
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

#: An agent has so long to say hello.
_HELLO_S = 10.0
#: Chunks of one upload that may wait in memory for the disk.
_GATHERED_CHUNKS = 8
_MAX_WAIT_MS = 60_000
_MAX_MANIFEST_BYTES = 64 << 20


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


class FleetService:
    """What clients ask."""

    def __init__(self, shell: Shell, blobs: BlobStore) -> None:
        self._shell = shell
        self._catalog = Catalog(blobs)

    @typed_errors
    async def Hello(self, request: fleet_pb2.HelloRequest, _context: Context) -> fleet_pb2.HelloResponse:
        """Exchange protocol versions."""
        check_peer(convert.protocol_from_pb(request.protocol), "the client")
        ours = convert.protocol_to_pb(local_protocol())
        return fleet_pb2.HelloResponse(protocol=ours, tracker_id=self._shell.tracker_id)

    @typed_errors
    async def ListDevices(
        self, request: fleet_pb2.ListDevicesRequest, _context: Context
    ) -> fleet_pb2.ListDevicesResponse:
        """Devices by selector, waiting for the first if asked to."""
        wait_s = max(0, min(request.wait_ms, _MAX_WAIT_MS)) / 1000
        found = await self._shell.devices(request.selector, request.include_gone, wait_s)
        return fleet_pb2.ListDevicesResponse(devices=[convert.device_status_to_pb(status) for status in found])

    @typed_errors
    async def SubmitJob(self, request: fleet_pb2.SubmitJobRequest, _context: Context) -> fleet_pb2.SubmitJobResponse:
        """Accept a job whose artifact and inputs are here already."""
        spec = convert.job_spec_from_pb(request.spec)
        needs = self._catalog.check(spec)
        job_id, existed = await self._shell.submit(spec, needs, request.idempotency_key)
        job = await self._shell.job(job_id)
        return fleet_pb2.SubmitJobResponse(job=convert.job_to_pb(without_inputs(job)), existed=existed)

    @typed_stream_errors
    async def WatchJob(self, request: fleet_pb2.WatchJobRequest, context: Context) -> AsyncIterator[types_pb2.Job]:
        """The job now, and on every change until it is done."""
        changes = self._shell.watch(request.job_id)
        try:
            job = await self._shell.job(request.job_id)
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
        return convert.job_to_pb(await self._shell.job(request.job_id))

    @typed_errors
    async def ListJobs(self, request: fleet_pb2.ListJobsRequest, _context: Context) -> fleet_pb2.ListJobsResponse:
        """The newest jobs in brief."""
        states = tuple(convert.job_state_from_pb(state) for state in request.states)
        jobs = await self._shell.jobs(max(1, min(request.limit or 100, MAX_LISTED)), states)
        return fleet_pb2.ListJobsResponse(jobs=[convert.job_to_pb(job) for job in jobs])

    @typed_errors
    async def CancelJob(self, request: fleet_pb2.CancelJobRequest, _context: Context) -> types_pb2.Job:
        """Stop a job."""
        return convert.job_to_pb(await self._shell.cancel(request.job_id, "a client cancelled it"))

    @typed_errors
    async def SetMaintenance(
        self, request: fleet_pb2.SetMaintenanceRequest, _context: Context
    ) -> types_pb2.DeviceStatus:
        """A device leaves service, or comes back."""
        status = await self._shell.set_maintenance(request.device, request.enabled, request.reason, "")
        return convert.device_status_to_pb(status)

    @typed_errors
    async def Reserve(self, request: fleet_pb2.ReserveRequest, _context: Context) -> types_pb2.Reservation:
        """A device for one user."""
        begin, duration_ms = request.from_unix_ms, request.duration_ms
        reservation = await self._shell.reserve(request.selector, "", begin, duration_ms, request.reason)
        return convert.reservation_to_pb(reservation)

    @typed_errors
    async def EndReservation(
        self, request: fleet_pb2.EndReservationRequest, _context: Context
    ) -> types_pb2.Reservation:
        """A device for everybody again."""
        reservation = self._shell.state.reservation(request.id)
        if reservation is None:
            raise UnknownReservationError(f"there is no reservation {request.id!r}", hint="'kedge devices' shows them")
        await self._shell.end_reservation(request.id)
        return convert.reservation_to_pb(reservation)


class Catalog:
    """What the tracker knows of the artifacts it was sent: whether they are complete, and what they run on."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._manifests: dict[str, tuple[Manifest, list[Blob]]] = {}

    def check(self, spec: JobSpec) -> Needs:
        """What `spec` needs of a device.

        Raises:
            NotReadyError: blobs are missing; it names them.
            ArtifactError, InputError, SelectorError, BlobError, IncompatibleTargetError: the spec makes no sense.
        """
        parse(spec.selector)
        manifest = self._manifest(spec.manifest)
        manifest.function(spec.function)
        check_spec(spec)
        held = []
        for tensor in spec.task.inputs:
            try:
                tensor.check()
            except ValueError as error:
                raise InputError(str(error)) from error
            if isinstance(tensor.data, Blob):
                held.append(tensor.data)
        self._require(held, "inputs")
        return needs_of(manifest, spec.on)

    def _manifest(self, blob: Blob) -> Manifest:
        # Also what was complete before: somebody may have removed blobs, or they were found damaged.
        self._require([blob], "manifest")
        manifest, parts = self._manifests.get(blob.digest) or self._read_manifest(blob)
        self._require(parts, f"artifact {manifest.name!r}")
        return manifest

    def _read_manifest(self, blob: Blob) -> tuple[Manifest, list[Blob]]:
        if blob.size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(f"a manifest of {blob.size} bytes is not accepted (at most {_MAX_MANIFEST_BYTES})")
        manifest = Manifest.from_json(self._blobs.read(blob.digest))
        parts = [Blob(part.digest, part.size) for member in manifest.members for part in member.parts]
        self._manifests[blob.digest] = manifest, parts
        return manifest, parts

    def _require(self, blobs: list[Blob], what: str) -> None:
        missing = self._blobs.find_missing(blobs)
        if missing:
            names = ", ".join(blob.digest for blob in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise NotReadyError(
                f"{what}: {len(missing)} of {len(set(blobs))} blobs are missing on the tracker: {names}",
                hint="upload them before the job",
            )


class AgentsService:
    """The agents' streams."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def Connect(self, requests: AsyncIterator[agent_pb2.AgentMessage], context: Context) -> None:
        """One agent, from its hello to the end of its stream."""
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = convert.agent_message_from_pb(await anext(requests))
        except (TimeoutError, StopAsyncIteration, KedgeError) as error:
            code, details, metadata = to_status(ProtocolError(f"an agent has to say hello first ({error!r})"))
            await context.abort(code, details, metadata)
            return
        if not isinstance(hello, Hello):
            code, details, metadata = to_status(ProtocolError("an agent has to say hello first"))
            await context.abort(code, details, metadata)
            return
        await self._talk(hello, requests, context)

    async def _talk(self, hello: Hello, requests: AsyncIterator[agent_pb2.AgentMessage], context: Context) -> None:
        out: asyncio.Queue[TrackerBody | None] = asyncio.Queue()
        connection = self._shell.agent_connected(hello, out.put_nowait)
        log.info("device %s says hello (%s)", hello.device.name, hello.protocol.software)
        listening = asyncio.create_task(self._listen(connection, requests))
        talking = asyncio.create_task(self._speak(out, context))
        try:
            await asyncio.wait([listening, talking], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (listening, talking):
                task.cancel()
            ends = await asyncio.gather(listening, talking, return_exceptions=True)
            self._shell.agent_left(connection)
            log.info("device %s: its connection ended", hello.device.name)
            for end in ends:
                if isinstance(end, KedgeError):
                    log.warning("device %s: %s", hello.device.name, end)
                elif isinstance(end, Exception) and not isinstance(end, grpc.aio.UsageError):
                    log.error("device %s", hello.device.name, exc_info=end)

    async def _listen(self, connection: int, requests: AsyncIterator[agent_pb2.AgentMessage]) -> None:
        async for message in requests:
            body = convert.agent_message_from_pb(message)
            if body is not None:
                self._shell.agent_said(connection, body)

    async def _speak(self, out: asyncio.Queue[TrackerBody | None], context: Context) -> None:
        number = 0
        while (body := await out.get()) is not None:
            number += 1
            await context.write(convert.tracker_message_to_pb(body, number))


class BlobsService:
    """Uploads and downloads. Files are touched in threads of their own."""

    def __init__(self, blobs: BlobStore, threads: ThreadPoolExecutor) -> None:
        self._blobs = blobs
        self._threads = threads

    @typed_errors
    async def FindMissing(
        self, request: blobs_pb2.FindMissingRequest, _context: Context
    ) -> blobs_pb2.FindMissingResponse:
        """Which of these are not here."""
        asked = [convert.blob_from_pb(pb) for pb in request.blobs]
        missing = await self._in_thread(self._blobs.find_missing, asked)
        return blobs_pb2.FindMissingResponse(missing=[convert.blob_to_pb(blob) for blob in missing])

    @typed_errors
    async def QueryUpload(
        self, request: blobs_pb2.QueryUploadRequest, _context: Context
    ) -> blobs_pb2.QueryUploadResponse:
        """How much of an upload is here."""
        blob = convert.blob_from_pb(request.blob)
        committed = await self._in_thread(self._blobs.committed_bytes, blob)
        return blobs_pb2.QueryUploadResponse(committed_bytes=committed, complete=self._blobs.has(blob))

    @typed_errors
    async def Upload(
        self, requests: AsyncIterator[blobs_pb2.UploadRequest], _context: Context
    ) -> blobs_pb2.UploadResponse:
        """One blob; while some chunks are hashed and written, the next ones gather."""
        try:
            first = await anext(requests)
        except StopAsyncIteration:
            raise BlobError("an upload without a message") from None
        begun = self._threads.submit(self._blobs.begin, convert.blob_from_pb(first.blob), first.offset_bytes)
        try:
            writer = await asyncio.wrap_future(begun)
            await self._receive(writer, first.data, requests)
        finally:
            # A call may be broken off while a thread works for it: the writer is closed all the same, and after that.
            await asyncio.shield(self._start(_close, begun))
        return blobs_pb2.UploadResponse(committed_bytes=writer.size)

    async def _receive(
        self, writer: BlobWriter, first: bytes, requests: AsyncIterator[blobs_pb2.UploadRequest]
    ) -> None:
        gathered = [first] if first else []
        writing: asyncio.Future[None] = self._start(_append, writer, ())
        try:
            async for request in requests:
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
        if not self._blobs.has(blob):
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
            finally:
                await asyncio.wait([reading])
        if request.offset_bytes == 0 and digest.hexdigest() != blob.digest:
            self._blobs.discard(blob.digest)
            raise CorruptBlobError(f"blob {blob.digest} was damaged on the tracker's disk", hint="upload it again")

    def _start(self, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._start(work, *arguments)


def _close(begun: Future[BlobWriter]) -> None:
    """Wait until the writer is there, and close it."""
    if not begun.cancelled() and begun.exception() is None:
        begun.result().close()


def _append(writer: BlobWriter, chunks: Sequence[bytes]) -> None:
    for chunk in chunks:
        writer.append(chunk)
