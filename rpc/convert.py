"""The one place that translates between protobuf messages and the plain dataclasses of `kedge.rpc`.

`X_to_pb` and `X_from_pb` are inverse to each other. An enum value that this version does not know reads as None (or
`OutcomeKind.UNKNOWN`); a message that lacks what it cannot do without raises ProtocolError.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from typing import Any, Dict, Generic, Iterable, Mapping, Optional, Tuple, Type, TypeVar

from kedge.protos.v1 import agent_pb2, fleet_pb2, types_pb2
from kedge.rpc import messages as m
from kedge.rpc import types as t
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import ProtocolError

E = TypeVar("E", bound=enum.Enum)


class _EnumMap(Generic[E]):
    """A Python enum beside a protobuf enum whose names are PREFIX_NAME."""

    def __init__(self, plain: Type[E], pb: Any, prefix: str, skip: Tuple[str, ...] = ()) -> None:
        values: Mapping[str, int] = dict(pb.items())
        self._to: Dict[E, int] = {e: values[f"{prefix}_{e.name}"] for e in plain if e.name not in skip}
        self._from: Dict[int, E] = {number: e for e, number in self._to.items()}

    def to_pb(self, value: Optional[E]) -> Any:
        return 0 if value is None else self._to.get(value, 0)

    def from_pb(self, number: int) -> Optional[E]:
        return self._from.get(number)


_STAGE = _EnumMap(Stage, types_pb2.Stage, "STAGE")
_OUTCOME = _EnumMap(OutcomeKind, types_pb2.OutcomeKind, "OUTCOME_KIND", skip=("UNKNOWN",))
_VERDICT = _EnumMap(t.Verdict, types_pb2.Verdict, "VERDICT")
_DEVICE_STATE = _EnumMap(t.DeviceState, types_pb2.DeviceState, "DEVICE_STATE")
_JOB_STATE = _EnumMap(t.JobState, types_pb2.JobState, "JOB_STATE")


def _need(value: Optional[E], what: str) -> E:
    if value is None:
        raise ProtocolError(f"a message without a known {what}", hint="update the older of the two kedges")
    return value


# ---- Values --------------------------------------------------------------------------------------------------------


def blob_to_pb(blob: t.Blob) -> types_pb2.Blob:
    """Blob, out."""
    return types_pb2.Blob(digest=blob.digest, size_bytes=blob.size)


def blob_from_pb(pb: types_pb2.Blob) -> t.Blob:
    """Blob, in."""
    return t.Blob(pb.digest, pb.size_bytes)


def protocol_to_pb(protocol: t.Protocol) -> types_pb2.Protocol:
    """Protocol, out."""
    return types_pb2.Protocol(version=protocol.version, capabilities=protocol.capabilities, software=protocol.software)


def protocol_from_pb(pb: types_pb2.Protocol) -> t.Protocol:
    """Protocol, in."""
    return t.Protocol(pb.version, tuple(pb.capabilities), pb.software)


def tracker_status_to_pb(status: t.TrackerStatus) -> fleet_pb2.StatusResponse:
    """TrackerStatus, out."""
    agents = [
        fleet_pb2.ConnectedAgent(device=device, protocol=protocol_to_pb(spoken))
        for device, spoken in status.agents.items()
    ]
    return fleet_pb2.StatusResponse(
        protocol=protocol_to_pb(status.protocol),
        unix_ms=status.unix_ms,
        user=status.user,
        role=status.role,
        expires_unix_s=status.expires_unix_s,
        store_problem=status.store_problem,
        disk_free_bytes=status.disk_free_bytes,
        agents=agents,
        epoch=status.epoch,
        trackers=[fleet_pb2.TrackerMember(**dataclasses.asdict(member)) for member in status.trackers],
    )


def tracker_status_from_pb(pb: fleet_pb2.StatusResponse) -> t.TrackerStatus:
    """TrackerStatus, in."""
    return t.TrackerStatus(
        protocol=protocol_from_pb(pb.protocol),
        unix_ms=pb.unix_ms,
        user=pb.user,
        role=pb.role,
        expires_unix_s=pb.expires_unix_s,
        store_problem=pb.store_problem,
        disk_free_bytes=pb.disk_free_bytes,
        agents={agent.device: protocol_from_pb(agent.protocol) for agent in pb.agents},
        epoch=pb.epoch,
        trackers=tuple(
            t.TrackerMember(
                name=member.name,
                address=member.address,
                software=member.software,
                leads=member.leads,
                started_unix_ms=member.started_unix_ms,
                seen_unix_ms=member.seen_unix_ms,
                gone=member.gone,
            )
            for member in pb.trackers
        ),
    )


def tensor_to_pb(tensor: t.Tensor) -> types_pb2.Tensor:
    """Tensor, out."""
    pb = types_pb2.Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
    if isinstance(tensor.data, t.Blob):
        pb.blob.CopyFrom(blob_to_pb(tensor.data))
    else:
        pb.inline = tensor.data
    return pb


def tensor_from_pb(pb: types_pb2.Tensor) -> t.Tensor:
    """Tensor, in."""
    which = pb.WhichOneof("data")
    if which is None:
        raise ProtocolError(f"tensor {pb.name!r} carries no data")
    data = blob_from_pb(pb.blob) if which == "blob" else pb.inline
    return t.Tensor(pb.name, pb.dtype, tuple(pb.shape), data)


def _tensors_from_pb(items: Iterable[types_pb2.Tensor]) -> Tuple[t.Tensor, ...]:
    return tuple(tensor_from_pb(item) for item in items)


def outcome_to_pb(outcome: Outcome) -> types_pb2.Outcome:
    """Outcome, out."""
    return types_pb2.Outcome(
        kind=_OUTCOME.to_pb(outcome.kind),
        stage=_STAGE.to_pb(outcome.stage),
        signal=outcome.signal,
        exit_status=outcome.exit_status,
        message=outcome.message,
    )


def outcome_from_pb(pb: types_pb2.Outcome) -> Outcome:
    """Outcome, in."""
    kind = _OUTCOME.from_pb(pb.kind) or OutcomeKind.UNKNOWN
    return Outcome(kind, _STAGE.from_pb(pb.stage), pb.signal, pb.exit_status, pb.message)


# ---- Devices -------------------------------------------------------------------------------------------------------


_ACCELERATOR_FIELDS = tuple(item.name for item in dataclasses.fields(t.Accelerator) if item.name != "features")


def _accelerator_to_pb(gpu: t.Accelerator) -> types_pb2.Accelerator:
    return types_pb2.Accelerator(features=gpu.features, **{name: getattr(gpu, name) for name in _ACCELERATOR_FIELDS})


def _accelerator_from_pb(pb: types_pb2.Accelerator) -> t.Accelerator:
    return t.Accelerator(features=tuple(pb.features), **{name: getattr(pb, name) for name in _ACCELERATOR_FIELDS})


def _confinement_to_pb(item: t.Confinement) -> types_pb2.Confinement:
    return types_pb2.Confinement(
        memory=item.memory,
        user=item.user,
        network=item.network,
        files=item.files,
        calls=item.calls,
        measuring_cpus=item.measuring_cpus,
        missing=item.missing,
    )


def _confinement_from_pb(pb: types_pb2.Confinement) -> t.Confinement:
    cpus = tuple(pb.measuring_cpus)
    return t.Confinement(pb.memory, pb.user, pb.network, pb.files, pb.calls, cpus, tuple(pb.missing))


def device_info_to_pb(info: t.DeviceInfo) -> types_pb2.DeviceInfo:
    """DeviceInfo, out."""
    return types_pb2.DeviceInfo(
        name=info.name,
        labels=dict(info.labels),
        arch=info.arch,
        cpu_features=info.cpu_features,
        cpu_name=info.cpu_name,
        num_cores=info.num_cores,
        memory_bytes=info.memory_bytes,
        target=info.target,
        emulated=info.emulated,
        abi_version=info.abi_version,
        os_release=info.os_release,
        accelerators=[_accelerator_to_pb(gpu) for gpu in info.accelerators],
        confinement=None if info.confinement is None else _confinement_to_pb(info.confinement),
    )


def device_info_from_pb(pb: types_pb2.DeviceInfo) -> t.DeviceInfo:
    """DeviceInfo, in."""
    return t.DeviceInfo(
        name=pb.name,
        arch=pb.arch,
        labels=dict(pb.labels),
        cpu_features=tuple(pb.cpu_features),
        cpu_name=pb.cpu_name,
        num_cores=pb.num_cores,
        memory_bytes=pb.memory_bytes,
        target=t.ReportedTarget(pb.target, tuple(pb.cpu_features)),
        emulated=pb.emulated,
        abi_version=pb.abi_version,
        os_release=pb.os_release,
        accelerators=tuple(_accelerator_from_pb(gpu) for gpu in pb.accelerators),
        confinement=_confinement_from_pb(pb.confinement) if pb.HasField("confinement") else None,
    )


def device_status_to_pb(status: t.DeviceStatus) -> types_pb2.DeviceStatus:
    """DeviceStatus, out."""
    return types_pb2.DeviceStatus(
        info=device_info_to_pb(status.info),
        state=_DEVICE_STATE.to_pb(status.state),
        last_seen_unix_ms=status.last_seen_unix_ms,
        running_job_id=status.running_job_id,
        detail=status.detail,
        health=None if status.health is None else health_to_pb(status.health),
        reservation=None if status.reservation is None else reservation_to_pb(status.reservation),
        noise=[types_pb2.NoiseFloor(**dataclasses.asdict(floor)) for floor in status.noise],
        upcoming=[reservation_to_pb(item) for item in status.upcoming],
    )


def device_status_from_pb(pb: types_pb2.DeviceStatus) -> t.DeviceStatus:
    """DeviceStatus, in."""
    state = _need(_DEVICE_STATE.from_pb(pb.state), "device state")
    return t.DeviceStatus(
        info=device_info_from_pb(pb.info),
        state=state,
        last_seen_unix_ms=pb.last_seen_unix_ms,
        running_job_id=pb.running_job_id,
        detail=pb.detail,
        health=health_from_pb(pb.health) if pb.HasField("health") else None,
        reservation=reservation_from_pb(pb.reservation) if pb.HasField("reservation") else None,
        noise=tuple(t.NoiseFloor(**{name: getattr(floor, name) for name in _NOISE_FIELDS}) for floor in pb.noise),
        upcoming=tuple(reservation_from_pb(item) for item in pb.upcoming),
    )


def reservation_to_pb(item: t.Reservation) -> types_pb2.Reservation:
    """Reservation, out."""
    return types_pb2.Reservation(
        id=item.id,
        device=item.device,
        user=item.user,
        from_unix_ms=item.from_unix_ms,
        until_unix_ms=item.until_unix_ms,
        reason=item.reason,
    )


def reservation_from_pb(pb: types_pb2.Reservation) -> t.Reservation:
    """Reservation, in."""
    return t.Reservation(pb.id, pb.device, pb.user, pb.from_unix_ms, pb.until_unix_ms, pb.reason)


_NOISE_FIELDS = tuple(t.NoiseFloor.__dataclass_fields__)
_HEALTH_NUMBERS = (
    "load_1min", "temperature_celsius", "frequency_mhz", "memory_available_bytes", "disk_free_bytes",
)  # fmt: skip


def health_to_pb(health: t.Health) -> types_pb2.Health:
    """Health, out."""
    pb = types_pb2.Health(governor=health.governor, throttled=health.throttled, problems=health.problems)
    for name in _HEALTH_NUMBERS:
        value = getattr(health, name)
        if value is not None:
            setattr(pb, name, value)
    return pb


def health_from_pb(pb: types_pb2.Health) -> t.Health:
    """Health, in."""
    present: Dict[str, Any] = {name: getattr(pb, name) for name in _HEALTH_NUMBERS if pb.HasField(name)}
    return t.Health(governor=pb.governor, throttled=tuple(pb.throttled), problems=tuple(pb.problems), **present)


# ---- Jobs ----------------------------------------------------------------------------------------------------------

_TIME_FIELDS = tuple(t.TimeOptions.__dataclass_fields__)
_DEADLINE_FIELDS = tuple(t.Deadlines.__dataclass_fields__)


def time_options_to_pb(options: t.TimeOptions) -> types_pb2.TimeOptions:
    """TimeOptions, out."""
    return types_pb2.TimeOptions(**{name: getattr(options, name) for name in _TIME_FIELDS})


def time_options_from_pb(pb: types_pb2.TimeOptions) -> t.TimeOptions:
    """TimeOptions, in."""
    return t.TimeOptions(**{name: getattr(pb, name) for name in _TIME_FIELDS})


def deadlines_to_pb(deadlines: t.Deadlines) -> types_pb2.Deadlines:
    """Deadlines, out."""
    return types_pb2.Deadlines(**{name: getattr(deadlines, name) for name in _DEADLINE_FIELDS})


def deadlines_from_pb(pb: types_pb2.Deadlines) -> t.Deadlines:
    """Deadlines, in."""
    return t.Deadlines(**{name: getattr(pb, name) for name in _DEADLINE_FIELDS})


def job_spec_to_pb(spec: t.JobSpec) -> types_pb2.JobSpec:
    """JobSpec, out."""
    pb = types_pb2.JobSpec(
        manifest=blob_to_pb(spec.manifest),
        function=spec.function,
        selector=spec.selector,
        deadlines=deadlines_to_pb(spec.deadlines),
        priority=spec.priority,
        num_threads=spec.num_threads,
        on=spec.on,
    )
    if spec.signature is not None:
        pb.signature.public_key, pb.signature.signature = spec.signature.public_key, spec.signature.signature
    inputs = [tensor_to_pb(tensor) for tensor in spec.task.inputs]
    if isinstance(spec.task, t.BenchTask):
        options = time_options_to_pb(spec.task.options)
        task = types_pb2.BenchTask(inputs=inputs, options=options, return_outputs=spec.task.return_outputs)
        pb.bench.CopyFrom(task)
    elif isinstance(spec.task, t.SessionTask):
        pb.session.lease_ms = spec.task.lease_ms
        pb.session.SetInParent()
    else:
        pb.run.CopyFrom(types_pb2.RunTask(inputs=inputs, discard_outputs=spec.task.discard_outputs))
    return pb


def signature_from_pb(holder: Any) -> Optional[t.Signature]:
    """The signature in a message that may have one."""
    if not holder.HasField("signature"):
        return None
    return t.Signature(holder.signature.public_key, holder.signature.signature)


def job_spec_from_pb(pb: types_pb2.JobSpec) -> t.JobSpec:
    """JobSpec, in."""
    which = pb.WhichOneof("task")
    task: t.Task
    if which == "run":
        task = t.RunTask(_tensors_from_pb(pb.run.inputs), pb.run.discard_outputs)
    elif which == "bench":
        options = time_options_from_pb(pb.bench.options)
        task = t.BenchTask(_tensors_from_pb(pb.bench.inputs), options, pb.bench.return_outputs)
    elif which == "session":
        task = t.SessionTask(pb.session.lease_ms)
    else:
        raise ProtocolError("a job without a task that this kedge knows", hint="update the older of the two kedges")
    return t.JobSpec(
        manifest=blob_from_pb(pb.manifest),
        function=pb.function,
        task=task,
        selector=sys.intern(pb.selector),  # thousands of jobs may wait for the same
        deadlines=deadlines_from_pb(pb.deadlines),
        priority=pb.priority,
        num_threads=pb.num_threads,
        on=pb.on,
        signature=signature_from_pb(pb),
    )


def measurement_to_pb(measurement: t.Measurement) -> types_pb2.Measurement:
    """Measurement, out."""
    return types_pb2.Measurement(
        options=time_options_to_pb(measurement.options),
        samples_ns=measurement.samples_ns,
        resolution_ns=measurement.resolution_ns,
        num_threads=measurement.num_threads,
        before=None if measurement.before is None else health_to_pb(measurement.before),
        after=None if measurement.after is None else health_to_pb(measurement.after),
        verdict=_VERDICT.to_pb(measurement.verdict),
        reasons=measurement.reasons,
        profile=None if measurement.profile is None else _profile_to_pb(measurement.profile),
        pinning=None if measurement.pinning is None else _pinning_to_pb(measurement.pinning),
    )


def measurement_from_pb(pb: types_pb2.Measurement) -> t.Measurement:
    """Measurement, in."""
    return t.Measurement(
        options=time_options_from_pb(pb.options),
        samples_ns=tuple(pb.samples_ns),
        resolution_ns=pb.resolution_ns,
        num_threads=pb.num_threads,
        before=health_from_pb(pb.before) if pb.HasField("before") else None,
        after=health_from_pb(pb.after) if pb.HasField("after") else None,
        verdict=_VERDICT.from_pb(pb.verdict),
        reasons=tuple(pb.reasons),
        profile=_profile_from_pb(pb.profile) if pb.HasField("profile") else None,
        pinning=_pinning_from_pb(pb.pinning) if pb.HasField("pinning") else None,
    )


def _pinning_to_pb(item: t.Pinning) -> types_pb2.Pinning:
    return types_pb2.Pinning(
        cpus=item.cpus, reserved=item.reserved, enforced=item.enforced, others_share=item.others_share
    )


def _pinning_from_pb(pb: types_pb2.Pinning) -> t.Pinning:
    share = pb.others_share if pb.HasField("others_share") else None
    return t.Pinning(tuple(pb.cpus), pb.reserved, pb.enforced, share)


def _profile_to_pb(profile: t.StepSamples) -> types_pb2.Profile:
    steps = [types_pb2.Profile.Step(samples_ns=samples) for samples in profile.steps_ns]
    return types_pb2.Profile(
        steps=steps, clock_hz=profile.clock_hz, read_bytes_per_s=profile.read_bytes_per_s, variant=profile.variant
    )


def _profile_from_pb(pb: types_pb2.Profile) -> t.StepSamples:
    steps = tuple(tuple(step.samples_ns) for step in pb.steps)
    return t.StepSamples(steps, pb.clock_hz, tuple(pb.read_bytes_per_s), pb.variant)


def job_result_to_pb(result: t.JobResult) -> types_pb2.JobResult:
    """JobResult, out."""
    return types_pb2.JobResult(
        outcome=outcome_to_pb(result.outcome),
        outputs=[tensor_to_pb(tensor) for tensor in result.outputs],
        measurement=None if result.measurement is None else measurement_to_pb(result.measurement),
        stage_times=[
            types_pb2.StageTime(stage=_STAGE.to_pb(item.stage), duration_ns=item.duration_ns)
            for item in result.stage_times
        ],
        device=result.device,
    )


def job_result_from_pb(pb: types_pb2.JobResult) -> t.JobResult:
    """JobResult, in."""
    known = [(_STAGE.from_pb(item.stage), item.duration_ns) for item in pb.stage_times]
    return t.JobResult(
        outcome=outcome_from_pb(pb.outcome),
        outputs=_tensors_from_pb(pb.outputs),
        measurement=measurement_from_pb(pb.measurement) if pb.HasField("measurement") else None,
        stage_times=tuple(t.StageTime(stage, duration) for stage, duration in known if stage is not None),
        device=pb.device,
    )


def job_state_to_pb(state: t.JobState) -> types_pb2.JobState:
    """JobState, out."""
    number: types_pb2.JobState = _JOB_STATE.to_pb(state)
    return number


def job_state_from_pb(number: int) -> t.JobState:
    """JobState, in."""
    return _need(_JOB_STATE.from_pb(number), "job state")


def job_filter_from_pb(pb: fleet_pb2.ListJobsRequest) -> t.JobFilter:
    """JobFilter, in."""
    return t.JobFilter(pb.user, pb.device, pb.artifact, pb.since_unix_ms, tuple(pb.job_ids))


def job_to_pb(job: t.Job) -> types_pb2.Job:
    """Job, out."""
    return types_pb2.Job(
        id=job.id,
        spec=job_spec_to_pb(job.spec),
        state=_JOB_STATE.to_pb(job.state),
        stage=_STAGE.to_pb(job.stage),
        device=job.device,
        result=None if job.result is None else job_result_to_pb(job.result),
        submitted_unix_ms=job.submitted_unix_ms,
        finished_unix_ms=job.finished_unix_ms,
        detail=job.detail,
        user=job.user,
        position=job.position,
        eta_ms=job.eta_ms,
        faults=[types_pb2.DeviceFault(device=fault.device, reason=fault.reason) for fault in job.faults],
    )


def job_from_pb(pb: types_pb2.Job) -> t.Job:
    """Job, in."""
    return t.Job(
        id=pb.id,
        spec=job_spec_from_pb(pb.spec),
        state=job_state_from_pb(pb.state),
        stage=_STAGE.from_pb(pb.stage),
        device=pb.device,
        result=job_result_from_pb(pb.result) if pb.HasField("result") else None,
        submitted_unix_ms=pb.submitted_unix_ms,
        finished_unix_ms=pb.finished_unix_ms,
        detail=pb.detail,
        user=pb.user,
        position=pb.position,
        eta_ms=pb.eta_ms if pb.HasField("eta_ms") else None,
        faults=tuple(t.DeviceFault(fault.device, fault.reason) for fault in pb.faults),
    )


def device_info_to_bytes(info: t.DeviceInfo) -> bytes:
    """A device's description as bytes, to be stored."""
    return device_info_to_pb(info).SerializeToString()


