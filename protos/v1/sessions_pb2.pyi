# mypy: ignore-errors
from kedge.protos.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClientFrame(_message.Message):
    __slots__ = ("attach", "renew", "grant", "data", "close", "withdraw")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    attach: AttachSession
    renew: RenewSession
    grant: GrantArtifact
    data: bytes
    close: CloseSession
    withdraw: WithdrawArtifact
    def __init__(self, attach: _Optional[_Union[AttachSession, _Mapping]] = ..., renew: _Optional[_Union[RenewSession, _Mapping]] = ..., grant: _Optional[_Union[GrantArtifact, _Mapping]] = ..., data: _Optional[bytes] = ..., close: _Optional[_Union[CloseSession, _Mapping]] = ..., withdraw: _Optional[_Union[WithdrawArtifact, _Mapping]] = ...) -> None: ...

class AttachSession(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class RenewSession(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseSession(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GrantArtifact(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: _types_pb2.Blob
    def __init__(self, manifest: _Optional[_Union[_types_pb2.Blob, _Mapping]] = ...) -> None: ...

class WithdrawArtifact(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: _types_pb2.Blob
    def __init__(self, manifest: _Optional[_Union[_types_pb2.Blob, _Mapping]] = ...) -> None: ...

class ClientEvent(_message.Message):
    __slots__ = ("waiting", "ready", "granted", "data", "ended")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    waiting: _types_pb2.Job
    ready: SessionReady
    granted: ArtifactGranted
    data: bytes
    ended: SessionEnded
    def __init__(self, waiting: _Optional[_Union[_types_pb2.Job, _Mapping]] = ..., ready: _Optional[_Union[SessionReady, _Mapping]] = ..., granted: _Optional[_Union[ArtifactGranted, _Mapping]] = ..., data: _Optional[bytes] = ..., ended: _Optional[_Union[SessionEnded, _Mapping]] = ...) -> None: ...

class SessionReady(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: _types_pb2.DeviceInfo
    def __init__(self, device: _Optional[_Union[_types_pb2.DeviceInfo, _Mapping]] = ...) -> None: ...

class ArtifactGranted(_message.Message):
    __slots__ = ("problem", "hint")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    problem: str
    hint: str
    def __init__(self, problem: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class SessionEnded(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: _types_pb2.Outcome
    def __init__(self, outcome: _Optional[_Union[_types_pb2.Outcome, _Mapping]] = ...) -> None: ...

class DeviceFrame(_message.Message):
    __slots__ = ("serve", "data", "done")
    SERVE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    serve: _types_pb2.Lease
    data: bytes
    done: CloseSession
    def __init__(self, serve: _Optional[_Union[_types_pb2.Lease, _Mapping]] = ..., data: _Optional[bytes] = ..., done: _Optional[_Union[CloseSession, _Mapping]] = ...) -> None: ...

class DeviceEvent(_message.Message):
    __slots__ = ("data", "close")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    close: CloseSession
    def __init__(self, data: _Optional[bytes] = ..., close: _Optional[_Union[CloseSession, _Mapping]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("id", "freed", "load", "unload", "call", "time", "put", "fetch", "free", "put_file", "fetch_file", "list_files", "remove_file", "piece", "cancel")
    ID_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    PUT_FILE_FIELD_NUMBER: _ClassVar[int]
    FETCH_FILE_FIELD_NUMBER: _ClassVar[int]
    LIST_FILES_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FILE_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    id: int
    freed: _containers.RepeatedScalarFieldContainer[int]
    load: LoadArtifact
    unload: UnloadArtifact
    call: CallFunction
    time: TimeFunction
    put: PutTensor
    fetch: FetchTensor
    free: FreeTensors
    put_file: PutFile
    fetch_file: FetchFile
    list_files: ListFiles
    remove_file: RemoveFile
    piece: bytes
    cancel: CancelRequest
    def __init__(self, id: _Optional[int] = ..., freed: _Optional[_Iterable[int]] = ..., load: _Optional[_Union[LoadArtifact, _Mapping]] = ..., unload: _Optional[_Union[UnloadArtifact, _Mapping]] = ..., call: _Optional[_Union[CallFunction, _Mapping]] = ..., time: _Optional[_Union[TimeFunction, _Mapping]] = ..., put: _Optional[_Union[PutTensor, _Mapping]] = ..., fetch: _Optional[_Union[FetchTensor, _Mapping]] = ..., free: _Optional[_Union[FreeTensors, _Mapping]] = ..., put_file: _Optional[_Union[PutFile, _Mapping]] = ..., fetch_file: _Optional[_Union[FetchFile, _Mapping]] = ..., list_files: _Optional[_Union[ListFiles, _Mapping]] = ..., remove_file: _Optional[_Union[RemoveFile, _Mapping]] = ..., piece: _Optional[bytes] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ...) -> None: ...

class SessionReply(_message.Message):
    __slots__ = ("id", "failed", "loaded", "called", "measured", "tensor", "files", "done", "piece")
    ID_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    CALLED_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    id: int
    failed: RequestFailed
    loaded: ArtifactLoaded
    called: FunctionCalled
    measured: _types_pb2.Measurement
    tensor: Value
    files: FileList
    done: Done
    piece: bytes
    def __init__(self, id: _Optional[int] = ..., failed: _Optional[_Union[RequestFailed, _Mapping]] = ..., loaded: _Optional[_Union[ArtifactLoaded, _Mapping]] = ..., called: _Optional[_Union[FunctionCalled, _Mapping]] = ..., measured: _Optional[_Union[_types_pb2.Measurement, _Mapping]] = ..., tensor: _Optional[_Union[Value, _Mapping]] = ..., files: _Optional[_Union[FileList, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., piece: _Optional[bytes] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Value(_message.Message):
    __slots__ = ("name", "dtype", "shape", "handle", "inline", "streamed_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    handle: int
    inline: bytes
    streamed_bytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., handle: _Optional[int] = ..., inline: _Optional[bytes] = ..., streamed_bytes: _Optional[int] = ...) -> None: ...

class LoadArtifact(_message.Message):
    __slots__ = ("manifest", "signature", "on", "num_threads", "transfer_ms", "load_ms")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    manifest: _types_pb2.Blob
    signature: _types_pb2.Signature
    on: str
    num_threads: int
    transfer_ms: int
    load_ms: int
    def __init__(self, manifest: _Optional[_Union[_types_pb2.Blob, _Mapping]] = ..., signature: _Optional[_Union[_types_pb2.Signature, _Mapping]] = ..., on: _Optional[str] = ..., num_threads: _Optional[int] = ..., transfer_ms: _Optional[int] = ..., load_ms: _Optional[int] = ...) -> None: ...

class ArtifactLoaded(_message.Message):
    __slots__ = ("artifact", "device")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    artifact: int
    device: str
    def __init__(self, artifact: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class UnloadArtifact(_message.Message):
    __slots__ = ("artifact",)
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    artifact: int
    def __init__(self, artifact: _Optional[int] = ...) -> None: ...

class CallFunction(_message.Message):
    __slots__ = ("artifact", "function", "inputs", "keep", "run_ms")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    RUN_MS_FIELD_NUMBER: _ClassVar[int]
    artifact: int
    function: str
    inputs: _containers.RepeatedCompositeFieldContainer[Value]
    keep: bool
    run_ms: int
    def __init__(self, artifact: _Optional[int] = ..., function: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., keep: bool = ..., run_ms: _Optional[int] = ...) -> None: ...

class FunctionCalled(_message.Message):
    __slots__ = ("outputs", "duration_ns")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Value]
    duration_ns: int
    def __init__(self, outputs: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class TimeFunction(_message.Message):
    __slots__ = ("artifact", "function", "inputs", "options", "run_ms")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    RUN_MS_FIELD_NUMBER: _ClassVar[int]
    artifact: int
    function: str
    inputs: _containers.RepeatedCompositeFieldContainer[Value]
    options: _types_pb2.TimeOptions
    run_ms: int
    def __init__(self, artifact: _Optional[int] = ..., function: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., options: _Optional[_Union[_types_pb2.TimeOptions, _Mapping]] = ..., run_ms: _Optional[int] = ...) -> None: ...

class PutTensor(_message.Message):
    __slots__ = ("tensor",)
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    tensor: Value
    def __init__(self, tensor: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class FetchTensor(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class FreeTensors(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionFile(_message.Message):
    __slots__ = ("name", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class PutFile(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: SessionFile
    def __init__(self, file: _Optional[_Union[SessionFile, _Mapping]] = ...) -> None: ...

class FetchFile(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListFiles(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RemoveFile(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class FileList(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[SessionFile]
    def __init__(self, files: _Optional[_Iterable[_Union[SessionFile, _Mapping]]] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("outcome", "runner_ended")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RUNNER_ENDED_FIELD_NUMBER: _ClassVar[int]
    outcome: _types_pb2.Outcome
    runner_ended: bool
    def __init__(self, outcome: _Optional[_Union[_types_pb2.Outcome, _Mapping]] = ..., runner_ended: bool = ...) -> None: ...
