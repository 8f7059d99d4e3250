"""The agent's thin shell: one stream to the tracker, one thread for jobs, one loop that feeds the state machine.

Everything that happens (a message, a lost connection, a job's progress, a signal) becomes an event. They are taken one
by one: `AgentCore` is asked what to do, and that is done. Most are the main thread's; the thread that has a job's
assignment, or its end, sees to that itself, so that a short job does not wait for threads to wake each other.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import queue
import random
import secrets
import signal
import struct
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Callable, FrozenSet, Iterator, List, Mapping, Optional, TextIO, Tuple, Type, Union, cast

from kedge.device_agent import core
from kedge.device_agent.cache import ArtifactCache
from kedge.device_agent.cage import Cage, User, remove_tree
from kedge.device_agent.health import examine
from kedge.device_agent.jobs import Board, Job
from kedge.device_agent.probe import probe
from kedge.device_agent.results import Packed, ResultStore, to_pb
from kedge.device_agent.runner import Limits, Runner
from kedge.device_agent.runner_errors import RunnerError, RunnerUnavailable
from kedge.device_agent.runtime.protocol import Hello as RunnerHello
from kedge.device_agent.sessions import Session
from kedge.device_agent.threads import Stages, Strand, Worker
from kedge.rpc import messages as m
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact.place import GPU_KINDS
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import BlobStore
from kedge.rpc.cores import usable_threads
from kedge.rpc.errors import AuthenticationError, ConnectError, KedgeError, PermissionDeniedError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import local_protocol
from kedge.rpc.security import signing
from kedge.rpc.security.identity import Identity, explained, renew
from kedge.rpc.transport import Address, Tls, open_channel
from kedge.rpc.types import Blob, Confinement, DeviceInfo, JobResult, JobSpec, Lease, SessionTask

log = logging.getLogger("kedge.agent")

#: How long a goodbye may take to reach the tracker, and a cancelled job to end.
_FAREWELL_S = 3.0
_JOB_END_S = 10.0
#: Between two looks at the certificate, and after a renewal that failed.
_LOOK_S = 3600.0
_RENEW_PAUSE_S = 60.0
#: How long a thread that computes keeps others waiting for the interpreter (of itself Python lets it 5 ms). Those of an
#: agent compute for microseconds, and a job waits for each in turn.
_SWITCH_S = 0.0001

Event = Callable[[float], List[core.Action]]


class AgentError(KedgeError):
    """The agent cannot start."""


@dataclass(frozen=True)
class Settings:
    """How an agent was started. `threads` is what jobs may use; 0 means every core this process may run on.

    `tracker` is where agents are served; `identity` is None where that is in plaintext on loopback. With `signers`
    (public keys) only what one of them signed is run. `user` is whom runners run as; None: as the agent.
    `measuring` are cores that are kept for timings.
    """

    tracker: Address
    name: str
    runner: Path
    data_dir: Path
    labels: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    identity: Optional[Identity] = None
    signers: FrozenSet[bytes] = frozenset()
    user: Optional[User] = None
    measuring: Tuple[int, ...] = ()


class Agent:
    """One device's agent; `run` returns when it was stopped.

    Raises:
        AuthenticationError, PermissionDeniedError: from `run`: the tracker will not have this device, whenever it asks.
        AgentError: the data folder cannot be used, or belongs to an agent that runs.
        RunnerUnavailable: the runner cannot be started here.
        SigningUnavailableError: signers are required, and nothing can be verified here.
    """

    def __init__(self, settings: Settings, *, on_ready: Callable[[DeviceInfo], None] = lambda _: None) -> None:
        if settings.signers:
            signing.check_available()
        cpus, threads = os.sched_getaffinity(0), usable_threads()
        others = sorted(cpus - {*settings.measuring}) if settings.measuring else []
        if others:
            os.sched_setaffinity(0, others)  # before there are threads: they inherit it
        self._settings = settings
        self._identity = settings.identity
        self._ended = threading.Event()
        self._on_ready = on_ready
        self._announced = False
        self._strand: Strand[Event] = Strand(self._happen, self._next_alarm, time.monotonic)
        self._link: Optional[_Link] = None
        self._job: Union[Job, Session, None] = None
        self._stages: Optional[Stages] = None
        #: A job begins once the one before has cleaned up: two runners would disturb each other.
        self._worker = Worker("kedge-job")
        self._exit: Optional[core.Exit] = None
        #: What a refusal ends with: whatever starts agents must know that the next one would be refused, too.
        self._refusal: Type[KedgeError] = PermissionDeniedError
        self._away = False
        self._lock_file = _claim(settings.data_dir)
        scratch = settings.data_dir / "jobs"
        _clean(scratch)
        self._cage, hello, confinement = _confine(settings, scratch)
        accelerators = [gpu for kind in GPU_KINDS for gpu in _find_gpus(settings.runner, kind, self._cage, scratch)]
        device = probe(
            settings.name,
            hello.features,
            labels=settings.labels,
            accelerators=accelerators,
            machine=hello.machine,
            pointer_bits=elf_bits(settings.runner),
            cpus=cpus,
        )
        self.device = replace(device, confinement=confinement)
        self._blobs = BlobLink(settings.tracker, self._tls)
        self._board = Board(
            device=self.device,
            runner=settings.runner,
            threads=min(settings.threads or threads, len(others or cpus)),
            cache=ArtifactCache(settings.data_dir / "cache", guarded=self._cage.guards_files(gpus=bool(accelerators))),
            scratch=scratch,
            blobs=self._blobs,
            signers=settings.signers,
            cage=self._cage,
            measuring=settings.measuring,
            others=tuple(others),
        )
        greeting = m.Hello(local_protocol(), self.device, secrets.token_hex(8))
        self._results = ResultStore(settings.data_dir / "results")
        # An earlier kedge may have kept what the trackers of this one do not take.
        kept = [sendable(each.lease, each.result) for each in self._results.load()]
        if kept:
            log.info("%d results of an earlier run wait for the tracker", len(kept))
        self._core = core.AgentCore(greeting, jitter=random.random, results=kept)

    def run(self) -> int:
        """Serve until told to stop; the process's exit status."""
        sys.setswitchinterval(_SWITCH_S)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self._identity is not None:
            threading.Thread(target=self._keep_identity, name="kedge-identity", daemon=True).start()
        try:
            self._strand.post(self._core.start)
            while self._exit is None:
                self._strand.step(self._tick)
        finally:
            self._shut_down()
        if self._exit.failed:
            raise self._refusal(self._exit.reason)
        log.info("stopped: %s", self._exit.reason)
        return 0

    def _on_signal(self, number: int, _frame: Optional[FrameType]) -> None:
        reason = signal.Signals(number).name
        self._strand.post(lambda _: self._core.stop(reason))

    def _next_alarm(self) -> Optional[float]:
        alarm, stages = self._core.alarm(), self._stages
        if stages is not None and stages.look_at is not None:
            alarm = stages.look_at if alarm is None else min(alarm, stages.look_at)
        return alarm

    def _happen(self, event: Event) -> None:
        if self._exit is not None:
            return  # what the job of an agent that stops comes to is nobody's
        self._take_stages()
        self._perform(event(time.monotonic()))

    def _tick(self) -> None:
        """After every event, too: a busy agent must not hold up a heartbeat."""
        self._take_stages()
        self._perform(self._core.tick(time.monotonic()))

    def _take_stages(self) -> None:
        if self._stages is not None:
            for stage, at in self._stages.take():
                self._perform(self._core.progress(self._stages.lease, stage, at))

    # ---- actions -----------------------------------------------------------------------------------------------

    def _perform(self, actions: List[core.Action]) -> None:
        for action in actions:
            if isinstance(action, core.Send):
                self._send(action.message)
            elif isinstance(action, core.Open):
                self._open()
            elif isinstance(action, core.Close):
                self._close()
            elif isinstance(action, core.StartJob):
                self._start_job(action.lease, action.spec)
            elif isinstance(action, core.CancelJob):
                log.info(
                    "job %s: cancelled (%s)", action.lease.job_id, action.reason, extra={"job": action.lease.job_id}
                )
                if self._job is not None:
                    self._job.cancel(action.reason)
            elif isinstance(action, core.Keep):
                self._results.keep(action.finished)
            elif isinstance(action, core.Forget):
                self._results.forget(action.lease)
            else:
                self._exit = action

    def _send(self, message: m.AgentBody) -> None:
        if isinstance(message, (m.Hello, m.Heartbeat)):
            message = replace(message, health=examine(self._settings.data_dir))
        if self._link is not None:
            self._link.send(message)

    def _tls(self) -> Optional[Tls]:
        return None if self._identity is None else self._identity.tls

    def _keep_identity(self) -> None:
        """Renew the certificate before it expires, for as long as the agent runs."""
        identity = self._settings.identity
        assert identity is not None
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            pause_s = _LOOK_S
            if not identity.needs_renewal(time.time()):
                continue
            try:
                identity = renew(identity, self._settings.tracker)
                identity.save(self._settings.data_dir)
            except KedgeError as error:
                log.warning("the certificate of this device cannot be renewed yet: %s", error)
                pause_s = _RENEW_PAUSE_S
            else:
                # Connections that are open stay so; those to come use it.
                self._identity = identity
                log.info("renewed the certificate of this device")

    def _open(self) -> None:
        link = _Link(self._settings.tracker, self._tls())

        def received(message: m.TrackerBody) -> None:
            # What an assignment leads to is quickly done. What ends a job, or the connection, is not this thread's.
            put = self._strand.dispatch if isinstance(message, (m.AssignJob, m.ResultAccepted)) else self._strand.post
            put(lambda now: self._on_message(link, message, now))

        def closed(error: Optional[KedgeError]) -> None:
            self._strand.post(lambda now: self._on_closed(link, error, now))

        self._link = link
        link.start(received, closed)
        self._perform(self._core.connected(time.monotonic()))

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close(_FAREWELL_S)

    def _on_message(self, link: _Link, message: m.TrackerBody, now: float) -> List[core.Action]:
        if link is not self._link:
            return []
        if isinstance(message, m.Welcome):
            link.welcomed = True
            self._on_welcome()
        elif isinstance(message, m.Refused) and message.retry:
            self._warn_away(f"the tracker refused this agent: {message.reason}")
        elif isinstance(message, m.ResultAccepted) and message.stale:
            about = {"job": message.job_id}
            log.info("job %s: the tracker had given it up, its result is not used", message.job_id, extra=about)
        return self._core.received(message, now)

    def _on_welcome(self) -> None:
        if self._away:
            log.warning("connected to the tracker at %s again", self._settings.tracker)
        self._away = False
        if not self._announced:
            self._announced = True
            self._on_ready(self.device)

    def _on_closed(self, link: _Link, error: Optional[KedgeError], now: float) -> List[core.Action]:
        if link is not self._link:
            return []
        self._close()
        if isinstance(error, (AuthenticationError, PermissionDeniedError)) and not link.welcomed:
            self._refusal = type(error)
            return self._core.refused(f"the tracker refused this agent: {error}")
        # A stream that was welcome lasts no longer than the certificate it began with, which may have been renewed
        # since. An agent that is not wanted any more hears so at its next attempt.
        if error is not None:
            error = explained(error, self._identity)
        self._warn_away(str(error or "the tracker closed the connection"))
        return self._core.disconnected(now)

    def _warn_away(self, why: str) -> None:
        """Say it once for every absence; the attempts in between are for those who look for them."""
        level = logging.DEBUG if self._away else logging.WARNING
        log.log(level, "%s\n  trying again until the tracker takes this agent", why)
        self._away = True

    # ---- jobs --------------------------------------------------------------------------------------------------

    def _start_job(self, lease: Lease, spec: JobSpec) -> None:
        stages = self._stages = Stages(lease, lambda: self._strand.post(lambda _: []), time.monotonic)
        job = self._make_job(lease, spec, stages.enter)

        def work() -> None:
            finished = sendable(lease, _run(job, self.device.name))
            # It leaves, and is kept, while this thread has nothing else to do: what cleans up would compete with it.
            self._strand.dispatch(lambda _: self._on_finished(finished))
            if isinstance(job, Job):
                job.clean_up()  # a session has cleaned up before it is over
                if not self._ended.is_set():
                    job.make_ready()

        self._job = job
        self._worker.put(work)
        what = f"function {spec.function}" if spec.function else "a session"
        log.info("job %s: %s", lease.job_id, what, extra={"job": lease.job_id})

    def _make_job(self, lease: Lease, spec: JobSpec, progress: Callable[[Stage], None]) -> Union[Job, Session]:
        if not isinstance(spec.task, SessionTask):
            return Job(self._board, spec, progress)
        return Session(self._board, lease, spec, lambda: open_channel(self._settings.tracker, self._tls()))

    def _on_finished(self, finished: m.JobFinished) -> List[core.Action]:
        self._job = self._stages = None
        actions = self._core.finished(finished)
        starts = next((at for at, action in enumerate(actions) if isinstance(action, core.StartJob)), len(actions))
        self._perform(actions[:starts])  # it is on its way before the log has it, which tells of it before the next
        job_id, outcome = finished.lease.job_id, finished.result.outcome
        about = {"job": job_id, "outcome": outcome.kind, "stage": outcome.stage}
        log.info("job %s: %s", job_id, outcome, extra=about)
        return actions[starts:]

    def _shut_down(self) -> None:
        self._strand.close()
        self._ended.set()
        if self._job is not None:
            self._job.cancel("the agent stops")
        self._worker.end(_JOB_END_S)
        self._board.close()
        self._close()
        self._blobs.close()
        self._cage.close()
        self._lock_file.close()


