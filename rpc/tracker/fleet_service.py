"""The service that clients ask: translate, ask the shell, translate back."""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from kedge.protos.v1 import fleet_pb2, types_pb2
from kedge.rpc import convert
from kedge.rpc.limits import MAX_PRIORITY, check_noise, check_number
from kedge.rpc.protocol import check_peer, local_protocol
from kedge.rpc.status import TrackerAwayError, UnknownReservationError
from kedge.rpc.tracker.brief import without_inputs
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.handlers import typed_errors, typed_stream_errors
from kedge.rpc.tracker.job_stream import JobStream
from kedge.rpc.tracker.replication import NO_REPLICATION, Replication
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.interceptor import who
from kedge.rpc.tracker.security.principal import Principal, Role, caller
from kedge.rpc.tracker.shell import Shell, unknown_job
from kedge.rpc.types import MAX_LISTED, DeviceStatus, Job, JobState, TrackerStatus

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_WAIT_MS = 60_000


class FleetService:
    """What clients ask. Others' jobs do not exist, for those who are no administrators."""

    def __init__(
        self, shell: Shell, catalog: Catalog, audit: Audit, data_dir: Path, replication: Replication = NO_REPLICATION
    ) -> None:
        self._shell = shell
        self._replication = replication
        self._data_dir = data_dir
        self._catalog = catalog
        self._audit = audit

    @typed_errors
    async def Hello(self, request: fleet_pb2.HelloRequest, _context: Context) -> fleet_pb2.HelloResponse:
        """Exchange protocol versions."""
        check_peer(convert.protocol_from_pb(request.protocol), "the client")
        ours = convert.protocol_to_pb(local_protocol())
        return fleet_pb2.HelloResponse(protocol=ours, tracker_id=self._shell.tracker_id)

    @typed_errors
    async def Status(self, _request: fleet_pb2.StatusRequest, _context: Context) -> fleet_pb2.StatusResponse:
        """How the tracker is, and who asks."""
        principal = caller()
        status = TrackerStatus(
            protocol=local_protocol(),
            unix_ms=self._shell.now_ms,
            user=principal.name,
            role=principal.role.value,
            expires_unix_s=principal.expires_s,
            store_problem=self._shell.store_problem or "",
            disk_free_bytes=shutil.disk_usage(self._data_dir).free,
            agents=self._shell.state.agents(),
            epoch=self._replication.epoch,
            trackers=self._replication.members,
        )
        return convert.tracker_status_to_pb(status)

    @typed_errors
    async def ListDevices(
        self, request: fleet_pb2.ListDevicesRequest, _context: Context
    ) -> fleet_pb2.ListDevicesResponse:
        """Devices by selector, waiting for the first if asked to."""
        wait_s = max(0, min(request.wait_ms, _MAX_WAIT_MS)) / 1000
        found = await self._shell.devices(request.selector, request.include_gone, wait_s)
        return fleet_pb2.ListDevicesResponse(devices=[convert.device_status_to_pb(self._seen(each)) for each in found])

    @typed_errors
    async def SubmitJob(self, request: fleet_pb2.SubmitJobRequest, context: Context) -> fleet_pb2.SubmitJobResponse:
        """Accept a job whose artifact and inputs the caller has sent already."""
        job_id, existed = await self._accept(request, context)
        job = await self._shell.job(job_id)
        return fleet_pb2.SubmitJobResponse(job=convert.job_to_pb(without_inputs(job)), existed=existed)

    @typed_stream_errors
    async def RunJob(
        self, request: fleet_pb2.SubmitJobRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.RunJobResponse]:
        """Accept a job, and say what came of it."""
        async for said in self._run(request, context):
            yield said

    @typed_stream_errors
    async def RunJobs(
        self, requests: AsyncIterator[fleet_pb2.RunJobsRequest], context: Context
    ) -> AsyncIterator[fleet_pb2.RunJobsResponse]:
        """The same for each of the jobs on a stream."""
        stream = JobStream(lambda request: self._run(request, context))
        async for said in stream.serve(requests):
            yield said

    async def _run(
        self, request: fleet_pb2.SubmitJobRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.RunJobResponse]:
        job_id, _ = await self._accept(request, context)
        yield fleet_pb2.RunJobResponse(job_id=job_id)
        result = await self._shell.result(job_id)
        if result is None:
            raise TrackerAwayError("the tracker stops")
        yield fleet_pb2.RunJobResponse(result=convert.job_result_to_pb(result))

    async def _accept(self, request: fleet_pb2.SubmitJobRequest, context: Context) -> tuple[str, bool]:
        """The id of a job that is stored, and whether it was before."""
        principal = caller()
        spec = convert.job_spec_from_pb(request.spec)
        _check_priority(spec.priority, principal)
        await self._replication.fetch(self._catalog.named_by(spec, principal))
        needs = await self._catalog.check(spec, principal)
        if not self._shell.state.may_carry(spec, principal.name):
            spec = await self._catalog.store_inputs(spec, principal)
        await self._replication.ensure(self._catalog.digests_of(spec))
        key = request.idempotency_key
        if key and not principal.trusted:
            key = f"{principal.name}/{key}"  # one user's keys say nothing of another's jobs
        signer = spec.signature.public_key.hex() if spec.signature is not None else ""
        said = {"artifact": spec.manifest.digest, "selector": spec.selector, "signer": signer}
        said |= who(principal, context)

        def note(job_id: str) -> None:  # the job goes on without its client, so its line has to be written
            self._audit.write("job submitted", job=job_id, **said)

        try:
            return await self._shell.submit(spec, needs, key, principal.name, when_stored=note)
        except StoreError:  # a device may have begun with it meanwhile
            self._audit.write("job not stored", **said)
            raise

    @typed_stream_errors
    async def WatchJob(self, request: fleet_pb2.WatchJobRequest, context: Context) -> AsyncIterator[types_pb2.Job]:
        """The job now, and on every change until it is done."""
        changes = self._shell.watch(request.job_id)
        try:
            job = await self._own_job(request.job_id)
            yield convert.job_to_pb(without_inputs(job))
            while job.state is not JobState.DONE:
                newer = await changes.get()
                if newer is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the tracker stops")
                elif newer != job:
                    job = newer
                    yield convert.job_to_pb(without_inputs(job))
        finally:
            self._shell.unwatch(request.job_id, changes)

    @typed_errors
    async def GetJob(self, request: fleet_pb2.GetJobRequest, _context: Context) -> types_pb2.Job:
        """The job now."""
        return convert.job_to_pb(await self._own_job(request.job_id))

    @typed_errors
    async def ListJobs(self, request: fleet_pb2.ListJobsRequest, _context: Context) -> fleet_pb2.ListJobsResponse:
        """The newest or oldest jobs in brief, of those that are asked for."""
        states = tuple(convert.job_state_from_pb(state) for state in request.states)
        whose = None if caller().sees_all else caller().name
        limit = max(1, min(request.limit or 100, MAX_LISTED))
        wanted = convert.job_filter_from_pb(request)
        response = fleet_pb2.ListJobsResponse(filtered=True)
        async for page in self._shell.jobs(limit, states, whose, oldest_first=request.oldest_first, wanted=wanted):
            response.jobs.extend(convert.job_to_pb(job) for job in page)
        return response

    @typed_errors
    async def CancelJob(self, request: fleet_pb2.CancelJobRequest, context: Context) -> types_pb2.Job:
        """Stop a job."""
        await self._own_job(request.job_id)
        job, stops = await self._shell.cancel(request.job_id, "a client cancelled it")
        if stops:
            self._audit.write("job cancelled", job=job.id, user=job.user, **who(caller(), context))
        return convert.job_to_pb(job)

    @typed_errors
    async def SetMaintenance(
        self, request: fleet_pb2.SetMaintenanceRequest, context: Context
    ) -> types_pb2.DeviceStatus:
        """A device leaves service, or comes back."""
        name = caller().name
        status = await self._shell.set_maintenance(request.device, request.enabled, request.reason, name)
        said = {"device": request.device, "enabled": request.enabled, "reason": request.reason}
        self._audit.write("maintenance", **said, **who(caller(), context))
        return convert.device_status_to_pb(status)

    @typed_errors
    async def Reserve(self, request: fleet_pb2.ReserveRequest, context: Context) -> types_pb2.Reservation:
        """A device for one user."""
        wanted = (request.selector, caller().name, request.from_unix_ms, request.duration_ms, request.reason)
        reservation = await self._shell.reserve(*wanted, shares=not caller().sees_all)
        said = {"device": reservation.device, "reservation": reservation.id, "until_ms": reservation.until_unix_ms}
        self._audit.write("device reserved", **said, **who(caller(), context))
        return convert.reservation_to_pb(reservation)

    @typed_errors
    async def EndReservation(self, request: fleet_pb2.EndReservationRequest, context: Context) -> types_pb2.Reservation:
        """A device for everybody again."""
        reservation = self._shell.state.reservation(request.id)
        if reservation is None or not caller().may_see(reservation.user):
            hint = "'kedge devices --gone' shows them"
            raise UnknownReservationError(f"there is no reservation {request.id!r}", hint=hint)
        await self._shell.end_reservation(request.id)
        self._audit.write("reservation ended", reservation=request.id, **who(caller(), context))
        return convert.reservation_to_pb(reservation)

    @typed_errors
    async def KeepNoise(self, request: fleet_pb2.KeepNoiseRequest, context: Context) -> types_pb2.DeviceStatus:
        """How noisy a device is, as one of its users found."""
        check_noise(request.relative, request.num_threads, request.on)
        check_number("the length of the id", len(request.id), 1, 64, "a number that the client draws")
        # One user's numbers say nothing of another's.
        user = caller().name
        number = f"{user}/{request.id}"
        measured = (request.relative, request.num_threads, request.on)
        status = await self._shell.keep_noise(number, request.device, user, *measured)
        said = {"device": request.device, "relative": request.relative}
        self._audit.write("noise kept", **said, **who(caller(), context))
        return convert.device_status_to_pb(self._seen(status))

    def _seen(self, status: DeviceStatus) -> DeviceStatus:
        """A device without the number of another's job that it runs."""
        job = self._shell.state.job(status.running_job_id) if status.running_job_id else None
        return status if job is None or caller().may_see(job.user) else replace(status, running_job_id="")

    async def _own_job(self, job_id: str) -> Job:
        """A job that is open to the caller; for another's, the error is that of a job that does not exist."""
        job = await self._shell.job(job_id)
        if not caller().may_see(job.user):
            raise unknown_job(job_id)
        return job


def _check_priority(priority: int, principal: Principal) -> None:
    """Priority is strict: with one above all others' a user would have every device, however fair the shares."""
    if principal.role is not Role.ADMIN:
        hint = "less than 0 lets your other jobs and everybody's go first; more than 0 is for administrators"
        check_number("priority", priority, -MAX_PRIORITY, 0, hint)
