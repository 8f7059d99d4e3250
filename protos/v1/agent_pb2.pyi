# mypy: ignore-errors
from kedge.protos.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentMessage(_message.Message):
    __slots__ = ("request_id", "hello", "heartbeat", "job_started", "job_progress", "job_finished", "goodbye")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    JOB_STARTED_FIELD_NUMBER: _ClassVar[int]
    JOB_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    JOB_FINISHED_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    hello: AgentHello
    heartbeat: Heartbeat
    job_started: JobStarted
    job_progress: JobProgress
    job_finished: JobFinished
    goodbye: Goodbye
    def __init__(self, request_id: _Optional[int] = ..., hello: _Optional[_Union[AgentHello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., job_started: _Optional[_Union[JobStarted, _Mapping]] = ..., job_progress: _Optional[_Union[JobProgress, _Mapping]] = ..., job_finished: _Optional[_Union[JobFinished, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class AgentHello(_message.Message):
    __slots__ = ("protocol", "device", "instance_id", "running", "health")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    protocol: _types_pb2.Protocol
    device: _types_pb2.DeviceInfo
    instance_id: str
    running: _containers.RepeatedCompositeFieldContainer[_types_pb2.Lease]
    health: _types_pb2.Health
    def __init__(self, protocol: _Optional[_Union[_types_pb2.Protocol, _Mapping]] = ..., device: _Optional[_Union[_types_pb2.DeviceInfo, _Mapping]] = ..., instance_id: _Optional[str] = ..., running: _Optional[_Iterable[_Union[_types_pb2.Lease, _Mapping]]] = ..., health: _Optional[_Union[_types_pb2.Health, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("health", "running")
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    health: _types_pb2.Health
    running: _containers.RepeatedCompositeFieldContainer[_types_pb2.Lease]
    def __init__(self, health: _Optional[_Union[_types_pb2.Health, _Mapping]] = ..., running: _Optional[_Iterable[_Union[_types_pb2.Lease, _Mapping]]] = ...) -> None: ...

class JobStarted(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: _types_pb2.Lease
    def __init__(self, lease: _Optional[_Union[_types_pb2.Lease, _Mapping]] = ...) -> None: ...

class JobProgress(_message.Message):
    __slots__ = ("lease", "stage")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    lease: _types_pb2.Lease
    stage: _types_pb2.Stage
    def __init__(self, lease: _Optional[_Union[_types_pb2.Lease, _Mapping]] = ..., stage: _Optional[_Union[_types_pb2.Stage, str]] = ...) -> None: ...

class JobFinished(_message.Message):
    __slots__ = ("lease", "result")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    lease: _types_pb2.Lease
    result: _types_pb2.JobResult
    def __init__(self, lease: _Optional[_Union[_types_pb2.Lease, _Mapping]] = ..., result: _Optional[_Union[_types_pb2.JobResult, _Mapping]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class TrackerMessage(_message.Message):
    __slots__ = ("request_id", "welcome", "assign_job", "abort_job", "result_accepted", "refused")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_JOB_FIELD_NUMBER: _ClassVar[int]
    ABORT_JOB_FIELD_NUMBER: _ClassVar[int]
    RESULT_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    welcome: Welcome
    assign_job: AssignJob
    abort_job: AbortJob
    result_accepted: ResultAccepted
    refused: Refused
    def __init__(self, request_id: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., assign_job: _Optional[_Union[AssignJob, _Mapping]] = ..., abort_job: _Optional[_Union[AbortJob, _Mapping]] = ..., result_accepted: _Optional[_Union[ResultAccepted, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "tracker_id", "heartbeat_interval_ms")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TRACKER_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    protocol: _types_pb2.Protocol
    tracker_id: str
    heartbeat_interval_ms: int
    def __init__(self, protocol: _Optional[_Union[_types_pb2.Protocol, _Mapping]] = ..., tracker_id: _Optional[str] = ..., heartbeat_interval_ms: _Optional[int] = ...) -> None: ...

class AssignJob(_message.Message):
    __slots__ = ("lease", "spec")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    lease: _types_pb2.Lease
    spec: _types_pb2.JobSpec
    def __init__(self, lease: _Optional[_Union[_types_pb2.Lease, _Mapping]] = ..., spec: _Optional[_Union[_types_pb2.JobSpec, _Mapping]] = ...) -> None: ...

class AbortJob(_message.Message):
    __slots__ = ("lease", "reason")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease: _types_pb2.Lease
    reason: str
    def __init__(self, lease: _Optional[_Union[_types_pb2.Lease, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class ResultAccepted(_message.Message):
    __slots__ = ("job_id", "stale")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    stale: bool
    def __init__(self, job_id: _Optional[str] = ..., stale: bool = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "retry")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    reason: str
    retry: bool
    def __init__(self, reason: _Optional[str] = ..., retry: bool = ...) -> None: ...
