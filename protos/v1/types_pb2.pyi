# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeviceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE_STATE_UNSPECIFIED: _ClassVar[DeviceState]
    DEVICE_STATE_IDLE: _ClassVar[DeviceState]
    DEVICE_STATE_BUSY: _ClassVar[DeviceState]
    DEVICE_STATE_GONE: _ClassVar[DeviceState]
    DEVICE_STATE_MAINTENANCE: _ClassVar[DeviceState]
    DEVICE_STATE_QUARANTINED: _ClassVar[DeviceState]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_QUEUE: _ClassVar[Stage]
    STAGE_TRANSFER: _ClassVar[Stage]
    STAGE_LOAD: _ClassVar[Stage]
    STAGE_RUN: _ClassVar[Stage]

class OutcomeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_KIND_UNSPECIFIED: _ClassVar[OutcomeKind]
    OUTCOME_KIND_OK: _ClassVar[OutcomeKind]
    OUTCOME_KIND_WRONG_RESULT: _ClassVar[OutcomeKind]
    OUTCOME_KIND_TIMEOUT: _ClassVar[OutcomeKind]
    OUTCOME_KIND_CRASH: _ClassVar[OutcomeKind]
    OUTCOME_KIND_OUT_OF_MEMORY: _ClassVar[OutcomeKind]
    OUTCOME_KIND_LOAD_ERROR: _ClassVar[OutcomeKind]
    OUTCOME_KIND_DEVICE_LOST: _ClassVar[OutcomeKind]
    OUTCOME_KIND_CANCELLED: _ClassVar[OutcomeKind]
    OUTCOME_KIND_INVALID_MEASUREMENT: _ClassVar[OutcomeKind]
    OUTCOME_KIND_BAD_REQUEST: _ClassVar[OutcomeKind]
    OUTCOME_KIND_DEVICE_FAULT: _ClassVar[OutcomeKind]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_VALID: _ClassVar[Verdict]
    VERDICT_SUSPECT: _ClassVar[Verdict]
    VERDICT_INVALID: _ClassVar[Verdict]
    VERDICT_EMULATED: _ClassVar[Verdict]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_ASSIGNED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_DONE: _ClassVar[JobState]
DEVICE_STATE_UNSPECIFIED: DeviceState
DEVICE_STATE_IDLE: DeviceState
DEVICE_STATE_BUSY: DeviceState
DEVICE_STATE_GONE: DeviceState
DEVICE_STATE_MAINTENANCE: DeviceState
DEVICE_STATE_QUARANTINED: DeviceState
STAGE_UNSPECIFIED: Stage
STAGE_QUEUE: Stage
STAGE_TRANSFER: Stage
STAGE_LOAD: Stage
STAGE_RUN: Stage
OUTCOME_KIND_UNSPECIFIED: OutcomeKind
OUTCOME_KIND_OK: OutcomeKind
OUTCOME_KIND_WRONG_RESULT: OutcomeKind
OUTCOME_KIND_TIMEOUT: OutcomeKind
OUTCOME_KIND_CRASH: OutcomeKind
OUTCOME_KIND_OUT_OF_MEMORY: OutcomeKind
OUTCOME_KIND_LOAD_ERROR: OutcomeKind
OUTCOME_KIND_DEVICE_LOST: OutcomeKind
OUTCOME_KIND_CANCELLED: OutcomeKind
OUTCOME_KIND_INVALID_MEASUREMENT: OutcomeKind
OUTCOME_KIND_BAD_REQUEST: OutcomeKind
OUTCOME_KIND_DEVICE_FAULT: OutcomeKind
VERDICT_UNSPECIFIED: Verdict
VERDICT_VALID: Verdict
VERDICT_SUSPECT: Verdict
VERDICT_INVALID: Verdict
VERDICT_EMULATED: Verdict
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_ASSIGNED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_DONE: JobState

