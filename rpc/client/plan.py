"""What both clients decide without talking to anyone: requests out of arguments, results out of messages."""

from __future__ import annotations

import math
import os
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from kedge.protos.v1 import fleet_pb2
from kedge.rpc import convert
from kedge.rpc.artifact import Artifact, Manifest, Placement, look_at, place
from kedge.rpc.blobs import MissingBlobError, blob_of
from kedge.rpc.client.inputs import Array, arrange
from kedge.rpc.client.timing import Timing, timing_options
from kedge.rpc.errors import (
    AuthenticationError,
    IncompatibleTargetError,
    InputError,
    JobError,
    KedgeError,
    NoDeviceError,
    PermissionDeniedError,
)
from kedge.rpc.limits import check_noise, check_number, check_spec
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import ProtocolError, local_protocol
from kedge.rpc.security import signing
from kedge.rpc.status import from_rpc_error, is_away
from kedge.rpc.transport import Address, unreachable
from kedge.rpc.types import (
    MAX_DEADLINE_MS,
    MAX_LEASE_MS,
    MAX_LISTED,
    NO_BLOB,
    BenchTask,
    Blob,
    Deadlines,
    DeviceInfo,
    DeviceState,
    DeviceStatus,
    Job,
    JobFilter,
    JobResult,
    JobSpec,
    JobState,
    RunTask,
    SessionTask,
    Signature,
    StageTime,
    Task,
    Tensor,
    TimeOptions,
    plan_inline,
)

ArtifactOrPath = Artifact | str | os.PathLike[str]


class WaitTimeoutError(KedgeError):
    """The time given to `wait` is over; the job goes on."""

    exit_status = 8


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job: outputs by name, the timing of a bench, where and how it ended."""

    job_id: str
    device: str
    outcome: Outcome
    outputs: Mapping[str, Array] = field(default_factory=dict)
    timing: Timing | None = None
    stage_times: tuple[StageTime, ...] = ()

    def __getitem__(self, name: str) -> Array:
        """An output by its name."""
        return self.outputs[name]

    def __str__(self) -> str:
        return str(self.timing) if self.timing is not None else f"job {self.job_id} on {self.device}: {self.outcome}"


@dataclass(frozen=True, slots=True)
class Packed:
    """An artifact as the wire knows it: `blob` is its manifest's."""

    artifact: Artifact
    blob: Blob
    json: bytes

    @property
    def manifest(self) -> Manifest:
        """What is inside."""
        return self.artifact.manifest

    def blobs(self) -> Iterator[tuple[Blob, memoryview]]:
        """Everything to be uploaded."""
        yield self.blob, memoryview(self.json)
        for part, data in self.artifact.blobs():
            yield part, data


def pack(artifact: ArtifactOrPath) -> Packed:
    """The packed form of an artifact or of a `.kdg` file. Raises ArtifactError."""
    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(Path(artifact))
    text = artifact.manifest_json
    return Packed(artifact, Blob(artifact.digest, len(text)), text)


