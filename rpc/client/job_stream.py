"""The client's end of a stream of jobs: one call of gRPC's for all small jobs of a fleet, where each had its own.

Two threads live as long as the stream: gRPC's own, which sends, and one that receives. A job starts none.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from kedge.protos.v1 import fleet_pb2 as pb
from kedge.rpc import interrupts
from kedge.rpc.pipe import Pipe, PipeClosed
from kedge.rpc.status import from_refusal
from kedge.rpc.transport import MAX_STREAM_JOBS, MAX_STREAMED_BYTES

#: On some systems Ctrl-C interrupts no wait: it takes effect between two.
_WAIT_S = 1.0


class StreamBroken(Exception):
    """The stream is over, and whether a job was accepted is not known. `error` is gRPC's; None: it was closed."""

    def __init__(self, error: grpc.RpcError | None) -> None:
        super().__init__("the stream of jobs is over")
        self.error = error


class JobStream:
    """One stream. `begin` may be called from several threads, `close` from any."""

    def __init__(self, stub: Any) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._last = 0
        #: Those of which more is to be told, as long as somebody has them.
        self._jobs: dict[int, weakref.ref[StreamedJob]] = {}
        #: Those of which no more is to be told; the tracker hears of them with the next job.
        self._forgotten: list[int] = []
        self._requests: Pipe[pb.RunJobsRequest] = Pipe(MAX_STREAM_JOBS)
        self._over = False
        self._error: grpc.RpcError | None = None
        with interrupts.deferred():
            self._call = stub.RunJobs(iter(self._requests))
            threading.Thread(target=self._receive, name="kedge-jobs", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether a job can be begun on it; not in a process that was forked off."""
        return not self._over and self._pid == os.getpid()

    @staticmethod
    def takes(message: pb.SubmitJobRequest) -> bool:
        """Whether a job is so small that others need not wait behind it."""
        return message.ByteSize() <= MAX_STREAMED_BYTES

    def begin(self, message: pb.SubmitJobRequest, timeout_s: float) -> StreamedJob | None:
        """The job, once it is accepted; None where the stream has no room for it.

        `timeout_s` is for its last word, too: whoever waits longer has to ask for it, as with a call that ends then.

        Raises:
            KedgeError: it is refused.
            StreamBroken: whether it was accepted is not known.
            TimeoutError: nothing was heard of it in time.
        """
        with interrupts.deferred():
            job = self._sent(message, time.monotonic() + timeout_s)
        if job is None:
            return None
        try:
            job._take_acceptance()
        except BaseException:
            job.cancel()
            raise
        return job

    def close(self) -> None:
        """End it now; may be called again."""
        if self._pid == os.getpid():
            self._requests.abort()
            with interrupts.deferred():
                self._call.cancel()

    def _sent(self, message: pb.SubmitJobRequest, ends: float) -> StreamedJob | None:
        with self._lock:
            for number in [number for number, job in self._jobs.items() if job() is None]:
                self._drop(number)
            if len(self._jobs) >= MAX_STREAM_JOBS:
                return None
            self._last += 1
            job = StreamedJob(self, self._last, ends)
            request = pb.RunJobsRequest(number=self._last, job=message, forgotten=self._forgotten)
            try:
                self._requests.push(request)
            except PipeClosed:
                raise StreamBroken(self._error) from None
            self._jobs[self._last] = weakref.ref(job)
            self._forgotten = []
            return job

    def _drop(self, number: int) -> None:
        if self._jobs.pop(number, None) is not None:
            self._forgotten.append(number)

    def forget(self, number: int) -> None:
        """Nobody waits for what is told of a job, if anything more is."""
        if self._pid != os.getpid():
            return  # it is the parent's, and so may the lock be
        with self._lock:
            self._drop(number)

    def _receive(self) -> None:
        try:
            for said in self._call:
                with self._lock:
                    ends = said.WhichOneof("said") != "job_id"
                    found = self._jobs.pop(said.number, None) if ends else self._jobs.get(said.number)
                    job = None if found is None else found()
                if job is not None:
                    job.told.put(said)
                del job
        except grpc.RpcError as error:
            self._error = error
        finally:
            with self._lock:
                self._over = True
                self._requests.abort()
                left = [job() for job in self._jobs.values()]
            for job in left:
                if job is not None:
                    job.told.put(None)
            self._call.cancel()


class StreamedJob:
    """As much of gRPC's call RunJob as a job needs once it is accepted: its last word is next, or it is cancelled."""

    def __init__(self, stream: JobStream, number: int, ends: float) -> None:
        self.job_id = ""
        #: What is said of it; None: nothing more, as the stream is over.
        self.told: SimpleQueue[pb.RunJobsResponse | None] = SimpleQueue()
        self._stream = stream
        self._number = number
        #: By time.monotonic(): later than this nothing is waited for.
        self._ends = ends

    def __next__(self) -> pb.RunJobsResponse:
        """What holds its result; raises StopIteration where that is not told here, or not in time."""
        try:
            said = self._next()
        except TimeoutError:
            said = None
        if said is None or said.WhichOneof("said") != "result":
            raise StopIteration
        return said

    def cancel(self) -> None:
        """Have no more told of it, now that nobody waits for that; the job goes on."""
        self._stream.forget(self._number)

    def _take_acceptance(self) -> None:
        said = self._next()
        if said is None:
            raise StreamBroken(self._stream._error)
        if said.WhichOneof("said") == "refused":
            raise from_refusal(said.refused)
        self.job_id = said.job_id

    def _next(self) -> pb.RunJobsResponse | None:
        while self._stream._pid == os.getpid():
            try:
                return self.told.get(timeout=max(0.0, min(_WAIT_S, self._ends - time.monotonic())))
            except Empty:
                if time.monotonic() >= self._ends:
                    raise TimeoutError from None
        return None  # this process was forked off, and its parent hears what is told
