"""The nouns of the wire as plain frozen dataclasses; `kedge.rpc.convert` alone translates them to and from protobuf.

Units are in the field names. Enumerations that a message may leave open are `None` here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact.manifest import Blob
from kedge.rpc.outcome import Outcome, Stage, Word

__all__ = [
    "NO_BLOB",
    "Accelerator",
    "BenchTask",
    "Blob",
    "Confinement",
    "Deadlines",
    "DeviceFault",
    "DeviceInfo",
    "DeviceState",
    "DeviceStatus",
    "Health",
    "Job",
    "JobResult",
    "JobSpec",
    "JobState",
    "Lease",
    "Measurement",
    "Pinning",
    "Protocol",
    "ReportedTarget",
    "Reservation",
    "RunTask",
    "SessionTask",
    "Signature",
    "StageTime",
    "StepSamples",
    "Task",
    "Tensor",
    "TimeOptions",
    "TrackerMember",
    "TrackerStatus",
    "Verdict",
    "plan_inline",
]

#: A tensor above this many bytes travels as a blob.
INLINE_TENSOR_BYTES = 1 << 20
#: So does one that would lift the inline bytes of its message above this. A message is whole before anything else is
#: heard of who sends it, and a device is given up after 10 s of silence: what is larger would need more than 110 KB/s,
#: would be sent again and again by slower links, and gains little by being inline.
INLINE_MESSAGE_BYTES = 1 << 20

#: Samples of one measurement on a device.
MAX_SAMPLES = (4 << 20) // 8
#: Of a profile, which has a row of samples for each step.
MAX_PROFILE_SAMPLES = 200
#: No stage may take longer.
MAX_DEADLINE_MS = 366 * 86_400_000
#: So long a session may live without a word from its client.
MAX_LEASE_MS = 3_600_000
#: Jobs in one list.
MAX_LISTED = 10_000

#: Bytes of one element, by numpy name.
ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip


_STATUS_FIELDS = (
    "state", "last_seen_unix_ms", "running_job_id", "detail", "health", "reservation", "noise", "upcoming",
)  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Word):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def plan_inline(sizes: Iterable[int]) -> List[bool]:
    """Which tensors of one message travel inline (True) and which as blobs, from their sizes in bytes."""
    plan, total = [], 0
    for size in sizes:
        inline = size <= INLINE_TENSOR_BYTES and total + size <= INLINE_MESSAGE_BYTES
        total += size if inline else 0
        plan.append(inline)
    return plan


class DeviceState(Word):
    """What a device is doing."""

    IDLE = "idle"
    BUSY = "busy"
    GONE = "gone"
    MAINTENANCE = "maintenance"
    QUARANTINED = "quarantined"


class JobState(Word):
    """Where a job is."""

    QUEUED = "queued"
    ASSIGNED = "assigned"
    RUNNING = "running"
    DONE = "done"


class Verdict(Word):
    """Whether a measurement can be trusted."""

    VALID = "valid"
    SUSPECT = "suspect"
    INVALID = "invalid"
    EMULATED = "emulated"


@dataclass(frozen=True)
class Protocol:
    """What one end speaks; `software` is for people."""

    version: int
    capabilities: Tuple[str, ...] = ()
    software: str = ""


@dataclass(frozen=True)
class Tensor:
    """A dense row-major little-endian array: `dtype` is a numpy name, `data` its bytes or the blob that holds them."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    data: Union[bytes, Blob]

    @property
    def size_bytes(self) -> int:
        """What dtype and shape promise; raises ValueError for a dtype that the wire does not carry."""
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        size = ITEM_BYTES[self.dtype]
        for dim in self.shape:
            if dim < 0:
                raise ValueError(f"tensor {self.name!r}: shape {self.shape} has a negative dim")
            size *= dim
        return size

    def check(self) -> None:
        """Raise ValueError unless the data has the length that dtype and shape promise."""
        held = self.data.size if isinstance(self.data, Blob) else len(self.data)
        if held != self.size_bytes:
            raise ValueError(
                f"tensor {self.name!r}: {self.dtype}{list(self.shape)} takes {self.size_bytes} bytes, not {held}"
            )


