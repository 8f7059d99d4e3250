"""The client's end of a session's stream: one question and its answer at a time, and the lease kept meanwhile.

Three threads live as long as the session: gRPC's own, which sends, one that receives, and one that renews the lease. A
call starts none. The channel's own thread hands replies to whoever asked.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc

from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc import convert, interrupts
from kedge.rpc.client.plan import hint_for
from kedge.rpc.errors import ConnectError, JobError, KedgeError
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.pipe import Pipe, PipeClosed
from kedge.rpc.status import NotReadyError, from_rpc_error
from kedge.rpc.transport import CHUNK_BYTES, Address
from kedge.rpc.types import Blob, DeviceInfo
from kedge.rpc.types import Job as JobInfo

#: Frames that wait to be sent, and replies to be read: a large tensor is in memory once, not twice.
_WAITING = 4
#: How long the end of a session is waited for, and that of a request that was broken off.
_END_S = 12.0
_CALL_OFF_S = 3.0
#: Between two attempts to call a request off: the first may come before the device has begun with it.
_AGAIN_S = 0.25
_ATTACH = "/kedge.v1.Sessions/Attach"
_Answer = pb.SessionReply | pb.ArtifactGranted


class SessionLink:
    """One attached session. `ask` may be called from several threads, `call_off` and `close` from any."""

    def __init__(self, channel: grpc.Channel, address: Address, job_id: str, lease_s: float) -> None:
        self._address = address
        self._job_id = job_id
        self._lease_s = lease_s
        self._asking = threading.Lock()
        self._last = 0
        self._current = 0
        self._sent = 0
        self._unwanted = 0
        self._larger: list[threading.Event] = []
        self._here = threading.local()
        self._freed: deque[int] = deque()
        self._frames: Pipe[pb.ClientFrame] = Pipe(_WAITING)
        self._answers: Pipe[_Answer] = Pipe(_WAITING)
        self._states: Pipe[JobInfo | DeviceInfo] = Pipe(1_000)
        self._over = threading.Event()
        self._outcome: Outcome | None = None
        self._error: KedgeError | None = None
        self._device = ""
        self._frames.put(pb.ClientFrame(attach=pb.AttachSession(job_id=job_id)))
        attach: Any = channel.stream_stream(
            _ATTACH, request_serializer=pb.ClientFrame.SerializeToString, response_deserializer=self._hear
        )
        with interrupts.deferred():
            self._call = attach(iter(self._frames))
            threading.Thread(target=self._receive, name="kedge-session", daemon=True).start()
            threading.Thread(target=self._renew, name="kedge-session-lease", daemon=True).start()

    # ---- Beginning and end ----

    def wait(self, progress: Callable[[JobInfo], None] | None = None) -> DeviceInfo:
        """Wait until the device is there.

        Raises:
            JobError: the session ended before.
            ConnectError: the tracker went away.
        """
        while True:
            try:
                state = self._states.get()
            except PipeClosed:
                raise self._why() from None
            if isinstance(state, DeviceInfo):
                self._device = state.name
                return state
            if progress is not None:
                progress(state)

    def close(self) -> None:
        """End the session in order, and wait until its device is free, within bounds. May be called again."""
        with contextlib.suppress(PipeClosed):
            if not self._over.is_set():
                self._frames.put(pb.ClientFrame(close=pb.CloseSession()))
                self._frames.close()
                self._over.wait(_END_S)
        self.abort()

    def abort(self) -> None:
        """End it now, without a word."""
        self._frames.abort()
        with interrupts.deferred():
            self._call.cancel()

    @property
    def alive(self) -> bool:
        """Whether something can be asked."""
        return not self._over.is_set()

    # ---- Asking ----

    def grant(self, manifest: Blob) -> None:
        """Let the device read an artifact; raises NotReadyError where the tracker lacks parts of it."""
        with self._asking:
            frame = pb.ClientFrame(grant=pb.GrantArtifact(manifest=convert.blob_to_pb(manifest)))
            self._put(frame)
            answer = self._next()
        if not isinstance(answer, pb.ArtifactGranted):
            self.abort()
            raise KedgeError("the session's device spoke out of turn")
        if answer.problem:
            raise NotReadyError(answer.problem, hint=answer.hint or None)

    def withdraw(self, manifest: Blob) -> None:
        """Undo one `grant`; never blocks, and never raises."""
        with contextlib.suppress(PipeClosed):  # it ended with the session
            frame = pb.ClientFrame(withdraw=pb.WithdrawArtifact(manifest=convert.blob_to_pb(manifest)))
            self._frames.push(frame)

    def ask(
        self,
        request: pb.SessionRequest,
        pieces: Iterable[bytes] = (),
        expects: Callable[[pb.SessionReply], int] = lambda _: 0,
        take: Callable[[bytes], None] = lambda _: None,
        unwanted: threading.Event | None = None,
    ) -> pb.SessionReply:
        """One request and its reply. What follows the reply, of a length that `expects` reads from it, goes to `take`.

        Ctrl-C calls the request off; the session lives on where the device confirms that within seconds.

        Raises:
            JobError: the request failed, or the session is over.
            ConnectError: the stream broke, and the session with it.
        """
        with self._asking:
            number = self._last = self._last + 1
            request.id = number
            answer = _Receiver(number, expects, take)
            self._current = number
            try:
                for event in (unwanted, getattr(self._here, "unwanted", None)):
                    if event is not None:
                        self.check(event)
                if self._unwanted == number:
                    raise self._called_off()
                while self._freed:
                    request.freed.append(self._freed.popleft())
                self._send(number, request, pieces)
                self._await(answer)
            except BaseException:
                if self._sent == number:
                    self._give_up(answer)
                raise
            finally:
                self._current = 0
        reply = answer.reply
        assert reply is not None
        if reply.WhichOneof("body") == "failed":
            raise self._failed(reply.failed)
        return reply

    def call_off(self) -> None:
        """Stop what another thread asks for, if anything: it raises JobError with the outcome "cancelled".

        Never blocks, and never raises.
        """
        for unwanted in list(self._larger):
            unwanted.set()
        number = self._current
        if number:
            self._unwanted = number  # no more of it is sent
            with contextlib.suppress(PipeClosed):  # it is over, and whoever asks is told so
                self._frames.push(_frame(pb.SessionRequest(id=number, cancel=pb.CancelRequest())))

    @contextlib.contextmanager
    def larger(self) -> Iterator[threading.Event]:
        """For what takes more than one request: is set when it is called off, be it between two of them."""
        unwanted = threading.Event()
        self._larger.append(unwanted)
        try:
            yield unwanted
        finally:
            self._larger.remove(unwanted)

    @contextlib.contextmanager
    def unless(self, unwanted: threading.Event) -> Iterator[None]:
        """What this thread asks inside is not sent once `unwanted` is set, which is to be set before `call_off`."""
        self._here.unwanted = unwanted
        try:
            yield
        finally:
            del self._here.unwanted

    def check(self, unwanted: threading.Event) -> None:
        """Raise JobError where it is set."""
        if unwanted.is_set():
            raise self._called_off()

    def _called_off(self) -> JobError:
        text = f"session {self._job_id} on {self._device}: its client called it off"
        return JobError(text, outcome=OutcomeKind.CANCELLED.value)

    def forget(self, handle: int) -> None:
        """Free a tensor with the next request; waits for nothing."""
        self._freed.append(handle)

    # ---- Internals ----

    def _send(self, number: int, request: pb.SessionRequest, pieces: Iterable[bytes]) -> None:
        self._sent = number
        self._put(_frame(request))
        if self._unwanted == number:
            self.call_off()  # the one before may have come before the request, which the device then knew nothing of
        for piece in pieces:
            if self._unwanted == number:
                return
            self._put(_frame(pb.SessionRequest(id=number, piece=piece)))

    def _put(self, frame: pb.ClientFrame) -> None:
        try:
            self._frames.put(frame)
        except PipeClosed:
            raise self._why() from None

    def _next(self, timeout: float | None = None) -> _Answer:
        try:
            return self._answers.get(timeout)
        except PipeClosed:
            raise self._why() from None

    def _await(self, answer: _Receiver) -> None:
        while not answer.whole:
            answer.feed(self._next())

    def _give_up(self, answer: _Receiver) -> None:
        """Nobody waits for this answer any more: have the device stop, and take what still comes of it."""
        ends = time.monotonic() + _CALL_OFF_S
        answer.ignore()
        try:
            while not answer.whole and time.monotonic() < ends:
                self.call_off()
                with contextlib.suppress(TimeoutError):
                    answer.feed(self._next(_AGAIN_S))
        except KedgeError:
            return  # it is over
        if not answer.whole:
            self.abort()

    def _failed(self, failed: pb.RequestFailed) -> JobError:
        outcome = convert.outcome_from_pb(failed.outcome)
        text = f"session {self._job_id} on {self._device}: {outcome}"
        if failed.runner_ended:
            text += "\n  its runner ended, and all artifacts and tensors in it are gone; the session goes on"
            return JobError(text, outcome=outcome.kind.value, hint="load the artifact again")
        return JobError(text, outcome=outcome.kind.value, hint=hint_for(outcome.kind))

    def _why(self) -> KedgeError:
        """Why nothing can be asked any more."""
        self._over.wait(_END_S)  # the stream's last word comes in another thread
        if self._error is not None:
            return self._error
        where = f" on {self._device}" if self._device else ""
        if self._outcome is None:
            return ConnectError(f"session {self._job_id}{where} was closed", hint="open another one")
        kind = self._outcome.kind
        text = f"session {self._job_id}{where} is over: {self._outcome}"
        return JobError(text, outcome=kind.value, hint=hint_for(kind) if not self._outcome.ok else None)

    def _renew(self) -> None:
        while not self._over.wait(self._lease_s / 3):
            try:
                self._frames.put(pb.ClientFrame(renew=pb.RenewSession()))
            except PipeClosed:
                return

    def _hear(self, raw: bytes) -> pb.ClientEvent:
        """An event of the stream, in gRPC's own thread, which must not wait: it hands a reply on to whoever asked.

        The thread that receives would be one more on the way of each; it has what is left of the event.
        """
        event = pb.ClientEvent.FromString(raw)
        if event.WhichOneof("body") == "data":
            with contextlib.suppress(PipeClosed):  # nobody asks any more
                self._answers.push(pb.SessionReply.FromString(event.data))
            event.Clear()
        return event

    def _receive(self) -> None:
        try:
            for event in self._call:
                which = event.WhichOneof("body")
                if which is None:
                    self._answers.wait_while_over()  # nothing is taken off the stream before
                elif which == "granted":
                    self._answers.put(event.granted)
                elif which == "waiting":
                    self._states.put(convert.job_from_pb(event.waiting))
                elif which == "ready":
                    self._states.put(convert.device_info_from_pb(event.ready.device))
                elif which == "ended":
                    self._outcome = convert.outcome_from_pb(event.ended.outcome)
                    break
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                self._error = self._lost(from_rpc_error(error, self._address))
        except PipeClosed:
            pass
        except KedgeError as error:
            self._error = error
        finally:
            self._over.set()
            for pipe in (self._frames, self._answers, self._states):
                pipe.close()
            with interrupts.deferred():
                self._call.cancel()

    def _lost(self, error: KedgeError) -> KedgeError:
        """A tracker that is away, in words about the session."""
        if not isinstance(error, ConnectError) or not self._device:
            return error
        return ConnectError(
            f"session {self._job_id} on {self._device} is over, as its connection broke: {error.message}",
            hint="open another one; the tensors and files of this one are gone",
        )


class _Receiver:
    """Puts one answer together."""

    def __init__(self, number: int, expects: Callable[[pb.SessionReply], int], take: Callable[[bytes], None]) -> None:
        self.reply: pb.SessionReply | None = None
        self._number = number
        self._expects = expects
        self._take = take
        self._left = 0

    @property
    def whole(self) -> bool:
        """Nothing more comes."""
        return self.reply is not None and self._left <= 0

    def ignore(self) -> None:
        """What comes is not wanted."""
        self._take = lambda _: None

    def feed(self, reply: _Answer) -> None:
        """The next message of the stream."""
        if not isinstance(reply, pb.SessionReply) or reply.id != self._number:
            return  # of a request that was given up
        which = reply.WhichOneof("body")
        if which == "piece":
            self._left -= len(reply.piece)
            self._take(reply.piece)
        elif which == "failed" or self.reply is None:
            self.reply = reply
            self._left = 0 if which == "failed" else self._expects(reply)


def _frame(request: pb.SessionRequest) -> pb.ClientFrame:
    return pb.ClientFrame(data=request.SerializeToString())


def pieces_of(buffers: Sequence[memoryview]) -> Iterator[bytes]:
    """Buffers in chunks, one behind the other."""
    for buffer in buffers:
        for at in range(0, len(buffer), CHUNK_BYTES):
            yield bytes(buffer[at : at + CHUNK_BYTES])