@dataclass(frozen=True, slots=True)
class Request:
    """A job to submit, and the blobs that have to be uploaded before."""

    spec: JobSpec
    uploads: tuple[tuple[Blob, memoryview], ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What every job says beside its task."""

    function: str
    device: str
    threads: int = 0
    priority: int = 0
    deadlines: Deadlines = Deadlines()  # noqa: RUF009 - frozen
    on: str = ""


def signature_of(packed: Packed, key: bytes | None) -> Signature | None:
    """The user's signature of an artifact, where the user has a key (see `kedge.rpc.security.signing`)."""
    return None if key is None else _sign(key, packed.json)


#: The last ones: an artifact is submitted again and again.
_sign = lru_cache(maxsize=64)(signing.sign)


def signed(spec: JobSpec, packed: Packed, key: bytes | None) -> JobSpec:
    """The spec with the user's signature of its artifact."""
    return replace(spec, signature=signature_of(packed, key))


def session_request(
    selector: str, deadlines: Deadlines, priority: int, threads: int, on: str, lease_s: float
) -> JobSpec:
    """A job that is a session; raises InputError for numbers that no tracker takes."""
    lease_ms = round(lease_s * 1000)
    check_number("lease_s in milliseconds", lease_ms, 1, MAX_LEASE_MS, "how long the tracker waits for a word")
    queue = Deadlines(queue_ms=deadlines.queue_ms)
    spec = JobSpec(NO_BLOB, "", SessionTask(lease_ms), selector, queue, priority, threads, on)
    check_spec(replace(spec, deadlines=deadlines))
    return spec


def run_request(packed: Packed, inputs: Mapping[str, Any], terms: Terms) -> Request:
    """A job that calls a function once; raises InputError, ArtifactError."""
    tensors, uploads = _tensors(packed, terms.function, inputs)
    return Request(_spec(packed, terms, RunTask(tensors)), uploads)


def bench_request(
    packed: Packed, inputs: Mapping[str, Any], terms: Terms, options: TimeOptions, return_outputs: bool
) -> Request:
    """A job that times a function; raises InputError, ArtifactError."""
    tensors, uploads = _tensors(packed, terms.function, inputs)
    return Request(_spec(packed, terms, BenchTask(tensors, options, return_outputs)), uploads)


def _spec(packed: Packed, terms: Terms, task: Task) -> JobSpec:
    function = packed.manifest.function(terms.function).name
    spec = JobSpec(packed.blob, function, task, terms.device, terms.deadlines, terms.priority, terms.threads, terms.on)
    check_spec(spec)
    return spec


def time_options(**options: Any) -> TimeOptions:
    """How to time on a device; options and errors are those of `kedge.rpc.client.timing.timing_options`."""
    return timing_options(**options)


def hello_request() -> fleet_pb2.HelloRequest:
    """What greets a tracker; also a question that costs nothing, for when it may be away."""
    return fleet_pb2.HelloRequest(protocol=convert.protocol_to_pb(local_protocol()))


def submit_request(spec: JobSpec) -> fleet_pb2.SubmitJobRequest:
    """What submits a job, once however often it is sent."""
    return fleet_pb2.SubmitJobRequest(spec=convert.job_spec_to_pb(spec), idempotency_key=secrets.token_hex(16))


def devices_request(selector: str, include_gone: bool, wait_s: float) -> fleet_pb2.ListDevicesRequest:
    """What asks for devices, and waits so long for one."""
    return fleet_pb2.ListDevicesRequest(selector=selector, include_gone=include_gone, wait_ms=round(wait_s * 1000))


def list_request(
    limit: int, states: Sequence[JobState], oldest_first: bool, wanted: JobFilter
) -> fleet_pb2.ListJobsRequest:
    """What asks for the newest or oldest jobs; raises InputError for a limit that no tracker takes."""
    check_number("limit", limit, 1, MAX_LISTED, "the newest jobs come first")
    check_number("since_unix_s in milliseconds", wanted.since_unix_ms, 0, 2**62, "seconds since 1970; 0 is all")
    return fleet_pb2.ListJobsRequest(
        limit=limit,
        states=[convert.job_state_to_pb(state) for state in states],
        oldest_first=oldest_first,
        user=wanted.user,
        device=wanted.device,
        artifact=wanted.artifact,
        since_unix_ms=wanted.since_unix_ms,
        job_ids=wanted.ids,
    )


def job_filter(user: str, device: str, artifact: str, since_unix_s: float, ids: Sequence[str]) -> JobFilter:
    """Which jobs to list; raises InputError for a time that is none, and for a text in place of several ids."""
    if not math.isfinite(since_unix_s):
        raise InputError(f"since_unix_s is {since_unix_s!r}", hint="seconds since 1970; 0 is all")
    if isinstance(ids, str):
        raise InputError(f"ids is the text {ids!r}, expected several ids", hint=f"ids=[{ids!r}]")
    return JobFilter(user, device, artifact.lower(), round(since_unix_s * 1000), tuple(ids))


def listed(answer: fleet_pb2.ListJobsResponse, wanted: JobFilter) -> list[Job]:
    """The jobs of a list; raises ProtocolError where the tracker is too old to have chosen them."""
    if wanted != JobFilter() and not answer.filtered:
        raise ProtocolError(
            "the tracker is older, and lists jobs by their states only",
            hint="update it, or list the newest 10,000 and choose from them",
        )
    return [convert.job_from_pb(pb) for pb in answer.jobs]


def noise_request(device: str, relative: float, num_threads: int, on: str) -> fleet_pb2.KeepNoiseRequest:
    """What tells how noisy a device is, once however often it is sent; raises InputError."""
    check_noise(relative, num_threads, on)
    return fleet_pb2.KeepNoiseRequest(
        id=secrets.token_hex(16), device=device, relative=relative, num_threads=num_threads, on=on
    )


def reserve_request(selector: str, duration_s: float, begin_unix_s: float, reason: str) -> fleet_pb2.ReserveRequest:
    """What asks for a device of one's own; raises InputError for times that no tracker takes."""
    duration_ms, begin_ms = round(duration_s * 1000), round(begin_unix_s * 1000)
    check_number("duration_s in milliseconds", duration_ms, 1, MAX_DEADLINE_MS, "how long the device is needed")
    check_number("begin_unix_s in milliseconds", begin_ms, 0, 2**62, "seconds since 1970; 0 is now")
    return fleet_pb2.ReserveRequest(selector=selector, from_unix_ms=begin_ms, duration_ms=duration_ms, reason=reason)


def _tensors(
    packed: Packed, function: str, inputs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], tuple[tuple[Blob, memoryview], ...]]:
    """The inputs as tensors: small ones inline, large ones as blobs to be uploaded."""
    declared = packed.manifest.function(function)
    arrays = arrange(declared, inputs)
    tensors: list[Tensor] = []
    uploads: list[tuple[Blob, memoryview]] = []
    inline = plan_inline(array.nbytes for array in arrays)
    for port, array, fits in zip(declared.inputs, arrays, inline, strict=True):
        data: bytes | Blob
        if fits:
            data = array.tobytes()
        else:
            view = array.reshape(-1).view(np.uint8).data
            data = blob_of(view)
            uploads.append((data, view))
        tensors.append(Tensor(port.name, port.dtype, array.shape, data))
    return tuple(tensors), tuple(uploads)