@dataclass(frozen=True)
class Confinement:
    """What holds the native code of a job on a device.

    Attributes:
        memory: "cgroup", or "address space" where there is no control group.
        user: whom it runs as, "" where that is the agent's own user.
        network: it has a network of its own, with nothing in it.
        files: it may write in its job's folder only, and read what belongs to the system.
        calls: a filter refuses system calls that reach further.
        measuring_cpus: the cores that are kept for timings.
        missing: in words, what does not hold, why, and what would help.
    """

    memory: str = ""
    user: str = ""
    network: bool = False
    files: bool = False
    calls: bool = False
    measuring_cpus: Tuple[int, ...] = ()
    missing: Tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [f"memory by {self.memory}"] if self.memory else []
        words += [f"user {self.user}"] if self.user else []
        words += [name for name in ("network", "files", "calls") if getattr(self, name)]
        return ", ".join(words) or "none"


class ReportedTarget(str):
    """A device's target string as its agent reports it, with all features of its CPU by LLVM's names.

    Agents may be newer than whoever compiles for them: a CPU that is not known there is taken for what it can do.
    """

    cpu_features: Tuple[str, ...]

    def __new__(cls, text: str, cpu_features: Tuple[str, ...] = ()) -> ReportedTarget:
        """`text` with what the CPU has."""
        made = super().__new__(cls, text)
        made.cpu_features = cpu_features
        return made


@dataclass(frozen=True)
class DeviceInfo:
    """What an agent reports about its machine. `arch` is what `uname -m` prints, features have LLVM's names."""

    name: str
    arch: str
    labels: Mapping[str, str] = field(default_factory=dict)
    cpu_features: Tuple[str, ...] = ()
    cpu_name: str = ""
    num_cores: int = 0
    memory_bytes: int = 0
    target: str = ""
    emulated: bool = False
    abi_version: int = 0
    os_release: str = ""
    accelerators: Tuple[Accelerator, ...] = ()
    confinement: Optional[Confinement] = None

    @property
    def targets(self) -> Tuple[str, ...]:
        """Target strings for all that kernels can run on there: CUDA, then OpenCL, then the CPU."""
        gpus = sorted(self.accelerators, key=lambda gpu: (gpu.kind, gpu.index))
        found = (*dict.fromkeys(gpu.target(self.target) for gpu in gpus), self.target)
        return tuple(ReportedTarget(text, self.cpu_features) for text in found)


@dataclass(frozen=True)
class Health:
    """A device's condition at one moment; what could not be read is None (or an empty governor).

    `throttled` names what slows the device down ("under-voltage", "heat"): it may run, but its timings say little.
    `problems` says in words why nothing should be run there now.
    """

    load_1min: Optional[float] = None
    temperature_celsius: Optional[float] = None
    frequency_mhz: Optional[float] = None
    governor: str = ""
    memory_available_bytes: Optional[int] = None
    disk_free_bytes: Optional[int] = None
    throttled: Tuple[str, ...] = ()
    problems: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Reservation:
    """From one time to another only this user's jobs go to the device."""

    id: str
    device: str
    user: str
    from_unix_ms: int
    until_unix_ms: int
    reason: str = ""

    def to_json(self) -> Dict[str, Any]:
        """Plain values for `--json`."""
        tree: Dict[str, Any] = _plain(self)
        return tree


@dataclass(frozen=True)
class NoiseSample:
    """What one comparison of an artifact with itself said of a device's noise; the fields as of `NoiseFloor`."""

    id: str
    device: str
    user: str
    relative: float
    num_threads: int
    on: str
    target: str
    software: str
    governor: str
    measured_unix_ms: int


@dataclass(frozen=True)
class NoiseFloor:
    """How far times of equal code are apart on a device, by comparisons of an artifact with itself.

    `relative` 0.02 says that ratios within 2 % of 1 mean nothing, with `num_threads` on "cpu" or a GPU. `target`,
    `software` (the agent's) and `governor` are what the device was like then, `measured_unix_ms` is the newest of the
    `comparisons`. `stale` says why it counts no more; "" means that it does.
    """

    relative: float
    num_threads: int
    on: str
    target: str
    software: str
    governor: str
    comparisons: int
    measured_unix_ms: int
    stale: str = ""


