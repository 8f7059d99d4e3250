"""Runs one job in a runner of its own, and turns whatever happens into one typed result.

    transfer   manifest, the members of the variant that fits this device, inputs
    load       a new runner opens the variant's lib.so
    run        one call, or a timing
    transfer   again, where outputs are too large to travel inline: they are uploaded

Every stage has its deadline. The only exceptions that leave `Job.run` are those that end the process.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Protocol, Sequence, Tuple, Type, Union

from kedge.device_agent.cache import ArtifactCache, CacheFullError, Hold
from kedge.device_agent.cage import Cage, remove_tree
from kedge.device_agent.cores import Watch
from kedge.device_agent.health import Fitness, read_health
from kedge.device_agent.runner import Limits, Runner
from kedge.device_agent.runner_errors import (
    RunnerCrashed,
    RunnerError,
    RunnerOutOfMemory,
    RunnerRefused,
    RunnerTimeout,
    RunnerUnavailable,
)
from kedge.device_agent.runtime import protocol
from kedge.device_agent.seats import Coming, Seat, Spare
from kedge.rpc import abi
from kedge.rpc.artifact.manifest import Function, Manifest, Member, Port, Variant
from kedge.rpc.artifact.place import CPU, Placement, look_at, place
from kedge.rpc.blobs import (
    BlobError,
    BlobQuotaError,
    BlobStore,
    CorruptBlobError,
    DiskFullError,
    MissingBlobError,
    blob_of,
)
from kedge.rpc.errors import (
    ArtifactError,
    ConnectError,
    IncompatibleTargetError,
    InputError,
    KedgeError,
    PermissionDeniedError,
)
from kedge.rpc.limits import check_spec
from kedge.rpc.measure import is_disturbed, judge
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.security import signing
from kedge.rpc.types import (
    BenchTask,
    Blob,
    DeviceInfo,
    Health,
    JobResult,
    JobSpec,
    Measurement,
    Pinning,
    RunTask,
    SessionTask,
    Signature,
    StageTime,
    Tensor,
    TimeOptions,
    Verdict,
    plan_inline,
)

log = logging.getLogger("kedge.agent")

#: Is told of a runner that has a process and has said nothing yet: from then on `kill` ends it.
Started = Callable[[Runner], None]

#: For a stage whose deadline a tracker left open, in milliseconds.
DEFAULT_DEADLINES_MS: Mapping[Stage, int] = {Stage.TRANSFER: 300_000, Stage.LOAD: 60_000, Stage.RUN: 300_000}
#: Between two attempts to reach a tracker that went away in the middle of a transfer.
_AWAY_PAUSE_S = 0.5
#: A tracker that cannot take a result now may have room for it soon; computing it again would not help.
_NO_ROOM = (DiskFullError, BlobQuotaError)
#: Between two looks at a device that is hot.
_CALM_PAUSE_S = 1.0
#: A runner that says nothing for so long is broken.
_START_S = 30.0
#: Of the time that a job's runner has to start: how long it waits for the spare that is being started, which is ahead
#: of one of its own however slow the board is. The rest is for that one, where the spare hangs.
_COMING_SHARE = 0.5
#: An agent that ends waits so long for the spare that is being started, and was given up, to be cleared away.
_GIVE_UP_S = 1.0
#: Files a runner may have open: its library, weights, shared tensors, and some to spare.
_OPEN_FILES = 64
#: The largest file that it may write, of those in memory too: larger outputs travel in pieces.
_FILE_BYTES = 1 << 30
#: The stages that a runner lives through, and CPU seconds beyond their deadlines, which end it first and say why.
_RUNNING = (Stage.LOAD, Stage.RUN)
_SPARE_CPU_S = 10
#: Beyond those of the kernels: the runner's own, and what libraries may start.
_SPARE_THREADS = 64
#: Of a GPU's driver: its own threads, and the compiler and linker that it may start. More than a runner without a GPU
#: may have, so that none of those keeps a driver of the same user from starting.
_GPU_PROCESSES = 256
#: What an artifact's code may take of the device's memory, so that the agent and the system survive it.
_MEMORY_SHARE = 0.9


class Blobs(Protocol):
    """The tracker's blobs, as jobs need them (see `kedge.rpc.blob_client`)."""

    def download(self, blob: Blob, store: BlobStore) -> Path:
        """Fetch a blob into the store."""

    def upload(self, blob: Blob, source: Union[bytes, memoryview]) -> None:
        """Send a blob."""

    def interrupt(self) -> None:
        """Make the transfer that another thread has in flight fail; later ones work again."""