# ---- Devices -------------------------------------------------------------------------------------------------------


def fitting(packed: Packed, selector: str, devices: Sequence[DeviceStatus], on: str = "") -> list[DeviceStatus]:
    """Of devices that match the selector those that can run the artifact.

    Raises IncompatibleTargetError when there are devices, but none can.
    """
    refusal: IncompatibleTargetError | None = None
    found = []
    for device in devices:
        try:
            check_device(packed, device.info, on)
        except IncompatibleTargetError as error:
            refusal = refusal or error
        else:
            found.append(device)
    if refusal is not None and not found:
        where = f"device {devices[0].info.name}" if len(devices) == 1 else f"all {len(devices)} devices that match"
        about = f" {selector!r}" if selector and len(devices) > 1 else ""
        raise IncompatibleTargetError(f"{where}{about}: {refusal.message}", hint=refusal.hint) from refusal
    return found


def check_device(packed: Packed, info: DeviceInfo, on: str = "") -> Placement:
    """Where an artifact runs on a device; raises IncompatibleTargetError when it cannot, or not where `on` says."""
    return place(packed.manifest, info.arch, info.cpu_features, look_at(info), on)


#: Of several devices that match, one that can begin soonest; any other state comes last.
_PREFERENCE = {DeviceState.IDLE: 0, DeviceState.BUSY: 1}