class Blob(_message.Message):
    __slots__ = ("digest", "size_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "inline", "blob")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    inline: bytes
    blob: Blob
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., inline: _Optional[bytes] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class Protocol(_message.Message):
    __slots__ = ("version", "capabilities", "software")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    version: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    software: str
    def __init__(self, version: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ...) -> None: ...

class Accelerator(_message.Message):
    __slots__ = ("kind", "index", "name", "driver", "arch", "memory_bytes", "shared_bytes", "max_threads", "compute_units", "features")
    KIND_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_THREADS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_UNITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    index: int
    name: str
    driver: str
    arch: str
    memory_bytes: int
    shared_bytes: int
    max_threads: int
    compute_units: int
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[str] = ..., index: _Optional[int] = ..., name: _Optional[str] = ..., driver: _Optional[str] = ..., arch: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., max_threads: _Optional[int] = ..., compute_units: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("name", "labels", "arch", "cpu_features", "cpu_name", "num_cores", "memory_bytes", "target", "emulated", "abi_version", "os_release", "accelerators", "confinement")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    CPU_FEATURES_FIELD_NUMBER: _ClassVar[int]
    CPU_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    EMULATED_FIELD_NUMBER: _ClassVar[int]
    ABI_VERSION_FIELD_NUMBER: _ClassVar[int]
    OS_RELEASE_FIELD_NUMBER: _ClassVar[int]
    ACCELERATORS_FIELD_NUMBER: _ClassVar[int]
    CONFINEMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    arch: str
    cpu_features: _containers.RepeatedScalarFieldContainer[str]
    cpu_name: str
    num_cores: int
    memory_bytes: int
    target: str
    emulated: bool
    abi_version: int
    os_release: str
    accelerators: _containers.RepeatedCompositeFieldContainer[Accelerator]
    confinement: Confinement
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., arch: _Optional[str] = ..., cpu_features: _Optional[_Iterable[str]] = ..., cpu_name: _Optional[str] = ..., num_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., target: _Optional[str] = ..., emulated: bool = ..., abi_version: _Optional[int] = ..., os_release: _Optional[str] = ..., accelerators: _Optional[_Iterable[_Union[Accelerator, _Mapping]]] = ..., confinement: _Optional[_Union[Confinement, _Mapping]] = ...) -> None: ...

class Confinement(_message.Message):
    __slots__ = ("memory", "user", "network", "files", "calls", "measuring_cpus", "missing")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    MEASURING_CPUS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    memory: str
    user: str
    network: bool
    files: bool
    calls: bool
    measuring_cpus: _containers.RepeatedScalarFieldContainer[int]
    missing: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, memory: _Optional[str] = ..., user: _Optional[str] = ..., network: bool = ..., files: bool = ..., calls: bool = ..., measuring_cpus: _Optional[_Iterable[int]] = ..., missing: _Optional[_Iterable[str]] = ...) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("info", "state", "last_seen_unix_ms", "running_job_id", "detail", "health", "reservation", "noise", "upcoming")
    INFO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    UPCOMING_FIELD_NUMBER: _ClassVar[int]
    info: DeviceInfo
    state: DeviceState
    last_seen_unix_ms: int
    running_job_id: str
    detail: str
    health: Health
    reservation: Reservation
    noise: _containers.RepeatedCompositeFieldContainer[NoiseFloor]
    upcoming: _containers.RepeatedCompositeFieldContainer[Reservation]
    def __init__(self, info: _Optional[_Union[DeviceInfo, _Mapping]] = ..., state: _Optional[_Union[DeviceState, str]] = ..., last_seen_unix_ms: _Optional[int] = ..., running_job_id: _Optional[str] = ..., detail: _Optional[str] = ..., health: _Optional[_Union[Health, _Mapping]] = ..., reservation: _Optional[_Union[Reservation, _Mapping]] = ..., noise: _Optional[_Iterable[_Union[NoiseFloor, _Mapping]]] = ..., upcoming: _Optional[_Iterable[_Union[Reservation, _Mapping]]] = ...) -> None: ...

