"""The tracker's end of a stream of jobs: each is run by itself, as if it had come in a call of its own."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Iterable

from kedge.protos.v1 import fleet_pb2 as pb
from kedge.rpc.errors import KedgeError, LimitError
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.status import TrackerAwayError, to_refusal
from kedge.rpc.transport import MAX_STREAM_JOBS, MAX_STREAMED_BYTES

#: Says of one job that it is accepted, and then what came of it.
Run = Callable[[pb.SubmitJobRequest], AsyncIterator[pb.RunJobResponse]]


class _Note(enum.Enum):
    """What lies between the words, and is not said."""

    #: Nothing is left to be said of one of the jobs.
    JOB_ENDED = enum.auto()
    #: The client has no more jobs.
    HEARD_ALL = enum.auto()


class JobStream:
    """One stream. What goes wrong with a job is told of that job; what keeps the tracker from going on ends the stream.

    A client that does not read what there is to say, or has too many jobs under way, is not listened to meanwhile.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._last = 0
        self._jobs: dict[int, asyncio.Task[None]] = {}
        #: Of jobs that are under way, or of which something is not said yet: so it bounds what waits to be said, too.
        self._room = asyncio.Semaphore(MAX_STREAM_JOBS)
        self._to_say: asyncio.Queue[pb.RunJobsResponse | BaseException | _Note] = asyncio.Queue()
        self._heard_all = False

    async def serve(self, requests: AsyncIterator[pb.RunJobsRequest]) -> AsyncIterator[pb.RunJobsResponse]:
        """What there is to say, until the client has no more jobs and was told of all that it had."""
        listening = asyncio.create_task(self._listen(requests))
        listening.add_done_callback(lambda task: self._note_end(task, _Note.HEARD_ALL))
        try:
            while not (self._heard_all and not self._jobs and self._to_say.empty()):
                said = await self._to_say.get()
                if isinstance(said, BaseException):
                    raise said
                if said is _Note.JOB_ENDED:
                    self._room.release()
                elif not isinstance(said, _Note):
                    yield said
        finally:
            tasks = (listening, *self._jobs.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, requests: AsyncIterator[pb.RunJobsRequest]) -> None:
        async for request in requests:
            self._forget(request.forgotten)
            if request.number <= self._last:
                raise ProtocolError(f"a stream's job has the number {request.number}, after {self._last}")
            self._last = request.number
            await self._room.acquire()
            self._begin(request.number, request.job)
        self._heard_all = True

    def _begin(self, number: int, request: pb.SubmitJobRequest) -> None:
        job = self._jobs[number] = asyncio.create_task(self._serve_one(number, request))

        def ended(task: asyncio.Task[None]) -> None:  # also of one that was cancelled before its first step
            del self._jobs[number]
            self._note_end(task, _Note.JOB_ENDED)

        job.add_done_callback(ended)

    def _note_end(self, task: asyncio.Task[None], note: _Note) -> None:
        """Of listening, or of a job: what goes wrong with either is how the stream ends."""
        error = None if task.cancelled() else task.exception()
        self._to_say.put_nowait(note if error is None else error)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            job = self._jobs.get(number)
            if job is not None:
                job.cancel()

    async def _serve_one(self, number: int, request: pb.SubmitJobRequest) -> None:
        try:
            if request.ByteSize() > MAX_STREAMED_BYTES:
                raise LimitError(f"a job of {request.ByteSize()} bytes on a stream", hint="make a call for it: RunJob")
            async for said in self._run(request):
                self._to_say.put_nowait(_numbered(number, said))
        except TrackerAwayError:
            raise  # that concerns all of them
        except KedgeError as error:
            self._to_say.put_nowait(pb.RunJobsResponse(number=number, refused=to_refusal(error)))


def _numbered(number: int, said: pb.RunJobResponse) -> pb.RunJobsResponse:
    if said.WhichOneof("said") == "job_id":
        return pb.RunJobsResponse(number=number, job_id=said.job_id)
    if _is_large(said):
        return pb.RunJobsResponse(number=number, large=True)
    return pb.RunJobsResponse(number=number, result=said.result)


def _is_large(said: pb.RunJobResponse) -> bool:
    return said.ByteSize() > MAX_STREAMED_BYTES