class _Link:
    """One connection: messages out of a queue, messages into a callback, and one word when it ends."""

    def __init__(self, address: Address, tls: Optional[Tls]) -> None:
        self._address = address
        self._tls = tls
        #: Set by the agent's own thread, which alone reads it.
        self.welcomed = False
        #: Guards the three below: `close` may come before there is a connection.
        self._lock = threading.Lock()
        self._closed = False
        self._channel: Any = None
        self._call: Any = None
        self._out: queue.SimpleQueue[Optional[m.AgentBody]] = queue.SimpleQueue()
        self._ended = threading.Event()

    def start(self, received: Callable[[m.TrackerBody], None], closed: Callable[[Optional[KedgeError]], None]) -> None:
        """Dial. Both callbacks come from the link's own thread; `closed` comes once."""
        threading.Thread(target=self._read, args=(received, closed), name="kedge-link", daemon=True).start()

    def send(self, message: m.AgentBody) -> None:
        """Put a message on the stream."""
        self._out.put(message)

    def close(self, farewell_s: float) -> None:
        """End the stream once what was sent has left; no later than after `farewell_s`."""
        self._out.put(None)
        with self._lock:
            self._closed = True
            call, channel = self._call, self._channel
        if call is None:
            return  # its thread makes no connection any more
        self._ended.wait(farewell_s)
        call.cancel()
        channel.close()

    def _dial(self) -> Any:
        """The call; None after `close`. Looking names up may take long, and may fail (ConnectError)."""
        from kedge.protos.v1 import agent_pb2_grpc

        channel = open_channel(self._address, self._tls)
        with self._lock:
            if self._closed:
                channel.close()
                return None
            self._channel = channel
            stub: Any = cast(Any, agent_pb2_grpc.AgentsStub)(channel)
            self._call = stub.Connect(self._requests())
            return self._call

    def _requests(self) -> Iterator[Any]:
        for number in itertools.count(1):
            message = self._out.get()
            if message is None:
                return
            yield to_pb(message, number)

    def _read(self, received: Callable[[m.TrackerBody], None], closed: Callable[[Optional[KedgeError]], None]) -> None:
        import grpc

        from kedge.rpc import convert
        from kedge.rpc.status import from_rpc_error

        error: Optional[KedgeError] = None
        try:
            for pb in self._dial() or ():
                message = convert.tracker_message_from_pb(pb)
                if message is None:
                    log.info("ignored a message that only a newer tracker knows")
                else:
                    received(message)
        except grpc.RpcError as failure:
            error = from_rpc_error(failure, self._address)
        except KedgeError as failure:
            error = failure
        finally:
            self._out.put(None)
            self._ended.set()
            closed(error)