@dataclass(frozen=True)
class DeviceStatus:
    """A device as the tracker sees it now.

    `detail` says why it is in maintenance or quarantine, `health` is that of its last heartbeat. `upcoming` are the
    reservations that have not begun, the next one first. A device of which only the name is known is listed while it is
    in maintenance or reserved: without an arch, last seen at 0.
    """

    info: DeviceInfo
    state: DeviceState
    last_seen_unix_ms: int = 0
    running_job_id: str = ""
    detail: str = ""
    health: Optional[Health] = None
    reservation: Optional[Reservation] = None
    noise: Tuple[NoiseFloor, ...] = ()
    upcoming: Tuple[Reservation, ...] = ()

    def to_json(self) -> Dict[str, Any]:
        """Plain values for `--json`."""
        return {**_plain(self.info), **{name: _plain(getattr(self, name)) for name in _STATUS_FIELDS}}


@dataclass(frozen=True)
class TrackerMember:
    """One of several trackers on a database: `address` serves clients, times are those of the database's clock.

    `gone` says that it has not been seen for a while.
    """

    name: str
    address: str
    software: str
    leads: bool
    started_unix_ms: int
    seen_unix_ms: int
    gone: bool = False


@dataclass(frozen=True)
class TrackerStatus:
    """How a tracker is, and as whom it knows the one who asks.

    `expires_unix_s` is the end of the token (0: never), `store_problem` says why nothing can be stored now. `agents`
    tells what each connected device speaks. `trackers` are those that share a database, in the `epoch` of the one that
    leads; a tracker without others has none, and epoch 0.
    """

    protocol: Protocol
    unix_ms: int
    user: str
    role: str
    expires_unix_s: int = 0
    store_problem: str = ""
    disk_free_bytes: int = 0
    agents: Mapping[str, Protocol] = field(default_factory=dict)
    epoch: int = 0
    trackers: Tuple[TrackerMember, ...] = ()


@dataclass(frozen=True)
class Deadlines:
    """How long each stage may take, in milliseconds, at most MAX_DEADLINE_MS; 0 means the tracker's default."""

    queue_ms: int = 0
    transfer_ms: int = 0
    load_ms: int = 0
    run_ms: int = 0

    def of(self, stage: Stage) -> int:
        """The deadline of one stage."""
        value: int = getattr(self, f"{stage.value}_ms")
        return value


@dataclass(frozen=True)
class TimeOptions:
    """How to time; names and meanings of `kedge_time_options` in kedge.h (and of TVM's time_evaluator)."""

    number: int = 1
    repeat: int = 1
    min_repeat_ns: int = 0
    warmup: int = 1
    limit_zero_time_iterations: int = 100
    cooldown_interval_ns: int = 0
    repeats_to_cooldown: int = 1
    cache_flush_bytes: int = 0
    profile: bool = False


@dataclass(frozen=True)
class StepSamples:
    """What a profile has beside the samples of the whole call.

    `steps_ns` has a row for each step of the function, in the order they run: nanoseconds of one call, per sample.
    `clock_hz` is that of a busy core, `read_bytes_per_s` what all threads together read of the working sets
    `abi.ROOF_BYTES`, 0 where the device had no memory for one; both were measured right after the samples. `variant`
    is the index of the artifact's variant that ran.
    """

    steps_ns: Tuple[Tuple[float, ...], ...]
    clock_hz: float
    read_bytes_per_s: Tuple[float, ...]
    variant: int = 0


@dataclass(frozen=True)
class Pinning:
    """The cores that a measurement ran on.

    `reserved`: the agent keeps them for timings; `enforced`: by a control group, else by affinity. `others_share` is
    the share of their time, from 0 to 1, that others used during the samples; None where the kernel does not say.
    """

    cpus: Tuple[int, ...]
    reserved: bool = False
    enforced: bool = False
    others_share: Optional[float] = None


