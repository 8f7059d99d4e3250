# mypy: ignore-errors
from kedge.protos.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: _types_pb2.Protocol
    def __init__(self, protocol: _Optional[_Union[_types_pb2.Protocol, _Mapping]] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("protocol", "tracker_id")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TRACKER_ID_FIELD_NUMBER: _ClassVar[int]
    protocol: _types_pb2.Protocol
    tracker_id: str
    def __init__(self, protocol: _Optional[_Union[_types_pb2.Protocol, _Mapping]] = ..., tracker_id: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("protocol", "unix_ms", "user", "role", "expires_unix_s", "store_problem", "disk_free_bytes", "agents", "epoch", "trackers")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    STORE_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRACKERS_FIELD_NUMBER: _ClassVar[int]
    protocol: _types_pb2.Protocol
    unix_ms: int
    user: str
    role: str
    expires_unix_s: int
    store_problem: str
    disk_free_bytes: int
    agents: _containers.RepeatedCompositeFieldContainer[ConnectedAgent]
    epoch: int
    trackers: _containers.RepeatedCompositeFieldContainer[TrackerMember]
    def __init__(self, protocol: _Optional[_Union[_types_pb2.Protocol, _Mapping]] = ..., unix_ms: _Optional[int] = ..., user: _Optional[str] = ..., role: _Optional[str] = ..., expires_unix_s: _Optional[int] = ..., store_problem: _Optional[str] = ..., disk_free_bytes: _Optional[int] = ..., agents: _Optional[_Iterable[_Union[ConnectedAgent, _Mapping]]] = ..., epoch: _Optional[int] = ..., trackers: _Optional[_Iterable[_Union[TrackerMember, _Mapping]]] = ...) -> None: ...

class TrackerMember(_message.Message):
    __slots__ = ("name", "address", "software", "leads", "started_unix_ms", "seen_unix_ms", "gone")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    LEADS_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SEEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    software: str
    leads: bool
    started_unix_ms: int
    seen_unix_ms: int
    gone: bool
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., software: _Optional[str] = ..., leads: bool = ..., started_unix_ms: _Optional[int] = ..., seen_unix_ms: _Optional[int] = ..., gone: bool = ...) -> None: ...

class ConnectedAgent(_message.Message):
    __slots__ = ("device", "protocol")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    device: str
    protocol: _types_pb2.Protocol
    def __init__(self, device: _Optional[str] = ..., protocol: _Optional[_Union[_types_pb2.Protocol, _Mapping]] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ("selector", "include_gone", "wait_ms")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_GONE_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    selector: str
    include_gone: bool
    wait_ms: int
    def __init__(self, selector: _Optional[str] = ..., include_gone: bool = ..., wait_ms: _Optional[int] = ...) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[_types_pb2.DeviceStatus]
    def __init__(self, devices: _Optional[_Iterable[_Union[_types_pb2.DeviceStatus, _Mapping]]] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec", "idempotency_key")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    spec: _types_pb2.JobSpec
    idempotency_key: str
    def __init__(self, spec: _Optional[_Union[_types_pb2.JobSpec, _Mapping]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job", "existed")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.Job
    existed: bool
    def __init__(self, job: _Optional[_Union[_types_pb2.Job, _Mapping]] = ..., existed: bool = ...) -> None: ...

class RunJobResponse(_message.Message):
    __slots__ = ("job_id", "result")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    result: _types_pb2.JobResult
    def __init__(self, job_id: _Optional[str] = ..., result: _Optional[_Union[_types_pb2.JobResult, _Mapping]] = ...) -> None: ...

class RunJobsRequest(_message.Message):
    __slots__ = ("number", "job", "forgotten")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    number: int
    job: SubmitJobRequest
    forgotten: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., job: _Optional[_Union[SubmitJobRequest, _Mapping]] = ..., forgotten: _Optional[_Iterable[int]] = ...) -> None: ...

class RunJobsResponse(_message.Message):
    __slots__ = ("number", "job_id", "refused", "result", "large")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    LARGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    job_id: str
    refused: Refusal
    result: _types_pb2.JobResult
    large: bool
    def __init__(self, number: _Optional[int] = ..., job_id: _Optional[str] = ..., refused: _Optional[_Union[Refusal, _Mapping]] = ..., result: _Optional[_Union[_types_pb2.JobResult, _Mapping]] = ..., large: bool = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("error", "message", "hint")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    hint: str
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("states", "limit", "oldest_first", "user", "device", "artifact", "since_unix_ms", "job_ids")
    STATES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIRST_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedScalarFieldContainer[_types_pb2.JobState]
    limit: int
    oldest_first: bool
    user: str
    device: str
    artifact: str
    since_unix_ms: int
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, states: _Optional[_Iterable[_Union[_types_pb2.JobState, str]]] = ..., limit: _Optional[int] = ..., oldest_first: bool = ..., user: _Optional[str] = ..., device: _Optional[str] = ..., artifact: _Optional[str] = ..., since_unix_ms: _Optional[int] = ..., job_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "filtered")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    FILTERED_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.Job]
    filtered: bool
    def __init__(self, jobs: _Optional[_Iterable[_Union[_types_pb2.Job, _Mapping]]] = ..., filtered: bool = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class SetMaintenanceRequest(_message.Message):
    __slots__ = ("device", "enabled", "reason")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device: str
    enabled: bool
    reason: str
    def __init__(self, device: _Optional[str] = ..., enabled: bool = ..., reason: _Optional[str] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("selector", "from_unix_ms", "duration_ms", "reason")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    FROM_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    selector: str
    from_unix_ms: int
    duration_ms: int
    reason: str
    def __init__(self, selector: _Optional[str] = ..., from_unix_ms: _Optional[int] = ..., duration_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class EndReservationRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class KeepNoiseRequest(_message.Message):
    __slots__ = ("id", "device", "relative", "num_threads", "on")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    id: str
    device: str
    relative: float
    num_threads: int
    on: str
    def __init__(self, id: _Optional[str] = ..., device: _Optional[str] = ..., relative: _Optional[float] = ..., num_threads: _Optional[int] = ..., on: _Optional[str] = ...) -> None: ...