class BlobLink:
    """The tracker's blobs over a connection of their own, made when first needed, broken off by `interrupt`.

    `tls` says how to talk to it; a connection is left for another one when that has changed, between transfers.
    """

    def __init__(self, address: Address, tls: Callable[[], Optional[Tls]] = lambda: None) -> None:
        self._address = address
        self._tls = tls
        self._lock = threading.Lock()
        self._channel: Any = None
        self._spoken: Optional[Tls] = None
        self._transfers = 0

    def download(self, blob: Blob, store: BlobStore) -> Path:
        """Fetch a blob into `store`; raises as `BlobClient.download`, and ConnectError when interrupted."""
        return cast(Path, self._do(lambda client: client.download(blob, store)))

    def upload(self, blob: Blob, source: Union[bytes, memoryview]) -> None:
        """Send a blob that the tracker may have already; raises as `BlobClient.upload`."""
        self._do(lambda client: client.upload_missing([(blob, source)]))

    def interrupt(self) -> None:
        """Make what another thread transfers fail; the next transfer connects again."""
        self.close()

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _do(self, transfer: Callable[[BlobClient], object]) -> object:
        with self._lock:
            tls = self._tls()
            if self._channel is not None and tls != self._spoken and not self._transfers:
                # Calls are judged by the certificate that their connection began with, however old that is.
                self._channel.close()
                self._channel = None
            if self._channel is None:
                self._channel, self._spoken = open_channel(self._address, tls), tls
            channel = self._channel
            self._transfers += 1
        try:
            return transfer(BlobClient(channel, self._address))
        except ValueError as error:
            # What gRPC raises for a call on a channel that was closed meanwhile.
            if channel is self._channel:
                raise
            raise ConnectError("the transfer was interrupted") from error
        finally:
            with self._lock:
                self._transfers -= 1


