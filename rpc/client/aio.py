"""The asyncio client: what `kedge.rpc.client.fleet` offers, awaited.

    async with await connect("tracker:9190") as fleet:
        job = await fleet.run(artifact, {"x": x}, device="arch=aarch64")
        print((await job.wait())["y"])

Calls and watches are asyncio throughout. Bulk transfers go over a second connection in worker threads, which keeps
hashing and large copies out of the event loop.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Self, cast

import grpc

from kedge.protos.v1 import fleet_pb2, fleet_pb2_grpc, types_pb2
from kedge.rpc import convert
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import MissingBlobError, blob_of
from kedge.rpc.client import plan, threads
from kedge.rpc.client.aio_session import Attached, Session
from kedge.rpc.client.fleet import CONNECT_S, LEASE_S
from kedge.rpc.client.inputs import Array
from kedge.rpc.client.plan import ArtifactOrPath, Packed, Request, Result
from kedge.rpc.client.profile import Profile, profile_of, profile_options
from kedge.rpc.client.session_link import SessionLink
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import ConnectError, KedgeError
from kedge.rpc.protocol import check_peer
from kedge.rpc.security import credentials, signing
from kedge.rpc.status import NotReadyError, TrackerAwayError, from_rpc_error, is_away
from kedge.rpc.transport import Address, Tls, open_aio_channel, open_channel, parse_trackers
from kedge.rpc.types import Blob, Deadlines, DeviceInfo, DeviceStatus, JobResult, JobState, Reservation, TrackerStatus
from kedge.rpc.types import Job as JobInfo

Progress = Callable[[JobInfo], None]

_CALL_S = 60.0
_LONG_POLL_S = 30.0
#: Calls that tell of jobs for which nobody waits yet: those of one connection, and of one user, are limited.
_MOST_UNHEARD = 256


async def connect(address: str | Address) -> Fleet:
    """The fleet of the tracker at HOST:PORT; raises ConnectError as the synchronous `connect` does."""
    where = address if isinstance(address, Address) else parse_trackers(address)
    fleet = Fleet(where, credentials.find(where).tls)
    try:
        await fleet.hello()
    except BaseException:
        await fleet.close()
        raise
    return fleet


class Fleet:
    """A connection to a tracker, of one event loop; an async context manager that closes it."""

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self.address = address
        self._channel = open_aio_channel(address, tls)
        self._stub: Any = cast(Any, fleet_pb2_grpc.FleetStub)(self._channel)
        self._bulk = open_channel(address, tls)
        self._blobs = BlobClient(self._bulk, address, plan.RECONNECT_S)
        self._signing_key = signing.own_key(credentials.config_dir())
        self._uploaded: set[str] = set()
        self._fitting: set[tuple[str, str, str]] = set()
        #: As whom the tracker knows us, once a device that somebody has reserved could be chosen.
        self._user: str | None = None
        #: Whether the tracker has RunJob (older ones have not), and the jobs begun by it that nobody waits for yet.
        self._has_run_job = True
        self._unheard: weakref.WeakSet[Job] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Jobs go on."""
        await self._channel.close()
        await asyncio.to_thread(self._bulk.close)

    async def hello(self) -> None:
        """Exchange protocol versions with the tracker; raises ConnectError."""
        request = plan.hello_request()
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                answer = await self._stub.Hello(request, timeout=CONNECT_S)
                break
            except grpc.RpcError as error:
                explained = from_rpc_error(error, self.address)
                # Of several trackers none leads: one will within seconds.
                if not isinstance(explained, TrackerAwayError) or time.monotonic() >= deadline:
                    raise explained from error
                await asyncio.sleep(plan.FAIL_OVER_PAUSE_S)
        check_peer(convert.protocol_from_pb(answer.protocol), f"the tracker at {self.address}")

    async def status(self) -> TrackerStatus:
        """How the tracker is, and as whom it knows us; raises ProtocolError where it is too old to say."""
        return convert.tracker_status_from_pb(await self._persist(self._stub.Status, fleet_pb2.StatusRequest()))

    # ---- Devices ----

    async def devices(self, selector: str = "", *, include_gone: bool = False) -> list[DeviceStatus]:
        """Connected devices that match, by name; raises SelectorError."""
        return await self._devices(selector, include_gone, 0)

    async def wait_for_device(self, selector: str = "", *, timeout: float = 60.0) -> DeviceStatus:
        """The first connected device that matches, waiting up to `timeout` seconds for one; raises NoDeviceError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            left = deadline - loop.time()
            found = await self._devices(selector, False, max(0.0, min(left, _LONG_POLL_S)))
            if found:
                return found[0]
            if left <= 0:
                raise plan.none_came(selector, timeout)

    async def set_maintenance(self, device: str, enabled: bool = True, reason: str = "") -> DeviceStatus:
        """Take a device out of service, or put it back; errors as the synchronous `Fleet.set_maintenance`."""
        request = fleet_pb2.SetMaintenanceRequest(device=device, enabled=enabled, reason=reason)
        return convert.device_status_from_pb(await self._persist(self._stub.SetMaintenance, request))

    async def reserve(
        self, selector: str, duration_s: float, *, begin_unix_s: float = 0.0, reason: str = ""
    ) -> Reservation:
        """One device for one's own jobs only; arguments and errors as the synchronous `Fleet.reserve`."""
        request = plan.reserve_request(selector, duration_s, begin_unix_s, reason)
        try:
            return convert.reservation_from_pb(await self._stub.Reserve(request, timeout=_CALL_S))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    async def end_reservation(self, reservation_id: str) -> Reservation:
        """Let everybody have the device again; raises UnknownReservationError."""
        request = fleet_pb2.EndReservationRequest(id=reservation_id)
        return convert.reservation_from_pb(await self._persist(self._stub.EndReservation, request))

    async def keep_noise(self, device: str, relative: float, *, num_threads: int, on: str = "cpu") -> DeviceStatus:
        """Remember how noisy a device is; errors as the synchronous `Fleet.keep_noise`."""
        request = plan.noise_request(device, relative, num_threads, on)
        return convert.device_status_from_pb(await self._persist(self._stub.KeepNoise, request))

    # ---- Jobs ----

    async def run(
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
        """Call a function once on a device that matches; arguments and errors as the synchronous `Fleet.run`."""
        packed = plan.pack(artifact)
        request = plan.run_request(
            packed, inputs, plan.Terms(function, device, threads, priority, deadlines or Deadlines(), on)
        )
        return await self._submit(packed, request)

    async def bench(
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
        """Time a function natively; arguments and errors as the synchronous `Fleet.bench`."""
        packed = plan.pack(artifact)
        terms = plan.Terms(function, device, threads, priority, deadlines or Deadlines(), on)
        request = plan.bench_request(packed, inputs, terms, plan.time_options(**options), return_outputs)
        return await self._submit(packed, request)

    async def job(self, job_id: str) -> Job:
        """A job that was submitted before, here or elsewhere; raises UnknownJobError."""
        job = Job(self, job_id)
        await job.status()
        return job

    async def jobs(
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
        """The newest jobs, or the oldest; arguments and errors as the synchronous `Fleet.jobs`."""
        wanted = plan.job_filter(user, device, artifact, since_unix_s, ids)
        request = plan.list_request(limit, states, oldest_first, wanted)
        return plan.listed(await self._persist(self._stub.ListJobs, request), wanted)

    @asynccontextmanager
    async def session(
        self,
        selector: str = "",
        *,
        threads: int = 0,
        deadlines: Deadlines | None = None,
        on: str = "",
        priority: int = 0,
        lease_s: float = LEASE_S,
        progress: Progress | None = None,
    ) -> AsyncIterator[Session]:
        """A device of one's own while the context lasts; arguments and errors as the synchronous `Fleet.session`.

        `progress` is called in the event loop.
        """
        terms = deadlines or Deadlines()
        spec = plan.session_request(selector, terms, priority, threads, on, lease_s)
        await self._check_matches(selector)
        message = plan.submit_request(spec)
        job_id = (await self._persist(self._stub.SubmitJob, message)).job.id
        attached = await self._attach(job_id, lease_s, progress)
        session = Session(attached, job_id, threads, terms, on, self._send_parts, self._signing_key)
        try:
            yield session
        finally:
            await session.close()

    @asynccontextmanager
    async def pin(
        self,
        selector: str = "",
        *,
        artifact: ArtifactOrPath | None = None,
        threads: int = 0,
        deadlines: Deadlines | None = None,
        on: str = "",
        priority: int = 0,
        progress: Progress | None = None,
    ) -> AsyncIterator[PinnedDevice]:
        """One device, chosen now, for several jobs in turn; see the synchronous `Fleet.pin`.

        `progress` is called in the event loop.
        """
        info = (await self._check_matches(selector, artifact, on)).info
        yield PinnedDevice(self, info, threads, deadlines or Deadlines(), on, priority, progress)

    # ---- Blobs ----

    async def upload(self, data: bytes | memoryview) -> Blob:
        """Put bytes on the tracker, unless it has them; returns their name."""
        blob = await asyncio.to_thread(blob_of, data)
        await asyncio.to_thread(self._blobs.upload_missing, [(blob, data)])
        return blob

    # ---- Internals, shared with Job and PinnedDevice ----

    async def _check_matches(self, selector: str, artifact: ArtifactOrPath | None = None, on: str = "") -> DeviceStatus:
        everyone = await self.devices()
        matching = await self.devices(selector) if selector else everyone
        if self._user is None and any(device.reservation is not None for device in matching):
            self._user = (await self.status()).user
        return await asyncio.to_thread(plan.choose, selector, matching, everyone, self._user or "", artifact, on)

    async def _attach(self, job_id: str, lease_s: float, progress: Progress | None) -> Attached:
        """The session's stream, once the device is there; while it waits, it may lose its tracker and find it again."""
        loop = asyncio.get_running_loop()

        def tell(job: JobInfo) -> None:
            if progress is not None:
                loop.call_soon_threadsafe(progress, job)

        while True:
            link = SessionLink(self._bulk, self.address, job_id, lease_s)
            try:
                return Attached(link, await threads.do(partial(link.wait, tell), "kedge-session-wait"))
            except ConnectError:
                link.abort()
                request = plan.hello_request()
                await self._persist(self._stub.Hello, request)
            except BaseException:
                threads.start(link.close, "kedge-session-close")  # with a word: nobody comes back for it
                raise

    def _send_parts(self, packed: Packed, again: bool) -> None:
        """Put an artifact on the tracker; in a thread of a session's."""
        if again:
            self._uploaded.clear()
        if packed.blob.digest not in self._uploaded:
            self._blobs.upload_missing(packed.blobs())
            self._uploaded.add(packed.blob.digest)

    async def _devices(self, selector: str, include_gone: bool, wait_s: float) -> list[DeviceStatus]:
        request = plan.devices_request(selector, include_gone, wait_s)
        answer = await self._persist(self._stub.ListDevices, request)
        return [convert.device_status_from_pb(pb) for pb in answer.devices]

    async def _submit(self, packed: Packed, request: Request) -> Job:
        """Submit; when that is cancelled, so is the job, which may have been accepted: nobody has a handle to it."""
        message = await self._prepare(packed, request)
        async with self._withdrawn(message):
            return await self._send(packed, request, message, waits=False)

    async def _call(self, packed: Packed, request: Request, progress: Progress | None) -> Result:
        """Submit and wait; when that is cancelled, so is the job."""
        message = await self._prepare(packed, request)
        async with self._withdrawn(message):
            return await (await self._send(packed, request, message, waits=True)).wait(progress=progress)

    @asynccontextmanager
    async def _withdrawn(self, message: fleet_pb2.SubmitJobRequest) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            with suppress(KedgeError, TimeoutError):
                async with asyncio.timeout(plan.WITHDRAW_S):
                    await self._withdraw(message)
            raise

    async def _withdraw(self, message: fleet_pb2.SubmitJobRequest) -> None:
        """Cancel a job that may have been accepted although its answer never came: the key says which it is."""
        answer = await self._persist(self._stub.SubmitJob, message)
        await Job(self, answer.job.id).cancel()

    async def _prepare(self, packed: Packed, request: Request) -> fleet_pb2.SubmitJobRequest:
        """Check the artifact against the devices, and put everything on the tracker that the job needs."""
        spec = plan.signed(request.spec, packed, self._signing_key)
        if (packed.blob.digest, spec.selector, spec.on) not in self._fitting:
            devices = await self.devices(spec.selector)
            plan.fitting(packed, spec.selector, devices, spec.on)
            if devices:
                self._fitting.add((packed.blob.digest, spec.selector, spec.on))
        await self._ensure_uploaded(packed)
        if request.uploads:
            await asyncio.to_thread(self._blobs.upload_missing, request.uploads)
        return plan.submit_request(spec)

    async def _send(self, packed: Packed, request: Request, message: fleet_pb2.SubmitJobRequest, *, waits: bool) -> Job:
        try:
            return await self._begin(message, waits)
        except NotReadyError:
            # Another tracker, or another data folder, has taken this one's place: it needs everything again.
            self._uploaded.clear()
            await self._ensure_uploaded(packed)
            await asyncio.to_thread(self._blobs.upload_missing, request.uploads)
            return await self._begin(message, waits)

    async def _begin(self, message: fleet_pb2.SubmitJobRequest, waits: bool) -> Job:
        """The accepted job. In the same call its result is told, but for jobs that pile up before one is waited for.

        `waits`: whoever asks waits for the result at once.
        """
        if self._has_run_job and (waits or len(self._unheard) < _MOST_UNHEARD):
            run = self._stub.RunJob(message, timeout=_CALL_S)
            job = Job(self, "", run)
            if not waits:
                self._unheard.add(job)  # now: others submit while the tracker answers
            try:
                job.id = (await run.read()).job_id
            except grpc.RpcError as error:
                job._hang_up()
                self._has_run_job = plan.has_run_job(error, self.address)  # next it is submitted, under the same key
            except BaseException:
                job._hang_up()
                run.cancel()
                raise
            else:
                return job
        return Job(self, (await self._persist(self._stub.SubmitJob, message)).job.id)

    async def _ensure_uploaded(self, packed: Packed) -> None:
        if packed.blob.digest not in self._uploaded:
            await asyncio.to_thread(self._blobs.upload_missing, packed.blobs())
            self._uploaded.add(packed.blob.digest)

    async def _result(self, job_id: str, result: JobResult) -> Result:
        try:
            fetched = {b.digest: await asyncio.to_thread(self._blobs.read, b) for b in plan.blobs_of(result)}
        except MissingBlobError as error:
            raise plan.outputs_gone(job_id, error) from error
        return plan.read_result(job_id, result, fetched)

    async def _persist(self, method: Any, request: Any) -> Any:
        """A call that may be made twice; a tracker that went away is waited for."""
        patience = plan.Patience(self.address, plan.RECONNECT_S)
        options: dict[str, Any] = {"timeout": _CALL_S}
        while True:
            try:
                return await method(request, **options)
            except grpc.RpcError as error:
                pause, options = patience.after(error, asyncio.get_running_loop().time())
            await asyncio.sleep(pause)


class Job:
    """A job on the tracker; it goes on whether or not anybody holds this."""

    def __init__(self, fleet: Fleet, job_id: str, run: Any = None) -> None:
        self.id = job_id
        self._fleet = fleet
        #: The call that began it and tells its result, until somebody waits for that.
        self._run = run

    def __repr__(self) -> str:
        return f"<Job {self.id} at {self._fleet.address}>"

    async def status(self) -> JobInfo:
        """The job now; its `detail` says why it waits."""
        request = fleet_pb2.GetJobRequest(job_id=self.id)
        pb = await self._fleet._persist(self._fleet._stub.GetJob, request)
        return convert.job_from_pb(pb)

    async def cancel(self) -> JobInfo:
        """Stop it: at once while it waits, otherwise the device is asked to. A job that is done stays so."""
        request = fleet_pb2.CancelJobRequest(job_id=self.id)
        pb = await self._fleet._persist(self._fleet._stub.CancelJob, request)
        return convert.job_from_pb(pb)

    async def wait(
        self, timeout: float | None = None, progress: Progress | None = None, *, check: bool = True
    ) -> Result:
        """Wait until it is done; arguments and errors as the synchronous `Job.wait`."""
        try:
            async with asyncio.timeout(timeout):
                found = await self._told(may_wait=progress is None)
                if found is None:
                    found = await self._watch_through_restarts(progress)
        except TimeoutError:
            raise plan.not_done(self.id, timeout) from None
        result = await self._fleet._result(self.id, found)
        if check:
            plan.raise_unless_ok(result)
        return result

    def _hang_up(self) -> Any:
        """The call that began it, which is the caller's business from now on."""
        run, self._run = self._run, None
        self._fleet._unheard.discard(self)
        return run

    async def _told(self, *, may_wait: bool) -> JobResult | None:
        """The result from the call that began the job; None where that was read, broke, or is not waited for."""
        run = self._hang_up()
        if run is None:
            return None
        try:
            if may_wait:
                return convert.job_result_from_pb((await run.read()).result)
        except grpc.RpcError:
            pass  # its minute is over, or the tracker went away: a watch finds out
        finally:
            run.cancel()
        return None

    async def _watch_through_restarts(self, progress: Progress | None) -> JobResult:
        while True:
            try:
                return await self._watch(progress)
            except grpc.RpcError as error:
                if not is_away(error):
                    raise from_rpc_error(error, self._fleet.address) from error
            request = plan.hello_request()
            await self._fleet._persist(self._fleet._stub.Hello, request)

    async def _watch(self, progress: Progress | None) -> JobResult:
        call = self._fleet._stub.WatchJob(fleet_pb2.WatchJobRequest(job_id=self.id))
        try:
            async for pb in call:
                if progress is not None or pb.state == types_pb2.JOB_STATE_DONE:
                    job = convert.job_from_pb(pb)
                    if progress is not None:
                        progress(job)
                    if job.result is not None:
                        return job.result
        finally:
            call.cancel()
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

    async def load(self, artifact: ArtifactOrPath) -> PinnedModel:
        """Upload an artifact, as far as the tracker lacks it; raises IncompatibleTargetError before that."""
        packed = plan.pack(artifact)
        where = self._place(packed)
        await self.fleet._ensure_uploaded(packed)
        return PinnedModel(self, packed, where)

    async def _call(self, packed: Packed, request: Request) -> Result:
        return await self.fleet._call(packed, request, self._progress)


class PinnedModel:
    """An artifact for a pinned device; every call is a job of its own."""

    def __init__(self, pinned: PinnedDevice, packed: Packed, device: str) -> None:
        #: Where the kernels run: "cpu", "opencl:0", "cuda:1".
        self.device = device
        self._pinned = pinned
        self._packed = packed

    async def run(self, inputs: Mapping[str, Any], function: str = "") -> dict[str, Array]:
        """Call a function once and return its outputs by name; raises InputError, JobError, ConnectError."""
        request = plan.run_request(self._packed, inputs, self._pinned._terms(function))
        return dict((await self._pinned._call(self._packed, request)).outputs)

    async def time(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Timing:
        """Time a function natively; `options` as for `Fleet.bench`. Raises InputError, JobError, ConnectError."""
        terms, how = self._pinned._terms(function), plan.time_options(**options)
        request = plan.bench_request(self._packed, inputs, terms, how, return_outputs=False)
        return plan.timing_of(await self._pinned._call(self._packed, request))

    async def profile(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Profile:
        """Time every kernel of a function; `options` as for `time`, with min_repeat_ms=10.

        Raises InputError, JobError, ConnectError; ArtifactError where the artifact does not say what its kernels are.
        """
        terms, how = self._pinned._terms(function), profile_options(**options)
        request = plan.bench_request(self._packed, inputs, terms, how, return_outputs=False)
        timing = plan.timing_of(await self._pinned._call(self._packed, request))
        return profile_of(self._packed.manifest, function, inputs, timing)
