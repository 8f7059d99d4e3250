"""The synchronous client: a tracker's devices and jobs.

    with connect("tracker:9190") as fleet:
        print(fleet.run(artifact, {"x": x}, device="arch=aarch64").wait()["y"])
        with fleet.session("rpi4") as device:
            m = device.load(artifact)
            print(m.time({"x": x}))

A tracker that restarts is waited for; jobs survive that, sessions do not. Ctrl-C in `wait` leaves the job alone; in the
`run` and `time` of a session it stops the call, in those of a pinned device it cancels the job.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self, cast

import grpc

from kedge.protos.v1 import fleet_pb2, fleet_pb2_grpc, types_pb2
from kedge.rpc import convert, interrupts
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import MissingBlobError, blob_of
from kedge.rpc.client import plan
from kedge.rpc.client.inputs import Array
from kedge.rpc.client.job_stream import JobStream, StreamBroken
from kedge.rpc.client.plan import ArtifactOrPath, Packed, Request, Result
from kedge.rpc.client.profile import Profile, profile_of, profile_options
from kedge.rpc.client.session import Session
from kedge.rpc.client.session_link import SessionLink
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import ConnectError, KedgeError
from kedge.rpc.protocol import check_peer
from kedge.rpc.security import credentials, signing
from kedge.rpc.status import NotReadyError, TrackerAwayError, from_rpc_error, is_away, unanswered
from kedge.rpc.transport import Address, Tls, open_channel, parse_trackers
from kedge.rpc.types import Blob, Deadlines, DeviceInfo, DeviceStatus, JobResult, JobState, Reservation, TrackerStatus
from kedge.rpc.types import Job as JobInfo

Progress = Callable[[JobInfo], None]

#: How long to wait for the first answer.
CONNECT_S = 10.0
#: Of a session whose client does not say otherwise.
LEASE_S = 10.0
_CALL_S = 60.0
#: One question about devices is left open for so long.
_LONG_POLL_S = 30.0


def connect(address: str | Address) -> Fleet:
    """The fleet of the tracker at HOST:PORT, or of several that share a database: "a:9190,b:9190".

    Of several one is talked to, and another one when that is gone.

    Who asks is told by the credentials that `kedge join` has left (see `kedge.rpc.security.credentials`).

    Raises:
        ConnectError: the address is malformed, nobody answers there, or it speaks another protocol version.
        AuthenticationError: there are no credentials for it, or the tracker does not accept them.
    """
    where = address if isinstance(address, Address) else parse_trackers(address)
    fleet = Fleet(where, credentials.find(where).tls)
    try:
        fleet.hello()
    except BaseException:
        fleet.close()
        raise
    return fleet


class Fleet:
    """A connection to a tracker, with `tls` None in plaintext on loopback.

    Safe from several threads; a context manager that closes it.
    """

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self.address = address
        self.tls = tls
        self._channel = open_channel(address, tls)
        self._stub: Any = cast(Any, fleet_pb2_grpc.FleetStub)(self._channel)
        self._blobs = BlobClient(self._channel, address, plan.RECONNECT_S)
        self._signing_key = signing.own_key(credentials.config_dir())
        #: Manifests whose blobs are known to be on the tracker, and (manifest, selector) that fit some device.
        self._uploaded: set[str] = set()
        self._fitting: set[tuple[str, str, str]] = set()
        #: As whom the tracker knows us, once a device that somebody has reserved could be chosen.
        self._user: str | None = None
        #: Whether the tracker has the call that begins a job and tells its result; the job that had the last one.
        self._has_run_job = True
        self._last_run: weakref.ref[Job] | None = None
        #: Whether it takes many such jobs on one stream, that stream, and what ends it with this fleet.
        self._has_streams = True
        self._stream: JobStream | None = None
        self._end_stream: weakref.finalize[[], Fleet] | None = None
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Jobs go on."""
        if self._stream is not None:
            self._stream.close()
        self._channel.close()

    def hello(self) -> None:
        """Exchange protocol versions with the tracker; raises ConnectError."""
        request = plan.hello_request()
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                answer = _call(self._stub.Hello, request, {"timeout": CONNECT_S})
                break
            except grpc.RpcError as error:
                explained = from_rpc_error(error, self.address)
                # Of several trackers none leads: one will within seconds.
                if not isinstance(explained, TrackerAwayError) or time.monotonic() >= deadline:
                    raise explained from error
                time.sleep(plan.FAIL_OVER_PAUSE_S)
        check_peer(convert.protocol_from_pb(answer.protocol), f"the tracker at {self.address}")

    def status(self) -> TrackerStatus:
        """How the tracker is, and as whom it knows us; raises ProtocolError where it is too old to say."""
        return convert.tracker_status_from_pb(self._persist(self._stub.Status, fleet_pb2.StatusRequest()))

    # ---- Devices ----

    def devices(self, selector: str = "", *, include_gone: bool = False) -> list[DeviceStatus]:
        """Connected devices that match, by name; raises SelectorError."""
        return self._devices(selector, include_gone, 0)

    def wait_for_device(self, selector: str = "", *, timeout: float = 60.0) -> DeviceStatus:
        """The first connected device that matches, waiting up to `timeout` seconds for one; raises NoDeviceError."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            found = self._devices(selector, False, max(0.0, min(left, _LONG_POLL_S)))
            if found:
                return found[0]
            if left <= 0:
                raise plan.none_came(selector, timeout)

    def set_maintenance(self, device: str, enabled: bool = True, reason: str = "") -> DeviceStatus:
        """Take a device out of service once its job is done, or put it back; that ends a quarantine too.

        Raises:
            NoDeviceError: the tracker knows no device of this name.
        """
        request = fleet_pb2.SetMaintenanceRequest(device=device, enabled=enabled, reason=reason)
        return convert.device_status_from_pb(self._persist(self._stub.SetMaintenance, request))

    def reserve(self, selector: str, duration_s: float, *, begin_unix_s: float = 0.0, reason: str = "") -> Reservation:
        """One device that matches, for one's own jobs only, from `begin_unix_s` (0: now) on.

        What others run there ends in its own time. A lost answer may leave a reservation, which `devices` shows,
        as it does those that have not begun (`DeviceStatus.upcoming`). Half of the devices are for others, unless one
        is an administrator.

        Raises:
            NoDeviceError: none that matches is free to be reserved then.
            UsageError: for too long, in the past, or one more than a user may have.
        """
        request = plan.reserve_request(selector, duration_s, begin_unix_s, reason)
        try:
            return convert.reservation_from_pb(_call(self._stub.Reserve, request, {"timeout": _CALL_S}))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    def end_reservation(self, reservation_id: str) -> Reservation:
        """Let everybody have the device again; raises UnknownReservationError."""
        request = fleet_pb2.EndReservationRequest(id=reservation_id)
        return convert.reservation_from_pb(self._persist(self._stub.EndReservation, request))

    def keep_noise(self, device: str, relative: float, *, num_threads: int, on: str = "cpu") -> DeviceStatus:
        """Remember how far times of equal code were apart on a device, for all who compare there.

        Raises:
            InputError: that is no share, no number of threads, or no place of a device.
            NoDeviceError: the tracker knows no device of this name.
        """
        request = plan.noise_request(device, relative, num_threads, on)
        return convert.device_status_from_pb(self._persist(self._stub.KeepNoise, request))

    # ---- Jobs ----

    def run(
        self,
        artifact: ArtifactOrPath,
        inputs: Mapping[str, Any],
        *,
        device: str = "",
        function: str = "",
        threads: int = 0,
        priority: int = 0,
        deadlines: Deadlines | None = None,
        on: str = "",
    ) -> Job:
        """Call a function once on a device that matches the selector `device`.

        `inputs` are arrays by name: numpy, torch, anything with DLPack or the array interface. `threads` 0 means
        all that the device offers. `on` says where on the device: "cpu", "opencl", "cuda:1"; "" leaves it to the
        artifact. `priority` is among the jobs that wait: higher goes first, and above 0 is for administrators.

        Raises:
            InputError: an input does not fit the function, or a number is one that no tracker takes; nothing was
                uploaded.
            IncompatibleTargetError: no connected device that matches can run the artifact.
            ConnectError: the tracker is away.
        """
        packed = plan.pack(artifact)
        request = plan.run_request(
            packed, inputs, plan.Terms(function, device, threads, priority, deadlines or Deadlines(), on)
        )
        return self._submit(packed, request)

    def bench(
        self,
        artifact: ArtifactOrPath,
        inputs: Mapping[str, Any],
        *,
        device: str = "",
        function: str = "",
        threads: int = 0,
        priority: int = 0,
        deadlines: Deadlines | None = None,
        on: str = "",
        return_outputs: bool = False,
        **options: Any,
    ) -> Job:
        """Time a function natively; `options` are those of `kedge.rpc.client.plan.time_options`.

        The other arguments, the `priority` above 0 that is for administrators among them, and the errors are as of
        `run`.
        """
        packed = plan.pack(artifact)
        terms = plan.Terms(function, device, threads, priority, deadlines or Deadlines(), on)
        request = plan.bench_request(packed, inputs, terms, plan.time_options(**options), return_outputs)
        return self._submit(packed, request)

    def job(self, job_id: str) -> Job:
        """A job that was submitted before, here or elsewhere; raises UnknownJobError."""
        job = Job(self, job_id)
        job.status()
        return job

    def jobs(
        self,
        *,
        limit: int = 100,
        states: tuple[JobState, ...] = (),
        oldest_first: bool = False,
        user: str = "",
        device: str = "",
        artifact: str = "",
        since_unix_s: float = 0.0,
        ids: Sequence[str] = (),
    ) -> list[JobInfo]:
        """The newest jobs (at most 10,000), newest first, or the oldest, without tensors and samples.

        What is given has to hold: one of the `states`, whose they are (others' are for administrators), the name of the
        `device` that has or had them, what the `artifact`'s digest (hex) begins with, that they were submitted at
        `since_unix_s` or later, and one of the `ids` (at most 1,000). The tracker chooses.

        Raises:
            InputError: a limit or a time that no tracker takes.
            LimitError: more `ids` than that.
            ProtocolError: the tracker is too old to choose.
        """
        wanted = plan.job_filter(user, device, artifact, since_unix_s, ids)
        request = plan.list_request(limit, states, oldest_first, wanted)
        return plan.listed(self._persist(self._stub.ListJobs, request), wanted)

    def session(
        self,
        selector: str = "",
        *,
        threads: int = 0,
        deadlines: Deadlines | None = None,
        on: str = "",
        priority: int = 0,
        lease_s: float = LEASE_S,
        progress: Progress | None = None,
    ) -> Session:
        """A device of one's own for interactive work, once one that matches is free.

        Args:
            selector: of the device; "" is any.
            threads: of kernels; 0 means all that the device offers.
            deadlines: `queue_ms` is how long to wait for the device, the others are those of each call.
            on: where on the device kernels run: "cpu", "opencl", "cuda:1"; "" leaves it to each artifact.
            priority: among those who wait; higher goes first. Above 0 is for administrators.
            lease_s: when this process is stopped or cut off for so many seconds, others may have the device.
            progress: is called with the session's job while it waits, on every change.

        Raises:
            NoDeviceError: none that is connected matches.
            InputError: a number that no tracker takes.
            JobError: none became free in time, or somebody cancelled the session.
            ConnectError: the tracker went away.
        """
        terms = deadlines or Deadlines()
        spec = plan.session_request(selector, terms, priority, threads, on, lease_s)
        self._check_matches(selector)
        message = plan.submit_request(spec)
        job_id = self._persist(self._stub.SubmitJob, message).job.id
        link, info = self._attach(job_id, lease_s, progress)

        def send(packed: Packed, again: bool) -> None:
            if again:
                self._uploaded.clear()
            self._ensure_uploaded(packed)

        return Session(link, job_id, info, threads, terms, on, send, self._signing_key)

    @contextmanager
    def pin(
        self,
        selector: str = "",
        *,
        artifact: ArtifactOrPath | None = None,
        threads: int = 0,
        deadlines: Deadlines | None = None,
        on: str = "",
        priority: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[PinnedDevice]:
        """One device, chosen now, for several jobs in turn: one that can run `artifact`, and idle if there is any.

        Each call is a job pinned to the device, in a fresh runner, with these deadlines and this priority; jobs of
        others may come in between. `progress` is called with the job of a call on every change, in the calling thread.

        Raises:
            NoDeviceError: none that is connected matches.
            IncompatibleTargetError: none that matches can run the artifact.
        """
        found = self._check_matches(selector, artifact, on).info
        yield PinnedDevice(self, found, threads, deadlines or Deadlines(), on, priority, progress)

    # ---- Blobs ----

    def upload(self, data: bytes | memoryview) -> Blob:
        """Put bytes on the tracker, unless it has them; returns their name."""
        blob = blob_of(data)
        self._blobs.upload_missing([(blob, data)])
        return blob

    # ---- Internals, shared with Job and PinnedDevice ----

    def _check_matches(self, selector: str, artifact: ArtifactOrPath | None = None, on: str = "") -> DeviceStatus:
        everyone = self.devices()
        matching = self.devices(selector) if selector else everyone
        if self._user is None and any(device.reservation is not None for device in matching):
            self._user = self.status().user
        return plan.choose(selector, matching, everyone, self._user or "", artifact, on)

    def _attach(self, job_id: str, lease_s: float, progress: Progress | None) -> tuple[SessionLink, DeviceInfo]:
        """The session's stream, once the device is there; while it waits, it may lose its tracker and find it again."""
        while True:
            with _open_channel():
                link = SessionLink(self._channel, self.address, job_id, lease_s)
            try:
                return link, link.wait(progress)
            except ConnectError:
                link.abort()
                self._await_tracker(None)
            except BaseException:
                link.close()  # with a word: nobody comes back for it
                raise

    def _await_tracker(self, deadline: float | None) -> None:
        """Return once the tracker answers again, or the deadline has passed; raises ConnectError."""
        left = plan.RECONNECT_S if deadline is None else max(0.0, deadline - time.monotonic())
        request = plan.hello_request()
        try:
            self._persist(self._stub.Hello, request, min(left, plan.RECONNECT_S))
        except ConnectError:
            if deadline is None or time.monotonic() < deadline:
                raise

    def _devices(self, selector: str, include_gone: bool, wait_s: float) -> list[DeviceStatus]:
        request = plan.devices_request(selector, include_gone, wait_s)
        answer = self._persist(self._stub.ListDevices, request)
        return [convert.device_status_from_pb(pb) for pb in answer.devices]

    def _submit(self, packed: Packed, request: Request) -> Job:
        """Submit; when that is broken off, the job is cancelled if it was accepted: nobody has a handle to it."""
        message = self._prepare(packed, request)
        with self._withdrawn(message):
            return self._send(packed, request, message, waits=False)

    def _call(self, packed: Packed, request: Request, progress: Progress | None) -> Result:
        """Submit and wait; when that is broken off, the job is cancelled."""
        message = self._prepare(packed, request)
        with self._withdrawn(message):
            job = self._send(packed, request, message, waits=progress is None)
            return job.wait(progress=progress)

    @contextmanager
    def _withdrawn(self, message: fleet_pb2.SubmitJobRequest) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._withdraw(message)
            raise

    def _withdraw(self, message: fleet_pb2.SubmitJobRequest) -> None:
        """Cancel a job that may have been accepted although its answer never came: the key says which it is.

        A tracker that does not answer soon is left alone; the deadlines of the job end it.
        """
        ends = time.monotonic() + plan.WITHDRAW_S
        with suppress(KedgeError):
            job_id = self._persist(self._stub.SubmitJob, message, plan.WITHDRAW_S).job.id
            left = max(0.1, ends - time.monotonic())
            self._persist(self._stub.CancelJob, fleet_pb2.CancelJobRequest(job_id=job_id), left)

    def _prepare(self, packed: Packed, request: Request) -> fleet_pb2.SubmitJobRequest:
        """Check the artifact against the devices, and put everything on the tracker that the job needs."""
        spec = plan.signed(request.spec, packed, self._signing_key)
        if (packed.blob.digest, spec.selector, spec.on) not in self._fitting:
            devices = self.devices(spec.selector)
            plan.fitting(packed, spec.selector, devices, spec.on)
            if devices:
                self._fitting.add((packed.blob.digest, spec.selector, spec.on))
        self._ensure_uploaded(packed)
        if request.uploads:
            self._blobs.upload_missing(request.uploads)
        return plan.submit_request(spec)

    def _send(self, packed: Packed, request: Request, message: fleet_pb2.SubmitJobRequest, *, waits: bool) -> Job:
        try:
            return self._begin(message, waits)
        except NotReadyError:
            # Another tracker, or another data folder, has taken this one's place: it needs everything again.
            self._uploaded.clear()
            self._ensure_uploaded(packed)
            self._blobs.upload_missing(request.uploads)
            return self._begin(message, waits)

    def _begin(self, message: fleet_pb2.SubmitJobRequest, waits: bool) -> Job:
        """The accepted job. In the same call its result is told, but for jobs that pile up before one is waited for.

        `waits`: whoever asks waits for the result at once.
        """
        last = None if self._last_run is None else self._last_run()
        if self._has_run_job and (waits or last is None or last._run is None):
            streams = self._has_streams and JobStream.takes(message)
            job = self._stream_job(message) if streams else self._run_job(message)
            if job is not None:
                self._last_run = self._last_run if waits else weakref.ref(job)
                return job
        return Job(self, self._persist(self._stub.SubmitJob, message).job.id)

    def _stream_job(self, message: fleet_pb2.SubmitJobRequest) -> Job | None:
        """The same, with the other small jobs on one stream."""
        try:
            running = self._open_stream().begin(message, _CALL_S)
        except StreamBroken as broken:
            self._has_streams = plan.has_run_jobs(broken.error, self.address)
            return None
        except TimeoutError:
            raise unanswered(self.address) from None
        return Job(self, running.job_id, running) if running is not None else self._run_job(message)

    def _open_stream(self) -> JobStream:
        with self._opening, interrupts.deferred(), _open_channel():
            if self._stream is None or not self._stream.alive:
                if self._end_stream is not None:
                    self._end_stream.detach()
                self._stream = JobStream(self._stub)
                self._end_stream = weakref.finalize(self, self._stream.close)
                self._end_stream.atexit = False  # its threads end with the process
            return self._stream

    def _run_job(self, message: fleet_pb2.SubmitJobRequest) -> Job | None:
        """The job, whose result the call tells that began it; None where it is to be submitted, under the same key."""
        with interrupts.deferred(), _open_channel():
            run = self._stub.RunJob(message, timeout=_CALL_S)
        try:
            return Job(self, next(run).job_id, run)
        except grpc.RpcError as error:
            self._has_run_job = plan.has_run_job(error, self.address)
            return None
        except BaseException:
            with interrupts.deferred():
                run.cancel()
            raise
        finally:
            with interrupts.deferred():
                del run

    def _ensure_uploaded(self, packed: Packed) -> None:
        if packed.blob.digest not in self._uploaded:
            self._blobs.upload_missing(packed.blobs())
            self._uploaded.add(packed.blob.digest)

    def _result(self, job_id: str, result: JobResult) -> Result:
        try:
            with _open_channel():
                fetched = {blob.digest: self._blobs.read(blob) for blob in plan.blobs_of(result)}
        except MissingBlobError as error:
            raise plan.outputs_gone(job_id, error) from error
        return plan.read_result(job_id, result, fetched)

    def _persist(self, method: Any, request: Any, patience_s: float = plan.RECONNECT_S) -> Any:
        """A call that may be made twice; a tracker that went away is waited for."""
        patience = plan.Patience(self.address, patience_s)
        options: dict[str, Any] = {"timeout": min(_CALL_S, patience_s)}
        while True:
            try:
                return _call(method, request, options)
            except grpc.RpcError as error:
                pause, options = patience.after(error, time.monotonic())
                time.sleep(pause)


@contextmanager
def _open_channel() -> Iterator[None]:
    """Calls are begun inside; on a channel that another thread has closed, gRPC raises a bare ValueError."""
    try:
        yield
    except ValueError as error:
        raise ConnectError("this fleet was closed", hint="connect again") from error


def _call(method: Any, request: Any, options: dict[str, Any]) -> Any:
    """One unary call, which Ctrl-C breaks off."""
    with interrupts.deferred(), _open_channel():
        call = method.future(request, **options)
    try:
        return call.result()
    finally:
        with interrupts.deferred():
            call.cancel()
            del call  # its destructor is Python's, too


class Job:
    """A job on the tracker; it goes on whether or not anybody holds this."""

    def __init__(self, fleet: Fleet, job_id: str, run: Any = None) -> None:
        self.id = job_id
        self._fleet = fleet
        #: The call that began it and tells its result, until somebody waits for that.
        self._run = run
        self._taking = threading.Lock()

    def __repr__(self) -> str:
        return f"<Job {self.id} at {self._fleet.address}>"

    def status(self) -> JobInfo:
        """The job now; its `detail` says why it waits."""
        request = fleet_pb2.GetJobRequest(job_id=self.id)
        return convert.job_from_pb(self._fleet._persist(self._fleet._stub.GetJob, request))

    def cancel(self) -> JobInfo:
        """Stop it: at once while it waits, otherwise the device is asked to. A job that is done stays so."""
        request = fleet_pb2.CancelJobRequest(job_id=self.id)
        return convert.job_from_pb(self._fleet._persist(self._fleet._stub.CancelJob, request))

    def wait(self, timeout: float | None = None, progress: Progress | None = None, *, check: bool = True) -> Result:
        """Wait until it is done.

        `progress` is called with the job on every change. A restart of the tracker is waited for.

        Raises:
            JobError: it ended with an outcome other than ok; not with `check=False`.
            WaitTimeoutError: it is not done after `timeout` seconds; it goes on.
            ConnectError: the tracker went away and did not come back.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        found = self._told(may_wait=progress is None and timeout is None)
        while found is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise plan.not_done(self.id, timeout)
            try:
                found = self._watch(deadline, progress)
            except grpc.RpcError as error:
                if is_away(error):
                    self._fleet._await_tracker(deadline)
                elif error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or deadline is None:
                    raise from_rpc_error(error, self._fleet.address) from error
        result = self._fleet._result(self.id, found)
        if check:
            plan.raise_unless_ok(result)
        return result

    def _told(self, *, may_wait: bool) -> JobResult | None:
        """The result from the call that began the job; None where that was read, broke, or is not waited for."""
        with interrupts.deferred(), self._taking:
            run, self._run = self._run, None
        if run is None:
            return None
        try:
            if may_wait:
                return convert.job_result_from_pb(next(run).result)
        except (grpc.RpcError, StopIteration):
            pass  # its minute is over, or the tracker went away: a watch finds out
        finally:
            with interrupts.deferred():
                run.cancel()
                del run
        return None

    def _watch(self, deadline: float | None, progress: Progress | None) -> JobResult:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        request = fleet_pb2.WatchJobRequest(job_id=self.id)
        with interrupts.deferred(), _open_channel():
            call = self._fleet._stub.WatchJob(request, timeout=left)
        try:
            for pb in call:
                if progress is not None or pb.state == types_pb2.JOB_STATE_DONE:
                    job = convert.job_from_pb(pb)
                    if progress is not None:
                        progress(job)
                    if job.result is not None:
                        return job.result
        finally:
            with interrupts.deferred():
                call.cancel()
                del call
        raise plan.watch_ended(self.id)


class PinnedDevice(plan.Pinned):
    """One device for several jobs in turn. `target` is what the agent says compiles for its CPU."""

    def __init__(
        self,
        fleet: Fleet,
        info: DeviceInfo,
        threads: int,
        deadlines: Deadlines,
        on: str,
        priority: int,
        progress: Progress | None,
    ) -> None:
        super().__init__(info, threads, deadlines, on, priority)
        self.fleet = fleet
        self._progress = progress

    def __repr__(self) -> str:
        return f"<PinnedDevice {self.info.name} at {self.fleet.address}>"

    def load(self, artifact: ArtifactOrPath) -> PinnedModel:
        """Upload an artifact, as far as the tracker lacks it; raises IncompatibleTargetError before that."""
        packed = plan.pack(artifact)
        where = self._place(packed)
        self.fleet._ensure_uploaded(packed)
        return PinnedModel(self, packed, where)

    def _call(self, packed: Packed, request: Request) -> Result:
        return self.fleet._call(packed, request, self._progress)


class PinnedModel:
    """An artifact for a pinned device; every call is a job of its own."""

    def __init__(self, pinned: PinnedDevice, packed: Packed, device: str) -> None:
        #: Where the kernels run: "cpu", "opencl:0", "cuda:1".
        self.device = device
        self._pinned = pinned
        self._packed = packed

    def __getitem__(self, function: str) -> Callable[[Mapping[str, Any]], Mapping[str, Array]]:
        """A function of the artifact, to be called with its inputs; raises ArtifactError."""
        self._packed.manifest.function(function)
        return lambda inputs: self.run(inputs, function=function)

    def run(self, inputs: Mapping[str, Any], function: str = "") -> dict[str, Array]:
        """Call a function once and return its outputs by name; raises InputError, JobError, ConnectError."""
        request = plan.run_request(self._packed, inputs, self._pinned._terms(function))
        return dict(self._pinned._call(self._packed, request).outputs)

    def time(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Timing:
        """Time a function natively; `options` are those of `kedge.rpc.client.plan.time_options`.

        Raises InputError, JobError, ConnectError.
        """
        terms, how = self._pinned._terms(function), plan.time_options(**options)
        request = plan.bench_request(self._packed, inputs, terms, how, return_outputs=False)
        return plan.timing_of(self._pinned._call(self._packed, request))

    def profile(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Profile:
        """Time every kernel of a function; `options` as for `time`, with min_repeat_ms=10.

        Raises InputError, JobError, ConnectError; ArtifactError where the artifact does not say what its kernels are.
        """
        terms, how = self._pinned._terms(function), profile_options(**options)
        request = plan.bench_request(self._packed, inputs, terms, how, return_outputs=False)
        timing = plan.timing_of(self._pinned._call(self._packed, request))
        return profile_of(self._packed.manifest, function, inputs, timing)