@dataclass(frozen=True)
class Board:
    """What jobs are run with: the device, its runner, and where things lie.

    `threads` is what the device offers to jobs that time nothing, or to all where no cores are kept for timings.
    """

    device: DeviceInfo
    runner: Path
    threads: int
    cache: ArtifactCache
    scratch: Path
    blobs: Blobs
    #: How long a measurement waits for a hot, throttled or unfit device at most; what it measures then is suspect.
    calm_s: float = 30.0
    fitness: Fitness = field(default_factory=Fitness)
    #: A session of which nothing is asked for so long ends: its client has forgotten that others wait for the device.
    session_idle_s: float = 3600.0
    #: Public keys of those whose artifacts may run here; empty: everybody's.
    signers: FrozenSet[bytes] = frozenset()
    #: What surrounds runners; None: their limits alone.
    cage: Optional[Cage] = None
    #: The cores kept for timings, and all others; empty: nothing is kept.
    measuring: Tuple[int, ...] = ()
    others: Tuple[int, ...] = ()
    #: A runner that waits for the next job.
    spare: Spare = field(default_factory=Spare)

    def offered(self, *, timing: bool) -> int:
        """How many threads a job may have."""
        return len(self.measuring) if timing and self.measuring else self.threads

    def check_signature(self, signature: Optional[Signature], manifest: bytes) -> None:
        """Raise as `signing.verify` where only what known signers signed may run, and this is not."""
        if self.signers:
            signing.verify(manifest, signature, self.signers)

    def health(self) -> Health:
        """The device's condition now, with the clock of a core that timings run on, and what makes it unfit."""
        health = read_health(self.scratch, cpu=self.measuring[0] if self.measuring else None)
        return replace(health, problems=self.fitness.problems(health))

    def new_folder(self, prefix: str) -> Path:
        """A folder for one job, in which its runner may write; raises OSError."""
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=str(self.scratch)))
        if self.cage is not None:
            self.cage.furnish(folder)
        return folder

    def remove_folder(self, folder: Path) -> None:
        """Remove it with all that is in it, as far as that can be done."""
        try:
            if self.cage is not None:
                self.cage.clear(folder)
            else:
                remove_tree(folder)
        except OSError as error:
            log.warning("cannot remove %s: %s", folder, error)

    def show(self, path: Path, folder: Path, name: str) -> Path:
        """Where the runner of the job with that folder finds a file of the cache; raises OSError."""
        return path if self.cage is None else self.cage.admit(path, folder, name)

    def hide(self, folder: Path, name: str) -> None:
        """Take back what the runner was shown under this name, as far as that can be done."""
        if self.cage is not None:
            try:
                self.cage.withdraw(folder, name)
            except OSError as error:
                log.warning("cannot take back %s of %s: %s", name, folder, error)

    def start_runner(
        self, limits: Limits, folder: Path, threads: int, started: Started = lambda _: None, *, timing: bool
    ) -> Runner:
        """A runner for the job with that folder, on the cores for timings or on others; raises RunnerUnavailable.

        `started` is told of it as `Runner` tells it.
        """
        spare = self.spare.drop()
        if spare is not None:
            self.vacate(spare)
        return self._start(limits, folder, threads, self._cpus(timing), _START_S, started)

    def take_seat(
        self,
        limits: Limits,
        patience_s: float,
        called_off: threading.Event,
        started: Started = lambda _: None,
        *,
        timing: bool,
    ) -> Seat:
        """The spare where it fits, else a new one; raises RunnerUnavailable, OSError. `vacate` gives it back.

        None is waited for or started once `called_off` is set; `started` is told of a new one as `Runner` tells it.
        """
        cpus, ends = self._cpus(timing), time.monotonic() + patience_s
        spare = self.spare.take(limits, cpus, patience_s * _COMING_SHARE, called_off)
        # What has exited was the first that the system ends when memory runs out.
        if spare is not None and (not spare.fits(limits, cpus) or spare.runner.exited):
            self.vacate(spare)
            spare = None
        if spare is None and called_off.is_set():
            raise RunnerUnavailable("nobody wants a runner any more: the job was called off", stage="start")
        return spare or self._new_seat(limits, cpus, max(ends - time.monotonic(), 0.001), started)

    def vacate(self, seat: Seat) -> None:
        """End a runner and remove its folder."""
        seat.runner.close()
        self.remove_folder(seat.folder)

    def make_ready(self, like: Seat) -> None:
        """Have a spare started for one more job like the one that had this seat; GPUs' are started when needed."""
        coming = self.spare.expect(like.limits, like.cpus) if like.limits.sandbox else None
        if coming is not None:
            threading.Thread(target=self._prepare, args=(coming,), name="kedge-spare", daemon=True).start()

    def close(self) -> None:
        """End the spare; there is none any more."""
        seat, coming = self.spare.close()
        if seat is not None:
            self.vacate(seat)
        if coming is not None:
            coming.over.wait(_GIVE_UP_S)

    def _prepare(self, coming: Coming) -> None:
        try:
            seat = self._new_seat(coming.limits, coming.cpus, _START_S, coming.started)
            surplus = self.spare.put(coming, seat)
            if surplus is not None:
                self.vacate(surplus)
        except (RunnerUnavailable, OSError) as error:
            if self.spare.miss(coming):
                log.warning("no runner waits for the next job, which starts its own: %s", error)
        finally:
            coming.over.set()

    def _new_seat(
        self,
        limits: Limits,
        cpus: Optional[Tuple[int, ...]],
        patience_s: float,
        started: Started = lambda _: None,
    ) -> Seat:
        folder = self.new_folder("job-")
        try:
            runner = self._start(limits, folder, 0, cpus, patience_s, started)
        except BaseException:
            self.remove_folder(folder)
            raise
        offer_to_oom_killer(runner.hello.pid)
        return Seat(runner, folder, limits, cpus)

    def _start(
        self,
        limits: Limits,
        folder: Path,
        threads: int,
        cpus: Optional[Tuple[int, ...]],
        patience_s: float,
        started: Started = lambda _: None,
    ) -> Runner:
        return Runner(
            self.runner,
            threads,
            limits,
            cpus=cpus,
            cwd=folder,
            start_deadline_s=patience_s,
            cage=self.cage,
            started=started,
        )

    def _cpus(self, timing: bool) -> Optional[Tuple[int, ...]]:
        return (self.measuring if timing else self.others) or None

    def watch(self, runner: Runner) -> Watch:
        """What others do on the cores of a timing that begins now."""
        return Watch(runner.hello.pid, self.measuring or sorted(os.sched_getaffinity(0)))

    def pinning(self, watch: Watch) -> Pinning:
        """Where the timing ran that was watched until now."""
        enforced = self.cage is not None and self.cage.groups is not None and self.cage.groups.cpuset
        share = watch.others_share()
        return Pinning(watch.cpus, bool(self.measuring), bool(self.measuring) and enforced, share)