def _run(job: Union[Job, Session], device: str) -> JobResult:
    """A job's result, also where the agent itself fails: a lease must never stay open."""
    try:
        return job.run()
    except BaseException as error:
        log.exception("a job's thread failed")
        return JobResult(Outcome(OutcomeKind.DEVICE_FAULT, message=f"the agent failed: {error!r}"), device=device)


def sendable(lease: Lease, result: JobResult) -> Packed:
    """A job's end as it travels: `result`, its texts cut where they are too long, or why it cannot travel."""
    from kedge.rpc import bounds

    result = _with_cut_texts(result)
    try:
        packed = _pack(lease, result)
        bounds.check(packed.pb)
    except Exception as error:  # noqa: BLE001 - whatever protobuf refuses
        why = (
            f"the result of this job cannot be sent: {error.message if isinstance(error, KedgeError) else f'{error!a}'}"
        )
    else:
        return packed
    log.error("job %s: %s", lease.job_id, why, extra={"job": lease.job_id})
    # What is in a result, and how much of it, is the artifact's doing.
    outcome = Outcome(OutcomeKind.BAD_REQUEST, message=why)
    return _pack(lease, JobResult(outcome, stage_times=result.stage_times, device=result.device))


def _pack(lease: Lease, result: JobResult) -> Packed:
    return Packed(lease, result, to_pb(m.JobFinished(lease, result), 0).job_finished)