def choose(
    selector: str,
    devices: Sequence[DeviceStatus],
    everyone: Sequence[DeviceStatus],
    user: str,
    artifact: ArtifactOrPath | None = None,
    on: str = "",
) -> DeviceStatus:
    """One device that matches and can run the artifact: by lot, of those that can begin soonest for this user.

    By lot, since all who ask at once see the same ones idle. Raises NoDeviceError naming those that there are, and
    IncompatibleTargetError where none of those that match can run the artifact.
    """
    if devices:
        if artifact is not None:
            devices = fitting(pack(artifact), selector, devices, on)
        soonest = min(_wait(device, user) for device in devices)
        return random.choice([device for device in devices if _wait(device, user) == soonest])
    if not everyone:
        raise NoDeviceError("no device is connected", hint="start one with 'kedge agent start --tracker HOST:PORT'")
    names = ", ".join(f"{d.info.name} ({d.info.arch})" for d in everyone[:10])
    raise NoDeviceError(f"no connected device matches {selector!r}", hint=f"connected: {names}")


def _wait(device: DeviceStatus, user: str) -> int:
    """A rank of how long a device lets a user wait."""
    return _PREFERENCE.get(device.state, len(_PREFERENCE)) if is_open_to(device, user) else len(_PREFERENCE)


def is_open_to(device: DeviceStatus, user: str) -> bool:
    """Whether nobody else has reserved the device now."""
    return device.reservation is None or device.reservation.user == user


def none_came(selector: str, timeout_s: float) -> NoDeviceError:
    """No device that matches has connected in time."""
    return NoDeviceError(
        f"no device that matches {selector!r} connected within {timeout_s:g} s",
        hint="see whether its agent runs, and reaches the tracker",
    )


class OnDevice:
    """Whatever is bound to one device: what its agent says of it, and what compiles for it."""

    info: DeviceInfo

    @property
    def name(self) -> str:
        """The device's name."""
        return self.info.name

    @property
    def target(self) -> str:
        """The target string that compiles for this device's CPU."""
        return self.info.target

    @property
    def targets(self) -> tuple[str, ...]:
        """Target strings for all that kernels can run on there, GPUs first; `kedge.compile` takes them together."""
        return self.info.targets


class Pinned(OnDevice):
    """One device for several jobs in turn."""

    def __init__(self, info: DeviceInfo, threads: int, deadlines: Deadlines, on: str, priority: int) -> None:
        self.info = info
        self._threads = threads
        self._deadlines = deadlines
        self._on = on
        self._priority = priority

    def _terms(self, function: str) -> Terms:
        return Terms(function, self.name, self._threads, self._priority, self._deadlines, self._on)

    def _place(self, packed: Packed) -> str:
        """Where an artifact's kernels run there; raises IncompatibleTargetError."""
        return check_device(packed, self.info, self._on).device


#: How long a tracker that went away is waited for.
RECONNECT_S = 60.0
#: Before the next attempt to greet a fleet of which no tracker leads at the moment.
FAIL_OVER_PAUSE_S = 0.3
#: How long it may take to cancel the job of a call that was broken off: whoever did that is in a hurry.
WITHDRAW_S = 3.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 0.5