class _Ended(Exception):
    """The job is over, with this outcome."""

    def __init__(self, kind: OutcomeKind, message: str, stage: Optional[Stage] = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.stage = stage


@dataclass(frozen=True)
class _Loadable:
    """What the transfer brought."""

    function: Function
    index: int
    lib: Path
    weights: Optional[Path]
    weights_offset: int
    placement: Placement
    variant: int
    inputs: Tuple[protocol.Tensor, ...]


class Job:
    """One run of one spec. `run` blocks; `cancel` may come from any thread, at any time, more than once.

    After `run`, whether or not its result was sent, comes `clean_up`.
    """

    def __init__(self, board: Board, spec: JobSpec, progress: Callable[[Stage], None]) -> None:
        self._board = board
        self._spec = spec
        self._progress = progress
        self._stage = Stage.TRANSFER
        self._stage_ends = math.inf
        self._durations: Dict[Stage, int] = {}
        self._lock = threading.Lock()
        self._cancelled: Optional[str] = None
        self._calling_off = threading.Event()
        self._seat: Optional[Seat] = None
        #: Its runner, from when that has a process.
        self._runner: Optional[Runner] = None
        self._afterwards = ExitStack()

    def cancel(self, reason: str) -> None:
        """End the job soon; it reports `cancelled`, unless it ended otherwise before."""
        with self._lock:
            if self._cancelled is not None:
                return
            self._cancelled = reason
            self._calling_off.set()
            runner = self._runner
        if runner is not None:
            runner.kill()
        else:
            self._board.spare.wake()
        if self._stage is Stage.TRANSFER:
            self._board.blobs.interrupt()

    def run(self) -> JobResult:
        """Do it all; always returns."""
        outputs: Tuple[Tensor, ...] = ()
        measurement: Optional[Measurement] = None
        try:
            outputs, measurement = self._execute()
            outcome = _measured(measurement)
        except Exception as error:  # noqa: BLE001 - a job must report, whatever happens to it
            outcome = self._outcome(error)
        times = tuple(StageTime(stage, duration) for stage, duration in self._durations.items())
        return JobResult(outcome, outputs, measurement, times, self._board.device.name)

    def clean_up(self) -> None:
        """End the runner and remove the job's files: nobody who waits for the result waits for that."""
        self._afterwards.close()

    def make_ready(self) -> None:
        """After `clean_up`: have a runner wait for the next job, which may be like this one."""
        if self._seat is not None:
            self._board.make_ready(self._seat)

    # ---- the stages --------------------------------------------------------------------------------------------

    def _execute(self) -> Tuple[Tuple[Tensor, ...], Optional[Measurement]]:
        hold = self._afterwards.enter_context(self._board.cache.hold())
        with self._in(Stage.TRANSFER):
            what = self._transfer(hold)
        with self._in(Stage.LOAD):
            runner = self._load(what)
        with self._in(Stage.RUN):
            results, measurement = self._work(runner, what)
        return self._deliver(what.function, results, runner), measurement

    def _transfer(self, hold: Hold) -> _Loadable:
        hold.fetch([self._spec.manifest], self._download)
        check = partial(self._board.check_signature, self._spec.signature)
        manifest = hold.manifest(self._spec.manifest, check)
        self._check_request()
        info = self._board.device
        placement = place(manifest, info.arch, info.cpu_features, look_at(info), self._spec.on)
        variant = placement.variant
        function, index = _find(manifest, self._spec.function)
        wanted = _arrange(function, self._spec.task.inputs)
        members = members_of(manifest, variant)
        parts = [part for member in members for part in member.parts]
        hold.fetch([*parts, *(t.data for t in wanted if isinstance(t.data, Blob))], self._download)
        paths = [hold.member(member) for member in members]
        return _Loadable(
            function,
            index,
            paths[0],
            paths[1] if len(paths) > 1 else None,
            variant.weights_offset,
            placement,
            manifest.variants.index(variant),
            tuple(_native(tensor, hold) for tensor in wanted),
        )

    def _check_request(self) -> None:
        try:
            check_spec(self._spec)
        except InputError as error:
            raise _Ended(OutcomeKind.BAD_REQUEST, error.message) from error
        wanted, offered = self._spec.num_threads, self._board.offered(timing=self._is_timing)
        if wanted > offered:
            text = f"the job wants {wanted} threads; {self._board.device.name} offers {offered}"
            raise _Ended(OutcomeKind.BAD_REQUEST, text)

    def _load(self, what: _Loadable) -> Runner:
        patience_s = min(_START_S, self._left_s())
        try:
            limits = self._limits(what.placement)
            seat = self._board.take_seat(
                limits, patience_s, self._calling_off, self._has_runner, timing=self._is_timing
            )
        except RunnerUnavailable:
            self._check_cancelled()
            self._check_deadline()  # it was given no more time than the stage had left
            raise
        self._afterwards.callback(self._board.vacate, seat)
        self._seat = seat
        self._has_runner(seat.runner)
        self._check_cancelled()
        lib = self._board.show(what.lib, seat.folder, "lib.so")
        weights = None if what.weights is None else self._board.show(what.weights, seat.folder, "weights")
        runner, threads, device = seat.runner, self._threads(what.placement), what.placement.dl_device
        module = runner.open(lib, weights, what.weights_offset, self._left_s(), device=device, threads=threads)
        names = [function.name for function in module.functions]
        if names[what.index : what.index + 1] != [what.function.name]:
            raise _Ended(
                OutcomeKind.LOAD_ERROR,
                f"the manifest promises {what.function.name!r} as function {what.index}; lib.so has {names}",
            )
        return runner

    def _has_runner(self, runner: Runner) -> None:
        """From now on `cancel` ends it; it ends now where that came before."""
        with self._lock:
            self._runner = runner
            cancelled = self._cancelled is not None
        if cancelled:
            runner.kill()

    def _threads(self, placement: Placement) -> int:
        return placement.threads(self._spec.num_threads, self._board.offered(timing=self._is_timing))

    @property
    def _is_timing(self) -> bool:
        return isinstance(self._spec.task, BenchTask)

    def _limits(self, placement: Placement) -> Limits:
        seconds = sum(self._spec.deadlines.of(stage) or DEFAULT_DEADLINES_MS[stage] for stage in _RUNNING) / 1000
        return limits_of(self._board, placement.kind, seconds * self._threads(placement))

    def _work(self, runner: Runner, what: _Loadable) -> Tuple[List[protocol.Tensor], Optional[Measurement]]:
        task = self._spec.task
        assert not isinstance(task, SessionTask)  # those are no jobs of one artifact
        if isinstance(task, RunTask):
            call = runner.call(what.index, what.inputs, deadline_s=self._left_s(), discard_outputs=task.discard_outputs)
            return call, None
        results: List[protocol.Tensor] = []
        if task.return_outputs:
            results = runner.call(what.index, what.inputs, deadline_s=self._left_s())
        before = self._await_calm()
        watch = self._board.watch(runner)
        timed = runner.time(what.index, what.inputs, task.options, deadline_s=self._left_s())
        pinning, threads = self._board.pinning(watch), self._threads(what.placement)
        return results, measurement_of(self._board, task.options, timed, before, threads, what.variant, pinning)

    def _await_calm(self) -> Health:
        health = await_calm(self._board, self._left_s() / 2, self._calling_off)
        self._check_cancelled()
        return health

    def _deliver(self, function: Function, results: Sequence[protocol.Tensor], runner: Runner) -> Tuple[Tensor, ...]:
        """The outputs as they travel; large ones are uploaded, in a second transfer stage without the runner."""
        tensors = []
        uploads = []
        for port, result, inline in zip(function.outputs, results, plan_inline(r.nbytes for r in results)):
            data: Union[bytes, Blob] = bytes(result.data) if inline else blob_of(memoryview(result.data))
            tensors.append(Tensor(port.name, result.dtype, result.shape, data))
            if isinstance(data, Blob):
                uploads.append((data, memoryview(result.data)))
        if uploads:
            runner.close()
            with self._in(Stage.TRANSFER):
                for blob, view in uploads:
                    self._patiently(partial(self._board.blobs.upload, blob, view), _NO_ROOM)
        return tuple(tensors)

    # ---- deadlines and cancelling ------------------------------------------------------------------------------

    @contextmanager
    def _in(self, stage: Stage) -> Iterator[None]:
        """Spend a stage's time."""
        limit_s = (self._spec.deadlines.of(stage) or DEFAULT_DEADLINES_MS[stage]) / 1000
        self._stage = stage
        began = time.monotonic()
        self._stage_ends = began + limit_s
        self._check_cancelled()
        self._progress(stage)
        try:
            yield
            if stage is Stage.TRANSFER:
                self._check_deadline()
        finally:
            self._durations[stage] = self._durations.get(stage, 0) + int((time.monotonic() - began) * 1e9)

    def _left_s(self) -> float:
        """What is left of the stage, in seconds, and always some: the runner itself says when it is too late."""
        return max(self._stage_ends - time.monotonic(), 0.001)

    def _check_deadline(self, why: str = "") -> None:
        if time.monotonic() >= self._stage_ends:
            took = self._spec.deadlines.of(self._stage) or DEFAULT_DEADLINES_MS[self._stage]
            text = f"{self._stage.value} took longer than {took} ms"
            raise _Ended(OutcomeKind.TIMEOUT, f"{text}: {why}" if why else text)

    def _check_cancelled(self) -> None:
        if self._cancelled is not None:
            raise _Ended(OutcomeKind.CANCELLED, self._cancelled)

    def _download(self, blob: Blob, store: BlobStore) -> None:
        # A tracker that has it from another one needs room for it, too.
        self._patiently(partial(self._board.blobs.download, blob, store), (BlobQuotaError,))

    def _patiently(self, transfer: Callable[[], object], also: Tuple[Type[KedgeError], ...] = ()) -> None:
        """Transfer, at most until the stage's deadline; what errors of `also` say may pass, as a lost tracker may."""
        timer = threading.Timer(self._left_s(), self._board.blobs.interrupt)
        timer.daemon = True
        timer.start()
        passing: Tuple[Type[KedgeError], ...] = (ConnectError, *also)
        why = ""
        try:
            while True:
                try:
                    self._check_cancelled()
                    self._check_deadline(why)
                    transfer()
                    return
                except passing as error:
                    why = error.message
                    self._check_cancelled()
                    self._check_deadline(why)
                    time.sleep(min(_AWAY_PAUSE_S, self._left_s()))
        finally:
            timer.cancel()

    # ---- what it was -------------------------------------------------------------------------------------------

    def _outcome(self, error: Exception) -> Outcome:
        """The typed end that an exception means."""
        if self._cancelled is not None:
            return Outcome(OutcomeKind.CANCELLED, self._stage, message=self._cancelled)
        if isinstance(error, _Ended):
            return Outcome(error.kind, error.stage or self._stage, message=error.message)
        if isinstance(error, RunnerError):
            return runner_outcome(error)
        if self._stage is Stage.TRANSFER and time.monotonic() >= self._stage_ends:
            took = self._spec.deadlines.of(self._stage) or DEFAULT_DEADLINES_MS[self._stage]
            return Outcome(OutcomeKind.TIMEOUT, self._stage, message=f"transfer took longer than {took} ms")
        text = str(error) if isinstance(error, KedgeError) else f"{type(error).__name__}: {error}"
        if isinstance(error, IncompatibleTargetError):
            return Outcome(OutcomeKind.LOAD_ERROR, Stage.LOAD, message=text)
        if isinstance(error, (ArtifactError, CorruptBlobError)):
            return Outcome(OutcomeKind.LOAD_ERROR, self._stage, message=text)
        if isinstance(error, MissingBlobError):
            return Outcome(OutcomeKind.BAD_REQUEST, self._stage, message=text)
        if isinstance(error, CacheFullError):  # of the job's making: the device is as sound as before
            return Outcome(OutcomeKind.OUT_OF_MEMORY, self._stage, message=text)
        # The tracker takes nothing of a job that it has given to somebody else meanwhile.
        if not isinstance(error, (BlobError, PermissionDeniedError, OSError)):
            log.error("a job failed in a way that has no name", exc_info=error)
        return Outcome(OutcomeKind.DEVICE_FAULT, self._stage, message=text)


def limits_of(board: Board, kind: str, cpu_s: float) -> Limits:
    """What a runner for "cpu" or a GPU's kind may use, with so many seconds of all its threads together."""
    memory = int(board.device.memory_bytes * _MEMORY_SHARE) or None
    if kind != CPU:
        # A GPU's driver reserves address space for all memory there is, on either side, opens what it likes and starts
        # threads and compilers: only a control group can hold its memory, only that or a user of its own its processes.
        if board.cage is None:
            return Limits()
        return Limits(memory_bytes=memory, processes=board.device.num_cores + _GPU_PROCESSES)
    return Limits(
        memory_bytes=memory,
        cpu_s=math.ceil(cpu_s) + _SPARE_CPU_S,
        open_files=_OPEN_FILES,
        file_size_bytes=_FILE_BYTES,
        processes=max(board.threads, len(board.measuring)) + _SPARE_THREADS,
        sandbox=True,
    )


def await_calm(board: Board, longest_s: float, called_off: threading.Event) -> Health:
    """The device's condition once nothing that may pass disturbs it, or after as long as may be waited."""
    ends = time.monotonic() + min(board.calm_s, longest_s)
    while True:
        health = board.health()
        left = ends - time.monotonic()
        if left <= 0 or not is_disturbed(health) or called_off.wait(min(left, _CALM_PAUSE_S)):
            return health


def measurement_of(
    board: Board,
    options: TimeOptions,
    timed: protocol.TimeResult,
    before: Health,
    threads: int,
    variant: int,
    pinning: Pinning,
) -> Measurement:
    """What a runner timed, judged with the device's condition before and now."""
    measurement = Measurement(
        options=replace(options, number=timed.number),
        samples_ns=timed.samples_ns,
        resolution_ns=timed.resolution_ns,
        num_threads=threads,
        before=before,
        after=board.health(),
        profile=None if timed.profile is None else replace(timed.profile, variant=variant),
        pinning=pinning,
    )
    verdict, reasons = judge(measurement, board.device.emulated, board.device.num_cores)
    return replace(measurement, verdict=verdict, reasons=tuple(reasons))


def _measured(measurement: Optional[Measurement]) -> Outcome:
    """A job that went well is ok, unless what it measured says nothing."""
    if measurement is not None and measurement.verdict is Verdict.INVALID:
        return Outcome(OutcomeKind.INVALID_MEASUREMENT, Stage.RUN, message="; ".join(measurement.reasons))
    return Outcome(OutcomeKind.OK)


def runner_outcome(error: RunnerError) -> Outcome:
    """A runner's failure as an outcome."""
    stage = Stage.RUN if error.stage == "run" else Stage.LOAD
    text = str(error)
    if isinstance(error, RunnerTimeout):
        return Outcome(OutcomeKind.TIMEOUT, stage, message=text)
    if isinstance(error, RunnerCrashed):
        return Outcome(OutcomeKind.CRASH, stage, error.signal, error.exit_status, text)
    if isinstance(error, RunnerOutOfMemory):
        return Outcome(OutcomeKind.OUT_OF_MEMORY, stage, message=text)
    if isinstance(error, RunnerRefused):
        if error.status in (abi.E_LOAD, abi.E_ABI, abi.E_FEATURE):
            return Outcome(OutcomeKind.LOAD_ERROR, stage, message=text)
        if error.status == abi.E_KERNEL:
            return Outcome(OutcomeKind.CRASH, stage, message=text)
        return Outcome(OutcomeKind.BAD_REQUEST, stage, message=text)
    return Outcome(OutcomeKind.DEVICE_FAULT, stage, message=text)


def _find(manifest: Manifest, name: str) -> Tuple[Function, int]:
    try:
        function = manifest.function(name)
    except ArtifactError as error:
        raise _Ended(OutcomeKind.BAD_REQUEST, str(error)) from error
    return function, manifest.functions.index(function)


def members_of(manifest: Manifest, variant: Variant) -> List[Member]:
    """The variant's library and, where it has any, its weights."""
    return [manifest.member(name) for name in (variant.lib, variant.weights) if name is not None]


def _arrange(function: Function, inputs: Sequence[Tensor]) -> List[Tensor]:
    """The inputs in the function's order, checked against its ports."""
    given = {tensor.name: tensor for tensor in inputs}
    wanted = [port.name for port in function.inputs]
    if set(given) != set(wanted) or len(given) != len(inputs):
        raise _Ended(
            OutcomeKind.BAD_REQUEST,
            f"{function.name} takes the inputs {', '.join(wanted) or '(none)'};"
            f" given: {', '.join(tensor.name for tensor in inputs) or '(none)'}",
        )
    for port in function.inputs:
        _check_input(port, given[port.name])
    return [given[name] for name in wanted]


def _check_input(port: Port, tensor: Tensor) -> None:
    """Refuse what the manifest rules out; symbolic dims are the runtime's to check."""
    fits = len(tensor.shape) == len(port.shape) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(port.shape, tensor.shape)
    )
    if tensor.dtype != port.dtype or not fits:
        raise _Ended(OutcomeKind.BAD_REQUEST, f"input {port} does not take {tensor.dtype}{list(tensor.shape)}")
    try:
        tensor.check()
    except ValueError as error:
        raise _Ended(OutcomeKind.BAD_REQUEST, str(error)) from error


def _native(tensor: Tensor, hold: Hold) -> protocol.Tensor:
    """A tensor for the runner; a blob's bytes are mapped, not read."""
    data: Union[bytes, memoryview]
    if isinstance(tensor.data, Blob):
        with hold.path(tensor.data).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if tensor.data.size else b""
    else:
        data = tensor.data
    return protocol.Tensor(tensor.dtype, tensor.shape, data)


def offer_to_oom_killer(pid: int) -> None:
    """When memory runs out, the kernel should end the runner first, not the agent or the system."""
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY)
    except OSError as error:
        log.debug("cannot set the runner's oom_score_adj: %s", error)
        return
    with os.fdopen(fd, "w") as file:
        file.write("1000")