def device_info_from_bytes(data: bytes) -> t.DeviceInfo:
    """A stored description of a device."""
    return device_info_from_pb(types_pb2.DeviceInfo.FromString(data))


def job_spec_to_bytes(spec: t.JobSpec) -> bytes:
    """A spec as bytes, to be stored."""
    return job_spec_to_pb(spec).SerializeToString()


def artifact_of_spec(data: bytes) -> str:
    """The digest of the artifact of a job_spec_to_bytes; reads nothing else of it."""
    return str(types_pb2.JobSpec.FromString(data).manifest.digest)


def job_spec_from_bytes(data: bytes) -> t.JobSpec:
    """A stored spec."""
    return job_spec_from_pb(types_pb2.JobSpec.FromString(data))


def job_result_to_bytes(result: t.JobResult) -> bytes:
    """A result as bytes, to be stored."""
    return job_result_to_pb(result).SerializeToString()


def job_result_from_bytes(data: bytes) -> t.JobResult:
    """A stored result."""
    return job_result_from_pb(types_pb2.JobResult.FromString(data))


# ---- The agent's stream --------------------------------------------------------------------------------------------


def lease_to_pb(lease: t.Lease) -> types_pb2.Lease:
    """Lease, out."""
    return types_pb2.Lease(job_id=lease.job_id, epoch=lease.epoch, duration_ms=lease.duration_ms)


