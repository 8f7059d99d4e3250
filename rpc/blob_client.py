"""Blobs over a channel, synchronously: used by agents and by the synchronous client.

Both ways go on from where an interrupted transfer stopped, and the end that receives verifies the digest. A transfer
that the tracker's absence interrupts is tried again for a while, as long as it makes progress.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple, TypeVar, Union, cast

import grpc

from kedge.protos.v1 import blobs_pb2, blobs_pb2_grpc
from kedge.rpc import convert, interrupts
from kedge.rpc.blobs import BlobStore, CorruptBlobError, UploadOffsetError, blob_of
from kedge.rpc.errors import KedgeError
from kedge.rpc.status import from_rpc_error, is_away
from kedge.rpc.transport import CHUNK_BYTES, Address
from kedge.rpc.types import Blob

Source = Union[bytes, memoryview, "os.PathLike[str]"]
#: Called with the bytes done so far of one blob; an exception it raises ends the transfer and comes out.
Progress = Callable[[int], None]
T = TypeVar("T")

#: The pauses before attempts without progress, in seconds; the last one is that of all later attempts.
_PAUSES_S = (0.1, 0.3, 1.0, 2.0)
#: How long a tracker that is away is waited for, where nobody says otherwise.
PATIENCE_S = 3.5
#: How long one answer may take. A tracker that stood still and leads no more may never give it, though its connection
#: stands; and for transfers, bytes in a second that are slow enough for every link.
_ANSWER_S = 60.0
_LEAST_BYTES_S = 20_000.0
#: Digests asked about in one FindMissing call.
_FIND_BATCH = 10_000


class BlobClient:
    """The tracker's blobs through `channel`; `address` only words the errors.

    A tracker that went away is waited for, for `patience_s` since the last progress.
    """

    def __init__(
        self, channel: grpc.Channel, address: Optional[Address] = None, patience_s: float = PATIENCE_S
    ) -> None:
        self._stub: Any = cast(Any, blobs_pb2_grpc.BlobsStub)(channel)
        self._address = address
        self._patience_s = patience_s

    def find_missing(self, blobs: Iterable[Blob]) -> List[Blob]:
        """Those of `blobs` that the tracker lacks, each once."""
        distinct = list({blob.digest: blob for blob in blobs}.values())
        missing: List[Blob] = []
        for start in range(0, len(distinct), _FIND_BATCH):
            batch = [convert.blob_to_pb(blob) for blob in distinct[start : start + _FIND_BATCH]]
            request = blobs_pb2.FindMissingRequest(blobs=batch)
            response = self._retry(functools.partial(self._stub.FindMissing, request, timeout=_ANSWER_S))
            missing.extend(convert.blob_from_pb(pb) for pb in response.missing)
        return missing

    def upload_missing(self, items: Iterable[Tuple[Blob, Source]], progress: Optional[Progress] = None) -> int:
        """Upload those of `items` that the tracker lacks; returns the bytes of the blobs that were sent.

        `progress` counts over all of them.
        """
        sources = {blob.digest: source for blob, source in items}
        sizes = [Blob(digest, _size(source)) for digest, source in sources.items()]
        sent = 0
        for blob in self.find_missing(sizes):
            self.upload(blob, sources[blob.digest], _shifted(progress, sent))
            sent += blob.size
        return sent

    def upload(self, blob: Blob, source: Source, progress: Optional[Progress] = None) -> None:
        """Send one blob, going on from what the tracker kept of an earlier attempt.

        Raises:
            CorruptBlobError: the bytes are not those of `blob`.
            DiskFullError: the tracker has no space.
            ConnectError: the tracker went away and did not come back.
        """
        state = _Attempt(self._patience_s)

        def once() -> None:
            offset = 0
            if blob.size > CHUNK_BYTES or state.failures:
                asked = blobs_pb2.QueryUploadRequest(blob=convert.blob_to_pb(blob))
                query = self._stub.QueryUpload(asked, timeout=_ANSWER_S)
                if query.complete:
                    return
                offset = query.committed_bytes
            state.reached(offset)
            try:
                self._upload_from(blob, source, offset, progress, state)
            except grpc.RpcError as error:
                if not offset or not isinstance(from_rpc_error(error), CorruptBlobError):
                    raise
                self._upload_from(blob, source, 0, progress, state)  # what was kept had rotted, and is gone

        self._retry(once, state)

    def _upload_from(
        self, blob: Blob, source: Source, offset: int, progress: Optional[Progress], state: _Attempt
    ) -> None:
        failure: List[BaseException] = []

        def requests() -> Iterator[blobs_pb2.UploadRequest]:
            # gRPC runs this in a thread of its own and would swallow what it raises.
            try:
                done, first = offset, convert.blob_to_pb(blob)
                yield blobs_pb2.UploadRequest(blob=first, offset_bytes=offset)
                for chunk in _chunks(source, offset):
                    yield blobs_pb2.UploadRequest(offset_bytes=done, data=chunk)
                    done += len(chunk)
                    state.reached(done)
                    if progress:
                        progress(done)
            except GeneratorExit:
                raise
            except BaseException as error:
                failure.append(error)
                raise

        try:
            self._stub.Upload(requests(), timeout=_longest_s(blob.size - offset))
        except grpc.RpcError:
            if failure:
                raise failure[0] from None
            raise

    def download(self, blob: Blob, store: BlobStore, progress: Optional[Progress] = None) -> Path:
        """Fetch a blob into `store` (nothing if it is there), going on from what it kept; returns its file.

        Raises:
            MissingBlobError: the tracker does not have it.
            CorruptBlobError: what came is not the blob; nothing of it is kept.
            DiskFullError: no space in `store`.
            ConnectError: the tracker went away and did not come back.
        """
        state = _Attempt(self._patience_s)

        def once() -> None:
            kept = store.committed_bytes(blob)
            try:
                fetch(kept)
            except CorruptBlobError:
                if not kept:
                    raise
                fetch(0)  # what was kept had rotted, and is gone

        def fetch(offset: int) -> None:
            with store.begin(blob, offset) as writer:
                for data in self._stream(blob, writer.size):
                    writer.append(data)
                    state.reached(writer.size)
                    if progress:
                        progress(writer.size)
                writer.commit()

        if not store.has(blob):
            self._retry(once, state)
        return store.path(blob.digest)

    def read(self, blob: Blob) -> bytearray:
        """A blob's bytes, verified; raises MissingBlobError, CorruptBlobError or ConnectError."""
        data = bytearray()
        state = _Attempt(self._patience_s)

        def once() -> None:
            for chunk in self._stream(blob, len(data)):
                data.extend(chunk)
                state.reached(len(data))

        self._retry(once, state)
        if blob_of(memoryview(data)) != blob:
            raise CorruptBlobError(f"blob {blob.digest} arrived corrupt", hint="try again")
        return data

    def _stream(self, blob: Blob, offset: int) -> Iterator[bytes]:
        request = blobs_pb2.DownloadRequest(blob=convert.blob_to_pb(blob), offset_bytes=offset)
        with interrupts.deferred():
            call = self._stub.Download(request, timeout=_longest_s(blob.size - offset))
        try:
            for response in call:
                yield response.data
        finally:
            with interrupts.deferred():
                call.cancel()
                del call

    def _retry(self, once: Callable[[], T], state: Optional[_Attempt] = None) -> T:
        state = state or _Attempt(self._patience_s)
        while True:
            try:
                return once()
            except grpc.RpcError as error:
                explained: KedgeError = from_rpc_error(error, self._address)
                unanswered = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                again = unanswered or is_away(error) or isinstance(explained, UploadOffsetError)
                if not again or not state.pause():
                    raise explained from error


