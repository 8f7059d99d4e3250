"""The service of uploads and downloads: translate, ask the blob store, translate back."""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc

from kedge.protos.v1 import blobs_pb2
from kedge.rpc import convert
from kedge.rpc.blobs import BlobError, BlobWriter, CorruptBlobError, MissingBlobError
from kedge.rpc.errors import LimitError, PermissionDeniedError
from kedge.rpc.limits import check_number
from kedge.rpc.status import TrackerAwayError
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.facts import JobAccepted
from kedge.rpc.tracker.grants import Grants
from kedge.rpc.tracker.handlers import typed_errors, typed_stream_errors
from kedge.rpc.tracker.observer import SILENT, Observer
from kedge.rpc.tracker.replication import NO_REPLICATION, Replication
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.principal import Principal, Role, caller
from kedge.rpc.transport import CHUNK_BYTES
from kedge.rpc.types import Blob

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

#: The next chunk of an upload has so long: on the slowest of links it takes as long. Until then there is room for all
#: that was announced.
_CHUNK_S = 60.0
#: Chunks of one upload that may wait in memory for the disk.
_GATHERED_CHUNKS = 8


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
        replication: Replication = NO_REPLICATION,
    ) -> None:
        self._held_by = held_by
        self._replication = replication
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
            await self._replication.fetch(await self._in_thread(self._owned, asked, principal))
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
                await self._replication.copy(blob)
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
        heard_all = caller().role is Role.PEER or await self._replication.fetch([blob])
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
