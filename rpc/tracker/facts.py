"""What the tracker's state machine decides: facts to be stored, and messages to be sent once they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge.rpc.artifact import Need
from kedge.rpc.messages import TrackerBody
from kedge.rpc.types import DeviceFault, DeviceInfo, Job, JobResult, JobSpec, NoiseSample, Reservation

#: What an artifact can run on, by variant.
Needs = tuple[Need, ...]
#: Of a session, which takes any device that its selector names.
ANYWHERE: Needs = ()
#: A lease: the job and its epoch.
LeaseKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class JobAccepted:
    """A client's job, and whose it is, before its reply leaves."""

    job_id: str
    seq: int
    spec: JobSpec
    needs: Needs
    key: str
    submitted_ms: int
    user: str = ""


@dataclass(frozen=True, slots=True)
class JobAssigned:
    """The job belongs to a device now, under a new epoch."""

    job_id: str
    device: str
    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class JobRequeued:
    """The job was taken from its device: it waits again, since `queued_ms`.

    `requeues` counts the times that it had not begun, `faults` are the devices that failed while they had it, so far.
    """

    job_id: str
    queued_ms: int
    requeues: int
    faults: tuple[DeviceFault, ...] = ()


@dataclass(frozen=True, slots=True)
class JobWithdrawn:
    """The job could not be stored when it was submitted, and its client was told so: it never was."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobCancelling:
    """Somebody wants the job stopped."""

    job_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobDone:
    """The end of a job, with all devices that failed while they had it."""

    job_id: str
    result: JobResult
    finished_ms: int
    faults: tuple[DeviceFault, ...] = ()


@dataclass(frozen=True, slots=True)
class Serviced:
    """The device is in maintenance."""

    device: str
    reason: str
    user: str
    since_ms: int


@dataclass(frozen=True, slots=True)
class ServiceEnded:
    """The device is back in service."""

    device: str


@dataclass(frozen=True, slots=True)
class Reserved:
    """The device is a user's for a time."""

    reservation: Reservation


@dataclass(frozen=True, slots=True)
class ReservationEnded:
    """The reservation is over, or was given up."""

    reservation_id: str


@dataclass(frozen=True, slots=True)
class BlobOwned:
    """The bytes are open to an owner (`kedge.rpc.tracker.security.owners`)."""

    digest: str
    owner: str


@dataclass(frozen=True, slots=True)
class BlobForgotten:
    """The bytes are nobody's any more."""

    digest: str


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    """A device came or went: what there is to say of it while it is off."""

    info: DeviceInfo
    seen_ms: int


@dataclass(frozen=True, slots=True)
class DeviceForgotten:
    """Nothing is left of a device."""

    device: str


@dataclass(frozen=True, slots=True)
class NoiseKept:
    """A comparison said how noisy a device is; samples that count no more are forgotten."""

    sample: NoiseSample
    forgotten: tuple[str, ...] = ()


JobFact = JobAccepted | JobAssigned | JobRequeued | JobWithdrawn | JobCancelling | JobDone
DeviceFact = Serviced | ServiceEnded | Reserved | ReservationEnded | NoiseKept | DeviceSeen | DeviceForgotten
Fact = JobFact | DeviceFact | BlobOwned | BlobForgotten


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job that is not done, as it is stored."""

    accepted: JobAccepted
    assigned: JobAssigned | None = None
    epoch: int = 0
    cancelling: str | None = None
    requeued: JobRequeued | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """What a tracker finds when it starts; `ended` (job, epoch) and `keys` (key, job) oldest first.

    `last_seq` is the highest sequence number ever given to a job, whether it still lives or not; `all_keys` says that
    no older key is stored beside `keys`.
    """

    tracker_id: str
    records: tuple[JobRecord, ...] = ()
    ended: tuple[tuple[str, int], ...] = ()
    keys: tuple[tuple[str, str], ...] = ()
    last_seq: int = 0
    all_keys: bool = True
    serviced: tuple[Serviced, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    noise: tuple[NoiseSample, ...] = ()
    devices: tuple[DeviceSeen, ...] = ()


@dataclass(frozen=True, slots=True)
class ToAgent:
    """A message on an agent's connection."""

    connection: int
    body: TrackerBody


@dataclass(frozen=True, slots=True)
class CloseAgent:
    """End an agent's connection after what was sent on it."""

    connection: int


@dataclass(frozen=True, slots=True)
class JobChanged:
    """For whoever watches the job: how it is now."""

    job: Job


@dataclass(frozen=True, slots=True)
class DevicesChanged:
    """A device came, went, became busy or idle."""


Send = ToAgent | CloseAgent | JobChanged | DevicesChanged


@dataclass(slots=True)
class Effects:
    """One event's consequences: `sends` leave, in order, only when `facts` are stored (but see outbox.py).

    `notes` are stored, too, and nothing waits for that: of them no promise is made.
    """

    facts: list[Fact] = field(default_factory=list)
    notes: list[DeviceSeen | DeviceForgotten] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