class _Attempt:
    """Counts failures since the last progress."""

    def __init__(self, patience_s: float) -> None:
        self.failures = 0
        self._patience_s = patience_s
        self._first_failure = 0.0
        self._best = 0

    def reached(self, offset: int) -> None:
        """So many bytes are over."""
        if offset > self._best:
            self._best = offset
            self.failures = 0

    def pause(self) -> bool:
        """Wait before the next attempt; False when there should be none."""
        now = time.monotonic()
        if not self.failures:
            self._first_failure = now
        pause_s = _PAUSES_S[min(self.failures, len(_PAUSES_S) - 1)]
        if now + pause_s > self._first_failure + self._patience_s:
            return False
        time.sleep(pause_s)
        self.failures += 1
        return True


def _longest_s(size: int) -> float:
    """How long the transfer of so many bytes may take; what it brought over by then is not sent again."""
    return _ANSWER_S + size / _LEAST_BYTES_S


def _shifted(progress: Optional[Progress], base: int) -> Optional[Progress]:
    if progress is None:
        return None
    report = progress
    return lambda done: report(base + done)


def _size(source: Source) -> int:
    return memoryview(source).nbytes if isinstance(source, (bytes, memoryview)) else Path(source).stat().st_size


def _chunks(source: Source, offset: int) -> Iterator[bytes]:
    if isinstance(source, (bytes, memoryview)):
        view = memoryview(source).cast("B")
        for start in range(offset, view.nbytes, CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])
        return
    with Path(source).open("rb") as file:
        file.seek(offset)
        while True:
            data = file.read(CHUNK_BYTES)
            if not data:
                return
            yield data