def lease_from_pb(pb: types_pb2.Lease) -> t.Lease:
    """Lease, in."""
    return t.Lease(pb.job_id, pb.epoch, pb.duration_ms)


def agent_message_to_pb(body: m.AgentBody, request_id: int) -> agent_pb2.AgentMessage:
    """What an agent says, out; `request_id` counts up within a connection."""
    pb = agent_pb2.AgentMessage(request_id=request_id)
    if isinstance(body, m.Hello):
        pb.hello.protocol.CopyFrom(protocol_to_pb(body.protocol))
        pb.hello.device.CopyFrom(device_info_to_pb(body.device))
        pb.hello.instance_id = body.instance_id
        pb.hello.running.extend(lease_to_pb(lease) for lease in body.running)
        if body.health is not None:
            pb.hello.health.CopyFrom(health_to_pb(body.health))
    elif isinstance(body, m.Heartbeat):
        pb.heartbeat.health.CopyFrom(health_to_pb(body.health))
        pb.heartbeat.running.extend(lease_to_pb(lease) for lease in body.running)
    elif isinstance(body, m.JobStarted):
        pb.job_started.lease.CopyFrom(lease_to_pb(body.lease))
    elif isinstance(body, m.JobProgress):
        pb.job_progress.lease.CopyFrom(lease_to_pb(body.lease))
        pb.job_progress.stage = _STAGE.to_pb(body.stage)
    elif isinstance(body, m.JobFinished):
        pb.job_finished.lease.CopyFrom(lease_to_pb(body.lease))
        pb.job_finished.result.CopyFrom(job_result_to_pb(body.result))
    else:
        pb.goodbye.reason = body.reason
        pb.goodbye.SetInParent()
    return pb


