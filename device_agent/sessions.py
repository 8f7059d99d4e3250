"""Serves one interactive session: artifacts, tensors and files that stay on the device while its client holds it.

    the session's stream ─ gRPC's own thread ─▶ requests ─▶ worker (this thread) ─▶ runner
                         ◀─ another one of its ─ replies ◀───┘

A reader takes one event after the other off the stream, as there is room, and sees to what ends a request or all.

One runner holds all artifacts of a session, so that they share tensors; those on a GPU have another one, without the
sandbox that a GPU's driver does not bear. A runner that ends takes its artifacts and tensors with it, and nothing else.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from google.protobuf.message import DecodeError

from kedge.device_agent.cache import Hold
from kedge.device_agent.jobs import (
    Board,
    await_calm,
    limits_of,
    measurement_of,
    members_of,
    offer_to_oom_killer,
)
from kedge.device_agent.runner import PIECE_BYTES, Runner
from kedge.device_agent.runtime import protocol
from kedge.device_agent.session_files import SessionFiles
from kedge.device_agent.session_requests import (
    CALLED_OFF,
    BrokenOrder,
    CalledOff,
    FailedRequest,
    announced_bytes,
    check_port,
    deadline_s_of,
    inline_tensor,
    outcome_of,
    refusing,
    values_of,
)
from kedge.device_agent.session_tensors import SessionTensors, check_memory
from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc import convert
from kedge.rpc.artifact.manifest import Function, Manifest
from kedge.rpc.artifact.place import CPU, Placement, look_at, parse_device, place
from kedge.rpc.blobs import BlobStore
from kedge.rpc.errors import ArtifactError, KedgeError
from kedge.rpc.limits import check_number, check_time_options
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.pipe import Pipe, PipeClosed
from kedge.rpc.transport import CHUNK_BYTES, MAX_SESSION_FRAME_BYTES
from kedge.rpc.types import Blob, JobResult, JobSpec, Lease, plan_inline

log = logging.getLogger("kedge.agent")

_SERVE = "/kedge.v1.Sessions/Serve"
#: Requests that wait for the worker, and replies for the wire.
_WAITING = 4
#: Seconds that the stream has to end after its last word, and how much longer it lives on while it cannot: a tracker
#: whose client does not read is to hear of the job's outcome before it sees the stream break.
_FAREWELL_S = 2.0
_LINGER_S = 10.0
#: Between two attempts to end what a request waits for: the first may come before that has begun.
_AGAIN_S = 0.1
#: Of what a client is told about one request.
_MOST_CHARACTERS = 4_000
_GPU = "gpu"


class _Loaded:
    """An artifact in a runner; `files` has what keeps its files where they are, and is closed with it."""

    def __init__(
        self, files: ExitStack, runner: Runner, module: int, manifest: Manifest, placement: Placement, threads: int
    ) -> None:
        self.files = files
        self.runner = runner
        self.module = module
        self.manifest = manifest
        self.placement = placement
        self.threads = threads

    @property
    def variant(self) -> int:
        return self.manifest.variants.index(self.placement.variant)


class Session:
    """One session under one lease. `run` blocks until it is over; `cancel` may come from any thread at any time.

    `open_channel` connects to the tracker.
    """

    def __init__(self, board: Board, lease: Lease, spec: JobSpec, open_channel: Callable[[], Any]) -> None:
        self._board = board
        self._lease = lease
        self._spec = spec
        self._open_channel = open_channel
        self._lock = threading.Lock()
        #: How the session ended; the first word about it stands.
        self._verdict: Optional[Outcome] = None
        #: Nobody waits for what is being done: the session is over, or its client called the request off.
        self._calling_off = threading.Event()
        self._done = threading.Event()
        self._requests: Pipe[pb.SessionRequest] = Pipe(_WAITING)
        self._frames: Pipe[pb.DeviceFrame] = Pipe(_WAITING)
        self._runners: Dict[str, Runner] = {}
        #: One that has a process and has not said hello: nobody can ask it to cancel.
        self._starting: Optional[Runner] = None
        self._newest = _GPU if parse_device(spec.on)[0] not in ("", CPU) else CPU
        self._artifacts: Dict[int, _Loaded] = {}
        self._tensors = SessionTensors()
        self._last_artifact = 0
        #: The request that is worked on (0: none), and the last one that its client had no use for any more.
        self._current = 0
        self._unwanted = 0
        self._began = 0
        #: Bytes that the request announced and that have not come yet.
        self._owed = 0

    def cancel(self, reason: str) -> None:
        """End the session soon; it reports `cancelled`."""
        self._end(Outcome(OutcomeKind.CANCELLED, Stage.RUN, message=reason))

    def run(self) -> JobResult:
        """Serve it to its end; always returns."""
        try:
            self._serve()
        except Exception as error:
            if not isinstance(error, (KedgeError, OSError)):
                log.error("a session failed in a way that has no name", exc_info=error)
            self._end(Outcome(OutcomeKind.DEVICE_FAULT, Stage.RUN, message=str(error) or type(error).__name__))
        finally:
            self._done.set()
        assert self._verdict is not None
        return JobResult(self._verdict, device=self._board.device.name)

    def _end(self, outcome: Outcome) -> None:
        """The session is over. Whatever the reason, the tracker hears that the device is there: `done`."""
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = outcome
            self._calling_off.set()
        self._requests.abort()
        self._frames.finish(pb.DeviceFrame(done=pb.CloseSession()))
        threading.Thread(target=self._hurry, name="kedge-session-end", daemon=True).start()

    def _hurry(self, number: int = 0) -> None:
        """End what the worker waits for, in this request or at all, until it has noticed.

        One attempt would not do: it may come before what it shall end has begun.
        """
        while not self._done.is_set():
            with self._lock:  # the next request must not begin meanwhile: it would be ended in the place of this one
                if number and self._current != number:
                    return
                if self._starting is not None:
                    self._starting.kill()
                for runner in list(self._runners.values()):
                    if self._verdict is not None and not self._verdict.ok:
                        runner.kill()
                    else:
                        runner.cancel()
                self._board.blobs.interrupt()
            self._done.wait(_AGAIN_S)

    # ---- streams -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        with ExitStack() as stack:
            scratch = self._board.new_folder("session-")
            stack.callback(self._board.remove_folder, scratch)
            staging = Path(tempfile.mkdtemp(prefix="staging-", dir=str(self._board.scratch)))
            stack.callback(self._board.remove_folder, staging)
            stack.callback(self._close_runners)
            self._converse(scratch, SessionFiles(scratch, staging))

    def _converse(self, scratch: Path, files: SessionFiles) -> None:
        channel = self._open_channel()
        ended = threading.Event()
        try:
            serve = channel.stream_stream(
                _SERVE, request_serializer=pb.DeviceFrame.SerializeToString, response_deserializer=self._hear
            )
            with self._lock:
                if self._verdict is not None:
                    return
                self._frames.put(pb.DeviceFrame(serve=convert.lease_to_pb(self._lease)))
            call = serve(iter(self._frames))
            call.add_callback(ended.set)
            threading.Thread(target=self._listen, args=(call,), name="kedge-session-reader", daemon=True).start()
            self._work(scratch, files)
        finally:
            self._done.set()
            if ended.wait(_FAREWELL_S):
                channel.close()
            else:
                later = threading.Timer(_LINGER_S, channel.close)
                later.daemon = True
                later.start()

    def _listen(self, call: Any) -> None:
        """Hand requests on until the stream ends, and say how it ended."""
        try:
            self._end(self._heard(call))
        except Exception as error:
            log.error("a session's reader failed", exc_info=error)
            self._end(Outcome(OutcomeKind.DEVICE_FAULT, Stage.RUN, message=f"the session's reader failed: {error!r}"))

    def _hear(self, raw: bytes) -> pb.DeviceEvent:
        """An event of the stream, in gRPC's own thread, which must not wait: it hands a request to the worker at once.

        The reader would be one thread more on the way of each. It has what is left of the event, in the same order.
        """
        event = pb.DeviceEvent.FromString(raw)
        if event.WhichOneof("body") == "data":
            with suppress(DecodeError, PipeClosed):  # the reader meets the same, and ends the session
                request = pb.SessionRequest.FromString(event.data)
                if request.WhichOneof("body") != "cancel":
                    self._requests.push(request)
                    event.Clear()
        return event

    def _heard(self, call: Any) -> Outcome:
        import grpc

        try:
            for event in call:
                which = event.WhichOneof("body")
                if which == "close":
                    return Outcome(OutcomeKind.OK)
                if which == "data":
                    request = pb.SessionRequest.FromString(event.data)
                    if request.WhichOneof("body") == "cancel":
                        self._call_off_request(request.id)
                    self._requests.put(request)
                self._requests.wait_while_over()  # nothing is taken off the stream before
        except grpc.RpcError as error:
            why = f"the session's connection to the tracker broke ({error.code().name}: {error.details()})"
            return Outcome(OutcomeKind.CANCELLED, Stage.RUN, message=why)
        except DecodeError:
            return Outcome(OutcomeKind.BAD_REQUEST, Stage.RUN, message="the session's client sent what is no request")
        except PipeClosed:
            return Outcome(OutcomeKind.CANCELLED, Stage.RUN, message="the session was broken off")
        return Outcome(OutcomeKind.CANCELLED, Stage.RUN, message="the session's client went away")

    def _call_off_request(self, number: int) -> None:
        with self._lock:
            if self._unwanted == number:
                return
            self._unwanted = number
            if self._current != number:
                return  # it has not begun, and will find out; or it is over
            self._calling_off.set()
        threading.Thread(target=self._hurry, args=(number,), name="kedge-session-call-off", daemon=True).start()

    def _close_runners(self) -> None:
        for runner in self._runners.values():
            runner.close()
        for loaded in self._artifacts.values():
            loaded.files.close()

    # ---- requests ----------------------------------------------------------------------------------------------

    def _work(self, scratch: Path, files: SessionFiles) -> None:
        """Answer one request after the other until the session is over."""
        try:
            while True:
                request = self._next()
                if self._is_late(request):
                    continue
                with self._lock:
                    self._current, self._began = request.id, time.monotonic_ns()
                    if self._verdict is None and self._unwanted != request.id:
                        self._calling_off.clear()
                try:
                    self._answer(request, scratch, files)
                finally:
                    with self._lock:
                        self._current = 0
        except PipeClosed:
            pass  # the session is over
        except BrokenOrder as error:
            self._end(Outcome(OutcomeKind.BAD_REQUEST, Stage.RUN, message=f"the session cannot go on: {error}"))
        except Exception as error:
            log.error("a session's worker failed", exc_info=error)
            self._end(Outcome(OutcomeKind.DEVICE_FAULT, Stage.RUN, message=f"the session cannot go on: {error!r}"))

    def _next(self) -> pb.SessionRequest:
        """The next message; a client that says nothing for long has forgotten that it has the device."""
        try:
            return self._requests.get(self._board.session_idle_s)
        except TimeoutError:
            why = f"nothing was asked of it for {self._board.session_idle_s:g} s"
            self._end(Outcome(OutcomeKind.CANCELLED, Stage.RUN, message=why))
            raise PipeClosed from None

    def _is_late(self, request: pb.SessionRequest) -> bool:
        """Whether a message is about a request that has its answer already, as its client called it off."""
        which = request.WhichOneof("body")
        return which == "cancel" or (which == "piece" and request.id == self._unwanted)

    def _answer(self, request: pb.SessionRequest, scratch: Path, files: SessionFiles) -> None:
        which = request.WhichOneof("body")
        self._owed = announced_bytes(request)
        try:
            self._tensors.free(request.freed)
            if which == "put_file":
                self._put_file(request, files)
            elif which == "fetch_file":
                self._fetch_file(request, files)
            elif which == "call":
                self._run(request)
            elif which == "time":
                self._time(request)
            elif which == "put":
                self._put(request, scratch)
            elif which == "fetch":
                self._fetch(request)
            elif which == "free":
                self._tensors.free(request.free.handles)
                self._reply(pb.SessionReply(id=request.id, done=pb.Done()))
            elif which == "load":
                self._load(request, scratch)
            elif which == "unload":
                self._unload(request)
            elif which == "list_files":
                self._list(request.id, files)
            elif which == "remove_file":
                files.remove(request.remove_file.name)
                self._reply(pb.SessionReply(id=request.id, done=pb.Done()))
            elif which == "piece":
                raise BrokenOrder("a piece of what no request announced")
            else:
                raise FailedRequest(
                    OutcomeKind.BAD_REQUEST, "a request that this agent does not know: update kedge on it"
                )
        except (PipeClosed, BrokenOrder):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a request does, it has an answer
            with suppress(CalledOff):
                self._take_pieces(request.id, self._owed, lambda piece: None)
            self._fail(request.id, error, loading=which == "load")

    def _reply(self, reply: pb.SessionReply) -> None:
        data = reply.SerializeToString()
        if len(data) > MAX_SESSION_FRAME_BYTES:
            text = f"the reply to this request has {len(data)} bytes; a session's frame takes {MAX_SESSION_FRAME_BYTES}"
            raise FailedRequest(OutcomeKind.BAD_REQUEST, text)
        self._frames.put(pb.DeviceFrame(data=data))

    def _fail(self, number: int, error: Exception, loading: bool) -> None:
        ended = self._bury()
        outcome = outcome_of(error, Stage.LOAD if loading else Stage.RUN, self._board.device.name)
        if self._unwanted == number:
            outcome = Outcome(OutcomeKind.CANCELLED, outcome.stage, message=CALLED_OFF)
        elif len(outcome.message) > _MOST_CHARACTERS:  # it may quote what the client said
            outcome = replace(outcome, message=outcome.message[:_MOST_CHARACTERS] + " …")
        failed = pb.RequestFailed(outcome=convert.outcome_to_pb(outcome), runner_ended=ended)
        self._reply(pb.SessionReply(id=number, failed=failed))

    def _bury(self) -> bool:
        """Forget what was in runners that ended; whether there were any."""
        dead = {kind for kind, runner in self._runners.items() if not runner.alive}
        for kind in dead:
            runner = self._runners.pop(kind)
            for key in [key for key, each in self._artifacts.items() if each.runner is runner]:
                self._artifacts.pop(key).files.close()
            self._tensors.forget(runner)
        return bool(dead)

    # ---- artifacts ---------------------------------------------------------------------------------------------

    def _load(self, request: pb.SessionRequest, scratch: Path) -> None:
        with ExitStack() as files:
            loaded = self._open(request.load, files, scratch)
            self._last_artifact += 1
            self._artifacts[self._last_artifact] = loaded
            loaded.files = files.pop_all()
        answer = pb.ArtifactLoaded(artifact=self._last_artifact, device=loaded.placement.device)
        self._reply(pb.SessionReply(id=request.id, loaded=answer))

    def _open(self, wanted: pb.LoadArtifact, files: ExitStack, scratch: Path) -> _Loaded:
        """Have an artifact in a runner; its files are there until `files` is closed."""
        check_number("threads", wanted.num_threads, 0, 2**31 - 1, "0 means all that the device offers")
        hold = files.enter_context(self._board.cache.hold())
        manifest, placement, paths = self._transfer(wanted, hold)
        offered = self._board.offered(timing=True)
        if wanted.num_threads > offered:
            text = f"{wanted.num_threads} threads are wanted; {self._board.device.name} offers {offered}"
            raise FailedRequest(OutcomeKind.BAD_REQUEST, text, Stage.LOAD)
        threads = placement.threads(wanted.num_threads, offered)
        runner = self._runner_for(CPU if placement.kind == CPU else _GPU, scratch)
        deadline_s = deadline_s_of(wanted.load_ms, Stage.LOAD)
        self._check_wanted()
        shown = []
        for index, path in enumerate(paths):
            name = f"{self._last_artifact + 1}-{index}"
            shown.append(self._board.show(path, scratch, name))
            files.callback(self._board.hide, scratch, name)
        info = runner.open(
            shown[0],
            shown[1] if len(shown) > 1 else None,
            placement.variant.weights_offset,
            deadline_s,
            device=placement.dl_device,
            threads=threads,
        )
        names = [function.name for function in info.functions]
        promised = [function.name for function in manifest.functions]
        if names[: len(promised)] != promised:
            runner.close_module(info.module)
            text = f"the manifest promises the functions {promised}; lib.so has {names}"
            raise FailedRequest(OutcomeKind.LOAD_ERROR, text, Stage.LOAD)
        return _Loaded(files, runner, info.module, manifest, placement, threads)

    def _transfer(self, wanted: pb.LoadArtifact, hold: Hold) -> Tuple[Manifest, Placement, List[Path]]:
        blob = convert.blob_from_pb(wanted.manifest)
        limit_s = deadline_s_of(wanted.transfer_ms, Stage.TRANSFER)
        # threading cannot wait for longer.
        timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), self._board.blobs.interrupt)
        timer.daemon = True
        timer.start()
        try:
            hold.fetch([blob], self._download)
            check = partial(self._board.check_signature, convert.signature_from_pb(wanted))
            manifest = hold.manifest(blob, check)
            info = self._board.device
            placement = place(manifest, info.arch, info.cpu_features, look_at(info), wanted.on)
            members = members_of(manifest, placement.variant)
            hold.fetch([part for member in members for part in member.parts], self._download)
            return manifest, placement, [hold.member(member) for member in members]
        except Exception as error:
            if time.monotonic_ns() - self._began >= limit_s * 1e9:
                why = f"transfer took longer than {limit_s:g} s"
                raise FailedRequest(OutcomeKind.TIMEOUT, why, Stage.TRANSFER) from error
            raise
        finally:
            timer.cancel()

    def _download(self, blob: Blob, store: BlobStore) -> None:
        self._check_wanted()
        self._board.blobs.download(blob, store)

    def _check_wanted(self) -> None:
        if self._verdict is not None:
            raise PipeClosed
        if self._unwanted == self._current:
            raise CalledOff

    def _runner_for(self, kind: str, scratch: Path) -> Runner:
        self._newest = kind
        runner = self._runners.get(kind)
        if runner is None:
            # A session has the device alone, and may time at any moment.
            cores = self._board.offered(timing=True)
            seconds = self._spec.deadlines.of(Stage.RUN) / 1000 * cores
            limits = limits_of(self._board, kind, seconds)
            try:
                runner = self._board.start_runner(limits, scratch, cores, self._has_starting, timing=True)
            finally:
                with self._lock:
                    self._starting = None
            self._runners[kind] = runner
            offer_to_oom_killer(runner.hello.pid)
        return runner

    def _has_starting(self, runner: Runner) -> None:
        with self._lock:
            self._starting = runner

    def _unload(self, request: pb.SessionRequest) -> None:
        loaded = self._artifacts.pop(request.unload.artifact, None)
        if loaded is not None:
            loaded.runner.close_module(loaded.module)
            loaded.files.close()
        self._reply(pb.SessionReply(id=request.id, done=pb.Done()))

    def _find(self, artifact: int, name: str) -> Tuple[_Loaded, Function, int]:
        loaded = self._artifacts.get(artifact)
        if loaded is None:
            raise FailedRequest(
                OutcomeKind.BAD_REQUEST,
                "this artifact is not on the device any more: it was unloaded, or its runner ended; load it again",
            )
        try:
            function = loaded.manifest.function(name)
        except ArtifactError as error:
            raise FailedRequest(OutcomeKind.BAD_REQUEST, str(error)) from error
        return loaded, function, loaded.manifest.functions.index(function)

    # ---- calls -------------------------------------------------------------------------------------------------

    def _run(self, request: pb.SessionRequest) -> None:
        wanted = request.call
        loaded, function, index = self._find(wanted.artifact, wanted.function)
        deadline_s = deadline_s_of(wanted.run_ms, Stage.RUN)
        runner = loaded.runner
        streamed: List[memoryview] = []
        with self._inputs(request.id, loaded, function, wanted.inputs) as inputs:
            self._check_wanted()
            if wanted.keep:
                kept = runner.call_keeping(index, inputs, deadline_s, module=loaded.module)
                values = [
                    self._tensors.keep(loaded.runner, port.name, each) for port, each in zip(function.outputs, kept)
                ]
            else:
                results = runner.call(index, inputs, deadline_s, module=loaded.module)
                values, streamed = values_of([port.name for port in function.outputs], results)
        called = pb.FunctionCalled(outputs=values, duration_ns=runner.last_call_ns)
        self._reply(pb.SessionReply(id=request.id, called=called))
        self._stream(request.id, streamed)

    def _time(self, request: pb.SessionRequest) -> None:
        wanted = request.time
        loaded, function, index = self._find(wanted.artifact, wanted.function)
        options = convert.time_options_from_pb(wanted.options)
        check_time_options(options)
        deadline_s = deadline_s_of(wanted.run_ms, Stage.RUN)
        with self._inputs(request.id, loaded, function, wanted.inputs) as inputs:
            ends = time.monotonic() + deadline_s
            before = await_calm(self._board, deadline_s / 2, self._calling_off)
            self._check_wanted()
            left_s = max(0.001, ends - time.monotonic())
            watch = self._board.watch(loaded.runner)
            timed = loaded.runner.time(index, inputs, options, left_s, module=loaded.module)
            pinning = self._board.pinning(watch)
        measured = measurement_of(self._board, options, timed, before, loaded.threads, loaded.variant, pinning)
        self._reply(pb.SessionReply(id=request.id, measured=convert.measurement_to_pb(measured)))

    @contextmanager
    def _inputs(self, number: int, loaded: _Loaded, function: Function, values: Any) -> Iterator[List[protocol.Given]]:
        """The inputs in the function's order, checked against its ports as far as those are known before the call.

        What comes in pieces goes right to where it is used, and is there for this call alone.
        """
        given = {value.name: value for value in values}
        wanted = [port.name for port in function.inputs]
        if set(given) != set(wanted) or len(given) != len(values):
            takes, came = ", ".join(wanted) or "(none)", ", ".join(value.name for value in values) or "(none)"
            raise FailedRequest(OutcomeKind.BAD_REQUEST, f"{function.name} takes the inputs {takes}; given: {came}")
        streamed = [value for value in values if value.WhichOneof("data") == "streamed_bytes"]
        check_memory(self._board, sum(value.streamed_bytes for value in streamed))
        runner = loaded.runner
        came_along: Dict[str, protocol.Kept] = {}
        try:
            for value in streamed:
                came_along[value.name] = self._receive(number, value, runner)
            inputs: List[protocol.Given] = [
                came_along[name] if name in came_along else self._given(given[name], loaded.runner) for name in wanted
            ]
            for port, tensor in zip(function.inputs, inputs):
                check_port(port, tensor)
            yield inputs
        finally:
            if came_along and runner.alive:
                runner.release([kept.handle for kept in came_along.values()])

    def _given(self, value: pb.Value, runner: Runner) -> protocol.Given:
        """An input that is there, for that runner; a tensor of the other one is copied over."""
        if value.WhichOneof("data") != "handle":
            return inline_tensor(value)
        home, kept = self._tensors.find(value.handle)
        return kept if home is runner else home.fetch(kept)

    def _receive(self, number: int, value: pb.Value, runner: Runner) -> protocol.Kept:
        """A tensor that comes in pieces, of which the runner has each as soon as it is here, and nobody else."""
        with refusing(value):
            size = protocol.bytes_of(value.dtype, value.shape)
            if size != value.streamed_bytes:
                raise ValueError(f"{value.dtype}{list(value.shape)} takes {size} bytes, not {value.streamed_bytes}")
        kept = runner.reserve(value.dtype, tuple(value.shape))
        try:
            self._take_pieces(number, size, lambda piece: runner.fill(kept, piece))
        except BaseException:
            if runner.alive:
                runner.release([kept.handle])
            raise
        return kept

    # ---- tensors -----------------------------------------------------------------------------------------------

    def _put(self, request: pb.SessionRequest, scratch: Path) -> None:
        value = request.put.tensor
        if value.WhichOneof("data") == "handle":
            raise FailedRequest(OutcomeKind.BAD_REQUEST, "this tensor is on the device already")
        runner = self._runner_for(self._newest, scratch)
        if value.WhichOneof("data") == "streamed_bytes":
            check_memory(self._board, value.streamed_bytes)
            kept = self._receive(request.id, value, runner)
        else:
            kept = runner.keep(inline_tensor(value))
        self._reply(pb.SessionReply(id=request.id, tensor=self._tensors.keep(runner, value.name, kept)))

    def _fetch(self, request: pb.SessionRequest) -> None:
        runner, kept = self._tensors.find(request.fetch.handle)
        value = pb.Value(dtype=kept.dtype, shape=kept.shape)
        if plan_inline([kept.nbytes])[0]:
            value.inline = bytes(runner.fetch(kept).data)
            self._reply(pb.SessionReply(id=request.id, tensor=value))
            return
        value.streamed_bytes = kept.nbytes
        self._reply(pb.SessionReply(id=request.id, tensor=value))
        for at in range(0, kept.nbytes, PIECE_BYTES):
            self._check_wanted()
            self._reply(pb.SessionReply(id=request.id, piece=bytes(runner.fetch_piece(kept, at))))

    # ---- pieces ------------------------------------------------------------------------------------------------

    def _take_pieces(self, number: int, left: int, store: Callable[[bytes], object]) -> None:
        """Bytes that the request announced, as they come."""
        while left:
            request = self._next()
            if request.id == number and request.WhichOneof("body") == "cancel":
                self._owed = 0
                raise CalledOff
            if self._is_late(request):
                continue
            if request.id != number or request.WhichOneof("body") != "piece" or not request.piece:
                raise BrokenOrder("a request ended before all of its pieces came")
            if len(request.piece) > left:
                raise BrokenOrder("a request has more bytes than it said")
            left -= len(request.piece)
            self._owed -= len(request.piece)
            store(request.piece)

    def _stream(self, number: int, buffers: List[memoryview]) -> None:
        for buffer in buffers:
            for at in range(0, len(buffer), CHUNK_BYTES):
                self._check_wanted()
                self._reply(pb.SessionReply(id=number, piece=bytes(buffer[at : at + CHUNK_BYTES])))

    # ---- files -------------------------------------------------------------------------------------------------

    def _put_file(self, request: pb.SessionRequest, files: SessionFiles) -> None:
        name, size = request.put_file.file.name, request.put_file.file.size_bytes
        file = files.begin(name, size)
        try:
            with file:
                self._take_pieces(request.id, size, file.write)
            files.commit(name)
        except BaseException:
            files.discard(name)
            raise
        self._reply(pb.SessionReply(id=request.id, done=pb.Done()))

    def _fetch_file(self, request: pb.SessionRequest, files: SessionFiles) -> None:
        name = request.fetch_file.name
        file, size = files.open(name)
        with file:
            listed = pb.FileList(files=[pb.SessionFile(name=name, size_bytes=size)])
            self._reply(pb.SessionReply(id=request.id, files=listed))
            left = size
            while left:
                self._check_wanted()
                piece = file.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise FailedRequest(OutcomeKind.BAD_REQUEST, f"file {name!r} shrank while it was read")
                left -= len(piece)
                self._reply(pb.SessionReply(id=request.id, piece=piece))

    def _list(self, number: int, files: SessionFiles) -> None:
        listed = [pb.SessionFile(name=name, size_bytes=size) for name, size in files.list()]
        self._reply(pb.SessionReply(id=number, files=pb.FileList(files=listed)))