class Patience:
    """With a tracker that went away: how often to try a call again, from its first failure on.

    A new connection is awaited by gRPC itself; the pauses are for calls that still fall on the dying one.
    """

    def __init__(self, address: Address, total_s: float) -> None:
        self._address = address
        self._total_s = total_s
        self._began: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def after(self, error: grpc.RpcError, now: float) -> tuple[float, dict[str, Any]]:
        """The pause before the next attempt, and how to make it; raises when there should be none."""
        again = self._began is not None
        self._began = now if self._began is None else self._began
        left = self._began + self._total_s - now
        if is_away(error) and left > 0:
            pause, self._pause_s = self._pause_s, min(2 * self._pause_s, _LAST_PAUSE_S)
            return pause, {"timeout": left, "wait_for_ready": True}
        if is_away(error) or (again and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
            why = f"it went away, and did not come back within {self._total_s:g} s"
            raise unreachable(self._address, why) from error
        raise from_rpc_error(error, self._address) from error


def has_run_job(error: grpc.RpcError, address: Address) -> bool:
    """Whether the tracker has the call RunJob, which failed with this; raises where the job itself was refused."""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return False
    if not is_away(error):
        raise from_rpc_error(error, address) from error
    return True


def has_run_jobs(error: grpc.RpcError | None, address: Address) -> bool:
    """Whether the tracker has the stream RunJobs, which ended with this (None: it was closed here).

    Whatever else ended it may concern another job: this one is submitted by itself. Raises where it is who asks.
    """
    if error is None:
        return True
    meant = from_rpc_error(error, address)
    if isinstance(meant, (AuthenticationError, PermissionDeniedError)):
        raise meant from error
    return error.code() is not grpc.StatusCode.UNIMPLEMENTED


def not_done(job_id: str, timeout_s: float | None) -> WaitTimeoutError:
    """A job that was waited for."""
    return WaitTimeoutError(f"job {job_id} is not done after {timeout_s:g} s")


def watch_ended(job_id: str) -> KedgeError:
    """A tracker that has said nothing of a job's end."""
    return KedgeError(f"the tracker ended the watch of job {job_id} before the job was done")


# ---- Results -------------------------------------------------------------------------------------------------------


def blobs_of(result: JobResult) -> list[Blob]:
    """What has to be fetched before the outputs are whole."""
    return [tensor.data for tensor in result.outputs if isinstance(tensor.data, Blob)]


def outputs_gone(job_id: str, error: MissingBlobError) -> MissingBlobError:
    """For outputs that the tracker has no more, though it still knows the job."""
    return MissingBlobError(
        f"job {job_id} is done, but not all of its outputs are on the tracker any more, which needed the room: "
        f"{error.message}",
        hint="submit the job again, read results sooner, or start the tracker with a larger --blob-quota",
    )


def read_result(job_id: str, result: JobResult, fetched: Mapping[str, bytearray]) -> Result:
    """A finished job's result; `fetched` holds the bytes of its blobs by digest."""
    outputs = {tensor.name: _array(tensor, fetched) for tensor in result.outputs}
    timing = None if result.measurement is None else Timing(result.measurement)
    return Result(job_id, result.device, result.outcome, outputs, timing, result.stage_times)


def timing_of(result: Result) -> Timing:
    """The timing that a bench came back with."""
    if result.timing is None:
        where = f"job {result.job_id} on {result.device}"
        raise KedgeError(f"{where} came back without a measurement", hint="update the agent on the device")
    return result.timing


def raise_unless_ok(result: Result) -> None:
    """Raise JobError for an outcome other than ok."""
    if not result.outcome.ok:
        where = f" on {result.device}" if result.device else ""
        kind = result.outcome.kind
        raise JobError(f"job {result.job_id}{where}: {result.outcome}", outcome=kind.value, hint=hint_for(kind))


def hint_for(kind: OutcomeKind) -> str | None:
    """What to do about such an outcome, where that can be said."""
    return _HINTS.get(kind)


_HINTS: Mapping[OutcomeKind, str] = {
    OutcomeKind.DEVICE_LOST: "see whether the device still runs (kedge devices --gone), then submit the job again",
    OutcomeKind.OUT_OF_MEMORY: "use a smaller batch, or a device with more memory (mem_mb>=...)",
    OutcomeKind.TIMEOUT: "give that stage more time: deadlines= in Python; in commands --queue-timeout, "
    "--transfer-timeout, --load-timeout, or --timeout for the run itself",
    OutcomeKind.DEVICE_FAULT: "the agent's log on the device says more",
}


def _array(tensor: Tensor, fetched: Mapping[str, bytearray]) -> Array:
    tensor.check()
    data = fetched[tensor.data.digest] if isinstance(tensor.data, Blob) else bytearray(tensor.data)
    return np.frombuffer(data, np.dtype(tensor.dtype)).reshape(tensor.shape)