@dataclass(frozen=True)
class Measurement:
    """A timing with the protocol it used: samples are nanoseconds of one call, averaged over `options.number` calls."""

    options: TimeOptions
    samples_ns: Tuple[float, ...]
    resolution_ns: int = 0
    num_threads: int = 0
    before: Optional[Health] = None
    after: Optional[Health] = None
    verdict: Optional[Verdict] = None
    reasons: Tuple[str, ...] = ()
    profile: Optional[StepSamples] = None
    pinning: Optional[Pinning] = None


@dataclass(frozen=True)
class RunTask:
    """Call a function once."""

    inputs: Tuple[Tensor, ...] = ()
    discard_outputs: bool = False


@dataclass(frozen=True)
class BenchTask:
    """Time a function; with `return_outputs` also return what one call computed."""

    inputs: Tuple[Tensor, ...] = ()
    options: TimeOptions = TimeOptions()
    return_outputs: bool = False


@dataclass(frozen=True)
class SessionTask:
    """Have a device of one's own, until nothing is heard of the client for `lease_ms` (0: the tracker's default).

    The artifacts are named later, on the session's own stream.
    """

    lease_ms: int = 0

    @property
    def inputs(self) -> Tuple[Tensor, ...]:
        """None: they come with the calls."""
        return ()


Task = Union[RunTask, BenchTask, SessionTask]
#: In the place of a session's artifact.
NO_BLOB = Blob("", 0)


@dataclass(frozen=True)
class Signature:
    """Who vouches for an artifact: an Ed25519 public key (32 bytes) and its signature of the manifest (64 bytes)."""

    public_key: bytes
    signature: bytes


@dataclass(frozen=True)
class JobSpec:
    """What to do: `manifest` is the blob of the artifact's manifest, whose members name their own parts.

    `on` says where on the device: "cpu", "opencl", "cuda:1"; "" as the artifact prefers. `signature` is None where
    nobody signed the artifact.
    """

    manifest: Blob
    function: str
    task: Task
    selector: str = ""
    deadlines: Deadlines = Deadlines()
    priority: int = 0
    num_threads: int = 0
    on: str = ""
    signature: Optional[Signature] = None


@dataclass(frozen=True)
class StageTime:
    """How long one stage of a job took."""

    stage: Stage
    duration_ns: int


@dataclass(frozen=True)
class JobResult:
    """What came of a job."""

    outcome: Outcome
    outputs: Tuple[Tensor, ...] = ()
    measurement: Optional[Measurement] = None
    stage_times: Tuple[StageTime, ...] = ()
    device: str = ""


@dataclass(frozen=True)
class DeviceFault:
    """A device failed while it had a job, which then went to another one."""

    device: str
    reason: str


@dataclass(frozen=True)
class Job:
    """A job as the tracker sees it, and whose it is; `detail` says why it still waits.

    While it is queued, `position` is 1 for the one that goes next (0: not known), and `eta_ms` how long it may take
    until it starts, as far as earlier jobs tell. `faults` are devices that it was taken from, because they failed.
    """

    id: str
    spec: JobSpec
    state: JobState
    stage: Optional[Stage] = None
    device: str = ""
    result: Optional[JobResult] = None
    submitted_unix_ms: int = 0
    finished_unix_ms: int = 0
    detail: str = ""
    user: str = ""
    position: int = 0
    eta_ms: Optional[int] = None
    faults: Tuple[DeviceFault, ...] = ()

    def to_json(self) -> Dict[str, Any]:
        """Plain values for `--json`, without the contents of tensors."""
        tree: Dict[str, Any] = _plain(self)
        return tree


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows: those for which all holds that is said; what is empty, or 0, says nothing.

    `device` has the job, or had it last; `artifact` is what its artifact's digest (hex) begins with.
    """

    user: str = ""
    device: str = ""
    artifact: str = ""
    since_unix_ms: int = 0
    ids: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Lease:
    """The right to run one job. A message with another epoch than the tracker's for that job changes nothing."""

    job_id: str
    epoch: int
    duration_ms: int = 0