def _with_cut_texts(result: JobResult) -> JobResult:
    """The same; what is there for people to read alone is no reason to lose it."""
    from kedge.rpc.bounds import cut

    outcome = replace(result.outcome, message=cut("kedge.v1.Outcome.message", result.outcome.message))
    measured = result.measurement
    reasons = () if measured is None else tuple(cut("kedge.v1.Measurement.reasons", text) for text in measured.reasons)
    if outcome == result.outcome and (measured is None or reasons == measured.reasons):
        return result
    measurement = None if measured is None else replace(measured, reasons=reasons)
    return replace(result, outcome=outcome, measurement=measurement)


def _confine(settings: Settings, scratch: Path) -> Tuple[Cage, RunnerHello, Confinement]:
    """What surrounds runners here, and what one that is in it says and shows."""
    cage = Cage.build(settings.runner, settings.data_dir, scratch, settings.user)
    try:
        hello, confinement = _greet_runner(settings.runner, cage, scratch, settings.measuring)
    except RunnerUnavailable as error:
        if cage.groups is None:
            raise
        # The one part that a runner may find missing: groups that it cannot be born into, before Linux 5.7.
        cage.forgo_groups(error.message)
        hello, confinement = _greet_runner(settings.runner, cage, scratch, settings.measuring)
    log.info("runners are held by: %s", confinement)
    for missing in confinement.missing:
        log.warning("runners are not held by %s", missing)
    if os.geteuid() == 0 and settings.user is None:
        log.warning("runners run as root: what an artifact may do is bounded by its limits and filters alone")
    return cage, hello, confinement