def agent_message_from_pb(pb: agent_pb2.AgentMessage) -> Optional[m.AgentBody]:
    """What an agent says, in; None for a message that only a newer peer knows."""
    which = pb.WhichOneof("body")
    if which == "hello":
        hello = pb.hello
        running = tuple(lease_from_pb(lease) for lease in hello.running)
        device = device_info_from_pb(hello.device)
        health = health_from_pb(hello.health) if hello.HasField("health") else None
        return m.Hello(protocol_from_pb(hello.protocol), device, hello.instance_id, running, health)
    if which == "heartbeat":
        beat = pb.heartbeat
        return m.Heartbeat(health_from_pb(beat.health), tuple(lease_from_pb(lease) for lease in beat.running))
    if which == "job_started":
        return m.JobStarted(lease_from_pb(pb.job_started.lease))
    if which == "job_progress":
        stage = _STAGE.from_pb(pb.job_progress.stage)
        return None if stage is None else m.JobProgress(lease_from_pb(pb.job_progress.lease), stage)
    if which == "job_finished":
        return m.JobFinished(lease_from_pb(pb.job_finished.lease), job_result_from_pb(pb.job_finished.result))
    if which == "goodbye":
        return m.Goodbye(pb.goodbye.reason)
    return None


def tracker_message_to_pb(body: m.TrackerBody, request_id: int) -> agent_pb2.TrackerMessage:
    """What the tracker says, out; `request_id` counts up within a connection."""
    pb = agent_pb2.TrackerMessage(request_id=request_id)
    if isinstance(body, m.Welcome):
        pb.welcome.protocol.CopyFrom(protocol_to_pb(body.protocol))
        pb.welcome.tracker_id = body.tracker_id
        pb.welcome.heartbeat_interval_ms = body.heartbeat_interval_ms
    elif isinstance(body, m.AssignJob):
        pb.assign_job.lease.CopyFrom(lease_to_pb(body.lease))
        pb.assign_job.spec.CopyFrom(job_spec_to_pb(body.spec))
    elif isinstance(body, m.AbortJob):
        pb.abort_job.lease.CopyFrom(lease_to_pb(body.lease))
        pb.abort_job.reason = body.reason
    elif isinstance(body, m.ResultAccepted):
        pb.result_accepted.job_id = body.job_id
        pb.result_accepted.stale = body.stale
        pb.result_accepted.SetInParent()
    else:
        pb.refused.reason = body.reason
        pb.refused.retry = body.retry
        pb.refused.SetInParent()
    return pb


def tracker_message_from_pb(pb: agent_pb2.TrackerMessage) -> Optional[m.TrackerBody]:
    """What the tracker says, in; None for a message that only a newer peer knows."""
    which = pb.WhichOneof("body")
    if which == "welcome":
        welcome = pb.welcome
        return m.Welcome(protocol_from_pb(welcome.protocol), welcome.tracker_id, welcome.heartbeat_interval_ms)
    if which == "assign_job":
        return m.AssignJob(lease_from_pb(pb.assign_job.lease), job_spec_from_pb(pb.assign_job.spec))
    if which == "abort_job":
        return m.AbortJob(lease_from_pb(pb.abort_job.lease), pb.abort_job.reason)
    if which == "result_accepted":
        return m.ResultAccepted(pb.result_accepted.job_id, pb.result_accepted.stale)
    if which == "refused":
        return m.Refused(pb.refused.reason, pb.refused.retry)
    return None