class NoiseFloor(_message.Message):
    __slots__ = ("relative", "num_threads", "on", "target", "software", "governor", "comparisons", "measured_unix_ms", "stale")
    RELATIVE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    GOVERNOR_FIELD_NUMBER: _ClassVar[int]
    COMPARISONS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    relative: float
    num_threads: int
    on: str
    target: str
    software: str
    governor: str
    comparisons: int
    measured_unix_ms: int
    stale: str
    def __init__(self, relative: _Optional[float] = ..., num_threads: _Optional[int] = ..., on: _Optional[str] = ..., target: _Optional[str] = ..., software: _Optional[str] = ..., governor: _Optional[str] = ..., comparisons: _Optional[int] = ..., measured_unix_ms: _Optional[int] = ..., stale: _Optional[str] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("id", "device", "user", "from_unix_ms", "until_unix_ms", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    FROM_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    UNTIL_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    device: str
    user: str
    from_unix_ms: int
    until_unix_ms: int
    reason: str
    def __init__(self, id: _Optional[str] = ..., device: _Optional[str] = ..., user: _Optional[str] = ..., from_unix_ms: _Optional[int] = ..., until_unix_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Deadlines(_message.Message):
    __slots__ = ("queue_ms", "transfer_ms", "load_ms", "run_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    RUN_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: int
    transfer_ms: int
    load_ms: int
    run_ms: int
    def __init__(self, queue_ms: _Optional[int] = ..., transfer_ms: _Optional[int] = ..., load_ms: _Optional[int] = ..., run_ms: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("kind", "stage", "signal", "exit_status", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: OutcomeKind
    stage: Stage
    signal: int
    exit_status: int
    message: str
    def __init__(self, kind: _Optional[_Union[OutcomeKind, str]] = ..., stage: _Optional[_Union[Stage, str]] = ..., signal: _Optional[int] = ..., exit_status: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class TimeOptions(_message.Message):
    __slots__ = ("number", "repeat", "min_repeat_ns", "warmup", "limit_zero_time_iterations", "cooldown_interval_ns", "repeats_to_cooldown", "cache_flush_bytes", "profile")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REPEAT_FIELD_NUMBER: _ClassVar[int]
    MIN_REPEAT_NS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    LIMIT_ZERO_TIME_ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    COOLDOWN_INTERVAL_NS_FIELD_NUMBER: _ClassVar[int]
    REPEATS_TO_COOLDOWN_FIELD_NUMBER: _ClassVar[int]
    CACHE_FLUSH_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    number: int
    repeat: int
    min_repeat_ns: int
    warmup: int
    limit_zero_time_iterations: int
    cooldown_interval_ns: int
    repeats_to_cooldown: int
    cache_flush_bytes: int
    profile: bool
    def __init__(self, number: _Optional[int] = ..., repeat: _Optional[int] = ..., min_repeat_ns: _Optional[int] = ..., warmup: _Optional[int] = ..., limit_zero_time_iterations: _Optional[int] = ..., cooldown_interval_ns: _Optional[int] = ..., repeats_to_cooldown: _Optional[int] = ..., cache_flush_bytes: _Optional[int] = ..., profile: bool = ...) -> None: ...

class Health(_message.Message):
    __slots__ = ("load_1min", "temperature_celsius", "frequency_mhz", "governor", "memory_available_bytes", "disk_free_bytes", "throttled", "problems")
    LOAD_1MIN_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_MHZ_FIELD_NUMBER: _ClassVar[int]
    GOVERNOR_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    load_1min: float
    temperature_celsius: float
    frequency_mhz: float
    governor: str
    memory_available_bytes: int
    disk_free_bytes: int
    throttled: _containers.RepeatedScalarFieldContainer[str]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, load_1min: _Optional[float] = ..., temperature_celsius: _Optional[float] = ..., frequency_mhz: _Optional[float] = ..., governor: _Optional[str] = ..., memory_available_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., throttled: _Optional[_Iterable[str]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("steps", "clock_hz", "read_bytes_per_s", "variant")
    class Step(_message.Message):
        __slots__ = ("samples_ns",)
        SAMPLES_NS_FIELD_NUMBER: _ClassVar[int]
        samples_ns: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, samples_ns: _Optional[_Iterable[float]] = ...) -> None: ...
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_HZ_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[Profile.Step]
    clock_hz: float
    read_bytes_per_s: _containers.RepeatedScalarFieldContainer[float]
    variant: int
    def __init__(self, steps: _Optional[_Iterable[_Union[Profile.Step, _Mapping]]] = ..., clock_hz: _Optional[float] = ..., read_bytes_per_s: _Optional[_Iterable[float]] = ..., variant: _Optional[int] = ...) -> None: ...

class Measurement(_message.Message):
    __slots__ = ("options", "samples_ns", "resolution_ns", "num_threads", "before", "after", "verdict", "reasons", "profile", "pinning")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_NS_FIELD_NUMBER: _ClassVar[int]
    RESOLUTION_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PINNING_FIELD_NUMBER: _ClassVar[int]
    options: TimeOptions
    samples_ns: _containers.RepeatedScalarFieldContainer[float]
    resolution_ns: int
    num_threads: int
    before: Health
    after: Health
    verdict: Verdict
    reasons: _containers.RepeatedScalarFieldContainer[str]
    profile: Profile
    pinning: Pinning
    def __init__(self, options: _Optional[_Union[TimeOptions, _Mapping]] = ..., samples_ns: _Optional[_Iterable[float]] = ..., resolution_ns: _Optional[int] = ..., num_threads: _Optional[int] = ..., before: _Optional[_Union[Health, _Mapping]] = ..., after: _Optional[_Union[Health, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., reasons: _Optional[_Iterable[str]] = ..., profile: _Optional[_Union[Profile, _Mapping]] = ..., pinning: _Optional[_Union[Pinning, _Mapping]] = ...) -> None: ...

class Pinning(_message.Message):
    __slots__ = ("cpus", "reserved", "enforced", "others_share")
    CPUS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    ENFORCED_FIELD_NUMBER: _ClassVar[int]
    OTHERS_SHARE_FIELD_NUMBER: _ClassVar[int]
    cpus: _containers.RepeatedScalarFieldContainer[int]
    reserved: bool
    enforced: bool
    others_share: float
    def __init__(self, cpus: _Optional[_Iterable[int]] = ..., reserved: bool = ..., enforced: bool = ..., others_share: _Optional[float] = ...) -> None: ...

class RunTask(_message.Message):
    __slots__ = ("inputs", "discard_outputs")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    DISCARD_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    discard_outputs: bool
    def __init__(self, inputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., discard_outputs: bool = ...) -> None: ...

class BenchTask(_message.Message):
    __slots__ = ("inputs", "options", "return_outputs")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    RETURN_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    options: TimeOptions
    return_outputs: bool
    def __init__(self, inputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., options: _Optional[_Union[TimeOptions, _Mapping]] = ..., return_outputs: bool = ...) -> None: ...

class SessionTask(_message.Message):
    __slots__ = ("lease_ms",)
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    def __init__(self, lease_ms: _Optional[int] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("manifest", "function", "selector", "deadlines", "priority", "num_threads", "on", "signature", "run", "bench", "session")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    DEADLINES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    BENCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    manifest: Blob
    function: str
    selector: str
    deadlines: Deadlines
    priority: int
    num_threads: int
    on: str
    signature: Signature
    run: RunTask
    bench: BenchTask
    session: SessionTask
    def __init__(self, manifest: _Optional[_Union[Blob, _Mapping]] = ..., function: _Optional[str] = ..., selector: _Optional[str] = ..., deadlines: _Optional[_Union[Deadlines, _Mapping]] = ..., priority: _Optional[int] = ..., num_threads: _Optional[int] = ..., on: _Optional[str] = ..., signature: _Optional[_Union[Signature, _Mapping]] = ..., run: _Optional[_Union[RunTask, _Mapping]] = ..., bench: _Optional[_Union[BenchTask, _Mapping]] = ..., session: _Optional[_Union[SessionTask, _Mapping]] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("public_key", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("stage", "duration_ns")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    duration_ns: int
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class JobResult(_message.Message):
    __slots__ = ("outcome", "outputs", "measurement", "stage_times", "device")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MEASUREMENT_FIELD_NUMBER: _ClassVar[int]
    STAGE_TIMES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    outputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    measurement: Measurement
    stage_times: _containers.RepeatedCompositeFieldContainer[StageTime]
    device: str
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., measurement: _Optional[_Union[Measurement, _Mapping]] = ..., stage_times: _Optional[_Iterable[_Union[StageTime, _Mapping]]] = ..., device: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "spec", "state", "stage", "device", "result", "submitted_unix_ms", "finished_unix_ms", "detail", "user", "position", "eta_ms", "faults")
    ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ETA_MS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    spec: JobSpec
    state: JobState
    stage: Stage
    device: str
    result: JobResult
    submitted_unix_ms: int
    finished_unix_ms: int
    detail: str
    user: str
    position: int
    eta_ms: int
    faults: _containers.RepeatedCompositeFieldContainer[DeviceFault]
    def __init__(self, id: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., state: _Optional[_Union[JobState, str]] = ..., stage: _Optional[_Union[Stage, str]] = ..., device: _Optional[str] = ..., result: _Optional[_Union[JobResult, _Mapping]] = ..., submitted_unix_ms: _Optional[int] = ..., finished_unix_ms: _Optional[int] = ..., detail: _Optional[str] = ..., user: _Optional[str] = ..., position: _Optional[int] = ..., eta_ms: _Optional[int] = ..., faults: _Optional[_Iterable[_Union[DeviceFault, _Mapping]]] = ...) -> None: ...

class DeviceFault(_message.Message):
    __slots__ = ("device", "reason")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device: str
    reason: str
    def __init__(self, device: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("job_id", "epoch", "duration_ms")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    epoch: int
    duration_ms: int
    def __init__(self, job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., duration_ms: _Optional[int] = ...) -> None: ...