def _greet_runner(path: Path, cage: Cage, scratch: Path, measuring: Tuple[int, ...]) -> Tuple[RunnerHello, Confinement]:
    try:
        with Runner(path, limits=Limits(sandbox=True), cwd=scratch, cage=cage) as runner:
            return runner.hello, cage.describe(runner.hello.pid, measuring)
    except RunnerUnavailable as error:
        if cage.user is not None and "--user" in error.message:
            error.hint = "this container has no such user; --runner-user root leaves runners what the agent is"
        raise


def _find_gpus(path: Path, kind: str, cage: Cage, scratch: Path) -> Tuple[Accelerator, ...]:
    """The GPUs of a kind that a job would find; a driver that fails costs the device its GPUs, not its CPU."""
    folder = Path(tempfile.mkdtemp(prefix="gpus-", dir=str(scratch)))
    try:
        cage.furnish(folder)  # drivers find nothing where they can write nothing
        with Runner(path, cwd=folder, cage=cage) as runner:
            found = runner.devices(kind)
    except RunnerError as error:
        log.warning("this device offers no %s: looking for it failed: %s", kind, error)
        return ()
    finally:
        cage.clear(folder)
    if found.reason:
        log.info("%s: %s", kind, found.reason)
    return found.accelerators


def elf_bits(path: Path) -> int:
    """32 or 64: what the runner is built for decides what the device runs, whatever the kernel is."""
    with path.open("rb") as file:
        head = file.read(5)
    return {b"\x7fELF\x01": 32, b"\x7fELF\x02": 64}.get(head, struct.calcsize("P") * 8)


def _claim(data_dir: Path) -> TextIO:
    """Make the folder ours for as long as the returned file is open."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        data_dir.chmod(0o700)  # its keys, and the artifacts of all users
        file = (data_dir / "lock").open("a")
    except OSError as error:
        raise AgentError(
            f"cannot use the data folder {data_dir}: {error.strerror}", hint="name another with --data-dir"
        ) from error
    try:
        # This process's alone: flock's would last until what it was just starting, when it was killed, has begun.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AgentError(
            f"another agent uses the data folder {data_dir}", hint="stop it, or name another folder with --data-dir"
        ) from error
    os.set_inheritable(file.fileno(), False)
    return file


def _clean(scratch: Path) -> None:
    """An empty folder for jobs: what a killed agent left there is nobody's."""
    try:
        remove_tree(scratch)
        scratch.mkdir()
    except OSError as error:
        raise AgentError(f"cannot empty {scratch}: {error.strerror}", hint="remove it by hand") from error
